"""Runs of the engine held against the plain loop of Algorithm 1.

Weight decay, accumulation over two micro-batches and clipping that fires are on in all of them.
"""

import random
from dataclasses import replace

import pytest

from tests.support import tiny
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case, Outcome

STAGES = (0, 1, 2, 3)
STRATEGIES = ("bottom2up", "top2down", "random")
FINER = 1600  # elements: cuts the embeddings and the head by rows, and the layers between modules and tensors


def train(case: Case, stock: bool = False) -> tuple[Outcome, list[list[str]], int]:
    """In a rank: the whole run of a case; what it left, the blocks' parameter names, the completed cycles."""
    start = tiny.copies(dict(tiny.model(case.dtype, case.tied).named_parameters()))
    engine = tiny.initialize(case, stock)
    try:
        active, rates, norms = [], [], []
        for step in range(case.steps):
            active.append(0 if stock else engine.active_block)
            rates.append(engine.get_lr()[0])
            tiny.optimizer_step(engine, step)
            norms.append(engine.get_global_grad_norm())
        blocks = [] if stock else [list(b.parameter_names) for b in engine.blocks]
        cycles = 0 if stock else engine.cycle
        masters = {} if stock else tiny.masters(engine)
        return Outcome(start, tiny.weights(engine), active, rates, norms, masters), blocks, cycles
    finally:
        engine.destroy()


def expected_order(case: Case) -> tuple[int, ...]:
    order = list(range(case.k))
    if case.strategy == "top2down":
        order.reverse()
    elif case.strategy == "random":
        random.Random(3).shuffle(order)  # the seed in `tiny.ds_config`
    return tuple(order)


def truth_for(case: Case) -> Outcome:
    """The plain loop's run, shared by all cases that differ only in how DeepSpeed distributes the work."""
    stage = case.stage if case.dtype != "fp32" else 0
    offload = case.offload and case.optimizer == "Lion"
    same = replace(case, stage=stage, strategy="bottom2up", offload=offload, place="cpu", step="auto", waiting="device")
    return tiny.reference(same, expected_order(case))


def check_update(case: Case, ours: Outcome) -> None:
    """Holds a run's weights, and in 16 bit its masters, against the plain loop, within the bounds of the project."""
    truth = truth_for(case)
    assert min(truth.norms) > case.clip, "clipping has to fire in every step"
    if case.dtype == "fp32":
        bound = 1e-4
        if case.ranks > 1:
            bound = 5e-4
        if case.offload or (case.stage == 3 and case.ranks > 1):
            bound = 2e-3
        assert tiny.update_error(ours.end, truth) <= bound
    else:
        bound = 1e-3 if case.offload else 1e-7
        assert tiny.largest_difference(ours.end, truth.end) <= bound
        flat = {name: truth.masters[name].reshape(-1) for name in ours.masters}
        assert tiny.largest_difference(ours.masters, flat) <= bound


def check(case: Case) -> Outcome:
    """Trains on all ranks and holds weights, order, rates and norms against the plain loop."""
    results = run_on_ranks(case.ranks, train, case)
    ours, blocks, cycles = results[0]
    for other, _, _ in results[1:]:
        assert tiny.largest_difference(ours.end, other.end) == 0, "the ranks hold different weights"

    truth = truth_for(case)
    assert blocks == case.blocks
    assert ours.active == truth.active
    assert ours.rates == pytest.approx(truth.rates, rel=1e-12)
    assert cycles == case.cycles
    assert ours.norms == pytest.approx(truth.norms, rel=1e-4 if case.dtype == "fp32" else 1e-3)
    check_update(case, ours)
    return ours


def cases(*selections: list[Case]) -> list[Case]:
    return list(dict.fromkeys(case for selection in selections for case in selection))
