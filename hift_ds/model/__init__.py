"""HiFT's changes to a model's forward pass: activation checkpoints, and the loss in chunks of logits."""
