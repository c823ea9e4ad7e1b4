"""Files of a checkpoint: each hashed on its way to the disk, and none that runs code when it is read."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator

# What is in DeepSpeed's files beside tensors and plain containers. None of these runs code when it is read.
_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_CHUNK = 2**22
Files = dict[str, dict[str, Any]]  # name in the checkpoint -> {"size": bytes, "sha256": hex}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or must not be read; nothing was changed."""


class FileEngine:
    """Writes and reads files of tensors as a checkpoint engine of DeepSpeed: hashed, on the disk, and free of code.

    An error of the file system must not leave other ranks alone in DeepSpeed's barriers: it is kept until ``finish``.

    Args:
        mmap: tensors that are loaded stay in the file until they are copied: for who copies all, and then needs no
            second place for them in host memory.
    """

    def __init__(self, mmap: bool = False) -> None:
        self._mmap = mmap
        self._files: Files = {}
        self._problem: str | None = None

    def create(self, info: Any) -> None:
        """DeepSpeed is about to write."""
        self._files, self._problem = {}, None

    def commit(self, info: Any) -> bool:
        """DeepSpeed has written this rank's files."""
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self.errors_kept(path):
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        with self.errors_kept(path):
            with _HashedFile(path) as file:
                torch.save(_plain(state_dict), file)  # type: ignore[arg-type]
            if unsafe := unsafe_classes(path):
                raise CheckpointError(
                    f"client_state holds objects of {', '.join(unsafe)}; put tensors, numbers, strings, lists and "
                    "dicts of them in it"
                )
            self._files[os.path.basename(path)] = file.entry

    def load(self, path: str, map_location: Any = None) -> Any:
        mmap = self._mmap and map_location in ("cpu", torch.device("cpu"))
        try:
            with torch.serialization.safe_globals([_class(name) for name in _CLASSES]):
                return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap or None)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path!r} cannot be read: {error}") from error
        except Exception as error:
            raise CheckpointError(f"{path!r} holds more than tensors and plain values: {error}") from None

    @contextmanager
    def errors_kept(self, path: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # torch closes its archive after a failed write, and that fails in its own way.
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            self._problem = self._problem or f"{path}: {reason or error}"

    def finish(self) -> Files:
        """What was written since ``create``.

        Raises:
            CheckpointError: the first thing that went wrong.
        """
        if self._problem:
            raise CheckpointError(self._problem)
        return dict(self._files)


def _plain(value: Any) -> Any:
    """With values for members of enumerations, such as DeepSpeed's ZeRO stage: some Pythons write a call for them."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _plain(entry) for key, entry in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


class _HashedFile:
    """A new file: what is written to it is hashed, and is on the disk when it closes."""

    def __init__(self, path: str):
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):  # a file may take less than it is given
            written = self._file.write(view[done:])
            if not written:
                raise OSError(f"only {self._size + done} bytes could be written")
            done += written
        self._hash.update(view)
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        pass

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
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


# ---- random numbers --------------------------------------------------------------------------------------------


def generators() -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and the device's generators of this process."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(numpy.int64)), *rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if get_accelerator().device_name() != "cpu":
        state["device"] = get_accelerator().get_rng_state()
    return state


def restore_generators(state: Mapping[str, Any]) -> None:
    """Take over what ``generators`` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "device" in state and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(state["device"])


def unsafe_classes(path: str) -> list[str]:
    """Names of what would be called when the file is read, beyond what is known to be harmless. A file that cannot be
    read safely at all counts, too."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # torch: an old format, a script, no zip ...
        return [f"not a file of torch.save ({str(error).splitlines()[0]})"]
    return sorted(set(found) - set(_CLASSES))


def _class(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk."""
    beside = path.with_name(f".{path.name}.new")
    with _HashedFile(str(beside)) as file:
        file.write(text.encode("utf-8"))
    os.replace(beside, path)
    fsync(path.parent)
