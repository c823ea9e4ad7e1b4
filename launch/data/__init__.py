"""The data of a run: reading, conversion to one format, tokens, batches, and the scores of answers."""
