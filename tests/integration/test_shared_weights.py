"""``hift.offload.weights: cpu`` on two ranks, which share one copy of the weights in host memory."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed

from hift_ds.state.step import BlockState
from hift_ds.weights.node import Node
from hift_ds.weights.turns import Turns
from tests.integration.test_host_weights import cycles_with_a_save, different, make, same, trained
from tests.support import tiny
from tests.support.pairwise import others_slow
from tests.support.poisoned_slots import poisoned
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case

WAITING: dict[str, Any] = {"waiting": "cpu", "ranks": 2}
CASES = [
    Case(stage=stage, dtype=dtype, layers_per_block=m, **WAITING)
    for stage, dtypes in ((0, ("bf16", "fp32")), (1, ("bf16", "fp16", "fp32")), (2, ("bf16", "fp16", "fp32")))
    for dtype in dtypes
    for m in (1, 2)
]
CASES += [
    Case(stage=0, dtype="bf16", tied=True, decay_groups=True, steps_per_block=2, clip=0.1, **WAITING),
    Case(stage=2, dtype="bf16", tied=True, checkpointing=True, steps_per_block=2, clip=0.1, **WAITING),
    Case(stage=0, dtype="bf16", max_block_numel=1500, steps_per_block=2, **WAITING),
    Case(stage=1, dtype="bf16", max_block_numel=1500, step="block", **WAITING),
    Case(stage=0, optimizer="Adafactor", tied=True, **WAITING),
    Case(stage=0, dtype="bf16", optimizer="Adafactor", **WAITING),
]
TABLE = [CASES[0], CASES[3], CASES[5], CASES[10], *CASES[-6:]]


@pytest.mark.parametrize("case", others_slow(CASES, TABLE), ids=str)
def test_the_place_of_weights_does_not_matter(case: Case) -> None:
    assert run_on_ranks(2, different, case) == [[], []]


@pytest.mark.parametrize("offload", ({"master": "fp32"}, {"moments": "8bit"}, {"prefetch": 2**20}), ids=str)
def test_with_each_format_of_state(offload: dict[str, Any]) -> None:
    for stage in (0, 2):
        case = Case(stage=stage, dtype="bf16", layers_per_block=2, decay_groups=True, **WAITING)
        assert run_on_ranks(2, different, case, **offload) == [[], []]


@pytest.mark.parametrize("defer", (False, True))
@pytest.mark.parametrize("case", (CASES[0], CASES[2], CASES[10]), ids=str)
def test_nothing_is_read_or_overwritten_too_early(case: Case, defer: bool) -> None:
    assert run_on_ranks(2, different, case, lazy=True, defer=defer) == [[], []]


# ---- what happens without each part of the order between ranks ----------------------------------------------------


@contextlib.contextmanager
def late(rank: int, owner: Any, name: str, seconds: float = 0.02) -> Iterator[None]:
    """One rank sleeps before each call of a method."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if distributed.get_rank() == rank:
            time.sleep(seconds)
        return method(*args, **kwargs)

    with mock.patch.object(owner, name, call):
        yield


def _reduced_before_the_events(node: Node, events: Any) -> Any:
    node.meet_on_device()
    with node._lane.after(*events):
        return node._lane.mark()


def _nothing(*_: Any) -> None:
    return None


# Its moments depend on the weights.
DECAYING = Case(stage=0, optimizer="Adam", decay_groups=True, **WAITING)
# name: who is late, in front of what, what is removed, of which case, with lazy streams
MISSING: dict[str, tuple[int, tuple[Any, str], tuple[Any, str, Callable[..., Any]], Case, bool]] = {
    "all parts are written": (0, (BlockState, "_store_results"), (Node, "after_all", _nothing), CASES[10], False),
    "the first rank has written": (0, (BlockState, "_store_results"), (Node, "after_all", _nothing), CASES[0], False),
    "events of the writer": (0, (Turns, "prepare"), (Node, "after_all", _reduced_before_the_events), CASES[10], True),
    "masters are fetched": (1, (BlockState, "_fetch"), (Node, "meet_on_device", _nothing), DECAYING, False),
    "upper halves are fetched": (1, (BlockState, "_fetch"), (Node, "meet_on_device", _nothing), CASES[0], False),
}


def without(name: str, is_removed: bool) -> bool:
    """In a rank: whether training beside a late rank goes wrong. State is fetched in the step alone."""
    rank, slow, removed, case, lazy = MISSING[name]
    truth = trained(replace(case, waiting="device"), prefetch=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(late(rank, *slow))
        if is_removed:
            stack.enter_context(mock.patch.object(*removed))
        return not same(trained(case, lazy, prefetch=False), truth)


@pytest.mark.parametrize("name", MISSING)
def test_a_late_rank_is_waited_for(name: str) -> None:
    assert run_on_ranks(2, without, name, False) == [False, False]
    assert any(run_on_ranks(2, without, name, True))


# ---- between steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[10]], ids=str)
def test_a_run_continues_from_a_checkpoint(case: Case, tmp_path: Path) -> None:
    found = run_on_ranks(2, cycles_with_a_save, case, str(tmp_path / "cpu"))
    assert all(same(continued, ours) for ours, continued, _ in found)
    on_device = replace(case, waiting="device")
    of_truth = run_on_ranks(2, cycles_with_a_save, on_device, str(tmp_path / "device"))
    for (ours, _, loaded), (truth, _, loss) in zip(found, of_truth, strict=True):
        assert same(ours, truth) and loaded == loss


def changed_between_steps(case: Case) -> Any:
    """In a rank: what a training becomes whose weights, masters and skipped steps are handled by a script."""
    from deepspeed.utils import safe_set_full_fp32_param

    rank = distributed.get_rank()
    with poisoned():
        engine = make(case)
        seen: list[Any] = []
        for step in range(3):
            seen += tiny.optimizer_step(engine, step)
        state = {name: value.clone() for name, value in engine.module.state_dict().items()}
        engine.module.load_state_dict({name: value * 0.5 for name, value in state.items()})
        seen += tiny.optimizer_step(engine, 3)
        if case.stage:
            named = dict(engine.module.named_parameters())
            name = engine.blocks[1].parameter_names[0]
            value = torch.linspace(-1, 1, named[name].numel()).view(named[name].shape)
            safe_set_full_fp32_param(named[name], value)
            seen += tiny.optimizer_step(engine, 4)
        before = tiny.weights(engine)
        loss = engine(**tiny.micro_batch(5, 0, rank)).loss
        engine.backward(loss * (torch.nan if rank else 1.0))
        engine.step()
        engine.backward(engine(**tiny.micro_batch(5, 1, rank)).loss)
        engine.step()
        assert not engine.was_step_applied() and tiny.identical(tiny.weights(engine), before)
        ids = tiny.micro_batch(0, 0)["input_ids"]
        if rank:  # beside a rank that goes on
            engine.eval()
            with torch.no_grad():
                seen.append(engine.module(ids).logits)
                seen.append(engine.module.generate(ids, max_new_tokens=5, do_sample=False))
            engine.train()
        for step in range(6, 8):
            seen += tiny.optimizer_step(engine, step)
        weights = tiny.weights(engine)
        engine.destroy()
        left = dict(engine.module.named_parameters())
        assert tiny.identical(tiny.copies(left), weights)
        distributed.barrier()
        for parameter in left.values():
            parameter.data.fill_(rank)
        distributed.barrier()
        assert all((parameter == rank).all() for parameter in left.values())
        return seen, weights


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[6], CASES[10]], ids=str)
def test_what_a_script_does_between_steps(case: Case) -> None:
    ours = run_on_ranks(2, changed_between_steps, case)
    truth = run_on_ranks(2, changed_between_steps, replace(case, waiting="device"))
    for (seen, weights), (expected, wanted) in zip(ours, truth, strict=True):
        assert tiny.identical(weights, wanted)
        assert tiny.identical(tiny.tensors(seen), tiny.tensors(expected))
        assert [one for one in seen if isinstance(one, float)] == [one for one in expected if isinstance(one, float)]
