"""The `data` section of a run and its checks. It reads no rows and needs no heavy library."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hift_ds import paths
from hift_ds.launch.data.built_in import BUILT_IN, MAX_PROBLEMS
from hift_ds.launch.data.formats import COLUMNS, possible_formats
from hift_ds.launch.data.sources import FILE_KINDS, PUBLISHED, find_files
from hift_ds.launch.errors import UserError, looked_in, nearest


@dataclass(frozen=True)
class DataSettings:
    """The `data` section."""

    # arithmetic | yes-no (both built in) | gsm8k | sst2 | superglue/TASK | json | jsonl | csv | tsv | parquet
    # (files at `path`) | OWNER/NAME (a data set of the Hugging Face Hub)
    name: str = "arithmetic"
    # A file or a folder. For gsm8k, sst2, superglue/TASK the publisher's folder; null = from the Hub.
    path: str | None = None
    # The held-out file, if `path` is one file. In a folder and on the Hub, `eval_split` names the held-out split.
    eval_path: str | None = None
    # Configuration and git revision of a data set on the Hub.
    subset: str | None = None
    revision: str | None = None
    # prompt-completion | chat | text-label; null = found from the columns
    format: str | None = None
    # Column of the format: column of the file, as in {prompt: question, completion: answer}. `input` continues prompts.
    columns: dict[str, str] = field(default_factory=dict)
    # The splits to train on and to score. eval_split null = the first of validation, val, dev and test that is there
    # and not trained on.
    split: str = "train"
    eval_split: str | None = None
    # Sizes of seeded subsets; null = all (4096 and 256 built-in problems). eval_examples 0 = none.
    train_examples: int | None = None
    eval_examples: int | None = None
    # Tokens of an example; longer ones are cut on the right, counted and reported.
    max_length: int = 512
    # true: prompt and completion become a user's and an assistant's turn in the tokenizer's chat template;
    # false: they are joined, with a space if neither side has whitespace; null = true if there is a template.
    template: bool | None = None
    # Folder for the tokenized rows, which later starts and all ranks of a machine share. null: `hift_ds` in the cache
    # of datasets (HF_DATASETS_CACHE).
    cache: str | None = None
    # true: training rows are read as they are needed, again and again, and never stored.
    streaming: bool = False
    # Rows that are shuffled together with data.streaming.
    shuffle_rows: int = 10_000
    # Processes of each rank that prepare batches ahead; 0: the rank itself does while its device computes.
    workers: int = 0

    def problems(self) -> list[str]:
        """Return every problem that can be found before rows are read, one line each."""
        name = self.name.lower()
        local, published = name in FILE_KINDS, name in PUBLISHED
        hub = not local and not published and name not in BUILT_IN
        if hub and (self.name.count("/") != 1 or name.startswith("superglue/")):
            known = [*BUILT_IN, *PUBLISHED, *FILE_KINDS]
            return [  # further checks depend on the name
                f"data.name: unknown data set {self.name!r}; expected {', '.join(known)}, or OWNER/NAME for a "
                f"data set of the Hugging Face Hub{nearest(name, known)}"
            ]
        found = self._path_problems(local, published)
        if self.subset is not None and not hub:
            found.append(f"data.subset: {self.subset!r} is for sets named OWNER/NAME; remove it")
        if self.revision is not None and not (hub or published and self.path is None):
            found.append(f"data.revision: {self.revision!r} is for sets from the Hub; remove it")
        if name in BUILT_IN and (self.split != "train" or self.eval_split not in (None, "test")):
            found.append(
                f"data.split, data.eval_split: {self.split!r} and {self.eval_split!r}, but the built-in "
                "problems are trained on 'train' and scored on 'test'; remove both"
            )
        if name not in BUILT_IN and self.path is None and self.eval_split == self.split:
            found.append(f"data.eval_split: {self.eval_split!r} is trained on (data.split); name another split")
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
                    f"data.columns: unknown column {key!r}; expected {', '.join(COLUMNS)} as keys and the file's "
                    f"columns as values, as in {{prompt: question}}{nearest(key, COLUMNS)}"
                )
        if self.streaming and name in BUILT_IN:
            found.append(f"data.streaming: true, but {self.name!r} is generated, not read; remove it")
        if self.streaming and self.train_examples is not None:
            found.append(
                f"data.train_examples: {self.train_examples}, but the rows of a stream are not counted, so none can be "
                "drawn (data.streaming); set it to null"
            )
        if self.cache is not None and (reason := paths.fault(self.cache, inside=paths.INSIDE)):
            found.append(f"data.cache: {reason}")
        for key, least in (
            ("train_examples", 1),
            ("eval_examples", 0),
            ("max_length", 2),
            ("workers", 0),
            ("shuffle_rows", 1),
        ):
            value = getattr(self, key)
            if value is not None and value < least:
                found.append(f"data.{key}: {value} is too small; expected at least {least}")
            elif value is not None and key.endswith("_examples") and name in BUILT_IN and value > MAX_PROBLEMS:
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
                if path is not None and (reason := paths.fault(path, reads=True)):
                    found.append(f"data.{key}: {reason}")
                elif path is not None and not Path(path).expanduser().exists():
                    found.append(f"data.{key}: {path!r} does not exist{looked_in(path)}")
        if not found and self.path is not None:
            try:
                self.files()
            except UserError as error:
                found.append(str(error))
        return found

    def files(self) -> dict[str, list[Path]]:
        """Find the files of `path` and `eval_path`: to train on ("train") and, if there are any, held out ("eval").

        Raises:
            UserError: a named split has no file, or is trained on.
        """
        return find_files(self.name.lower(), str(self.path), self.split, self.eval_path, self.eval_split)
