"""The memory planner: request, simulation, accounting, search, picture and command."""
