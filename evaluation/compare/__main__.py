"""``python -m evaluation.compare``: compare fine-tuning methods (``command.py``)."""

from hift_ds.evaluation.compare.command import command

if __name__ == "__main__":
    command()
