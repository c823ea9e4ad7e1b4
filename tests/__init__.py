"""The tests; and the environment as they found it, which the libraries that they import change for their children."""

import os

ENVIRONMENT = dict(os.environ)
