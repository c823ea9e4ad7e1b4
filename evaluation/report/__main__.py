"""``python -m evaluation.report``: the report of a comparison (``command.py``)."""

import sys

from hift_ds.evaluation.report.command import main

if __name__ == "__main__":
    sys.exit(main())
