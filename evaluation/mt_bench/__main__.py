"""``python -m evaluation.mt_bench``: answers, judgements and scores of MT-Bench (``command.py``)."""

import sys

from hift_ds.evaluation.mt_bench.command import main

if __name__ == "__main__":
    sys.exit(main())
