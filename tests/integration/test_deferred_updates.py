"""Deferred updates (``hift.offload.defer``): what finishes them, what does not defer, and what they fetch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import hift_ds.engine
from hift_ds.config import WHERE_POSSIBLE
from hift_ds.state.transfer import Staging
from tests.support import tiny
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case

CASE = Case(stage=2, dtype="bf16")


@contextmanager
def warnings() -> Iterator[list[str]]:
    """The engine's warnings."""
    found: list[str] = []
    with mock.patch.object(hift_ds.engine.logger, "warning", found.append):
        yield found


def make(defer: bool | str = True, prefetch: Any = True, case: Case = CASE) -> Any:
    config = tiny.ds_config(case)
    config["hift"]["offload"] = {"buffer_size": 65536, "defer": defer, "prefetch": prefetch}
    return hift_ds.initialize(model=tiny.model(case.dtype), config=config)[0]


def trained(engine: Any, steps: int) -> Any:
    for step in range(steps):
        tiny.optimizer_step(engine, step)
    return engine


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """What a script sees that reads the weights now."""
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def after(steps: int) -> dict[str, torch.Tensor]:
    engine = trained(make(defer=False), steps)
    try:
        return weights(engine)
    finally:
        engine.destroy()


FINISHING = {
    "settle": lambda engine: engine.settle(),
    "unfreeze": lambda engine: engine.unfreeze(),
    "state_dict": lambda engine: engine.module.state_dict(),
    "a part's state_dict": lambda engine: engine.module.model.layers[0].state_dict(),
    "destroy": lambda engine: engine.destroy(),
}


def unfinished(steps: int) -> list[str]:
    """In a rank: what does not finish the last step's update."""
    truth = after(steps)
    found = []
    for name, finish in FINISHING.items():
        engine = trained(make(), steps)
        assert not tiny.identical(weights(engine), truth), "nothing was deferred"
        finish(engine)
        found += [] if tiny.identical(weights(engine), truth) else [name]
        engine.destroy()
    return found


def test_what_reads_the_model_as_a_whole_finishes_the_update() -> None:
    assert run_on_ranks(1, unfinished, 3) == [[]]  # the third step trains a layer


def loads_and_parts() -> list[str]:
    found = []
    engine = trained(make(), 3)
    zeros = {name: torch.zeros_like(value) for name, value in engine.module.state_dict().items()}
    tiny.optimizer_step(engine, 3)
    engine.module.load_state_dict(zeros)
    engine.settle()
    found += ["load_state_dict"] if any(value.any() for value in weights(engine).values()) else []
    engine.destroy()
    engine = trained(make(), 1)  # the step trains the embeddings
    ids = tiny.micro_batch(0, 0)["input_ids"]
    with torch.no_grad():
        ours = engine.module.model(input_ids=ids).last_hidden_state
        engine.settle()
        truth = engine.module.model(input_ids=ids).last_hidden_state
    found += [] if torch.equal(ours, truth) else ["a part of the model"]
    engine.destroy()
    return found


def test_loaded_weights_stay_and_a_part_of_the_model_waits() -> None:
    assert run_on_ranks(1, loads_and_parts) == [[]]


def fetched(defer: bool, prefetch: Any) -> list[int]:
    """In a rank: the bytes fetched in each step of the third cycle."""
    engine, fill, found = trained(make(defer, prefetch), 2 * CASE.k), Staging.fill, []

    def count(staging: Staging, sources: list[Any], written: Any) -> Any:
        tensors = [tensor for source in sources for tensor in getattr(source, "pieces", [source])]
        found[-1] += sum(tensor.nbytes for tensor in tensors)
        return fill(staging, sources, written)

    with mock.patch.object(Staging, "fill", count):
        for step in range(CASE.k):
            found.append(0)
            tiny.optimizer_step(engine, step)
    engine.destroy()
    return found


@pytest.mark.parametrize("prefetch", (True, 2**21))
def test_state_is_fetched_once(prefetch: Any) -> None:
    """Chunks of the next block may be fetched in the step before, so only the sum of a cycle is the same."""
    (late,), (at_once,) = (run_on_ranks(1, fetched, defer, prefetch) for defer in (True, False))
    assert abs(sum(late) - sum(at_once)) <= 2 * 65536 * (2 if prefetch is True else 32)
    assert sum(late) < 1.3 * sum(at_once)


def compiled(defer: bool | str) -> tuple[dict[str, torch.Tensor], bool, list[str]]:
    """In a rank: of a model compiled after three steps, the weights, whether updates are deferred, and warnings."""
    with warnings() as found:
        engine = trained(make(defer), 3)
        engine.compile(backend="eager")
        for step in range(3, 8):
            tiny.optimizer_step(engine, step)
    result = weights(engine), engine.block_optimizers.staging.can_defer, found
    engine.destroy()
    return result


def test_a_compiled_model_defers_nothing() -> None:
    for defer in (True, WHERE_POSSIBLE):
        ((ours, is_deferring, said),), ((truth, _, _),) = (run_on_ranks(1, compiled, one) for one in (defer, False))
        assert not is_deferring and tiny.identical(ours, truth)
        assert ["compiled" in line for line in said] == [True] * (defer is True), said


def not_streamed(prefetch: Any) -> list[str]:
    """In a rank: the warnings of a step that is not streamed because of its optimizer."""
    with warnings() as found:
        make(True, prefetch, Case(optimizer="Adafactor", dtype="bf16")).destroy()
    return found


@pytest.mark.parametrize("prefetch", (True, 2**20))
def test_settings_that_the_optimizer_makes_useless_are_named(prefetch: Any) -> None:
    (found,) = run_on_ranks(1, not_streamed, prefetch)
    expected = {"offload.defer=true ", "offload.buffer_size=65536 "}
    expected |= {"offload.prefetch=1048576 "} if prefetch is not True else set()
    assert {next(name for name in expected if name in line) for line in found} == expected and len(found) == len(
        expected
    )
    (of_deferring,) = (line for line in found if "offload.defer" in line)
    assert all(word in of_deferring for word in ("Adafactor", "set defer to auto", "AdamW"))


def after_an_error() -> tuple[int, int, bool]:
    """In a rank: free slots and all slots after an update that failed, and whether training goes on."""
    engine = trained(make(), 3)
    staging = engine.block_optimizers.staging
    step = torch.optim.AdamW.step
    with mock.patch.object(torch.optim.AdamW, "step", side_effect=torch.OutOfMemoryError("a test")):
        with pytest.raises(torch.OutOfMemoryError):
            engine.settle()
    assert torch.optim.AdamW.step is step
    engine.block_optimizers.settle()
    free = len(staging.free)
    tiny.optimizer_step(engine, 3)
    engine.settle()
    engine.destroy()
    return free, len(staging.slots), True


def test_an_update_that_fails_keeps_no_slot() -> None:
    ((free, slots, _),) = run_on_ranks(1, after_an_error)
    assert free == slots
