"""Built-in yes-or-no questions about small numbers, for training classifiers on machines without data.

A row has a passage of one sentence, a question about it, and the label "yes" or "no". Training and test rows are
disjoint by construction: a passage's template and numbers together decide which split it belongs to.
"""

from __future__ import annotations

import operator
import random
import zlib
from dataclasses import dataclass

from hift_ds.launch.data.arithmetic import MAX_PROBLEMS, NAMES, PACKS, SPLITS, THINGS

LABELS = ("no", "yes")
_COMPARE = {"<": operator.lt, ">": operator.gt}
_COMBINE = {"+": operator.add, "*": operator.mul}


@dataclass(frozen=True)
class _Template:
    """A kind of passage.

    `passage` and the questions have the fields name, other (name), things, packs, and the numbers a, b and c; `numbers`
    gives their bounds, inclusive. The passage mentions a and b, and only questions mention c. Each question comes with
    its condition, such as `a + b > c`: the label is "yes" where it holds.
    """

    passage: str
    questions: tuple[tuple[str, str], ...]
    numbers: dict[str, tuple[int, int]]


_TEMPLATES = (
    _Template(
        "{name} has {a} {things} and {other} has {b}.",
        (
            ("Does {name} have more {things} than {other}?", "a > b"),
            ("Does {name} have fewer {things} than {other}?", "a < b"),
        ),
        {"a": (2, 60), "b": (2, 60)},
    ),
    _Template(
        "{name} has {a} {things} and finds {b} more.",
        (
            ("Does {name} have more than {c} {things} now?", "a + b > c"),
            ("Does {name} have fewer than {c} {things} now?", "a + b < c"),
        ),
        {"a": (2, 20), "b": (2, 20), "c": (4, 40)},
    ),
    _Template(
        "{name} buys {a} {packs} with {b} {things} in each.",
        (
            ("Does {name} buy more than {c} {things}?", "a * b > c"),
            ("Does {name} buy fewer than {c} {things}?", "a * b < c"),
        ),
        {"a": (2, 9), "b": (2, 9), "c": (4, 80)},
    ),
)


def yes_no_questions(split: str, n: int, seed: int) -> list[dict[str, str]]:
    """Make `n` rows of a split ("train" or "test"), each {"passage", "question", "label"}; no passage occurs twice.

    The first rows are the same for every `n`. Labels are balanced: of the rows 2i and 2i + 1, one is "yes" and the
    other "no". About one in five pairs of template and numbers belongs to the test split, whatever the seed is, so
    rows drawn with different seeds are disjoint between the splits too.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if not 0 <= n <= MAX_PROBLEMS:
        raise ValueError(f"n must be 0 to {MAX_PROBLEMS}, got {n}")
    draw = random.Random(f"yes-no {split} {seed}")
    rows: dict[str, dict[str, str]] = {}
    labels: list[str] = []
    while len(rows) < n:
        if not labels:
            labels = draw.sample(LABELS, 2)
        kind = draw.randrange(len(_TEMPLATES))
        template = _TEMPLATES[kind]
        numbers = {key: draw.randint(*bounds) for key, bounds in template.numbers.items()}
        question, condition = draw.choice(template.questions)
        name, other = draw.sample(NAMES, 2)
        words = {"name": name, "other": other, "things": draw.choice(THINGS), "packs": draw.choice(PACKS)}
        in_test = zlib.crc32(f"{kind} {numbers['a']} {numbers['b']}".encode()) % 5 == 0
        passage = template.passage.format(**words, **numbers)
        label = LABELS[_holds(condition, numbers)]
        if label != labels[-1] or in_test != (split == "test") or passage in rows:
            continue
        labels.pop()
        rows[passage] = {"passage": passage, "question": question.format(**words, **numbers), "label": label}
    return list(rows.values())


def _holds(condition: str, numbers: dict[str, int]) -> bool:
    """Whether a condition such as `a + b > c` holds, with at most one operation on the left."""
    *left, comparison, right = condition.split()
    value = numbers[left[0]]
    if len(left) > 1:
        value = _COMBINE[left[1]](value, numbers[left[2]])
    return _COMPARE[comparison](value, numbers[right])
