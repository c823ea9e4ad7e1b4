"""Checkpoints that are whole or not there: written beside, confirmed by every rank, renamed, then pointed to.

FOLDER/TAG/                 a committed checkpoint: what the engine wrote, and
FOLDER/TAG/manifest.json    size and SHA-256 of each of its files, and what made it
FOLDER/latest               the newest TAG, for people and DeepSpeed's tools; nothing here trusts it
FOLDER/.saving-TAG/         under way, or left by a process that died; the next save removes it
FOLDER/.replaced-TAG/       what had this TAG before, until the new one is in its place
FOLDER/.lock                held by whoever writes (flock: it ends with the process)

Functions that all ranks must call together say so. On one node or a shared file system; every rank sees all files.

    python -m hift_ds.checkpoint verify FOLDER      what is in it, and what is wrong with it
    python -m hift_ds.checkpoint adopt FOLDER/TAG   write the manifest of a checkpoint that was made elsewhere
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from deepspeed import comm as dist
from deepspeed.utils import logger

from hift_ds.checkpoint.files import CheckpointError, Files, fsync, sha256_of, unsafe_classes, write_durably

MANIFEST, POINTER = "manifest.json", "latest"
FORMAT = 1
_SAVING, _REPLACED, _PRUNED = ".saving-", ".replaced-", ".pruned-"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as its manifest says.

    Attributes:
        about: what made it: ``step``, ``world_size``, ``zero_stage``, ``versions`` and more.
    """

    path: Path
    about: dict[str, Any]
    files: Files

    @property
    def tag(self) -> str:
        return self.path.name.removeprefix(_REPLACED)


# ---- writing ---------------------------------------------------------------------------------------------------


def save(
    folder: str | Path,
    tag: str,
    write: Callable[[str, str], Files],
    about: Mapping[str, Any],
    point: bool = True,
) -> Path:
    """Commit a checkpoint. All ranks call it.

    Args:
        write: called on every rank with (folder, name): puts this rank's files into ``folder/name`` and returns what
            it knows of them; what it does not name is read and hashed by rank 0.
        about: JSON, the same on all ranks.
        point: let ``latest`` name it.

    Raises:
        CheckpointError: on every rank, if something went wrong on any. What was committed before is untouched.
    """
    folder, rank = Path(folder), _rank()
    if problem := _tag_problem(tag):
        raise CheckpointError(problem)
    staging, lock = folder / f"{_SAVING}{tag}", None

    def begin() -> str:
        nonlocal lock
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(folder)
            _clean(folder)
            staging.mkdir()
        return tag

    def commit(parts: Iterable[Files]) -> None:
        if rank == 0:
            files = {name: entry for part in parts for name, entry in part.items()}
            _complete(staging, files, about)
            _replace(staging, folder / tag)
            if point:
                write_durably(folder / POINTER, tag)

    try:
        tags = set(_together("begin", begin))
        if len(tags) > 1:
            raise CheckpointError(f"the ranks save different tags: {', '.join(sorted(tags))}; give all the same")
        parts = _together("write", lambda: write(str(folder), staging.name))
        _together("commit", lambda: commit(parts))
    except BaseException:
        if rank == 0 and lock is not None:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.release()
    return folder / tag


def prune(
    folder: str | Path, keep_last: int | None, keep_every: int | None = None, keep: Iterable[str] = ()
) -> list[str]:
    """Delete committed checkpoints but the newest ``keep_last`` and those of every ``keep_every``-th step.

    On one rank. The newest stays in any case; None keeps all.

    Args:
        keep: tags that stay, too; they do not count as one of the newest.

    Returns:
        Tags of the deleted ones.
    """
    if keep_last is None:
        return []
    folder = Path(folder)
    lock = Lock(folder)
    try:
        known = [one for one in _candidates(folder)[0] if one.tag not in keep]
        gone = [
            one for one in known[max(keep_last, 1) :] if not (keep_every and one.about.get("step", 1) % keep_every == 0)
        ]
        for one in gone:  # renamed first: half a checkpoint never has a name
            aside = folder / f"{_PRUNED}{one.tag}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(one.path, aside)
            shutil.rmtree(aside, ignore_errors=True)
        return [one.tag for one in gone]
    finally:
        lock.release()


class Lock:
    """The one writer of a folder, until ``release`` or the end of the process.

    Raises:
        CheckpointError: another process has it.
    """

    NAME = ".lock"

    def __init__(self, folder: Path):
        self._file = (folder / self.NAME).open("a+")
        self._try(self._file, folder, fcntl.LOCK_EX)
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} on {os.uname().nodename}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()

    @classmethod
    def check(cls, folder: Path) -> None:
        """Whether another process has it, with nothing made or changed; raises as above."""
        if (folder / cls.NAME).exists():
            with (folder / cls.NAME).open() as file:
                cls._try(file, folder, fcntl.LOCK_SH)

    @staticmethod
    def _try(file: IO[str], folder: Path, kind: int) -> None:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip()
            file.close()
            raise CheckpointError(
                f"{str(folder)!r} is being written by another run{f' (process {other})' if other else ''}; wait for "
                "its end, stop it, or use another folder"
            ) from None


def _complete(staging: Path, files: Files, about: Mapping[str, Any]) -> None:
    """Read what nobody knows the hash of, see that all the rest is there, and write the manifest."""
    present = dict(_listed(staging))
    for name, path in present.items():
        if name in files:
            if path.stat().st_size != files[name]["size"]:
                raise CheckpointError(f"{name} has {path.stat().st_size} bytes, not the {files[name]['size']} written")
            continue
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        fsync(path)
    if missing := sorted(set(files) - set(present)):
        raise CheckpointError(f"{', '.join(missing)} written by a rank, not seen by rank 0; is the folder shared?")
    content = {"format": FORMAT, "about": dict(about), "files": dict(sorted(files.items()))}
    plain = json.loads(json.dumps(content, default=str))  # as it will be read
    write_durably(staging / MANIFEST, _sealed(plain))
    for folder in {path.parent for path in present.values()} | {staging}:
        fsync(folder)


def _replace(staging: Path, final: Path) -> None:
    aside = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        os.rename(final, aside)
    os.rename(staging, final)
    fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Remove what processes left that died while they wrote."""
    for path in folder.iterdir():
        if path.name.startswith((_SAVING, _PRUNED)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(_REPLACED):
            final = folder / path.name.removeprefix(_REPLACED)
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.rename(path, final)


# ---- reading ---------------------------------------------------------------------------------------------------


def find(folder: str | Path, tag: str | None = None) -> Checkpoint | None:
    """The checkpoint to continue from, all of its bytes compared with its manifest. All ranks call it.

    Args:
        tag: this one and no other. None: the one of the highest step that is whole; others that are not are reported.

    Returns:
        None where there is none to be found, not even a damaged one.

    Raises:
        CheckpointError: ``tag`` is missing or damaged, or there are checkpoints and none is whole.
    """
    folder = Path(folder)
    known, unreadable = gather(_candidates(folder) if _rank() == 0 else ([], []))[0]
    if tag is not None:
        known = [one for one in known if one.tag == tag]
        unreadable = [(name, text) for name, text in unreadable if name == tag]
        if not known and not unreadable:
            raise CheckpointError(f"there is no checkpoint {tag!r} in {str(folder)!r}")
    rejected = [text for _, text in unreadable]
    found = None
    for one in known:
        problems = [text for part in gather(verify(one, _rank(), _world())) for text in part]
        if not problems:
            found = one
            break
        rejected.append(f"{one.path}: {'; '.join(problems[:5])}{' ...' if len(problems) > 5 else ''}")
    if found is None:
        if not rejected:
            return None
        message = "\n  - ".join([f"no checkpoint in {str(folder)!r} can be used:", *rejected])
        if any(f"has no {MANIFEST}" in text for text in rejected):
            message += "\nOne that another program made needs it first: python -m hift_ds.checkpoint adopt FOLDER/TAG"
        raise CheckpointError(message)
    if _rank() == 0:
        for text in rejected:
            logger.warning(f"checkpoint rejected: {text}")
        if rejected:
            logger.warning(f"the newest whole checkpoint is {found.tag} (step {found.about.get('step')})")
        if tag is None and (named := pointed(folder)) != found.tag:
            logger.warning(f"{folder / POINTER} names {named[:80]!r}; the newest whole checkpoint is {found.tag}")
    return found


def exists(folder: str | Path) -> bool:
    """Whether there is anything that was once committed, whole or not. On one rank."""
    return any(_candidates(Path(folder)))


def verify(checkpoint: Checkpoint, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint; ``part`` of ``parts`` ranks that share the work."""
    problems = []
    if part == 0:
        present = {name for name, _ in _listed(checkpoint.path)}
        problems += [f"{name} is not in the manifest" for name in sorted(present - set(checkpoint.files))]
    for name in sorted(checkpoint.files)[part::parts]:
        entry, path = checkpoint.files[name], checkpoint.path / name
        try:
            if not path.resolve().is_relative_to(checkpoint.path.resolve()):
                problems.append(f"{name!r} leads outside of the checkpoint")
            elif not path.is_file():
                problems.append(f"{name} is missing")
            elif (size := path.stat().st_size) != entry["size"]:
                problems.append(f"{name} has {size} bytes, the manifest says {entry['size']}")
            elif sha256_of(path) != entry["sha256"]:
                problems.append(f"{name} is damaged (SHA-256)")
            else:
                problems += _code_in(name, path)
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    return problems


def _code_in(name: str, path: Path) -> list[str]:
    unsafe = unsafe_classes(str(path)) if name.endswith(".pt") else []
    return [f"{name} would run code when it is read ({', '.join(unsafe)})"] if unsafe else []


def adopt(path: str | Path) -> Checkpoint:
    """Write the manifest of a checkpoint that was made elsewhere, as its files are now. On one rank.

    Raises:
        CheckpointError: it has one, is none of DeepSpeed's, or a file in it would run code when it is read.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{str(path)!r} is no folder")
    if (path / MANIFEST).exists():
        raise CheckpointError(f"{str(path)!r} has a manifest already")
    if not any(path.glob("*_states.pt")):
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint of DeepSpeed: it has no file like mp_rank_00_model_states.pt"
        )
    found = [f"{name} is a link" for name, file in _listed(path) if file.is_symlink()]
    found += [text for name, file in _listed(path) for text in _code_in(name, file)]
    if found:
        raise CheckpointError(f"{str(path)!r} cannot be adopted: {'; '.join(found)}")
    _complete(path, {}, {"adopted": True})
    return _read_manifest(path)


def _candidates(folder: Path) -> tuple[list[Checkpoint], list[tuple[str, str]]]:
    """All that has or should have a manifest: (readable ones, newest first; (name, why not) of the others)."""
    known, rejected = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        hidden = path.name.startswith(".") and not path.name.startswith(_REPLACED)
        if hidden or not path.is_dir():
            continue
        try:
            if path.is_symlink():
                raise CheckpointError("is a link")
            known.append(_read_manifest(path))
        except (CheckpointError, OSError) as error:
            rejected.append((path.name, f"{path}: {error}"))
    known.sort(key=lambda one: (one.about.get("step", -1), one.path.name), reverse=True)
    return known, rejected


def _read_manifest(path: Path) -> Checkpoint:
    file = path / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise CheckpointError(f"has no {MANIFEST}")
    try:
        text = file.read_bytes().decode("utf-8")
        content = json.loads(text)
        seal = content.pop("sha256 of the rest")
        whole = _sealed(content) == text and isinstance(seal, str)
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"its {MANIFEST} is damaged")
    if content["format"] != FORMAT:
        raise CheckpointError(f"its {MANIFEST} has format {content['format']}; this version reads {FORMAT}")
    return Checkpoint(path, content["about"], content["files"])


def pointed(folder: Path) -> str:
    """What ``latest`` names, be it there or not; empty: it is missing or unreadable."""
    try:
        return (folder / POINTER).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


# ---- files and ranks -------------------------------------------------------------------------------------------


def _sealed(content: dict[str, Any]) -> str:
    """The text of a manifest. Its own hash is in it: a flipped bit anywhere makes it another text."""
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256 of the rest": seal, **content}, indent=1) + "\n"


def _tag_problem(tag: str) -> str | None:
    if tag.startswith(".") or "/" in tag or "\\" in tag or "\0" in tag or tag in ("", POINTER):
        return f"tag={tag!r}: expected a folder's name without a slash or a leading dot, and not {POINTER!r}"
    return None


def _listed(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name with forward slashes, path) of all files below, links too, the manifest not."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            name = path.relative_to(folder).as_posix()
            if name != MANIFEST:
                yield name, path


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: _T) -> list[_T]:
    """Every rank's value."""
    if _world() == 1:
        return [value]
    values: list[Any] = [None] * _world()
    dist.all_gather_object(values, value)
    return values


def _together(what: str, action: Callable[[], _T]) -> list[_T]:
    """Do it on every rank; the results of all, or on every rank the error of any."""
    result, problem = None, None
    try:
        result = action()
    except Exception as error:
        problem = f"rank {_rank()} could not {what} the checkpoint: {error}"
    outcomes = gather((result, problem))
    if problems := [text for _, text in outcomes if text is not None]:
        raise CheckpointError("\n".join(problems))
    return [value for value, _ in outcomes]  # type: ignore[misc]


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code: 0 all whole, 1 something is damaged, 2 a mistake."""
    parser = argparse.ArgumentParser(prog="python -m hift_ds.checkpoint", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("action", choices=("verify", "adopt"))
    parser.add_argument("path", help="a folder of checkpoints (verify), one checkpoint (adopt)")
    arguments = parser.parse_args(argv)
    path = Path(arguments.path)
    if arguments.action == "adopt":
        try:
            one = adopt(path)
        except (CheckpointError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{path}: {len(one.files)} files, {sum(e['size'] for e in one.files.values())} bytes; manifest written")
        return 0
    known, rejected = _candidates(path)
    if not known and not rejected:
        is_one = (path / MANIFEST).exists()
        hint = f"; it is one itself: verify {str(path.parent)!r}, the folder that holds it" if is_one else ""
        print(f"error: there is no checkpoint in {str(path)!r}{hint}", file=sys.stderr)
        return 2
    damaged = [text for _, text in rejected]
    for one in known:
        problems = verify(one)
        damaged += [f"{one.path}: {text}" for text in problems]
        size = sum(entry["size"] for entry in one.files.values())
        shown = "; ".join(problems) or "whole"
        print(f"{one.path.name}: step {one.about.get('step')}, {len(one.files)} files, {size / 2**20:.1f} MiB: {shown}")
    for _, text in rejected:
        print(text)
    return int(bool(damaged))
