"""Weights that wait in host memory and take turns in slots on the device."""
