"""``python -m evaluation.offline``: pack for a machine without a network (``command.py``)."""

import sys

from hift_ds.evaluation.offline.command import main

if __name__ == "__main__":
    sys.exit(main())
