"""The overview of a report: each method against full fine-tuning, over all tasks, on the cells that both have."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hift_ds.evaluation.report import content, glance, glance_picture, plots, results
from hift_ds.evaluation.report.document import Items, Paragraph, Table, markdown
from hift_ds.launch.errors import UserError
from tests.support.comparison_records import cell, many, missing


def scored(label: str, score: float, task: str = "sst2", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A cell whose replicates are its score, so that its intervals are about seeds alone."""
    return (
        cell(label, task=task, seed=seed, n=10, replicates=20) | {"score": score, "bootstrap": [score] * 20} | changes
    )


def lost(label: str, loss: float, seed: int = 0, score: float = 0.0, **changes: Any) -> dict[str, Any]:
    metrics = {"exact_match": score, "answer_loss": loss}
    return scored(label, score, "gsm8k", seed, metric="exact_match", metrics=metrics, **changes)


def section_of(found: list[dict[str, Any]], plan: results.Plan | None = None) -> results.Section:
    (section,) = results.arrange(results.checked(found), plan)
    return section


def table_of(section: results.Section) -> dict[str, dict[str, str]]:
    """The table: row -> column -> text."""
    (table,) = (part for part in glance.parts(section) if isinstance(part, Table))
    rows = [[str(cell) for cell in row] for row in table.rows]
    return {row[0]: dict(zip(table.head[1:], row[1:], strict=True)) for row in rows}


def said(section: results.Section) -> str:
    return markdown([part for part in glance.parts(section) if isinstance(part, (Paragraph, Items))])


# --- the numbers ----------------------------------------------------------------------------------------


def test_differences_times_and_memory_are_those_worked_out_here() -> None:
    found = [
        scored("full", 0.80, "sst2", 0, seconds=100.0, peak_memory=2**30),
        scored("full", 0.90, "sst2", 1, seconds=300.0, peak_memory=2**30),
        scored("full", 0.60, "rte", 0, seconds=1000.0, peak_memory=2**32),
        scored("full", 0.50, "rte", 1, seconds=1000.0, peak_memory=2**32),
        scored("hift", 0.79, "sst2", 0, seconds=60.0, peak_memory=2**29),
        scored("hift", 0.87, "sst2", 1, seconds=140.0, peak_memory=2**29),
        scored("hift", 0.61, "rte", 0, seconds=100.0, peak_memory=2**29),
        scored("hift", 0.53, "rte", 1, seconds=300.0, peak_memory=2**29),
    ]
    rows = table_of(section_of(found))
    # Differences are -1, -3 and +1, +3 points, so both tasks have the variance 2 between seeds, and the mean over tasks
    # has 2 / 2 / 4 + 2 / 2 / 4 = 1/2 with 2 degrees of freedom: 4.30265 * 0.70711 = 3.042.
    assert rows["hift"]["score - full's, points"] == "+0.0 (-3.0 to +3.0)"
    assert rows["full"]["score - full's, points"] == "0 (70.0 %)"
    assert rows["hift"]["training time / full's"] == "0.32"  # sqrt(200 / 400 * 400 / 2000)
    assert rows["full"]["training time / full's"] == "1 (600.0 s)"
    assert rows["hift"]["peak memory / full's"] == "0.25"  # sqrt(1/2 * 1/8)
    assert rows["full"]["peak memory / full's"] == "1 (2.50 GiB)"
    assert {(row["tasks"], row["seeds"]) for row in rows.values()} == {("2 of 2", "2 of 2")}
    assert "All 8 cells have a score: 2 methods, 2 tasks, 2 seeds." in said(section_of(found))


def test_points_and_nats_are_never_averaged() -> None:
    found = [scored("full", 0.8, seed=seed) for seed in (0, 1)] + [lost("full", 1.0, seed) for seed in (0, 1)]
    found += [scored("hift", 0.9, seed=0), scored("hift", 0.7, seed=1)]
    found += [lost("hift", 1.1, 0), lost("hift", 1.3, 1, score=0.04)]
    section = section_of(found)
    assert section.judged_by_loss() == ["gsm8k"]
    rows = table_of(section)
    assert rows["full"]["score - full's, points"] == "0 (80.0 %)" and rows["full"]["loss - full's, nats"] == "0 (1.000)"
    # 0.2 on average, a variance of 0.02 / 2 with one degree of freedom: 12.706 * 0.1
    assert rows["hift"]["loss - full's, nats"] == "+0.200 (-1.071 to +1.471) [1]"
    assert "seeds only" in said(section) and rows["hift"]["score - full's, points"].startswith("+0.0 (")
    assert section.common_tasks() == ["sst2"]  # of the mean in the table of scores
    only = section_of([lost("full", 1.0), lost("hift", 1.1)])
    assert "score - full's, points" not in table_of(only)["hift"]
    assert table_of(only)["hift"]["loss - full's, nats"] == "+0.100 [1]" and "there is no interval" in said(only)


def test_replicates_of_losses_give_one_seed_an_interval() -> None:
    gaps = [0.05, 0.15] * 50  # a standard deviation of 0.05 but for one of a hundred, times 1.96
    found = [lost("full", 1.0, loss_bootstrap=[1.0] * 100), lost("hift", 1.1, loss_bootstrap=[1 + gap for gap in gaps])]
    assert table_of(section_of(found))["hift"]["loss - full's, nats"] == "+0.100 (+0.002 to +0.198) [1]"
    assert "test examples only" in said(section_of(found))
    with pytest.raises(UserError, match="'loss_bootstrap': expected each to be a number, got 'x'"):
        section_of([lost("full", 1.0, loss_bootstrap=["x"])])


@pytest.mark.parametrize("change", [{"score": 0.06}, {"metrics": {"exact_match": 0.0}}])
def test_a_task_that_some_row_solves_or_that_lacks_losses_is_judged_by_its_score(change: dict[str, Any]) -> None:
    section = section_of([lost("full", 1.0), lost("hift", 1.0) | change])
    assert section.judged_by_loss() == [] and "loss - full's, nats" not in table_of(section)["hift"]


def test_in_the_same_time_the_time_is_that_of_a_step() -> None:
    found = [scored("full", 0.8, seconds=60.0, step_seconds=1.5), scored("hift", 0.8, seconds=62.0, step_seconds=0.6)]
    rows = table_of(section_of(found))
    assert rows["hift"]["step time / full's"] == "0.40" and rows["full"]["step time / full's"] == "1 (1.5 s)"
    assert "Time: that of a step" in said(section_of(found))
    rows = table_of(section_of([*found, scored("mezo", 0.5, seconds=80.0)]))
    assert rows["hift"]["training time / full's"] == "1.03"


def test_what_full_fine_tuning_does_not_learn_is_named() -> None:
    right, wrong = [1] * 30 + [0] * 10, [0] * 30 + [1] * 10
    found = [cell("full", right=right), cell("zero-shot", right=wrong)]
    found += [cell("full", task="rte", right=right), cell("zero-shot", task="rte", right=right[::-1])]
    assert "On rte, full fine-tuning is not clearly above zero-shot" in said(section_of(found))
    assert table_of(section_of(found))["zero-shot"]["training time / full's"] == "no training"


# --- what is missing ------------------------------------------------------------------------------------


def test_a_partial_table_compares_common_cells_and_names_the_others() -> None:
    seeds = (0, 1, 2)
    found = [scored("full", score, "sst2", seed) for seed, score in zip(seeds, (0.5, 0.6, 0.9), strict=True)]
    found += [scored("full", 0.5, "rte", seed) for seed in (0, 1)]
    found += [scored("hift", 0.7, "sst2", 1), missing("hift", "sst2", 2), scored("hift", 0.6, "rte", 2)]
    found += [missing("bitfit", task, seed, "not_applicable", "no bias") for task in ("sst2", "rte") for seed in seeds]
    plan = results.Plan(
        "smollm2-135m", ["1024 samples"], {"full": "full", "lora": "lora", "hift": "hift"}, ["sst2", "rte"], [*seeds, 3]
    )
    section = section_of(found, plan)
    rows = table_of(section)
    # Seed 1 on SST-2 is the only cell that HiFT and full fine-tuning have both.
    assert rows["hift"]["score - full's, points"] == "+10.0 (+10.0 to +10.0) [1]"
    assert (rows["hift"]["tasks"], rows["hift"]["seeds"]) == ("1 of 2", "1 of 4")
    assert (rows["full"]["tasks"], rows["full"]["seeds"]) == ("2 of 2", "2 to 3 of 4")
    nothing = {
        "score - full's, points": "-",
        "steps": "-, -",
        "training time / full's": "-",
        "peak memory / full's": "-",
    }
    assert rows["lora"] == rows["bitfit"] == nothing | {"tasks": "0 of 2", "seeds": "0 of 4"}
    text = said(section)
    assert "stopped before the end: 18 of its 32 cells were not run. " in text
    assert "7 of 32 cells have a score (4 methods, 2 tasks, 4 seeds). Complete: no row." in text
    for line in (
        "full: 3 of 4 seeds (1 not run) on sst2; 2 of 4 seeds (2 not run) on rte.",
        "hift: 1 of 4 seeds (1 failed, 2 not run) on sst2; 1 of 4 seeds (3 not run) on rte.",
        "lora: 0 of 4 seeds (4 not run) on sst2, rte.",
        "bitfit: 0 of 4 seeds (3 not applicable, 1 not run) on sst2, rte.",
    ):
        assert f"- {line}" in text
    assert "test examples only" in text


def test_without_full_fine_tuning_every_row_is_still_named() -> None:
    text = said(section_of([cell("hift"), missing("lora")]))
    assert "no comparison with full fine-tuning: it was not run." in text and "1 of 2 cells" in text
    assert "Complete: hift." in text and "- lora: 0 of 1 seeds (1 failed) on sst2." in text
    unplanned = said(section_of([cell("hift"), cell("lora", task="rte")]))  # nobody asked for the other cells
    assert "1 not run" in unplanned and "stopped" not in unplanned
    assert "fine-tuning: it has no score." in said(section_of([cell("hift"), missing("full")]))
    assert "fine-tuning: no cell has a score." in said(section_of([missing("full")]))


def test_one_seed_has_an_interval_over_test_examples_only() -> None:
    right, other = [1, 0] * 20, [1, 1, 1, 0] * 10
    section = section_of([cell("full", right=right), cell("hift", right=other)])
    assert re.fullmatch(r"\+25\.0 \(\+\d.* to \+\d.*\) \[1\]", table_of(section)["hift"]["score - full's, points"])
    assert "Note 1: One seed on some task, the interval shows test examples only." in said(section)


def test_the_plan_of_a_comparison_is_read_with_its_folder(tmp_path: Path) -> None:
    """Rows, seeds and budgets that were not begun when it stopped are in the report."""
    settings = {"title": "t", "model_name": "smollm2-135m", "budgets": ["1024 samples", "60 s"], "seeds": [0, 1]}
    settings |= {"rows": [{"label": name, "method": name} for name in ("lora", "full")], "tasks": [{"name": "sst2"}]}
    (tmp_path / "compare.json").write_text(json.dumps(settings))
    content.write_report([cell("full")], tmp_path, "t")
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "1 of 4 cells have a score" in text and "lora: 0 of 2 seeds (2 not run) on sst2" in text
    assert "0 of 4 cells have a score" in text and "### smollm2-135m, 60 s" in text
    assert text.index("## At a glance") < text.index("## What was run")
    (tmp_path / "compare.json").write_text("[]")
    assert results.read_plan(tmp_path) is None and results.read_plan(tmp_path / "nowhere") is None


def test_budgets_of_tasks_are_joined_by_kind() -> None:
    budgets = {"sst2": "256 samples", "cb": "128 samples", "rte": "128 samples"}
    found = [cell("full", task=task, budget=budget) for task, budget in budgets.items()]
    found += [cell("full", task=task, budget="60 s") for task in budgets]
    joined = [section.budget for section in results.arrange(results.with_joined_budgets(found))]
    assert joined == ["equal samples: 256 samples on sst2, 128 samples on cb and rte", "60 s"]
    with pytest.raises(UserError, match="sst2: has the budgets '256 samples' and '512 samples'"):
        results.with_joined_budgets([*found, cell("hift", budget="512 samples")])


def test_cells_without_training_stand_beside_both_kinds_of_budget() -> None:
    found = [cell(label, seed=seed) for label in ("full", "zero-shot") for seed in (0, 1)]
    found += [cell("full", budget="60 s"), cell("full", seed=1, budget="60 s", data_sha256="other")]
    samples, time = results.arrange(results.with_joined_budgets(found))
    assert [one["seed"] for one in samples.ok("zero-shot", "sst2")] == [0, 1]
    assert [one["seed"] for one in time.ok("zero-shot", "sst2")] == [0]  # the other seed has other data
    assert len(results.with_joined_budgets([*found, cell("zero-shot", budget="60 s")])) == 7  # it has its own


def test_steps_are_those_of_each_task() -> None:
    found = [cell("full", steps=32), cell("full", task="rte", steps=8), cell("hift", steps=17), cell("zero-shot")]
    found += [cell("hift", seed=1, steps=18), cell("full", seed=1, steps=32)]
    rows = table_of(section_of(found))
    assert (rows["full"]["steps"], rows["hift"]["steps"], rows["zero-shot"]["steps"]) == ("32, 8", "18, -", "0, -")
    assert "Steps: of the optimizer on sst2, rte, the mean over seeds." in said(section_of(found))


# --- the report around it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}, {}], r"^Seconds of training were measured in each training\.$"),
        ([{"seconds_are": "measured"}] * 2, r"^Seconds of training were measured in each training\.$"),
        ([{"seconds_are": "timed alone"}] * 2, r"would take alone .* method and task\. Several"),
        ([{"seconds_are": "timed alone"}, {}], r"would take alone .* in 1 of 2 trainings; the others were measured"),
    ],
)
def test_the_report_says_what_seconds_are(changes: list[dict[str, Any]], expected: str) -> None:
    found = [cell(label, **change) for label, change in zip(("full", "hift"), changes, strict=True)]
    (text,) = content._times([*found, cell("zero-shot")])
    assert re.search(expected, text)


# --- the picture ----------------------------------------------------------------------------------------


def drawn(section: results.Section) -> Any:
    return glance_picture.draw(section, plots.make_styles(section.rows))


def test_the_picture_has_a_point_for_each_row_in_both_panels() -> None:
    found = [cell(label, seed=seed) for label in ("full", "hift", "lora", "zero-shot") for seed in (0, 1)]
    section = section_of([*found[:-1], missing("s4")])
    figure = drawn(section)
    names = [axes.get_xlabel() for axes in figure.axes]
    assert names == ["training time / full's", "peak memory / full's"]
    rows = {row.label: row for row in glance.compare_with_full(section)}
    for axes, attribute in zip(figure.axes, ("time", "memory"), strict=True):
        points = [bars.lines[0] for bars in axes.containers]
        assert [text.get_text() for text in axes.texts] and {text.get_text() for text in axes.texts} == set(rows) - {
            "s4"
        }
        for label, line in zip([label for label in rows if label != "s4"], points, strict=True):
            (x,), (y,) = line.get_data()
            assert x == pytest.approx(getattr(rows[label], attribute)) and y == pytest.approx(
                100 * rows[label].points.mean
            )
            hollow = line.get_markerfacecolor() == "white"
            assert hollow == (label == "zero-shot")  # it lacks a seed
    assert points[0].get_xydata().tolist() == [[1, 0]]
    assert drawn(section_of([cell("full")])) is None and drawn(section_of([cell("hift")])) is None


def test_losses_have_panels_of_their_own_in_which_up_is_better() -> None:
    figure = drawn(section_of([scored("full", 0.8), lost("full", 1.0), scored("hift", 0.7), lost("hift", 1.2)]))
    assert len(figure.axes) == 4
    top, bottom = figure.axes[0], figure.axes[2]
    assert "points" in top.get_ylabel() and "nats" in bottom.get_ylabel()
    assert top.get_ylim()[0] < top.get_ylim()[1] and bottom.get_ylim()[0] > bottom.get_ylim()[1]
    assert bottom.containers[1].lines[0].get_ydata() == pytest.approx([0.2])


def test_an_axis_shows_at_least_a_point_and_a_hundredth_of_a_nat() -> None:
    twins = [scored("full", 0.8), lost("full", 1.0), scored("hift", 0.8), lost("hift", 1.0)]
    points, _, nats, _ = drawn(section_of(twins)).axes
    assert points.get_ylim() == (-1, 1) and nats.get_ylim() == (0.01, -0.01)


def test_costs_that_differ_much_are_on_a_logarithmic_axis() -> None:
    found = [scored("full", 0.8, peak_memory=2**30), scored("hift", 0.8, peak_memory=2**26), scored("icl", 0.7)]
    time, memory = drawn(section_of(found)).axes
    assert (time.get_xscale(), memory.get_xscale()) == ("linear", "log")
    found[2]["peak_memory"] = 0  # a method at 0 is still in the panel
    _, memory = drawn(section_of(found)).axes
    assert len(memory.containers) == 3 and memory.containers[2].lines[0].get_xdata()[0] > 0


def test_labels_do_not_cover_each_other() -> None:
    rows = 12
    section = results.arrange(results.checked(many(("sst2", "rte"), (0, 1))))[0]
    section.rows = dict(list(section.rows.items())[:rows])
    figure = drawn(section)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes:
        boxes = [super(type(text), text).get_window_extent(renderer) for text in axes.texts]  # without the leader line
        assert len(boxes) > rows - 3
        shared = [glance_picture._shared(one, other) for one, other in itertools.combinations(boxes, 2)]
        assert max(shared) < 30  # square pixels, of labels of about 20 x 100
        assert all(math.isfinite(box.x0) and box.y1 <= axes.bbox.y1 + 1 for box in boxes)


def test_the_picture_is_a_file_in_the_report(tmp_path: Path) -> None:
    content.write_report([cell(label, seed=seed) for label in ("full", "hift") for seed in (0, 1)], tmp_path, "t")
    assert (tmp_path / "plots" / "1-glance.png").stat().st_size > 10_000
    text = (tmp_path / "report.md").read_text("utf-8")
    assert text.index("plots/1-glance.png") < text.index("## What was run")


# --- the page of results --------------------------------------------------------------------------------


def test_the_tables_of_the_results_page_are_those_of_the_committed_records() -> None:
    root = Path(__file__).resolve().parents[3]
    page = (root / "docs" / "results.md").read_text("utf-8")
    pages = page + (root / "docs" / "results" / "cpu.md").read_text("utf-8")
    commands = [part.split("```", 1)[0] for part in pages.split("\npython -m evaluation.report ")[1:]]
    assert len(commands) == 2
    for command in commands:
        folders = re.findall(r"docs/results/\w+", command)
        assert len(folders) > 1 and "--join-budgets" in command
        found = results.read_results(*[root / folder / "results.jsonl" for folder in folders])
        for section in results.arrange(results.with_joined_budgets(found)):
            (table,) = (part for part in glance.parts(section) if isinstance(part, Table))
            assert markdown([table]).strip() in pages, f"{section.model}, {section.budget}"
    readme = (root / "README.md").read_text("utf-8")
    values = re.findall(r"[+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+\)", readme)
    assert len(values) > 5
    assert [value for value in values if value not in page] == []
