"""``python -m evaluation.efficiency``: step time and memory of training methods (``cost/step_time.py``)."""

from hift_ds.evaluation.cost.step_time import main

if __name__ == "__main__":
    main()
