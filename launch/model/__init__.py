"""The model and its tokenizer: loading, the loss of a batch, export."""
