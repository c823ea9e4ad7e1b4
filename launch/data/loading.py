"""Load the data of a run: read rows, convert them to one format, tokenize them, and open the result.

`prepare_data` reads rows with `sources.py`, converts them with `formats.py`, tokenizes them with `encoding.py`, and
writes the examples to a folder of `cache.py`. `open_data` opens the folder.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import random
import time
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow

from hift_ds.checkpoint.files import sha256_of, write_durably
from hift_ds.launch.data import cache, scores
from hift_ds.launch.data.blocks import Blocks, Rows, cut, hash_of, load_blocks
from hift_ds.launch.data.built_in import BUILT_IN, built_in_rows
from hift_ds.launch.data.encoding import Encoder, EvalExample, Example, Found, choose_template
from hift_ds.launch.data.examples import Examples, schema
from hift_ds.launch.data.formats import (
    CHOICE_TASKS,
    FORMATS,
    LABEL_TASKS,
    SOLUTION_TASKS,
    Labels,
    Survey,
    converter,
    find_format,
    possible_formats,
    unused_columns,
)
from hift_ds.launch.data.remarks import sentence
from hift_ds.launch.data.settings import DataSettings
from hift_ds.launch.data.sources import Row, open_hub, read_file
from hift_ds.launch.data.stream import Position, Stream
from hift_ds.launch.errors import UserError, listed

PARTS = ("train", "eval")
DEFAULT_PROBLEMS = {"train": 4096, "eval": 256}  # numbers of built-in problems by default
BLOCK = 500  # rows that are converted and tokenized at a time
MANY_ROWS = 20_000  # from here on, several processes tokenize
PEEK = 100  # rows of a stream by which its format is found
FREE = ("workers", "cache", "shuffle_rows")  # settings that do not change the examples


@dataclass
class Data:
    """Tokenized data.

    Attributes:
        train, eval: the examples to train on and the held-out ones.
        report: for "train" and "eval": `rows` in the split, what was found in those that were read (after taking the
            subset; see `encoding.Found`), and their `sha256`. Also `files` (path to sha256), `format`, `template`
            (whether the chat template is used), `labels` (names in the order of their ids; None for causal language
            models) and `notes`: sentences for the user about what is not used as it is written.
        score: `score(predictions, examples)` scores generated texts (causal language models) or label ids
            (classification) of held-out examples. None if the data has no score.
    """

    train: Sequence[Example] | Stream
    eval: Sequence[EvalExample]
    report: dict[str, Any]
    score: Callable[[Sequence[Any], Sequence[EvalExample]], scores.Score] | None
    position: Position | None = None

    def longest(self, max_new_tokens: int) -> tuple[int, int]:
        """Return the tokens of the longest example, and of the longest held-out prompt with its answer.

        The second number is 0 if no answers are generated.
        """
        train, held_out = self.report["train"], self.report["eval"]
        is_answered = self.score is not None and self.report["labels"] is None and held_out["used"]
        return (
            max(train["longest"], held_out["longest"]),
            held_out["longest_prompt"] + max_new_tokens if is_answered else 0,
        )

    def renumber(self, labels: list[str]) -> None:
        """Number the classes by their place in `labels`, in which all names of `report["labels"]` are."""
        numbers = [labels.index(name) for name in self.report["labels"]]
        for examples in (self.train, self.eval):
            assert isinstance(examples, Examples | Stream)
            examples.renumber(numbers)
        self.report["labels"] = labels


def load_data(settings: DataSettings, tokenizer: Any, *, task: str, seed: int) -> Data:
    """Tokenize the data, unless an earlier start has done so, and open it. See :func:`prepare_data`."""
    *_, folder = prepare_data(settings, tokenizer, task=task, seed=seed)
    assert folder is not None
    return open_data(settings, tokenizer, folder)


def open_data(settings: DataSettings, tokenizer: Any, folder: Path) -> Data:
    """Open the tokenized data of a folder of :func:`prepare_data`. The files are mapped into memory, not read.

    With `data.streaming`, training rows are read from their source when they are needed.
    """
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    held_out = Examples(folder / "eval.arrow", EvalExample)
    train: Sequence[Example] | Stream = Examples(folder / "train.arrow", Example)
    if settings.streaming:
        readers, _, _ = _readers(settings, 0)
        rows = Rows(settings.name.lower(), readers["train"])
        labels, template, question = report["labels"], report["template"], settings.name.lower() in SOLUTION_TASKS
        length = settings.max_length
        encoder = Encoder(tokenizer, labels=labels, template=template, question=question, max_length=length)
        convert = converter(settings.name, report["format"], report["columns"])
        columns = schema("train", classify=labels is not None)
        hashes = {hash_of(one.input_ids) for one in held_out}
        train = Stream(rows, settings.shuffle_rows, convert, encoder, columns, hashes, length)
        report["train"]["longest"] = length  # the longest that may come
    return Data(train, held_out, report, _find_score(settings, report["format"]))


def prepare_data(
    settings: DataSettings, tokenizer: Any, *, task: str, seed: int, say: Callable[[str], object] = lambda text: None
) -> Iterator[Path | None]:
    """Read, convert and tokenize the data into a folder, unless it is there.

    The same settings, tokenizer and seed give the same examples in the same order. The memory that is needed does not
    grow with the number of training rows.

    Args:
        task: "causal-lm" or "sequence-classification".
        say: told what is done.

    Yields:
        None now and then, and the folder at the end.

    Raises:
        UserError: the settings have problems, or the data cannot be read or does not fit the task.
    """
    problems = settings.problems()
    if problems:
        raise UserError("\n".join(problems))
    readers, paths, identity = _readers(settings, seed)
    rows = {part: Rows(settings.name.lower(), readers[part]) for part in PARTS}
    streamed = "train" if settings.streaming else None
    files = {str(path): _ends_of(path) if part == streamed else sha256_of(path) for path, part in paths.items()}
    source = {"files": files, "identity": identity}
    decides = {key: value for key, value in asdict(settings).items() if key not in ("path", "eval_path", *FREE)}
    is_drawn = settings.train_examples is not None or settings.eval_examples or settings.name.lower() in BUILT_IN
    decides |= {"source": source, "task": task, "seed": seed if is_drawn else None}
    name = settings.name.lower().replace("/", "--")
    folder = cache.place(settings.cache) / f"{name}-{cache.fingerprint(tokenizer, decides)}"
    if cache.is_whole(folder):
        say(f"data: tokenized by an earlier start, in {folder} (delete it to have the rows read again)")
        yield folder
        return
    if folder.exists():
        say(f"warning: the tokenized data in {folder} are damaged, and are made anew")
    say(f"data: the {'held-out ' * settings.streaming}rows are tokenized once, into {folder}")
    started = time.monotonic()
    with cache.written(folder) as aside:
        report = yield from _write(settings, rows, tokenizer, task, seed, aside)
        if settings.streaming:
            # Paths may change.
            contents = [files[str(path)] for path, part in paths.items() if part == streamed] or identity
            report["train"]["sha256"] = f"stream of {', '.join(map(str, contents))}"
        write_durably(aside / "report.json", json.dumps({**report, "files": files}))
    n = sum(report[part]["read"] for part in PARTS)
    say(f"data: {n} rows tokenized in {time.monotonic() - started:.1f} s")
    yield folder


def _readers(
    settings: DataSettings, seed: int
) -> tuple[dict[str, list[Callable[[int], Iterable[Row]]]], dict[Path, str], list[str]]:
    """Return the readers of each part (none if nothing is held out), the files with their parts, and what else
    identifies the rows."""
    name = settings.name.lower()
    readers: dict[str, list[Callable[[int], Iterable[Row]]]] = {part: [] for part in PARTS}
    files: dict[Path, str] = {}
    identity: list[str] = []
    if name in BUILT_IN:
        for part, split, n in (("train", "train", settings.train_examples), ("eval", "test", settings.eval_examples)):
            readers[part].append(_generated(name, split, DEFAULT_PROBLEMS[part] if n is None else n, seed))
    elif settings.path is not None:
        for part, paths in settings.files().items():
            for path in paths:
                readers[part].append(functools.partial(read_file, path, name))
                files[path] = part
                identity.append(f"{part} {path}")
    else:
        keys = settings.subset, settings.revision, settings.split, settings.eval_split
        found = open_hub(settings.name, *keys, streaming=settings.streaming)
        for part, one in found.items():
            readers[part].append(one.read)
            identity.append(f"{part} {one.label} {one.identity}")
    return readers, files, identity


def _ends_of(path: Path) -> str:
    """Return what identifies a file that is too large to be read for that: its size, and the hash of both ends."""
    size, end = path.stat().st_size, 2**20
    with path.open("rb") as file:
        ends = file.read(end)
        file.seek(max(0, size - end))
        ends += file.read(end)
    return f"{size} bytes, the first and last MiB: {hashlib.sha256(ends).hexdigest()}"


def _generated(name: str, split: str, n: int, seed: int) -> Callable[[int], Iterable[Row]]:
    rows = functools.cache(lambda: built_in_rows(name, split, n, seed))
    return lambda start: rows()[start:]


def _write(
    settings: DataSettings, rows: dict[str, Rows], tokenizer: Any, task: str, seed: int, folder: Path
) -> Generator[None, None, dict[str, Any]]:
    """Write the examples of both parts to a folder, and return the report; yield now and then."""
    notes: list[str] = []
    name = settings.name.lower()
    labels_known = task != "sequence-classification" or name in LABEL_TASKS
    label = None if labels_known else settings.columns.get("label", "label")
    surveys: dict[str, Survey] = {}
    found_rows: dict[str, int] = {}
    streamed = ("train",) if settings.streaming else ()
    for part in PARTS:
        surveys[part] = yield from _survey(rows[part], label, PEEK if part in streamed else None)
        found_rows[part] = surveys[part].rows
    if not found_rows["train"]:
        raise UserError(
            f"data: {settings.path or settings.name!r} has no rows in the split {settings.split!r}; there is "
            "nothing to train on"
        )
    for part in PARTS:
        rows[part].chosen = _subset(settings, part, found_rows[part], seed, notes)
        if rows[part].chosen is not None:
            surveys[part] = yield from _survey(rows[part], label)
    format_, columns = find_format(settings.name, settings.format, settings.columns, surveys["train"].columns, task)
    if columns != settings.columns:
        notes.append(f"data.columns: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in columns.items())}}} is used")
    numbers, labels = None, None
    if format_ == "text-label" and settings.streaming and name not in LABEL_TASKS:
        raise UserError(
            "data.streaming: true, but labels are numbered when all rows are known; remove it (rows are then tokenized "
            "into data.cache)"
        )
    if format_ == "text-label":
        numbers = None if name in LABEL_TASKS else Labels.of(surveys)
        labels = list(LABEL_TASKS[name].labels if numbers is None else numbers.names)
    template = choose_template(settings.template, format_, tokenizer)
    question = name in SOLUTION_TASKS
    encoder = Encoder(tokenizer, labels=labels, template=template, question=question, max_length=settings.max_length)
    convert = converter(name, format_, columns, numbers)
    report: dict[str, Any] = {"format": format_, "columns": columns, "template": template, "labels": labels}
    held_out: Counter[bytes] = Counter()
    shared: set[bytes] = set()
    # The held-out rows are the fewer ones, and their hashes are in memory.
    for part in reversed(PARTS):
        found, digest, table = Found(), hashlib.sha256(), schema(part, classify=labels is not None)
        processes = _cores() if surveys[part].rows >= MANY_ROWS else 0
        with pyarrow.ipc.new_stream(folder / f"{part}.arrow", table) as file:
            blocks = functools.partial(cut, rows[part], PEEK if part in streamed else BLOCK)
            encoded = load_blocks(Blocks(blocks, convert, encoder, table), processes)
            for block in itertools.islice(encoded, 1 if part in streamed else None):
                if part == "eval":
                    held_out.update(block.hashes)
                else:
                    shared.update(held_out.keys() & block.hashes)
                digest.update(block.content)
                found.merge(block.found)
                if part not in streamed:
                    file.write_batch(block.table)
                yield
        report[part] = {"rows": found_rows[part], **found.report(), "sha256": digest.hexdigest()}
    for part in streamed:
        # What is found later is said when it is found.
        report[part] = {"rows": None, **Found(ends=set(report[part]["ends"])).report()}
    for part in PARTS:
        notes += _columns_note(settings, part, format_, columns, surveys[part])
        notes += _notes(settings, part, report[part])
    if shared and not settings.streaming:  # a stream says what it has in common when it ends
        notes.append(
            f"warning: {sum(held_out[one] for one in shared)} of {report['eval']['used']} held-out examples are also "
            "training examples, so their score does not measure new data"
        )
    return {**report, "notes": notes}


def _survey(rows: Rows, label: str | None, most: int | None = None) -> Generator[None, None, Survey]:
    """Read rows, at most `most` of the source, and yield now and then."""
    survey = Survey(label)
    for number, (_, _, taken) in enumerate(itertools.islice(rows.sources(), most)):
        for where, row in taken:
            survey.add(where, row)
        if number % 1000 == 0:
            yield
    return survey


def _cores() -> int:
    """Return the number of processes for many rows: the other ranks of the machine wait for them."""
    return min(16, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 0


def _subset(settings: DataSettings, part: str, rows: int, seed: int, notes: list[str]) -> Sequence[int] | None:
    """Draw a seeded sample of the numbers of rows, in their order; None: all."""
    n = settings.train_examples if part == "train" else settings.eval_examples
    if n and not rows:
        raise UserError(
            f"data.eval_examples: {n}, but {settings.name!r} has nothing held out here; give data.eval_split "
            "or data.eval_path, or set data.eval_examples to 0"
        )
    if n is None or n == rows:
        return None
    if n > rows:
        notes.append(f"{part}: data.{part}_examples is {n}, but there are only {rows}; all are used")
        return None
    notes.append(f"{part}: {n} of {rows} rows are drawn by the seed (data.{part}_examples)")
    return array("q", sorted(random.Random(f"{part} {seed}").sample(range(rows), n)))


def _notes(settings: DataSettings, part: str, counts: dict[str, Any]) -> list[str]:
    """Return notes for the user about the counts.

    Raises:
        UserError: rows were read, but no example is left.
    """
    read, limit = counts["read"], f"data.max_length ({settings.max_length} tokens)"
    if read and not counts["used"]:
        raise UserError(
            f"data: no {part} example is left, as all {read} have no trained token within {limit}; raise it, or "
            "look for empty completions and conversations without an assistant's turn"
        )
    notes = []
    if part == "eval" and not read and settings.eval_examples is None:
        notes.append("eval: no held-out rows were found, so there will be no score")
    if counts["truncated"]:
        notes.append(f"{part}: {counts['truncated']} of {read} examples were cut on the right to {limit}")
    if skipped := counts["skipped_no_target"]:
        notes.append(
            f"{part}: {skipped} of {read} examples skipped: nothing to train within {limit}, e.g. no assistant's turn"
        )
    notes += [
        f"{part}: {sentence(matter, remark['names'])}: {remark['rows']} of {read} rows, the first is {remark['first']}"
        for matter, remark in counts["remarks"].items()
    ]
    return notes


def _columns_note(
    settings: DataSettings, part: str, format_: str, columns: dict[str, str], survey: Survey
) -> list[str]:
    """Name the columns of a user's data that are not used. Those of published sets are known."""
    if len(possible_formats(settings.name)) < len(FORMATS):
        return []
    named = []
    for name, (rows, first) in unused_columns(format_, columns, survey).items():
        some = f" (in {rows} of {survey.rows} rows, the first is {first})" if rows < survey.rows else ""
        named.append(f"{listed([name])}{some}")
    return [f"{part}: columns not used: {', '.join(named[:20] + ['...'] * (len(named) > 20))}"] if named else []


def _find_score(
    settings: DataSettings, format_: str
) -> Callable[[Sequence[Any], Sequence[EvalExample]], scores.Score] | None:
    name = settings.name.lower()
    if format_ == "text-label":
        return lambda predictions, examples: scores.accuracy(predictions, [one.labels for one in examples])
    if name in SOLUTION_TASKS:
        return lambda texts, examples: scores.number_match(texts, [one.reference for one in examples])
    if name in (*LABEL_TASKS, *CHOICE_TASKS):
        return lambda texts, examples: scores.leading_words_match(texts, [one.accepted for one in examples])
    return None
