"""The ledger against sizes that follow from the model by hand."""

import math
import tempfile
from dataclasses import replace
from typing import Any

import pytest

from hift_ds.config import file_buffer_bytes
from hift_ds.state.direct_io import library
from tests.support import tiny
from tests.support.parity import STAGES, cases
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case


def ledgers(case: Case) -> dict[str, Any]:
    """In a rank: the ledger at the start, after two cycles, and at its peak, with the sizes to hold it against."""
    engine = tiny.initialize(case)
    try:
        start = engine.memory_ledger()
        for step in range(case.steps):
            tiny.optimizer_step(engine, step)
        staging = engine.block_optimizers.staging
        return {
            "start": start,
            "now": engine.memory_ledger(),
            "peak": engine.memory_ledger(peak=True),
            "numel": sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters()),
            "largest": max(block.numel for block in engine.blocks),
            "tensors": sum(1 for _ in engine.module.parameters()),
            "widest": max(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters()),
            "slots": sum(slot.area.nbytes for slot in staging.slots if slot.area is not None) if staging else 0,
            "model_buffers": sum(buffer.untyped_storage().nbytes() for buffer in engine.module.buffers()),
        }
    finally:
        engine.destroy()


def is_split(case: Case) -> bool:
    """Whether the store has only what bf16 weights lack of their masters."""
    return case.dtype == "bf16" and case.place == "cpu" and not case.offload


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(stage=stage, dtype=dtype) for stage in STAGES for dtype in ("fp32", "bf16")],
        [Case(stage=stage, dtype="bf16", step="block") for stage in STAGES],
        [Case(stage=stage, dtype="bf16", place="none") for stage in STAGES],
        [Case(stage=stage, dtype="bf16", offload=True) for stage in (1, 2, 3)],
    ),
    ids=str,
)
def test_one_rank(case: Case) -> None:
    (seen,) = run_on_ranks(1, ledgers, case)
    numel, weight = seen["numel"], 4 if case.dtype == "fp32" else 2
    own = 4 * numel if case.dtype == "bf16" or case.stage else 0  # elsewhere fp32 weights are their own masters
    where, other = ("device", "host") if case.place == "none" else ("host", "device")
    for ledger in (seen["start"], seen["now"]):
        assert ledger["device"]["parameters"] == weight * numel
        if is_split(case):  # 2 bytes and a bit of each element, and room for a multiple of 1,024 of each tensor
            assert 2.125 * numel <= ledger[where]["master_weights"] <= 2.125 * (numel + 1024 * seen["tensors"])
        else:
            assert ledger[where]["master_weights"] == own
        assert ledger[other]["master_weights"] == ledger[other]["optimizer_state"] == 0
        assert not any(ledger["nvme"].values())
    # In host memory, its buffers are there before the first step makes the state.
    assert seen["start"][where]["optimizer_state"] == (8 * numel if where == "host" else 0)
    assert seen["now"][where]["optimizer_state"] == 8 * numel
    if case.stage < 3:
        assert seen["now"]["device"]["gradients"] == 0
        assert seen["now"]["device"]["buffers"] == seen["slots"] + seen["model_buffers"]

    if case.offload:  # one block's gradients and updated weights, as they travel
        for ledger in (seen["start"], seen["now"]):
            assert ledger["host"]["gradients"] == ledger["host"]["buffers"] == weight * seen["largest"]
        assert seen["peak"]["device"]["optimizer_state"] == seen["peak"]["device"]["master_weights"] == 0
        assert weight * seen["largest"] <= seen["peak"]["device"]["gradients"] <= 2 * weight * seen["largest"]

    peak = seen["peak"]["device"]
    assert sum(peak.values()) >= sum(seen["now"]["device"].values())
    if where == "host" and not case.offload:
        # Gradients of the active block and the fp32 ones of what is stepped; never the whole model's state.
        assert 0 < peak["gradients"] <= (weight + 4) * seen["largest"]
        assert peak["master_weights"] + peak["optimizer_state"] <= 12 * seen["largest"]
        if case.dtype == "bf16":  # then the step, with fp32 gradients, is the highest instant
            assert peak["master_weights"] + peak["optimizer_state"] > 0
    if case.step == "block":
        assert peak["optimizer_state"] == 8 * seen["largest"]
        of_master = 2.125 if is_split(case) else 4
        assert peak["master_weights"] >= (of_master * seen["largest"] if own else 0)
        assert peak["master_weights"] <= (of_master * (seen["largest"] + 1024 * seen["tensors"]) if own else 0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_counts_its_own_partition(stage: int) -> None:
    first, second = run_on_ranks(2, ledgers, Case(stage=stage, ranks=2, dtype="bf16"))
    for seen in (first, second):
        share = 8 * seen["numel"] // (2 if stage else 1)
        assert share <= seen["now"]["host"]["optimizer_state"] <= share + 2048  # partitions are padded
        small = sum(p.numel() for p in tiny.model().parameters() if p.numel() <= 1000)  # stay gathered at stage 3
        weights = seen["numel"] + 2 * small if stage == 3 else 2 * seen["numel"]
        assert weights <= seen["now"]["device"]["parameters"] <= weights + 2048


def test_weights_that_wait_on_the_host_are_counted_there() -> None:
    """With 16-bit weights on two ranks: half of them, and nothing on the device but small vectors, which stay whole."""
    first, second = run_on_ranks(2, ledgers, Case(stage=3, ranks=2, dtype="bf16", waiting="cpu"))
    small = sum(p.numel() for p in tiny.model().parameters() if p.numel() <= 1000)
    for seen in (first, second):
        for ledger in (seen["start"], seen["now"], seen["peak"]):
            ours = seen["largest"] if ledger is seen["peak"] else 0  # in a step, the active block's share is on both
            assert ledger["host"]["parameters"] + ours >= seen["numel"]
            assert ledger["host"]["parameters"] <= seen["numel"] + 2048  # partitions are padded
            assert ledger["device"]["parameters"] <= 2 * small + ours + 2048


def in_files(case: Case, folder: str, what: str) -> tuple[dict[str, Any], int]:
    """In a rank: the ledger of a run whose state lives in files, and the elements of its largest block."""
    import hift_ds

    config = tiny.ds_config(replace(case, place="nvme"))
    config["hift"]["offload"] |= {"nvme_path": folder, "nvme": what}
    engine = hift_ds.initialize(model=tiny.model(case.dtype), config=config)[0]
    try:
        for step in range(case.k):
            tiny.optimizer_step(engine, step)
        return engine.memory_ledger(), max(block.numel for block in engine.blocks)
    finally:
        engine.destroy()


@pytest.mark.parametrize("what", ("all", "moments"))
def test_state_in_files_is_counted_there(what: str) -> None:
    numel = sum(p.numel() for p in tiny.model().parameters())
    with tempfile.TemporaryDirectory() as folder:
        ((ledger, largest),) = run_on_ranks(1, in_files, Case(stage=2, dtype="bf16"), folder, what)
    place, other = ("nvme", "host") if what == "all" else ("host", "nvme")
    assert 2.125 * numel <= ledger[place]["master_weights"] < 2.5 * numel and ledger[other]["master_weights"] == 0
    assert ledger["nvme"]["optimizer_state"] == 8 * numel and ledger["host"]["optimizer_state"] == 0
    between = file_buffer_bytes(math.ceil(largest * (10.125 if what == "all" else 8)))
    assert ledger["host"]["buffers"] == (between if library()[0] is not None else 0)
