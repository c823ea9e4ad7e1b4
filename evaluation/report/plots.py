"""Draw the pictures of a comparison with matplotlib.

A method has the same color in the pictures of all reports; its labels differ in line and marker.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hift_ds.evaluation.json_lines import Record
from hift_ds.evaluation.mt_bench.questions import SINGLE, TEMPERATURES
from hift_ds.evaluation.report.document import Picture, clean
from hift_ds.evaluation.report.results import MEMORY_PARTS, METHODS, Section, is_finite, mean_of, std_of

# Okabe and Ito's colors for color-blind readers, without yellow, which is too faint for lines, and with Tol's wine and
# olive and a gray. The methods that are compared most come first: no two of them share a color.
COLORS = ("#000000", "#D55E00", "#0072B2", "#CC79A7", "#009E73", "#56B4E9", "#E69F00", "#882255", "#888888", "#999933")
FIRST = ("full", "hift", "lora", "mezo", "lomo", "prefix", "bitfit", "linear-probing", "zero-shot", "icl")
LINES: tuple[Any, ...] = (
    *("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (9, 3)), (0, (1, 3)), (0, (4, 1, 1, 1)), (0, (10, 2, 2, 2))),
    *((0, (5, 1, 5, 4)), (0, (2, 2))),
)
MARKERS = "osD^vP*X<>pd"
HATCHES = ("", "///", "xxx", "...")
PARTS = dict(zip(MEMORY_PARTS, ("#0072B2", "#56B4E9", "#CC79A7", "#E69F00", "#009E73", "#999999"), strict=True))
GIB = 2**30
DPI = 150
WINDOW = 0.05  # loss curves are smoothed over this share of a run
POINTS = 200  # points of a drawn loss curve
COLUMNS = 3  # panels in a row


@dataclass(frozen=True)
class Style:
    """How a label is drawn."""

    name: str  # the label as it is drawn
    color: str
    line: Any
    marker: str
    hatch: str


def make_styles(rows: Mapping[str, str]) -> dict[str, Style]:
    """Assign a style to each label: its color by its method, line and marker by its place among the method's labels.

    Methods that share a color, as there are more methods than colors, have other lines and markers.

    Args:
        rows: label -> method.
    """
    order = list(dict.fromkeys((*FIRST, *METHODS, *rows.values())))
    counts: dict[str, int] = {}
    styles = {}
    for label, method in rows.items():
        turn, color = divmod(order.index(method), len(COLORS))
        nth = counts[method] = counts.get(method, -1) + 1
        line, marker = turn + 2 * nth, order.index(method) + nth
        styles[label] = Style(
            _name(label), COLORS[color], LINES[line % len(LINES)], MARKERS[marker % len(MARKERS)],
            HATCHES[nth % len(HATCHES)],
        )  # fmt: skip
    return styles


def _name(text: str, longest: int = 32) -> str:
    """Shorten and escape text for matplotlib, where `$` begins a formula and a leading `_` hides a legend entry."""
    text = clean(text)
    text = (text if len(text) <= longest else text[: longest - 1] + "…").replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def draw_section(number: int, section: Section, styles: Mapping[str, Style], folder: Path) -> dict[str, list[Picture]]:
    """Write the pictures of a model and budget to folder/plots; return them by kind."""
    drawn: dict[str, list[Picture]] = {}

    def save(kind: str, figure: Figure | None, text: str, task: str = "") -> None:
        if figure is not None:
            end = "-" + re.sub(r"[^A-Za-z0-9]+", "-", task) + f"-{section.tasks.index(task) + 1}" if task else ""
            path = f"plots/{number}-{kind}{end}.png"
            figure.savefig(folder / path, dpi=DPI)
            where = ", ".join(name for name in (task, section.model, section.budget) if name)
            drawn.setdefault(kind, []).append(Picture(path, f"{text} ({where})."))

    several = len(section.seeds) > 1
    over = ": means over seeds with their standard deviations" if several else ""
    time = f"Score against training time{over}; a horizontal line is a method without training"
    save("time", score_against(section, styles, "seconds"), time)
    save("memory", score_against(section, styles, "peak_memory"), f"Score against measured peak memory{over}")
    for task in section.tasks:
        loss = "Training loss" + (", the mean over seeds" if several else "")
        save("loss", loss_curves(section, task, styles), loss, task)
        parts = (
            "Planned memory (bars) and measured peak, both the highest over seeds. Buffers are DeepSpeed's: at ZeRO 1 "
            "to 3 buckets of 5e8 elements by default, and with HiFT at most as large as a block"
        )
        save("parts", memory_bars(section, task), parts, task)
    save("ablation", ablations(section, styles), f"HiFT's strategies and numbers of layers per block{over}")
    return drawn


# --- training loss --------------------------------------------------------------------------------------


def loss_curves(section: Section, task: str, styles: Mapping[str, Style]) -> Figure | None:
    """Draw the smoothed loss against samples and seconds, the mean over seeds; None without a curve."""
    curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {"samples": {}, "seconds": {}}
    for label in section.rows:
        for axis, found in curves.items():
            some = [_curve(record, axis) for record in section.ok(label, task)]
            kept = [one for one in some if len(one[0]) > 1]
            if kept:
                found[label] = _mean_curve(kept)
    labels = [label for label in section.rows if label in curves["samples"] or label in curves["seconds"]]
    if not labels:
        return None
    figure = Figure(figsize=(11, _height(labels, 4.2)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    units = {"samples": "samples trained on", "seconds": "training time, s"}
    for axes, (axis, found) in zip(panels, curves.items(), strict=True):
        for label, (x, y) in found.items():
            style = styles[label]
            axes.plot(x, y, color=style.color, linestyle=style.line, linewidth=1.6)
        ends = [x[-1] for x, _ in found.values() if x[-1] > 0]
        if ends and max(ends) > 20 * min(ends):
            logarithmic(axes, "x")
        axes.set_xlabel(units[axis])
        plain(axes)
    losses = np.concatenate([y for found in curves.values() for _, y in found.values()])
    if losses.min() > 0 and losses.max() > 30 * losses.min():
        logarithmic(panels[0], "y")
    panels[0].set_ylabel(f"training loss, smoothed over {WINDOW:.0%} of the run")
    figure.suptitle(_name(f"{task}: training loss", 80))
    _legend(figure, labels, styles, lines=True)
    return figure


def _curve(record: Record, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Return samples or seconds, shape (points,), and the smoothed loss, shape (points,)."""
    points = [point for point in record["curve"] or () if is_finite(point[3])]
    if axis == "seconds":
        points = [point for point in points if is_finite(point[1])]
        x = [point[1] for point in points]
    else:
        a_step = record["samples"] / record["steps"] if record["samples"] and record["steps"] else math.nan
        points = [point for point in points if is_finite(point[0]) and is_finite(a_step)]
        x = [point[0] * a_step for point in points]
    return np.array(x, float), _smoothed(np.array([point[3] for point in points], float))


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Centered means over `WINDOW` of the points, of fewer at the ends."""
    half = max(0, round(len(y) * WINDOW / 2))
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def _mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Over where all of them are."""
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if len(curves) == 1 or start >= end:
        return curves[0]
    grid = np.linspace(start, end, POINTS)
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)


# --- score against cost ---------------------------------------------------------------------------------


def score_against(section: Section, styles: Mapping[str, Style], cost: str) -> Figure | None:
    """Draw scores against a cost (means and standard deviations over seeds), a panel for each task.

    Methods without training are horizontal lines. Return None if no method has the cost.
    """
    unit, scale = {"seconds": ("training time, s", 1), "peak_memory": ("peak memory, GiB", GIB)}[cost]
    labels = [label for label in section.rows if any(section.ok(label, task) for task in section.tasks)]
    tasks = [task for task in section.tasks if any(section.ok(label, task) for label in labels)]
    costs = [mean_of(section.ok(label, task), cost) for label in labels for task in tasks]
    if not any(costs):
        return None
    rows, columns = math.ceil(len(tasks) / COLUMNS), min(COLUMNS, len(tasks))
    size = (2.2 + 3.6 * columns + (1.5 if columns == 1 else 0), _height(labels, 3.6 * rows + 0.5))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, task in zip(panels, tasks, strict=False):
        reached = []
        for label in labels:
            some, style = section.ok(label, task), styles[label]
            y = mean_of(some, "score")
            if y is None:
                continue
            x = mean_of(some, cost)
            if not x:
                axes.axhline(100 * y, color=style.color, linestyle=style.line, linewidth=1.2)
                continue
            reached.append(x / scale)
            x_std, y_std = (std_of(some, cost) or 0) / scale, 100 * (std_of(some) or 0)
            axes.errorbar(
                x / scale, 100 * y, y_std or None, x_std or None,
                color=style.color, marker=style.marker, markersize=6, elinewidth=0.9, capsize=2,
            )  # fmt: skip
        if reached and max(reached) > 10 * min(reached):
            logarithmic(axes, "x")
        axes.set_title(_name(task, 40), fontsize=11)
        axes.set_xlabel(unit)
        axes.set_ylabel(_name(f"{section.metric(task)}, %"))
        plain(axes)
    for axes in figure.axes[len(tasks) :]:  # hide unused panels
        axes.set_visible(False)
    _legend(figure, labels, styles, without=[label for label in labels if not _has(section, label, cost)])
    return figure


def _has(section: Section, label: str, cost: str) -> bool:
    return any(mean_of(section.ok(label, task), cost) for task in section.tasks)


# --- memory ---------------------------------------------------------------------------------------------


def memory_bars(section: Section, task: str) -> Figure | None:
    """Draw planned memory as stacked bars with the measured peak, the highest over seeds; None without either."""
    rows = []
    for label in section.rows:
        some = section.ok(label, task)
        plans = [record["planned_memory"] for record in some if record["planned_memory"]]
        peaks = [record["peak_memory"] for record in some if is_finite(record["peak_memory"])]
        if plans or peaks:
            plan = max(plans, key=lambda one: one["total"]) if plans else None
            rows.append((label, plan, max(peaks) if peaks else None))
    if not rows:
        return None
    figure = Figure(figsize=(10, 1.6 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    left = np.zeros(len(rows))
    for part, color in PARTS.items():
        widths = np.array([plan[part] / GIB if plan else 0 for _, plan, _ in rows])
        if widths.any():
            name = part.replace("_", " ")
            axes.barh(places, widths, 0.62, left, color=color, edgecolor="white", linewidth=0.5, label=name)
        left += widths
    kinds = {record["peak_memory_kind"] for label in section.rows for record in section.ok(label, task)} - {None, ""}
    measured = [(peak / GIB, place) for place, (_, _, peak) in enumerate(rows) if peak is not None]
    if measured:
        caption = textwrap.wrap(_name(", ".join(["measured", *sorted(kinds)]), 150), 34)
        axes.plot(
            *zip(*measured, strict=True), "D", color="black", markersize=5, label="\n".join(caption), clip_on=False
        )
    axes.set_yticks(places, [_name(label) for label, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.05 * max(left.max(), *(peak for peak, _ in measured), 1e-9))
    axes.set_xlabel("memory, GiB")
    axes.set_title(_name(f"{task}: planned memory (bars) and measured peak", 80))
    plain(axes, grid="x")
    axes.tick_params(axis="y", length=0)
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: isinstance(handles[i], Line2D))  # the measured peak comes last
    handles, names = [handles[i] for i in order], [names[i] for i in order]
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    return figure


# --- ablations ------------------------------------------------------------------------------------------


def ablations(section: Section, styles: Mapping[str, Style]) -> Figure | None:
    """Draw HiFT's rows side by side for each task: strategies, and layers per block for labels with "m = 4".

    None if HiFT has only one row.
    """
    ours = [label for label, method in section.rows.items() if method == "hift" and label in section.shown()]
    sized = [label for label in ours if re.search(r"\bm ?= ?\d", label)]
    others = [label for label in ours if label not in sized]
    base = others[:1]
    panels = {"order of blocks, other settings": others, "layers per block, m": base + sized if sized else []}
    panels = {title: labels for title, labels in panels.items() if len(labels) > 1}
    if not panels:
        return None
    tasks = [task for task in section.tasks if any(section.ok(label, task) for label in ours)]
    widest = max(map(len, panels.values()))
    width = max(6.0, 1.2 + 0.5 * widest * len(tasks))
    figure = Figure(figsize=(width, 4.1 * len(panels)), layout="constrained")
    for axes, (title, labels) in zip(np.ravel(figure.subplots(len(panels), 1)), panels.items(), strict=True):
        bar = 0.84 / len(labels)
        for i, label in enumerate(labels):
            style = styles[label]
            for place, task in enumerate(tasks):
                some = section.ok(label, task)
                y = mean_of(some, "score")
                if y is None:
                    continue
                error = std_of(some)
                x = place + (i - (len(labels) - 1) / 2) * bar
                axes.bar(
                    x, 100 * y, bar * 0.92, color=style.color, hatch=style.hatch, edgecolor="white",
                    label=style.name if style.name not in axes.get_legend_handles_labels()[1] else None,
                )  # fmt: skip
                if error is not None:
                    axes.errorbar(x, 100 * y, 100 * error, color="#444", elinewidth=1, capsize=2)
                top = 100 * max(y, 0) + 100 * (error or 0)
                axes.annotate(f"{100 * y:.1f}", (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)
        axes.set_xticks(range(len(tasks)), [_name(f"{task}\n{section.metric(task)}", 40) for task in tasks])
        axes.set_ylabel("score, %")
        axes.set_title(f"HiFT: {title}")
        axes.margins(y=0.12)
        plain(axes, grid="y")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=max(1, int(width / 2.4)))
    return figure


# --- MT-Bench -------------------------------------------------------------------------------------------


def radar(summary: Sequence[Mapping[str, Any]], styles: Mapping[str, Style]) -> Figure | None:
    """Draw the mean ratings by category for one judge; a category without ratings is a gap."""
    if not summary:
        return None
    models = [one["model"] for one in summary]
    figure = Figure(figsize=(9, _height(models, 6)), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    angles = np.linspace(0, 2 * math.pi, len(TEMPERATURES), endpoint=False)
    for one in summary:
        means = [(one["categories"].get(name) or {}).get("mean") for name in TEMPERATURES]
        y = np.array([math.nan if mean is None else mean for mean in means])
        style = styles[one["model"]]
        axes.plot(
            [*angles, angles[0]], [*y, y[0]], color=style.color, linestyle=style.line, marker=style.marker,
            markersize=5, linewidth=1.6,
        )  # fmt: skip
    axes.set_theta_offset(math.pi / 2)  # type: ignore[attr-defined]
    axes.set_theta_direction(-1)  # type: ignore[attr-defined]
    axes.set_xticks(angles, list(TEMPERATURES))
    axes.tick_params(axis="x", pad=14)
    axes.set_ylim(0, 10)
    axes.set_yticks([2, 4, 6, 8, 10])
    axes.tick_params(axis="y", labelsize=8, labelcolor="#666")
    axes.set_title(_name(f"MT-Bench: mean rating from 1 to 10 by {summary[0]['judge']}", 80), pad=18)
    _legend(figure, models, styles, lines=True, markers=True)
    return figure


def draw_verdicts(summary: Mapping[str, Any], styles: Mapping[str, Style], folder: Path) -> list[Picture]:
    """Write a radar chart for each judge to folder/plots."""
    pictures = []
    for number, judge in enumerate(dict.fromkeys(one["judge"] for one in summary[SINGLE]), 1):
        figure = radar([one for one in summary[SINGLE] if one["judge"] == judge], styles)
        if figure is not None:
            path = f"plots/mt-bench-{number}.png"
            figure.savefig(folder / path, dpi=DPI)
            pictures.append(Picture(path, f"MT-Bench: mean rating by category, judged by {judge}."))
    return pictures


# --- helpers ------------------------------------------------------------------------------------


def _height(labels: Sequence[str], least: float) -> float:
    """Return the height in inches at which the legend fits next to the panels."""
    return max(least, 0.8 + 0.24 * len(labels))


def plain(axes: Axes, grid: str = "both") -> None:
    """Give a panel a light grid and two spines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e4e4e4", linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def logarithmic(axes: Axes, which: str) -> None:
    """Make an axis logarithmic with plain numbers, at 1, 2 and 5 of each power of ten if there are few powers."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    few = math.log10(high / low) < 2.2 if low > 0 else False
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(
    figure: Figure,
    labels: Sequence[str],
    styles: Mapping[str, Style],
    *,
    lines: bool = False,
    markers: bool = False,
    without: Sequence[str] = (),
) -> None:
    """Draw the legend outside the panels; labels `without` a point are drawn as lines."""
    handles = []
    for style in (styles[label] for label in labels):
        as_line = lines or style.name in [styles[label].name for label in without]
        handles.append(
            Line2D(
                [],
                [],
                color=style.color,
                linestyle=style.line if as_line else "none",
                marker=style.marker if markers or not as_line else "none",
                markersize=5,
            )  # fmt: skip
        )
    names = [styles[label].name for label in labels]
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9, handlelength=3.2)
