"""The report of a comparison: its tables, its pictures, what it refuses, and the files that they are in."""

from __future__ import annotations

import base64
import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hift_ds.evaluation.mt_bench.verdicts import summarize
from hift_ds.evaluation.report import command, content, paper, plots, results
from hift_ds.evaluation.report.document import Bold, Items, Paragraph, Table, as_html, markdown
from hift_ds.launch.errors import UserError
from tests.support.comparison_records import cell, many, missing
from tests.support.data_fixtures import SHARED, write_jsonl

PAPER = SHARED.parent / "seeds" / "hift-paper.md"
NASTY = r"""<script>alert("1")</script> a|b *c* `d` _e_ [f](http://g.example/h) $i$ &amp; ~~j~~ \k # l"""


def write(found: list[dict[str, Any]], folder: Path, **options: Any) -> tuple[str, str]:
    content.write_report(found, folder, "A comparison", **options)
    return (folder / "report.md").read_text("utf-8"), (folder / "report.html").read_text("utf-8")


def words(found: list[dict[str, Any]]) -> tuple[str, str]:
    """Markdown and HTML without the pictures, which take long to draw."""
    sections = results.arrange(results.checked(found))
    parts = content.build(sections, "A comparison", summarize(()), [{} for _ in sections])
    return markdown(parts), as_html("A comparison", parts, Path())


def tables(text: str, heading: str) -> list[dict[str, list[str]]]:
    """The tables under a heading of Markdown, each as first column -> others."""
    after = re.split(rf"^#+ {re.escape(heading)}$", text, maxsplit=1, flags=re.M)[1]
    part = re.split(r"^#+ ", after, maxsplit=1, flags=re.M)[0]
    found = []
    for block in part.split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in block.splitlines()]
        if block.startswith("|"):
            found.append({line[0]: line[1:] for line in lines if not line[0].startswith("---")})
    return found


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.references: list[str] = []
        self.text = ""
        self.images: list[bytes] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            assert not name.startswith("on")
            if name in {"src", "href", "srcset", "action", "data", "poster", "background"}:
                self.references.append(value or "")
                if (value or "").startswith("data:image/png;base64,"):
                    self.images.append(base64.b64decode((value or "").partition(",")[2]))

    def handle_data(self, data: str) -> None:
        self.text += data


# --- tables ---------------------------------------------------------------------------------------------


def test_means_deviations_and_differences_are_those_worked_out_here() -> None:
    found = [
        cell(label, task=task, seed=seed, accuracy=accuracy)
        for label, accuracy in (("full", 0.8), ("hift", 0.75), ("lora", 0.6))
        for task in ("sst2", "rte")
        for seed in (0, 1, 2)
    ]
    text, _ = words(found)
    (scores,), (differences,) = tables(text, "Scores"), tables(text, "Differences to full fine-tuning")
    assert list(scores) == ["method", "full", "hift", "lora"] and list(differences) == ["method", "hift", "lora"]
    assert scores["method"] == ["sst2, accuracy %, n = 40", "rte, accuracy %, n = 40", "mean %"]

    def of(label: str, task: str) -> list[dict[str, Any]]:
        return [one for one in found if one["label"] == label and one["task"] == task]

    for label in ("full", "hift", "lora"):
        columns = [[one["score"] for one in of(label, task)] for task in ("sst2", "rte")]
        columns.append([statistics.fmean(pair) for pair in zip(*columns, strict=True)])
        for shown, column in zip(scores[label], columns, strict=True):
            expected = f"{100 * np.mean(column):.1f} ± {100 * np.std(column, ddof=1):.1f}"
            assert shown.strip("*") == expected
    gaps = [
        np.mean([one["bootstrap"] for task in tasks for one in of("lora", task)], axis=0)
        - np.mean([one["bootstrap"] for task in tasks for one in of("full", task)], axis=0)
        for tasks in (("sst2",), ("rte",), ("sst2", "rte"))
    ]
    for shown, gap in zip(differences["lora"], gaps, strict=True):
        low, high = 100 * np.percentile(gap, [2.5, 97.5])
        assert shown.endswith(f"({low:+.1f} to {high:+.1f})")


def test_bold_is_only_what_is_clearly_better() -> None:
    right = [int(i % 5 > 0) for i in range(200)]
    close = [1 - one if i < 2 else one for i, one in enumerate(right)]
    worse = [int(i % 2) for i in range(200)]
    better = [1] * 200
    found = [cell("full", right=right), cell("hift", right=close), cell("lora", right=worse)]
    text, page = words(found)
    assert "**" not in text and "<b>" not in page
    text, page = words([*found, cell("bitfit", right=better)])
    assert text.count("**") == 2 and page.count("<b>") == 1
    assert tables(text, "Scores")[0]["bitfit"] == ["**100.0 (100.0 to 100.0)**"]
    twins = [cell("full", right=better), cell("hift", right=better)]
    assert "**" not in words(twins)[0]


def test_what_has_no_score_says_why_in_a_note() -> None:
    found = [cell("full", seed=seed, task=task) for seed in (0, 1) for task in ("sst2", "rte")]
    found += [missing("s4", task, seed, "not_applicable", "no layers") for seed in (0, 1) for task in ("sst2", "rte")]
    found += [
        cell("lora", seed=0),
        missing("lora", seed=1, reason="ran out"),
        missing("lora", "rte", 0, reason="broke"),
    ]
    found += [cell("hift", seed=seed, task=task) for seed in (0, 1) for task in ("sst2", "rte")]
    found += [cell("mezo", seed=0, score=math.nan), cell("mezo", seed=1, score=None)]
    text, page = words(found)
    (scores,) = tables(text, "Scores")
    assert scores["s4"] == ["n/a [3]", "n/a [3]"]
    assert re.fullmatch(r"\d+\.\d \(1 of 2 seeds\) \[1\]", scores["lora"][0]) and scores["lora"][1] == "failed [2]"
    assert scores["mezo"] == ["failed [4]", "-"]
    for note in (
        "Note 1: lora: failed: ran out",
        "Note 2: lora: failed: broke",
        "Note 3: s4: not applicable: no layers",
        "Note 4: mezo: failed: its score is not a finite number",
    ):
        assert note in text and note in Page(page).text
    assert "There is no mean over tasks" in text and "nan" not in text
    assert set(tables(text, "Differences to full fine-tuning")[0]) == {"method", "lora", "hift"}


def test_the_mean_is_over_tasks_that_all_rows_have() -> None:
    found = [cell(label, task=task) for label in ("full", "hift") for task in ("sst2", "rte", "cb")]
    found += [cell("lora", task=task) for task in ("sst2", "rte")] + [missing("s4", "sst2")]
    text, _ = words(found)
    assert "The mean is over sst2, rte" in text and "It leaves out cb" in text
    (scores,) = tables(text, "Scores")
    assert scores["method"][-1] == "mean %" and scores["s4"] == ["failed [1]", "-", "-", "-"]
    means = [one["score"] for one in found if one["label"] == "lora" and one["status"] == "ok"]
    assert scores["lora"][-1].strip("*") == f"{50 * sum(means):.1f}"


def test_costs() -> None:
    changes = {"steps": 1234, "seconds": 75.0, "step_seconds": 0.06, "peak_memory": 3 * 2**29, "flops": 2.5e15}
    trials = [{"learning_rate": rate, "score": 0.5} for rate in (1e-5, 1e-4)]
    found = [cell("full", step_seconds=0.04), cell("hift", learning_rate=1e-4, tuning=trials, **changes), cell("icl")]
    text, _ = words(found)
    (costs,) = tables(text, "sst2")
    named = dict(zip(costs["method"], costs["hift"], strict=True))
    assert (
        named["learning rate"] == r"0.0001\*" and "The lowest or highest learning rate of the grid was chosen" in text
    )
    assert (named["steps"], named["training time"], named["step time"]) == ("1,234", "75.0 s", "60 ms")
    assert (named["step time / full's"], named["peak memory, measured"], named["FLOPs"]) == (
        "1.50",
        "1.50 GiB",
        "2.5 PFLOP",
    )
    assert costs["icl"][:5] == ["-", "0", "0", "0 s", "-"]
    assert "1e-05, 3e-05, 0.0001 (full), or 1e-05, 0.0001 (hift)" in text


def test_seconds_of_a_cell_by_part() -> None:
    found = [
        cell("full", seed=0, spent={"start": 20.0, "training": 60.0, "test": 10.0, "plan": 0.1}),
        cell("full", seed=1, spent={"training": 62.0, "test": 12.0}),
        cell("hift", spent={"training": 30.0, "test": 11.0, "model": 0.25}),
    ]
    text, _ = words([*found, cell("lora")])  # a record of an earlier version
    (table,) = tables(text, "Seconds of a cell")
    assert table["method"] == ["cell", "training", "test", "start", "the rest"]
    assert table["full"] == ["82.0", "61.0", "11.0", "10.0", "0.0"] and table["hift"] == [
        "41.2",
        "30.0",
        "11.0",
        "0.0",
        "0.2",
    ]
    assert "lora" not in table and "Seconds of a cell" not in words([cell("full")])[0]
    with pytest.raises(UserError, match="'spent': 'test': expected seconds, got 'x'"):
        words([cell("full", spent={"test": "x"})])


def test_learning_rates_that_were_tried() -> None:
    trials = [{"learning_rate": 1e-5, "score": 0.5, "loss": 0.7}, {"learning_rate": 1e-4, "score": None, "loss": None}]
    written = [{"learning_rate": 1e-5, "score": -1.25}, {"learning_rate": 1e-4, "score": -1.5, "loss": 1.5}]
    lost = {"metrics": {"exact_match": 0.0, "answer_loss": 1.0}, "metric": "exact_match"}
    found = [cell("full", tuning=trials), cell("full", task="gsm8k", tuning=written, **lost)]
    text, _ = words([*found, cell("hift", tuning=trials[:1])])
    (table,) = tables(text, "Learning rates")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| full +\| +(sst2|gsm8k)", line)]
    assert [row[3].strip() for row in rows] == [
        "1e-05: 50.0, loss 0.700; 0.0001: -",
        "1e-05: loss 1.250; 0.0001: loss 1.500",
    ]
    assert set(table) == {"method", "full"}


def test_other_metrics_have_a_table() -> None:
    losses = [{"accuracy": 0.5, "answer_loss": loss} for loss in (1.25, 1.75)]
    found = [cell("full", seed=seed, metrics=metrics) for seed, metrics in enumerate(losses)]
    text, _ = words([*found, cell("lora")])
    (others,) = tables(text, "Other metrics")
    assert others["method"] == ["sst2, answer_loss"]
    assert others["full"] == ["1.500 ± 0.354"] and others["lora"] == ["-"]
    assert "Other metrics" not in words([cell("full")])[0]


def test_one_rate_is_no_choice() -> None:
    only = [{"learning_rate": 1e-5, "score": 0.5}]
    text, _ = words([cell("full"), cell("lora", tuning=only)])
    assert "from 1e-05, 3e-05, 0.0001 (full). Only one rate was tried for: lora." in text
    text, _ = words([cell("full", tuning=only), cell("lora", tuning=only)])
    assert "Learning rates were not tuned" in text and "were chosen by" not in text


def test_the_commits_are_not_versions_of_packages() -> None:
    found = [cell("full", seed=seed, versions={"torch": "2.13.0", "git": f"c{seed}"}) for seed in (0, 1)]
    text, _ = words(found)
    assert "- Versions: torch 2.13.0.\n" in text


def test_one_seed_has_intervals_and_no_deviation() -> None:
    found = [cell("full"), cell("hift", accuracy=0.7)]
    text, _ = words(found)
    low, high = found[1]["interval"]
    expected = f"{100 * found[1]['score']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    assert tables(text, "Scores")[0]["hift"] == [expected]
    assert "There is only one seed, so there is no ±" in text and "0 ±" not in text


def test_without_full_fine_tuning_there_are_no_differences() -> None:
    text, _ = words([cell("hift"), cell("lora")])
    assert "There is no comparison with full fine-tuning: it was not run." in text
    text, _ = words([cell("hift"), missing("full")])
    assert "full fine-tuning: it has no score." in text
    assert tables(text, "sst2")[0]["hift"][5] == "-"  # no ratio of step times


@pytest.mark.parametrize("found", [[], [missing("hift")], [missing("hift"), missing("lora", status="not_applicable")]])
def test_no_score_at_all(found: list[dict[str, Any]], tmp_path: Path) -> None:
    text, page = write(found, tmp_path)
    assert ("No cell has a score" if found else "There are no records.") in text
    assert not list((tmp_path / "plots").iterdir()) and "<img" not in page
    assert (r"failed [1]" in text) == bool(found)


def test_models_and_budgets_have_parts_of_their_own(tmp_path: Path) -> None:
    found = [cell("full", model=model, budget=budget) for model, budget in (("a", "1 s"), ("a", "2 s"), ("b", "1 s"))]
    text, _ = write(found, tmp_path)
    assert [line for line in text.splitlines() if re.match("## [ab], ", line)] == [
        "## a, 1 s",
        "## a, 2 s",
        "## b, 1 s",
    ]
    assert len(list((tmp_path / "plots").glob("*-time.png"))) == 3


def test_older_pictures_go(tmp_path: Path) -> None:
    write([cell("full", task="rte")], tmp_path)
    write([cell("full")], tmp_path)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "1-time.png",
        "1-memory.png",
        "1-parts-sst2-1.png",
        "1-loss-sst2-1.png",
    }


# --- what is read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", list(cell()))
def test_a_record_that_lacks_a_key_is_named(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {name: value for name, value in cell("hift").items() if name != key}
    write_jsonl(tmp_path / "results.jsonl", [cell("full"), broken])
    assert command.main([str(tmp_path)]) == 2
    assert f"results.jsonl:2: '{key}': " in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "done"}, "'status': expected ok, not_applicable or failed, got 'done'"),
        ({"label": " "}, "'label': empty"),
        ({"seed": "0"}, "'seed': expected an integer, got '0'"),
        ({"score": "0.9"}, "'score': expected a number, got '0.9'"),
        ({"bootstrap": [0.5, "x"]}, "'bootstrap': expected each to be a number, got 'x'"),
        ({"curve": [[1, 2, 3]]}, r"'curve': expected each to be [step, seconds, tokens, loss], got [1, 2, 3]"),
        ({"tuning": [{"learning_rate": 1, "score": 1, "loss": "x"}]}, "'tuning': expected each to be an object"),
        ({"tuning": [3e-5]}, "'tuning': expected each to be an object with learning_rate and score"),
        ({"planned_memory": {"parameters": 1}}, "'planned_memory': 'gradients': expected bytes"),
        ({"metric": "f1"}, "'metric': 'f1', but record 1 has 'accuracy' for this task"),
        ({"label": "full"}, "the same cell as record 1, which has a result"),
    ],
)
def test_a_record_that_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="record 2: " + re.escape(message)):
        words([cell("full"), cell("hift") | change])


def test_a_failed_cell_that_was_run_again_counts_by_its_last_line() -> None:
    text, _ = words([missing("hift"), cell("hift")])
    assert "failed" not in text and "Cells: 1, of which 1 have a score." in text


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = {"judge": "gpt-4", "mode": "single", "models": ["hift"], "category": "writing", "question_id": 81}
    verdict |= {"turn": 1, "status": "ok", "rating": 7, "prompt_sha256": "a"}
    judged = write_jsonl(tmp_path / "verdicts.jsonl", [verdict])
    write_jsonl(tmp_path / "results.jsonl", [cell("full"), cell("hift", curve=[[1, 2, 3, math.nan]])])
    assert command.main([str(tmp_path), "--title", "Mine", "--verdicts", str(judged)]) == 0
    assert "report.html" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text("utf-8")
    assert text.startswith("# Mine\n") and tables(text, "MT-Bench")[0]["hift"] == ["7.00", "7.00", "1", "0"]
    write_jsonl(judged, [verdict | {"rating": 11}])
    assert command.main([str(tmp_path), "--verdicts", str(judged)]) == 2
    assert "verdicts.jsonl:1: 'rating'" in capsys.readouterr().err
    (tmp_path / "results.jsonl").write_text("{broken\n", encoding="utf-8")
    assert command.main([str(tmp_path)]) == 2
    assert "results.jsonl:1: broken JSON" in capsys.readouterr().err
    assert command.main([str(tmp_path / "nowhere")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_which_end_of_an_example_was_lost(tmp_path: Path) -> None:
    """A prompt loses its beginning; a model with a head reads from there and does not see the end."""
    for side in ("end", "beginning"):
        text, _ = write([cell("full") | {"truncated": {"train": 0, "test": 3}, "test_cut": side}], tmp_path)
        assert f"full: up to 3 of {cell('full')['n']} test examples were cut at the {side}." in text


def test_empty_answers_are_counted_for_each_cell() -> None:
    counts = {("zero-shot", 0): 39, ("zero-shot", 1): 12, ("full", 0): 0, ("full", 1): 3}
    found = [cell(label, task="squad", seed=seed, unanswered=n) for (label, seed), n in counts.items()]
    found += [cell(label, task="rte", seed=seed, unanswered=None) for label, seed in counts]
    found += [cell("hift", task="squad"), cell("hift", task="rte")]  # of an earlier version
    text, _ = words(found)
    (table,) = tables(text, "Empty answers")
    assert table == {
        "method": ["squad"],
        "full": ["0 of 40, 3 of 40"],
        "hift": ["-"],
        "zero-shot": ["39 of 40, 12 of 40"],
    }
    assert "They count as wrong" in text
    assert "Empty answers" not in words([cell("full", task="squad", unanswered=0), cell("hift", task="squad")])[0]
    with pytest.raises(UserError, match="'unanswered': expected a number of answers or null, got 'many'"):
        words([cell("full", unanswered="many")])


def test_cells_of_other_folders_are_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As if one comparison had run them; what cannot be joined changes no file."""
    everything = [cell(label, seed=seed) for seed in (0, 1) for label in ("full", "hift")]
    for seed in (0, 1, 2):
        (tmp_path / str(seed)).mkdir()
    for seed in (0, 1):
        write_jsonl(tmp_path / str(seed) / "results.jsonl", [one for one in everything if one["seed"] == seed])
    out = tmp_path / "both"
    assert command.main([str(out), "--add", str(tmp_path / "0"), "--title", "Both"]) == 0
    assert command.main([str(out), "--add", str(tmp_path / "1"), "--title", "Both"]) == 0
    assert results.read_results(out / "results.jsonl") == everything
    together, _ = write(everything, tmp_path / "together")
    assert (out / "report.md").read_text("utf-8").partition("\n")[2] == together.partition("\n")[2]

    before = (out / "results.jsonl").read_bytes()
    capsys.readouterr()
    assert command.main([str(out), "--add", str(tmp_path / "1"), "--title", "Both"]) == 0  # again: they are there
    assert (out / "results.jsonl").read_bytes() == before
    write_jsonl(tmp_path / "2" / "results.jsonl", [cell("full", seed=1) | {"score": 0.25}])
    capsys.readouterr()
    assert command.main([str(out), "--add", str(tmp_path / "2")]) == 2
    assert "results.jsonl:1: the same cell as " in capsys.readouterr().err
    assert command.main([str(out), "--add", str(tmp_path / "1"), str(tmp_path / "nowhere")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (out / "compare.json").write_text("[]\n", encoding="utf-8")
    assert command.main([str(out)]) == 0 and (out / "report.md").read_text("utf-8").startswith(f"# {command.TITLE}")
    write_jsonl(tmp_path / "2" / "results.jsonl", [cell("full", seed=2)])
    assert command.main([str(out), "--add", str(tmp_path / "2")]) == 2
    assert "a comparison runs in this folder" in capsys.readouterr().err
    assert (out / "results.jsonl").read_bytes() == before


# --- the files ------------------------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    text, page = write(many(("sst2", "rte"), (0, 1)), tmp_path)
    seen = Page(page)
    assert not {"script", "link", "iframe", "object", "embed", "a", "base", "form"} & set(seen.tags)
    pictures = {path.read_bytes() for path in (tmp_path / "plots").glob("*.png")}
    assert len(seen.images) == seen.tags["img"] == len(seen.references) and set(seen.images) == pictures
    assert not re.search(r"url\(|@import|https?:", page)
    assert set(re.findall(r"\]\(([^)]*)\)", text)) == {f"plots/{path.name}" for path in (tmp_path / "plots").iterdir()}
    for path in (tmp_path / "plots").glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert min(image.size) > 200 and len(image.convert("RGB").getcolors(2**24)) > 10


def test_text_of_records_is_escaped(tmp_path: Path) -> None:
    lone = "a\nb\x00\ud800"
    found = [cell("full"), cell(NASTY, "hift", machine=NASTY, git=lone), missing("lora", reason=NASTY)]
    text, page = write(found, tmp_path)
    seen = Page(page)
    assert "script" not in seen.tags and "a" not in seen.tags
    assert seen.text.count(NASTY) >= 4 and "a b ." in seen.text.replace("?", "")
    rendered = (
        pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    )
    again = Page(rendered)
    assert not {"script", "a", "em", "code", "s", "strong"} & set(again.tags)
    assert again.text.count(NASTY) >= 4


@pytest.mark.parametrize("text", ["# a", "- b", "+ c", "1. d", "2) e", "> f", "=", "---", "[x] g", "    code", "| h |"])
def test_markdown_of_a_text_is_that_text(text: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    page = Page(parser.render(markdown([Paragraph(text), Items([text]), Table([text, text], [[text, Bold(text)]])])))
    assert set(page.tags) == {"p", "ul", "li", "table", "thead", "tr", "th", "tbody", "td", "strong"}
    assert page.text.count(text.strip()) == 6


def test_html_of_a_table_has_its_cells(tmp_path: Path) -> None:
    page = as_html("<t>", [Table(["a", "b"], [["<c>", Bold("d & e")]])], tmp_path)
    assert "<title>&lt;t&gt;</title>" in page
    assert "<tr><td>&lt;c&gt;</td><td><b>d &amp; e</b></td></tr>" in page


# --- pictures -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def section() -> results.Section:
    return results.arrange(results.checked(many()))[0]


@pytest.fixture(scope="module")
def styles(section: results.Section) -> dict[str, plots.Style]:
    return plots.make_styles(section.rows)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def test_styles_differ_and_are_the_labels_own(styles: dict[str, plots.Style]) -> None:
    assert len({(s.color, s.line) for s in styles.values()}) == len(styles) == 23
    assert len({(s.color, s.marker) for s in styles.values()}) == len(styles)
    named = plots.make_styles({"_hidden": "full", "$x$": "hift"})
    assert (named["_hidden"].name, named["$x$"].name) == (" _hidden", r"\$x\$")


def test_a_method_has_one_color_in_all_reports() -> None:
    few = plots.make_styles({"icl": "icl", "ours": "hift", "hift, m = 8": "hift"})
    many_rows = plots.make_styles({"full": "full", "lora": "lora", "a stranger": "other", "hift": "hift", "icl": "icl"})
    assert few["ours"].color == few["hift, m = 8"].color == many_rows["hift"].color
    assert few["icl"] == many_rows["icl"] and few["ours"].line != few["hift, m = 8"].line
    assert few["ours"].marker != few["hift, m = 8"].marker and few["ours"].hatch != few["hift, m = 8"].hatch
    ten = plots.make_styles({method: method for method in plots.FIRST})
    assert len({style.color for style in ten.values()}) == 10


def test_loss_curves_have_a_line_for_each_trained_row(section: results.Section, styles: Any) -> None:
    figure = plots.loss_curves(section, "sst2", styles)
    assert figure is not None
    trained = [label for label in section.rows if label not in ("zero-shot", "icl", "full-top2")]
    assert [len(axes.lines) for axes in figure.axes] == [len(trained)] * 2 and legend(figure) == trained
    samples, seconds = figure.axes
    assert samples.lines[0].get_xdata()[-1] == pytest.approx(800)  # 100 steps of 8
    assert "samples" in samples.get_xlabel() and seconds.get_xlabel().endswith(", s")
    for label, line in zip(trained, samples.lines, strict=True):
        assert line.get_color() == styles[label].color
    curves = [[point[3] for point in one["curve"]] for one in section.ok("hift", "sst2")]
    line = samples.lines[trained.index("hift")]
    assert np.mean(line.get_ydata()) == pytest.approx(np.mean(curves), rel=0.02)


def test_scores_against_costs_have_a_point_for_each_row(section: results.Section, styles: Any) -> None:
    figure = plots.score_against(section, styles, "seconds")
    assert figure is not None and len(figure.axes) == 3
    axes = figure.axes[0]
    assert len(axes.containers) == 20 and len(legend(figure)) == 22  # zero-shot and ICL take no time
    flat = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert len(flat) == 2
    some = section.ok("full", "sst2")
    x, y = axes.containers[0].lines[0].get_xydata()[0]
    assert x == pytest.approx(statistics.fmean(one["seconds"] for one in some))
    assert y == pytest.approx(100 * statistics.fmean(one["score"] for one in some))
    memory = plots.score_against(section, styles, "peak_memory")
    assert memory is not None and len(memory.axes[0].containers) == 22


def test_memory_bars_are_the_plans_parts(section: results.Section) -> None:
    figure = plots.memory_bars(section, "sst2")
    assert figure is not None
    (axes,) = figure.axes
    assert len(axes.containers) == 6 and all(len(bars) == 22 for bars in axes.containers)
    ends = [bars[0].get_x() + bars[0].get_width() for bars in axes.containers if bars[0].get_width()][-1:]
    assert ends == pytest.approx([section.ok("full", "sst2")[0]["planned_memory"]["total"] / 2**30])
    assert len(axes.lines[0].get_xdata()) == 22 and axes.get_xlabel() == "memory, GiB"


def test_ablations_are_strategies_and_groups(section: results.Section, styles: Any) -> None:
    figure = plots.ablations(section, styles)
    assert figure is not None
    shown = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert shown == [["hift", "hift, top2down", "hift, random"], ["hift", "hift, m = 4", "hift, m = 8"]]
    assert all(len(axes.patches) == 9 for axes in figure.axes)
    alone = results.arrange([cell("hift"), cell("full")])[0]
    assert plots.ablations(alone, styles) is None


def test_radar_has_the_eight_categories(tmp_path: Path) -> None:
    judged = [
        {"judge": "gpt-4", "mode": "single", "models": [model], "category": category, "question_id": 81, "turn": 1,
         "status": "ok", "rating": rating}
        for model, rating in (("hift", 7), ("stranger", 4))
        for category in ("writing", "roleplay", "extraction", "math", "coding", "reasoning", "stem", "humanities")
    ]  # fmt: skip
    text, _ = write([cell("hift"), cell("full")], tmp_path, verdicts=judged)
    (ratings,) = tables(text, "MT-Bench")
    assert ratings["hift"] == ["7.00"] * 9 + ["8", "0"] and ratings["stranger"][0] == "4.00"
    assert (tmp_path / "plots" / "mt-bench-1.png").stat().st_size > 10_000
    styles = plots.make_styles({label: label for label in ("full", "hift", "stranger")})
    figure = plots.radar(summarize(judged)["single"], styles)
    assert figure is not None
    (axes,) = figure.axes
    assert len(axes.get_xticklabels()) == 8 and [len(line.get_xdata()) for line in axes.lines] == [9, 9]
    assert list(axes.lines[0].get_ydata()) == [7] * 9 and axes.lines[0].get_color() == styles["hift"].color
    assert plots.radar([], {}) is None


def test_nothing_to_draw(styles: Any) -> None:
    nothing = {"curve": [], "planned_memory": None, "peak_memory": None, "seconds": None}
    bare = results.arrange([cell("hift", **nothing)])[0]
    assert plots.loss_curves(bare, "sst2", styles) is None and plots.memory_bars(bare, "sst2") is None
    assert plots.score_against(bare, styles, "seconds") is None
    one_point = results.arrange([cell("hift", curve=[[1, 0.1, 8, 2.0]])])[0]
    assert plots.loss_curves(one_point, "sst2", styles) is None


# --- the paper ------------------------------------------------------------------------------------------


def test_the_papers_numbers_are_marked_as_its_own() -> None:
    text, _ = words([cell("full", task="cb")])
    found = tables(text, "Results printed in the paper (other models)")
    assert [one["HiFT"] for one in found] == [["hift", "83.1"], ["hift", "29.47"], ["hift", "2800.05"]]
    assert found[0]["FPFT †"] == ["full", "83.9"]
    assert "not measured here" in text and "The paper's table 2: OPT-13B" in text
    assert "The paper's" not in words([cell("full", task="unheard-of")])[0]


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper (../shared/seeds/hift-paper.md) is not there")
def test_typed_rows_stand_in_the_paper() -> None:
    printed = [re.sub(r"\*\*|†|</?\w+>", "", line) for line in PAPER.read_text("utf-8").splitlines()]
    rows: dict[tuple[int, str], list[paper.PaperValue]] = {}
    for value in paper.paper_values():
        rows.setdefault((value.table, value.label), []).append(value)
    checked = 0
    for values in rows.values():
        if not (number := re.search(r"the paper's table (\d+)", values[0].source)):
            continue
        lines = printed
        if number[1] == "10":  # columns of steps a second stand between
            lines = ["\t".join(line.split("\t")[:2] + line.split("\t")[3::2]) for line in printed]
        numbers = "\t" + "\t".join(value.printed for value in values)
        heads = [re.sub(r"\W", "", line.partition(numbers)[0]) for line in lines if numbers in line]
        label = "" if number[1] == "11" else re.sub(r"\W", "", values[0].label)
        assert any(head.endswith(label) for head in heads), (values[0], heads)
        checked += len(values)
    assert checked == 322


def test_paper_values() -> None:
    found = {(v.source, v.model, v.setting, v.label, v.task, v.metric): v for v in paper.paper_values()}
    one = found["the paper's table 1", "RoBERTa-large", "16 examples a class", "MeZO-Adam", "rte", None]
    assert (one.mean, one.std, one.method, one.cited, one.printed) == (59.2, 11.1, "mezo-adam", True, "59.2 (11.1)")
    one = found["the paper's table 5", "GPT-2 M", "m = 1", "HiFT", "e2e", "CIDEr"]
    assert (one.mean, one.std, one.cited) == (2.46, None, False)
    assert {value.method for value in found.values()} <= set(results.METHODS)
    assert [table[0].source for table in paper.paper_tables({"gsm8k"})] == [
        "table 4 of another version of the paper, as an article about it quotes it"
    ]


# --- Weights & Biases -----------------------------------------------------------------------------------


def test_wandb_gets_tables_radar_and_pictures_offline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the group of the comparison's title, with numbers as numbers."""
    wandb = pytest.importorskip("wandb")
    runs, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: runs.append(init(**options)) or runs[-1])
    found = [cell("full", seed=seed) for seed in (0, 1)] + [cell("hift"), missing("lora")]
    write_jsonl(tmp_path / "results.jsonl", found)
    (tmp_path / "compare.json").write_text(json.dumps({"title": "HiFT and others"}))
    verdict = {"judge": "gpt-4", "mode": "single", "models": ["hift"], "question_id": 81, "prompt_sha256": "a"}
    verdict |= {"turn": 1, "status": "ok", "rating": 7}
    verdicts = [verdict | {"category": name} for name in ("writing", "math", "coding")]
    judged = write_jsonl(tmp_path / "verdicts.jsonl", [v | {"question_id": i} for i, v in enumerate(verdicts)])
    argv = [str(tmp_path), "--verdicts", str(judged), "--wandb", "offline", "--wandb-project", "mine"]
    assert command.main(argv) == 0 and "warning" not in capsys.readouterr().err
    (run,) = runs
    assert (run.group, run.project, run.name) == ("HiFT and others", "mine", "HiFT and others")
    files = list((tmp_path / "wandb").glob("offline-run-*/files/media/**/*.*"))
    pictures = {path.name.partition("_")[0] for path in files if path.suffix == ".png"}
    assert pictures == {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert {"mt-bench-1", "1-glance"} <= pictures and len(pictures) == 6
    contents = [json.loads(path.read_text("utf-8")) for path in files if path.name.endswith(".table.json")]
    tables = {content["columns"][0]: content for content in contents}
    rows = [dict(zip(tables["method"]["columns"], row, strict=True)) for row in tables["method"]["data"]]
    assert [(row["method"], row["status"], row["seeds"]) for row in rows] == [
        ("full", "ok", 2),
        ("hift", "ok", 1),
        ("lora", "failed", 0),
    ]
    assert rows[0]["mean_percent"] == pytest.approx(50 * (found[0]["score"] + found[1]["score"]))
    assert rows[1]["difference_to_full_percent"] == pytest.approx(100 * (found[2]["score"] - found[0]["score"]))
    assert rows[2]["mean_percent"] is None and rows[2]["reason"] == found[3]["reason"]
    ours = found[2]
    assert rows[1]["planned_memory_gib"] == pytest.approx(ours["planned_memory"]["total"] / 2**30)
    assert rows[1]["learning_rates"] == f"{ours['learning_rate']:.3g}"
    for column, name in (("steps", "steps"), ("step_seconds", "step_seconds"), ("model_flops", "flops")):
        assert rows[1][column] == pytest.approx(ours[name])
    assert len(tables["judge"]["data"]) == 4 and tables["judge"]["data"][-1][2:4] == ["total", 7]
