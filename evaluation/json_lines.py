"""Files of JSON lines: read them with errors that name the line, and append records durably.

Each record has a key that is unique in the file. A record is on the drive when `add` returns. If a killed process left
an incomplete last line, the next start removes it.
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
    """Read the objects of a file, one per line; blank lines are skipped.

    Raises:
        UserError: no such file, or a line is not a JSON object; names file and line.
    """
    return list(_parse(path, _bytes_of(path)))


def field(where: Place, record: Record, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
    """Return `record[name]` if it has the type `kind`; a boolean is not a number.

    Raises:
        UserError: the field is missing or has another type; names file and line.
    """
    value = record.get(name)
    if name not in record or not isinstance(value, kind) or isinstance(value, bool):
        got = f"got {shown(value)}" if name in record else f"it has only {', '.join(map(repr, record)) or 'no field'}"
        raise UserError(f"{where}: {name!r}: expected {expected}, {got}")
    return value


class RecordFile:
    """An open file of records with unique keys, for one process at a time and any number of its threads.

    Args:
        key_of: returns the key of a record; takes the record's place and the record; raises UserError if it has no key.

    Raises:
        UserError: the file cannot be written, another process has it open, a line is invalid, or two lines have the
            same key.
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
                    f"{path}: another process is writing to it; wait for it to end, or give another file"
                ) from None
            self._size = _repair(path, self._fd)
            self.records = _unique(path, key_of)
        except BaseException:
            os.close(self._fd)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # makes the name of a new file durable
        os.close(folder)

    def __contains__(self, key: Hashable) -> bool:
        return key in self.records

    def add(self, record: Record) -> None:
        """Append a record. When this returns, the record is on the drive; if it raises, the file is unchanged.

        Raises:
            ValueError: the file already has a record with this key.
            UserError: the drive is full or failing.
        """
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        key = self._key_of("a new record", record)
        with self._lock:
            if key in self.records:
                raise ValueError(f"{self.path} already has a record with the key {key}")
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
                os.fsync(self._fd)
            except OSError as error:
                os.ftruncate(self._fd, self._size)
                raise UserError(f"{self.path}: cannot be written: {error.strerror}; the file is unchanged") from None
            self._size += len(line)
            self.records[key] = record

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def read_records(path: Path, key_of: Callable[[Place, Record], Hashable]) -> dict[Hashable, Record]:
    """Read the records of a file by key, without changing it; an incomplete last line is skipped.

    Raises:
        UserError: as in `RecordFile`.
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
            raise UserError(f"{where}: broken JSON ({reason}); expected one object per line") from None
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
    """Complete the last line with a line break, or remove it if it is incomplete; return the file's size in bytes."""
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
    """Whether a line without a line break is a complete record: no prefix of a JSON object is valid JSON."""
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False
