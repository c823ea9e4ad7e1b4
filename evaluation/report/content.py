"""The contents of a report: an overview, what was run, each model and budget, MT-Bench, and the paper's own tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hift_ds.evaluation.json_lines import Record
from hift_ds.evaluation.mt_bench.questions import PAIRWISE, SINGLE
from hift_ds.evaluation.mt_bench.verdicts import TOTAL, summarize
from hift_ds.evaluation.report import glance, glance_picture, paper, plots, results, tables
from hift_ds.evaluation.report.document import Heading, Items, Paragraph, Part, Picture, Table, as_html, markdown
from hift_ds.evaluation.report.results import OK, Section, as_text, tried_rates
from hift_ds.evaluation.report.tables import NOTHING, joined
from hift_ds.launch.errors import UserError

TIMED_ALONE = "timed alone"  # in the field `seconds_are`


def write_report(records: list[Record], folder: Path, title: str, *, verdicts: list[Record] | None = None) -> None:
    """Write report.md, report.html (one file with its pictures) and plots/*.png into `folder`.

    Older pictures in plots/ are deleted. Cells of the plan in `folder` that have no record yet are said to be missing.

    Args:
        records: the cells of a comparison, see results.py.
        verdicts: MT-Bench verdicts, for a table and a radar chart.

    Raises:
        UserError: a record lacks a field, or the folder cannot be written.
    """
    sections = results.arrange(results.checked(records), results.read_plan(folder))
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
    """Draw the pictures of each section, by kind, and those of MT-Bench."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for old in (folder / "plots").glob("*.png"):
        old.unlink()
    rows = {label: method for section in sections for label, method in section.rows.items()}
    judged = {one["model"]: rows.get(one["model"], one["model"]) for one in summary[SINGLE]}
    styles = plots.make_styles({label: rows[label] for some in _ordered(sections) for label in some} | judged)
    drawn = []
    for number, section in enumerate(sections, 1):
        pictures = plots.draw_section(number, section, styles, folder)
        if (overview := glance_picture.draw(section, styles)) is not None:
            path = f"plots/{number}-{glance_picture.KIND}.png"
            overview.savefig(folder / path, dpi=plots.DPI)
            text = f"{glance_picture.TEXT} ({section.model}, {section.budget})."
            pictures[glance_picture.KIND] = [Picture(path, text)]
        drawn.append(pictures)
    return drawn, plots.draw_verdicts(summary, styles, folder)


def build(
    sections: Sequence[Section],
    title: str,
    summary: Mapping[str, Any],
    drawn: Sequence[Mapping[str, list[Picture]]],
    radars: Sequence[Picture] = (),
) -> list[Part]:
    """Return the parts of the report.

    Args:
        summary: see `verdicts.summarize`.
        drawn: the pictures of each section, by kind.
        radars: the pictures of MT-Bench.
    """
    parts: list[Part] = [Heading(title, 1), *_at_a_glance(sections, drawn), *_header(sections)]
    for section, pictures in zip(sections, drawn, strict=True):
        parts += _section(section, pictures)
    if summary[SINGLE] or summary[PAIRWISE]:
        parts += _mt_bench(summary, radars)
    return [*parts, *_paper(sections)]


def _ordered(sections: Sequence[Section]) -> list[list[str]]:
    """Return all labels grouped by method. The order is the same for all sections, so that a label keeps its style."""
    rows = {label: method for section in sections for label, method in section.rows.items()}
    order = [*results.METHODS, *sorted(set(rows.values()) - set(results.METHODS))]
    return [[label for label, of in rows.items() if of == method] for method in order]


# --- overview -------------------------------------------------------------------------------------------


def _at_a_glance(sections: Sequence[Section], drawn: Sequence[Mapping[str, list[Picture]]]) -> list[Part]:
    parts: list[Part] = [Heading("At a glance")] if sections else []
    for section, pictures in zip(sections, drawn, strict=True):
        parts.append(Heading(f"{section.model}, {section.budget}", 3))
        parts += glance.parts(section, pictures.get(glance_picture.KIND, ()))
    return parts


# --- header ---------------------------------------------------------------------------------------------


def _fact(record: Record, name: str) -> str:
    """Format a fact about the run. Versions leave out the commit, which has its own line."""
    value = record[name]
    return as_text({key: one for key, one in value.items() if key != "git"} if isinstance(value, dict) else value)


def _header(sections: Sequence[Section]) -> list[Part]:
    records = [record for section in sections for cell in section.cells.values() for record in cell.values()]
    good = [record for record in records if record["status"] == OK]
    if not records:
        return [Paragraph("There are no records.")]
    facts = [
        f"Methods: {'; '.join(label for method in _ordered(sections) for label in method)}.",
        f"Models: {joined(record['model'] for record in records)}.",
        f"Tasks: {joined(_task(record) for record in good) or joined(record['task'] for record in records)}.",
        f"Budgets: {joined(record['budget'] for record in records)}.",
        f"Seeds: {joined(str(seed) for seed in sorted({record['seed'] for record in records}))}.",
        f"Cells: {len(records)}, of which {len(good)} have a score.",
    ]
    for name, what in (("machine", "Machine"), ("ranks", "Ranks"), ("versions", "Versions"), ("git", "Git")):
        facts += [f"{what}: {text}." for text in [joined(_fact(record, name) for record in good)] if text]
    dates = sorted(as_text(record["date"]) for record in good)
    facts += [f"Date: {dates[0]}" + (f" to {dates[-1]}." if dates[-1] != dates[0] else ".")] if dates else []
    parts: list[Part] = [Heading("What was run"), Items(facts), Heading("How to read this")]
    if not good:
        return [*parts[:2], Paragraph("No cell has a score yet.")]
    several = any(len(section.seeds) > 1 for section in sections)
    reading = [
        "Scores are in %, on the test set; higher is better.",
        "± is the sample standard deviation over seeds. A seed draws the data and their order, and drives the methods' "
        "randomness."
        if several
        else "There is only one seed, so there is no ±: the variation between seeds is unknown.",
        "Intervals are 95 % percentile intervals of a bootstrap over test examples. They show the uncertainty from the "
        "choice of test examples, not from the choice of seeds" + (", which ± shows." if several else "."),
        "Differences to full fine-tuning are paired: the i-th resample has the same test examples for all methods. The "
        "resampled scores are averaged over the seeds that both methods have, then subtracted.",
        "Intervals at a glance are wider: plus and minus Student's t times a standard error, whose variance adds up "
        "that between seeds (of each task's paired differences) and that over test examples.",
        "Time and memory at a glance are geometric means over tasks of the ratio of the means over the common seeds.",
        *_times(good),
        "Bold marks the best score of a column if the interval of its difference to the second best excludes 0. If "
        "nothing is bold, the test set is too small to separate the best two.",
    ]
    return [*parts, Items([*reading, _tuning(good)]), *_about_data(good)]


def _times(good: Sequence[Record]) -> list[str]:
    """Say how the seconds of training were found. Those of earlier versions were measured."""
    trained = [record for record in good if record["steps"]]
    alone = [record for record in trained if record.get("seconds_are") == TIMED_ALONE]
    if not alone:
        return ["Seconds of training were measured in each training."] if trained else []
    rest = (
        "" if len(alone) == len(trained) else f", in {len(alone)} of {len(trained)} trainings; the others were measured"
    )
    return [
        "Seconds of training are what it would take alone on the device, by the times of steps that were measured "
        f"alone, once for each method and task{rest}. Several trainings may have shared the device."
    ]


def _about_data(good: Sequence[Record]) -> list[Part]:
    """List where the data differ from what the settings ask for."""
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
            notes[f"{task}: {label}: up to {count} of {n} test examples were cut at the {side}."] = None
        elif count:
            notes[f"{task}: {label}: up to {count} training examples were cut at the end."] = None
    return [Heading("About the data", 2), Items(list(notes))] if notes else []


def _tuning(good: Sequence[Record]) -> str:
    tried: dict[str, set[float]] = {}
    for record in good:
        tried.setdefault(record["label"], set()).update(tried_rates(record))
    grids: dict[str, list[str]] = {}
    for label, rates in tried.items():
        if len(rates) > 1:
            grids.setdefault(", ".join(map(tables.format_rate, sorted(rates))), []).append(label)
    if not grids:
        return "Learning rates were not tuned; the tables of costs list them."
    tuned = ", or ".join(f"{grid} ({'; '.join(labels)})" for grid, labels in grids.items())
    given = [label for label, rates in tried.items() if len(rates) == 1]
    text = f"Learning rates were chosen by the score on the validation set, never on the test set, from {tuned}."
    return text + (f" Only one rate was tried for: {'; '.join(given)}." if given else "")


def _task(record: Record) -> str:
    return f"{record['task']} ({record['metric']})"


# --- a model and budget ---------------------------------------------------------------------------------


def _section(section: Section, drawn: Mapping[str, list[Picture]]) -> list[Part]:
    parts: list[Part] = [Heading(f"{section.model}, {section.budget}")]
    notes = tables.Notes()
    scores = [Heading("Scores", 3), *tables.scores(section, notes), *notes.parts()]
    if not section.shown():
        return [*parts, *scores]
    scores += [*tables.other_metrics(section), *tables.unanswered(section)]
    notes = tables.Notes()
    differences = [Heading("Differences to full fine-tuning", 3), *tables.differences(section, notes), *notes.parts()]
    parts += [*scores, *differences, *drawn.get("time", ()), *drawn.get("memory", ()), Heading("Training and cost", 3)]
    parts += [*tables.costs(section), *drawn.get("parts", ()), *tables.spent(section), *tables.rates(section)]
    parts += [Heading("Training loss", 3), *drawn.get("loss", ())]
    if not drawn.get("loss"):
        parts.append(Paragraph("No method has a loss curve."))
    if drawn.get("ablation"):
        parts += [Heading("HiFT's strategies and blocks", 3), *drawn["ablation"]]
    return parts


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
        parts.append(Paragraph(f"Mean rating from 1 to 10 by {named} over both turns, without failed verdicts."))
        parts.append(Table(["model", *categories, "verdicts", "failed"], rows))
    parts += pictures
    for one in summary[PAIRWISE]:
        first, second = one["models"]
        counts = ("wins", "ties", "losses", "flips", "failed")
        rows = [[name, *(str(found[key]) for key in counts)] for name, found in one["categories"].items()]
        caption = (
            f"{first} against {second}, judged by {one['judge']}. A win counts in both orders; a flip is a tie because "
        )
        parts += [Paragraph(caption + "the two orders disagree."), Table(["category", *counts], rows)]
    return parts


def _paper(sections: Sequence[Section]) -> list[Part]:
    """Show the paper's tables of the same tasks; they are for other models."""
    tables = paper.paper_tables({task for section in sections for task in section.tasks})
    if not tables:
        return []
    ours = joined(section.model for section in sections)
    parts: list[Part] = [
        Heading("Results printed in the paper (other models)"),
        Paragraph(
            "These numbers are from Liu et al. and were not measured here. Models, data and machines differ from those "
            f"above ({ours}), so they are no baseline. Standard deviations are in brackets. † marks rows that it "
            "cites from other work."
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
        caption = ", ".join(text for text in (first.model, first.setting, first.unit) if text)
        heads = [f"{task} {metric}" if metric else task for task, metric in columns]
        parts.append(Paragraph(f"{first.source[0].upper()}{first.source[1:]}: {caption}"))
        parts.append(Table(["the paper's row", "method", *heads], list(rows.values())))
    return parts
