"""Where the optimizer state of a block lives, how it moves, and how it is stepped."""
