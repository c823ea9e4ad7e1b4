"""Checkpoints: commit, verify, load and adopt."""
