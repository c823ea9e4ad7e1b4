"""MT-Bench: a model's answers, a judge's verdicts and their sums."""
