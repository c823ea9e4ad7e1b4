"""Training examples that are read, tokenized and shuffled as they are needed, and never stored.

The rows are read in the order of the files, again and again. Each block of `data.shuffle_rows` rows is tokenized and
its examples are shuffled by a seed, so the examples of a step depend only on the seed and the step. A block is found
again by its first row: a continued run passes over the rows before it without tokenizing them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from typing import Any

import pyarrow

from hift_ds.launch.data.blocks import Block, Blocks, Rows, Start, cut, load_blocks
from hift_ds.launch.data.encoding import Encoder, Example, Found
from hift_ds.launch.data.examples import Examples
from hift_ds.launch.data.formats import Converter
from hift_ds.launch.data.remarks import sentence
from hift_ds.launch.errors import UserError

Position = dict[str, Any]  # for JSON


class Stream:
    """The training examples of a stream.

    Args:
        size: rows in a block.
        columns: of the examples (see `hift_ds.launch.data.examples.schema`).
        held_out: the hashes of the held-out examples.
        max_length: `data.max_length`, for messages.

    Attributes:
        found: what was found in the rows that were read since the run began.
        say: told what is found for the first time.
        highest_token, highest_type: the highest token id and token type that the model takes; None: any.
    """

    def __init__(
        self,
        rows: Rows,
        size: int,
        convert: Converter,
        encoder: Encoder,
        columns: pyarrow.Schema,
        held_out: Collection[bytes],
        max_length: int,
    ) -> None:
        self._rows, self._size, self._convert, self._encoder = rows, size, convert, encoder
        self._columns, self._held_out, self._max_length = columns, held_out, max_length
        self.found = Found()
        self.say: Callable[[str], object] = lambda text: None
        self.highest_token: int | None = None
        self.highest_type: int | None = None
        self._numbers: list[int] | None = None
        self._is_shared = False

    def renumber(self, numbers: list[int]) -> None:
        """Give each class the number at its place in `numbers`."""
        self._numbers = numbers

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples of one pass over the rows in their order, not shuffled."""
        for _, _, rows in self._rows.sources():
            for where, row in rows:
                yield from self._encoder.encode(where, self._convert(row, where), Found())

    def shuffled(
        self, seed: int, position: Position | None, processes: int
    ) -> Iterator[tuple[Example, str, Callable[[], Position]]]:
        """Yield examples without end, each with the place of its row and a function that returns the position after it.

        Args:
            position: where to begin; None: at the first row.
            processes: processes that read ahead; 0: this one reads.

        Raises:
            UserError: a row cannot be read, converted or tokenized, or the model does not take its tokens.
        """
        start, taken = Start(), 0
        self.found = Found()
        if position is not None:
            start, taken = Start(**position["start"]), position["taken"]
            self.found = Found.of(position["found"])
        source = Blocks(lambda: cut(self._rows, self._size, start), self._convert, self._encoder, self._columns)
        epoch, is_empty = start.epoch, start != Start(start.epoch)
        for block in load_blocks(source, processes):
            if block.start.epoch > epoch and is_empty:
                raise UserError("data: no row of the stream has a trained token within data.max_length; raise it")
            if block.start.epoch > epoch:
                epoch, is_empty = block.start.epoch, True
            is_empty = is_empty and not block.places
            before = self.found.report()
            self._notice(block)
            examples: Examples[Example] = Examples(block.table, Example)
            if self._numbers is not None:
                examples.renumber(self._numbers)
            order = list(range(len(examples)))
            random.Random(f"stream {seed} {block.start.epoch} {block.start.block}").shuffle(order)
            for number, index in enumerate(order[taken:], taken + 1):

                def after(block: Block = block, before: dict[str, Any] = before, number: int = number) -> Position:
                    return {"start": asdict(block.start), "taken": number, "found": before}

                yield examples[index], block.places[index], after
            taken = 0

    def _notice(self, block: Block) -> None:
        """Add what was found in a block, and say what is new."""
        new, old = block.found, self.found
        for highest, limit, what in (
            (new.highest_token, self.highest_token, "vocabulary"),
            (new.highest_type, self.highest_type, "token types"),
        ):
            if limit is not None and highest > limit:
                raise UserError(
                    f"data: the rows from {block.places[0]} to {block.places[-1]} have the id {highest}, but the ids "
                    f"of the model's {what} end with {limit}; use the model's own tokenizer (model.tokenizer)"
                )
        if new.first.get("truncated") and not old.truncated:
            length = f"data.max_length ({self._max_length} tokens)"
            self.say(f"train: examples are cut on the right to {length}; the first is {new.first['truncated']}")
        if new.skipped_no_target and not old.skipped_no_target:
            where = new.first["skipped_no_target"]
            self.say(f"train: rows without a trained token are skipped; the first is {where}")
        for matter, remark in new.remarks.found.items():
            if matter not in old.remarks.found:
                self.say(f"train: {sentence(matter, remark.names)}; the first row is {remark.first}")
        shared = [where for one, where in zip(block.hashes, block.places, strict=True) if one in self._held_out]
        if shared and not self._is_shared:
            self._is_shared = True
            self.say(
                f"warning: held-out examples are also training examples, so their score does not measure new data; the "
                f"first is {shared[0]}"
            )
        self.found.merge(new)
