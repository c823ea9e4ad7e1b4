"""The training loop by itself: what each step and each rank draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hift_ds.launch.callbacks.callback import Callback, Step
from tests.support.ranks import run_on_ranks
from tests.support.training import TINY


class RecordedLedgers(Callback):
    """For each step, the ledger in its record and the one that the engine counts after it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.seen: list[tuple[Any, Any]] = []

    def describe(self, step: Step) -> None:
        self.seen.append((step.record["memory"], self.engine.memory_ledger()))


class OwnLosses(Callback):
    """This rank's share of each step's loss."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def after_step(self, step: Step, total: float) -> bool:
        self.seen.append(step.own_loss)
        return False


def trained(out: str, overrides: list[str], first_step: int, make_callback: Callable[[Any], Any]) -> Any:
    """In a rank: what the callback has seen of steps on copies of one example, with weights that do not move."""
    import torch

    from hift_ds.launch.config.settings import load_settings
    from hift_ds.launch.data.encoding import Example
    from hift_ds.launch.data.loading import Data
    from hift_ds.launch.loop import train
    from hift_ds.launch.make_engine import make_engine
    from hift_ds.launch.model import loading

    sizes = ["training.max_steps=4", "training.batch_size=2", "training.micro_batch_size=1"]
    sizes += ["training.learning_rate=1e-30", f"output.dir={out}"]
    settings = load_settings(TINY, [*sizes, *overrides], torch.distributed.get_world_size())
    tokenizer = loading.load_tokenizer(settings.model)
    config = loading.load_config(settings.model, tokenizer, None)
    torch.manual_seed(0)
    engine: Any = make_engine(loading.load_model(settings.model, config, settings.dtype), settings, lambda tick: 1.0)
    try:
        ids = list(range(5, 45))
        callback = make_callback(engine)
        train(engine, Data([Example(ids, ids)] * 8, [], {}, None), 0, settings, [callback], first_step)
        return callback.seen
    finally:
        engine.destroy()


def losses_of_one_example(out: str, first_step: int, attention_dropout: float) -> list[float]:
    """In a rank: the losses of steps."""
    dropout = f"model.config.attention_dropout={attention_dropout}"
    return trained(out, [dropout], first_step, lambda _: OwnLosses())


def ledgers_of_three_cycles(out: str, overrides: list[str]) -> list[tuple[Any, Any]]:
    """In a rank: the recorded and the counted ledger of each step."""
    return trained(out, ["training.max_steps=18", *overrides], 0, RecordedLedgers)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_ledger_that_is_not_counted_again_is_the_one_of_its_step(stage: int, tmp_path: Path) -> None:
    overrides = [f"deepspeed.zero_optimization.stage={stage}", "deepspeed.bf16.enabled=true"]
    for seen in run_on_ranks(2, ledgers_of_three_cycles, str(tmp_path), overrides):
        assert len(seen) == 18
        for number, (recorded, counted) in enumerate(seen):
            assert recorded == counted, f"step {number + 1}"


def test_state_that_stays_on_the_device_is_recorded_when_all_blocks_have_it(tmp_path: Path) -> None:
    overrides = ["deepspeed.hift.offload.device=none", "deepspeed.hift.steps_per_block=2", "training.max_steps=30"]
    (seen,) = run_on_ranks(1, ledgers_of_three_cycles, str(tmp_path), overrides)
    assert len(seen) == 30
    for number, (recorded, counted) in enumerate(seen):
        assert recorded == counted, f"step {number + 1}"


def test_each_step_and_each_rank_draws_a_dropout_of_its_own(tmp_path: Path) -> None:
    straight = run_on_ranks(2, losses_of_one_example, str(tmp_path), 0, 0.5)
    drawn = [loss for losses in straight for loss in losses]
    assert len(drawn) == 8 and len(set(drawn)) == 8, drawn
    # A run that continues after step 2 draws what the straight one drew.
    continued = run_on_ranks(2, losses_of_one_example, str(tmp_path), 2, 0.5)
    assert continued == [losses[2:] for losses in straight]
    without = run_on_ranks(2, losses_of_one_example, str(tmp_path), 0, 0.0)
    assert len({loss for losses in without for loss in losses}) == 1, "only dropout makes a difference"
