"""What happens around the training steps, one unit a file."""
