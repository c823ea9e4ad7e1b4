"""The model and its tokenizer: settings, loading, and the loss of a batch."""
