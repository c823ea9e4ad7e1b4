"""A lock on a folder: one process at a time writes checkpoints there."""

import fcntl
import os
from pathlib import Path
from typing import IO

from hift_ds.checkpoint.files import CheckpointError


class Lock:
    """Holds a folder's lock until :meth:`release` or the end of the process.

    Args:
        folder: an existing folder.

    Raises:
        CheckpointError: another process holds the lock.
    """

    NAME = ".lock"

    def __init__(self, folder: Path):
        self._file = (folder / self.NAME).open("a+")
        self._try(self._file, folder, fcntl.LOCK_EX)
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} on {os.uname().nodename}")
        self._file.flush()

    def release(self) -> None:
        """Release the lock."""
        self._file.close()

    @classmethod
    def check(cls, folder: Path) -> None:
        """Check that no other process holds a folder's lock, without creating or changing a file.

        Raises:
            CheckpointError: another process holds the lock.
        """
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
                f"another run{f' (process {other})' if other else ''} is writing to {str(folder)!r}; wait until it "
                "ends, stop it, or use another folder"
            ) from None
