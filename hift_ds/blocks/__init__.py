"""Cut a model's parameters into blocks, and schedule which block each step trains."""
