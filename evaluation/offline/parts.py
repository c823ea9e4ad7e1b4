"""One archive in parts of a limited size, with their SHA-256 sums. The same content gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Entry:
    """A file of the archive.

    Attributes:
        name: its path in the archive.
        content: the file that it is made of, its bytes, or the target of a link.
    """

    name: str
    content: Path | bytes | str
    executable: bool = False


class Parts(io.RawIOBase):
    """A stream that is written to files in a folder, which are named part-001-of-004 and so on when it is closed.

    Args:
        size: bytes of each part; the last one may be smaller.

    Attributes:
        sums: the SHA-256 of each part by its name, after the stream is closed.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._file: io.BufferedWriter | None = None
        self._hash, self._written = hashlib.sha256(), 0
        self._ended: list[tuple[Path, str]] = []
        self.sums: dict[str, str] = {}

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data) -> int:
        """Write bytes to the current part and to those that follow."""
        rest = memoryview(data)
        while rest:
            if self._file is None:
                self._file = (self._folder / f"part-{len(self._ended) + 1:03d}").open("xb")
                self._hash, self._written = hashlib.sha256(), 0
            piece = rest[: self._size - self._written]
            self._file.write(piece)
            self._hash.update(piece)
            self._written, rest = self._written + len(piece), rest[len(piece) :]
            if self._written == self._size:
                self._end_part()
        return len(data)

    def _end_part(self) -> None:
        if self._file is not None:
            self._file.close()
            self._ended.append((Path(self._file.name), self._hash.hexdigest()))
            self._file = None

    def close(self) -> None:
        """End the last part, and give all their names."""
        self._end_part()
        while self._ended and len(self.sums) < len(self._ended):
            path, found = self._ended[len(self.sums)]
            self.sums[path.rename(f"{path}-of-{len(self._ended):03d}").name] = found
        super().close()


def write_parts(folder: Path, entries: Iterable[Entry], size: int) -> dict[str, str]:
    """Write an archive in parts of at most `size` bytes, and the list of their sums; return the sums by name."""
    with Parts(folder, size) as parts, tarfile.open(fileobj=parts, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for entry in sorted(entries, key=lambda entry: entry.name):
            _add(archive, entry)
    lines = "".join(f"{found}  {name}\n" for name, found in sorted(parts.sums.items()))
    (folder / SUMS).write_text(lines, encoding="ascii")
    return parts.sums


def _add(archive: tarfile.TarFile, entry: Entry) -> None:
    member = tarfile.TarInfo(entry.name)  # without times and owners
    member.mode = 0o755 if entry.executable else 0o644
    if isinstance(entry.content, str):
        member.type, member.linkname = tarfile.SYMTYPE, entry.content
        archive.addfile(member)
    elif isinstance(entry.content, bytes):
        member.size = len(entry.content)
        archive.addfile(member, io.BytesIO(entry.content))
    else:
        member.size = entry.content.stat().st_size
        with entry.content.open("rb") as file:
            archive.addfile(member, file)
