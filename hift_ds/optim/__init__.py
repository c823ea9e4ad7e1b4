"""Optimizers of our own (MeZO, Lion), and what HiFT must know about any other."""
