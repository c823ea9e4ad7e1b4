"""The process of a command: its ranks without a launcher, its mistakes and its exit."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from deepspeed import comm as dist

from hift_ds.launch.config import credentials
from hift_ds.launch.errors import UserError
from hift_ds.launch.exit_codes import MISTAKE, RANK_LOST


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError`, so that the message appears once and not once per rank."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UserError`."""
        raise UserError(f"{message}; see --help")


def world_of_one() -> None:
    """Make this process the only rank, unless a launcher has set the ranks."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def report_mistake(error: UserError) -> int:
    """Print a user's mistake once, and return the exit code.

    All ranks find a mistake in the settings. The launcher ends the other ranks as soon as rank 0 has exited. A rank
    that is still alive after a minute has found something that rank 0 has not.
    """
    if os.environ["RANK"] != "0":
        time.sleep(60)
    print(f"error: {credentials.redacted(str(error))}", file=sys.stderr, flush=True)
    return MISTAKE


def run_process(main: Callable[[], int]) -> NoReturn:
    """Call `main`, take down the group of ranks, and exit with the code that `main` returns."""
    sys.excepthook = credentials.print_redacted
    code = main()
    # After these codes, other ranks may be gone or in a collective, so the group cannot be taken down in order.
    if dist.is_initialized() and code not in (MISTAKE, RANK_LOST):
        dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader is gone
            stream.flush()
    # The threads of gloo now and then abort a process that Python takes down ("terminate called without an active
    # exception"), and its exit code is lost.
    os._exit(code)
