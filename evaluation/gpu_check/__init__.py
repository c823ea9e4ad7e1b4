"""Check on one device what the project promises: weights, memory, step times (``python -m evaluation.gpu_check``)."""
