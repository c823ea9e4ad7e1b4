"""Files of JSON lines: reading them with the line of what is wrong, and appending records that survive a kill.

A record has a key, and a file holds each key once. Appending is durable: a record is on the drive before `add`
returns. What a killed process left half written, a last line without its end, is cut off on the next start.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from hift_ds.launch.errors import UserError, shown

Record = dict[str, Any]
Place = str  # FILE:LINE, for messages


def read_json_lines(path: Path) -> list[tuple[Place, Record]]:
    """The objects of a file, one a line; blank lines are passed over.

    Raises:
        UserError: no such file, or a line that is not a JSON object; names file and line.
    """
    return list(_parse(path, _bytes_of(path)))


def field(where: Place, record: Record, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
    """`record[name]`, which must be of a kind; a truth value is not a number.

    Raises:
        UserError: absent or of another kind; names file and line.
    """
    value = record.get(name)
    if name not in record or not isinstance(value, kind) or isinstance(value, bool):
        got = f"got {shown(value)}" if name in record else f"it has only {', '.join(map(repr, record)) or 'nothing'}"
        raise UserError(f"{where}: {name!r}: expected {expected}, {got}")
    return value


class RecordFile:
    """An open file of records with unique keys, for one process at a time and any number of its threads.

    Args:
        key_of: a record's key; raises UserError, given the record's place, where the record has none.

    Raises:
        UserError: the file cannot be written, another process has it open, a line is wrong, or two lines have one
            key.
    """

    def __init__(self, path: Path, key_of: Callable[[Place, Record], Hashable]) -> None:
        self.path = path
        self._key_of = key_of
        self._lock = threading.Lock()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{path}: another process is writing to it; wait for it, or give another file"
                ) from None
            self._size = _repair(path, self._fd)
            self.records = _unique(path, key_of)
        except BaseException:
            os.close(self._fd)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # a file that was just made has its name on the drive, too
        os.close(folder)

    def __contains__(self, key: Hashable) -> bool:
        return key in self.records

    def add(self, record: Record) -> None:
        """Append a record; it is on the drive when this returns, or not in the file at all.

        Raises:
            ValueError: its key is there already.
            UserError: the drive is full or failing.
        """
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        key = self._key_of("a new record", record)
        with self._lock:
            if key in self.records:
                raise ValueError(f"{self.path} has a record with the key {key} already")
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
                os.fsync(self._fd)
            except OSError as error:
                os.ftruncate(self._fd, self._size)
                raise UserError(f"{self.path}: cannot be written: {error.strerror}; what is in it stays") from None
            self._size += len(line)
            self.records[key] = record

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def read_records(path: Path, key_of: Callable[[Place, Record], Hashable]) -> dict[Hashable, Record]:
    """The records of a file by their keys, without changing it; a half-written last line is passed over.

    Raises:
        UserError: as `RecordFile`.
    """
    return _unique(path, key_of)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(path: Path, content: bytes) -> Iterator[tuple[Place, Record]]:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 ({error.reason}, byte {error.start + 1} of the line)") from None
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise UserError(f"{where}: broken JSON ({reason}); expected one object a line") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, got {shown(record)}")
        yield where, record


def _unique(path: Path, key_of: Callable[[Place, Record], Hashable]) -> dict[Hashable, Record]:
    content = _bytes_of(path)
    if not _is_whole(content[content.rfind(b"\n") + 1 :]):
        content = content[: content.rfind(b"\n") + 1]
    found: dict[Hashable, tuple[Place, Record]] = {}
    for where, record in _parse(path, content):
        key = key_of(where, record)
        if key in found:
            raise UserError(f"{where}: the same key as {found[key][0]}; remove one of the two lines")
        found[key] = (where, record)
    return {key: record for key, (_, record) in found.items()}


def _repair(path: Path, fd: int) -> int:
    """End the last line, or cut it off where it is only half there; the size of the file in bytes."""
    content = _bytes_of(path)
    whole = content.rfind(b"\n") + 1
    last = content[whole:]
    if not last:
        return whole
    if _is_whole(last):
        os.write(fd, b"\n")
        os.fsync(fd)
        return len(content) + 1
    os.ftruncate(fd, whole)
    os.fsync(fd)
    return whole


def _is_whole(line: bytes) -> bool:
    """Whether a line without its end is a whole record: no part of an object is an object."""
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False
