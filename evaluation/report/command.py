"""The report of a comparison of fine-tuning methods: tables and pictures, as Markdown and as one HTML file.

    python -m evaluation.report OUT [--add FOLDER...] [--verdicts verdicts.jsonl] [--title TITLE] [--wandb offline]

OUT is a folder with results.jsonl; report.md, report.html and plots/ are written into it. --add puts the cells of other
comparisons into OUT/results.jsonl first: seeds or tasks that ran on other machines or days. The title is by default
the comparison's own; it is also the group of runs at Weights & Biases.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hift_ds.evaluation.mt_bench import judge
from hift_ds.evaluation.mt_bench.questions import PAIRWISE, SINGLE
from hift_ds.evaluation.mt_bench.verdicts import TOTAL, checked, summarize
from hift_ds.evaluation.records import Record, read_records
from hift_ds.evaluation.report import paper, plots, results
from hift_ds.evaluation.report.document import Bold, Heading, Items, Paragraph, Part, Picture, Table, as_html, markdown
from hift_ds.evaluation.report.resampling import paired_difference
from hift_ds.evaluation.report.results import (
    FAILED,
    OK,
    RESULTS,
    SETTINGS,
    Section,
    as_text,
    is_finite,
    mean_of,
    std_of,
)
from hift_ds.evaluation.report.wandb_report import log_report
from hift_ds.launch.errors import UserError

TITLE = "Comparison of fine-tuning methods"
MEAN = "mean"
NOTHING = "-"
MIB, GIB = 2**20, 2**30


def write_report(records: list[Record], folder: Path, title: str, *, verdicts: list[Record] | None = None) -> None:
    """Writes folder/report.md, folder/report.html (with its pictures inside) and folder/plots/*.png.

    plots/ is the report's own: older pictures in it are removed.

    Args:
        records: cells, see results.py.
        verdicts: of MT-Bench, for its table and radar.

    Raises:
        UserError: a record lacks something, or the folder cannot be written.
    """
    sections = results.arrange(results.checked(records))
    summary = summarize(verdicts or ())
    try:
        drawn, radars = _draw(sections, summary, folder)
        parts = build(sections, title, summary, drawn, radars)
        (folder / "report.md").write_text(markdown(parts), encoding="utf-8")
        (folder / "report.html").write_text(as_html(title, parts, folder), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def _draw(
    sections: Sequence[Section], summary: Mapping[str, Any], folder: Path
) -> tuple[list[dict[str, list[Picture]]], list[Picture]]:
    """The pictures of each section, by kind, and those of MT-Bench."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for old in (folder / "plots").glob("*.png"):
        old.unlink()
    labels = [label for method in _ordered(sections) for label in method]
    styles = plots.make_styles([*labels, *(one["model"] for one in summary[SINGLE])])
    drawn = [plots.draw_section(number, section, styles, folder) for number, section in enumerate(sections, 1)]
    return drawn, plots.draw_verdicts(summary, styles, folder)


def build(
    sections: Sequence[Section],
    title: str,
    summary: Mapping[str, Any],
    drawn: Sequence[Mapping[str, list[Picture]]],
    radars: Sequence[Picture] = (),
) -> list[Part]:
    """The report's parts, with pictures that are drawn already: by kind for each section."""
    parts: list[Part] = [Heading(title, 1), *_header(sections)]
    for section, pictures in zip(sections, drawn, strict=True):
        parts += _section(section, pictures)
    if summary[SINGLE] or summary[PAIRWISE]:
        parts += _mt_bench(summary, radars)
    return [*parts, *_paper(sections)]


def _ordered(sections: Sequence[Section]) -> list[list[str]]:
    """All labels by method, so that a label's style does not hang on the section."""
    rows = {label: method for section in sections for label, method in section.rows.items()}
    order = [*results.METHODS, *sorted(set(rows.values()) - set(results.METHODS))]
    return [[label for label, of in rows.items() if of == method] for method in order]


# --- header ---------------------------------------------------------------------------------------------


def _fact(record: Record, name: str) -> str:
    """The commit is a fact of its own: two commits with the same packages are one line of versions."""
    value = record[name]
    return as_text({key: one for key, one in value.items() if key != "git"} if isinstance(value, dict) else value)


def _header(sections: Sequence[Section]) -> list[Part]:
    records = [record for section in sections for cell in section.cells.values() for record in cell.values()]
    good = [record for record in records if record["status"] == OK]
    if not records:
        return [Paragraph("There are no records.")]
    facts = [
        f"Methods: {'; '.join(label for method in _ordered(sections) for label in method)}.",
        f"Models: {_list(record['model'] for record in records)}.",
        f"Tasks: {_list(_task(record) for record in good) or _list(record['task'] for record in records)}.",
        f"Budgets: {_list(record['budget'] for record in records)}.",
        f"Seeds: {_list(str(seed) for seed in sorted({record['seed'] for record in records}))}.",
        f"Cells: {len(records)}, of which {len(good)} have a score.",
    ]
    for name, what in (("machine", "Machine"), ("ranks", "Ranks"), ("versions", "Versions"), ("git", "Git")):
        facts += [f"{what}: {text}." for text in [_list(_fact(record, name) for record in good)] if text]
    dates = sorted(as_text(record["date"]) for record in good)
    facts += [f"Date: {dates[0]}" + (f" to {dates[-1]}." if dates[-1] != dates[0] else ".")] if dates else []
    parts: list[Part] = [Items(facts), Heading("How to read this", 2)]
    if not good:
        return [*parts[:1], Paragraph("No cell has a score yet.")]
    several = any(len(section.seeds) > 1 for section in sections)
    reading = [
        "Scores are times 100 (%), on test examples; higher is better.",
        "± is the sample standard deviation over seeds: of the data drawn, their order and the methods' own randomness."
        if several
        else "There is one seed, so there is no ±: what another seed would change is not known.",
        "Intervals are 95 % percentile intervals of a bootstrap over test examples. They cover the sampling of test "
        "examples, not that of seeds" + (": that is the ±." if several else "."),
        "Differences to full fine-tuning are paired: over the seeds that both have, the replicates of each are "
        "averaged, then subtracted one by one, as the i-th replicate of all methods is of the same test examples.",
        "Bold is the best of a column, where its paired difference to the second best has an interval without 0. Where "
        "nothing is bold, the test examples do not tell the best two apart.",
    ]
    return [*parts, Items([*reading, _tuning(good)]), *_about_data(good)]


def _about_data(good: Sequence[Record]) -> list[Part]:
    """What became of the examples where it is not what was asked for."""
    notes: dict[str, None] = {}
    for record in good:
        notes |= dict.fromkeys(f"{record['task']}: {note}" for note in record.get("notes") or ())
    cut: dict[tuple[str, str, str, str], tuple[int, int]] = {}
    for record in good:
        for part, count in (record.get("truncated") or {}).items():
            key = (record["task"], record["label"], part, record.get("test_cut") or "beginning")
            cut[key] = max(cut.get(key, (0, 0)), (count, record["n"]))
    for (task, label, part, side), (count, n) in cut.items():
        if count and part == "test":
            notes[f"{task}: {label}: up to {count} of {n} test examples lost their {side}."] = None
        elif count:
            notes[f"{task}: {label}: up to {count} training examples lost their end."] = None
    return [Heading("About the data", 2), Items(list(notes))] if notes else []


def _tuning(good: Sequence[Record]) -> str:
    tried: dict[str, set[float]] = {}
    for record in good:
        tried.setdefault(record["label"], set()).update(_tried(record))
    grids: dict[str, list[str]] = {}
    for label, rates in tried.items():
        if len(rates) > 1:
            grids.setdefault(", ".join(map(_rate, sorted(rates))), []).append(label)
    if not grids:
        return "Learning rates were not tuned: the table of costs names those that were used."
    said = ", or ".join(f"{grid} ({'; '.join(labels)})" for grid, labels in grids.items())
    given = [label for label, rates in tried.items() if len(rates) == 1]
    text = f"Learning rates were chosen by the score on the validation split, never on the test split, from {said}."
    return text + (f" One rate each was tried of: {'; '.join(given)}." if given else "")


def _tried(record: Record) -> set[float]:
    return {trial["learning_rate"] for trial in record["tuning"] or () if is_finite(trial["learning_rate"])}


def _list(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def _task(record: Record) -> str:
    return f"{record['task']} ({record['metric']})"


# --- a model and budget ---------------------------------------------------------------------------------


class _Notes:
    """Footnotes, each once, numbered as they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"

    def parts(self) -> list[Part]:
        return [Items([f"Note {number}: {text}" for number, text in enumerate(self.texts, 1)])] if self.texts else []


def _section(section: Section, drawn: Mapping[str, list[Picture]]) -> list[Part]:
    parts: list[Part] = [Heading(f"{section.model}, {section.budget}")]
    notes = _Notes()
    scores = [Heading("Scores", 3), *_scores(section, notes), *notes.parts()]
    if not section.shown():
        return [*parts, *scores]
    scores += _other_metrics(section)
    notes = _Notes()
    differences = [Heading("Differences to full fine-tuning", 3), *_differences(section, notes), *notes.parts()]
    parts += [*scores, *differences, *drawn.get("time", ()), *drawn.get("memory", ()), Heading("Training and cost", 3)]
    parts += [*_costs(section), *drawn.get("parts", ()), Heading("Training loss", 3), *drawn.get("loss", ())]
    if not drawn.get("loss"):
        parts.append(Paragraph("No cell has a loss curve."))
    if drawn.get("ablation"):
        parts += [Heading("HiFT's strategies and blocks", 3), *drawn["ablation"]]
    return parts


def _columns(section: Section) -> dict[str, str]:
    """Heads of the tasks' columns, and of the mean's where there is more than one task."""
    heads = {}
    for task in section.tasks:
        some = [record for label in section.rows for record in section.ok(label, task)]
        sizes = sorted({record["n"] for record in some})
        n = f", n = {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "") if sizes else ""
        heads[task] = f"{task}, {section.metric(task)} %{n}" if some else task
    return heads


def _has_mean(section: Section) -> bool:
    return len(section.common_tasks()) > 1


def _about_mean(section: Section) -> list[Part]:
    common = section.common_tasks()
    if len(section.tasks) < 2 or not section.shown():
        return []
    if not _has_mean(section):
        return [Paragraph("There is no mean over tasks: no two tasks have a score of every row.")]
    left = [task for task in section.tasks if task not in common]
    without = f" It leaves out {_list(left)}, on which not every row has a score." if left else ""
    return [Paragraph(f"The mean is over {_list(common)}; ± is then of a seed's mean over these.{without}")]


def _scores(section: Section, notes: _Notes) -> list[Part]:
    if not section.shown():
        rows = [[label, *(_score(section, label, task, notes) for task in section.tasks)] for label in section.rows]
        return [Paragraph("No cell has a score."), Table(["method", *section.tasks], rows)]
    winners = {task: results.best({label: section.ok(label, task) for label in section.rows}) for task in section.tasks}
    means = {label: section.means(label) for label in section.rows}
    best_mean = results.best(means)
    rows_with_mean: list[list[str | Bold]] = []
    for label in section.rows:
        row: list[str | Bold] = []
        for task in section.tasks:
            text = _score(section, label, task, notes)
            row.append(Bold(text) if winners[task] == label else text)
        if _has_mean(section):
            text = _plus_minus(means[label]) + _seeds(section, means[label]) if means[label] else NOTHING
            row.append(Bold(text) if best_mean == label else text)
        rows_with_mean.append([label, *row])
    head = ["method", *_columns(section).values(), *([f"{MEAN} %"] if _has_mean(section) else [])]
    what = "Mean ± standard deviation" if len(section.seeds) > 1 else "Score, with its interval over test examples"
    seeds = f"{len(section.seeds)} seeds" if len(section.seeds) > 1 else f"seed {section.seeds[0]}"
    return [Paragraph(f"{what}, in %; {seeds}."), Table(head, rows_with_mean), *_about_mean(section)]


def _other_metrics(section: Section) -> list[Part]:
    """What the records have beside the score, e.g. the loss on written answers."""
    columns: dict[tuple[str, str], None] = {}
    for task in section.tasks:
        for record in (record for label in section.shown() for record in section.ok(label, task)):
            names = (name for name, value in record["metrics"].items() if is_finite(value))
            columns |= dict.fromkeys((task, name) for name in names if name != record["metric"])
    if not columns:
        return []
    rows = []
    for label in section.shown():
        values = [[record["metrics"].get(name) for record in section.ok(label, task)] for task, name in columns]
        rows.append([label, *map(_plain, values)])
    said = "Mean ± standard deviation, as they are (a share is not times 100). An answer_loss is that of the right "
    said += "answers' tokens, in nats: lower is better."
    head = ["method", *(f"{task}, {name}" for task, name in columns)]
    return [Heading("Other metrics", 3), Paragraph(said), Table(head, rows)]


def _plain(values: Sequence[Any]) -> str:
    known = [value for value in values if is_finite(value)]
    if not known:
        return NOTHING
    return f"{statistics.fmean(known):.3f}" + (f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else "")


def _score(section: Section, label: str, task: str, notes: _Notes) -> str:
    """A cell's text: its mean, or what became of it."""
    every, good = section.at(label, task), section.ok(label, task)
    if not every:
        return NOTHING
    marks = []
    for record in every:
        if record["status"] != OK:
            what = "failed" if record["status"] == FAILED else "not applicable"
            marks.append(notes.mark(f"{label}: {what}: {record['reason'] or 'no reason is given'}"))
    mark = " " + " ".join(dict.fromkeys(marks)) if marks else ""
    if not good:
        return ("failed" if any(record["status"] == FAILED for record in every) else "n/a") + mark
    if len(section.seeds) == 1:
        return _plus_minus(good) + _between(good[0]["interval"])
    return _plus_minus(good) + _seeds(section, good) + mark


def _seeds(section: Section, some: Sequence[Record]) -> str:
    """How many there are, where some are missing."""
    return f" ({len(some)} of {len(section.seeds)} seeds)" if len(some) < len(section.seeds) else ""


def _plus_minus(some: Sequence[Record]) -> str:
    std = std_of(some)
    mean = statistics.fmean(record["score"] for record in some)
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if std is not None else "")


def _between(interval: Any) -> str:
    if not isinstance(interval, list) or len(interval) != 2 or not all(map(is_finite, interval)):
        return ""
    return f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _differences(section: Section, notes: _Notes) -> list[Part]:
    full = section.full
    if full is None or full not in section.shown():
        why = "it has no score" if full else "it is not among the records"
        return [Paragraph(f"There are no differences to full fine-tuning here: {why}.")]
    rows = []
    for label in section.shown():
        if label == full:
            continue
        row = [_difference(section.ok(label, task), section.ok(full, task), label, notes) for task in section.tasks]
        if _has_mean(section):
            row.append(_difference(section.means(label), section.means(full), label, notes))
        rows.append([label, *row])
    if not rows:
        return [Paragraph("Only full fine-tuning has a score.")]
    head = ["method", *section.tasks, *([MEAN] if _has_mean(section) else [])]
    said = f"A method's score minus that of {full}, in % points, with its 95 % interval over test examples."
    return [Paragraph(said), Table(head, rows)]


def _difference(ours: Sequence[Record], theirs: Sequence[Record], label: str, notes: _Notes) -> str:
    found = paired_difference(ours, theirs)
    if found is None:
        return NOTHING
    text = f"{100 * found.mean:+.1f}"
    if found.low is None or found.high is None:
        return f"{text} {notes.mark(f'{label}: no interval, because {found.why}')}"
    return f"{text} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


# --- costs ----------------------------------------------------------------------------------------------

_COSTS = (
    *("method", "learning rate", "steps", "samples", "training time", "step time", "step time / full's", "tokens/s"),
    *("trained parameters", "peak memory, measured", "memory, planned", "FLOPs"),
)


def _costs(section: Section) -> list[Part]:
    said = "Means over seeds; of learning rates, all that were chosen. FLOPs are the model's in training"
    said += ", as a stand-in for energy; memory is that of the seed with the most: of training, or of answering where "
    said += "nothing is trained."
    parts: list[Part] = [Paragraph(said)]
    kinds = _list(
        f"{record['peak_memory_kind']}"
        for label in section.rows
        for task in section.tasks
        for record in section.ok(label, task)
        if record["peak_memory_kind"]
    )
    if kinds:
        parts.append(
            Paragraph(f"Measured memory is: {kinds}. Planned memory is what the planner expects on the device.")
        )
    at_end = False
    for task in section.tasks:
        some = {label: section.ok(label, task) for label in section.rows if section.ok(label, task)}
        if not some:
            continue
        theirs = {record["seed"]: record for record in some.get(section.full or "", ())}
        rows = [[label, *_cost(found, theirs)] for label, found in some.items()]
        at_end = at_end or any(row[1].endswith("*") for row in rows)
        parts += [Heading(task, 4), Table(_COSTS, rows)]
    if at_end:
        said = "* A chosen learning rate is the lowest or highest of those tried: a better one may lie beyond."
        parts.append(Paragraph(said))
    return parts


def _cost(found: Sequence[Record], full: Mapping[int, Record]) -> list[str]:
    """The columns after the first, for the seeds of one method and task."""
    rates = sorted({record["learning_rate"] for record in found if is_finite(record["learning_rate"])})
    common = [record for record in found if record["seed"] in full]
    ours, theirs = mean_of(common, "step_seconds"), mean_of([full[one["seed"]] for one in common], "step_seconds")
    peaks = [record["peak_memory"] for record in found if is_finite(record["peak_memory"])]
    plans = [record["planned_memory"]["total"] for record in found if record["planned_memory"]]
    return [
        (", ".join(map(_rate, rates)) or NOTHING) + ("*" if any(map(_is_at_end, found)) else ""),
        _count(mean_of(found, "steps")),
        _count(mean_of(found, "samples")),
        _seconds(mean_of(found, "seconds")),
        _seconds(mean_of(found, "step_seconds")),
        f"{ours / theirs:.2f}" if ours is not None and theirs else NOTHING,
        _count(mean_of(found, "tokens_per_second")),
        _count(mean_of(found, "trained_parameters")),
        _bytes(max(peaks)) if peaks else NOTHING,
        _bytes(max(plans)) if plans else NOTHING,
        _flops(mean_of(found, "flops")),
    ]


def _is_at_end(record: Record) -> bool:
    rates = _tried(record)
    return len(rates) > 1 and record["learning_rate"] in (min(rates), max(rates))


def _rate(value: float) -> str:
    return f"{value:.3g}"


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    return (
        f"{value:,.1f} s" if value >= 10 else f"{value:.3g} s" if value >= 1 or not value else f"{1000 * value:.3g} ms"
    )


def _bytes(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.1f} MiB"


def _flops(value: float | None) -> str:
    if not value:
        return NOTHING if value is None else "0"
    unit, size = next((u, s) for u, s in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)) if value >= s or s == 1e9)
    return f"{value / size:,.1f} {unit}"


# --- MT-Bench and the paper -----------------------------------------------------------------------------


def _mt_bench(summary: Mapping[str, Any], pictures: Sequence[Picture]) -> list[Part]:
    parts: list[Part] = [Heading("MT-Bench")]
    for named in dict.fromkeys(one["judge"] for one in summary[SINGLE]):
        some = [one for one in summary[SINGLE] if one["judge"] == named]
        categories = list(dict.fromkeys(name for one in some for name in one["categories"]))
        categories.sort(key=lambda name: name == TOTAL)
        rows = []
        for one in some:
            means = [(one["categories"].get(name) or {}).get("mean") for name in categories]
            total = one["categories"][TOTAL]
            shown = [NOTHING if mean is None else f"{mean:.2f}" for mean in means]
            rows.append([one["model"], *shown, str(total["n"]), str(total["failed"])])
        parts.append(Paragraph(f"Mean rating, 1 to 10, by {named}, over both turns; failed verdicts enter no mean."))
        parts.append(Table(["model", *categories, "verdicts", "failed"], rows))
    parts += pictures
    for one in summary[PAIRWISE]:
        first, second = one["models"]
        counts = ("wins", "ties", "losses", "flips", "failed")
        rows = [[name, *(str(found[key]) for key in counts)] for name, found in one["categories"].items()]
        said = f"{first} against {second}, by {one['judge']}: a win is one in both orders; flips are ties because the "
        parts += [Paragraph(said + "two orders disagree."), Table(["category", *counts], rows)]
    return parts


def _paper(sections: Sequence[Section]) -> list[Part]:
    """The paper's tables of the tasks that occur; not ours, and of other models."""
    tables = paper.paper_tables({task for section in sections for task in section.tasks})
    if not tables:
        return []
    ours = _list(section.model for section in sections)
    parts: list[Part] = [
        Heading("The paper's, other models"),
        Paragraph(
            f"Printed by Liu et al., not measured here: other models (ours: {ours}), data and machines, so their "
            "numbers are no baseline for ours. (In brackets: standard deviation.) † is a row that they took from "
            "others' work."
        ),
    ]
    for table in tables:
        first = table[0]
        columns = list(dict.fromkeys((value.task, value.metric) for value in table))
        rows: dict[tuple[str, str], list[str]] = {}
        for value in table:
            row = rows.setdefault(
                (value.method, value.label), [value.label + (" †" if value.cited else ""), value.method]
            )
            row.append(value.printed)
        said = ", ".join(text for text in (first.model, first.setting, first.unit) if text)
        heads = [f"{task} {metric}" if metric else task for task, metric in columns]
        parts.append(Paragraph(f"{first.source[0].upper()}{first.source[1:]}: {said}"))
        parts.append(Table(["the paper's row", "method", *heads], list(rows.values())))
    return parts


# --- command --------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def read_verdicts(path: Path) -> list[Record]:
    """The verdicts of a file that `hift_ds.evaluation.mt_bench.command` wrote."""

    def key_of(where: str, record: Record) -> Any:
        key = judge.verdict_key(where, record)
        checked(where, record)
        return key

    return list(read_records(path, key_of).values())


def _title(folder: Path) -> str:
    try:
        return str(json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["title"])
    except (OSError, ValueError, KeyError, TypeError):  # joined results have no settings
        return TITLE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; the exit code: 0, or 2 for a mistake of the user's."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m evaluation.report", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("out", type=Path, metavar="OUT", help=f"folder with {RESULTS}")
    parser.add_argument("--add", nargs="+", type=Path, metavar="FOLDER", help=f"put its {RESULTS} into OUT's first")
    parser.add_argument("--verdicts", type=Path, metavar="FILE", help="of MT-Bench, made by evaluation.mt_bench")
    parser.add_argument("--title", help=f"default: the comparison's, else {TITLE!r}")
    parser.add_argument("--wandb", choices=("offline", "online"), help="log tables and pictures as a run, too")
    parser.add_argument("--wandb-project", metavar="NAME", help="default: that of runs")
    try:
        options = parser.parse_args(argv)
        if options.add:
            results.add_cells(options.out, options.add)
        found = results.read_results(options.out / RESULTS)
        judged = read_verdicts(options.verdicts) if options.verdicts else None
        title = options.title or _title(options.out)
        write_report(found, options.out, title, verdicts=judged)
        if options.wandb:
            from hift_ds.launch.config.settings import LoggingSettings  # takes seconds to import

            project = options.wandb_project or LoggingSettings.wandb_project
            log_report(found, options.out, title, mode=options.wandb, project=project, verdicts=judged or ())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out / 'report.html'} and report.md: {len(found)} cells")
    return 0
