"""Epochs, evaluation during training and the best checkpoint: `training.epochs`, `eval_every` and `keep_best`."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from hift_ds.launch.config.settings import load_settings
from hift_ds.launch.errors import UserError
from tests.support.ranks import run_on_ranks
from tests.support.training import TINY, arguments, records, run_tiny, summary


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def text_data(folder: Path, n_train: int = 10, n_held_out: int = 5) -> list[str]:
    """Settings for prompts and completions, whose held-out measure is the loss; odd numbers, so ranks differ."""
    for name, start, n in (("train", 0, n_train), ("held_out", 100, n_held_out)):
        rows = [{"prompt": f"{i} and one is", "completion": str(i + 1)} for i in range(start, start + n)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = {"path": folder / "train.jsonl", "eval_path": folder / "held_out.jsonl"}
    return ["data.name=jsonl", *(f"data.{key}={path}" for key, path in chosen.items()),
            "data.train_examples=null", "data.eval_examples=null"]  # fmt: skip


# ---- epochs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "examples", "steps"),
    [(1, 8, 2), (1, 10, 3), (1.5, 8, 3), (0.01, 8, 1), (3, 9, 7), (0.3, 40, 3)],  # of batches of 4
)
def test_epochs_are_whole_batches(epochs: float, examples: int, steps: int) -> None:
    overrides = ["output.dir=none", "training.max_steps=null", f"training.epochs={epochs}"]
    assert load_settings(TINY, overrides).with_steps(examples).training.max_steps == steps


def test_without_epochs_the_steps_stay() -> None:
    assert load_settings(TINY, ["output.dir=none"]).with_steps(1_000).training.max_steps == 12
    defaults = load_settings(TINY, ["output.dir=none", "training.max_steps=null"])
    assert defaults.with_steps(1_000).training.max_steps == 100


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epochs=2"], "training.epochs: got 2, and training.max_steps is 12. Expected one of them"),
        (["training.max_steps=null", "training.epochs=0"], "training.epochs: got 0.0. Expected more than 0"),
        (["training.keep_best=true"], "training.keep_best: true, but training.eval_every is not set"),
        (
            ["training.keep_best=true", "training.eval_every=2", "method.name=badam"],
            "training.keep_best: true, but badam's package cannot save all of its state",
        ),
        (["training.max_steps=null", "training.epochs=.inf"], "training.epochs: got inf. Expected a finite number"),
        (["training.batch_size=null"], "training.batch_size: got None, expected a whole number"),
        (["training.eval_every=2", "data.eval_examples=0"], "training.eval_every: got 2, but data.eval_examples is 0"),
        (["training.eval_every=0"], "training.eval_every: got 0. Expected at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as found:
        load_settings(TINY, ["output.dir=none", *overrides])
    assert message in str(found.value)


def test_a_run_of_epochs_ends_finished_and_can_be_prolonged(tmp_path: Path) -> None:
    """Ten examples in batches of four: two epochs are five steps, three are eight."""
    given = [*text_data(tmp_path), "training.max_steps=null", "training.save_every=100"]
    result = run_tiny(1, tmp_path / "run", *given, "training.epochs=2")
    assert result["code"] == 0, result["printed"]
    assert (summary(tmp_path / "run")["steps"], summary(tmp_path / "run")["epochs"]) == (5, 2)
    again = run_tiny(1, tmp_path / "run", *given, "training.epochs=2", resume="yes")
    assert again["code"] == 0 and "this run is finished after 5 steps" in again["printed"]
    longer = run_tiny(1, tmp_path / "run", *given, "training.epochs=3", resume="yes")
    assert longer["code"] == 0 and summary(tmp_path / "run")["steps"] == 8, longer["printed"]
    straight = run_tiny(1, tmp_path / "straight", *given, "training.epochs=3")
    assert straight["code"] == 0 and same(weights(tmp_path / "run"), weights(tmp_path / "straight"))


# ---- evaluation during training ----------------------------------------------------------------------------------


def test_evaluations_change_no_bit_and_are_those_of_the_shorter_run(tmp_path: Path) -> None:
    """Two ranks at ZeRO 3 with dropout: the held-out loss at step 4 is the final one of a run that ends there."""
    given = [*text_data(tmp_path), "deepspeed.zero_optimization.stage=3", "model.config.attention_dropout=0.1"]
    for name, more in {
        "plain": ["training.max_steps=7"],
        "evaluated": ["training.max_steps=7", "training.eval_every=4"],
        "short": ["training.max_steps=4"],
    }.items():
        result = run_tiny(2, tmp_path / name, *given, *more)
        assert result["code"] == 0, result["printed"]
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "evaluated"))
    steps = records(tmp_path / "evaluated")
    assert [record["step"] for record in steps if "held_out" in record] == [4, 7]
    assert steps[3]["held_out"] == {"loss": summary(tmp_path / "short")["held_out_loss_after"], "n": 5}
    assert steps[6]["held_out"]["loss"] == summary(tmp_path / "plain")["held_out_loss_after"]
    assert not any("held_out" in record for record in records(tmp_path / "plain"))


def test_evaluation_needs_held_out_examples(tmp_path: Path) -> None:
    given = [entry for entry in text_data(tmp_path) if "eval_path" not in entry]
    result = run_tiny(1, tmp_path / "run", *given, "training.eval_every=2")
    assert result["code"] == 2 and "training.eval_every: got 2, but the data has no held-out" in result["printed"]
    assert not (tmp_path / "run").exists()


# ---- the best checkpoint -----------------------------------------------------------------------------------------


def train_with_results(argv: Sequence[str], results: Sequence[float | None], stop_at: int | None = None) -> Any:
    """Run the command line on this rank with these held-out losses, in the order of the evaluations.

    Args:
        stop_at: number of the evaluation (from 0) during which this process is asked to stop.
    """
    from hift_ds.launch import run, train
    from hift_ds.launch.runtime.preemption import Preemption

    given = iter(range(len(results)))

    def evaluate(engine: Any, data: Any, tokenizer: Any, settings: Any, after_batch: Any) -> dict[str, Any]:
        number = next(given)
        if number == stop_at:
            asked[0].reasons.append("SIGTERM")
        after_batch()
        return {"loss": results[number], "n": 5}

    asked: list[Preemption] = []
    enter = Preemption.__enter__

    def entered(self: Preemption) -> Preemption:
        asked.append(self)
        return enter(self)

    printed = io.StringIO()
    with mock.patch.object(run, "evaluate", evaluate), mock.patch.object(Preemption, "__enter__", entered):
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = train.main(list(argv))
    return {"code": code, "printed": printed.getvalue()}


def run_with_results(out: Path, results: Sequence[float | None], *given: str, ranks: int = 1, **options: Any) -> Any:
    resume = options.pop("resume", None)
    return run_on_ranks(ranks, train_with_results, arguments(out, *given, resume=resume), results, **options)[0]


BEST = ("training.max_steps=10", "training.eval_every=3", "training.keep_best=true", "training.keep_last=1")


def test_the_best_checkpoint_stays_and_is_exported(tmp_path: Path) -> None:
    """Evaluations before training, at steps 3, 6, 9 and 10, and of the loaded best: 6 is the best."""
    result = run_with_results(tmp_path / "run", [9.0, 3.0, 1.0, 2.0, 2.5, 1.0], *BEST)
    assert result["code"] == 0, result["printed"]
    assert "step 6 was the best" in result["printed"]
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.parent.name for path in folder.glob("*/manifest.json")) == ["step10", "step6"]
    assert summary(tmp_path / "run")["best"] == {"step": 6, "held_out": {"loss": 1.0, "n": 5}}
    assert summary(tmp_path / "run")["held_out_loss_after"] == 1.0 and summary(tmp_path / "run")["steps"] == 10
    short = run_tiny(1, tmp_path / "short", "training.max_steps=6")
    assert short["code"] == 0 and same(weights(tmp_path / "run"), weights(tmp_path / "short"))
    last = run_tiny(1, tmp_path / "last", "training.max_steps=10")
    assert last["code"] == 0 and not same(weights(tmp_path / "run"), weights(tmp_path / "last"))


def test_a_continued_run_remembers_the_best(tmp_path: Path) -> None:
    """A signal during the evaluation at step 6: the run is saved after step 6, and step 3 stays the best."""
    stopped = run_with_results(tmp_path / "run", [9.0, 1.0, 0.5], *BEST, stop_at=2, ranks=2)
    assert stopped["code"] == 75 and "after step 6; checkpoint" in stopped["printed"]
    found = [record.get("held_out", "none") for record in records(tmp_path / "run")]
    assert found == ["none", "none", {"loss": 1.0, "n": 5}, "none", "none", None]
    # The evaluation at step 6 is repeated; then come steps 9 and 10, and the loaded best.
    resumed = run_with_results(tmp_path / "run", [1.5, 2.0, 3.0, 1.0], *BEST, resume="yes", ranks=2)
    assert resumed["code"] == 0, resumed["printed"]
    assert summary(tmp_path / "run")["best"]["step"] == 3
    short = run_tiny(2, tmp_path / "short", "training.max_steps=3")
    assert short["code"] == 0 and same(weights(tmp_path / "run"), weights(tmp_path / "short"))


def test_an_interrupted_evaluation_is_repeated_and_may_be_the_best(tmp_path: Path) -> None:
    stopped = run_with_results(tmp_path / "run", [9.0, 1.0, 0.5], *BEST, stop_at=2)
    assert stopped["code"] == 75, stopped["printed"]
    resumed = run_with_results(tmp_path / "run", [0.5, 2.0, 3.0, 0.5], *BEST, resume="yes")
    assert resumed["code"] == 0 and summary(tmp_path / "run")["best"]["step"] == 6, resumed["printed"]
    short = run_tiny(1, tmp_path / "short", "training.max_steps=6")
    assert short["code"] == 0 and same(weights(tmp_path / "run"), weights(tmp_path / "short"))


def test_a_damaged_best_checkpoint_is_no_traceback_and_the_last_model_can_be_exported(tmp_path: Path) -> None:
    run_with_results(tmp_path / "run", [9.0, 1.0, 2.0, 3.0, 3.0, 1.0], *BEST)
    shutil.rmtree(tmp_path / "run" / "model")  # the export is to be made again
    states = next((tmp_path / "run" / "checkpoints" / "step3").glob("*model_states.pt"))
    states.write_bytes(states.read_bytes()[:-1])
    again = run_with_results(tmp_path / "run", [3.0], *BEST, resume="yes")
    assert again["code"] == 2 and "training.keep_best: the best checkpoint, of step 3, cannot be" in again["printed"]
    last = run_with_results(tmp_path / "run", [3.0], *BEST, "training.keep_best=false", resume="yes")
    assert last["code"] == 0, last["printed"]
    straight = run_tiny(1, tmp_path / "straight", "training.max_steps=10")
    assert straight["code"] == 0 and same(weights(tmp_path / "run"), weights(tmp_path / "straight"))


def test_the_last_evaluation_is_not_repeated(tmp_path: Path) -> None:
    """Before training and at steps 2 and 4: a fourth evaluation would find no result."""
    result = run_with_results(tmp_path / "run", [9.0, 2.0, 1.5], "training.max_steps=4", "training.eval_every=2")
    assert result["code"] == 0 and summary(tmp_path / "run")["held_out_loss_after"] == 1.5, result["printed"]


def test_a_run_finished_in_steps_is_finished_in_epochs(tmp_path: Path) -> None:
    given = [*text_data(tmp_path), "training.save_every=100"]
    assert run_tiny(1, tmp_path / "run", *given, "training.max_steps=5")["code"] == 0
    before = (tmp_path / "run" / "summary.json").read_text()
    again = run_tiny(1, tmp_path / "run", *given, "training.max_steps=null", "training.epochs=2", resume="auto")
    assert again["code"] == 0 and "this run is finished after 5 steps" in again["printed"], again["printed"]
    assert (tmp_path / "run" / "summary.json").read_text() == before


def test_a_longer_run_that_is_stopped_in_its_last_evaluation_saves_nothing_else(tmp_path: Path) -> None:
    """Six steps are done when `max_steps` is lowered to four: no checkpoint of step 4 has the weights of step 6."""
    given = ("training.save_every=6", "training.keep_last=null")
    assert run_with_results(tmp_path / "run", [9.0, 1.0], "training.max_steps=6", *given)["code"] == 0
    shutil.rmtree(tmp_path / "run" / "model")
    argv = ("training.max_steps=4", *given)
    stopped = run_with_results(tmp_path / "run", [1.0], *argv, resume="yes", stop_at=0)
    assert stopped["code"] == 75 and "stopped by SIGTERM after step 6; checkpoint" in stopped["printed"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step*")] == ["step6"]


def test_of_equal_scores_the_later_is_the_best() -> None:
    from hift_ds.launch.callbacks.held_out import better

    assert better({"score": 0.5}, {"score": 0.5}) and not better({"score": 0.4}, {"score": 0.5})
    assert better({"loss": 0.9}, {"loss": 1.0}) and not better({"loss": 1.0}, {"loss": 1.0})
    assert better({"loss": 1.0}, {"loss": None}) and not better({"loss": None}, {"loss": 1.0})  # not finite
