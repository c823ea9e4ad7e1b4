"""Tokenized data in files: when they are used again, made anew, and left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hift_ds.launch.data import loading
from hift_ds.launch.data.settings import DataSettings
from hift_ds.launch.errors import UserError
from tests.support.data_fixtures import CHATML, bpe, write_jsonl
from tests.support.paths import REPOSITORY

ROWS = [{"prompt": f"a{i}", "completion": "yes " * (i % 7 + 1)} for i in range(1200)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def prepare(rows: Path, tokenizer: Any = None, seed: int = 0, **settings: Any) -> tuple[Path, list[str]]:
    """The folder, and what was said: whether it was made or found."""
    said: list[str] = []
    data = DataSettings(**{"name": "jsonl", "path": str(rows), "cache": str(rows.parent / "cache"), **settings})
    tokenizer = tokenizer or bpe()
    *_, folder = loading.prepare_data(data, tokenizer, task="causal-lm", seed=seed, say=said.append)
    assert folder is not None and str(folder) in said[0]
    return folder, said


def made(said: list[str]) -> bool:
    return any("rows tokenized in" in one for one in said)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".arrow", ".json")}


def test_a_second_start_uses_what_the_first_one_made(rows: Path) -> None:
    folder, said = prepare(rows)
    assert made(said)
    before = content(folder)
    assert set(before) == {"train.arrow", "eval.arrow", "report.json", "manifest.json"}
    again, said = prepare(rows)
    assert again == folder and not made(said) and "delete it" in said[0] and content(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_decides_the_examples_decides_the_folder(rows: Path, tmp_path: Path) -> None:
    first, _ = prepare(rows)
    assert prepare(rows, workers=3)[0] == first and prepare(rows, seed=1)[0] == first
    other = write_jsonl(tmp_path / "other.jsonl", ROWS)  # messages name the file
    changed = [
        prepare(rows, max_length=9)[0],
        prepare(rows, train_examples=5)[0],
        prepare(rows, train_examples=5, seed=1)[0],
        prepare(rows, bpe(CHATML))[0],
        prepare(rows, bpe(CHATML), template=False)[0],
        prepare(rows, eval_path=str(write_jsonl(tmp_path / "eval.jsonl", ROWS[:3])))[0],
        prepare(other)[0],
    ]
    write_jsonl(rows, [*ROWS[1:], ROWS[0]])
    changed.append(prepare(rows)[0])
    assert len({first, *changed}) == 9


def test_the_code_that_makes_examples_decides_the_folder(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = prepare(rows)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "encoding.py"))
    assert prepare(rows)[0] != first


@pytest.mark.parametrize("file", ["train.arrow", "eval.arrow", "report.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_damaged_files_are_made_anew(file: str, damage: str, rows: Path) -> None:
    folder, _ = prepare(rows)
    before = content(folder)
    damaged = bytearray(before[file])
    damaged[len(damaged) // 2] ^= 1
    (folder / file).write_bytes(damaged if damage == "changed" else before[file][:-1])
    if damage == "missing":
        (folder / file).unlink()
    again, said = prepare(rows)
    assert again == folder and "are damaged, and are made anew" in said[0] and made(said)
    assert content(folder) == before and [path.name for path in folder.parent.iterdir()] == [folder.name]


SLOW = """
import sys, time
from pathlib import Path
from hift_ds.launch.data import blocks
from tests.launch.data.test_cache import prepare
as_table = blocks.as_table
def slow(*arguments):
    print("writing", flush=True)
    time.sleep(60)
    return as_table(*arguments)
blocks.as_table = slow
prepare(Path(sys.argv[1]))
"""


def test_a_killed_start_leaves_nothing_that_is_taken_for_whole(rows: Path) -> None:
    command = [sys.executable, "-P", "-c", SLOW, str(rows)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
                               env={**os.environ, "PYTHONPATH": str(REPOSITORY)})  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    (left,) = (rows.parent / "cache").iterdir()
    # One that is still being written is left alone.
    folder, said = prepare(rows)
    assert made(said) and left.is_dir() and left.name.startswith(folder.name)
    process.send_signal(signal.SIGKILL)
    process.wait()
    prepare(rows, max_length=9)
    assert left.is_dir(), "it belongs to other data"
    (folder / "report.json").unlink()
    assert made(prepare(rows)[1]) and not left.exists()


def _start(path: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(prepare(path)[0])


def test_processes_that_start_at_once_do_not_collide(rows: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_start, args=(rows, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (folder,) = folders
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not made(prepare(rows)[1])


def test_several_processes_make_the_same_files(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(rows, [*ROWS, {"prompt": "x", "completion": ""}, {"prompt": "<|im_end|>", "completion": "b"}] * 2)
    one, _ = prepare(rows, max_length=8)
    before = content(one)
    monkeypatch.setattr(loading, "MANY_ROWS", 1)
    monkeypatch.setattr(loading, "BLOCK", 100)
    monkeypatch.setattr(loading, "_cores", lambda: 2)
    many, _ = prepare(rows, max_length=8, cache=str(tmp_path / "other"))
    assert content(many)["report.json"] == before["report.json"]
    data = [loading.open_data(DataSettings(), bpe(), folder) for folder in (one, many)]
    assert list(data[0].train) == list(data[1].train) and len(data[0].train) > 1000
    report = json.loads(before["report.json"])["train"]
    assert report["remarks"]["control tokens"]["rows"] == 2 and report["skipped_no_target"] == 2
    # The error of a process is that of the row, without a traceback.
    write_jsonl(rows, [*ROWS[:450], {"prompt": 3, "completion": ""}, *ROWS])
    with pytest.raises(UserError, match=r"\A[^\n]*rows.jsonl:451: expected a text in column 'prompt'[^\n]*\Z"):
        prepare(rows)


def test_a_folder_that_cannot_be_written_is_named(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache: .*/file' is a file"):
        prepare(rows, cache=str(tmp_path / "file" / "x"))
    with mock.patch("os.rename", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(UserError, match=r"data.cache: .*/jsonl-\w+' cannot be written \(No space .*another folder"):
            prepare(rows)
    assert list((tmp_path / "cache").iterdir()) == []
    assert DataSettings(cache=" ").problems() == ["data.cache: ' ' is empty; expected a path"]


def test_other_users_may_read_what_the_umask_lets_them(rows: Path) -> None:
    before = os.umask(0o002)
    try:
        folder, _ = prepare(rows)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o775
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.glob("*.*"))


def test_damaged_files_that_may_not_be_moved_are_named(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = prepare(rows)
    (folder / "train.arrow").write_bytes(b"damaged")
    tries = iter(range(5))

    def refused(*paths: Any) -> None:
        next(tries)  # without an end to its tries, the process would hang
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(UserError, match=r"data\.cache: .*Operation not permitted.*set data\.cache to another folder"):
        prepare(rows)
    assert (folder / "train.arrow").read_bytes() == b"damaged"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"Anonymous: +(\d+) kB", text)[1])  # type: ignore[index]


def _measured(path: Path, n: int, results: Any) -> None:
    write_jsonl(path, [{"prompt": f"a{i}", "completion": "yes it was great " * 10} for i in range(n)])
    tokenizer = bpe()
    prepare(path, tokenizer, max_length=4)  # what the libraries allocate once
    before = anonymous()
    folder, _ = prepare(path, tokenizer)
    data = loading.open_data(DataSettings(), bpe(), folder)
    sums = sum(len(data.train[i].input_ids) for i in range(0, n, 7))
    assert sums > n
    results.put(anonymous() - before)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="anonymous memory is read from /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """20 times the rows: lists of their tokens would take 10 MB more."""
    context = multiprocessing.get_context("fork")
    used = []
    for n in (500, 10_000):
        results = context.Queue()
        process = context.Process(target=_measured, args=(tmp_path / f"{n}.jsonl", n, results))
        process.start()
        used.append(results.get(timeout=300))
        process.join()
    assert used[1] - used[0] < 4e6, used
