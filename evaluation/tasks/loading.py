"""Load a task's data: training, validation (`dev`) and test sets by seed, with no test example in training.

As in MeZO (Malladi et al. 2023), a seed draws 1,000 training, 500 validation and 1,000 test examples by default. The
readers of launch/data read the files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hift_ds.checkpoint.files import sha256_of
from hift_ds.evaluation.tasks.catalog import WITHOUT_DATA, Task, TaskExample, content_hash
from hift_ds.evaluation.tasks.publishers import PUBLISHERS, find_published
from hift_ds.evaluation.tasks.sampling import SETS, divide, draw, merged, of_each_class, shares_of
from hift_ds.launch.data.built_in import MAX_PROBLEMS, built_in_rows
from hift_ds.launch.data.encoding import as_question, spaced
from hift_ds.launch.data.formats import SOLUTION_TASKS, converter, flatten
from hift_ds.launch.data.sources import FILE_KINDS, PUBLISHED, Row, eval_splits, find_files, open_hub, read_file
from hift_ds.launch.errors import UserError, looked_in

SEPARATOR = "\n\n"  # between demonstrations, as in MeZO


@dataclass
class TaskData:
    """The training, validation and test sets of a task for one seed.

    `report` has `task`, `seed`, `files` (path -> sha256), `test_from` (the split that the test set comes from), `read`
    (rows by split), `unlabeled`, `duplicates` (dropped from training), `in_test` (dropped from training because the
    test split has them), `examples` and `sha256` of each set, and `notes`: sentences for the user.
    """

    train: list[TaskExample]
    dev: list[TaskExample]
    test: list[TaskExample]
    report: dict[str, Any] = field(default_factory=dict)

    def demonstrations(self, k: int, seed: int) -> list[TaskExample]:
        """Draw `k` training examples for in-context learning."""
        if k > len(self.train):
            raise UserError(f"{k} demonstrations, but only {len(self.train)} training examples; lower the number")
        return random.Random(f"demonstrations {seed}").sample(self.train, k)


@dataclass(frozen=True)
class _Splits:
    """The examples of a task's splits, from which sets are drawn.

    Attributes:
        distinct: of the training split, without those that the held-out split has, each once.
        tested: of the held-out split; [] if there is none.
        files: path -> sha256.
        read: rows by split.
        unlabeled, duplicates, in_test: see `TaskData.report`.
    """

    distinct: list[TaskExample]
    tested: list[TaskExample]
    files: dict[str, str]
    read: dict[str, int]
    unlabeled: int
    duplicates: int
    in_test: int

    @classmethod
    def of(cls, task: Task, rows: dict[str, list[Row]], files: dict[str, str]) -> _Splits:
        """Convert rows of "train" and "eval"."""
        pool = _examples(task, rows["train"])
        published = _examples(task, rows["eval"])
        tested = [one for one in published if one is not None]
        if task.grouped:
            tested = merged(tested)
        known = {one.fingerprint for one in tested}
        labeled = [(one, one.fingerprint) for one in pool if one is not None]
        unseen = [(one, mark) for one, mark in labeled if mark not in known]
        kinds = {(mark, one.completion if task.grouped else ""): one for one, mark in reversed(unseen)}
        return cls(
            list(kinds.values())[::-1],  # the first of each
            tested,
            files,
            {"train": len(pool), "test": len(published)},
            unlabeled=sum(one is None for one in (*pool, *published)),
            duplicates=len(unseen) - len(kinds),
            in_test=len(labeled) - len(unseen),
        )


def load_task(task: Task, path: str | None = None, *, seed: int, **options: Any) -> TaskData:
    """Read a task and draw its sets for one seed; see `load_seeds`."""
    return load_seeds(task, path, seeds=[seed], **options)[seed]


def load_seeds(
    task: Task,
    path: str | None = None,
    *,
    seeds: Sequence[int],
    train_examples: int = 1000,
    dev_examples: int = 500,
    test_examples: int = 1000,
    k_shot: int | None = None,
    test_split: str | None = None,
    revision: str | None = None,
) -> dict[int, TaskData]:
    """Read a task once and draw its sets for each seed; the same arguments give the same sets.

    If no labelled split is held out, the test set is drawn from the training split. If the training split is too small
    for all sets drawn from it, they share it. Sets drawn from one split have no passage in common, and no example of
    the test split is in another set. Built-in tasks are generated in the sizes asked for.

    Args:
        path: the publisher's folder, or a folder with a file per split in the columns `task.columns`. None = the Hub.
        k_shot: examples of each class in the training set, and in the validation set unless `dev_examples` is 0;
            replaces `train_examples` and `dev_examples`.
        test_split: the split to test on; None = `task.test_split`, if it exists.
        revision: git revision on the Hub.

    Raises:
        UserError: no or broken data, a size that is too small, or no example left for a set.
    """
    wanted = {"train": train_examples, "dev": dev_examples, "test": test_examples}
    for part, n in wanted.items():
        least = 0 if part == "dev" else 1
        if n < least:
            raise UserError(f"{task.name}: {part}_examples is {n}; expected at least {least}")
    if k_shot is not None and (k_shot < 1 or not task.has_classes):
        raise UserError(f"{task.name}: k_shot is {k_shot}; expected at least 1 and a task with classes, or null")
    if k_shot is not None:
        n = k_shot * len(task.labels)
        wanted |= {"train": n, "dev": n if dev_examples else 0}
    drawn: dict[int, TaskData] = {}
    splits: _Splits | None = None
    for seed in seeds:
        if splits is None or task.built_in:
            files: dict[str, str] = {}
            if task.built_in:  # rows depend on the seed
                rows = _built_in_rows(task, path or test_split or revision, wanted, seed)
            else:
                rows, files = read_task(task, path, test_split, revision)
            if not rows["train"]:
                raise UserError(f"{task.name}: {path or task.data!r} has no training rows; give another path")
            splits = _Splits.of(task, rows, files)
        drawn[seed] = _drawn(task, splits, wanted, k_shot, seed)
    return drawn


def _drawn(task: Task, splits: _Splits, wanted: dict[str, int], k_shot: int | None, seed: int) -> TaskData:
    """Draw the sets of one seed."""
    distinct, tested = splits.distinct, splits.tested
    notes: list[str] = []
    if splits.unlabeled:
        notes.append(f"{splits.unlabeled} of {sum(splits.read.values())} rows have no label or answer and are left out")
    parts = ("train", "dev") if tested else SETS
    shares = shares_of(len(distinct), {part: wanted[part] for part in parts})
    if any(shares[part] < wanted[part] for part in parts):
        notes.append(
            f"the training split has {len(distinct)} distinct examples, {sum(wanted[p] for p in parts)} are needed: "
            + ", ".join(f"{part} gets at most {shares[part]} of {wanted[part]}" for part in parts)
        )
    if not tested:
        notes.append("no labelled split is held out, so the test set is drawn from the training split")
    if k_shot is None:
        drawn = divide(distinct, shares, seed, task.grouped)
    else:
        held = {} if tested else divide(distinct, {"test": shares["test"], "train": len(distinct)}, seed)
        drawn = held | of_each_class(held.get("train", distinct), k_shot, seed)
        drawn["dev"] = drawn["dev"] if wanted["dev"] else []
        for part in ("train", "dev") if wanted["dev"] else ("train",):
            counts = Counter(one.target for one in drawn[part])
            few = [f"{name} {counts[i]}" for i, name in enumerate(task.labels) if counts[i] < k_shot]
            notes += [f"{part}: fewer than {k_shot} examples per class: {', '.join(few)}"] if few else []
    if tested:
        drawn["test"] = draw(tested, wanted["test"], f"test {seed}")
        if len(drawn["test"]) < min(wanted["test"], len(tested)):
            notes.append(f"test: {len(drawn['test'])} of {wanted['test']}, because a question's answers stay together")
        elif len(tested) < wanted["test"]:
            notes.append(f"test: the split has only {len(tested)} of {wanted['test']} examples; all are used")
    for part in ("train", "test"):
        if not drawn[part]:
            raise UserError(
                f"{task.name}: no example is left for the {part} set ({len(distinct)} distinct ones in the training "
                f"split, {len(tested)} held out); raise {part}_examples, lower the others, or give more data"
            )
    check_disjoint(drawn["train"] + drawn["dev"], drawn["test"])
    report = {
        "task": task.name,
        "seed": seed,
        "files": splits.files,
        "test_from": "held-out split" if tested else "training split",
        "read": splits.read,
        "unlabeled": splits.unlabeled,
        "duplicates": splits.duplicates,
        "in_test": splits.in_test,
        **{part: {"examples": len(drawn[part]), "sha256": _sha256(drawn[part])} for part in SETS},
        "notes": notes,
    }
    return TaskData(**drawn, report=report)


def check_disjoint(training: Iterable[TaskExample], test: Iterable[TaskExample]) -> None:
    """Check that no test example is in the training set, by the hash of the normalized content.

    Raises:
        UserError: some are; names the first.
    """
    tested = {one.fingerprint: one.where for one in test}
    found = [(one.where, tested[one.fingerprint]) for one in training if one.fingerprint in tested]
    if found:
        raise UserError(
            f"{len(found)} test examples are in the training set; the first is {found[0][0]}, the same as the test "
            f"example {found[0][1]}; remove them from one of the two"
        )


def few_shot(demonstrations: Sequence[TaskExample]) -> str:
    """Return the text of the demonstrations to put before a prompt."""
    return "".join(one.prompt + spaced(one.prompt, one.completion) + SEPARATOR for one in demonstrations)


def training_rows(examples: Sequence[TaskExample]) -> list[Row]:
    """Return examples as prompt-completion rows for `launch.data.encoding.encode` (with `question=False`)."""
    for one in examples:
        if not one.completion:
            raise UserError(f"{one.where}: its task has no prompt; train a model with a classification head")
    return [(one.where, {"prompt": one.prompt, "completion": one.completion}) for one in examples]


def classification_rows(examples: Sequence[TaskExample]) -> list[Row]:
    """Return examples as text-label rows for `launch.data.encoding.encode` with `labels=list(task.labels)`.

    A row's label is an index into `task.labels`, or a float for a regression.
    """
    for one in examples:
        if one.target is None:
            raise UserError(f"{one.where}: its task has no classes; train a causal language model")
    return [(one.where, {"text": one.text, "text_pair": one.text_pair, "label": one.target}) for one in examples]


def _built_in_rows(task: Task, not_used: str | None, wanted: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """Generate as many rows as the sets need. Test rows are in no training set, whatever the seeds."""
    if not_used is not None:
        raise UserError(f"{task.name}: {not_used!r} is not used, because this task is built in; remove it")
    counts = {"train": wanted["train"] + wanted["dev"], "test": wanted["test"]}
    if max(counts.values()) > MAX_PROBLEMS:
        raise UserError(
            f"{task.name}: {counts['train']} training and validation examples and {counts['test']} test examples; "
            f"expected at most {MAX_PROBLEMS} of each"
        )
    train, test = (built_in_rows(task.data, split, n, seed) for split, n in counts.items())
    return {"train": train, "eval": test}


def read_task(
    task: Task, path: str | None, test_split: str | None, revision: str | None
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Read the rows of "train" and "eval" (empty if nothing is held out); return them and the files' SHA-256."""
    if path is None:
        try:
            splits = open_hub(task.data, task.subset, revision, "train", test_split or task.test_split)
            return {"train": [], "eval": []} | {part: list(split.read()) for part, split in splits.items()}, {}
        except UserError as error:
            raise UserError(f"{error}; {WITHOUT_DATA}") from error
    read, parts = find_parts(task, path, test_split)
    rows: dict[str, list[Row]] = {"train": [], "eval": []}
    for part, files in parts.items():
        for file in files:
            rows[part] += read(file)
    return rows, {str(file): sha256_of(file) for files in parts.values() for file in files}


def find_parts(
    task: Task, path: str, test_split: str | None = None
) -> tuple[Callable[[Path], Iterable[Row]], dict[str, list[Path]]]:
    """Return the function that reads a file of a task's folder, and the files of "train" and, if any, of "eval".

    Raises:
        UserError: there is no such folder, or it has no training file.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{task.name}: {path!r} does not exist{looked_in(path)}")
    published = find_published(task, place, test_split)
    if published is not None:
        return published[0], {part: [file] for part, file in published[1].items()}
    kind, train, own = task.data, "train", task.test_split
    if kind not in PUBLISHED:
        files = {one.name for one in ([place] if place.is_file() else place.iterdir())}
        endings = {Path(one).suffix for one in files}
        kind = next((one for one in ("parquet", "jsonl", "csv") if not endings.isdisjoint(FILE_KINDS[one])), "jsonl")
        if task.published and f"{task.published[0]}.{kind}" in files:
            train, own = task.published
    try:
        found = find_files(kind, path, train, None, test_split or own)
    except UserError:
        if test_split is not None or own is None:
            raise
        found = find_files(kind, path, train, None, None)  # the task's test split does not exist
    return functools.partial(read_file, name=kind), found


def lacking(task: Task, path: str) -> str | None:
    """Return what a folder lacks of a task's training and held-out files, or None if it has both."""
    try:
        _, parts = find_parts(task, path)
    except UserError as error:
        return str(error)
    if "eval" in parts:
        return None
    there = parts["train"][0]
    publishers = [files.splits for files in PUBLISHERS.get(task.name, ()) if files.splits["train"] == there.name]
    names = [name for splits in publishers for split, name in splits.items() if split != "train"]
    names = names or [f"{split}{there.suffix}" for split in eval_splits(task.data, None)]
    return f"{there.parent} has {there.name}, but no {' or '.join(names)}"


def _examples(task: Task, rows: Sequence[Row]) -> list[TaskExample | None]:
    """Return an example for each row, or for each answer of a nested row; None for unlabelled rows."""
    if task.convert is not None:
        return [_example(task, row, task.convert(row, where), where) for where, row in rows]
    flat = [(where, one) for where, row in rows for one in flatten(task.data, row, where)]
    convert = converter(task.data, "prompt-completion", {})
    made = [convert(row, where) for where, row in flat]
    if task.labels:
        convert = converter(task.data, "text-label", {})
        for one, (where, row) in zip(made, flat, strict=True):
            read = convert(row, where)
            one |= {"text": read["text"], "text_pair": read["text_pair"], "target": read["label"]}
    return [_example(task, row, one, where) for (where, row), one in zip(flat, made, strict=True)]


def _example(task: Task, row: dict[str, Any], made: dict[str, Any] | None, where: str) -> TaskExample | None:
    if made is None:
        return None
    prompt, completion, candidates = made.get("prompt", ""), made.get("completion", ""), made.get("candidates", ())
    references = made.get("references", ())
    if task.name == "record":
        references = tuple(dict.fromkeys(row["answers"]))
        if not candidates:
            raise UserError(f"{where}: expected entities of the passage to choose from, found none")
    elif task.data in SOLUTION_TASKS:
        prompt, references = as_question(prompt), (completion,)
    passage = next((row[column] for column in ("passage", "paragraph", "context") if column in row), None)
    example = TaskExample(
        where=where,
        prompt=prompt,
        completion=completion,
        candidates=candidates,
        label=candidates.index(completion) if completion in candidates else -1,
        options=made.get("entities", ()),
        references=references,
        question=content_hash(f"{passage}\n{row['question']}") if task.name == "multirc" else "",
        text=made.get("text", ""),
        text_pair=made.get("text_pair"),
        target=made.get("target"),
    )
    return dataclasses.replace(example, passage=content_hash(passage or "\n".join(example.content)))


def _sha256(examples: Sequence[TaskExample]) -> str:
    contents = []
    for one in examples:
        content = [one.prompt, one.completion, one.candidates] if one.completion else [*one.content, one.target]
        contents.append([*content, one.references] if set(one.references) - {one.completion} else content)
    return content_hash("\n".join(json.dumps(one) for one in contents))
