"""Data of a training run: read rows, bring them into one of three formats, tokenize, batch.

Every source yields rows in the columns of one format; these are also what a user's own files have:

prompt-completion: `prompt`, `completion` (texts). Trained: the completion and the end-of-sequence token.
chat: `messages` (list of {role, content}). Trained: each assistant's turn with its end-of-turn token.
text-label: `text`, `label`, optional `text_pair`. Trained: the label (sequence classification).
"""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import itertools
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import jinja2
import torch

from launch import scores
from launch.arithmetic import MAX_PROBLEMS, arithmetic_problems
from launch.errors import UserError

FORMATS = {
    "prompt-completion": ("prompt", "completion"),
    "chat": ("messages",),
    "text-label": ("text", "label"),
}
COLUMNS = ("prompt", "completion", "messages", "text", "text_pair", "label")
FILE_KINDS = {
    "json": (".json", ".jsonl"),
    "jsonl": (".jsonl", ".json"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
}
# What publishers call the part for scoring during development; `eval_split: null` looks in this order.
VALIDATION = ("validation", "val", "dev")
HELD_OUT = (*VALIDATION, "test")
IGNORED = -100  # the label that cross-entropy leaves out
DEFAULT_PROBLEMS = {"train": 4096, "eval": 256}  # how many built-in problems where the settings do not say

Row = tuple[str, dict[str, Any]]  # where it comes from (for messages), and its columns


# Publishers' sets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelTask:
    """A labelled set: its text columns, its labels in the order of their ids, and a label word for each.

    `prompt` makes the prompt of the paper's Table 13 from a row; `texts` is what a classifier reads.
    """

    columns: tuple[str, ...]
    prompt: Callable[[dict[str, Any]], str]
    texts: Callable[[dict[str, Any]], tuple[str, str | None]]
    labels: tuple[str, ...] = ("false", "true")
    words: tuple[str, ...] = ("No", "Yes")


LABEL_TASKS = {
    "sst2": LabelTask(
        columns=("sentence",),
        prompt=lambda row: f"{row['sentence'].strip()} It was",
        texts=lambda row: (row["sentence"].strip(), None),
        labels=("0", "1"),
        words=("terrible", "great"),
    ),
    "superglue/rte": LabelTask(
        columns=("premise", "hypothesis"),
        prompt=lambda row: f'{row["premise"]} Does this mean that "{row["hypothesis"]}" is true? Yes or No?',
        texts=lambda row: (row["premise"], row["hypothesis"]),
        labels=("entailment", "not_entailment"),
        words=("Yes", "No"),
    ),
    "superglue/cb": LabelTask(
        columns=("premise", "hypothesis"),
        prompt=lambda row: f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?',
        texts=lambda row: (row["premise"], row["hypothesis"]),
        labels=("entailment", "contradiction", "neutral"),
        words=("Yes", "No", "Maybe"),
    ),
    "superglue/boolq": LabelTask(
        columns=("passage", "question"),
        prompt=lambda row: f"{row['passage']} {row['question'].rstrip(' ?')}?",
        texts=lambda row: (row["passage"], row["question"]),
    ),
    "superglue/wsc": LabelTask(
        columns=("text", "span1_text", "span2_text"),
        prompt=lambda row: (
            f'{row["text"]} In the previous sentence, does the pronoun "{row["span2_text"]}" refer to '
            f"{row['span1_text']}? Yes or No?"
        ),
        texts=lambda row: (row["text"], f"{row['span2_text']} refers to {row['span1_text']}"),
    ),
    "superglue/wic": LabelTask(
        columns=("word", "sentence1", "sentence2"),
        prompt=lambda row: (
            f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No? '
            f"{row['sentence1']} {row['sentence2']}"
        ),
        texts=lambda row: (f"{row['word']}: {row['sentence1']}", row["sentence2"]),
    ),
    "superglue/multirc": LabelTask(
        columns=("paragraph", "question", "answer"),
        prompt=lambda row: (
            f'{row["paragraph"]} Question: {row["question"]} I found this answer "{row["answer"]}". '
            "Is that correct? Yes or No?"
        ),
        texts=lambda row: (row["paragraph"], f"{row['question']} {row['answer']}"),
    ),
}
SOLUTION_TASKS = ("arithmetic", "gsm8k")  # columns question and answer, the answer ending in `#### N`
CHOICE_TASKS = ("superglue/copa", "superglue/record")
# Home on the Hub (id, configuration); with a `path`, the publisher's own files are read instead.
PUBLISHED = {
    "gsm8k": ("openai/gsm8k", "main"),
    "sst2": ("stanfordnlp/sst2", None),
    **{
        f"superglue/{task}": ("aps/super_glue", task)
        for task in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
    },
}


# Settings and results --------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSettings:
    """The `data` section of a run's YAML."""

    # arithmetic (built-in problems) | gsm8k | sst2 | superglue/TASK | json | jsonl | csv | tsv | parquet
    # (files at `path`) | OWNER/NAME (a data set of the Hugging Face Hub)
    name: str = "arithmetic"
    # A file or a folder. For gsm8k, sst2, superglue/TASK the publisher's folder; null = from the Hub.
    path: str | None = None
    # The held-out file where `path` is one file. In a folder, and on the Hub, that part is a split.
    eval_path: str | None = None
    # Of a Hub data set: its configuration and the git revision.
    subset: str | None = None
    revision: str | None = None
    # prompt-completion | chat | text-label; null = found from the columns
    format: str | None = None
    # Our column: the file's column, as in {prompt: question, completion: answer}
    columns: dict[str, str] = field(default_factory=dict)
    # The splits to train on and to score; eval_split null = validation, val, dev or test, if there is one.
    split: str = "train"
    eval_split: str | None = None
    # Sizes of seeded subsets; null = all (of the built-in problems 4096 and 256). eval_examples 0 = none.
    train_examples: int | None = None
    eval_examples: int | None = None
    # Tokens of an example; longer ones are cut on the right, counted and reported.
    max_length: int = 512
    # true: prompt and completion become a user's and an assistant's turn of the tokenizer's chat template;
    # false: they are joined, with a space where neither side has whitespace; null = true if there is one.
    template: bool | None = None

    def problems(self) -> list[str]:
        """Every mistake that shows before rows are read: a line each, with key, value and remedy."""
        name = self.name.lower()
        local, published = name in FILE_KINDS, name in PUBLISHED
        hub = not local and not published and name != "arithmetic"
        if hub and (self.name.count("/") != 1 or name.startswith("superglue/")):
            known = ["arithmetic", *PUBLISHED, *FILE_KINDS]
            return [  # what else is wrong depends on the name
                f"data.name: unknown data set {self.name!r}; expected {', '.join(known)}, or OWNER/NAME for a "
                f"data set of the Hugging Face Hub{_nearest(name, known)}"
            ]
        found = self._path_problems(local, published)
        if self.subset is not None and not hub:
            found.append(f"data.subset: {self.subset!r} is for sets named OWNER/NAME; remove it")
        if self.revision is not None and not (hub or published and self.path is None):
            found.append(f"data.revision: {self.revision!r} is for sets from the Hub; remove it")
        if name == "arithmetic" and (self.split != "train" or self.eval_split not in (None, "test")):
            found.append(
                f"data.split, data.eval_split: {self.split!r} and {self.eval_split!r}, but the built-in "
                "problems are trained on 'train' and scored on 'test'; remove both"
            )
        formats = _possible_formats(name)
        if self.format is not None and self.format not in formats:
            found.append(
                f"data.format: {self.format!r} does not exist for {self.name!r}; expected "
                f"{', '.join(formats)}, or null to find it{_nearest(self.format, formats)}"
            )
        if self.columns and not (local or hub):
            found.append(f"data.columns: the columns of {self.name!r} are known; remove data.columns")
        for key in self.columns:
            if key not in COLUMNS:
                found.append(
                    f"data.columns: unknown column {key!r}; keys are ours ({', '.join(COLUMNS)}), values the "
                    f"file's, as in {{prompt: question}}{_nearest(key, COLUMNS)}"
                )
        for key, least in (("train_examples", 1), ("eval_examples", 0), ("max_length", 2)):
            value = getattr(self, key)
            if value is not None and value < least:
                found.append(f"data.{key}: {value} is too small; expected at least {least}")
            elif value is not None and key != "max_length" and name == "arithmetic" and value > MAX_PROBLEMS:
                found.append(f"data.{key}: {value} is more than the {MAX_PROBLEMS} built-in problems; lower it")
        return found

    def _path_problems(self, local: bool, published: bool) -> list[str]:
        found = []
        if self.path is None and local:
            found.append(f"data.path: missing; {self.name!r} reads files: give the file or its folder")
        if self.path is not None and not (local or published):
            found.append(
                f"data.path: {self.path!r} has no meaning with data.name {self.name!r}; to read files set "
                f"data.name to {', '.join((*FILE_KINDS, *PUBLISHED))}"
            )
        if self.eval_path is not None and not local:
            found.append(
                f"data.eval_path: {self.eval_path!r} has no meaning with data.name {self.name!r}; use data.eval_split"
            )
        if local or published:
            for key, path in (("path", self.path), ("eval_path", self.eval_path)):
                if path is not None and not Path(path).expanduser().exists():
                    found.append(f"data.{key}: {path!r} does not exist (looked in {Path.cwd()})")
        if not found and self.path is not None:
            try:
                _find_files(self)
            except UserError as error:
                found.append(str(error))
        return found


@dataclass
class Example:
    """One tokenized example.

    For causal LM `labels` is as long as `input_ids`, not shifted, and -100 outside what is trained. For
    sequence classification it is the id of the label.
    """

    input_ids: list[int]
    labels: list[int] | int
    token_type_ids: list[int] | None = None  # where the tokenizer makes them (sentence pairs of BERT)


@dataclass
class EvalExample(Example):
    """A held-out example: also what its answer is generated from and scored against."""

    prompt_ids: list[int] = field(default_factory=list)  # up to where the answer begins; never cut
    prompt: str = ""  # the same as text, for printing
    reference: str = ""  # the answer; for classification the label's name
    accepted: tuple[str, ...] = ()  # all answers that are right, for sets scored by label words


@dataclass
class Data:
    """Tokenized data.

    `report` has for "train" and "eval" each: `rows` in the split, `read` of them (after taking the
    subset), `used`, `truncated` (among the used), `skipped_no_target`, `tokens`, `trained_tokens`, and
    `sha256` of the rows read. Further `files` (path -> sha256), `format`, `template` (whether the chat
    template was used), `labels` (names in the order of their ids; None for causal LM) and `notes`:
    sentences for the user about what was cut or left out.

    `score(predictions, examples)` scores generated texts (causal LM) or label ids (classification) of
    held-out examples; it is None where the data has no score.
    """

    train: list[Example]
    eval: list[EvalExample]
    report: dict[str, Any]
    score: Callable[[Sequence[Any], Sequence[EvalExample]], scores.Score] | None


def load_data(settings: DataSettings, tokenizer: Any, *, task: str, seed: int) -> Data:
    """Read, convert and tokenize; everything is then in memory.

    `task` is "causal-lm" or "sequence-classification". The same settings, tokenizer and seed give the
    same examples in the same order, so every rank can load its own.
    """
    problems = settings.problems()
    if problems:
        raise UserError("\n".join(problems))
    splits, files = _read(settings, seed)
    notes: list[str] = []
    chosen = {part: _subset(settings, part, rows, seed, notes) for part, rows in splits.items()}
    format_ = _find_format(settings, chosen["train"], task)
    rows, labels = _convert(settings, format_, chosen)
    template = _choose_template(settings, format_, tokenizer)
    report: dict[str, Any] = {}
    encoded: dict[str, list[EvalExample]] = {}
    for part in ("train", "eval"):
        encoded[part], counts = _encode(settings, format_, rows[part], labels, tokenizer, template)
        report[part] = {"rows": len(splits[part]), **counts}
        notes += _notes(settings, part, counts)
    train = [Example(one.input_ids, one.labels, one.token_type_ids) for one in encoded["train"]]
    report |= {"files": files, "format": format_, "template": template, "labels": labels, "notes": notes}
    return Data(train, encoded["eval"], report, _find_score(settings, format_))


# Batches ---------------------------------------------------------------------------------------------


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A right-padded batch of int64 tensors.

    `input_ids` and `attention_mask` have the shape (examples, longest example), and so has
    `token_type_ids`, where the examples have them. `labels` has it for causal LM; (examples,) for labels.
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
    if isinstance(labels[0], int):
        batch["labels"] = torch.tensor(labels, dtype=torch.int64)
    else:
        batch["labels"] = padded((one for one in labels if isinstance(one, list)), IGNORED)
    return batch


def collate_prompts(examples: Sequence[EvalExample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts for generation: input_ids, attention_mask; int64, (examples, longest prompt)."""
    longest = max(len(example.prompt_ids) for example in examples)
    gaps = [longest - len(example.prompt_ids) for example in examples]
    ids = [[pad_token_id] * gap + example.prompt_ids for gap, example in zip(gaps, examples, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64),
        "attention_mask": torch.tensor(mask, dtype=torch.int64),
    }


def trained_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Label positions that count in the loss: causal LM, those after the shift by one; labels, one each."""
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
    """Endless: for each step from `start_step`, this rank's micro-batches, as indices of examples.

    All epochs, each a new seeded shuffle that holds every example once, make one stream; step t takes its
    elements t * global_batch up to (t + 1) * global_batch. So the global batch of a step depends on the
    seed and the step only, however it is cut over accumulation and ranks, and a resumed run continues
    exactly where it was.
    """
    if min(n_examples, global_batch, micro_batch, world) < 1 or not 0 <= rank < world or start_step < 0:
        raise ValueError(f"{n_examples=} {global_batch=} {micro_batch=} {rank=} {world=} {start_step=}")
    if global_batch % (micro_batch * world):
        raise ValueError(f"{global_batch=} is not a multiple of {micro_batch=} times {world=}")

    @functools.lru_cache(maxsize=2)  # a batch may lie across two epochs
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


# Reading ---------------------------------------------------------------------------------------------


def _read(settings: DataSettings, seed: int) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """All rows of the parts "train" and "eval" (empty where nothing is held out), and the files' hashes."""
    name = settings.name.lower()
    hashes: dict[str, str] = {}
    splits: dict[str, list[Row]] = {"train": [], "eval": []}
    if name == "arithmetic":
        wanted = {"train": settings.train_examples, "eval": settings.eval_examples}
        for part, split in (("train", "train"), ("eval", "test")):
            n = wanted[part]
            problems = arithmetic_problems(split, DEFAULT_PROBLEMS[part] if n is None else n, seed)
            splits[part] = [(f"built-in {split} problem {i}", one) for i, one in enumerate(problems, 1)]
    elif settings.path is not None:
        for part, paths in _find_files(settings).items():
            for path in paths:
                splits[part] += _read_file(path, name)
                hashes[str(path)] = _sha256(path)
    else:
        splits = _read_hub(settings)
    if not splits["train"]:
        raise UserError(
            f"data: {settings.path or settings.name!r} has no rows in the split {settings.split!r}; there is "
            "nothing to train on"
        )
    for part, rows in splits.items():
        splits[part] = [(where, flat) for where, row in rows for flat in _flatten(name, row, where)]
    return splits, hashes


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _find_files(settings: DataSettings) -> dict[str, list[Path]]:
    """The files of "train" and, where something is held out, of "eval"."""
    name = settings.name.lower()
    suffixes = FILE_KINDS.get(name, (".tsv",) if name == "sst2" else (".jsonl",))
    path = Path(str(settings.path)).expanduser()
    if name.startswith("superglue/") and path.is_dir():
        # The folder of the task, or the one above with a folder for each task.
        task = name.partition("/")[2]
        path = next((one for one in sorted(path.iterdir()) if one.is_dir() and one.name.lower() == task), path)
    if path.is_file():
        if name not in FILE_KINDS:
            raise UserError(f"data.path: {str(path)!r} is a file; {settings.name!r} wants the folder it is in")
        if settings.split != "train" or settings.eval_path is None and settings.eval_split is not None:
            raise UserError(
                f"data.split, data.eval_split: {settings.split!r} and {settings.eval_split!r}, but data.path "
                "is one file, which has no splits; remove both and give the held-out file as data.eval_path, "
                "or give the folder as data.path"
            )
        found = {"train": [path]}
    else:
        found = {"train": _split_files(path, settings.split, suffixes)}
        if not found["train"]:
            raise _no_split("split", settings.split, path, suffixes)
    held_out = path if settings.eval_path is None else Path(settings.eval_path).expanduser()
    if held_out.is_dir():
        for split in _eval_splits(settings):
            if files := _split_files(held_out, split, suffixes):
                return {**found, "eval": files}
        if settings.eval_split is not None or settings.eval_path is not None:
            wanted = settings.eval_split or " or ".join(HELD_OUT)
            raise _no_split("eval_split", wanted, held_out, suffixes)
    elif settings.eval_path is not None:
        return {**found, "eval": [held_out]}
    return found


def _split_files(folder: Path, split: str, suffixes: Sequence[str]) -> list[Path]:
    """SPLIT.jsonl, or the shards SPLIT-*.jsonl as the Hub writes them."""
    for name in _spellings(split):
        for suffix in suffixes:
            if (folder / f"{name}{suffix}").is_file():
                return [folder / f"{name}{suffix}"]
            if shards := sorted(folder.glob(f"{name}-*{suffix}")):
                return shards
    return []


def _no_split(key: str, split: str, folder: Path, suffixes: Sequence[str]) -> UserError:
    present = sorted(one.name for one in folder.iterdir())
    listed = ", ".join(present[:10] + ["..."] * (len(present) > 10)) or "nothing"
    return UserError(
        f"data.{key}: no file {split} with the ending {' or '.join(suffixes)} in {str(folder)!r}, which holds "
        f"{listed}; name a split whose file is there, or give another data.path"
    )


def _spellings(split: str) -> tuple[str, ...]:
    return (split, *VALIDATION) if split in VALIDATION else (split,)


def _eval_splits(settings: DataSettings) -> tuple[str, ...]:
    if settings.eval_split is not None:
        return (settings.eval_split,)
    # The test parts of labelled sets are published without labels.
    return VALIDATION if settings.name.lower() in (*LABEL_TASKS, *CHOICE_TASKS) else HELD_OUT


def _read_file(path: Path, name: str) -> list[Row]:
    """The rows of a file, values exactly as they are written, each with its file and line."""
    if path.stat().st_size == 0:
        return []
    if name == "parquet":
        rows = _load_file("parquet", path).to_list()
        return [(f"{path} row {i}", row) for i, row in enumerate(rows, 1)]
    # As lines: the json and csv readers of `datasets` guess types. They turn texts that look like dates
    # or numbers into dates and numbers, "null" into nothing, a mixed column's "false" into a truth value.
    lines = _load_file("text", path, encoding="utf-8-sig", keep_linebreaks=True)["text"]
    if name in ("csv", "tsv", "sst2"):
        return _parse_table(path, lines, "," if name == "csv" else "\t", quoted=name != "sst2")
    return _parse_json(path, lines)


def _load_file(builder: str, path: Path, **options: Any) -> datasets.Dataset:
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # A cache of its own: no rank waits for another's lock, and no copy of the data stays behind.
        with tempfile.TemporaryDirectory() as cache:
            return datasets.load_dataset(
                builder,
                data_files={"train": [str(path)]},
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as {builder}: {error.__cause__ or error}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _parse_json(path: Path, lines: Sequence[str]) -> list[Row]:
    """JSON lines, or one list of objects."""
    first = next((line.lstrip() for line in lines if line.strip()), "")
    number = 0  # the line; 0 in a list, where the parser knows it
    try:
        if first.startswith("["):
            rows = [(f"{path} element {i}", one) for i, one in enumerate(json.loads("".join(lines)), 1)]
        else:
            rows = []
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append((f"{path}:{number}", json.loads(line)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{number or error.lineno}: broken JSON ({error.msg}, column {error.colno}); expected one "
            "object a line, or one list of objects"
        ) from error
    for where, value in rows:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a JSON object with named columns, got {_shown(value)}")
    return rows


def _parse_table(path: Path, lines: Sequence[str], separator: str, *, quoted: bool) -> list[Row]:
    """Rows of texts. Not `quoted`: quotation marks are ordinary characters, as in GLUE's files."""
    csv.field_size_limit(1 << 30)
    reader = csv.reader(
        iter(lines),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    rows = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}:1: a column name occurs twice ({', '.join(header)}); rename one")
        for values in reader:
            if len(values) == len(header):
                rows.append((f"{path}:{reader.line_num}", dict(zip(header, values, strict=True))))
            elif values:
                raise UserError(
                    f"{path}:{reader.line_num}: {len(values)} values for {len(header)} columns "
                    f"({', '.join(header)}); a value that holds the separator must be quoted"
                )
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken table ({error})") from error
    return rows


def _read_hub(settings: DataSettings) -> dict[str, list[Row]]:
    published = settings.name.lower() in PUBLISHED
    identity, subset = PUBLISHED.get(settings.name.lower(), (settings.name, settings.subset))
    label = f"{identity} ({subset})" if subset else identity
    remedy = "give the publisher's files as data.path" if published else f"use files ({', '.join(FILE_KINDS)})"
    try:
        loaded = datasets.load_dataset(identity, subset, revision=settings.revision)
    except ConnectionError as error:  # offline mode, too
        raise UserError(
            f"data.name: {settings.name!r}: the Hugging Face Hub cannot be reached for {label}, and it is not "
            f"in the local cache ({error}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or {remedy}"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data.name: {settings.name!r}: {label} cannot be loaded from the Hub: {error}; check data.name, "
            f"data.subset and data.revision, or {remedy}"
        ) from error
    splits: dict[str, list[Row]] = {"train": [], "eval": []}
    for part, key, wanted in (
        ("train", "split", (settings.split,)),
        ("eval", "eval_split", _eval_splits(settings)),
    ):
        spellings = [name for split in wanted for name in _spellings(split)]
        split = next((one for one in spellings if one in loaded), None)
        if split is not None:
            rows = loaded[split].to_list()
            splits[part] = [(f"{label} {split} row {i}", row) for i, row in enumerate(rows, 1)]
        elif getattr(settings, key) is not None:
            raise UserError(f"data.{key}: {label} has no split {wanted[0]!r}; it has {', '.join(loaded)}")
    return splits


def _subset(settings: DataSettings, part: str, rows: list[Row], seed: int, notes: list[str]) -> list[Row]:
    """A seeded sample in the rows' own order."""
    n = settings.train_examples if part == "train" else settings.eval_examples
    if n and not rows:
        raise UserError(
            f"data.eval_examples: {n}, but {settings.name!r} has nothing held out here; give data.eval_split "
            "or data.eval_path, or set data.eval_examples to 0"
        )
    if n is None or n == len(rows):
        return rows
    if n > len(rows):
        notes.append(f"{part}: data.{part}_examples is {n}, but there are only {len(rows)}; all are used")
        return rows
    return [rows[i] for i in sorted(random.Random(f"{part} {seed}").sample(range(len(rows)), n))]


# Conversion into the columns of one format -----------------------------------------------------------


def _possible_formats(name: str) -> tuple[str, ...]:
    if name in (*SOLUTION_TASKS, *CHOICE_TASKS):
        return ("prompt-completion",)
    return ("prompt-completion", "text-label") if name in LABEL_TASKS else tuple(FORMATS)


def _find_format(settings: DataSettings, rows: list[Row], task: str) -> str:
    """The format that the settings name or the columns show; it must fit the model's task."""
    candidates = list(_possible_formats(settings.name.lower()))
    if len(candidates) == len(FORMATS):  # a set whose columns are not known beforehand
        present = sorted({column for _, row in rows for column in row})
        for ours, theirs in settings.columns.items():
            if theirs not in present:
                raise UserError(
                    f"data.columns: {ours}: {theirs!r} is not among the columns found ({', '.join(present)})"
                    f"{_nearest(theirs, present)}"
                )
        mapped = {column for column in COLUMNS if settings.columns.get(column, column) in present}
        candidates = [one for one, columns in FORMATS.items() if mapped.issuperset(columns)]
        if not candidates or settings.format and settings.format not in candidates:
            asked = {settings.format} if settings.format else set(FORMATS)
            needed = [f"{' and '.join(FORMATS[one])} ({one})" for one in FORMATS if one in asked]
            raise UserError(
                f"data: the columns found are {', '.join(present)}; expected {', or '.join(needed)}. Say which "
                "column is which, as in data.columns: {prompt: question, completion: answer}"
            )
    if settings.format:
        candidates = [settings.format]
    classify = task == "sequence-classification"
    fitting = [one for one in candidates if (one == "text-label") == classify]
    if not fitting:
        other = "causal-lm" if classify else "sequence-classification"
        raise UserError(
            f"data: {settings.name!r} is {' or '.join(candidates)} here, which does not fit model.task "
            f"{task!r}; set model.task to {other}, or give other columns with data.columns"
        )
    if len(fitting) > 1:
        raise UserError(f"data.format: the columns fit {' and '.join(fitting)}; set data.format to one of them")
    unused = set(settings.columns) - {*FORMATS[fitting[0]], *(["text_pair"] if classify else [])}
    if unused:
        raise UserError(f"data.columns: {', '.join(sorted(unused))} is not used by {fitting[0]}; remove it")
    return fitting[0]


def _convert(
    settings: DataSettings, format_: str, parts: dict[str, list[Row]]
) -> tuple[dict[str, list[Row]], list[str] | None]:
    """Rows in the format's columns, and for text-label the labels' names in the order of their ids.

    Rows of sets that are scored by label words also have `accepted`, the answers that are right.
    """
    name = settings.name.lower()
    labels: list[str] | None = None
    convert: Callable[[dict[str, Any], str], dict[str, Any]]
    if name in LABEL_TASKS:
        classify = format_ == "text-label"
        convert = functools.partial(_label_task_row, LABEL_TASKS[name], classify)
        labels = list(LABEL_TASKS[name].labels) if classify else None
    elif name in SOLUTION_TASKS:
        convert = _solution_row
    elif name in CHOICE_TASKS:
        convert = _copa_row if name == "superglue/copa" else _record_row
    elif format_ == "text-label":
        parts, labels = _number_labels(settings, parts)
        convert = functools.partial(_text_row, settings)
    else:
        convert = functools.partial(_chat_row if format_ == "chat" else _completion_row, settings)
    return {part: [(where, convert(row, where)) for where, row in rows] for part, rows in parts.items()}, labels


def _flatten(name: str, row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """SuperGLUE's nested rows as flat ones, one for each thing to answer; other rows as they are."""
    passage = row.get("passage")
    try:
        if name == "superglue/multirc" and isinstance(passage, dict):
            return [
                {
                    "paragraph": passage["text"],
                    "question": question["question"],
                    "answer": answer["text"],
                    "label": answer.get("label"),
                }
                for question in passage["questions"]
                for answer in question["answers"]
            ]
        if name == "superglue/record" and isinstance(passage, dict):
            return [
                {
                    "passage": passage["text"],
                    "query": query["query"],
                    "answers": [answer["text"] for answer in query.get("answers", [])],
                }
                for query in row["qas"]
            ]
        if name == "superglue/wsc" and isinstance(row.get("target"), dict):
            return [{**row, **row["target"]}]
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: not a row of {name} as published ({error!r})") from error
    return [row]


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = f"it is {_shown(value)}" if column in row else f"the columns are {', '.join(row) or 'none'}"
        raise UserError(f"{where}: expected a text in column {column!r}, but {found}")
    return value


def _completion_row(settings: DataSettings, row: dict[str, Any], where: str) -> dict[str, Any]:
    columns = settings.columns
    return {ours: _text(row, columns.get(ours, ours), where) for ours in FORMATS["prompt-completion"]}


def _chat_row(settings: DataSettings, row: dict[str, Any], where: str) -> dict[str, Any]:
    column = settings.columns.get("messages", "messages")
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: expected a list of messages in column {column!r}, got {_shown(messages)}")
    if row.get("tools"):
        raise UserError(f"{where}: tool definitions (column 'tools') are not supported; remove the column")
    kept = []
    for i, message in enumerate(messages, 1):
        turn = {key: message.get(key) if isinstance(message, dict) else None for key in ("role", "content")}
        if not all(isinstance(value, str) for value in turn.values()) or message.get("tool_calls"):
            raise UserError(
                f"{where}: message {i} must be {{role: text, content: text}} without tool calls; got {_shown(message)}"
            )
        kept.append(turn)
    return {"messages": kept}


def _text_row(settings: DataSettings, row: dict[str, Any], where: str) -> dict[str, Any]:
    text, pair, label = (settings.columns.get(ours, ours) for ours in ("text", "text_pair", "label"))
    return {
        "text": _text(row, text, where),
        "text_pair": _text(row, pair, where) if row.get(pair) is not None else None,
        "label": row[label],
    }


def _number_labels(settings: DataSettings, parts: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], list[str]]:
    """Labels of a user's set as ids: whole numbers from 0 stay, names are numbered in alphabetical order."""
    column = settings.columns.get("label", "label")

    def as_number(value: Any) -> int | None:
        is_number = isinstance(value, int) or isinstance(value, str) and value.isascii() and value.isdigit()
        return int(value) if is_number and int(value) >= 0 else None

    values = [row.get(column) for _, row in parts["train"]]
    numbers = any(as_number(value) is not None for value in values)
    names = [] if numbers else sorted({value for value in values if isinstance(value, str)})
    expected = "a whole number from 0" if numbers else f"one of the names in training ({', '.join(names[:20])})"
    highest = 0
    numbered: dict[str, list[Row]] = {}
    for part, rows in parts.items():
        numbered[part] = []
        for where, row in rows:
            value = row.get(column)
            label = as_number(value) if numbers else names.index(value) if value in names else None
            if label is None:
                raise UserError(f"{where}: label {_shown(value)} in column {column!r}; expected {expected}")
            highest = max(highest, label)
            numbered[part].append((where, {**row, column: label}))
    return numbered, names or [str(i) for i in range(highest + 1)]


def _label_task_row(task: LabelTask, classify: bool, row: dict[str, Any], where: str) -> dict[str, Any]:
    for column in task.columns:
        _text(row, column, where)
    value = row.get("label")
    spelled = str(value).lower()  # publishers write true, "true" and 1 for the same label
    if spelled in task.labels:
        label = task.labels.index(spelled)
    elif spelled.isdigit() and int(spelled) < len(task.labels):
        label = int(spelled)
    else:
        raise UserError(
            f"{where}: label {_shown(value)}; expected {', '.join(task.labels)} or its number. A publisher's "
            "test part has no labels: name another split"
        )
    if classify:
        text, pair = task.texts(row)
        return {"text": text, "text_pair": pair, "label": label}
    return {"prompt": task.prompt(row), "completion": task.words[label], "accepted": (task.words[label],)}


def _solution_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    question, answer = _text(row, "question", where), _text(row, "answer", where)
    if scores.extract_number(answer) is None:
        raise UserError(f"{where}: the answer must end in '#### ' and a number; got {_shown(answer[-80:])}")
    return {"prompt": question, "completion": answer}


def _copa_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    premise, *choices = (_text(row, column, where) for column in ("premise", "choice1", "choice2"))
    links = {"cause": "because", "effect": "so", 0: "because", 1: "so"}  # the Hub's copy has numbers
    if row.get("question") not in links or row.get("label") not in (0, 1):
        raise UserError(
            f"{where}: expected question cause or effect and label 0 or 1, got "
            f"{_shown((row.get('question'), row.get('label')))}"
        )
    choice = choices[row["label"]]
    choice = choice[:1].lower() + choice[1:]  # it goes on in the middle of a sentence
    prompt = f"{premise.rstrip(' .')} {links[row['question']]}"
    return {"prompt": prompt, "completion": choice, "accepted": (choice,)}


def _record_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The query is cut where an entity is missing; the completion is the entity and the rest of the query."""
    passage, query = _text(row, "passage", where), _text(row, "query", where)
    before, placeholder, after = query.partition("@placeholder")
    accepted = tuple(answer + after for answer in dict.fromkeys(row.get("answers") or ()))
    if not accepted or not placeholder:
        raise UserError(f"{where}: expected a query with @placeholder and an answer; got {_shown(query)}")
    return {"prompt": f"{passage} {before}".rstrip(), "completion": accepted[0], "accepted": accepted}


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


# Tokens ----------------------------------------------------------------------------------------------


def _choose_template(settings: DataSettings, format_: str, tokenizer: Any) -> bool:
    """Whether texts go through the tokenizer's chat template."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if format_ == "text-label":
        if settings.template:
            raise UserError("data.template: true, but texts to classify take no chat template; remove it")
        return False
    if format_ == "chat" and (settings.template is False or not has_template):
        reason = "data.template is false" if has_template else "the tokenizer has none"
        raise UserError(
            f"data: chat messages need a chat template, but {reason}; use the tokenizer of an "
            "instruction-tuned model (model.tokenizer), or give prompt and completion columns"
        )
    if settings.template and not has_template:
        raise UserError("data.template: true, but the tokenizer has no chat template; set it to null")
    template = has_template if settings.template is None else settings.template
    if not template and tokenizer.eos_token_id is None:
        raise UserError(
            "data: the tokenizer has no end-of-sequence token, so no model could learn where a completion ends; "
            "use another one (model.tokenizer)"
        )
    return template


def _encode(
    settings: DataSettings,
    format_: str,
    rows: list[Row],
    labels: list[str] | None,
    tokenizer: Any,
    template: bool,
) -> tuple[list[EvalExample], dict[str, Any]]:
    """Tokenized rows, and their counts and hash for the report."""
    counts = dict.fromkeys(("read", "used", "truncated", "skipped_no_target", "tokens", "trained_tokens"), 0)
    digest = hashlib.sha256()
    examples = []
    for where, row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
        if labels is not None:
            example, length = _label_example(tokenizer, row, labels, settings.max_length)
        else:
            if format_ == "chat":
                pieces = _chat_pieces(tokenizer, row["messages"], where)
            elif template:
                turns = (("user", row["prompt"]), ("assistant", row["completion"]))
                messages = [{"role": role, "content": content} for role, content in turns]
                pieces = _chat_pieces(tokenizer, messages, where)
            else:
                pieces = _plain_pieces(row, settings.name.lower() in SOLUTION_TASKS)
            example, length = _token_example(tokenizer, pieces, row, settings.max_length, marked=template)
        trained = _count_trained(example)
        counts["read"] += 1
        if not trained:
            counts["skipped_no_target"] += 1
            continue
        counts["used"] += 1
        counts["truncated"] += length > settings.max_length
        counts["tokens"] += len(example.input_ids)
        counts["trained_tokens"] += trained
        examples.append(example)
    return examples, {**counts, "sha256": digest.hexdigest()}


def _count_trained(example: Example) -> int:
    if isinstance(example.labels, int):
        return 1 if example.input_ids else 0
    return sum(label != IGNORED for label in example.labels[1:])  # nothing predicts the first token


def _notes(settings: DataSettings, part: str, counts: dict[str, Any]) -> list[str]:
    """What the user should know of the counts; an error where rows were read and none is left."""
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
        notes.append(f"{part}: {skipped} of {read} examples skipped: no trained token within {limit}")
    return notes


def _label_example(tokenizer: Any, row: dict[str, Any], labels: list[str], max_length: int) -> tuple[EvalExample, int]:
    """The example, and its length before it was cut."""
    text, pair = row["text"], row["text_pair"]
    prompt = text if pair is None else f"{text}\n{pair}"
    if tokenizer.sep_token_id is None:  # nothing would stand between the two
        text, pair = prompt, None
    tokens = tokenizer(text, pair)
    length = len(tokens["input_ids"])
    if length > max_length:  # the tokenizer cuts such that its special tokens stay
        tokens = tokenizer(text, pair, truncation=True, max_length=max_length)
    example = EvalExample(
        input_ids=tokens["input_ids"],
        labels=row["label"],
        token_type_ids=tokens.get("token_type_ids"),
        prompt_ids=tokens["input_ids"],
        prompt=prompt,
        reference=labels[row["label"]],
    )
    return example, length


def _token_example(
    tokenizer: Any, pieces: list[tuple[str, bool]], row: dict[str, Any], max_length: int, *, marked: bool
) -> tuple[EvalExample, int]:
    """The example of pieces of text, each with whether it is trained, and its length before it was cut.

    The last piece is a trained one, or none is. `marked`: the text holds the chat template's own marks;
    else it begins with the beginning-of-sequence token, where the tokenizer sets one, and a trained
    end-of-sequence token follows.
    """
    texts = [text for text, _ in pieces]
    segments = _tokenize_pieces(tokenizer, texts)
    ids: list[int] = []
    if not marked:
        ids = [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
        if pieces[-1][1]:
            segments[-1].append(tokenizer.eos_token_id)
    labels = [IGNORED] * len(ids)
    for segment, (_, trained) in zip(segments, pieces, strict=True):
        ids += segment
        labels += segment if trained else [IGNORED] * len(segment)
    example = EvalExample(
        input_ids=ids[:max_length],
        labels=labels[:max_length],
        prompt_ids=ids[: len(ids) - len(segments[-1])],
        prompt="".join(texts[:-1]),
        reference=_last_answer(row),
        accepted=row.get("accepted", ()),
    )
    return example, len(ids)


def _last_answer(row: dict[str, Any]) -> str:
    if "completion" in row:
        return row["completion"]
    answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    return next((answer for answer in reversed(answers) if answer.strip()), "")


def _tokenize_pieces(tokenizer: Any, pieces: list[str]) -> list[list[int]]:
    """The tokens of each piece, such that those of the first pieces are what their text alone gives.

    So what precedes an answer has the same tokens in training as when the answer is generated. Where no
    token of the whole text lies across the border of two pieces, the result is the whole text's tokens.
    """
    segments: list[list[int]] = []
    before: list[int] = []
    text = ""
    for piece in pieces:
        text += piece
        whole = tokenizer(text, add_special_tokens=False).input_ids
        if whole[: len(before)] == before:
            segments.append(whole[len(before) :])
        else:
            segments.append(tokenizer(piece, add_special_tokens=False).input_ids)
        before = before + segments[-1]
    return segments


def _plain_pieces(row: dict[str, Any], question: bool) -> list[tuple[str, bool]]:
    """Prompt and completion without a chat template; word problems are asked as questions."""
    prompt, completion = row["prompt"], row["completion"]
    if question:
        prompt = f"Question: {prompt}\nAnswer:"
    if not completion.strip():
        return [(prompt, False)]
    apart = not prompt or prompt[-1].isspace() or completion[0].isspace()
    return [(prompt, False), (completion if apart else " " + completion, True)]


def _chat_pieces(tokenizer: Any, messages: list[dict[str, str]], where: str) -> list[tuple[str, bool]]:
    """A conversation through the chat template, cut where the assistant's turns begin and end.

    A trained piece is what the model itself must write: all that follows the generation prompt up to and
    with the end-of-turn mark, but not the whitespace that templates put between turns. What follows the
    last one is left out.
    """

    def render(n: int, generate: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=generate)
        except (jinja2.TemplateError, ValueError) as error:  # ValueError: there is no message
            roles = ", ".join(message["role"] for message in messages[:n]) or "none"
            raise UserError(
                f"{where}: the chat template cannot write the first {n} of {len(messages)} messages "
                f"(roles: {roles}): {error}"
            ) from error

    whole = render(len(messages), False)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        before = render(i, True)
        after = render(i + 1, False) if i + 1 < len(messages) else whole
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(
                f"{where}: the tokenizer's chat template writes earlier turns differently when later ones "
                f"follow (message {i + 1} of {len(messages)}), so the assistant's tokens cannot be told "
                "apart; give one-turn conversations, or a tokenizer with another template"
            )
        turn = after[len(before) :]
        if not turn.rstrip().endswith(message["content"].rstrip()):  # a visible mark ends the turn
            turn = turn.rstrip()
        pieces += [(whole[done : len(before)], False), (turn, True)]
        done = len(before) + len(turn)
    return pieces or [(whole, False)]


# Messages --------------------------------------------------------------------------------------------


def _nearest(value: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
