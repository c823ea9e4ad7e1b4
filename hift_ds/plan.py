"""``python -m hift_ds.plan``: the memory planner's command (:mod:`hift_ds.planner.command`)."""

import sys

from hift_ds.planner.command import main

if __name__ == "__main__":
    sys.exit(main())
