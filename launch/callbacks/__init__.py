"""What happens around the training steps, one callback per file; launch/run.py lists them."""
