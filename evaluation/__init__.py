"""What HiFT costs and what it reaches, measured against plain PyTorch, stock DeepSpeed and other methods."""
