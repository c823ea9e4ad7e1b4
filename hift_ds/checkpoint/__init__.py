"""Checkpoints: save, verify, load, delete and adopt."""
