"""``python -m evaluation.efficiency``: step time and memory of training methods (``cost/efficiency.py``)."""

from hift_ds.evaluation.cost.efficiency import main

if __name__ == "__main__":
    main()
