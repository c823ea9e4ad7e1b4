"""The memory planner: it simulates training steps without weights and reports their memory."""
