"""``python -m hift_ds.checkpoint``: verify or adopt checkpoints (:mod:`hift_ds.checkpoint.command`)."""

import sys

from hift_ds.checkpoint.command import main

if __name__ == "__main__":
    sys.exit(main())
