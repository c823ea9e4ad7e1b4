"""The manifest of a checkpoint: size and SHA-256 of each file, and a description of the run that saved it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hift_ds.checkpoint.files import CheckpointError, Files, fsync, sha256_of, unsafe_classes, write_durably

MANIFEST = "manifest.json"
FORMAT = 1
_AT_ONCE = 4  # files that a rank reads and hashes at the same time


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with a readable manifest.

    Attributes:
        path: its folder.
        about: the run that saved it: ``step``, ``world_size``, ``zero_stage``, ``versions`` and more.
        files: size and SHA-256 of each file, by its name.
    """

    path: Path
    about: dict[str, Any]
    files: Files

    @property
    def tag(self) -> str:
        """The name that it was saved under."""
        return tag_of(self.path)


# The name of a checkpoint's folder while another checkpoint with the same tag takes its place.
REPLACED = ".replaced-"


def tag_of(path: Path) -> str:
    """Return the tag of a checkpoint's folder."""
    return path.name.removeprefix(REPLACED)


def write_manifest(folder: Path, files: Files, about: Mapping[str, Any]) -> None:
    """Write the manifest of all files in a folder, durably.

    Args:
        folder: the checkpoint.
        files: the known sizes and hashes. The rest is added here, from the files.
        about: the run, as JSON values.

    Raises:
        CheckpointError: a file in ``files`` is missing or has another size.
    """
    present = dict(_listed(folder))
    for name, path in present.items():
        if name in files:
            if path.stat().st_size != files[name]["size"]:
                raise CheckpointError(f"{name} has {path.stat().st_size} bytes, not the {files[name]['size']} written")
            continue
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        fsync(path)
    if missing := sorted(set(files) - set(present)):
        raise CheckpointError(
            f"rank 0 does not find {', '.join(missing)}, which another rank wrote; use a folder that all ranks share"
        )
    content = {"format": FORMAT, "about": dict(about), "files": dict(sorted(files.items()))}
    plain = json.loads(json.dumps(content, default=str))  # as it will be read
    write_durably(folder / MANIFEST, _sealed(plain))
    for below in {path.parent for path in present.values()} | {folder}:
        fsync(below)


def read_manifest(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder, with its manifest. The files are not compared with it (:func:`verify`).

    Raises:
        CheckpointError: the manifest is missing, damaged, or has another format.
    """
    file = path / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise CheckpointError(f"has no {MANIFEST}")
    try:
        text = file.read_bytes().decode("utf-8")
        content = json.loads(text)
        seal = content.pop("sha256 of the rest")
        intact = _sealed(content) == text and isinstance(seal, str)
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"its {MANIFEST} is damaged")
    if content["format"] != FORMAT:
        raise CheckpointError(f"its {MANIFEST} has format {content['format']}; this version reads {FORMAT}")
    return Checkpoint(path, content["about"], content["files"])


def verify(checkpoint: Checkpoint, rank: int = 0, ranks: int = 1) -> list[str]:
    """Compare a checkpoint's files with its manifest.

    Args:
        checkpoint: its manifest.
        rank, ranks: several ranks share the files; this one checks every ``ranks``-th.

    Returns:
        The problems; empty: the checked files are intact.
    """
    problems = []
    if rank == 0:
        present = {name for name, _ in _listed(checkpoint.path)}
        problems += [f"{name} is not in the manifest" for name in sorted(present - set(checkpoint.files))]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        found = threads.map(lambda name: _problems_of(checkpoint, name), sorted(checkpoint.files)[rank::ranks])
    return problems + [problem for one in found for problem in one]


def _problems_of(checkpoint: Checkpoint, name: str) -> list[str]:
    entry, path = checkpoint.files[name], checkpoint.path / name
    try:
        if not path.resolve().is_relative_to(checkpoint.path.resolve()):
            return [f"{name!r} leads outside of the checkpoint"]
        if not path.is_file():
            return [f"{name} is missing"]
        if (size := path.stat().st_size) != entry["size"]:
            return [f"{name} has {size} bytes, its manifest lists {entry['size']}"]
        if sha256_of(path) != entry["sha256"]:
            return [f"{name} is damaged (SHA-256)"]
        return _code_in(name, path)
    except OSError as error:
        return [f"{name} cannot be read: {error.strerror or error}"]


def adopt(path: str | Path) -> Checkpoint:
    """Write the manifest of a checkpoint that another program saved, for its files as they are now. On one rank.

    Raises:
        CheckpointError: it has a manifest already, DeepSpeed did not save it, or reading a file in it would run code.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{str(path)!r} is not a folder")
    if (path / MANIFEST).exists():
        raise CheckpointError(f"{str(path)!r} has a manifest already")
    if not any(path.glob("*_states.pt")):
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint of DeepSpeed: it has no file like mp_rank_00_model_states.pt"
        )
    found = [f"{name} is a link" for name, file in _listed(path) if file.is_symlink()]
    found += [text for name, file in _listed(path) for text in _code_in(name, file)]
    if found:
        raise CheckpointError(f"{str(path)!r} cannot be adopted: {'; '.join(found)}")
    write_manifest(path, {}, {"adopted": True})
    return read_manifest(path)


def _code_in(name: str, path: Path) -> list[str]:
    unsafe = unsafe_classes(str(path)) if name.endswith(".pt") else []
    return [f"reading {name} would run code ({', '.join(unsafe)})"] if unsafe else []


def _sealed(content: dict[str, Any]) -> str:
    """Return the text of a manifest. It includes its own hash, so any flipped bit is noticed."""
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256 of the rest": seal, **content}, indent=1) + "\n"


def _listed(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name (with forward slashes) and path of all files in a folder, links included, the manifest not."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            name = path.relative_to(folder).as_posix()
            if name != MANIFEST:
                yield name, path
