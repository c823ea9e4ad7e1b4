"""What each step leaves alone, what each cycle does, and what start-up must not build."""

import gc
from collections import Counter
from typing import Any

import pytest
import torch

from tests.support import tiny
from tests.support.pairwise import each_value, others_slow, pairwise
from tests.support.parity import STAGES, cases, expected_order
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case


def observe(case: Case) -> dict[str, Any]:
    """In a rank: trains and looks at every block after every step, and at the engine's mind within every window."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = tiny.initialize(case)
    named = dict(engine.module.named_parameters())
    owner = {name: i for i, block in enumerate(engine.blocks) for name in block.parameter_names}
    seen: dict[str, Any] = {"windows": [], "weights": [], "states": [], "unmoved": [], "unseen": [], "gradients": []}
    stepped: set[str] = set()
    try:
        for step in range(case.steps):
            active = engine.active_block
            weights, states = tiny.weights(engine), tiny.block_states(engine)

            window = []
            for micro in range(tiny.ACCUMULATION):
                window.append((engine.active_block, engine.cycle, engine.get_lr()[0]))
                trainable = {owner[name] for name, p in named.items() if p.requires_grad}
                assert trainable == {active}, f"step {step} trains blocks {trainable} instead of {active}"
                loss = engine(**tiny.micro_batch(step, micro, torch.distributed.get_rank())).loss
                engine.backward(loss)
                window.append((engine.active_block, engine.cycle, engine.get_lr()[0]))
                seen["gradients"].append({owner[n] for n, p in named.items() if p.grad is not None} - {active})
                engine.step()
            seen["windows"].append(window)

            after, states_after = tiny.weights(engine), tiny.block_states(engine)
            changed = {name for name in weights if not torch.equal(weights[name], after[name])}
            seen["weights"].append({owner[name] for name in changed})
            seen["unmoved"].append(set(engine.blocks[active].parameter_names) - changed)
            pairs = zip(states, states_after, strict=True)
            seen["states"].append({i for i, (a, b) in enumerate(pairs) if not tiny.identical(a, b)})
            if case.stage:
                stepped |= set(engine.blocks[active].parameter_names)
                moments = {name: safe_get_full_optimizer_state(named[name], "exp_avg") for name in sorted(stepped)}
                seen["unseen"].append({name for name, m in moments.items() if m is None or not m.any()})
        seen["end"] = engine.cycle
    finally:
        engine.destroy()
    return seen


FACTORS = {
    "stage": STAGES,
    "ranks": (1, 2),
    "dtype": ("fp32", "bf16"),
    "offload": (False, True),
    "strategy": ("bottom2up", "top2down", "random"),
    "layers_per_block": (1, 2, 3, 4),
    "steps_per_block": (1, 2),
    "scheduler": (None, "torch"),
    "tied": (False, True),
}


TABLE = pairwise(FACTORS, lambda row: row["stage"] > 0 or not row["offload"])
MORE = [Case(stage=3, ranks=2), Case(stage=2, tied=True, scheduler="WarmupLR")]


@pytest.mark.parametrize(
    "case",
    others_slow(cases([Case(**row) for row in TABLE], MORE), [*(Case(**row) for row in each_value(TABLE)), *MORE]),
    ids=str,
)
def test_a_step_moves_its_block_and_nothing_else(case: Case) -> None:
    order, rates = expected_order(case), tiny.scheduled_rates(case)
    for rank, seen in enumerate(run_on_ranks(case.ranks, observe, case)):
        for step in range(case.steps):
            block, cycle = order[step // case.steps_per_block % case.k], step // (case.k * case.steps_per_block)
            rate = rates[cycle] if rates else tiny.LEARNING_RATE
            what = f"rank {rank}, step {step}"
            assert len(set(seen["windows"][step])) == 1, f"{what}: the engine changed its mind within a window"
            assert seen["windows"][step][0] == (block, cycle, pytest.approx(rate, rel=1e-12)), what
            assert seen["weights"][step] == {block}, f"{what}: weights of blocks {seen['weights'][step]} changed"
            assert seen["states"][step] == {block}, f"{what}: state of blocks {seen['states'][step]} changed"
            if case.dtype == "fp32":
                assert not seen["unmoved"][step], f"{what}: {seen['unmoved'][step]} did not move"
        assert not any(seen["unseen"]), f"rank {rank}: safe_get_full_optimizer_state does not show {seen['unseen']}"
        assert not any(seen["gradients"]), f"rank {rank}: inactive blocks got gradients"
        assert seen["end"] == case.cycles

        updates = Counter(window[0][:2] for window in seen["windows"])
        assert updates == {(b, c): case.steps_per_block for b in range(case.k) for c in range(case.cycles)}


def storages(roots: list[Any]) -> dict[int, int]:
    """Bytes of every tensor storage that Python can reach, by address, without those of the roots."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.layout == torch.strided and tensor.device.type != "meta":
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    for root in roots:
        found.pop(root.untyped_storage().data_ptr(), None)
    found.pop(0, None)
    return found


def start_up(case: Case, layers: int) -> tuple[int, int, int]:
    """In a rank: bytes that a deep model's engine holds on the device beside the weights after set-up, its parameters
    in the largest block and in all."""
    import hift_ds

    before = storages([])
    config = tiny.ds_config(case)
    llama = tiny.model(case.dtype, layers=layers)
    total = sum(p.numel() for p in llama.parameters())
    engine = hift_ds.initialize(model=llama, config=config)[0]
    try:
        weights = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in llama.parameters()]
        after = storages([*weights, *llama.parameters(), *llama.buffers()])
        extra = sum(size for address, size in after.items() if address not in before)
        host, staging = engine.block_optimizers.host, engine.block_optimizers.staging
        extra -= host.nbytes + sum(slot.area.nbytes for slot in staging.slots)
        largest = max(block.numel for block in engine.blocks)
        engine(**tiny.micro_batch(0, 0))  # the engine works, so what it holds is all that it needs
        return extra, largest, total
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    "case",
    others_slow(
        [Case(stage=stage, dtype=dtype) for dtype in ("fp32", "bf16") for stage in STAGES],
        [Case(stage=s, dtype=d) for s, d in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"))],
    ),
    ids=str,
)
def test_start_up_builds_no_gradients_or_optimizer_state_of_the_whole_model(case: Case) -> None:
    ((extra, largest, total),) = run_on_ranks(1, start_up, case, 24)
    allowance = (4 + 8 + 4 + 4) * largest + 2**16  # gradient, two moments, a bucket, a staging buffer; small things
    full = (4 + 8) * total
    assert 2 * allowance < full, "the model is too small to tell a block from the whole"
    assert extra <= allowance, f"{extra / 2**10:.0f} KiB beside the weights, {largest=}, {total=}"


def state_at_the_start(case: Case) -> list[set[str]]:
    """In a rank: the names of each block's state before any step."""
    engine = tiny.initialize(case)
    try:
        owners = engine.block_optimizers.optimizers
        return [{name for state in owner.optimizer.state.values() for name in state} for owner in owners]
    finally:
        engine.destroy()


@pytest.mark.parametrize("case", [Case(stage=stage, optimizer="Adagrad") for stage in STAGES], ids=str)
def test_state_that_an_optimizer_makes_at_construction_is_there(case: Case) -> None:
    """torch before 2.13 does not make Adagrad's sums in a step, where they are missing."""
    (states,) = run_on_ranks(1, state_at_the_start, case)
    assert states and all("sum" in names for names in states)
