"""Pack the project, wheels, models and data for a machine without a network, in parts of a limited size.

    python -m evaluation.offline FOLDER --model FILE_OR_FOLDER... --data FOLDER

FOLDER gets part-001-of-004 and so on, SHA256SUMS and unpack.sh. Copy them, in any order, one at a time if need be.
There, `sh unpack.sh THERE` checks and unpacks them. docs/offline.md has the whole way.

The project is packed as it was committed. The same commit, wheels, models and data give the same bytes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from hift_ds.evaluation.offline.parts import Entry, write_parts
from hift_ds.evaluation.offline.wheels import carried, download
from hift_ds.launch.errors import UserError
from hift_ds.launch.exit_codes import MISTAKE

ROOT = Path(__file__).resolve().parents[2]
UNPACK = Path(__file__).with_name("unpack.sh")
MEGABYTE = 10**6
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")  # requires-python of pyproject.toml


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="where the parts go; it is created and must be empty")
    add("--model", type=Path, nargs="+", required=True, help="files and folders of models, no Hub ids")
    add("--data", type=Path, required=True, help="the folder that contains the publishers' folders")
    add("--python", default="3.12", metavar="X.Y", help="the version there (default: %(default)s)")
    add("--part-mb", type=float, default=60, metavar="MB", help="millions of bytes of a part (default: %(default)s)")
    add("--add", nargs="+", default=[], metavar="NAME==VERSION", help="more packages that the other machine lacks")
    add("--wheels", type=Path, help="pack the wheels of this folder instead of downloading any")
    return parser.parse_args(given)


def problems(options: argparse.Namespace) -> list[str]:
    """Return all that keeps the pack from being complete."""
    found = [f"--model: {_missing(path)}" for path in options.model if not path.exists()]
    names = [path.resolve().name for path in options.model]
    found += [f"--model: two are named {name!r}; rename one" for name in sorted(set(names)) if names.count(name) > 1]
    if not options.data.is_dir():
        found.append(f"--data: {str(options.data)!r} is no folder")
    if options.python not in PYTHONS:
        found.append(f"--python: got {options.python!r}; expected one of {', '.join(PYTHONS)}")
    if options.wheels is not None and not any(options.wheels.glob("*.whl")):
        found.append(f"--wheels: {str(options.wheels)!r} has no wheels")
    if options.wheels is not None and options.add:
        found.append("--add: with --wheels, nothing is downloaded; put these wheels into its folder")
    found += [f"--add: got {one!r}; expected NAME==VERSION" for one in options.add if "==" not in one]
    if options.part_mb * MEGABYTE < 1:
        found.append(f"--part-mb: got {options.part_mb:g}; expected millions of bytes, as 60")
    if options.folder.exists() and (not options.folder.is_dir() or any(options.folder.iterdir())):
        found.append(f"{str(options.folder)!r} is not an empty folder; name another, or remove it")
    try:
        if changed := _git("status", "--porcelain", "--untracked-files=no"):
            found.append(
                f"{len(changed.splitlines())} files in {ROOT} differ from the last commit, whose name the records "
                "will have; commit them, or put them back (git stash)"
            )
    except (OSError, subprocess.CalledProcessError) as error:
        found.append(f"{ROOT} is no clone of the project ({error}); pack from a clone")
    return found


def _missing(model: Path) -> str:
    if not HUB_ID.fullmatch(str(model)):
        return f"{str(model)!r} does not exist"
    return (
        f"{str(model)!r} does not exist here; download a model of the Hub first (hf download {model} --local-dir "
        f"{model.name}), and give its folder"
    )


def entries(options: argparse.Namespace, wheels: Path) -> Iterator[Entry]:
    """Yield all files of the archive."""
    for line in filter(None, _git("ls-files", "--stage", "-z").split("\0")):
        mode, name = line.split()[0], line.split("\t", 1)[1]
        path = ROOT / name
        content: Path | str = os.readlink(path) if mode == "120000" else path
        yield Entry(f"project/{name}", content, executable=mode == "100755")
    yield Entry("project/COMMIT", _git("rev-parse", "HEAD").encode())
    for path in wheels.glob("*.whl"):
        yield Entry(f"wheels/{path.name}", path)
    for model in options.model:
        yield from _files(model, f"models/{model.resolve().name}")
    yield from _files(options.data, "data")


def _files(place: Path, name: str) -> Iterator[Entry]:
    """Yield a file, or the files of a folder. Links become what they point to."""
    if place.is_file():
        yield Entry(name, place)
        return
    for one in place.iterdir():
        yield from _files(one, f"{name}/{one.name}")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n")


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = parse(given)
    try:
        if found := problems(options):
            raise UserError("\n".join(found))
        with tempfile.TemporaryDirectory() as temporary:
            wheels = options.wheels or Path(temporary)
            if options.wheels is None:
                download(wheels, options.python, [*carried(), *options.add])
            options.folder.mkdir(parents=True, exist_ok=True)
            packed = list(entries(options, wheels))
            sums = write_parts(options.folder, packed, int(options.part_mb * MEGABYTE))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    script = UNPACK.read_text(encoding="utf-8").replace("packed_for=X.Y", f"packed_for={options.python}")
    (options.folder / UNPACK.name).write_text(script, encoding="utf-8")
    size = sum((options.folder / name).stat().st_size for name in sums)
    print(
        f"{len(packed)} files, {size / MEGABYTE:.1f} MB, are packed into {options.folder}: "
        f"{len(sums)} parts, SHA256SUMS and unpack.sh"
    )
    print(f"on the other machine, with Python {options.python}: sh unpack.sh THERE")
    return 0
