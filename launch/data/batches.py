"""Batches of examples as tensors, and the order in which a run's steps take the examples."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

import torch

from hift_ds.launch.data.encoding import IGNORED, EvalExample, Example


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


def window_batches(
    n_examples: int,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    start_step: int = 0,
) -> Iterator[list[list[int]]]:
    """Yield this rank's micro-batches for each step from `start_step` on, without end, as indices of examples.

    The epochs form one stream; each is a new seeded shuffle that holds every example once. Step t takes the elements
    from t * global_batch to (t + 1) * global_batch of the stream. So the global batch of a step depends only on the
    seed and the step, not on the number of ranks or micro-batches, and a resumed run continues exactly.

    Raises:
        ValueError: a size is below 1, or `global_batch` is not a multiple of `micro_batch` times `world`.
    """
    if min(n_examples, global_batch, micro_batch, world) < 1 or not 0 <= rank < world or start_step < 0:
        raise ValueError(f"{n_examples=} {global_batch=} {micro_batch=} {rank=} {world=} {start_step=}")
    if global_batch % (micro_batch * world):
        raise ValueError(f"{global_batch=} is not a multiple of {micro_batch=} times {world=}")

    @functools.lru_cache(maxsize=2)  # a batch may span two epochs
    def epoch_order(epoch: int) -> list[int]:
        order = list(range(n_examples))
        random.Random(f"order {seed} {epoch}").shuffle(order)
        return order

    def windows() -> Iterator[list[list[int]]]:
        for step in itertools.count(start_step):
            places = range(step * global_batch, (step + 1) * global_batch)
            window = [epoch_order(place // n_examples)[place % n_examples] for place in places]
            starts = range(rank * micro_batch, global_batch, world * micro_batch)
            yield [window[start : start + micro_batch] for start in starts]

    return windows()
