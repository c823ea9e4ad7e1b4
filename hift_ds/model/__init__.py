"""What HiFT changes in a model's forward pass: activation checkpoints and the loss in chunks."""
