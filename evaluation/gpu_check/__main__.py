"""``python -m evaluation.gpu_check``."""

import sys

from hift_ds.evaluation.gpu_check.command import main

if __name__ == "__main__":
    sys.exit(main())
