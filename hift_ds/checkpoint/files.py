"""Files of a checkpoint: hashed while they are written, durable, and safe to read: reading them runs no code."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

# Classes in DeepSpeed's files, in addition to tensors and plain containers. Reading them runs no code.
_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_CHUNK = 2**22
_WRITEBACK = 2**24  # bytes that are written before the disk begins with them
_LARGE = 2**18  # from this many bytes on, hashing takes longer than waking the thread that does it
_libc, _SYNC_FILE_RANGE_WRITE = ctypes.CDLL(None), 2
Files = dict[str, dict[str, Any]]  # name in the checkpoint -> {"size": bytes, "sha256": hex}


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or must not be read. Nothing was changed."""


class FileEngine:
    """Writes and reads files of tensors, with the interface of DeepSpeed's checkpoint engines.

    Errors while writing are kept until :meth:`finish`, because an exception on one rank would leave the other ranks in
    DeepSpeed's barriers.

    Args:
        mmap: map loaded files into memory. This saves the host memory for a second copy, if the caller copies every
            loaded tensor.
    """

    def __init__(self, mmap: bool = False) -> None:
        self._mmap = mmap
        self._files: Files = {}
        self._problem: str | None = None

    def create(self, info: Any) -> None:
        """Begin a checkpoint: DeepSpeed calls it before it writes."""
        self._files, self._problem = {}, None

    def commit(self, info: Any) -> bool:
        """Return True: DeepSpeed calls it after it wrote this rank's files."""
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a folder; an error is kept until :meth:`finish`."""
        with self.errors_kept(path):
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file of tensors and plain values; an error is kept until :meth:`finish`."""
        with self.errors_kept(path):
            with _HashedFile(path) as file:
                torch.save(_plain(state_dict), file)  # type: ignore[arg-type]
            if unsafe := unsafe_classes(path):
                raise CheckpointError(
                    f"client_state holds objects of {', '.join(unsafe)}; it may only hold tensors, numbers, strings, "
                    "and lists and dicts of them"
                )
            self._files[os.path.basename(path)] = file.entry

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file of tensors and plain values.

        Raises:
            CheckpointError: it cannot be read, or reading it would run code.
        """
        mmap = self._mmap and map_location in ("cpu", torch.device("cpu"))
        if callable(map_location):
            # DeepSpeed's functions keep tensors in host memory. torch takes no functions for wrapper subclasses, such
            # as torchao's state.
            map_location = "cpu"
        try:
            with torch.serialization.safe_globals([_class(name) for name in _CLASSES]):
                return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap or None)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path!r} cannot be read: {error}") from error
        except Exception as error:
            raise CheckpointError(f"{path!r} holds more than tensors and plain values: {error}") from None

    @contextmanager
    def errors_kept(self, path: str) -> Iterator[None]:
        """Keep an error inside the ``with`` statement until :meth:`finish`, with the name of the file."""
        try:
            yield
        except Exception as error:
            # After a failed write, torch closes its archive, which raises another error. Report the first one.
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            self._problem = self._problem or f"{path}: {reason or error}"

    def finish(self) -> Files:
        """Return sizes and hashes of the files written since :meth:`create`.

        Raises:
            CheckpointError: the first error while writing.
        """
        if self._problem:
            raise CheckpointError(self._problem)
        return dict(self._files)


def _plain(value: Any) -> Any:
    """Replace members of enumerations, such as DeepSpeed's ZeRO stage: some Python versions pickle them as a call."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _plain(entry) for key, entry in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


class _HashedFile:
    """A new file that hashes what is written to it. When it closes, the data is on the disk.

    A thread hashes while the data is written, and the disk works meanwhile.
    """

    def __init__(self, path: str):
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._hash, self._size, self._started = hashlib.sha256(), 0, 0
        self._thread = ThreadPoolExecutor(1, "hashing")  # it starts with the first large part

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        hashing = self._thread.submit(self._hash.update, view) if len(view) >= _LARGE else None
        try:
            self._write(view)
        finally:
            if hashing is not None:  # after this call, torch may free the memory
                hashing.result()
        if hashing is None:
            self._hash.update(view)
        return len(view)

    def _write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):  # the system may write only some of the bytes
            written = self._file.write(view[done : done + _WRITEBACK])
            if not written:
                raise OSError(f"only {self._size} bytes could be written")
            done += written
            self._size += written
            if self._size - self._started >= _WRITEBACK:
                _start_writeback(self._file.fileno(), self._started, self._size - self._started)
                self._started = self._size

    def flush(self) -> None:
        pass

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._thread.shutdown()
        try:
            if error is None:
                os.fsync(self._file.fileno())
                if (size := os.fstat(self._file.fileno()).st_size) != self._size:
                    raise OSError(f"has {size} bytes after {self._size} were written")
        finally:
            self._file.close()

    @property
    def entry(self) -> dict[str, Any]:
        return {"size": self._size, "sha256": self._hash.hexdigest()}


def _start_writeback(descriptor: int, start: int, nbytes: int) -> None:
    """Let the disk begin with a part of a file, on Linux, which otherwise begins in ``fsync``. Nothing waits for it."""
    if hasattr(_libc, "sync_file_range"):  # an error is seen in `fsync`
        _libc.sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


def unsafe_classes(path: str) -> list[str]:
    """Return the names of classes and functions that reading a file would call, except the known harmless ones.

    A file that is not in torch's current format gives one entry with the reason.
    """
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # an old format, a script, not a zip archive ...
        return [f"torch.save did not write it ({str(error).splitlines()[0]})"]
    return sorted(set(found) - set(_CLASSES))


def _class(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a text file, or replace it, in one atomic step, and flush it to the disk."""
    beside = path.with_name(f".{path.name}.new")
    with _HashedFile(str(beside)) as file:
        file.write(text.encode("utf-8"))
    os.replace(beside, path)
    fsync(path.parent)
