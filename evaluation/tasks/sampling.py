"""Draw a task's training, validation and test sets by a seed."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from hift_ds.evaluation.tasks.catalog import TaskExample

SETS = ("train", "dev", "test")
WEIGHTS = {"train": 2, "dev": 1, "test": 2}  # the shares of a split that is too small, as 1,000 : 500 : 1,000


def shares_of(n: int, wanted: dict[str, int]) -> dict[str, int]:
    """Return how many of `n` examples each set gets: as many as wanted, or a share by weight if there are too few."""
    shares: dict[str, int] = {}
    left = n
    for part in sorted(wanted, key=lambda part: wanted[part]):  # small sets first, the others share the rest
        weights = sum(WEIGHTS[other] for other in wanted if other not in shares)
        shares[part] = min(wanted[part], max(left * WEIGHTS[part] // weights, 1), left)
        left -= shares[part]
    return shares


def divide(
    examples: list[TaskExample], shares: dict[str, int], seed: int, grouped: bool = False
) -> dict[str, list[TaskExample]]:
    """Divide examples into sets without a common passage: whole passages fill test and dev, the rest is for training.

    Args:
        shares: the number of examples by set; without "test" or "dev" that set is not drawn.
        grouped: merge examples with the same prompt in test and dev.
    """
    passages: dict[str, list[TaskExample]] = collections.defaultdict(list)
    for one in examples:
        passages[one.passage].append(one)
    order = list(passages)
    random.Random(f"passages {seed}").shuffle(order)
    drawn: dict[str, list[TaskExample]] = {}
    for part in ("test", "dev"):
        if part in shares:
            members: list[TaskExample] = []
            while len(order) > 1 and len(members) < shares[part]:  # at least one passage is for training
                passage = passages[order.pop()]
                members += merged(passage) if grouped else passage
            drawn[part] = draw(members, shares[part], f"{part} {seed}")
    drawn["train"] = draw([one for key in order for one in passages[key]], shares["train"], f"train {seed}")
    return drawn


def of_each_class(examples: Sequence[TaskExample], k: int, seed: int) -> dict[str, list[TaskExample]]:
    """Draw k training and k validation examples of each class, without a common passage (Gao et al. 2021, MeZO)."""
    order = list(examples)
    random.Random(f"{k} of each class {seed}").shuffle(order)
    drawn: dict[str, list[TaskExample]] = {"train": [], "dev": []}
    counts: collections.Counter[tuple[str, Any]] = collections.Counter()
    parts: dict[str, str] = {}  # passage -> its set
    for one in order:
        for part, members in drawn.items():
            if counts[part, one.target] < k and parts.setdefault(one.passage, part) == part:
                members.append(one)
                counts[part, one.target] += 1
                break
    return drawn


def draw(examples: Sequence[TaskExample], n: int, seed: str) -> list[TaskExample]:
    """Draw at most n examples in a seeded order; the answers to a question stay together."""
    questions: dict[str, list[TaskExample]] = collections.defaultdict(list)
    for index, one in enumerate(examples):
        questions[one.question or str(index)].append(one)
    order = list(questions.values())
    random.Random(seed).shuffle(order)
    drawn: list[TaskExample] = []
    for members in order:
        if len(drawn) + len(members) <= n:
            drawn += members
    return drawn


def merged(examples: Sequence[TaskExample]) -> list[TaskExample]:
    """Merge examples with the same prompt: keep the first and give it the references of all."""
    references: dict[str, list[str]] = collections.defaultdict(list)
    for one in examples:
        references[one.prompt] += one.references
    first = {one.prompt: one for one in reversed(examples)}
    return [
        dataclasses.replace(first[prompt], references=tuple(dict.fromkeys(texts)))
        for prompt, texts in references.items()
    ]
