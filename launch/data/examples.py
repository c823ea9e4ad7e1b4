"""Tokenized examples in Arrow files, which the ranks of a machine map into memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow

from hift_ds.launch.data.encoding import Example

_T = TypeVar("_T", bound=Example)
_COLUMNS = {
    "train": ("input_ids", "labels", "token_type_ids"),
    "eval": ("input_ids", "labels", "token_type_ids", "prompt_ids", "prompt", "reference", "accepted"),
}


class Examples(Sequence[_T]):
    """The examples of an Arrow file or of a table. Reading one makes it from there; nothing else is in memory.

    Args:
        content: a file with a stream of tables as :func:`as_table` makes them, or one such table.
        make: `Example`, or `EvalExample` for held-out examples.
    """

    def __init__(self, content: Path | pyarrow.RecordBatch, make: Callable[..., _T]) -> None:
        import datasets  # takes seconds

        if isinstance(content, Path):
            self._rows = datasets.Dataset.from_file(str(content))
        else:
            self._rows = datasets.Dataset(pyarrow.Table.from_batches([content]))
        self._make = make
        self._numbers: list[int] | None = None

    def renumber(self, numbers: list[int]) -> None:
        """Give each class the number at its place in `numbers`."""
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            raise TypeError(f"examples are read one by one, by an index; got {index!r}")
        return self._made(self._rows[index])

    def __iter__(self) -> Iterator[_T]:
        return map(self._made, self._rows)

    def _made(self, row: dict[str, Any]) -> _T:
        if self._numbers is not None:
            row["labels"] = self._numbers[row["labels"]]
        if "accepted" in row:
            row["accepted"] = tuple(row["accepted"])
        return self._make(**row)


def schema(part: str, *, classify: bool) -> pyarrow.Schema:
    """Return the columns of the examples of a part, "train" or "eval".

    Args:
        classify: whether labels are the numbers of classes; else there is one for each token.
    """
    tokens, text = pyarrow.list_(pyarrow.int32()), pyarrow.string()
    kinds = {"prompt": text, "reference": text, "accepted": pyarrow.list_(text)}
    kinds |= {"labels": pyarrow.int64()} if classify else {}
    return pyarrow.schema([(column, kinds.get(column, tokens)) for column in _COLUMNS[part]])


def as_table(examples: Sequence[Example], columns: pyarrow.Schema) -> pyarrow.RecordBatch:
    """Return examples as a table with the columns of :func:`schema`."""
    values = {name: [getattr(one, name) for one in examples] for name in columns.names}
    return pyarrow.RecordBatch.from_pydict(values, schema=columns)
