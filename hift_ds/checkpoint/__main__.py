"""``python -m hift_ds.checkpoint``: verify or adopt checkpoints (:mod:`hift_ds.checkpoint.store`)."""

import sys

from hift_ds.checkpoint.store import main

if __name__ == "__main__":
    sys.exit(main())
