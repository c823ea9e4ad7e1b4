"""Built-in arithmetic word problems in GSM8K's format, for machines without data.

A problem has a question and a worked solution of one to three steps that ends in `#### N`. Training and test
problems are disjoint by construction: a problem's template and numbers decide its split, so that no test problem
appears in training, not even with other names.
"""

from __future__ import annotations

import operator
import random
import zlib
from dataclasses import dataclass

SPLITS = ("train", "test")
# Far fewer than the templates can produce with all names and things, so that drawing new ones stays fast.
MAX_PROBLEMS = 200_000

NAMES = (
    "Ada", "Ben", "Carla", "David", "Emma", "Finn", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo",
    "Maria", "Noah", "Olga", "Paul", "Ruth", "Sam", "Tina", "Victor",
)  # fmt: skip
THINGS = (
    "apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "keys", "lemons", "marbles",
    "pencils", "shells", "stamps", "stickers", "stones", "toys",
)  # fmt: skip
PACKS = ("bags", "boxes", "baskets", "jars", "packs", "trays")
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class _Template:
    """A kind of problem.

    Attributes:
        question: text with the fields name, other (another name), things, packs and the drawn numbers a to d.
        solution: text in which a field x, y or z is replaced by the whole step, such as `3 + 4 = 7`.
        numbers: bounds of the drawn numbers, inclusive.
        steps: compute x, y and z in turn from numbers and earlier results. The last result is the answer.
    """

    question: str
    solution: str
    numbers: dict[str, tuple[int, int]]
    steps: dict[str, str]


_DIGIT, _SMALL, _LARGE = (2, 9), (2, 20), (10, 60)
_TEMPLATES = (
    # One step.
    _Template(
        "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
        "{name} has {x} {things}.",
        {"a": _SMALL, "b": _SMALL},
        {"x": "a + b"},
    ),
    _Template(
        "{name} had {a} {things} and gave {b} to {other}. How many {things} are left?",
        "{x} {things} are left.",
        {"a": _LARGE, "b": _SMALL},
        {"x": "a - b"},
    ),
    _Template(
        "{name} buys {a} {packs} with {b} {things} in each. How many {things} is that?",
        "{name} buys {x} {things}.",
        {"a": _DIGIT, "b": _DIGIT},
        {"x": "a * b"},
    ),
    # Two steps.
    _Template(
        "{name} has {a} {things}, finds {b} more and loses {c}. How many {things} remain?",
        "{name} has {x} {things}.\n{y} remain.",
        {"a": _SMALL, "b": _SMALL, "c": _DIGIT},
        {"x": "a + b", "y": "x - c"},
    ),
    _Template(
        "{name} has {a} {things}, {other} has {b} more than {name}. How many {things} do both have together?",
        "{other} has {x}.\nTogether {y}.",
        {"a": _SMALL, "b": _DIGIT},
        {"x": "a + b", "y": "a + x"},
    ),
    _Template(
        "{name} fills {a} {packs} with {b} {things} each and keeps {c} more. How many {things} are there?",
        "{x} in {packs}.\n{y} in all.",
        {"a": _DIGIT, "b": _DIGIT, "c": _SMALL},
        {"x": "a * b", "y": "x + c"},
    ),
    _Template(
        "{name} buys {a} {things} for ${b} each and pays with ${c}. How many dollars does {name} get back?",
        "The cost is {x}.\nThe change is {y}.",
        {"a": _DIGIT, "b": _DIGIT, "c": (20, 100)},
        {"x": "a * b", "y": "c - x"},
    ),
    _Template(
        "{name} has {a} {things}. {other} had twice as many, but lost {b}. How many has {other} now?",
        "{other} had {x}.\nNow {y}.",
        {"a": _SMALL, "b": _DIGIT},
        {"x": "2 * a", "y": "x - b"},
    ),
    # Three steps.
    _Template(
        "{name} has {a} {packs} of {b} {things}, {other} has {c} {packs} of {d}. How many {things} is that?",
        "{x}.\n{y}.\n{z} in all.",
        {"a": _DIGIT, "b": _DIGIT, "c": _DIGIT, "d": _DIGIT},
        {"x": "a * b", "y": "c * d", "z": "x + y"},
    ),
    _Template(
        "{name} has {a} {things}, finds {b}, loses {c}, gets {d} from {other}. How many {things} has {name}?",
        "{x}.\n{y}.\n{z} in the end.",
        {"a": _SMALL, "b": _DIGIT, "c": _DIGIT, "d": _DIGIT},
        {"x": "a + b", "y": "x - c", "z": "y + d"},
    ),
)


def arithmetic_problems(split: str, n: int, seed: int) -> list[dict[str, str]]:
    """Draw `n` distinct problems of a split ("train" or "test"), each {"question", "answer"} as in GSM8K's files.

    The first problems are the same for every `n`. About one in five pairs of template and numbers is a test
    problem. This does not depend on the seed, so the splits of different seeds are disjoint, too.

    Raises:
        ValueError: an unknown split, or more than `MAX_PROBLEMS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if not 0 <= n <= MAX_PROBLEMS:
        raise ValueError(f"n must be 0 to {MAX_PROBLEMS}, got {n}")
    draw = random.Random(f"{split} {seed}")
    problems: dict[str, str] = {}
    while len(problems) < n:
        kind = draw.randrange(len(_TEMPLATES))
        template = _TEMPLATES[kind]
        numbers = {key: draw.randint(*bounds) for key, bounds in template.numbers.items()}
        name, other = draw.sample(NAMES, 2)
        words = {"name": name, "other": other, "things": draw.choice(THINGS), "packs": draw.choice(PACKS)}
        in_test = zlib.crc32(f"{kind} {sorted(numbers.items())}".encode()) % 5 == 0
        worked = _work_out(template, numbers)
        if worked is None or in_test != (split == "test"):
            continue
        steps, result = worked
        answer = template.solution.format(**words, **steps) + f"\n#### {result}"
        problems[template.question.format(**words, **numbers)] = answer
    return [{"question": question, "answer": answer} for question, answer in problems.items()]


def _work_out(template: _Template, numbers: dict[str, int]) -> tuple[dict[str, str], int] | None:
    """Return each step as text and the last result, or None if a result is below 1, which fits no story."""
    values = dict(numbers)
    texts = {}
    result = 0
    for key, step in template.steps.items():
        left, sign, right = step.split()
        x, y = (values[term] if term in values else int(term) for term in (left, right))
        result = _OPERATORS[sign](x, y)
        if result < 1:
            return None
        values[key] = result
        texts[key] = f"{x} {sign} {y} = {result}"
    return texts, result
