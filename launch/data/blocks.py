"""Rows that are read, converted and tokenized block by block, in one process or in several."""

from __future__ import annotations

import hashlib
import itertools
import signal
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hift_ds.launch.data.encoding import Encoder, Found, row_bytes
from hift_ds.launch.data.examples import as_table
from hift_ds.launch.data.formats import Converter, flatten
from hift_ds.launch.data.sources import Row
from hift_ds.launch.errors import UserError


@dataclass
class Rows:
    """The rows of a part. They can be read several times.

    Attributes:
        name: `data.name`, in lower case.
        readers: each returns the rows of a file from a row on.
        chosen: the rows to take, by their numbers in ascending order; None: all.
    """

    name: str
    readers: Sequence[Callable[[int], Iterable[Row]]]
    chosen: Sequence[int] | None = None

    def sources(self, file: int = 0, row: int = 0) -> Iterator[tuple[int, int, list[Row]]]:
        """Yield the number of a file, the number of a row in it, and the rows that this row stands for.

        Args:
            file, row: where to begin; earlier rows are not parsed. Only without `chosen`.
        """
        chosen = None if self.chosen is None else iter(self.chosen)
        wanted, number = None if chosen is None else next(chosen, None), -1
        for place, read in enumerate(self.readers[file:], file):
            for source, (where, columns) in enumerate(read(row), row):
                taken = []
                for flat in flatten(self.name, columns, where):
                    number += 1
                    if chosen is None or number == wanted:
                        taken.append((where, flat))
                        wanted = None if chosen is None else next(chosen, None)
                yield place, source, taken
            row = 0


@dataclass(frozen=True)
class Start:
    """Where a block begins: its number in a pass over the rows, and its first row."""

    epoch: int = 0
    block: int = 0
    file: int = 0
    row: int = 0


def cut(rows: Rows, size: int, start: Start | None = None) -> Iterator[tuple[Start, list[Row]]]:
    """Cut rows into blocks.

    Args:
        size: rows of the source in a block.
        start: where to begin; after the last row, the next epoch begins. None: once through all rows.

    Raises:
        UserError: there is no row.
    """
    at = start or Start()
    while True:
        sources = rows.sources(at.file, at.row)
        while taken := list(itertools.islice(sources, size)):
            at = Start(at.epoch, at.block, taken[0][0], taken[0][1])
            yield at, [one for _, _, own in taken for one in own]
            at = Start(at.epoch, at.block + 1)
        if start is None:
            return
        if at.block == 0:
            raise UserError("data: the files have no rows any more; there is nothing to train on")
        at = Start(at.epoch + 1)


@dataclass
class Block:
    """Consecutive rows, tokenized.

    Attributes:
        start: where it begins.
        table: the examples (see `hift_ds.launch.data.examples`).
        hashes, places: of each example, the hash of its tokens and the place of its row.
        found: what was found in the rows.
        content: the rows as they enter their hash.
    """

    start: Start
    table: pyarrow.RecordBatch
    hashes: list[bytes]
    places: list[str]
    found: Found
    content: bytes


class Blocks(IterableDataset):
    """Tokenized blocks, in order.

    Args:
        blocks: returns the blocks of rows, from :func:`cut`.
        columns: of the tables.
    """

    def __init__(
        self,
        blocks: Callable[[], Iterator[tuple[Start, list[Row]]]],
        convert: Converter,
        encoder: Encoder,
        columns: pyarrow.Schema,
    ) -> None:
        self._blocks, self._convert, self._encoder, self._columns = blocks, convert, encoder, columns

    def __iter__(self) -> Iterator[Block | UserError]:
        """Yield the blocks of this process: each of `n` processes makes every n-th block.

        An error is yielded, because torch would put the traceback of a process into its message.
        """
        process = get_worker_info()
        own, n = (0, 1) if process is None else (process.id, process.num_workers)
        try:
            for number, (start, rows) in enumerate(self._blocks()):
                if number % n == own:
                    yield self._encoded(start, rows)
        except UserError as error:
            yield error

    def _encoded(self, start: Start, rows: Iterable[Row]) -> Block:
        found, content, places, made = Found(), [], [], []
        for where, row in rows:
            converted = self._convert(row, where)
            content.append(row_bytes(converted))
            examples = self._encoder.encode(where, converted, found)
            made += examples
            places += [where] * len(examples)
        hashes = [hash_of(one.input_ids) for one in made]
        return Block(start, as_table(made, self._columns), hashes, places, found, b"".join(content))


def hash_of(ids: Sequence[int]) -> bytes:
    """Return a hash of tokens, to find the same examples in two parts."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()


def load_blocks(blocks: Blocks, processes: int) -> Iterator[Block]:
    """Yield the blocks in order.

    Args:
        processes: processes that make them; 0: this one does.

    Raises:
        UserError: a row cannot be read, converted or tokenized.
    """
    for block in load(blocks, processes):
        if isinstance(block, UserError):
            raise block
        yield block


def load(data: Any, workers: int, **options: Any) -> Iterator[Any]:
    """Yield the items of a data set of torch, prepared by `workers` processes; 0: by this one."""
    # A generator of its own: the loader would draw from torch's.
    return iter(
        DataLoader(
            data,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),
            **options,
        )
    )


def _unchanged(item: Any) -> Any:
    return item


def _outlive_signals(_: int) -> None:
    """Ignore the signals by which a run is asked to stop: it still needs its batches, and ends its workers itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
