"""Compare fine-tuning methods on tasks, over seeds and learning rates, in one process or under the launcher.

    python -m evaluation.compare --config configs/compare_NAME.yaml [--set KEY=VALUE]... [--only ROW...]
        [--jobs N] [--minutes M] [--dry-run]
    deepspeed --num_gpus N --module hift_ds.evaluation.compare.command --config ...

A cell is a method on a task with one seed. The learning rate of a cell is the one with the best score on the validation
set; it is chosen with the first seed and kept for the others. The first seed of all methods comes before the second
one. The command writes into output.dir:

    runs.jsonl        one record per training, appended when it finishes
    step_times.jsonl  seconds a step, timed alone, for budgets in seconds and for trainings that share a device
    results.jsonl     one record per cell, of the chosen learning rate
    report.md, report.html, plots/

The same command continues an interrupted comparison: it runs only what is missing. With --dry-run, every cell takes its
first steps instead, and nothing is written to output.dir.

Exit codes: 0 every cell has a result or does not apply, 1 some cells failed, 2 the settings need a change, 75 stopped
by --minutes, SIGTERM or SIGINT, 76 another rank was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
from tqdm import tqdm

from hift_ds import collectives
from hift_ds.checkpoint.files import write_durably
from hift_ds.checkpoint.lock import Lock
from hift_ds.evaluation.compare.cell import Cells
from hift_ds.evaluation.compare.dry_run import cells_text
from hift_ds.evaluation.compare.jobs import Job, Sets, Timing
from hift_ds.evaluation.compare.processes import Died, Place, Processes, ThisProcess, without_shared_locks
from hift_ds.evaluation.compare.runs import ATTEMPTS, Runs
from hift_ds.evaluation.compare.settings import Comparison, dry, load_comparison
from hift_ds.evaluation.compare.table import Identity, Table
from hift_ds.evaluation.cost.machine import machine
from hift_ds.evaluation.report.content import write_report
from hift_ds.evaluation.report.results import RESULTS, SETTINGS
from hift_ds.evaluation.report.wandb_report import log_report
from hift_ds.evaluation.tasks.loading import TaskData, load_seeds
from hift_ds.launch.errors import UserError
from hift_ds.launch.exit_codes import RANK_LOST, STOPPED
from hift_ds.launch.runtime import extensions, logs, outputs
from hift_ds.launch.runtime.determinism import deterministic
from hift_ds.launch.runtime.process import Parser, report_mistake, run_process, world_of_one
from hift_ds.launch.runtime.ranks import RankWatch, check_same, decide, join, together

FOR_THE_REPORT = 20.0  # seconds of --minutes that are left for the report


class OutOfTime(KeyboardInterrupt):
    """The minutes of --minutes are over."""


def prepare(
    comparison: Comparison, rank: int, arguments: argparse.Namespace, watch: RankWatch
) -> tuple[Table, Cells, Place]:
    """Load the data and what has been done; return the table, and what runs the missing trainings."""
    world, remedy = collectives.world_size(), "The same command continues with what is missing."
    watch.start(comparison.folder / outputs.LOGS, rank, world, comparison.rank_timeout, keep=True, remedy=remedy)
    say = functools.partial(logs.say, rank)
    for note in comparison.notes:
        say(note)
    runs = Runs(comparison.folder, rank)
    if runs.done:
        say(f"{runs.path}: {len(runs.done)} trainings are finished; this run does the missing ones")
    data = _loaded(comparison, watch.progress, say)
    cells = Cells(comparison, machine(), watch.progress, say)
    together(lambda: cells.check_tokens({name: by_seed.values() for name, by_seed in data.items()}))
    beside = arguments.jobs > 1
    place: Place = Processes(arguments.jobs, comparison, data, say) if beside else ThisProcess(cells, data, watch)
    given = Identity(cells.model_identity, cells.machine, world)
    table = Table(comparison, data, runs, given, beside=beside, retry_failed=arguments.retry_failed)
    return table, cells, place


def run_missing(table: Table, cells: Cells, place: Place, watch: RankWatch, until: float) -> bool:
    """Run the jobs that are missing, as many at a time as `place` has room for; write the records of finished cells.

    Args:
        until: when to stop, as `time.time()`.

    Returns:
        Whether the table is finished, and not the time.
    """
    runs = table.runs
    running: dict[str, tuple[str, Job, float]] = {}  # by the name of the attempt: key, job, and when it began
    seconds: dict[tuple[str, str, bool], float] = {}  # of the last such job

    def fits(job: Job) -> bool:
        return until == math.inf or time.time() + seconds.get(_kind(job), 0.0) < until

    def start_next() -> bool:
        """Start the next job, if one can start now."""
        if not place.free or any(job.alone for _, job, _ in running.values()):
            return False
        found = table.next([key for key, _, _ in running.values()], fits)
        if found is None or (found[1].alone and running):
            return False
        key, job = found
        if (record := _without_running(cells, table, key, job)) is not None:
            runs.add(key, job, record)
        else:
            name = runs.begin(key)
            running[name] = key, job, time.time()
            place.start(name, job)
        return True

    try:
        with _Progress(table) as progress, _alarm(until):
            while True:
                progress.show([job for _, job, _ in running.values()])
                if start_next():
                    continue
                if not running:
                    break
                for name, outcome in place.finished():
                    key, job, began = running.pop(name)
                    if isinstance(outcome, Died) or outcome.get("out_of_memory"):
                        why = f"its process died ({outcome})" if isinstance(outcome, Died) else "out of memory"
                        if not job.alone:
                            runs.leave_alone(key)
                            logs.warn(f"{job}: {why}; it is tried again without other trainings")
                            continue
                    if isinstance(outcome, Died):
                        runs.deaths[key] += 1
                        logs.warn(f"{job}: its process died ({outcome})")
                    else:
                        seconds[_kind(job)] = time.time() - began
                        runs.add(key, job, outcome)
                        if isinstance(job, Timing) and outcome["status"] == "ok":
                            progress.say(f"{job}: {outcome['later']:.3g} s a step")
    except (KeyboardInterrupt, UserError) as interrupt:
        # Otherwise the launcher ends this rank because another one has exited.
        if not any(watch.any_fails(f"{name} ") for name in running) and not watch.any_lost():
            for key, _, _ in running.values():
                runs.stop(key)
        watch.stop()
        if not isinstance(interrupt, OutOfTime):
            raise
    finally:
        place.stop()
    return len(table.records()) == table.total()


class _Progress:
    """Writes the records of finished cells and shows them; a context, at whose end all are written."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._shown: set[tuple[Any, ...]] | None = None  # None: nothing has been written
        disable = None if table.runs.rank == 0 else True
        self._bar = tqdm(total=table.total(), unit="cell", disable=disable, dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.show([])
        self._bar.close()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._table.runs.rank == 0:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def show(self, running: Sequence[Job]) -> None:
        """Write the records if some are new, and show them and the jobs that run."""
        self._bar.set_postfix_str("; ".join(map(str, running)))
        records = self._table.records()
        if self._table.runs.rank != 0 or (self._shown is not None and len(records) == len(self._shown)):
            return
        self._shown = self._shown or set()
        write_durably(self._table.comparison.folder / RESULTS, "".join(json.dumps(one) + "\n" for one in records))
        for record in records:
            name = tuple(record[key] for key in ("budget", "task", "label", "seed"))
            if name not in self._shown:
                self._shown.add(name)
                self._bar.update()
                if self._bar.disable:
                    self.say(_line(record))


def _kind(job: Job) -> tuple[str, str, bool]:
    """Name jobs that take about as long as each other."""
    return job.row.label, job.entry.task.name, isinstance(job, Timing)


def _without_running(cells: Cells, table: Table, key: str, job: Job) -> dict[str, Any] | None:
    """Return the record of a job that cannot run, or None."""
    if (why := cells.why_not(job.row, job.entry.task)) is not None:
        status, reason = "not_applicable", why
    elif table.runs.deaths[key] >= ATTEMPTS and not (table.retry_failed and table.runs.tries[key] < ATTEMPTS):
        status = "failed"
        reason = f"the process died {ATTEMPTS} times in this cell without a message (out of memory?)"
    elif not isinstance(job, Timing) and (untimed := table.why_untimed(job)) is not None:
        status, reason = untimed["status"], untimed["reason"]
    else:
        return None
    if isinstance(job, Timing):
        return {"status": status, "reason": reason}
    return cells.not_run(job, status, reason)


def _loaded(comparison: Comparison, progress: Callable[[], object], say: Callable[[str], None]) -> Sets:
    """Load the data of each task by seed, before any training; check that the ranks have the same.

    Raises:
        UserError: with the problems of all tasks.
    """
    loaded = together(lambda: _load(comparison, progress))
    hashes = {
        f"{name} {part}, seed {seed}": sets.report[part]["sha256"]
        for name, by_seed in loaded.items()
        for seed, sets in by_seed.items()
        for part in ("train", "dev", "test")
    }
    check_same("data", hashes, "Give every machine the same files.")
    for name, by_seed in loaded.items():
        for note in dict.fromkeys(note for sets in by_seed.values() for note in sets.report["notes"]):
            say(f"{name}: {note}")
    return loaded


def _load(comparison: Comparison, progress: Callable[[], object]) -> dict[str, dict[int, TaskData]]:
    problems = []
    loaded: dict[str, dict[int, TaskData]] = {}
    for entry in comparison.tasks:
        given = {"seeds": comparison.seeds, "revision": entry.revision, **comparison.sizes(entry)}
        try:
            loaded[entry.task.name] = load_seeds(entry.task, entry.path, **given)
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


def run(arguments: argparse.Namespace, watch: RankWatch, began: float) -> int:
    """Load the settings, run the comparison or its first steps; return the exit code.

    Args:
        began: when the minutes of --minutes began, as `time.time()`.
    """
    world = int(os.environ["WORLD_SIZE"])
    _check(arguments, world)
    comparison = load_comparison(arguments.config, arguments.set, world, arguments.only)
    if not arguments.dry_run:
        return _run(comparison, arguments, watch, began)
    with tempfile.TemporaryDirectory(prefix="hift-dry-run-") as folder:
        return _run(dry(comparison, Path(folder)), arguments, watch, began)


def _run(comparison: Comparison, arguments: argparse.Namespace, watch: RankWatch, began: float) -> int:
    """Run the comparison and write its report; return the exit code."""
    rank = int(os.environ["RANK"])
    logs.quieten(comparison.logging, rank)
    extensions.prepare(rank)
    if arguments.jobs == 1:  # otherwise the processes that train join groups of their own
        join(comparison.rank_timeout)
    check_same("settings", comparison.as_dict(), "Start them all with the same command and the same YAML.")
    locks: list[Lock] = []  # rank 0's
    decide(lambda: locks.append(_claim(comparison)))
    until = began + 60 * arguments.minutes - FOR_THE_REPORT
    with deterministic(comparison.deterministic and arguments.jobs == 1):
        table, cells, place = prepare(comparison, rank, arguments, watch)
        is_finished = run_missing(table, cells, place, watch, until)
    records = table.records()
    if rank == 0:
        if arguments.dry_run:
            write_report(records, comparison.folder, comparison.title)
            print(cells_text(records, table.total()))
        else:
            _report(comparison, records)
        if others := len(table.runs.done.keys() - table.asked):
            kept = f"{table.runs.path} has {others} more trainings, of other settings or rows"
            print(f"note: {kept}; {RESULTS} and the report leave them out")
        if not is_finished:
            done = f"{len(records)} of {table.total()} cells are finished"
            advice = "the same command continues" if records else "give more minutes; a start takes some of them"
            print(f"stopped, to have the report within {arguments.minutes:g} minutes: {done}; {advice}")
    for lock in locks:
        lock.release()
    if not is_finished:
        return STOPPED
    return int(any(one["status"] == "failed" for one in records))


def _check(arguments: argparse.Namespace, world: int) -> None:
    problems = [] if arguments.jobs >= 1 else [f"--jobs: got {arguments.jobs}; expected 1 or more"]
    if arguments.jobs > 1 and world > 1:
        problems.append(f"--jobs: got {arguments.jobs}; with {world} ranks, one cell runs at a time; remove --jobs")
    if arguments.minutes != math.inf and world > 1:
        problems.append(f"--minutes: got {arguments.minutes:g}; with {world} ranks, SIGTERM stops; remove --minutes")
    if not 60 * arguments.minutes > FOR_THE_REPORT:
        problems.append(
            f"--minutes: got {arguments.minutes:g}; expected more than {FOR_THE_REPORT / 60:.2g}, the time kept for "
            "the report, and that of a start; try 3"
        )
    if arguments.dry_run and world > 1:
        problems.append(f"--dry-run: it runs on one rank, and there are {world}; run it without the launcher")
    if problems:
        raise UserError("\n".join(problems))


def _report(comparison: Comparison, records: list[dict[str, Any]]) -> None:
    write_report(records, comparison.folder, comparison.title)
    logging = comparison.logging
    if logging.wandb != "off":
        log_report(
            records,
            comparison.folder,
            comparison.title,
            mode=logging.wandb,
            project=logging.wandb_project,
            name=logging.wandb_name,
            config=comparison.as_dict(),
        )
    counts = {status: sum(one["status"] == status for one in records) for status in ("ok", "not_applicable", "failed")}
    print(f"{counts['ok']} cells ok, {counts['not_applicable']} not applicable, {counts['failed']} failed")
    print(f"report             {comparison.folder / 'report.md'}, {comparison.folder / 'report.html'}")


@contextlib.contextmanager
def _alarm(until: float) -> Iterator[None]:
    """Raise `OutOfTime` in this thread at a time of `time.time()`."""

    def ring(*_: Any) -> NoReturn:
        raise OutOfTime

    if until == math.inf:
        yield
        return
    earlier = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, until - time.time()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def main(argv: Sequence[str] | None = None, began: float | None = None) -> int:
    """Run the command line `argv` and return its exit code.

    Args:
        began: when the minutes of --minutes began, as `time.time()`; None = now.
    """
    began = time.time() if began is None else began
    without_shared_locks()
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
    jobs = "trainings at a time, each in a process, which share the device (default: %(default)s)"
    add("--jobs", type=int, default=1, metavar="N", help=jobs)
    minutes = "stop in time to have a report after M minutes; the same command continues"
    add("--minutes", type=float, default=math.inf, metavar="M", help=minutes)
    dry_run = "the first steps and answers of every cell, with the real model and data, in a temporary folder"
    add("--dry-run", action="store_true", help=dry_run)
    add("--retry-failed", action="store_true", help="run failed cells again")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as SIGINT: KeyboardInterrupt
    try:
        with RankWatch() as watch:
            try:
                return run(parser.parse_args(argv), watch, began)
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
    # The imports before this line take seconds, which count.
    run_process(lambda: main(began=psutil.Process().create_time()))
