"""Comparisons of a tiny model on written data: their arguments, runs on ranks, and what they left."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hift_ds.evaluation.report.results import read_results
from hift_ds.launch.callbacks.callback import Callback
from tests import ENVIRONMENT
from tests.support.data_fixtures import write_jsonl
from tests.support.paths import REPOSITORY
from tests.support.ranks import run_on_ranks

TINY = str(REPOSITORY / "configs" / "compare_tiny.yaml")
WALL = ("seconds", "seconds_are", "step_seconds", "tokens_per_second", "peak_memory", "date", "planned_memory", "spent")
MEZO = ("mezo", "mezo-adam", "mezo-lora", "mezo-prefix")
FEW = "methods=[zero-shot, full, hift, {name: mezo, learning_rates: [1e-6]}]"


# ---- data and arguments ----------------------------------------------------------------------------------------------


def write_data(folder: Path) -> Path:
    """sst2 and SuperGLUE's RTE as they are published, with 40 rows to train on and 16 held out."""
    (folder / "sst2").mkdir(parents=True)
    (folder / "superglue" / "RTE").mkdir(parents=True)
    for tsv, jsonl, start, stop in (("train", "train", 0, 40), ("dev", "val", 40, 56)):
        rows = [f"{'a fine' if i % 2 else 'a dull'} film no. {i}\t{i % 2}" for i in range(start, stop)]
        (folder / "sst2" / f"{tsv}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
        pairs = [
            {
                "premise": f"Ann has {i} cats.",
                "hypothesis": f"Ann has {'cats' if i % 2 else 'dogs'}.",
                "label": "entailment" if i % 2 else "not_entailment",
                "idx": i,
            }
            for i in range(start, stop)
        ]
        write_jsonl(folder / "superglue" / "RTE" / f"{jsonl}.jsonl", pairs)
    return folder


def arguments(data: Path, out: Path, *overrides: str) -> list[str]:
    """The arguments of a comparison on the publishers' files in `data`; `overrides` win."""
    given = [f"data.path={data}", "tasks=[sst2, rte]", f"output.dir={out}", "evaluation.bootstrap=50", *overrides]
    return ["--config", TINY, *(part for one in given for part in ("--set", one))]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells_of(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What read_results makes of the results, by label and task."""
    return {(one["label"], one["task"]): one for one in read_results(out / "results.jsonl")}


def lasting(record: dict[str, Any]) -> dict[str, Any]:
    """All but what the clock and the allocator decide."""
    kept = {key: value for key, value in record.items() if key not in WALL}
    if record["status"] == "ok":
        kept["curve"] = [[step, *rest] for step, _, *rest in record["curve"]]
    return kept


# ---- what runs on the ranks ----------------------------------------------------------------------------------------


def compare(argv: Sequence[str], broken: str | None = None) -> dict[str, Any]:
    """Run the command line on this rank; its exit code, what it printed, what it ran, and test examples in training.

    Args:
        broken: a method that runs out of memory after its first step.
    """
    from hift_ds.evaluation.compare import cell, command

    run, make_engine, train = cell.Cells.run, cell.make_engine, cell.train
    ran: list[Any] = []
    leaked: set[str] = set()
    failed: list[weakref.ref[Any]] = []  # engines and models of the method `broken`

    def spy(cells: Any, training: Any, data: Any) -> Any:
        assert not any(one() for one in failed)
        ran.append((training.row.label, training.entry.task.name, training.seed, training.rate, training.tune))
        tested = {one.fingerprint for one in data.test}
        leaked.update(tested & {one.fingerprint for one in (*data.train, *data.dev)})
        return run(cells, training, data)

    def failing(engine: Any, data: Any, padding: int, settings: Any, callbacks: Any) -> None:
        if settings.method.name == broken:
            failed.extend((weakref.ref(engine), weakref.ref(engine.module)))
            callbacks = [*callbacks, mock.Mock(spec=Callback, contribution=lambda number: 0.0, after_step=exhausted)]
        train(engine, data, padding, settings, callbacks)

    with mock.patch.object(cell, "train", failing) if broken else contextlib.nullcontext():
        found = _recorded(command, argv, ran, spy, make_engine)
    assert not any(one() for one in failed)
    return found | {"leaked": leaked, "failed": len(failed)}


def exhausted(*_: Any) -> bool:
    raise torch.OutOfMemoryError("out of\nmemory")


def fabricated(argv: Sequence[str], template: dict[str, Any], dev: dict[float, float]) -> dict[str, Any]:
    """The same with made-up runs: a rate's score on the test part is 1 less its score `dev`."""
    from hift_ds.evaluation.compare import cell, command

    ran: list[Any] = []

    def stub(cells: Any, training: Any, data: Any) -> Any:
        row, task, seed, rate, tune = training.row, training.entry.task, training.seed, training.rate, training.tune
        ran.append((row.label, task.name, seed, rate, tune))
        own = {"label": row.label, "method": row.method, "task": task.name, "seed": seed}
        own |= {"budget": str(training.budget)}
        own |= {"learning_rate": rate}
        return cell.Outcome(template | own | {"score": 1 - dev[rate]}, dev[rate] if tune else None)

    return _recorded(command, argv, ran, stub, cell.make_engine)


def constructed(
    argv: Sequence[str],
    right: dict[tuple[str, float], set[str]],
    losses: dict[tuple[str, float], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Run the command line with real trainings and made-up answers.

    Args:
        right: by method and learning rate, the prompts that are answered rightly; all others are answered wrongly.
        losses: by method and learning rate, the loss on the right answer to each prompt.
    """
    from hift_ds.evaluation.compare import cell
    from hift_ds.evaluation.tasks.scoring import Predictions

    train, trained = cell.train, []

    def noted(*arguments: Any) -> Any:
        settings = arguments[3]
        trained.append((settings.method.name, settings.training.learning_rate))
        return train(*arguments)

    def predict(task: Any, model: Any, tokenizer: Any, examples: Any, **options: Any) -> Predictions:
        known = right[trained[-1]]
        if task.max_new_tokens:
            return Predictions([one.completion if one.prompt in known else "?" for one in examples], 0)
        values = [one.label if one.prompt in known else 1 - one.label for one in examples]
        found = (losses or {}).get(trained[-1], {})
        return Predictions(values, 0, [found[one.prompt] for one in examples if one.prompt in found])

    def log_likelihoods(model: Any, tokenizer: Any, pairs: Any, *rest: Any) -> Any:
        found = (losses or {})[trained[-1]]
        return [-found[prompt] for prompt, _ in pairs], [False] * len(pairs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(cell, "train", noted))
        stack.enter_context(mock.patch.object(cell, "predict", predict))
        stack.enter_context(mock.patch.object(cell, "average_log_likelihoods", log_likelihoods))
        return compare(argv)


def _recorded(command: Any, argv: Sequence[str], ran: list[Any], run: Any, engine_of: Any) -> dict[str, Any]:
    from hift_ds.evaluation.compare import cell

    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(cell.Cells, "run", run))
        stack.enter_context(mock.patch.object(cell, "make_engine", engine_of))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        code = command.main(list(argv))
    return {"code": code, "printed": printed.getvalue(), "ran": ran}


class Killed(BaseException):
    """The process ends here: no handler of the program catches it."""


def interrupted(argv: Sequence[str], how: str) -> dict[str, Any]:
    """The same, ended in its first training, after the cell that trains nothing.

    Args:
        how: "killed": nothing that follows is done; "stopped": by a SIGTERM to this process.
    """
    from hift_ds.evaluation.compare import cell

    def train(*arguments: Any) -> Any:
        if how == "killed":
            raise Killed
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with mock.patch.object(cell, "train", train):
        try:
            return compare(argv)
        except Killed:
            return {"code": None}


def once(argv: Sequence[str], ranks: int = 1, function: Any = compare, **named: Any) -> dict[str, Any]:
    return run_on_ranks(ranks, function, argv, **named)[0]


def heavy(argv: Sequence[str], numel: int) -> dict[str, Any]:
    """The same, where predicting takes so many fp32 numbers."""
    from hift_ds.evaluation.compare import cell

    predict = cell.Cells._predict

    def spy(*arguments: Any) -> Any:
        torch.ones(numel).sum()
        return predict(*arguments)

    with mock.patch.object(cell.Cells, "_predict", spy):
        return compare(argv)


def without_java(argv: Sequence[str]) -> dict[str, Any]:
    """The same, where METEOR cannot be had."""
    with mock.patch("hift_ds.evaluation.tasks.metrics.shutil", mock.Mock(which=lambda name: None)):
        return compare(argv)


def without_a_plan(argv: Sequence[str]) -> dict[str, Any]:
    """The same, where the planner breaks."""
    with mock.patch("hift_ds.evaluation.compare.cell.planned_memory", side_effect=RuntimeError("no such kernel")):
        return compare(argv)


def environment_alone() -> dict[str, str]:
    """Of a process that no launcher has started."""
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def alone(code: str, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own."""
    environment = environment_alone()
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, timeout=500, text=True)
