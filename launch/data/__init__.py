"""From files and data sets to batches of tokens, and the scores of answers."""
