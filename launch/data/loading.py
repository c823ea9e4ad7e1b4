"""Data of a training run: settings, the tokenized examples, batches and their order.

load_data reads rows (`sources.py`), brings them into one of three formats (`formats.py`) and tokenizes them
(`encoding.py`).
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hift_ds.checkpoint.files import sha256_of
from hift_ds.launch.data import scores
from hift_ds.launch.data.arithmetic import MAX_PROBLEMS, arithmetic_problems
from hift_ds.launch.data.encoding import IGNORED, EvalExample, Example, choose_template, encode
from hift_ds.launch.data.formats import (
    CHOICE_TASKS,
    COLUMNS,
    LABEL_TASKS,
    SOLUTION_TASKS,
    convert,
    find_format,
    flatten,
    possible_formats,
)
from hift_ds.launch.data.sources import FILE_KINDS, PUBLISHED, Row, find_files, read_file, read_hub
from hift_ds.launch.errors import UserError, looked_in, nearest

DEFAULT_PROBLEMS = {"train": 4096, "eval": 256}  # how many built-in problems where the settings do not say


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
                f"data set of the Hugging Face Hub{nearest(name, known)}"
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
        formats = possible_formats(name)
        if self.format is not None and self.format not in formats:
            found.append(
                f"data.format: {self.format!r} does not exist for {self.name!r}; expected "
                f"{', '.join(formats)}, or null to find it{nearest(self.format, formats)}"
            )
        if self.columns and not (local or hub):
            found.append(f"data.columns: the columns of {self.name!r} are known; remove data.columns")
        for key in self.columns:
            if key not in COLUMNS:
                found.append(
                    f"data.columns: unknown column {key!r}; keys are ours ({', '.join(COLUMNS)}), values the "
                    f"file's, as in {{prompt: question}}{nearest(key, COLUMNS)}"
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
                    found.append(f"data.{key}: {path!r} does not exist{looked_in(path)}")
        if not found and self.path is not None:
            try:
                self.files()
            except UserError as error:
                found.append(str(error))
        return found

    def files(self) -> dict[str, list[Path]]:
        """The files that `path` and `eval_path` mean: of "train" and, where something is held out, of "eval"."""
        return find_files(self.name.lower(), str(self.path), self.split, self.eval_path, self.eval_split)


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

    def longest(self, max_new_tokens: int) -> tuple[int, int]:
        """Tokens of the longest example, and of the longest held-out prompt with its answer (0 without answers)."""
        answered = self.eval if self.score is not None and self.report["labels"] is None else []
        return (
            max(len(example.input_ids) for example in [*self.train, *self.eval]),
            max((len(example.prompt_ids) + max_new_tokens for example in answered), default=0),
        )


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
    format_ = find_format(settings.name, settings.format, settings.columns, chosen["train"], task)
    rows, labels = convert(settings.name, format_, settings.columns, chosen)
    template = choose_template(settings.template, format_, tokenizer)
    report: dict[str, Any] = {}
    encoded: dict[str, list[EvalExample]] = {}
    for part in ("train", "eval"):
        encoded[part], counts = encode(
            rows[part],
            tokenizer,
            labels=labels,
            template=template,
            question=settings.name.lower() in SOLUTION_TASKS,
            max_length=settings.max_length,
        )
        report[part] = {"rows": len(splits[part]), **counts}
        notes += _notes(settings, part, counts)
    train = [Example(one.input_ids, one.labels, one.token_type_ids) for one in encoded["train"]]
    report |= {"files": files, "format": format_, "template": template, "labels": labels, "notes": notes}
    return Data(train, encoded["eval"], report, _find_score(settings, format_))


def _read(settings: DataSettings, seed: int) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """All rows of the parts "train" and "eval" (empty where nothing is held out), and the files' hashes."""
    name = settings.name.lower()
    hashes: dict[str, str] = {}
    splits: dict[str, list[Row]] = {"train": [], "eval": []}
    if name == "arithmetic":
        for part, split, n in (("train", "train", settings.train_examples), ("eval", "test", settings.eval_examples)):
            problems = arithmetic_problems(split, DEFAULT_PROBLEMS[part] if n is None else n, seed)
            splits[part] = [(f"built-in {split} problem {i}", one) for i, one in enumerate(problems, 1)]
    elif settings.path is not None:
        for part, paths in settings.files().items():
            for path in paths:
                splits[part] += read_file(path, name)
                hashes[str(path)] = sha256_of(path)
    else:
        splits = read_hub(settings.name, settings.subset, settings.revision, settings.split, settings.eval_split)
    if not splits["train"]:
        raise UserError(
            f"data: {settings.path or settings.name!r} has no rows in the split {settings.split!r}; there is "
            "nothing to train on"
        )
    for part, rows in splits.items():
        splits[part] = [(where, flat) for where, row in rows for flat in flatten(name, row, where)]
    return splits, hashes


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
    notes.append(f"{part}: {n} of {len(rows)} rows are drawn by the seed (data.{part}_examples)")
    return [rows[i] for i in sorted(random.Random(f"{part} {seed}").sample(range(len(rows)), n))]


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


# Batches ---------------------------------------------------------------------------------------------


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A right-padded batch of int64 tensors.

    `input_ids` and `attention_mask` have the shape (examples, longest example), and so has
    `token_type_ids`, where the examples have them. `labels` has it for causal LM; (examples,) for labels, which for
    regression are float32.
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
