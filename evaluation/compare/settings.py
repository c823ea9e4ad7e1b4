"""The settings of a comparison: one YAML file. All of it is checked before anything is loaded, as in launch/config.

title, model_name: the report's title and its name for the model
model:        as in the YAML of a training run
data:         {path, train_examples, dev_examples, test_examples, k_shot, max_length}
tasks:        [yes-no, sst2, {name: rte, path: folder}, {name: trec, revision: a commit on the Hub},
               {name: gsm8k, test_examples: 200}, {name: boolq, optional: true}]
methods:      [full, {name: hift, label: "HiFT, m = 4", deepspeed: {hift: {layers_per_block: 4}}}]
seeds:        [0, 1, 2]
budgets:      [{samples: 1024}, {seconds: 60}]      the training budgets; each cell runs once with each
learning_rates: [1e-5, 1e-4]                        the grid for methods that do not set their own
training, deepspeed, logging: as in the YAML of a training run
evaluation:   {batch_size, shots, bootstrap}
output:       {dir}
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hift_ds import paths
from hift_ds.evaluation.tasks.catalog import GLUE, WITHOUT_DATA, Task, find_task
from hift_ds.evaluation.tasks.loading import lacking
from hift_ds.launch.config.checking import build, not_storable, problem_list, setting
from hift_ds.launch.config.library_checks import library_problems
from hift_ds.launch.config.reading import read_yaml, source
from hift_ds.launch.config.settings import LoggingSettings, Settings, TrainingSettings, check_settings, output_problems
from hift_ds.launch.data.sources import PUBLISHED
from hift_ds.launch.errors import UserError, looked_in, nearest, shown
from hift_ds.launch.methods.table import METHODS, TRAINED
from hift_ds.launch.model.settings import ModelSettings

MANY = 1_000_000  # steps, for checks before the number is known
DRY_STEPS, DRY_EXAMPLES = 2, 4  # of each training, and of each evaluation, in a dry run
SIZES = ("train_examples", "dev_examples", "test_examples")
ROW_KEYS = ("name", "label", "learning_rates", "shots", "method", "training", "deepspeed")
SECTIONS = (
    "title", "model", "model_name", "data", "tasks", "methods", "seeds", "budgets", "learning_rates", "training",
    "deepspeed", "evaluation", "output", "logging",
)  # fmt: skip
# Keys of `training` that only the comparison sets.
DECIDED = (
    "max_steps",
    "epochs",
    "seed",
    "learning_rate",
    "full_learning_rate",
    "save_every",
    "eval_every",
    "keep_best",
)


@dataclass(frozen=True)
class DataSettings:
    """The `data` section: where the tasks' files are, and the sizes of their sets."""

    # A folder that holds the publishers' folders; null = the Hugging Face Hub. Built-in tasks need neither.
    path: str | None = None
    train_examples: int = setting(1000, at_least=1)
    dev_examples: int = setting(500, at_least=0)
    test_examples: int = setting(1000, at_least=1)
    # Examples of each class in the training and validation sets, instead of train_examples and dev_examples.
    k_shot: int | None = setting(None, at_least=1)
    max_length: int = setting(512, at_least=2)  # tokens of a training example; longer ones are cut on the right


@dataclass(frozen=True)
class EvaluationSettings:
    """The `evaluation` section."""

    batch_size: int = setting(16, at_least=1)  # sequences in a batch
    shots: int = setting(8, at_least=1)  # demonstrations for in-context learning
    bootstrap: int = setting(500, at_least=50)  # resamples of the test set


@dataclass(frozen=True)
class OutputSettings:
    """The `output` section."""

    dir: str | None = None


@dataclass(frozen=True)
class TaskEntry:
    """A task and where its data comes from; `path` None = the Hub or built in."""

    task: Task
    path: str | None
    revision: str | None = None  # on the Hub
    sizes: Mapping[str, int] = field(default_factory=dict)  # of its sets, instead of those of `data`


@dataclass(frozen=True)
class Budget:
    """The budget of each training: samples, or seconds that it would take alone on the device."""

    samples: int | None = None
    seconds: float | None = None
    at_most: int | None = None  # steps of any training, in a dry run

    def __str__(self) -> str:
        return f"{self.samples} samples" if self.samples else f"{self.seconds:g} s"

    @property
    def is_timed(self) -> bool:
        """Whether the number of steps comes from the times of steps."""
        return self.seconds is not None and self.at_most is None

    def steps(self, batch_size: int, steps_in: Callable[[float], int]) -> int:
        """Return the number of optimizer steps; `steps_in` returns the steps that a number of seconds suffices for."""
        if self.samples is not None:
            steps = math.ceil(self.samples / batch_size)
            return steps if self.at_most is None else min(steps, self.at_most)
        return steps_in(self.seconds or 0.0) if self.at_most is None else self.at_most


@dataclass(frozen=True)
class Row:
    """A method with its options: one row of the tables."""

    label: str
    method: str
    learning_rates: tuple[float, ...]  # (0.0,) for methods without training
    shots: int
    sections: dict[str, dict]  # method, training and deepspeed, as in the YAML of a run

    @property
    def trained(self) -> bool:
        """Whether the method trains anything (zero-shot and ICL do not)."""
        return self.method in TRAINED

    @property
    def batch_size(self) -> int:
        """The examples of a step."""
        return self.sections["training"].get("batch_size", TrainingSettings.batch_size)


@dataclass(frozen=True)
class Comparison:
    """All settings of a comparison, checked."""

    title: str
    model: ModelSettings
    model_name: str
    data: DataSettings
    tasks: list[TaskEntry]
    rows: list[Row]
    seeds: list[int]
    budgets: list[Budget]
    evaluation: EvaluationSettings
    logging: LoggingSettings
    folder: Path
    base: dict[str, Any]  # the sections model and logging of each run
    notes: list[str]  # sentences for the user, such as which tasks are left out

    @property
    def rank_timeout(self) -> float:
        """Seconds without progress after which a rank counts as lost: the largest value of all rows."""
        default = TrainingSettings.rank_timeout
        rows = [row.sections["training"] for row in self.rows if row.trained]
        return max((training.get("rank_timeout", default) for training in rows), default=default)

    def sizes(self, entry: TaskEntry) -> dict[str, Any]:
        """Return the sizes of a task's sets, for `load_task`."""
        return {key: getattr(self.data, key) for key in (*SIZES, "k_shot")} | dict(entry.sizes)

    @property
    def deterministic(self) -> bool:
        """Whether a row wants deterministic kernels. All rows get them then: the accelerator is set up once."""
        return any(row.sections["training"].get("deterministic") for row in self.rows)

    def run_settings(self, row: Row, steps: int, seed: int, learning_rate: float, world_size: int) -> Settings:
        """Return the settings of one training, which `load_comparison` has checked."""
        problems: list[str] = []
        found = check_settings(self._raw(row, steps, seed, learning_rate), world_size, problems)
        if found is None:
            raise UserError(problem_list(row.label, problems))
        return found

    def _raw(self, row: Row, steps: int, seed: int, learning_rate: float) -> dict[str, Any]:
        training = row.sections["training"] | {"max_steps": steps, "seed": seed}
        training["learning_rate"] = learning_rate
        sections = row.sections | {"training": training, "method": row.sections["method"] | {"name": row.method}}
        return self.base | sections | {"output": {"dir": str(self.folder)}}

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for compare.json."""
        return {
            "title": self.title,
            "model": asdict(self.model),
            "model_name": self.model_name,
            "data": asdict(self.data),
            "tasks": [
                {"name": one.task.name, "path": one.path, "revision": one.revision, **one.sizes} for one in self.tasks
            ],
            "rows": [asdict(row) for row in self.rows],
            "seeds": self.seeds,
            "budgets": [str(one) for one in self.budgets],
            "evaluation": asdict(self.evaluation),
            "notes": self.notes,
        }


def load_comparison(
    path: str, overrides: Sequence[str] = (), world_size: int = 1, only: Sequence[str] = ()
) -> Comparison:
    """Read the YAML at `path`, apply the `--set` overrides and check everything.

    Args:
        only: the rows to run, by label, or by method if no row has that label; empty = all rows.

    Raises:
        UserError: with every problem found, one a line.
    """
    raw, problems = read_yaml(path, overrides, SECTIONS)
    for key in raw:
        if key not in SECTIONS:
            problems.append(f"{key}: unknown section; expected {', '.join(SECTIONS)}{nearest(key, SECTIONS)}")
    for key in ("model", "data", "training", "deepspeed", "evaluation", "output", "logging"):
        if not isinstance(raw.get(key), (Mapping, type(None))):
            problems.append(f"{key}: got {raw[key]!r}, expected a mapping of settings")
            raw[key] = {}
    problems += [text for key in ("title", "model_name") for text in _name_problems(raw.get(key), key)]
    problems += _decided(raw.get("training") or {}, "training")
    data = build(DataSettings, raw.get("data") or {}, "data", problems)
    if data.path is not None and (reason := paths.fault(data.path, reads=True)):
        problems.append(f"data.path: {reason}")
    output = build(OutputSettings, raw.get("output") or {}, "output", problems)
    problems += output_problems(output.dir, "runs/compare")
    seeds = _numbers(raw, "seeds", [0], int, 0, problems)
    model = build(ModelSettings, raw.get("model") or {}, "model", problems)
    notes: list[str] = []
    comparison = Comparison(
        title=str(raw.get("title") or f"Comparison of fine-tuning methods ({Path(path).stem})"),
        model=model,
        model_name=str(raw.get("model_name") or model.describe()),
        data=data,
        tasks=_tasks(raw, data, problems, notes),
        rows=_only(_rows(raw, problems), only, problems),
        seeds=seeds,
        budgets=_budgets(raw, problems),
        evaluation=build(EvaluationSettings, raw.get("evaluation") or {}, "evaluation", problems),
        logging=build(LoggingSettings, raw.get("logging") or {}, "logging", problems),
        folder=Path(os.path.expanduser(str(output.dir))),
        base={key: raw[key] for key in ("model", "logging") if raw.get(key)},
        notes=notes,
    )
    problems += _problems_together(comparison)
    if not problems:
        problems += _run_problems(comparison, world_size)
    told = tuple(problem.partition(": ")[0] for problem in problems)
    problems += [text for text in not_storable(raw) if text.partition(": ")[0] not in told]
    if problems:
        raise UserError(problem_list(source(path, overrides), list(dict.fromkeys(problems))))
    return comparison


def dry(comparison: Comparison, folder: Path) -> Comparison:
    """Return the first steps of every cell: what would fail in a comparison fails in them, in a small part of its time.

    Each row runs on each task with each budget, with the real model and training data, the first seed and the first
    learning rate. A training ends after two steps, so that HiFT trains two blocks. A few examples of the validation and
    the test set are evaluated.

    Args:
        folder: where the records and the report are written.
    """
    few: dict[str, Any] = dict.fromkeys(("dev_examples", "test_examples"), DRY_EXAMPLES)
    return replace(
        comparison,
        title=f"{comparison.title}: dry run",
        data=replace(comparison.data, **few),
        tasks=[replace(one, sizes={k: v for k, v in one.sizes.items() if k not in few}) for one in comparison.tasks],
        # Twice the same rate: there is a choice, so the validation set is used, and equal trainings run once.
        rows=[replace(row, learning_rates=row.learning_rates[:1] * 2) for row in comparison.rows],
        seeds=comparison.seeds[:1],
        budgets=[replace(one, at_most=DRY_STEPS) for one in comparison.budgets],
        evaluation=replace(comparison.evaluation, bootstrap=50),
        logging=replace(comparison.logging, wandb="off"),
        folder=folder,
        base={key: value for key, value in comparison.base.items() if key != "logging"},
    )


def _tasks(raw: Mapping[str, Any], data: DataSettings, problems: list[str], notes: list[str]) -> list[TaskEntry]:
    found: list[TaskEntry] = []
    missing: list[str] = []  # optional tasks without data
    names: list[str] = []
    for given in _listed(raw, "tasks", problems):
        entry = {"name": given} if isinstance(given, str) else given
        if not _is_task(entry):
            problems.append(
                f"tasks: got {given!r}; expected a task's name, or {{name: ..., path: ..., revision: ..., "
                f"optional: true, {': ..., '.join(SIZES)}: ...}}"
            )
            continue
        try:
            task = find_task(entry["name"])
        except UserError as error:
            problems.append(f"tasks: {error}")
            continue
        names.append(task.name)
        own: list[str] = []
        sizes = _sizes(entry, data, f"tasks: {task.name}", own)
        revision = entry.get("revision")
        path = entry.get("path") or _folder_of(task, data.path)
        if task.built_in:
            path = None
            own += [
                f"tasks: {task.name}: {key}: {entry[key]!r} is not used, because this task is built in; remove it"
                for key in ("path", "revision", "optional")
                if entry.get(key) is not None
            ]
        elif path is not None and (reason := paths.fault(path, reads=True)):
            own.append(f"tasks: {task.name}: {reason}")
        elif path is not None and entry.get("optional") and (reason := lacking(task, path)):
            missing.append(f"{task.name} is left out, because {reason}")
            continue
        elif path is not None and not Path(path).expanduser().exists():
            glue = (
                f"; {Path(path).parent / 'glue'} does not, either"
                if task.data == GLUE and not entry.get("path")
                else ""
            )
            own.append(f"tasks: {task.name}: its folder {path!r} does not exist{looked_in(path)}{glue}; {WITHOUT_DATA}")
        if path is not None and revision is not None:
            own.append(f"tasks: {task.name}: revision: {revision!r} is for sets from the Hub; remove it")
        problems += own
        found.append(TaskEntry(task, path, revision, sizes))
    problems += [f"tasks: {name} is listed twice; remove one" for name in sorted(set(names)) if names.count(name) > 1]
    if missing and not found:
        problems.append(f"tasks: no task is left: {'; '.join(missing)}; {WITHOUT_DATA}")
    notes += missing
    return found


def _is_task(entry: Any) -> bool:
    kinds: dict[str, Any] = {"name": str, "path": (str, type(None)), "revision": (str, type(None)), "optional": bool}
    return (
        isinstance(entry, Mapping)
        and isinstance(entry.get("name"), str)
        and set(entry) <= {*kinds, *SIZES}
        and all(isinstance(entry[key], kind) for key, kind in kinds.items() if key in entry)
    )


def _sizes(entry: Mapping[str, Any], data: DataSettings, where: str, problems: list[str]) -> dict[str, int]:
    """Return a task's own sizes, which have the bounds of those in `data`."""
    given = {key: entry[key] for key in SIZES if key in entry}
    built = build(DataSettings, given, where, problems)
    if data.k_shot is not None:
        problems += [
            f"{where}.{key}: {given[key]!r} is not used with data.k_shot; remove one of them"
            for key in ("train_examples", "dev_examples")
            if given.get(key)
        ]
    return {key: getattr(built, key) for key in given}


def _folder_of(task: Task, path: str | None) -> str | None:
    """Return a task's folder inside `path`: "superglue" for SuperGLUE's tasks, and possibly "glue" for GLUE's."""
    if path is None:
        return None
    folder = Path(os.path.expanduser(path))
    own = folder / (task.data.split("/")[0] if task.data in PUBLISHED else task.name)
    return str(
        own if os.path.exists(own) or not os.path.exists(folder / "glue") or task.data != GLUE else folder / "glue"
    )


def _rows(raw: Mapping[str, Any], problems: list[str]) -> list[Row]:
    grid = _numbers(raw, "learning_rates", [1e-4], float, None, problems)
    shots = (raw.get("evaluation") or {}).get("shots", EvaluationSettings.shots)
    found = []
    for given in _listed(raw, "methods", problems):
        entry: Any = {"name": given} if isinstance(given, str) else given
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if not isinstance(name, str):
            problems.append(f"methods: got {given!r}; expected a method's name, or {{name: ..., label: ...}}")
            continue
        if name not in METHODS:
            problems.append(f"methods: unknown method {name!r}; expected {', '.join(METHODS)}{nearest(name, METHODS)}")
            continue
        for key in entry:
            if key not in ROW_KEYS:
                expected = f"expected {', '.join(ROW_KEYS)}{nearest(str(key), ROW_KEYS)}"
                problems.append(f"methods: {name}: unknown key {key!r}; {expected}")
        label = str(entry.get("label") or name)
        problems += _name_problems(entry.get("label"), f"methods: {name}: label")
        own = {key: {} if entry.get(key) is None else entry[key] for key in ("method", "training", "deepspeed")}
        for key, value in own.items():
            if not isinstance(value, Mapping):
                problems.append(f"methods: {label}: {key}: got {value!r}, expected a mapping of settings")
                own[key] = {}
        problems += _decided(own["training"], f"methods: {label}: training")
        if "name" in own["method"]:
            problems.append(f"methods: {label}: method.name: the row's `name` already sets it; remove it")
        sections = {"method": dict(own["method"])}
        for key in ("training", "deepspeed"):
            sections[key] = _merged(raw.get(key) or {}, own[key])
        own_shots = entry.get("shots", shots)
        if "shots" in entry and (not _is_whole(own_shots) or own_shots < 1):
            problems.append(f"methods: {label}: shots: got {own_shots!r}; expected an integer from 1")
        rates = _numbers(entry, "learning_rates", grid, float, None, problems, f"methods: {label}: ")
        trained = name in TRAINED
        if not trained and "learning_rates" in entry:
            problems.append(f"methods: {label}: learning_rates, but {name} trains nothing; remove them")
        found.append(Row(label, name, tuple(rates) if trained else (0.0,), own_shots, sections))
    labels = [row.label for row in found]
    for label in sorted(set(labels)):
        if labels.count(label) > 1:
            problems.append(f"methods: the label {label!r} is used twice; give each row a different `label`")
    return found


def _only(rows: list[Row], wanted: Sequence[str], problems: list[str]) -> list[Row]:
    labels = [row.label for row in rows]
    known = [*labels, *(row.method for row in rows)]
    for name in wanted:
        if name not in known:
            expected = f"expected {'; '.join(dict.fromkeys(known))}{nearest(name, known)}"
            problems.append(f"--only: {name!r} is neither the label nor the method of a row; {expected}")
    methods = set(wanted) - set(labels)
    return [row for row in rows if not wanted or row.label in wanted or row.method in methods]


def _budgets(raw: Mapping[str, Any], problems: list[str]) -> list[Budget]:
    found = []
    for given in _listed(raw, "budgets", problems):
        number = next(iter(given.values())) if isinstance(given, Mapping) and len(given) == 1 else None
        good = isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf
        if good and "samples" in given and _is_whole(number):
            found.append(Budget(samples=number))
        elif good and "seconds" in given:
            found.append(Budget(seconds=float(given["seconds"])))
        else:
            problems.append(f"budgets: got {given!r}; expected {{samples: 1024}} or {{seconds: 60}}")
    names = [str(one) for one in found]
    problems += [f"budgets: {name} is listed twice; remove one" for name in sorted(set(names)) if names.count(name) > 1]
    return found


def _problems_together(comparison: Comparison) -> list[str]:
    found = []
    grids = {len(row.learning_rates) for row in comparison.rows if row.trained}
    if len(grids) > 1:
        sizes = ", ".join(f"{row.label} {len(row.learning_rates)}" for row in comparison.rows if row.trained)
        found.append(f"learning_rates: every method must choose among the same number of rates; these have {sizes}")
    none = [one.task.name for one in comparison.tasks if comparison.sizes(one)["dev_examples"] == 0]
    if max(grids, default=1) > 1 and none:
        found.append(
            f"data.dev_examples: 0 ({', '.join(none)}), but these examples decide the learning rate; raise it, or give "
            "one learning rate"
        )
    without = [one.task.name for one in comparison.tasks if not one.task.has_classes]
    if comparison.data.k_shot is not None and without:
        found.append(
            f"data.k_shot: {comparison.data.k_shot}, but {', '.join(without)} has no classes; remove one of them"
        )
    return found


def _run_problems(comparison: Comparison, world_size: int) -> list[str]:
    """Return the problems that launch/config/settings.py finds in the training runs of the rows."""
    found: list[str] = []
    for row in comparison.rows:
        if row.trained and comparison.budgets and comparison.seeds:
            problems: list[str] = []
            raw = comparison._raw(row, MANY, comparison.seeds[0], row.learning_rates[0])
            settings = check_settings(raw, world_size, problems)
            problems += library_problems(settings) if settings is not None else []
            found += [problem if problem.startswith("model") else f"{row.label}: {problem}" for problem in problems]
    return found


def _decided(training: Mapping[str, Any], where: str) -> list[str]:
    return [
        f"{where}.{key}: the comparison sets it (budgets, seeds, learning_rates); remove it"
        for key in DECIDED
        if key in training
    ]


def _name_problems(value: Any, where: str) -> list[str]:
    """Return the problem of a name in the report. A number is one, too."""
    is_name = isinstance(value, (str, int, float, type(None))) and not isinstance(value, bool)
    return [] if is_name else [f"{where}: got {shown(value)}; expected text"]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(raw: Mapping[str, Any], key: str, problems: list[str]) -> list[Any]:
    value = raw.get(key)
    if not isinstance(value, list) or not value:
        problems.append(f"{key}: got {value!r}; expected a list with at least one entry")
        return []
    return value


def _numbers(
    raw: Mapping[str, Any],
    key: str,
    default: list[Any],
    kind: type,
    least: int | None,
    problems: list[str],
    where: str = "",
) -> list[Any]:
    """Read a list of distinct numbers: integers from `least`, or any numbers above 0 if `least` is None."""
    value = raw.get(key, default)
    good = isinstance(value, list) and value and len(set(map(str, value))) == len(value)
    for one in value if good else ():
        is_number = isinstance(one, (int, kind)) and not isinstance(one, bool)
        good = good and is_number and (0 < one < math.inf if least is None else one >= least)
    if not good:
        expected = "numbers above 0" if least is None else f"integers from {least}"
        problems.append(f"{where}{key}: got {value!r}; expected a list of distinct {expected}")
        return default
    return [kind(one) for one in value]


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`, merged section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
