"""The picture of the overview: the difference to full fine-tuning against time and against memory, with labels."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from hift_ds.evaluation.report.glance import Compared, compare_with_full, same_time, time_name
from hift_ds.evaluation.report.plots import DPI, Style, logarithmic, plain
from hift_ds.evaluation.report.resampling import MeanDifference
from hift_ds.evaluation.report.results import Section

KIND = "glance"
TEXT = (
    "Difference to full fine-tuning against time and peak memory, both relative to full fine-tuning's; error "
    "bars are 95 % intervals, up and left is better, and a hollow marker lacks some tasks or seeds"
)
LEAST = {"score": 1.0, "loss": 0.01}  # points and nats above and below 0 that an axis shows at least
LOG = 10  # an axis is logarithmic if its values differ by more than this factor
AWAY = (7, 13, 20, 30, 42, 56, 72)  # points between a marker and its label, the nearest free one is taken
ANGLES = tuple(math.radians(degrees) for degrees in (0, 180, 90, 270, 45, 315, 135, 225))


@dataclass(frozen=True)
class _Point:
    row: Compared
    style: Style
    x: float
    y: float
    low: float
    high: float


def draw(section: Section, styles: Mapping[str, Style]) -> Figure | None:
    """Draw two panels for scores, and two more for losses if tasks are judged by them; None without a comparison."""
    rows = compare_with_full(section)
    found: dict[str, list[tuple[Compared, MeanDifference]]] = {
        "score - full's, points": [(row, row.points) for row in rows if row.points],
        "loss - full's, nats": [(row, row.loss) for row in rows if row.loss],
    }
    kinds = {name: some for name, some in found.items() if len(some) > 1}
    if not kinds:
        return None
    figure = Figure(figsize=(10, 0.5 + 4.1 * len(kinds)), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # labels are placed by the sizes that it measures
    panels = figure.subplots(len(kinds), 2, squeeze=False, sharey="row")
    equal = same_time(rows)
    costs: dict[str, Callable[[Compared], float | None]] = {
        time_name(rows): lambda row: row.step_time if equal else row.time,
        "peak memory / full's": lambda row: row.memory,
    }
    placed = []
    for line, (name, some) in zip(panels, kinds.items(), strict=True):
        scale = 100 if "points" in name else 1
        for axes, (cost, value_of) in zip(line, costs.items(), strict=True):
            points = [
                _Point(
                    row, styles[row.label], value, scale * gap.mean,
                    scale * (gap.mean if gap.low is None else gap.low),
                    scale * (gap.mean if gap.high is None else gap.high),
                )
                for row, gap in some
                if (value := value_of(row)) is not None
            ]  # fmt: skip
            placed.append((axes, _draw_points(axes, points)))
            axes.set_xlabel(cost)
        line[0].set_ylabel(name)
        least, (low, high) = LEAST[name.partition(" ")[0]], line[0].get_ylim()
        line[0].set_ylim(min(low, -least), max(high, least))
        if "loss" in name:
            line[0].invert_yaxis()  # up is better in all panels
            line[0].set_ylabel(f"{name} (up = lower = better)")
    title = textwrap.wrap(f"{section.model}, {section.budget}", 100, max_lines=2, placeholder=" …")
    figure.suptitle("\n".join(title).replace("$", r"\$"), fontsize=11)
    figure.draw_without_rendering()  # the layout is needed to place labels
    for axes, points in placed:
        _draw_labels(axes, points, canvas.get_renderer(), DPI / 72)
    return figure


def _draw_points(axes: Axes, points: Sequence[_Point]) -> list[_Point]:
    """Draw markers and error bars; return the points as drawn: methods without training are at the left end."""
    positive = [point.x for point in points if point.x > 0]
    if positive and max(positive) > LOG * min(positive):
        left = min(positive) / 1.6
        axes.set_xlim(left, max(positive) * 1.6)
        logarithmic(axes, "x")
    else:
        left = 0.0
        axes.set_xlim(-0.04 * max(positive, default=1), 1.18 * max(positive, default=1))
    drawn = [_Point(p.row, p.style, p.x or left, p.y, p.low, p.high) for p in points]
    axes.axhline(0, color="#999", linewidth=0.8)
    axes.axvline(1, color="#999", linewidth=0.8)
    for point in drawn:
        axes.errorbar(
            point.x, point.y, [[point.y - point.low], [point.high - point.y]],
            color=point.style.color, marker=point.style.marker, markersize=7, elinewidth=1.1, capsize=3,
            markerfacecolor=point.style.color if point.row.complete else "white", clip_on=False, zorder=3,
        )  # fmt: skip
    axes.margins(y=0.1)
    plain(axes)
    return drawn


def _draw_labels(axes: Axes, points: Sequence[_Point], renderer: RendererAgg, pixel: float) -> None:
    """Write each label next to its marker, where it covers no marker or other label, and few error bars.

    Args:
        pixel: pixels of a point, the unit of text sizes.
    """
    places = [axes.transData.transform((point.x, point.y)) for point in points]
    taken = [Bbox.from_bounds(x - 5 * pixel, y - 5 * pixel, 10 * pixel, 10 * pixel) for x, y in places]
    bars = []
    for point, (x, _) in zip(points, places, strict=True):
        ends = sorted(axes.transData.transform((point.x, end))[1] for end in (point.low, point.high))
        bars.append(Bbox.from_extents(x - 2 * pixel, ends[0], x + 2 * pixel, ends[1]))
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda one: one[1][1]):
        label = axes.annotate(
            point.style.name, (point.x, point.y), (0, 0), textcoords="offset points", fontsize=9, zorder=4,
            va="center", ha="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": point.style.color, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
        label.set_in_layout(False)
        size = label.get_window_extent(renderer)
        width, height = size.width, size.height
        best, least, near = (0.0, 0.0), math.inf, False
        for away, angle in itertools.product(AWAY, ANGLES):
            # From the marker to the middle of the label, so that the gap between them is `away`.
            dx = math.cos(angle) * (away * pixel + width / 2)
            dy = math.sin(angle) * (away * pixel + height / 2)
            box = Bbox.from_bounds(x + dx - width / 2, y + dy - height / 2, width, height)
            outside = not (axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 + 12 * pixel)
            outside = outside or not (axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1)
            covered = sum(_shared(box, other) for other in taken) + 0.1 * sum(_shared(box, bar) for bar in bars)
            cost = 2 * covered / pixel**2 + away + 1e9 * outside
            if cost < least:
                best, least, near = (dx, dy), cost, away <= AWAY[1]
        if near and label.arrow_patch is not None:
            label.arrow_patch.set_visible(False)
        label.set_position((best[0] / pixel, best[1] / pixel))
        taken.append(Bbox.from_bounds(x + best[0] - width / 2, y + best[1] - height / 2, width, height))


def _shared(one: Bbox, other: Bbox) -> float:
    """Return the area that two boxes share."""
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else shared.width * shared.height
