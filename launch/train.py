"""Fine-tune a model with HiFT, or with another method (launch/methods/table.py).

    deepspeed [--num_gpus N] launch/train.py --config configs/NAME.yaml [--set KEY=VALUE]... [--resume [auto]]
    python launch/train.py ...                     the same in one process; `hift-train ...` with an installed wheel

The command reads one YAML (launch/config/) and writes one folder (launch/runtime/outputs.py).

Exit codes: 0 done. 2 the settings, the data or the folder need a change; one message says which, and nothing is
overwritten. 75 stopped by a signal with the last step saved; continue with --resume. 76 a rank died or hung.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# `deepspeed launch/train.py` puts launch/ on the path; the package hift_ds is one level above.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hift_ds.launch.errors import UserError
from hift_ds.launch.exit_codes import RANK_LOST, STOPPED
from hift_ds.launch.run import run
from hift_ds.launch.runtime import logs
from hift_ds.launch.runtime.preemption import Preemption, Stopped
from hift_ds.launch.runtime.process import Parser, report_mistake, run_process, world_of_one
from hift_ds.launch.runtime.ranks import RankWatch


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="hift-train" if Path(sys.argv[0]).name == "hift-train" else "launch/train.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the run's YAML, e.g. configs/tiny.yaml")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting; repeatable")
    add("--resume", nargs="?", const="yes", choices=("yes", "auto"), help="continue from the newest checkpoint in "
        "output.dir; without a checkpoint, `yes` (the default) is an error and `auto` starts a new run")  # fmt: skip
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the launcher; the environment has it too
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, and return the exit code."""
    world_of_one()
    rank = int(os.environ["RANK"])
    with Preemption(rank) as stop, RankWatch() as watch:
        try:
            arguments = parse(argv)
            run(arguments.config, arguments.set, arguments.resume, stop, watch)
            return 0
        except Stopped as stopped:
            logs.say(rank, f"stopped by {' and '.join(stop.reasons)} {stopped}")
            return STOPPED
        except UserError as error:
            mistake = error
        except Exception as error:
            if not watch.blame(error):
                raise
            return RANK_LOST
    return report_mistake(mistake)  # outside, so that the launcher's signals end this process again


def command() -> NoReturn:
    """Run the process of ``launch/train.py``."""
    run_process(main)


if __name__ == "__main__":
    command()
