"""What is set on the optimizer of the whole model reaches the block that is stepped."""

import pytest
import torch

from tests.support import tiny
from tests.support.parity import STAGES
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case

LAYERS_PER_BLOCK = 3  # two blocks


def settings_at(step: int) -> dict[str, object]:
    """Every setting of AdamW changes at every step, as a scheduler or a user may change it."""
    return {
        "lr": tiny.LEARNING_RATE * (1 + step % 3),
        "betas": (0.5 + 0.1 * (step % 4), 0.8 + 0.05 * (step % 3)),
        "weight_decay": 0.5 * (step % 5),
        "eps": 1e-6 * 10 ** (step % 3),
    }


def train_with_changing_settings(stage: int) -> float:
    """In a rank: the error of the engine's weights against one plain AdamW for each block."""
    engine = tiny.initialize(Case(stage=stage, layers_per_block=LAYERS_PER_BLOCK, clip=0.0))
    plain = tiny.model()
    start = tiny.copies(dict(plain.named_parameters()))
    blocks = tiny.block_names(LAYERS_PER_BLOCK)
    optimizers = [torch.optim.AdamW([plain.get_parameter(name) for name in names]) for names in blocks]
    try:
        for step in range(8):
            (group,) = engine.block_optimizers.param_groups
            group.update(settings_at(step))
            tiny.optimizer_step(engine, step)

            plain.zero_grad()
            for micro in range(tiny.ACCUMULATION):
                (plain(**tiny.micro_batch(step, micro)).loss / tiny.ACCUMULATION).backward()
            optimizer = optimizers[step % len(blocks)]
            optimizer.param_groups[0].update(settings_at(step))
            optimizer.step()
        end = tiny.copies(dict(plain.named_parameters()))
        return tiny.update_error(tiny.weights(engine), tiny.Outcome(start, end, [], [], []))
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", STAGES)
def test_settings_that_change_between_steps_reach_the_block(stage: int) -> None:
    (error,) = run_on_ranks(1, train_with_changing_settings, stage)
    assert error <= 1e-4


def device_after_good_and_bad_steps(stage: int) -> tuple[dict[str, int], dict[str, int], bool]:
    """In a rank: bytes on the device between steps, after a good step and after a skipped one."""
    engine = tiny.initialize(Case(stage=stage, layers_per_block=LAYERS_PER_BLOCK, step="block"))
    try:
        for step in range(3):  # every block has state
            tiny.optimizer_step(engine, step)
        good = engine.memory_ledger()["device"]
        for micro in range(tiny.ACCUMULATION):
            engine.backward(engine(**tiny.micro_batch(3, micro)).loss * float("inf"))
            engine.step()
        return good, engine.memory_ledger()["device"], engine.was_step_applied()
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", (0, 2))
def test_a_skipped_step_leaves_no_state_on_the_device(stage: int) -> None:
    """The block's state was fetched before the step; it must not add to the activations of the next one."""
    ((good, bad, is_applied),) = run_on_ranks(1, device_after_good_and_bad_steps, stage)
    assert not is_applied and bad == good
    assert good["master_weights"] == good["optimizer_state"] == 0


def buffers_in_a_window(stage: int) -> list[int]:
    """In a rank: bytes of buffers on the device before an accumulation window, and after each of its two backwards."""
    engine = tiny.initialize(Case(stage=stage, layers_per_block=LAYERS_PER_BLOCK, step="block"))
    try:
        for step in range(3):  # every block has state
            tiny.optimizer_step(engine, step)
        seen = [engine.memory_ledger()["device"]["buffers"]]
        for micro in range(tiny.ACCUMULATION):
            engine.backward(engine(**tiny.micro_batch(3, micro)).loss)
            seen.append(engine.memory_ledger()["device"]["buffers"])
            engine.step()
        return seen
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", (0, 2))
def test_a_whole_blocks_state_comes_only_after_the_last_backward_of_a_window(stage: int) -> None:
    """Earlier, it would add to the activations of the next micro-batch."""
    ((before, first, last),) = run_on_ranks(1, buffers_in_a_window, stage)
    assert first == before < last
