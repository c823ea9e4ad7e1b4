"""Parameters to blocks for any Hugging Face model, and which block a step trains."""
