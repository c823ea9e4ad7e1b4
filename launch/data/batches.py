"""Batches of examples as tensors, and the order in which a run's steps take the examples."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import Dataset

from hift_ds.launch.data.blocks import load
from hift_ds.launch.data.encoding import IGNORED, EvalExample, Example
from hift_ds.launch.data.permutation import Permutation
from hift_ds.launch.data.stream import Position, Stream
from hift_ds.model.loss import Targets, find_targets

_T = TypeVar("_T")
Batch = dict[str, Any]  # tensors by name; `labels` may be Targets
_ALIGNMENT = 16  # bytes; where tensors begin in the buffer that they share on the way to the device


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right to one batch of int64 tensors.

    Returns:
        `input_ids` and `attention_mask`, of shape (examples, tokens of the longest example), and `token_type_ids` if
        the examples have them. `labels` has the same shape for causal language models. For classification its shape is
        (examples,), and for regression also its dtype differs: float32.
    """
    longest = max(len(example.input_ids) for example in examples)

    def padded(sequences: Iterable[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([one + [value] * (longest - len(one)) for one in sequences], dtype=torch.int64)

    batch = {
        "input_ids": padded((example.input_ids for example in examples), pad_token_id),
        "attention_mask": padded(([1] * len(example.input_ids) for example in examples), 0),
    }
    if examples[0].token_type_ids is not None:
        batch["token_type_ids"] = padded((example.token_type_ids or [] for example in examples), 0)
    labels = [example.labels for example in examples]
    if isinstance(labels[0], int | float):
        batch["labels"] = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)
    else:
        batch["labels"] = padded((one for one in labels if isinstance(one, list)), IGNORED)
    return batch


def collate_prompts(examples: Sequence[EvalExample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad prompts on the left, for generation.

    Returns:
        `input_ids` and `attention_mask`, int64, of shape (examples, tokens of the longest prompt).
    """
    longest = max(len(example.prompt_ids) for example in examples)
    gaps = [longest - len(example.prompt_ids) for example in examples]
    ids = [[pad_token_id] * gap + example.prompt_ids for gap, example in zip(gaps, examples, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64),
        "attention_mask": torch.tensor(mask, dtype=torch.int64),
    }


def trained_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Count the labels of a batch that enter the loss.

    For causal language models these are the trained tokens after the shift by one; for classification, one an example.
    """
    labels = batch["labels"]
    return int((labels[:, 1:] != IGNORED).sum()) if labels.dim() == 2 else labels.numel()


class Order:
    """The order in which a run's steps take the examples.

    The epochs form one stream; each is a new seeded shuffle that holds every example once. Step t takes the elements
    from t * global_batch to (t + 1) * global_batch of the stream. So the global batch of a step depends only on the
    seed and the step, not on the number of ranks or micro-batches, and a resumed run continues exactly.
    """

    # The order of more examples is computed, so that its memory does not grow with them. A list of fewer takes at most
    # 2.5 MB, and has the order in which the published results were made.
    LISTED = 2**16

    def __init__(self, n_examples: int, seed: int, global_batch: int) -> None:
        self.n_examples, self.seed, self.global_batch = n_examples, seed, global_batch
        self._epochs: dict[int, Callable[[Sequence[int]], list[int]]] = {}

    def window(self, step: int) -> list[int]:
        """Return the examples of a step (0-based), over all ranks and micro-batches."""
        places = range(step * self.global_batch, (step + 1) * self.global_batch)
        epochs = range(places[0] // self.n_examples, places[-1] // self.n_examples + 1)
        self._epochs = {epoch: self._epochs.get(epoch) or self._shuffled(epoch) for epoch in epochs}
        window: list[int] = []
        for epoch, shuffled in self._epochs.items():
            start = epoch * self.n_examples
            window += shuffled(range(max(0, places[0] - start), min(self.n_examples, places[-1] + 1 - start)))
        return window

    def _shuffled(self, epoch: int) -> Callable[[Sequence[int]], list[int]]:
        key = f"order {self.seed} {epoch}"
        if self.n_examples > self.LISTED:
            return Permutation(self.n_examples, key)
        order = list(range(self.n_examples))
        random.Random(key).shuffle(order)
        return lambda places: [order[place] for place in places]


def _cut(window: Sequence[_T], micro_batch: int, world: int) -> list[list[list[_T]]]:
    """Return each rank's micro-batches of a step's examples."""
    width = micro_batch * world
    return [
        [list(window[start : start + micro_batch]) for start in range(rank * micro_batch, len(window), width)]
        for rank in range(world)
    ]


@dataclass
class Window:
    """What one rank trains on in one step.

    Attributes:
        batches: its micro-batches, as `collate` makes them. The `labels` of language models are `Targets`.
        tokens, targets: the numbers of tokens without padding, and of those that enter the loss, over all ranks.
        rows: the step's examples over all ranks, as indices of the training data, or the places of a stream's rows.
        position: of a stream, where it is after the step.
    """

    batches: list[Batch]
    tokens: int
    targets: int
    rows: Sequence[int | str] = ()
    position: Position | None = None


@dataclass(frozen=True)
class Share:
    """How the examples of a step are cut, and which of them are this rank's.

    Args:
        global_batch, micro_batch: examples of a step over all ranks, and of one forward pass.

    Raises:
        ValueError: a size is below 1, or `global_batch` is not a multiple of `micro_batch` times `world`.
    """

    pad_token_id: int
    global_batch: int
    micro_batch: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        if min(self.global_batch, self.micro_batch, self.world) < 1 or not 0 <= self.rank < self.world:
            raise ValueError(str(self))
        if self.global_batch % (self.micro_batch * self.world):
            raise ValueError(f"{self}: global_batch is not a multiple of micro_batch times world")

    def window(
        self, examples: Sequence[Example], rows: Sequence[int | str], position: Position | None = None
    ) -> Window:
        """Return this rank's part of a step."""
        ranks = _cut(examples, self.micro_batch, self.world)
        targets = [[sum(map(_targets_of, batch)) for batch in batches] for batches in ranks]
        batches: list[Batch] = []
        for number, own in enumerate(ranks[self.rank]):
            batch: Batch = collate(own, self.pad_token_id)
            if batch["labels"].dim() == 2:
                batch["labels"] = find_targets(batch["labels"], most=max(one[number] for one in targets))
            batches.append(batch)
        return Window(batches, sum(len(one.input_ids) for one in examples), sum(map(sum, targets)), rows, position)


class Windows(Dataset[Window]):
    """The windows of a run on one rank, by step (0-based)."""

    def __init__(self, examples: Sequence[Example], seed: int, share: Share) -> None:
        self._examples, self._share = examples, share
        self._order = Order(len(examples), seed, share.global_batch)

    def __getitem__(self, step: int) -> Window:
        indices = self._order.window(step)
        return self._share.window([self._examples[i] for i in indices], indices)


def _targets_of(example: Example) -> int:
    """Count what `trained_tokens` counts in a batch of this example alone."""
    labels = example.labels
    return len(labels) - 1 - labels[1:].count(IGNORED) if isinstance(labels, list) else 1


def load_windows(
    examples: Sequence[Example] | Stream,
    seed: int,
    share: Share,
    first_step: int,
    last_step: int,
    workers: int,
    position: Position | None = None,
) -> Iterator[Window]:
    """Yield the windows of the steps from `first_step` up to `last_step` (exclusive), in order.

    Args:
        workers: processes that prepare windows ahead; 0: this process prepares each one when it is asked for.
        position: of a stream, where it is before `first_step`.
    """
    if isinstance(examples, Stream):
        return itertools.islice(_stream_windows(examples, seed, share, workers, position), last_step - first_step)
    return load(Windows(examples, seed, share), workers, sampler=range(first_step, last_step))


def _stream_windows(
    stream: Stream, seed: int, share: Share, workers: int, position: Position | None
) -> Iterator[Window]:
    examples = stream.shuffled(seed, position, workers)
    while window := list(itertools.islice(examples, share.global_batch)):
        made, rows, positions = zip(*window, strict=True)
        yield share.window(made, rows, positions[-1]())


def on_device(batches: Sequence[Batch], device: torch.device | str) -> list[Batch]:
    """Copy batches to the device by one copy from page-locked memory, for which the host does not wait."""
    flat: list[torch.Tensor] = []
    for batch in batches:
        for value in batch.values():
            flat += (value.kept, value.rows, value.values) if isinstance(value, Targets) else (value,)
    starts = list(itertools.accumulate((-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in flat), initial=0))
    packed = torch.empty(starts[-1], dtype=torch.uint8)
    for tensor, start in zip(flat, starts, strict=False):
        packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    there = get_accelerator().pin_memory(packed).to(device, non_blocking=True)
    moved = (
        there[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(flat, starts, strict=False)
    )
    return [
        {
            name: replace(value, kept=next(moved), rows=next(moved), values=next(moved))
            if isinstance(value, Targets)
            else next(moved)
            for name, value in batch.items()
        }
        for batch in batches
    ]
