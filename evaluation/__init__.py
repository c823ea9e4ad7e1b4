"""Comparisons of HiFT with other training methods: scores, time and memory."""
