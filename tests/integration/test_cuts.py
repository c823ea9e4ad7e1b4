"""A run that continues with other blocks, in this session's ranks: what it says, keeps and records."""

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.ranks import run_on_ranks
from tests.support.training import arguments, records, run_tiny, summary, train_and_compare

TWO = "deepspeed.hift.layers_per_block=2"
SETTINGS = ("data.eval_examples=0", "training.max_steps=18", "training.save_every=4", "training.keep_last=null")
SCHEDULER = 'deepspeed.scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_min_lr": 1e-4}}'


def blocks(out: Path) -> list[int]:
    return [record["block"] for record in records(out)]


def test_a_run_that_ends_before_the_cycle_does_keeps_its_blocks(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_tiny(1, out, *SETTINGS, stop_after=9)["code"] is None
    ended = run_tiny(1, out, *SETTINGS, "training.max_steps=11", TWO, resume="yes")
    assert ended["code"] == 0 and "goes on with 3" not in ended["printed"], ended["printed"]
    assert "run: 11 steps, 8 done, then 0.5 cycles of 6 blocks" in ended["printed"], ended["printed"]
    assert blocks(out) == [*range(6), *range(5)] and summary(out)["updates_per_block"] == [2] * 5 + [1]
    # Made longer, it finishes the cycle, and goes on with the new blocks; and then with the old ones again.
    longer = run_tiny(1, out, *SETTINGS, "training.max_steps=14", TWO, resume="yes")
    assert longer["code"] == 0, longer["printed"]
    says = "run: 14 steps, 11 done; 1 step ends the cycle of 6 blocks, then 0.7 cycles of 3 blocks"
    assert says in longer["printed"], longer["printed"]
    assert blocks(out) == [*range(6), *range(6), 0, 1]
    back = run_tiny(1, out, *SETTINGS, "training.max_steps=18", resume="yes")
    assert back["code"] == 0 and "step 15 ends a cycle over 3 blocks" in back["printed"], back["printed"]
    assert blocks(out) == [*range(6), *range(6), *range(3), *range(3)]
    assert [cut["updates_per_block"] for cut in summary(out)["cuts"]] == [[2] * 6, [1] * 3, [1, 1, 1, 0, 0, 0]]
    assert "updates from       step 13 on: 1 x embeddings" in back["printed"]
    assert "18 steps, 2 whole cycles of 6 blocks, then 1 of 3, then 0 of 6\n" in back["printed"]
    assert summary(out)["cycles"] == 3


def test_an_automatic_rate_stays_when_steps_and_blocks_change(tmp_path: Path) -> None:
    """6 blocks x 2e-4, in run.json, in every record and after the run got longer and coarser."""
    out = tmp_path / "run"
    auto = (*SETTINGS, "training.learning_rate=auto", "training.full_learning_rate=2e-4")
    short = run_tiny(1, out, *auto, "training.max_steps=6")
    assert short["code"] == 0, short["printed"]
    says = (
        "note: training.learning_rate: auto is 0.0012: 0.0002 (training.full_learning_rate) x 6 blocks; 6 steps update"
        " each block 1 times",
        "warning: 6 steps update each of 6 blocks 1 times; with fewer than 8 updates, blocks may learn little at any "
        "rate. Raise training.max_steps or training.epochs to 48 steps.",
    )
    assert all(text in short["printed"] for text in says), short["printed"]
    longer = run_tiny(1, out, *auto, "training.max_steps=12", TWO, resume="yes")
    assert longer["code"] == 0, longer["printed"]
    stays = "auto stays 0.0012, the rate of the run so far; a new run with these settings would use 0.0006 (3 blocks)"
    assert stays in longer["printed"], longer["printed"]
    assert [record["learning_rate"] for record in records(out)] == pytest.approx([1.2e-3] * 12)
    recorded = json.loads((out / "run.json").read_text())["settings"]
    assert recorded["training"]["learning_rate"] == pytest.approx(1.2e-3)
    assert recorded["deepspeed"]["optimizer"]["params"]["lr"] == pytest.approx(1.2e-3)


def first_is_best(argv: Sequence[str], stop_after: int | None = None) -> dict[str, Any]:
    """In a rank: `train_and_compare`, where no evaluation is better than the first."""
    from hift_ds.launch.callbacks import checkpoints

    with mock.patch.object(checkpoints, "better", lambda *results: False):
        return train_and_compare(argv, stop_after)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_best_model_of_an_earlier_cut_is_taken(stage: int, tmp_path: Path) -> None:
    """Of step 4, in the middle of a cycle over other blocks: only its weights are used."""
    truth, out = tmp_path / "truth", tmp_path / "run"
    of_stage = f"deepspeed.zero_optimization.stage={stage}"
    best = (
        of_stage,
        "training.max_steps=14",
        "training.eval_every=4",
        "training.keep_best=true",
        "data.eval_examples=2",
    )
    run_on_ranks(1, first_is_best, arguments(out, *best), stop_after=5)
    (done,) = run_on_ranks(1, first_is_best, arguments(out, *best, TWO, resume="yes"))
    assert done["code"] == 0 and "step 6 ends a cycle over 6 blocks" in done["printed"], done["printed"]
    assert summary(out)["best"]["step"] == 4 and done["different"] == []
    assert done["digest"] == run_tiny(1, truth, of_stage, "training.max_steps=4", "data.eval_examples=0")["digest"]


def engines_alive(argv: Sequence[str]) -> tuple[int, list[list[bool]]]:
    """In a rank: the exit code, and which of the engines before are alive where another one is made."""
    from hift_ds.launch import run

    alive: list[list[bool]] = []
    made: list[Any] = []
    make = run.make_engine

    def spy(*given: Any, **named: Any) -> Any:
        alive.append([reference() is not None for reference in made])
        engine = make(*given, **named)
        made.append(weakref.ref(engine))
        return engine

    with mock.patch.object(run, "make_engine", spy):
        return train_and_compare(argv)["code"], alive


def test_the_old_engine_is_freed_before_the_new_one_is_made(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_tiny(1, out, *SETTINGS, stop_after=9)["code"] is None
    found = run_on_ranks(1, engines_alive, arguments(out, *SETTINGS, TWO, resume="yes"))
    assert found == [(0, [[], [False]])]


def test_a_schedule_that_counts_cycles_keeps_the_blocks(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_tiny(1, out, *SETTINGS, SCHEDULER, stop_after=9)["code"] is None
    refused = run_tiny(1, out, *SETTINGS, SCHEDULER, TWO, resume="yes")
    assert refused["code"] == 2 and "WarmupLR" in refused["printed"], refused["printed"]
    assert len(records(out)) == 9
