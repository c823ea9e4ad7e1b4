"""Folders of tokenized data: each is named by what decides its content, and is either whole or not there.

FOLDER/train.arrow, eval.arrow   the examples
FOLDER/report.json               what was found in the rows
FOLDER/manifest.json             size and hash of these files; written last, before the folder gets its name
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hift_ds.checkpoint.files import CheckpointError, fsync, write_durably
from hift_ds.checkpoint.lock import Lock
from hift_ds.launch.errors import UserError

MANIFEST = "manifest.json"
ASIDE = ".being-written"


def place(cache: str | None) -> Path:
    """Return the folder of all tokenized data; `cache` is `data.cache`."""
    if cache is not None:
        return Path(cache).expanduser()
    import datasets  # takes seconds

    return Path(datasets.config.HF_DATASETS_CACHE) / "hift_ds"


def fingerprint(tokenizer: Any, decides: Mapping[str, Any]) -> str:
    """Return a name for the data that a tokenizer and other values decide, together with the code that makes it."""
    parts = {
        "decides": decides,
        "tokenizer": tokenizer_hash(tokenizer),
        "code": _hash({one.name: one.read_bytes() for one in Path(__file__).parent.glob("*.py")}),
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash what a tokenizer saves: its vocabulary, settings and chat template."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    return f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__} {_hash(files)}"


def _hash(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def is_whole(folder: Path) -> bool:
    """Return whether the folder holds what was written. It reads all files."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest == {name: _described(folder / name) for name in manifest}
    except (OSError, ValueError, AttributeError):
        return False


def _described(path: Path) -> dict[str, Any]:
    """Return size and hash of a file. The hash is for damage, not for intent, and much faster than SHA-256."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"size": path.stat().st_size, "xxh3": digest.hexdigest()}


@contextlib.contextmanager
def written(folder: Path) -> Iterator[Path]:
    """Make a folder: yield another one to write the files to, and rename it at the end.

    Several processes may make the same folder at once; the first one to end provides it. What a killed process left is
    removed.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(folder)
        aside = _aside(folder)
        aside.mkdir()  # with the permissions of the user's umask, so that others may read a shared cache
        lock = Lock(aside)
        try:
            yield aside
            files = [path for path in sorted(aside.iterdir()) if path.name != Lock.NAME]
            for path in files:
                fsync(path)
            write_durably(aside / MANIFEST, json.dumps({path.name: _described(path) for path in files}))
            _put(aside, folder)
        finally:
            lock.release()
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, CheckpointError) as error:
        raise UserError(
            f"data.cache: {str(folder)!r} cannot be written ({getattr(error, 'strerror', None) or error}); free space "
            "or grant permission there, or set data.cache to another folder"
        ) from error


def _put(aside: Path, folder: Path) -> None:
    """Give a whole folder its name. Processes that have mapped the files of an earlier one keep them."""
    while True:
        try:
            os.rename(aside, folder)
            return
        except OSError:
            if not folder.is_dir():
                raise
        if is_whole(folder):  # another process was faster
            return
        damaged = _aside(folder)
        with contextlib.suppress(FileNotFoundError):  # another process was faster to move it away
            os.rename(folder, damaged)
        shutil.rmtree(damaged, ignore_errors=True)  # files of another user stay


def _aside(folder: Path) -> Path:
    """Return an unused name beside a folder."""
    return folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{ASIDE}")


def _remove_left_over(folder: Path) -> None:
    for left in folder.parent.glob(f"{folder.name}.*{ASIDE}"):
        with contextlib.suppress(CheckpointError, OSError):
            Lock.check(left)
            if (left / Lock.NAME).stat().st_size:  # written by the process once it held the lock
                shutil.rmtree(left)
