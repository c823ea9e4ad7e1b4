"""The training entry point: settings, data, methods, the loop and its logs."""
