"""The classes of a sequence classifier: how many there are, their numbers and their names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hift_ds.launch.errors import UserError
from hift_ds.launch.model.settings import ModelSettings

_GENERIC = re.compile(r"LABEL_\d+")  # transformers' name of a class without one


def number_of_classes(settings: ModelSettings, in_data: int) -> int:
    """Return `model.num_labels`, or the number of classes in the data.

    Raises:
        UserError: the data has more classes than `model.num_labels`.
    """
    if settings.num_labels is not None and settings.num_labels < in_data:
        raise UserError(
            f"model.num_labels: got {settings.num_labels}, but the data has {in_data} classes. Set at least {in_data}, "
            "or remove it."
        )
    return settings.num_labels or in_data


def set_classes(
    config: Any, settings: ModelSettings, labels: list[str], say: Callable[[str], object] = print
) -> list[str]:
    """Write the names of the data's classes into a configuration, and with it into the exported model.

    If the checkpoint was trained on classes of the same names, in any order and letter case, its numbers stay.
    Otherwise the classes are numbered as in the data. Labels that are numbers change no names.

    Args:
        config: a transformers configuration.
        labels: the names of the data's classes in the order of their numbers.
        say: called with notes for the user.

    Returns:
        The names of the model's classes in the order of their numbers. All of `labels` are among them.

    Raises:
        UserError: the data has more classes than `model.num_labels`.
    """
    before = {number: str(name) for number, name in config.id2label.items()}
    config.num_labels = count = number_of_classes(settings, len(labels))
    if config.problem_type not in (None, "single_label_classification"):
        say(
            "note: problem_type in the model's configuration changes from "
            f"{config.problem_type} to single_label_classification"
        )
        config.problem_type = "single_label_classification"
    has_names = before.keys() == set(range(count)) and not any(map(_GENERIC.fullmatch, before.values()))
    names = [before[number] if has_names else f"LABEL_{number}" for number in range(count)]
    if all(label.isdigit() for label in labels):
        labels = [str(number) for number in range(count)]
    else:
        numbers = list(range(len(labels)))
        trained, wanted = ({name.casefold(): i for i, name in enumerate(some)} for some in (names, labels))
        if trained.keys() >= wanted.keys() and len(wanted) == len(labels):
            numbers = [trained[label.casefold()] for label in labels]
        elif has_names:
            say(f"note: the classes of the checkpoint, {', '.join(names)}, are now {', '.join(labels)}")
            names = [f"LABEL_{number}" for number in range(count)]
        for number, label in zip(numbers, labels, strict=True):
            names[number] = label
        labels = names
        if numbers != sorted(numbers):
            listed = ", ".join(f"{number} {name}" for number, name in enumerate(names))
            say(f"note: the classes keep the numbers that they have in the checkpoint: {listed}")
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    return labels
