"""Compare fine-tuning methods on tasks, over seeds and learning rates, in one process or under the launcher.

    python -m evaluation.compare --config configs/compare_NAME.yaml [--set KEY=VALUE]... [--only ROW...]
    deepspeed --num_gpus N --module hift_ds.evaluation.compare.command --config ...

A cell is a method on a task with one seed. The learning rate of a cell is the one with the best score on the validation
set; it is chosen with the first seed and kept for the others. The command writes into output.dir:

    runs.jsonl     one record per training, appended when it finishes
    results.jsonl  one record per cell, of the chosen learning rate
    report.md, report.html, plots/

The same command continues an interrupted comparison: it runs only what is missing.

Exit codes: 0 every cell has a result or does not apply, 1 some cells failed, 2 the settings need a change, 75 stopped
by SIGTERM or SIGINT, 76 another rank was lost.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from deepspeed import comm as dist
from tqdm import tqdm

from hift_ds.checkpoint.files import write_durably
from hift_ds.checkpoint.lock import Lock
from hift_ds.evaluation.compare.cell import Cells, Outcome, ran_out_of_memory
from hift_ds.evaluation.compare.settings import Budget, Comparison, Row, TaskEntry, load_comparison
from hift_ds.evaluation.cost.machine import machine
from hift_ds.evaluation.report.content import write_report
from hift_ds.evaluation.report.results import RESULTS, SETTINGS
from hift_ds.evaluation.report.wandb_report import log_report
from hift_ds.evaluation.tasks.loading import TaskData, load_seeds
from hift_ds.launch.config import credentials
from hift_ds.launch.errors import NotApplicable, UserError
from hift_ds.launch.exit_codes import RANK_LOST, STOPPED
from hift_ds.launch.runtime import extensions, logs, outputs
from hift_ds.launch.runtime.determinism import deterministic
from hift_ds.launch.runtime.process import Parser, report_mistake, run_process, world_of_one
from hift_ds.launch.runtime.ranks import RankWatch, check_same, decide, join, together

ATTEMPTS = 3  # give up on a cell after the process has died in it this often


class Runs:
    """The finished trainings by key, one line of runs.jsonl each. Rank 0 reads and writes the files for all ranks."""

    def __init__(self, folder: Path, rank: int):
        self.path, self.rank = folder / "runs.jsonl", rank
        self.begun_path = folder / "begun.jsonl"
        finished, begun = decide(lambda: (self._lines(self.path), self._lines(self.begun_path)))
        self.done = {run["key"]: run for run in finished}
        self.asked: set[str] = set()  # keys of the trainings that this command needs
        self.tries: Counter[str] = Counter()  # attempts of this command
        # How often the process died in a training: the training began, and no stop was recorded.
        self.deaths: Counter[str] = Counter()
        for line in begun:
            self.deaths[line["key"]] += -1 if line.get("stopped") else 1

    def begin(self, key: str) -> str:
        """Record that a training begins; return the name of this attempt for `RankWatch`."""
        self.tries[key] += 1
        self._append(self.begun_path, {"key": key})
        return f"{key} {self.tries[key]}"

    def stop(self, key: str) -> None:
        """Record that a training was stopped on purpose, so that it does not count as a death."""
        self._append(self.begun_path, {"key": key, "stopped": True})

    def add(self, key: str, run: dict[str, Any]) -> None:
        """Store a finished training."""
        self.done[key] = run
        self._append(self.path, {"key": key, **run})

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        """Read the complete lines of a file, and remove an incomplete last line, which a killed process leaves."""
        if not path.exists():
            return []
        whole, _, cut = path.read_text(encoding="utf-8").rpartition("\n")
        if cut:
            write_durably(path, whole + "\n" if whole else "")
        found = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise UserError(
                    f"{path}:{number}: broken JSON ({error}); delete the line, and its training runs again"
                ) from None
        return found

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        if self.rank == 0:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())


def compare(comparison: Comparison, rank: int, retry_failed: bool, watch: RankWatch) -> list[dict[str, Any]]:
    """Run what is missing, and return the records of all cells in the order of the settings."""
    world, remedy = dist.get_world_size(), "The same command continues with what is missing."
    for note in comparison.notes:
        logs.say(rank, note)
    watch.start(comparison.folder / outputs.LOGS, rank, world, comparison.rank_timeout, keep=True, remedy=remedy)
    runs = Runs(comparison.folder, rank)
    if runs.done:
        logs.say(rank, f"{runs.path}: {len(runs.done)} trainings are finished; this run does the missing ones")
    loaded = together(lambda: _load(comparison, watch.progress))
    hashes = {
        f"{entry.task.name} {part}, seed {seed}": data.report[part]["sha256"]
        for entry, by_seed in zip(comparison.tasks, loaded, strict=True)
        for seed, data in by_seed.items()
        for part in ("train", "dev", "test")
    }
    check_same("data", hashes, "Give every machine the same files.")
    for entry, parts in zip(comparison.tasks, loaded, strict=True):
        for note in dict.fromkeys(note for part in parts.values() for note in part.report["notes"]):
            logs.say(rank, f"{entry.task.name}: {note}")
    cells = Cells(comparison, machine(), watch.progress)
    by_task = {entry.task.name: parts.values() for entry, parts in zip(comparison.tasks, loaded, strict=True)}
    together(lambda: cells.check_tokens(by_task))
    records: list[dict[str, Any]] = []
    total = len(comparison.budgets) * len(comparison.tasks) * len(comparison.rows) * len(comparison.seeds)
    with tqdm(total=total, unit="cell", disable=None if rank == 0 else True, dynamic_ncols=True) as bar:
        for budget in comparison.budgets:
            for entry, parts in zip(comparison.tasks, loaded, strict=True):
                for row in comparison.rows:
                    bar.set_postfix_str(f"{entry.task.name}, {row.label}")
                    rates = row.learning_rates
                    for number, seed in enumerate(comparison.seeds):
                        tune = number == 0 and len(rates) > 1
                        trainings = [Training(row, entry, parts[seed], budget, seed, rate, tune) for rate in rates]
                        tried = [_one(cells, runs, watch, training, retry_failed) for training in trainings]
                        best = _best(tried)
                        own = ("key", "dev_score", "dev_loss")  # of runs, not of cells
                        record = {key: value for key, value in best.items() if key not in own}
                        if number == 0:
                            tuning = [
                                {
                                    "learning_rate": one.get("learning_rate"),
                                    "score": one.get("dev_score"),
                                    "loss": one.get("dev_loss"),
                                }
                                for one in tried
                            ]
                            rates = (best.get("learning_rate") or rates[0],) if best["status"] == "ok" else rates[:1]
                        records.append(record | {"tuning": tuning})
                        bar.update()
                        if rank == 0:
                            lines = "".join(json.dumps(one) + "\n" for one in records)
                            write_durably(comparison.folder / RESULTS, lines)
                            if bar.disable:
                                print(_line(records[-1]), flush=True)
    if others := len(runs.done.keys() - runs.asked):
        kept = f"{runs.path} has {others} more trainings, of other settings or rows"
        logs.say(rank, f"note: {kept}; {RESULTS} and the report leave them out")
    return records


@dataclass(frozen=True)
class Training:
    """One training: everything that decides its result."""

    row: Row
    entry: TaskEntry
    data: TaskData
    budget: Budget
    seed: int
    rate: float
    tune: bool  # whether to score it on the validation set too

    def key(self, cells: Cells) -> str:
        """Hash everything that decides the result. A stored training is reused only if all of it is the same."""
        comparison = cells.comparison
        training = {key: value for key, value in self.row.sections["training"].items() if key != "rank_timeout"}
        parts = {
            "model": cells.model_identity,
            "method": self.row.method,
            "sections": self.row.sections | {"training": training},
            "shots": self.row.shots if self.row.method == "icl" else None,
            "task": self.entry.task.name,
            "data": {part: self.data.report[part]["sha256"] for part in ("train", "dev", "test")},
            "max_length": comparison.data.max_length,
            "budget": str(self.budget) if self.row.trained else None,
            "seed": self.seed,
            "learning_rate": self.rate,
            "tune": self.tune,
            "bootstrap": comparison.evaluation.bootstrap,
            "ranks": dist.get_world_size(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _one(cells: Cells, runs: Runs, watch: RankWatch, one: Training, retry_failed: bool) -> dict[str, Any]:
    """Return the stored record of a training, or run it and store its record."""
    key, task = one.key(cells), one.entry.task
    runs.asked.add(key)
    known = runs.done.get(key)
    if known is not None and not (retry_failed and known["status"] == "failed"):
        return known | {"label": one.row.label, "budget": str(one.budget)}  # several rows may share a run

    def not_run(status: str, reason: str, out_of_memory: bool = False) -> dict[str, Any]:
        return cells.not_run(one.row, task, one.budget, one.seed, status, reason, out_of_memory)

    if (reason := cells.why_not(one.row, task)) is not None:
        run = not_run("not_applicable", reason)
    elif runs.deaths[key] >= ATTEMPTS and not retry_failed:
        run = not_run("failed", f"the process died {ATTEMPTS} times in this cell without a message (out of memory?)")
    else:
        name = runs.begin(key)
        train = functools.partial(cells.run, one.row, task, one.data, one.budget, one.seed, one.rate, one.tune)
        try:
            run = _guarded(train, not_run, watch, name)
        except KeyboardInterrupt:
            # Otherwise the launcher ends this rank because another one has exited.
            if not watch.any_fails(f"{name} ") and not watch.any_lost():
                runs.stop(key)
            watch.stop()
            raise
    run |= {"learning_rate": one.rate or None}
    runs.add(key, run)
    return run


def _guarded(
    run: Callable[[], Outcome], not_run: Callable[..., dict[str, Any]], watch: RankWatch, name: str
) -> dict[str, Any]:
    """Run a training and return its record, also if it fails.

    Raises:
        Exception: only this rank failed. The others wait in a collective, so the comparison cannot go on.
    """
    began = time.monotonic()
    try:
        outcome = run()
        return outcome.record | {"dev_score": outcome.dev_score, "dev_loss": outcome.dev_loss}
    except Exception as error:
        place = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        place_hash = hashlib.sha256(repr(place).encode()).hexdigest()[:16]
        if not watch.fails_everywhere(f"{name} {place_hash}", time.monotonic() - began, error):
            print("error: only some ranks failed; the same command tries this cell again", file=sys.stderr)
            raise
        if isinstance(error, NotApplicable):
            return not_run("not_applicable", str(error))
        if isinstance(error, UserError):
            return not_run("failed", str(error), ran_out_of_memory(error))
        print(credentials.redacted(traceback.format_exc()), file=sys.stderr, flush=True)
        reason = credentials.redacted(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return not_run("failed", reason[:500], ran_out_of_memory(error))


def _best(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the run with the best validation score, of equal ones that with the least loss; if none is ok, the first.

    Runs of earlier versions have no loss; a loss that is not a number counts as the greatest.
    """
    ok = [run for run in tried if run["status"] == "ok"]
    scored = [run for run in ok if run.get("dev_score") is not None and run["dev_score"] == run["dev_score"]]

    def rank(run: dict[str, Any]) -> tuple[float, float]:
        loss = run.get("dev_loss")
        return run["dev_score"], -loss if loss is not None and loss == loss else -math.inf

    return max(scored, key=rank) if scored else (ok or list(tried))[0]


def _load(comparison: Comparison, progress: Callable[[], object]) -> list[dict[int, TaskData]]:
    """Load the data of each task by seed, before any training.

    Raises:
        UserError: with the problems of all tasks.
    """
    problems = []
    loaded: list[dict[int, TaskData]] = []
    for entry in comparison.tasks:
        given = {"seeds": comparison.seeds, "revision": entry.revision, **comparison.sizes(entry)}
        try:
            loaded.append(load_seeds(entry.task, entry.path, **given))
            progress()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return loaded


def _line(record: dict[str, Any]) -> str:
    head = f"{record['budget']}, {record['task']}, {record['label']}, seed {record['seed']}"
    if record["status"] != "ok":
        return f"{head}: {record['status']} ({record['reason']})"
    score = f"{record['metric']} {100 * record['score']:.1f} %"
    return f"{head}: {score}, {record['steps']} steps, {record['seconds']:.1f} s"


def _claim(comparison: Comparison) -> Lock:
    """Make the output folder with its settings, and keep other commands out of it."""
    lock = outputs.claim(comparison.folder)
    (comparison.folder / SETTINGS).write_text(json.dumps(comparison.as_dict(), indent=1) + "\n")
    return lock


def run(arguments: argparse.Namespace, watch: RankWatch) -> int:
    """Load the settings, run the comparison and write its report; return the exit code."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    comparison = load_comparison(arguments.config, arguments.set, world, arguments.only)
    logs.quieten(comparison.logging, rank)
    extensions.prepare(rank)
    join(comparison.rank_timeout)
    check_same("settings", comparison.as_dict(), "Start them all with the same command and the same YAML.")
    locks: list[Lock] = []  # rank 0's
    decide(lambda: locks.append(_claim(comparison)))
    wanted = any(row.sections["training"].get("deterministic") for row in comparison.rows)
    with deterministic(wanted):  # one setting for all rows: the accelerator is set up once
        records = compare(comparison, rank, arguments.retry_failed, watch)
    if rank == 0:
        write_report(records, comparison.folder, comparison.title)
        if comparison.logging.wandb != "off":
            logging = comparison.logging
            log_report(
                records,
                comparison.folder,
                comparison.title,
                mode=logging.wandb,
                project=logging.wandb_project,
                name=logging.wandb_name,
                config=comparison.as_dict(),
            )
        counts = {
            status: sum(one["status"] == status for one in records) for status in ("ok", "not_applicable", "failed")
        }
        print(f"{counts['ok']} cells ok, {counts['not_applicable']} not applicable, {counts['failed']} failed")
        print(f"report             {comparison.folder / 'report.md'}, {comparison.folder / 'report.html'}")
    for lock in locks:
        lock.release()
    return int(any(one["status"] == "failed" for one in records))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return its exit code."""
    world_of_one()
    parser = Parser(
        prog="hift-compare" if Path(sys.argv[0]).name == "hift-compare" else "python -m evaluation.compare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the YAML of the comparison, e.g. configs/compare_tiny.yaml")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting; repeatable")
    add("--only", nargs="+", default=[], metavar="ROW", help="run only the rows with these labels or methods")
    add("--retry-failed", action="store_true", help="run failed cells again")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as SIGINT: KeyboardInterrupt
    try:
        with RankWatch() as watch:
            try:
                return run(parser.parse_args(argv), watch)
            except UserError as error:
                mistake = error
            except Exception as error:
                if not watch.blame(error):
                    raise
                return RANK_LOST
        return report_mistake(mistake)
    except KeyboardInterrupt:
        logs.say(
            int(os.environ["RANK"]),
            "stopped; finished trainings are kept, and the same command continues. For a report on the finished "
            "cells: python -m evaluation.report OUT",
        )
        return STOPPED
    finally:
        signal.signal(signal.SIGTERM, earlier)


def command() -> NoReturn:
    """The process of ``python -m evaluation.compare``: `main`, then its exit."""
    run_process(main)
