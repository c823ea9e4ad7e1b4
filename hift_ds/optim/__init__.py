"""The optimizers MeZO and Lion, and what the engine must know about any torch optimizer."""
