"""The tasks: their data, prompts, predictions and metrics."""
