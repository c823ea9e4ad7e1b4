"""How a task's examples are drawn into its parts by a seed."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from hift_ds.evaluation.tasks.catalog import TaskExample

SETS = ("train", "dev", "test")
WEIGHTS = {"train": 2, "dev": 1, "test": 2}  # in which they share a split that is too small: 1,000 to 500 to 1,000


def shares_of(n: int, wanted: dict[str, int]) -> dict[str, int]:
    """How many of n examples each part gets: what it wants, or its share by weight where they are too few."""
    shares: dict[str, int] = {}
    left = n
    for part in sorted(wanted, key=lambda part: wanted[part]):  # those who want little get it, the others share
        weights = sum(WEIGHTS[other] for other in wanted if other not in shares)
        shares[part] = min(wanted[part], max(left * WEIGHTS[part] // weights, 1), left)
        left -= shares[part]
    return shares


def divide(
    examples: list[TaskExample], shares: dict[str, int], seed: int, grouped: bool = False
) -> dict[str, list[TaskExample]]:
    """Parts without a passage in common: whole passages go to test and dev until those are full, the rest to train.

    `grouped`: what goes to test and dev is merged.
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
            while len(order) > 1 and len(members) < shares[part]:  # one is for train
                passage = passages[order.pop()]
                members += merged(passage) if grouped else passage
            drawn[part] = draw(members, shares[part], f"{part} {seed}")
    drawn["train"] = draw([one for key in order for one in passages[key]], shares["train"], f"train {seed}")
    return drawn


def of_each_class(examples: Sequence[TaskExample], k: int, seed: int) -> dict[str, list[TaskExample]]:
    """k training and k validation examples of each class, without a passage in common (Gao et al. 2021, as in MeZO)."""
    order = list(examples)
    random.Random(f"{k} of each class {seed}").shuffle(order)
    drawn: dict[str, list[TaskExample]] = {"train": [], "dev": []}
    counts: collections.Counter[tuple[str, Any]] = collections.Counter()
    parts: dict[str, str] = {}  # of passages
    for one in order:
        for part, members in drawn.items():
            if counts[part, one.target] < k and parts.setdefault(one.passage, part) == part:
                members.append(one)
                counts[part, one.target] += 1
                break
    return drawn


def draw(examples: Sequence[TaskExample], n: int, seed: str) -> list[TaskExample]:
    """At most n examples in a seeded order; the answers to a question stay together."""
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
    """One example for each prompt, with the references of all that have it; the first of each stays."""
    references: dict[str, list[str]] = collections.defaultdict(list)
    for one in examples:
        references[one.prompt] += one.references
    first = {one.prompt: one for one in reversed(examples)}
    return [
        dataclasses.replace(first[prompt], references=tuple(dict.fromkeys(texts)))
        for prompt, texts in references.items()
    ]
