"""Rows that are read, converted and tokenized block by block, in one process or in several."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hift_ds.launch.data.encoding import Encoder, EvalExample, Found, row_bytes
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

    def __iter__(self) -> Iterator[list[Row]]:
        """Yield the rows that each row of the source stands for, without empty lists."""
        chosen = None if self.chosen is None else iter(self.chosen)
        wanted, number = None if chosen is None else next(chosen, None), -1
        for where, row in itertools.chain.from_iterable(read(0) for read in self.readers):
            taken = []
            for flat in flatten(self.name, row, where):
                number += 1
                if chosen is None or number == wanted:
                    taken.append((where, flat))
                    wanted = None if chosen is None else next(chosen, None)
            if taken:
                yield taken


@dataclass
class Block:
    """Consecutive rows, tokenized.

    Attributes:
        examples: their examples.
        places: the place of each example's row.
        found: what was found in the rows.
        content: the rows as they enter their hash.
    """

    examples: list[EvalExample] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    found: Found = field(default_factory=Found)
    content: bytes = b""


class Blocks(IterableDataset):
    """The blocks of rows, in order.

    Args:
        rows: the rows of each row of the source.
        size: rows of the source in a block.
    """

    def __init__(self, rows: Iterable[list[Row]], size: int, convert: Converter, encoder: Encoder) -> None:
        self._rows, self._size, self._convert, self._encoder = rows, size, convert, encoder

    def __iter__(self) -> Iterator[Block | UserError]:
        """Yield the blocks of this process: each of `n` processes makes every n-th block.

        An error is yielded, because torch would put the traceback of a process into its message.
        """
        process = get_worker_info()
        own, n = (0, 1) if process is None else (process.id, process.num_workers)
        rows = iter(self._rows)
        try:
            for number in itertools.count():
                sources = list(itertools.islice(rows, self._size))
                if not sources:
                    return
                if number % n == own:
                    yield self._encoded(itertools.chain.from_iterable(sources))
        except UserError as error:
            yield error

    def _encoded(self, rows: Iterable[Row]) -> Block:
        block, content = Block(), []
        for where, row in rows:
            converted = self._convert(row, where)
            content.append(row_bytes(converted))
            examples = self._encoder.encode(where, converted, block.found)
            block.examples += examples
            block.places += [where] * len(examples)
        block.content = b"".join(content)
        return block


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
