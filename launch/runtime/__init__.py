"""The process and its surroundings: ranks, signals, logs and output files."""
