"""Comparisons of training methods: settings, cells and the command."""
