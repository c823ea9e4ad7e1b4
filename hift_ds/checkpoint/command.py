"""The command ``python -m hift_ds.checkpoint``.

verify FOLDER      list the checkpoints in a folder, and what is wrong with them
adopt FOLDER/TAG   write the manifest of a checkpoint that another program saved
"""

import argparse
import sys
from pathlib import Path

from hift_ds.checkpoint.files import CheckpointError
from hift_ds.checkpoint.manifest import MANIFEST, adopt, verify
from hift_ds.checkpoint.store import list_checkpoints


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code: 0: all checkpoints are intact; 1: something is damaged; 2: a wrong argument.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hift_ds.checkpoint", description="Verify checkpoints, or adopt one that another program saved."
    )
    parser.add_argument("action", choices=("verify", "adopt"))
    parser.add_argument("path", help="verify: a folder of checkpoints; adopt: one checkpoint")
    arguments = parser.parse_args(argv)
    path = Path(arguments.path)
    return _adopt(path) if arguments.action == "adopt" else _verify(path)


def _adopt(path: Path) -> int:
    try:
        one = adopt(path)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    nbytes = sum(entry["size"] for entry in one.files.values())
    print(f"{path}: manifest of {len(one.files)} files ({nbytes} bytes) written")
    return 0


def _verify(path: Path) -> int:
    known, rejected = list_checkpoints(path)
    if not known and not rejected:
        is_one = (path / MANIFEST).exists()
        hint = f"; it is a checkpoint itself: verify the folder {str(path.parent)!r}" if is_one else ""
        print(f"error: there is no checkpoint in {str(path)!r}{hint}", file=sys.stderr)
        return 2
    is_damaged = bool(rejected)
    for one in known:
        problems = verify(one)
        is_damaged |= bool(problems)
        size = sum(entry["size"] for entry in one.files.values())
        shown = "; ".join(problems) or "intact"
        print(f"{one.path.name}: step {one.about.get('step')}, {len(one.files)} files, {size / 2**20:.1f} MiB: {shown}")
    for _, text in rejected:
        print(text)
    return int(is_damaged)
