"""Training from the command line: settings, data, methods, the loop and what happens around its steps."""
