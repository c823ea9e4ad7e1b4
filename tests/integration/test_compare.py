"""The comparison of methods, end to end on a tiny model; stopped and continued; its choices, its costs, bad input."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hift_ds.evaluation.report.results import read_results
from hift_ds.evaluation.tasks.catalog import TASKS, find_task
from hift_ds.evaluation.tasks.loading import load_task
from hift_ds.launch.methods.table import METHODS, TRAINED
from hift_ds.launch.model.tokenizer import byte_tokenizer
from hift_ds.launch.runtime.outputs import claim
from tests.evaluation.tasks.test_publishers import CASES, HELD_OUT, put
from tests.support.comparisons import (
    FEW,
    TINY,
    alone,
    arguments,
    cells_of,
    constructed,
    fabricated,
    heavy,
    interrupted,
    lasting,
    lines,
    once,
    without_a_plan,
    without_java,
    write_data,
)
from tests.support.data_fixtures import SHARED, needs_shared, write_jsonl
from tests.support.towers import GEMMA3, save_model

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}

# ---- all methods -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and outcome of configs/compare_tiny.yaml on published tasks: all methods, two tasks, four steps."""
    out = tmp_path_factory.mktemp("whole")
    return out, once(arguments(data, out), timeout=550)


def test_every_method_has_a_result_or_a_reason(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    assert result["code"] == 0, result["printed"]
    assert not result["leaked"]
    found = cells_of(out)  # checks every key that a record must have
    assert {one["method"] for one in found.values()} == set(METHODS)
    assert {task for _, task in found} == {"sst2", "rte"} and len(found) == 2 * 22
    for (label, task), one in found.items():
        assert one["status"] == "ok" and one["reason"] is None, (label, task, one["reason"])
        assert one["n"] == 8 and 0 <= one["score"] <= 1 and len(one["bootstrap"]) == 50
        trained = one["method"] in TRAINED
        assert one["steps"] == (4 if trained else 0) and len(one["curve"]) == one["steps"]
        assert (one["learning_rate"] is not None) is trained and (one["flops"] > 0) is trained
        assert 0 < one["trained_parameters"] <= one["total_parameters"] if trained else one["trained_parameters"] == 0
    everything = {one["trained_parameters"] for (label, _), one in found.items() if TRAINED.get(one["method"])
                  and TRAINED[one["method"]].adapter is None}  # fmt: skip
    assert len(everything) == 1 and everything == {found["full", "rte"]["total_parameters"]}
    assert (
        len(result["ran"]) == len(lines(out / "runs.jsonl")) == len({one["key"] for one in lines(out / "runs.jsonl")})
    )
    assert "44 cells ok, 0 not applicable, 0 failed" in result["printed"]


def test_records_have_the_seconds_of_each_part(whole: tuple[Path, dict[str, Any]]) -> None:
    """The first one also those of the start of the process."""
    runs = lines(whole[0] / "runs.jsonl")
    always = {"other", "test", "scores"}
    for i, one in enumerate(runs):
        parts = always | ({"start", "tokenizer"} if i == 0 else set()) | {"model", "validation"}
        if one["method"] in TRAINED:
            parts |= {"encoding", "engine", "training", "around steps", "plan"}
        assert set(one["spent"]) == parts and all(0 <= seconds < 500 for seconds in one["spent"].values())
        assert one["spent"].get("training", 0) == round(one["seconds"], 3)


def test_the_report_is_there(whole: tuple[Path, dict[str, Any]]) -> None:
    out, _ = whole
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert all(label in text for label, _ in cells_of(out)), name
    assert list((out / "plots").glob("*.png")) and json.loads((out / "compare.json").read_text())["seeds"] == [0]


# ---- without data ----------------------------------------------------------------------------------------------------


def without_data(out: Path, *overrides: str) -> list[str]:
    given = [
        f"output.dir={out}",
        "evaluation.bootstrap=50",
        "data.dev_examples=0",
        "budgets=[{samples: 8}]",
        *overrides,
    ]
    return ["--config", TINY, *(part for one in given for part in ("--set", one))]


def test_the_tiny_comparison_needs_no_data(tmp_path: Path) -> None:
    """As it is shipped, here with a method of each kind; the last line is the report's path."""
    rows = "methods=[zero-shot, {name: icl, shots: 2}, hift, mezo-lora]"
    result = once(without_data(tmp_path, rows))
    assert result["code"] == 0, result["printed"]
    found = cells_of(tmp_path)
    assert len(found) == 8 and {task for _, task in found} == {"arithmetic", "yes-no"}
    for (label, task), one in found.items():
        assert one["status"] == "ok" and one["n"] == 8, (label, task, one["reason"])
        assert one["metric"] == ("exact_match" if task == "arithmetic" else "accuracy")
        assert math.isfinite(one["metrics"]["answer_loss"])
        assert one["unanswered"] == (8 if task == "arithmetic" else None)  # a random model writes no `#### N`
    assert "### Empty answers" in (tmp_path / "report.md").read_text("utf-8")
    assert not result["leaked"]
    last = result["printed"].strip().splitlines()[-1]
    assert last.startswith("report ") and str(tmp_path / "report.md") in last and (tmp_path / "report.md").is_file()


def test_a_classification_head_has_a_built_in_task(tmp_path: Path) -> None:
    overrides = [f"model.config={json.dumps(BERT)}", "model.task=sequence-classification"]
    result = once(without_data(tmp_path, *overrides, "methods=[hift, linear-probing]", "data.max_length=100"))
    assert result["code"] == 0, result["printed"]
    for (_, task), one in cells_of(tmp_path).items():
        assert one["status"] == ("ok" if task == "yes-no" else "not_applicable"), one["reason"]


# ---- stopped and continued -------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from hift_ds.evaluation.compare import command as compare
begin = compare.Runs.begin
def until(runs, key):
    begin(runs, key)
    if len(runs.done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
compare.Runs.begin = until
compare.main(sys.argv[1:])
"""


def test_a_killed_comparison_goes_on(whole: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    """In a fresh folder all comes out as in the comparison of all methods."""
    argv = arguments(data, tmp_path / "out", FEW, "tasks=[rte]")
    assert once(argv, function=interrupted, how="killed")["code"] is None
    check_continued(whole, argv, tmp_path / "out", ["zero-shot"])


@pytest.mark.slow
def test_a_comparison_killed_by_the_system_goes_on(
    whole: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """In a process of its own, in a cell, when two were done."""
    argv = arguments(data, tmp_path / "out", FEW, "tasks=[rte]")
    done = alone(KILLED, argv)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check_continued(whole, argv, tmp_path / "out", ["zero-shot", "full"])


def check_continued(whole: tuple[Path, dict[str, Any]], argv: list[str], out: Path, kept: list[str]) -> None:
    """The same command runs what is missing, and its results are those of the comparison of all methods."""
    labels = ["zero-shot", "full", "hift", "mezo"]
    runs = out / "runs.jsonl"
    assert [one["label"] for one in lines(runs)] == kept
    with runs.open("a") as file:
        file.write('{"key": "half a li')  # and once more while a line was written
    result = once(argv)
    assert result["code"] == 0 and [label for label, *_ in result["ran"]] == labels[len(kept) :]
    keys = [one["key"] for one in lines(runs)]
    assert len(keys) == len(set(keys)) == 4
    ours, theirs = cells_of(out), cells_of(whole[0])
    assert list(ours) == [(label, "rte") for label in labels]
    for key, record in ours.items():
        assert lasting(record) == lasting(theirs[key])


def test_a_stopped_comparison_says_so_and_is_no_death(data: Path, tmp_path: Path) -> None:
    argv = arguments(data, tmp_path / "out", FEW, "tasks=[rte]")
    for _ in range(3):
        result = once(argv, function=interrupted, how="stopped")
        assert result["code"] == 75 and "stopped; finished trainings are kept" in result["printed"]
        assert "Traceback" not in result["printed"]
        assert [one["label"] for one in lines(tmp_path / "out" / "runs.jsonl")] == ["zero-shot"]
    result = once(argv)  # after three stops in its first training
    assert result["code"] == 0 and [label for label, *_ in result["ran"]] == ["full", "hift", "mezo"]
    assert "1 trainings are finished; this run does the missing ones" in result["printed"]


def test_a_second_comparison_in_the_same_folder_is_refused(copy: tuple[Path, list[str]]) -> None:
    out, argv = copy
    lock = claim(out)
    result = once(argv)
    lock.release()
    assert result["code"] == 2 and f"another run (process {os.getpid()} on" in result["printed"]
    assert not (out / "results.jsonl").exists()


@pytest.fixture
def copy(whole: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder in which everything is done, and the arguments of a few of its rows."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(whole[0] / "runs.jsonl", out)
    return out, arguments(data, out, FEW, "tasks=[rte]")


def key_of(out: Path, label: str) -> str:
    return next(one["key"] for one in lines(out / "runs.jsonl") if (one["label"], one["task"]) == (label, "rte"))


def without(out: Path, key: str) -> None:
    write_jsonl(out / "runs.jsonl", [one for one in lines(out / "runs.jsonl") if one["key"] != key])


def test_a_cell_that_ends_the_process_is_given_up(copy: tuple[Path, list[str]]) -> None:
    out, argv = copy
    key = key_of(out, "hift")
    without(out, key)
    write_jsonl(out / "begun.jsonl", [{"key": key}] * 3)
    result = once(argv)
    assert result["code"] == 1 and result["ran"] == []
    record = cells_of(out)["hift", "rte"]
    assert record["status"] == "failed" and "the process died 3 times" in record["reason"]
    assert once(argv)["code"] == 1  # it stays so
    result = once([*argv, "--retry-failed"])
    assert result["code"] == 0 and [label for label, *_ in result["ran"]] == ["hift"]
    assert cells_of(out)["hift", "rte"]["status"] == "ok"


def test_two_deaths_are_not_three(copy: tuple[Path, list[str]]) -> None:
    out, argv = copy
    key = key_of(out, "hift")
    without(out, key)
    write_jsonl(out / "begun.jsonl", [{"key": key}] * 2)
    assert [label for label, *_ in once(argv)["ran"]] == ["hift"]


def test_a_broken_line_is_named(copy: tuple[Path, list[str]]) -> None:
    out, argv = copy
    text = (out / "runs.jsonl").read_text().splitlines()
    text[2] = text[2][:50]
    (out / "runs.jsonl").write_text("\n".join(text) + "\n")
    result = once(argv)
    assert result["code"] == 2 and f"{out / 'runs.jsonl'}:3: broken JSON" in result["printed"]
    assert "Traceback" not in result["printed"]


def test_some_rows_alone_and_what_is_kept_of_the_others(copy: tuple[Path, list[str]]) -> None:
    out, argv = copy
    kept = len(lines(out / "runs.jsonl"))
    result = once([*argv, "--only", "hift", "full"])
    assert result["code"] == 0 and result["ran"] == []
    assert [label for label, _ in cells_of(out)] == ["full", "hift"]
    assert once([*argv, "--only", "full", "--set", "training.rank_timeout=3600"])["ran"] == []  # decides no result
    assert f"has {kept - 2} more trainings, of other settings or rows" in result["printed"]
    assert len(lines(out / "runs.jsonl")) == kept


def test_a_run_counts_for_every_row_and_budget_that_it_fits(copy: tuple[Path, list[str]]) -> None:
    """Another label is no other run; and where nothing is trained, neither is another budget."""
    out, argv = copy
    rows = "methods=[zero-shot, full, {name: full, label: again}]"
    result = once([*argv, "--set", rows, "--set", "budgets=[{samples: 32}, {samples: 8}]"])
    assert result["code"] == 0 and [label for label, *_ in result["ran"]] == ["full"]
    found = [(one["label"], one["budget"]) for one in read_results(out / "results.jsonl")]
    assert found == [(label, f"{n} samples") for n in (32, 8) for label in ("zero-shot", "full", "again")]


def test_other_weights_in_the_same_folder_are_another_model(data: Path, tmp_path: Path) -> None:
    """And the same weights in another folder are the same model."""
    config = LlamaConfig(
        vocab_size=272, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    settings = ["model.config=null", "model.tokenizer=byte", "methods=[zero-shot]", "tasks=[rte]"]

    def ran(folder: Path) -> int:
        result = once(arguments(data, tmp_path / "out", f"model.name_or_path={folder}", *settings))
        assert result["code"] == 0, result["printed"]
        return len(result["ran"])

    model.save_pretrained(tmp_path / "model")
    assert (ran(tmp_path / "model"), ran(tmp_path / "model")) == (1, 0)
    assert ran((tmp_path / "model").rename(tmp_path / "moved")) == 0
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "moved")
    assert ran(tmp_path / "moved") == 1


def test_wandb_offline(copy: tuple[Path, list[str]]) -> None:
    """One run with the tables."""
    out, argv = copy
    result = once([*argv, "--set", "logging.wandb=offline"])
    assert result["code"] == 0 and result["ran"] == [] and "warning" not in result["printed"], result["printed"]
    (run,) = (out / "wandb").glob("offline-run-*")
    assert {path.name.split("_")[0] for path in run.rglob("*.table.json")} != set()


# ---- learning rates --------------------------------------------------------------------------------------------------


def test_a_rate_is_chosen_on_the_validation_part(
    whole: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """With the first seed; the others take it. On the test part another one is better. Older records have no loss."""
    template = lines(whole[0] / "results.jsonl")[3]
    overrides = ["methods=[full]", "tasks=[rte]", "seeds=[0, 1]", "learning_rates=[1e-3, 1e-4, 1e-5]"]
    dev = {1e-3: 0.2, 1e-4: 0.9, 1e-5: 0.9}  # of equal ones the first counts
    argv = arguments(data, tmp_path, *overrides)
    result = once(argv, function=fabricated, template=template, dev=dev)
    assert result["code"] == 0, result["printed"]
    assert [tuple(one[2:]) for one in result["ran"]] == [
        (0, 1e-3, True), (0, 1e-4, True), (0, 1e-5, True), (1, 1e-4, False)
    ]  # fmt: skip
    first, second = read_results(tmp_path / "results.jsonl")
    assert first["learning_rate"] == second["learning_rate"] == 1e-4
    assert first["score"] == pytest.approx(0.1)
    assert first["tuning"] == [{"learning_rate": rate, "score": score, "loss": None} for rate, score in dev.items()]


GOOD, BAD = 1e-3, 1e-4  # rates: the first is better on the validation set, the second on the test set
SIZES = {"train_examples": 8, "dev_examples": 7, "test_examples": 4}


def constructed_comparison(
    out: Path, task: str, *settings: str, **answers: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A built-in task with a validation set that is larger than the test set: what happened, and the results."""
    sizes = [f"data.{name}={n}" for name, n in SIZES.items()]
    given = [
        f"output.dir={out}",
        f"tasks=[{task}]",
        "budgets=[{samples: 8}]",
        "evaluation.bootstrap=50",
        *sizes,
        *settings,
    ]
    argv = ["--config", TINY, *(part for one in given for part in ("--set", one))]
    result = once(argv, function=constructed, **answers)
    assert result["code"] == 0, result["printed"]
    return result, read_results(out / "results.jsonl")


@pytest.mark.parametrize("task", ["yes-no", "arithmetic"])
def test_validation_examples_alone_decide_the_rate(task: str, tmp_path: Path) -> None:
    """One rate is right on all of the validation set and wrong on all of the test set; the other the other way round.

    Written answers are chosen by their loss: on the validation set 1 and 2, on the test set 4 and 3.
    """
    data = load_task(find_task(task), seed=0, **SIZES)
    dev, test = ({one.prompt for one in examples} for examples in (data.dev, data.test))
    right = {("full", GOOD): dev, ("full", BAD): test}
    losses = {
        ("full", GOOD): dict.fromkeys(dev, 1.0) | dict.fromkeys(test, 4.0),
        ("full", BAD): dict.fromkeys(dev, 2.0) | dict.fromkeys(test, 3.0),
    }
    rows = f"methods=[{{name: full, learning_rates: [{BAD}, {GOOD}]}}]"
    _, (record,) = constructed_comparison(tmp_path, task, rows, right=right, losses=losses)
    assert record["learning_rate"] == GOOD and record["score"] == 0 and record["n"] == len(test)
    scores = [0, 1] if task == "yes-no" else [-2, -1]
    assert record["tuning"] == [
        {"learning_rate": BAD, "score": scores[0], "loss": 2},
        {"learning_rate": GOOD, "score": scores[1], "loss": 1},
    ]
    assert record["metrics"]["answer_loss"] == 4


def test_the_loss_decides_between_rates_with_equal_accuracy(tmp_path: Path) -> None:
    """Not where the accuracies differ: the rate with the least loss of all is right on one example less."""
    data = load_task(find_task("yes-no"), seed=0, **SIZES)
    dev, test = ([one.prompt for one in examples] for examples in (data.dev, data.test))
    grid = {BAD: (len(dev), math.nan), 1e-3: (len(dev), 0.5), GOOD: (len(dev), 0.25), 1e-5: (len(dev) - 1, 0.125)}
    right = {("full", rate): set(dev[:count]) for rate, (count, _) in grid.items()}
    losses = {("full", rate): dict.fromkeys([*dev, *test], loss) for rate, (_, loss) in grid.items()}
    rows = f"methods=[{{name: full, learning_rates: [{', '.join(map(str, grid))}]}}]"
    _, (record,) = constructed_comparison(tmp_path, "yes-no", rows, right=right, losses=losses)
    assert record["learning_rate"] == GOOD and record["metrics"]["answer_loss"] == 0.25
    assert record["loss_bootstrap"] == [0.25] * 50  # of test examples that all have this loss


def test_methods_share_their_resamples(tmp_path: Path) -> None:
    """Where one method is right another one is wrong, so on each resample their scores add up to 1."""
    data = load_task(find_task("yes-no"), seed=0, **SIZES)
    prompts = [one.prompt for one in data.test]
    right = {("full", GOOD): set(prompts[:3]), ("hift", GOOD): set(prompts[3:])}
    _, records = constructed_comparison(
        tmp_path, "yes-no", "methods=[full, hift]", f"learning_rates=[{GOOD}]", right=right
    )
    one, other = records
    assert (one["score"], other["score"]) == (0.75, 0.25)
    assert [a + b for a, b in zip(one["bootstrap"], other["bootstrap"], strict=True)] == [1] * 50
    assert len(set(one["bootstrap"])) > 2


def test_tuning_looks_at_the_validation_part_only(data: Path, tmp_path: Path) -> None:
    """Really trained: rates whose order the validation part decides; the record is the chosen rate's own run."""
    rows = "methods=[{name: full, learning_rates: [1e-2, 1e-9]}]"
    assert once(arguments(data, tmp_path, rows, "tasks=[sst2]"))["code"] == 0
    (record,) = read_results(tmp_path / "results.jsonl")
    runs = lines(tmp_path / "runs.jsonl")
    assert [one["score"] for one in record["tuning"]] == [one["dev_score"] for one in runs]
    assert all(0 <= one["dev_score"] <= 1 and one["dev_score"] * 8 % 1 == 0 for one in runs)
    best = max(runs, key=lambda one: one["dev_score"])
    assert record["learning_rate"] == best["learning_rate"] and record["loss_last"] == best["loss_last"]


def test_with_one_rate_nothing_is_tuned(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    assert {tune for *_, tune in result["ran"]} == {False}
    assert all(one.get("dev_score") is None for one in lines(out / "runs.jsonl"))


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_failing_cell_does_not_stop_the_others(data: Path, tmp_path: Path) -> None:
    """Nor does it keep its engine and its model from being freed."""
    argv = arguments(data, tmp_path, "methods=[full, lora, zero-shot]", "tasks=[sst2]")
    result = once(argv, broken="lora")
    assert result["code"] == 1 and "Traceback" in result["printed"] and result["failed"] == 2
    found = cells_of(tmp_path)
    assert [one["status"] for one in found.values()] == ["ok", "failed", "ok"]
    assert (
        found["lora", "sst2"]["reason"] == "OutOfMemoryError: out of memory" and found["lora", "sst2"]["out_of_memory"]
    )
    assert "1 failed" in result["printed"] and "OutOfMemoryError: out of memory" in (tmp_path / "report.md").read_text()
    result = once(argv)
    assert result["code"] == 1 and result["ran"] == []
    result = once([*argv, "--retry-failed"])
    assert result["code"] == 0 and [label for label, *_ in result["ran"]] == ["lora"]
    assert [one["status"] for one in cells_of(tmp_path).values()] == ["ok"] * 3


def test_a_task_with_too_long_examples_fails_alone(data: Path, tmp_path: Path) -> None:
    result = once(arguments(data, tmp_path, "methods=[full]", "data.max_length=40"))
    assert result["code"] == 1 and "Traceback" not in result["printed"]
    found = cells_of(tmp_path)
    assert found["full", "sst2"]["status"] == "ok"
    assert "data.max_length 40" in found["full", "rte"]["reason"]


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [("train.tsv", None, "no file train"), ("train.tsv", "sentence\tlabel\na film\t1\ta\n", "train.tsv:2: 3 values")],
)
def test_data_of_another_kind_is_refused(file: str, content: str | None, expected: str, tmp_path: Path) -> None:
    path = write_data(tmp_path / "data") / "sst2" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    broken = tmp_path / "data" / "superglue" / "RTE" / "val.jsonl"
    broken.write_text(broken.read_text() + '{"premise": "a", "hypothesis": "b", "label": "perhaps"}\n')
    result = once(arguments(tmp_path / "data", tmp_path / "out", FEW, "tasks=[sst2, rte]"))
    assert result["code"] == 2 and expected in result["printed"] and "Traceback" not in result["printed"]
    assert "perhaps" in result["printed"] and result["ran"] == []  # what is wrong with the other task, too


def test_tokens_that_the_model_does_not_have_are_found_before_a_training(data: Path, tmp_path: Path) -> None:
    """All tasks are named, so that the first cells are not trained for nothing."""
    tokenizer, model = byte_tokenizer(), tmp_path / "model"
    tokenizer.add_tokens([" film", "cats"])
    LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=262)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    given = ["model.config=null", "model.tokenizer=null", f"model.name_or_path={model}"]
    result = once(arguments(data, tmp_path / "out", "methods=[zero-shot]", *given))
    assert result["code"] == 2 and result["ran"] == []
    assert "texts of sst2 have a token that the model does not have, e.g. ' film' (id 262)" in result["printed"]
    assert "texts of rte have a token that the model does not have, e.g. 'cats' (id 263)" in result["printed"]
    assert "resize_token_embeddings(264)" in result["printed"]


@pytest.mark.slow
def test_a_vision_tower_is_left_alone_and_its_blocks_are_named_at_once(data: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "gemma3", "gemma3", GEMMA3)
    given = ["model.config=null", f"model.name_or_path={tmp_path / 'gemma3'}", "tasks=[sst2]", "methods=[hift, full]"]
    argv = arguments(data, tmp_path / "out", *given, "budgets=[{samples: 8}]")
    result = once(argv)
    assert result["code"] == 1 and "Traceback" not in result["printed"], result["printed"]
    found = cells_of(tmp_path / "out")
    reason = found["hift", "sst2"]["reason"]
    assert "the loss does not depend on" in found["full", "sst2"]["notes"][-1]
    (remedy,) = re.findall(r'--set "(.*?)"', reason)
    assert once([*argv, "--set", remedy])["code"] == 0


# ---- ranks, models, budgets ------------------------------------------------------------------------------------------


def test_a_model_with_a_classification_head(data: Path, tmp_path: Path) -> None:
    overrides = [f"model.config={json.dumps(BERT)}", "model.task=sequence-classification"]
    rows = "methods=[zero-shot, icl, full, hift, lora, linear-probing, badam]"
    result = once(arguments(data, tmp_path, *overrides, rows, "data.max_length=100"))
    found = cells_of(tmp_path)
    assert result["code"] == 0, result["printed"]
    for (label, _), one in found.items():
        assert one["status"] == ("not_applicable" if label in ("zero-shot", "icl") else "ok"), one["reason"]
    assert "has random weights and must be trained" in found["icl", "rte"]["reason"]
    assert found["linear-probing", "sst2"]["trained_parameters"] == 2 * 32 + 2


@needs_shared
def test_every_task_with_a_prompt_is_trained_and_scored(tmp_path: Path) -> None:
    """In one comparison, from publishers' files; without Java E2E's METEOR is missing, and that is said."""
    written = {case: content for case, content in CASES.items() if TASKS[content[0]].prompted and " of " not in case}
    for name, file, content, _ in written.values():
        put(tmp_path / name, file, content)
    for name, held_out in HELD_OUT.items():
        put(tmp_path / name, *held_out)
    rows = [
        f'"name[Place {i}], food[Thai]","Place {i} is Thai, and {word}."' for i in range(4) for word in ("good", "bad")
    ]
    put(tmp_path, "e2e/trainset.csv", "\n".join(["mr,ref", *rows]) + "\n")
    paths = {name: tmp_path / name for name in ("e2e", *(case[0] for case in written.values()))}
    for name, task in TASKS.items():
        if task.prompted and name not in paths and not task.built_in:
            paths[name] = SHARED / task.data.partition("/")[0]
    tasks = [{"name": name, "path": str(path)} for name, path in paths.items()]
    assert {*paths} == {name for name, task in TASKS.items() if task.prompted and not task.built_in}
    settings = [f"tasks={json.dumps(tasks)}", "methods=[full]", "budgets=[{samples: 8}]", "data.dev_examples=0"]
    settings += ["data.train_examples=8", "data.test_examples=8", "data.max_length=8192"]
    settings += ["model.config.max_position_embeddings=8192", "model.config.num_hidden_layers=1"]
    result = once(arguments(tmp_path, tmp_path / "out", *settings), function=without_java)
    assert result["code"] == 0, result["printed"]
    found = cells_of(tmp_path / "out")
    assert len(found) == len(paths) and all(one["steps"] == 1 for one in found.values())
    for (_, name), one in found.items():
        assert one["metric"] == TASKS[name].metrics[0] and {*TASKS[name].metrics} - {*one["metrics"]} <= {"meteor"}
        assert math.isfinite(one["metrics"]["answer_loss"])
    assert [
        note
        for note in found["full", "e2e"]["notes"]
        if note.startswith("meteor is missing: pycocoevalcap's METEOR needs `java`")
    ]


def test_demonstrations_are_before_written_answers_too(tmp_path: Path) -> None:
    """The loss on the right answers is of the prompts that the model is given."""
    for part, start, stop in (("train", 0, 4), ("test", 4, 6)):
        rows = [{"question": f"What is {i} and 1?", "answer": f"#### {i + 1}"} for i in range(start, stop)]
        (tmp_path / "data" / "gsm8k").mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "data" / "gsm8k" / f"{part}.jsonl", rows)
    rows = "methods=[zero-shot, {name: icl, shots: 1}, {name: icl, label: two, shots: 2}]"
    settings = [rows, "tasks=[gsm8k]", "data.train_examples=4", "data.dev_examples=0"]
    result = once(arguments(tmp_path / "data", tmp_path / "out", *settings))
    assert result["code"] == 0, result["printed"]
    losses = {one["metrics"]["answer_loss"] for one in cells_of(tmp_path / "out").values()}
    assert len(losses) == 3


def test_memory_of_what_trains_nothing_is_that_of_answering(data: Path, tmp_path: Path) -> None:
    numel = 2**26
    result = once(arguments(data, tmp_path, FEW, "tasks=[sst2]"), function=heavy, numel=numel)
    assert result["code"] == 0, result["printed"]
    peaks = {label: one["peak_memory"] for (label, _), one in cells_of(tmp_path).items()}
    # Resident memory: the system may take other pages back while these are allocated.
    assert peaks["zero-shot"] >= 0.9 * 4 * numel > max(peaks[label] for label in ("full", "hift", "mezo"))


def test_a_plan_that_fails_costs_no_training(data: Path, tmp_path: Path) -> None:
    result = once(arguments(data, tmp_path, "methods=[full]", "tasks=[sst2]"), function=without_a_plan)
    assert result["code"] == 0, result["printed"]
    assert "warning: sst2, full: memory could not be planned: no such kernel" in result["printed"]
    assert cells_of(tmp_path)["full", "sst2"]["planned_memory"] is None


def test_what_became_of_the_data_is_said(data: Path, tmp_path: Path) -> None:
    """On the terminal, in records and reports: parts that are smaller than asked for, and what was cut."""
    settings = ["methods=[full, {name: icl, shots: 50}]", "tasks=[sst2]", "data.train_examples=100"]
    result = once(arguments(data, tmp_path, *settings, "data.max_length=64"))
    assert result["code"] == 0, result["printed"]
    assert (
        "sst2: the training split has 40 distinct examples, 108 are needed: train gets at most 32 of 100"
        in result["printed"]
    )
    found = cells_of(tmp_path)
    full, icl = found["full", "sst2"], found["icl", "sst2"]
    assert "the training split has 40" in full["notes"][0] and len(full["notes"]) == 1
    assert icl["notes"][1] == "icl: only 32 demonstrations, because there are no more training examples"
    assert full["truncated"] == {"train": 0, "test": 0} and icl["truncated"] == {"train": 0, "test": 8}
    report = (tmp_path / "report.md").read_text()
    assert "- sst2: the training split has 40 distinct" in report and "- sst2: icl: only 32 demonstrations" in report
    assert "- sst2: icl: up to 8 of 8 test examples were cut at the beginning." in report


def test_a_budget_of_seconds(data: Path, tmp_path: Path) -> None:
    """Steps are timed alone, before the training, which takes as many as the seconds suffice for, at any schedule."""
    settings = ("methods=[full]", "tasks=[sst2]", "budgets=[{seconds: 0.2}]", "training.lr_schedule=linear")
    result = once(arguments(data, tmp_path, *settings))
    assert result["code"] == 0, result["printed"]
    (times,) = lines(tmp_path / "step_times.jsonl")
    assert times["label"] == "full" and sum(times["first"]) >= 0.2 > sum(times["first"][:-1])  # no more are needed
    (record,) = read_results(tmp_path / "results.jsonl")
    assert record["budget"] == "0.2 s" and record["steps"] == record["samples"] / 8 == len(times["first"])
    assert record["seconds_are"] == "measured"


def test_flops_and_sizes_at_zero_3(whole: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    """As at the stage of the config, 2; with no weight whole between its uses."""
    overrides = ["methods=[full, hift]", "tasks=[sst2]", "deepspeed.zero_optimization.stage=3"]
    overrides.append("deepspeed.zero_optimization.stage3_param_persistence_threshold=0")
    assert once(arguments(data, tmp_path, *overrides))["code"] == 0
    for (label, task), one in cells_of(tmp_path).items():
        theirs = cells_of(whole[0])[label, task]
        for key in ("flops", "trained_parameters", "total_parameters"):
            assert one[key] == theirs[key], (label, key)


def test_flops_in_records(whole: tuple[Path, dict[str, Any]]) -> None:
    found = {
        label: one["flops"] for (label, task), one in cells_of(whole[0]).items() if task == "sst2" and one.get("flops")
    }
    assert found["full"] == found["galore"]
    assert found["mezo"] == found["mezo-adam"]
    forward = found["mezo"] / 2
    assert found["full"] == 3 * forward  # the embeddings below all products are trained
    assert found["lomo"] == 5 * forward  # two backward passes, of which one is for the norm
    assert forward < found["linear-probing"] < found["hift"] < found["full"]
    assert forward < found["badam"] < found["full"]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_an_output_that_is_a_file(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    result = once(arguments(data, tmp_path / "out"))
    assert result["code"] == 2 and "is a file" in result["printed"]


def test_unknown_options_of_the_command(tmp_path: Path) -> None:
    result = once(["--confg", "x"])
    assert result["code"] == 2 and "see --help" in result["printed"]
