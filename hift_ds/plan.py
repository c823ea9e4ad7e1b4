"""The module of ``python -m hift_ds.plan``, the command of the memory planner (:mod:`hift_ds.planner.command`)."""

import sys

from hift_ds.planner.command import main

if __name__ == "__main__":
    sys.exit(main())
