"""Read rows from files and from the Hugging Face Hub, and find the splits to train on and to hold out.

Rows keep the values of their source, and each has its place for messages; `formats.py` converts them. They are read
one after another and never held together. `name` is `data.name` in lower case, except for `open_hub`.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hift_ds.launch.errors import UserError, listed, shown

Row = tuple[str, dict[str, Any]]  # its place (for messages) and its columns

FILE_KINDS = {
    "json": (".json", ".jsonl"),
    "jsonl": (".jsonl", ".json"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
}
# The data set on the Hub (id, configuration). With a `path`, the publisher's own files are read instead.
PUBLISHED = {
    "gsm8k": ("openai/gsm8k", "main"),
    "sst2": ("stanfordnlp/sst2", None),
    **{
        f"superglue/{task}": ("aps/super_glue", task)
        for task in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
    },
}
BATCH = 100  # rows of a table that are in memory at a time
MAX_LEVELS = 100  # of lists and objects in a row
# Publishers' names for the validation split. `eval_split: null` looks for these splits in this order.
VALIDATION = ("validation", "val", "dev")
HELD_OUT = (*VALIDATION, "test")


def find_files(
    name: str, path: str, split: str, eval_path: str | None, eval_split: str | None
) -> dict[str, list[Path]]:
    """Find the files to train on ("train") and, if there are any, the held-out ones ("eval").

    Args:
        name, path, split, eval_path, eval_split: the keys of the `data` section.

    Raises:
        UserError: a named split has no file, or a file is in both splits.
    """
    suffixes = FILE_KINDS.get(name, (".tsv",) if name == "sst2" else (".jsonl",))
    place = Path(path).expanduser()
    if name.startswith("superglue/") and place.is_dir():
        # The folder of the task, or its parent with one folder for each task.
        task = name.partition("/")[2]
        place = next((one for one in sorted(place.iterdir()) if one.is_dir() and one.name.lower() == task), place)
    if place.is_file():
        if name not in FILE_KINDS:
            raise UserError(f"data.path: {str(place)!r} is a file; {name!r} needs its folder")
        if split != "train" or eval_path is None and eval_split is not None:
            raise UserError(
                f"data.split, data.eval_split: {split!r} and {eval_split!r}, but data.path "
                "is one file, which has no splits; remove both and give the held-out file as data.eval_path, "
                "or give the folder as data.path"
            )
        found = {"train": [place]}
    else:
        found = {"train": _split_files(place, split, suffixes)}
        if not found["train"]:
            raise _no_split("split", split, place, suffixes)
    held_out = place if eval_path is None else Path(eval_path).expanduser()
    trained = {one.resolve() for one in found["train"]}
    if held_out.is_dir():
        for candidate in eval_splits(name, eval_split):
            files = _split_files(held_out, candidate, suffixes)
            if trained.isdisjoint(one.resolve() for one in files):
                if files:
                    return {**found, "eval": files}
            elif eval_split is not None:
                raise UserError(
                    f"data.eval_split: {eval_split!r} is {files[0]}, which is trained on; name another split, or "
                    "remove data.eval_split"
                )
        if eval_split is not None or eval_path is not None:
            wanted = eval_split or " or ".join(HELD_OUT)
            raise _no_split("eval_split", wanted, held_out, suffixes)
    elif eval_path is not None:
        if held_out.resolve() in trained:
            raise UserError(f"data.eval_path: {eval_path!r} is trained on; name another file, or remove data.eval_path")
        return {**found, "eval": [held_out]}
    return found


def _split_files(folder: Path, split: str, suffixes: Sequence[str]) -> list[Path]:
    """Find SPLIT.jsonl, or the shards SPLIT-*.jsonl as the Hub writes them."""
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


def eval_splits(name: str, eval_split: str | None) -> tuple[str, ...]:
    """Return the names of the splits that may be held out, in the order in which they are looked for."""
    if eval_split is not None:
        return (eval_split,)
    # The test splits of SST-2 and SuperGLUE are published without labels.
    return VALIDATION if name == "sst2" or name.startswith("superglue/") else HELD_OUT


def read_file(path: Path, name: str, start: int = 0) -> Iterator[Row]:
    """Yield the rows of a file with the values as they are written, each with its file and line.

    Args:
        start: rows at the beginning of the file that are passed over. They are not parsed.

    Raises:
        UserError: the file cannot be read, or a row is broken.
    """
    if name == "parquet":
        if path.stat().st_size:
            rows = itertools.islice(_load_file("parquet", path), start, None)
            yield from ((f"{path} row {i}", _without_fillers(row)) for i, row in enumerate(rows, start + 1))
        return
    # Read lines, because the json and csv readers of `datasets` guess types: text that looks like a date or a number
    # becomes one, "null" becomes None, and "false" in a mixed column becomes a bool.
    lines = read_lines(path)
    if name in ("csv", "tsv", "sst2"):
        yield from _parse_table(path, lines, "," if name == "csv" else "\t", quoted=name != "sst2", start=start)
    else:
        yield from _parse_json(path, lines, start)


def _without_fillers(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of Parquet or Arrow without the nulls inside its columns.

    There, all objects of a column have the same keys: the arguments of a tool call, for example, also have those of all
    other tools, with nulls.
    """

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(one) for key, one in value.items() if one is not None}
        return [cleaned(one) for one in value] if isinstance(value, list) else value

    return {column: cleaned(value) for column, value in row.items()}


def read_lines(path: Path, encoding: str = "utf-8-sig") -> Iterator[str]:
    """Yield the lines of a text file, with their line ends.

    Raises:
        UserError: the file cannot be read or decoded.
    """
    if path.stat().st_size:
        options = {"encoding": encoding, "keep_linebreaks": True, "chunksize": 2**20}
        yield from (row["text"] for row in _load_file("text", path, **options))


def _load_file(builder: str, path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    import datasets  # takes seconds; settings are checked without it

    try:
        # A stream is not copied to the cache of `datasets`.
        rows = datasets.load_dataset(
            builder, data_files={"train": [str(path)]}, split="train", streaming=True, **options
        )
        yield from _rows_of(rows)
    except Exception as error:  # decompressors and decoders have errors of their own
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            raise _not_decoded(path, cause) from error
        raise UserError(f"{path}: cannot be read as {builder}: {cause}") from error


def _rows_of(rows: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a set of `datasets` as they are stored: pictures and sound are not decoded."""
    for table in rows.with_format("arrow").iter(BATCH):
        yield from table.to_pylist()


def _not_decoded(path: Path, error: UnicodeDecodeError) -> UserError:
    """Name the first line of a text file that is not UTF-8, and the remedy."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return UserError(f"{path}: the text is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError as found:
            return UserError(
                f"{path}:{number}: the byte {line[found.start]:#04x} is not UTF-8 ({found.reason}); save the file as "
                "UTF-8 (iconv -f CP1252 -t UTF-8, if it comes from Windows), or remove the byte"
            )
    return UserError(f"{path}: cannot be read as text: {error}")


def _parse_json(path: Path, lines: Iterator[str], start: int) -> Iterator[Row]:
    """Parse JSON lines one by one, or one list of objects, which is in memory as a whole."""
    opening = []
    for line in lines:
        opening.append(line)
        if line.strip():
            break
    lines = itertools.chain(opening, lines)
    rows: Iterator[tuple[str, Any]]
    if "".join(opening).lstrip().startswith("["):
        elements = enumerate(_parse_value(path, 0, "".join(lines)), 1)
        rows = ((f"{path} element {i}", element) for i, element in elements)
        rows = itertools.islice(rows, start, None)
    else:
        # Files that were joined have a byte-order mark in the middle.
        numbered = ((number, line.removeprefix("\ufeff")) for number, line in enumerate(lines, 1))
        written = itertools.islice((one for one in numbered if one[1].strip()), start, None)
        rows = ((f"{path}:{number}", _parse_value(path, number, line)) for number, line in written)
    for where, value in rows:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a JSON object with named columns, got {shown(value)}")
        _check_row(where, value)
        yield where, value


def _parse_value(path: Path, number: int, text: str) -> Any:
    """Parse a line, or with number 0 the whole file."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{number or error.lineno}: broken JSON ({error.msg}, column {error.colno}); expected one "
            "object a line, or one list of objects"
        ) from error
    except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, or too many levels
        where = f"{path}:{number}" if number else str(path)
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{where}: cannot be read as JSON: {reason}; correct the value, or remove it") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} occurs twice in an object, and only one of the values would be used")
    return found


def _check_row(where: str, row: dict[str, Any]) -> None:
    """Refuse what JSON can write and other code cannot take."""
    level: list[Any] = [row]
    levels = 0
    while level and levels < MAX_LEVELS:
        level = [one for value in level for one in _children(value)]
        levels += 1
    if level:
        raise UserError(f"{where}: the value is nested more than {MAX_LEVELS} levels deep; flatten it, or remove it")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: a text contains half of a surrogate pair, {ascii(error.object[error.start])[1:-1]}, which is no "
            "character; write the whole pair (as in \\ud83d\\ude00), or remove the half"
        ) from error


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _parse_table(path: Path, lines: Iterable[str], separator: str, *, quoted: bool, start: int) -> Iterator[Row]:
    """Parse rows of texts. Unless `quoted`, quotation marks are ordinary characters, as in GLUE's files."""
    csv.field_size_limit(1 << 30)
    reader = csv.reader(
        iter(lines),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}:1: a column name occurs twice ({listed(header)}); rename one")
        for values in itertools.islice(filter(None, reader), start, None):
            if values[0].startswith("\ufeff"):
                raise UserError(
                    f"{path}:{reader.line_num}: a byte-order mark in the middle, as after joining files with headers; "
                    "remove the mark and the second header"
                )
            if len(values) != len(header):
                raise UserError(
                    f"{path}:{reader.line_num}: {len(values)} values for {len(header)} columns "
                    f"({listed(header)}); a value that holds the separator must be quoted"
                )
            yield f"{path}:{reader.line_num}", dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken table ({error})") from error


@dataclass
class HubSplit:
    """The rows of a split on the Hub, which can be read several times.

    Attributes:
        label: the data set and the split, for messages.
        rows: the split, of `datasets`.
        identity: what changes with the rows.
        remedy: what to do where its rows cannot be read.
    """

    label: str
    rows: Any
    identity: str
    remedy: str

    def read(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows from `start` on.

        Raises:
            UserError: they cannot be read.
        """
        rows = _rows_of(self.rows.skip(start) if start else self.rows)
        for i in itertools.count(start + 1):
            try:
                row = next(rows, None)
            except Exception as error:  # of the network, of decompressors and of decoders
                raise UserError(
                    f"data.name: the rows of {self.label} cannot be read: {error}; {self.remedy}"
                ) from error
            if row is None:
                return
            yield f"{self.label} row {i}", _without_fillers(row)


def open_hub(
    name: str,
    subset: str | None,
    revision: str | None,
    split: str,
    eval_split: str | None,
    streaming: bool = False,
) -> dict[str, HubSplit]:
    """Find the splits "train" and, if something is held out, "eval" on the Hub.

    Args:
        name, subset, revision, split, eval_split: the keys of the `data` section.
        streaming: whether rows are read from the Hub as they come; else the data set is downloaded now.

    Raises:
        UserError: the Hub cannot be reached, the data set cannot be loaded, or a named split is not there or is trained
            on.
    """
    import datasets  # takes seconds; settings are checked without it

    published = name.lower() in PUBLISHED
    identity, subset = PUBLISHED.get(name.lower(), (name, subset))
    label = f"{identity} ({subset})" if subset else identity
    remedy = "give the publisher's files as data.path" if published else f"use files ({', '.join(FILE_KINDS)})"
    try:
        builder = datasets.load_dataset_builder(identity, subset, revision=revision)
        if not streaming:
            builder.download_and_prepare()
        loaded = builder.as_streaming_dataset() if streaming else builder.as_dataset()
    except ConnectionError as error:  # offline mode, too
        raise UserError(
            f"data.name: {name!r}: the Hugging Face Hub cannot be reached for {label}, and it is not "
            f"in the local cache ({error}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or {remedy}"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data.name: {name!r}: {label} cannot be loaded from the Hub: {error}; check data.name, "
            f"data.subset and data.revision, or {remedy}"
        ) from error
    splits: dict[str, HubSplit] = {}
    trained: str | None = None  # the split to train on
    for part, key, asked, wanted in (
        ("train", "split", split, (split,)),
        ("eval", "eval_split", eval_split, eval_splits(name.lower(), eval_split)),
    ):
        present = [spelling for one in wanted for spelling in _spellings(one) if spelling in loaded]
        if asked is None:
            present = [one for one in present if one != trained]
        if present[:1] == [trained]:
            raise UserError(f"data.eval_split: {present[0]!r} of {label} is trained on; name another split")
        if present:
            trained = trained or present[0]
            rows = loaded[present[0]]
            version = f"{builder.hash} {builder.config_id}" if streaming else rows._fingerprint
            splits[part] = HubSplit(f"{label} {present[0]}", rows, version, remedy)
        elif asked is not None:
            raise UserError(f"data.{key}: {label} has no split {asked!r}; it has {', '.join(loaded)}")
    return splits
