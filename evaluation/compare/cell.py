"""Run one cell of a comparison: train a method on a task with one seed and learning rate, then evaluate it.

All ranks run a cell together and return the same record, except for times and memory. Rank 0's record is stored.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import gc
import math
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from hift_ds import collectives
from hift_ds.blocks.block import numel_of
from hift_ds.evaluation.compare.jobs import Training
from hift_ds.evaluation.compare.planned_memory import planned_memory
from hift_ds.evaluation.compare.settings import Comparison, Row
from hift_ds.evaluation.compare.step_times import MOST_STEPS, StepClock
from hift_ds.evaluation.cost.flops import step_flops, trained_names
from hift_ds.evaluation.cost.process_memory import peak_memory
from hift_ds.evaluation.cost.spent import Spent, process_age
from hift_ds.evaluation.report.resampling import bootstrap_means, bootstrap_scores, interval, resamples
from hift_ds.evaluation.tasks import metrics
from hift_ds.evaluation.tasks.catalog import Task, TaskExample
from hift_ds.evaluation.tasks.loading import TaskData, classification_rows, few_shot, training_rows
from hift_ds.evaluation.tasks.scoring import Predictions, average_log_likelihoods, classify, predict
from hift_ds.launch.callbacks.callback import Callback, Step
from hift_ds.launch.callbacks.skipped import SkippedSteps
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.cuts import cut_of, lr_factor
from hift_ds.launch.data.encoding import EvalExample, encode
from hift_ds.launch.data.loading import Data
from hift_ds.launch.errors import UserError
from hift_ds.launch.learning_rates import low_rate_warning
from hift_ds.launch.loop import train
from hift_ds.launch.make_engine import check_reach, cycle_steps, find_blocks, make_engine, schedule_ticks
from hift_ds.launch.methods.adapters import trained_parameters
from hift_ds.launch.methods.table import METHODS
from hift_ds.launch.model import loading
from hift_ds.launch.model.limits import token_problems
from hift_ds.launch.runtime import logs, summary
from hift_ds.launch.runtime.determinism import deterministic, seed_generators
from hift_ds.model.positions import position_limit
from hift_ds.model.reach import unreached_by_text

PLANNED_TOKENS = 32
POINTS = 200  # at most about so many points of a loss curve are stored


@dataclass
class Outcome:
    """The result of one training.

    Attributes:
        record: the cell's record for results.jsonl.
        dev_score: the score on the validation set, by which the learning rate is chosen; higher is better.
        dev_loss: the mean loss on the right answers there (nats), which decides between equal scores.
    """

    record: dict[str, Any]
    dev_score: float | None = None
    dev_loss: float | None = None


class Cells:
    """Runs the cells of a comparison. The tokenizer and pretrained weights are loaded once for all cells.

    Args:
        machine: a description of the machine for the records.
        progress: called after each training step and each evaluated batch.
        say: prints a note; each note is said once, not for each cell.
    """

    def __init__(
        self, comparison: Comparison, machine: str, progress: Callable[[], object], say: Callable[[str], object]
    ):
        self.comparison, self.progress = comparison, progress
        self.spent = Spent()  # of the next or present cell; of the first one with the start of the process
        self.spent.add("start", process_age())
        with self.spent.part("tokenizer"):
            self.tokenizer = loading.load_tokenizer(comparison.model)
        self.versions = summary.versions()
        self.machine = machine
        rank0 = collectives.rank() == 0  # copies on other machines may have additional files next to the weights
        self.model_identity = collectives.gather(loading.identity(comparison.model) if rank0 else None)[0]
        self._loaded: dict[str, Any] = {}
        self._say = functools.cache(say)
        self._is_warm = False  # whether this process has taken a step
        self._plans: dict[Any, dict[str, int] | None] = {}
        self._configs: dict[int | None, Any] = {}
        self._encoded: dict[tuple[str, str], tuple[list[Any], dict[str, Any]]] = {}
        self.classifies = comparison.model.task == "sequence-classification"

    @functools.cached_property
    def _skeleton(self) -> Any:
        """The model on the meta device."""
        return loading.skeleton(self.comparison.model, self._config(None))

    @functools.cached_property
    def _unreached(self) -> list[str]:
        """The parameters that the loss does not depend on; [] if the model cannot tell without data."""
        limits = (self.comparison.data.max_length, position_limit(self._skeleton).tokens)
        return unreached_by_text(copy.deepcopy(self._skeleton), min(filter(None, limits))) or []

    def check_tokens(self, data: Mapping[str, Iterable[TaskData]]) -> None:
        """Refuse tasks (by name) whose texts have tokens that the model does not have, before anything is trained.

        Raises:
            UserError: naming every such task.
        """
        notes: list[str] = []
        parts = {f"texts of {name}": self._tokens(sets) for name, sets in data.items()}
        if problems := token_problems(self._skeleton, self.tokenizer, parts, notes):
            raise UserError("\n".join(problems))
        for note in notes:
            self._say(note)

    def _tokens(self, data: Iterable[TaskData]) -> Iterator[list[int]]:
        examples = (one for sets in data for part in (sets.train, sets.dev, sets.test) for one in part)
        for texts in dict.fromkeys((*one.content, one.completion, one.text, one.text_pair or "") for one in examples):
            yield self.tokenizer(" ".join(texts), add_special_tokens=False).input_ids

    def run(self, training: Training, data: TaskData) -> Outcome:
        """Train on the training set and evaluate on the test set; with `tune`, evaluate on the validation set too.

        Args:
            data: the sets of the training's task and seed.

        Raises:
            NotApplicable: the method does not apply to the model or the task.
        """
        try:
            with self.spent.part("other"), freed():
                outcome = self._run(training, data)
            outcome.record["spent"] = {name: round(seconds, 3) for name, seconds in self.spent.seconds.items()}
            return outcome
        finally:
            self.spent = Spent()

    def _run(self, training: Training, data: TaskData) -> Outcome:
        row, task, seed, rate, tune = training.row, training.entry.task, training.seed, training.rate, training.tune
        times = training.times if training.beside else None  # if others run meanwhile, the record has the times alone
        world, spent = dist.get_world_size(), self.spent
        settings = self.comparison.run_settings(row, training.steps, seed, rate, world) if row.trained else None
        dtype = _dtype(row) if settings is None else settings.dtype
        if not self._made_anew:
            self._pretrained(dtype)  # load before memory is measured and random numbers are drawn
        seed_generators(seed)
        notes = list(data.report["notes"])
        shown = data.demonstrations(min(row.shots, len(data.train)), seed) if row.method == "icl" else []
        if row.method == "icl" and len(shown) < row.shots:
            notes.append(f"{row.label}: only {len(shown)} demonstrations, because there are no more training examples")
        with contextlib.ExitStack() as engines, contextlib.ExitStack() as measuring:
            peak = measuring.enter_context(peak_memory())
            if settings is not None:
                engine, measured, encoded = self._train(settings, task, data, engines)
                measured = times.as_alone(measured) if times else measured
                measuring.close()  # the peak of training; methods without training report the peak of evaluation
                with spent.part("plan"):
                    measured["planned_memory"] = self._planned(row, settings, task, encoded["longest"])
                if left_out := encoded["skipped_no_target"]:
                    length = self.comparison.data.max_length
                    notes.append(
                        f"{left_out} training examples were left out: no trained token within data.max_length {length}"
                    )
                notes += [f"{row.label}: {remark}" for remark in encoded["remarks"] if remark]
                if measured["steps"] < (cycle := cycle_steps(engine, settings)):
                    notes.append(f"{row.label}: some blocks were not trained, because a cycle takes {cycle} steps")
                model = engine.module
            else:
                measured, encoded = _untrained(), {"truncated": 0}
                model = self._model(task, dtype).to(get_accelerator().current_device_name())
            with spent.part("validation"):
                validated = self._validate(task, model, data.dev, shown) if tune and data.dev else (None, None)
            with spent.part("test"):
                tested = self._predict(task, model, data.test, shown)
            total = sum(numel_of(p) for p in model.parameters())
        with spent.part("scores"):
            scores = self._scores(task, data.test, tested.values, tested.losses)
        record = {
            **_identity(training, self.comparison.model_name),
            "status": "ok",
            "reason": None,
            **scores,
            **measured,
            "seconds_are": "timed alone" if times else "measured",
            "truncated": {"train": encoded["truncated"], "test": tested.truncated},
            "unanswered": task.unanswered(tested.values) if task.max_new_tokens and not self.classifies else None,
            "test_cut": "end" if self.classifies else "beginning",
            "total_parameters": total,
            "peak_memory": peak.above,
            "peak_memory_kind": peak.kind,
            "learning_rate": rate or None,
            "versions": self.versions,
            "git": self.versions["git"],
            "data_sha256": {part: data.report[part]["sha256"] for part in ("train", "dev", "test")},
            "ranks": world,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": self.machine,
        }
        missing = [name for name in task.metrics if name not in record["metrics"]]
        record["notes"] = notes + [f"{name} is missing: {metrics.MISSING[name]}" for name in missing]
        if tested.losses:
            record["metrics"]["answer_loss"] = statistics.fmean(tested.losses)
        return Outcome(record, *validated)

    def not_run(self, training: Training, status: str, reason: str, out_of_memory: bool = False) -> dict[str, Any]:
        """Return the record of a training without a result.

        Args:
            out_of_memory: see `ran_out_of_memory`. Such a training may succeed when it has the device for itself.
        """
        identity = _identity(training, self.comparison.model_name) | {"learning_rate": training.rate or None}
        told = {"status": status, "reason": reason, "out_of_memory": out_of_memory}
        return {**identity, **told, "versions": self.versions, "machine": self.machine}

    def why_not(self, row: Row, task: Task) -> str | None:
        """Return why a method does not apply to a task with this kind of model, or None if it applies."""
        if self.classifies and not task.labels:
            return f"{task.name} has no classes for the model's classification head"
        if not self.classifies and not task.prompted:
            return f"{task.name} has no prompt; it needs a model with a classification head"
        if self.classifies and not row.trained:
            return "a new classification head has random weights and must be trained"
        return None

    def time_steps(self, row: Row, task: Task, data: TaskData) -> dict[str, Any]:
        """Time the steps of a method on a task, and return the record of the timing. No other training may run.

        Raises:
            NotApplicable: the method does not apply to the model or the task.
        """
        world, rate = dist.get_world_size(), row.learning_rates[0]
        settings = self.comparison.run_settings(row, MOST_STEPS, self.comparison.seeds[0], rate, world)
        if not self._made_anew:
            self._pretrained(settings.dtype)
        seed_generators(settings.training.seed)
        clocks: list[StepClock] = []

        def clock(engine: Any) -> list[StepClock]:
            enough = max(one.seconds or math.inf for one in self.comparison.budgets)
            clocks.append(StepClock(cycle_steps(engine, settings) or 1, enough))
            return clocks

        kept, self.spent = self.spent, Spent()  # what the next cell spends is not spent here
        try:
            if not self._is_warm:  # the first step of a process also loads kernels
                self._is_warm = True
                once = self.comparison.run_settings(row, 1, self.comparison.seeds[0], rate, world)
                with freed(), contextlib.ExitStack() as engines:
                    self._train(once, task, data, engines)
            with freed(), contextlib.ExitStack() as engines:
                self._train(settings, task, data, engines, clock)
        finally:
            self.spent = kept
        times = collectives.gather(clocks[0].times())[0]
        about = {"label": row.label, "task": task.name, "machine": self.machine}
        return {"status": "ok", "reason": None, **about, "first": list(times.first), "later": times.later}

    def _train(
        self,
        settings: Settings,
        task: Task,
        data: TaskData,
        engines: contextlib.ExitStack,
        more: Callable[[Any], Sequence[Callback]] = lambda engine: (),
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Train, and return the engine, the measurements, and the counts of `encode` with `longest` and `remarks`.

        Args:
            engines: destroys the engine when it is closed.
            more: makes callbacks for an engine.
        """
        spent = self.spent
        with spent.part("encoding"):
            examples, report = self._training_examples(task, data)
        model = self._model(task, settings.dtype)
        with spent.part("engine"):
            blocks = find_blocks(settings, model)
            ticks = schedule_ticks(settings, blocks)
            settings = settings.for_model(model.config, ticks)
            reach = check_reach(settings, blocks, model, self._unreached)
            engine = make_engine(model, settings, lr_factor(settings, [cut_of(settings, len(blocks))]), self._unreached)
            engines.push(functools.partial(_destroy, engine))
        recorder = _Recorder(engine, settings, self.progress)
        only_train = Data(list(examples), [], report, None)
        callbacks = [recorder, SkippedSteps(engine, settings), *more(engine)]
        with deterministic(settings.training.deterministic), spent.part("around steps"):
            train(engine, only_train, self.tokenizer.pad_token_id, settings, callbacks)
            spent.add("training", sum(record["seconds"] for record in recorder.records))
        warning = low_rate_warning(settings, ticks, cycle_steps(engine, settings) or 1)
        longest = max(len(one.input_ids) for one in examples)
        return engine, recorder.measured(), report | {"longest": longest, "remarks": [warning, reach]}

    def _training_examples(self, task: Task, data: TaskData) -> tuple[list[EvalExample], dict[str, Any]]:
        """Tokenize a training set, once for all methods and rates; return what `encode` returns."""
        key = task.name, data.report["train"]["sha256"]
        if key not in self._encoded:
            rows = classification_rows(data.train) if self.classifies else training_rows(data.train)
            labels, length = list(task.labels) if self.classifies else None, self.comparison.data.max_length
            options: dict[str, Any] = {"labels": labels, "template": False, "question": False, "max_length": length}
            examples, report = encode(rows, self.tokenizer, **options)
            if not examples:
                raise UserError(f"{task.name}: no training example has a trained token within data.max_length {length}")
            self._encoded[key] = examples, report
        return self._encoded[key]

    def _planned(self, row: Row, settings: Settings, task: Task, length: int) -> dict[str, int] | None:
        """Plan the memory for sequences of `length` tokens on rank 0.

        A plan takes seconds. Lengths are rounded up to a multiple of `PLANNED_TOKENS`, so that seeds, whose longest
        examples differ little, share one.
        """
        length = min(-(-length // PLANNED_TOKENS) * PLANNED_TOKENS, max(length, self.comparison.data.max_length))
        key = (row.label, task.name, length)
        if key not in self._plans and dist.get_rank() == 0:
            config = self._config(task)
            try:
                self._plans[key] = planned_memory(settings, config, length, dist.get_world_size())
            except Exception as error:  # the finished training must not be lost
                logs.warn(f"{task.name}, {row.label}: memory could not be planned: {error}")
                self._plans[key] = None
        return self._plans.get(key)

    def _model(self, task: Task, dtype: str) -> Any:
        """Return an untrained model; new weights are drawn from torch's generator."""
        with self.spent.part("model"):
            return self._load(task, dtype) if self._made_anew else copy.deepcopy(self._pretrained(dtype))

    @property
    def _made_anew(self) -> bool:
        """Whether some weights are new, and so drawn for each run."""
        return self.classifies or self.comparison.model.config is not None

    def _pretrained(self, dtype: str) -> Any:
        """Load the model once; runs train copies of it."""
        if dtype not in self._loaded:
            with self.spent.part("weights"):
                self._loaded[dtype] = self._load(None, dtype)
        return self._loaded[dtype]

    def _load(self, task: Task | None, dtype: str) -> Any:
        return loading.load_model(self.comparison.model, self._config(task), dtype, self._say)

    def _config(self, task: Task | None) -> Any:
        """Return the model's configuration for a task. To read it from a GGUF file takes seconds."""
        labels = len(task.labels) if task is not None and self.classifies else None
        if labels not in self._configs:
            self._configs[labels] = loading.load_config(self.comparison.model, self.tokenizer, labels, self._say)
        return copy.deepcopy(self._configs[labels])

    def _predict(
        self, task: Task, model: Any, examples: Sequence[TaskExample], shown: Sequence[TaskExample]
    ) -> Predictions:
        options: dict[str, Any] = {
            "batch_size": self.comparison.evaluation.batch_size,
            "after_batch": self.progress,
        }
        if self.classifies:
            return classify(task, model, self.tokenizer, examples, **options)
        found = predict(task, model, self.tokenizer, examples, demonstrations=shown, **options)
        if task.max_new_tokens:
            with self.spent.part("answer losses"):
                found.losses = self._answer_losses(model, examples, shown)
        return found

    def _validate(
        self, task: Task, model: Any, examples: Sequence[TaskExample], shown: Sequence[TaskExample]
    ) -> tuple[float, float | None]:
        """Return the score by which rates are chosen, and the mean loss on the right answers, if there is one.

        Nothing is written. A small model writes few right answers, so exact match cannot rank rates; the loss can.
        """
        if task.max_new_tokens and not self.classifies:
            loss = statistics.fmean(self._answer_losses(model, examples, shown))
            return -loss, loss
        found = self._predict(task, model, examples, shown)
        score = task.score(found.values, examples, classified=self.classifies)[task.metrics[0]]
        return score, statistics.fmean(found.losses) if found.losses else None

    def _answer_losses(self, model: Any, examples: Sequence[TaskExample], shown: Sequence[TaskExample]) -> list[float]:
        """Return the mean loss of each reference answer's tokens."""
        before = few_shot(shown)
        pairs = [(before + one.prompt, one.completion) for one in examples]
        size, length = self.comparison.evaluation.batch_size, position_limit(model).tokens
        means, _ = average_log_likelihoods(model, self.tokenizer, pairs, size, length, self.progress)
        return [-value for value in means]

    def _scores(
        self, task: Task, examples: Sequence[TaskExample], values: list[Any], losses: Sequence[float] = ()
    ) -> dict[str, Any]:
        """Return the fields of a cell's record about predictions, and the losses on the right answers if known."""
        score = functools.partial(task.score, classified=self.classifies)
        found, headline = score(values, examples), task.metrics[0]
        # Answers to the same question are drawn together. They are sorted by content, so that seeds with the same test
        # examples have the same resamples too; otherwise averages over seeds would look too certain.
        units: dict[str, list[int]] = {}
        for index, one in enumerate(examples):
            units.setdefault(one.question or f"{one.fingerprint} {one.where}", []).append(index)
        members = [units[key] for key in sorted(units)]

        def of_units(drawn: Sequence[int]) -> float:
            indices = [index for unit in drawn for index in members[unit]]
            some, about = [values[i] for i in indices], [examples[i] for i in indices]
            return score(some, about, headline_only=True)[headline]

        count = self.comparison.evaluation.bootstrap
        if task.averaged:
            pairs = zip(values, examples, strict=True)
            each = [score([value], [one], headline_only=True)[headline] for value, one in pairs]
            replicates = bootstrap_means(each, members, resamples(len(members), count, task.name))
        else:
            replicates = bootstrap_scores(of_units, len(members), count, task.name)
        # An example whose right answer is no candidate has no loss.
        every = len(losses) == len(examples)
        lost = bootstrap_means(losses, members, resamples(len(members), count, task.name)) if every else []
        return {
            "metric": headline,
            "score": found[headline],
            "n": len(examples),
            "metrics": found,
            "interval": list(interval(replicates)),
            "bootstrap": [round(value, 6) for value in replicates],
            "loss_bootstrap": [round(value, 6) for value in lost],
        }


@contextlib.contextmanager
def freed() -> Iterator[None]:
    """Free the memory that a `with` block has taken on host and device, also if it fails: the next cell needs it.

    The locals of a failed block's functions are cleared, because the traceback would keep them: engine, model, batch.
    """
    try:
        yield
    except BaseException as error:
        for one in _chain(error):
            traceback.clear_frames(one.__traceback__)
        raise
    finally:
        gc.collect()
        get_accelerator().empty_cache()


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error comes from a lack of memory on the device or the host."""
    # Libraries of a device and torch's allocator of host memory have no error of their own for it.
    signs = ("out of memory", "alloc_failed", "can't allocate memory")
    return any(
        isinstance(one, (torch.OutOfMemoryError, MemoryError))
        or isinstance(one, RuntimeError)
        and any(sign in str(one).lower() for sign in signs)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it comes from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _destroy(engine: Any, kind: type[BaseException] | None, *_: object) -> None:
    """Destroy an engine on the way out of a `with` block; if the block has failed, its error is the one to report."""
    with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
        engine.destroy()


class _Recorder(Callback):
    """Keep the loop's records."""

    def __init__(self, engine: Any, settings: Settings, progress: Callable[[], object]):
        self.engine, self.settings, self.progress = engine, settings, progress
        self.records: list[dict[str, Any]] = []
        self.trained, self.at_once = _trained(engine, settings)
        self.flops = 0.0
        self._known: dict[Any, tuple[float, float]] = {}
        self._active = trained_names(engine.module)

    def after_step(self, step: Step, total: float) -> bool:
        """Store the step's record and count its FLOPs; never stop the loop."""
        self.records.append({key: value for key, value in step.record.items() if key != "memory"})
        self.flops += self._flops(step.record)
        self._active = trained_names(self.engine.module)
        self.progress()
        return False

    def _flops(self, record: dict[str, Any]) -> float:
        key = self._active  # the parameters that this step has trained
        if key not in self._known:  # FLOPs per token, and per predicted token in the head
            count = functools.partial(step_flops, self.engine, self.settings, key)
            self._known[key] = (count(1, 0), count(0, 1))
        return self._known[key][0] * record["tokens"] + self._known[key][1] * record["trained_tokens"]

    def measured(self) -> dict[str, Any]:
        """Return the fields of a cell's record that the training has measured."""
        records = self.records
        losses = [record["loss"] for record in records if record["loss"] is not None]  # None: non-finite
        seconds, tokens, curve = 0.0, 0, []
        every = max(1, len(records) // POINTS)
        for record in records:
            seconds, tokens = seconds + record["seconds"], tokens + record["tokens"]
            if record["step"] % every == 0 or record is records[-1]:
                curve.append([record["step"], round(seconds, 3), tokens, record["loss"]])
        return {
            "steps": len(records),
            "samples": len(records) * self.settings.training.batch_size,
            "tokens": tokens,
            "seconds": seconds,
            "step_seconds": statistics.median(record["seconds"] for record in records),
            "tokens_per_second": tokens / seconds,
            "trained_parameters": self.trained,
            "trained_at_once": self.at_once,
            "flops": self.flops,
            "loss_first": records[0]["loss"],
            "loss_last": statistics.fmean(losses[-10:]) if losses else None,
            "curve": curve,
        }


def _trained(engine: Any, settings: Settings) -> tuple[int, int]:
    """Return how many weights the method trains, and the most that one step trains."""
    now = trained_parameters(engine.module)
    if hasattr(engine, "blocks"):
        names = {name for block in engine.blocks for name in block.parameter_names}
        every = sum(numel_of(p) for name, p in engine.module.named_parameters() if name in names)
        return every, max(block.numel for block in engine.blocks)
    if METHODS[settings.method.name].adapter is None:
        return sum(numel_of(p) for p in engine.module.parameters()), now
    return now, now


def _untrained() -> dict[str, Any]:
    nothing = dict.fromkeys(("steps", "samples", "tokens", "trained_parameters", "trained_at_once"), 0)
    return {**nothing, "seconds": 0.0, "step_seconds": None, "tokens_per_second": None, "flops": 0.0,
            "loss_first": None, "loss_last": None, "curve": [], "planned_memory": None}  # fmt: skip


def _dtype(row: Row) -> str:
    """Return the weights' precision for a row without training."""
    return "bfloat16" if row.sections["deepspeed"].get("bf16", {}).get("enabled") else "float32"


def _identity(training: Training, model: str) -> dict[str, Any]:
    return {
        "label": training.row.label,
        "method": training.row.method,
        "model": model,
        "task": training.entry.task.name,
        "seed": training.seed,
        "budget": str(training.budget),
    }
