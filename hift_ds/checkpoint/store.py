"""A folder of checkpoints: commit, find and delete.

A checkpoint is either complete or not visible: every rank writes its files into a hidden folder and confirms them, and
rank 0 renames the folder.

FOLDER/TAG/                 a committed checkpoint: the files that the engine wrote, and
FOLDER/TAG/manifest.json    size and SHA-256 of each file, and the run that saved it
FOLDER/latest               the newest TAG, for people and DeepSpeed's tools; this module does not rely on it
FOLDER/.saving-TAG/         a checkpoint being written, or left by a process that died; the next save removes it
FOLDER/.replaced-TAG/       the earlier checkpoint with this TAG, until the new one is in its place
FOLDER/.lock                held by the writer (flock: it is released when the process ends)

The folder is on one node or on a file system that all ranks share. Where all ranks must call a function together, its
documentation says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from deepspeed.utils import logger

from hift_ds.checkpoint.files import CheckpointError, Files, fsync, write_durably
from hift_ds.checkpoint.lock import Lock
from hift_ds.checkpoint.manifest import MANIFEST, REPLACED, Checkpoint, read_manifest, tag_of, verify, write_manifest
from hift_ds.collectives import gather, on_every_rank, rank, world_size

POINTER = "latest"
_SAVING, _PRUNED = ".saving-", ".pruned-"
_T = TypeVar("_T")


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
        folder: of checkpoints; created if missing.
        tag: the checkpoint's name. An earlier checkpoint of this name is replaced.
        write: called on every rank with (folder, name). It puts this rank's files into ``folder/name`` and returns
            their sizes and hashes. Rank 0 reads and hashes the files that no rank returns.
        about: the run, as JSON values, the same on all ranks.
        point: let ``latest`` name this checkpoint.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if writing failed on any rank. Earlier checkpoints are unchanged.
    """
    folder, is_first = Path(folder), rank() == 0
    if problem := _tag_problem(tag):
        raise CheckpointError(problem)
    staging, lock = folder / f"{_SAVING}{tag}", None

    def begin() -> str:
        nonlocal lock
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(folder)
            _clean(folder)
            staging.mkdir()
        return tag

    def commit(written: Iterable[Files]) -> None:
        if is_first:
            files = {name: entry for files_of_rank in written for name, entry in files_of_rank.items()}
            write_manifest(staging, files, about)
            _replace(staging, folder / tag)
            if point:
                write_durably(folder / POINTER, tag)

    try:
        tags = set(_on_every_rank("begin", begin))
        if len(tags) > 1:
            raise CheckpointError(f"the ranks save different tags: {', '.join(sorted(tags))}; pass the same tag on all")
        written = _on_every_rank("write", lambda: write(str(folder), staging.name))
        _on_every_rank("commit", lambda: commit(written))
    except BaseException:
        if is_first and lock is not None:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.release()
    return folder / tag


def _on_every_rank(what: str, action: Callable[[], _T]) -> list[_T]:
    """Run an action on every rank, and return the results of all.

    Raises:
        CheckpointError: on every rank, if the action failed on any rank.
    """
    results, problems = on_every_rank(action, Exception)
    if problems:
        raise CheckpointError(
            "\n".join(f"rank {i} could not {what} the checkpoint: {text}" for i, text in problems.items())
        )
    return results


def prune(
    folder: str | Path, keep_last: int | None, keep_every: int | None = None, keep: Iterable[str] = ()
) -> list[str]:
    """Delete old checkpoints. On one rank.

    Args:
        folder: of checkpoints.
        keep_last: keep this many of the newest, at least one; None: delete nothing.
        keep_every: also keep those whose step is a multiple of this.
        keep: tags to keep as well. They do not count as one of the newest.

    Returns:
        The deleted tags.

    Raises:
        CheckpointError: another process is writing to the folder.
    """
    if keep_last is None:
        return []
    folder = Path(folder)
    lock = Lock(folder)
    try:
        known = [one for one in list_checkpoints(folder)[0] if one.tag not in keep]
        gone = [
            one for one in known[max(keep_last, 1) :] if not (keep_every and one.about.get("step", 1) % keep_every == 0)
        ]
        for one in gone:  # rename first, so that a partly deleted checkpoint is not visible
            aside = folder / f"{_PRUNED}{one.tag}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(one.path, aside)
            shutil.rmtree(aside, ignore_errors=True)
        return [one.tag for one in gone]
    finally:
        lock.release()


def _replace(staging: Path, final: Path) -> None:
    aside = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        os.rename(final, aside)
    os.rename(staging, final)
    fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Clean up after processes that died while they saved or deleted."""
    for path in folder.iterdir():
        if path.name.startswith((_SAVING, _PRUNED)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(REPLACED):
            final = folder / tag_of(path)
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.rename(path, final)


# ---- reading ---------------------------------------------------------------------------------------------------


def find(folder: str | Path, tag: str | None = None) -> Checkpoint | None:
    """Find the checkpoint to continue from, and verify all of its files. All ranks call it.

    Args:
        folder: of checkpoints.
        tag: the only one to consider. None: the intact one with the highest step; damaged ones are logged.

    Returns:
        The checkpoint; None: the folder holds no checkpoint, not even a damaged one.

    Raises:
        CheckpointError: ``tag`` is missing or damaged, or none of the checkpoints is intact.
    """
    folder = Path(folder)
    known, unreadable = gather(list_checkpoints(folder) if rank() == 0 else ([], []))[0]
    if tag is not None:
        known = [one for one in known if one.tag == tag]
        unreadable = [(name, text) for name, text in unreadable if name == tag]
        if not known and not unreadable:
            raise CheckpointError(f"there is no checkpoint {tag!r} in {str(folder)!r}")
    rejected = [text for _, text in unreadable]
    found = None
    for one in known:
        problems = [text for of_rank in gather(verify(one, rank(), world_size())) for text in of_rank]
        if not problems:
            found = one
            break
        rejected.append(f"{one.path}: {'; '.join(problems[:5])}{' ...' if len(problems) > 5 else ''}")
    if found is None:
        if not rejected:
            return None
        message = "\n  - ".join([f"no checkpoint in {str(folder)!r} can be used:", *rejected])
        if any(f"has no {MANIFEST}" in text for text in rejected):
            adopt = "python -m hift_ds.checkpoint adopt FOLDER/TAG"
            message += f"\nIf another program saved the checkpoint, first run: {adopt}"
        raise CheckpointError(message)
    if rank() == 0:
        for text in rejected:
            logger.warning(f"checkpoint rejected: {text}")
        if rejected:
            logger.warning(f"the newest intact checkpoint is {found.tag} (step {found.about.get('step')})")
        if tag is None and (named := pointed(folder)) != found.tag:
            logger.warning(f"{folder / POINTER} names {named[:80]!r}; the newest intact checkpoint is {found.tag}")
    return found


def exists(folder: str | Path) -> bool:
    """Whether a folder holds any checkpoint, intact or damaged. On one rank."""
    return any(list_checkpoints(Path(folder)))


def list_checkpoints(folder: Path) -> tuple[list[Checkpoint], list[tuple[str, str]]]:
    """List the checkpoints in a folder.

    Returns:
        Those with a readable manifest, the newest first; name and problem of the others.
    """
    known, rejected = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        hidden = path.name.startswith(".") and not path.name.startswith(REPLACED)
        if hidden or not path.is_dir():
            continue
        try:
            if path.is_symlink():
                raise CheckpointError("is a link")
            known.append(read_manifest(path))
        except (CheckpointError, OSError) as error:
            rejected.append((path.name, f"{path}: {error}"))
    known.sort(key=lambda one: (one.about.get("step", -1), one.path.name), reverse=True)
    return known, rejected


def pointed(folder: Path) -> str:
    """Return the tag that ``latest`` names, whether or not it exists; empty: ``latest`` is missing or unreadable."""
    try:
        return (folder / POINTER).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _tag_problem(tag: str) -> str | None:
    if tag.startswith(".") or "/" in tag or "\\" in tag or "\0" in tag or tag in ("", POINTER):
        return f"tag={tag!r}: expected a folder's name without a slash or a leading dot, and not {POINTER!r}"
    return None
