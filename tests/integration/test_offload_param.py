"""Weights that wait in host memory at ZeRO 3 train as weights on the device do, bit for bit."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hift_ds.blocks.layers import largest_hidden_layer
from hift_ds.checkpoint.files import FileEngine
from tests.integration.test_device_memory import SMALL, wide
from tests.support import tiny
from tests.support.device_memory import DeviceMemory, skip_on_a_device
from tests.support.lazy_streams import LazyStreams
from tests.support.pairwise import Row, others_slow, pairwise
from tests.support.parity import FINER, STRATEGIES
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case
from tests.support.waits import Waits


def evaluate(engine: Any) -> None:
    """Read the weights as a script does between two steps: forward passes, and the weights themselves."""
    import deepspeed

    engine.eval()
    with torch.no_grad():
        for micro in range(2):
            assert engine(**tiny.micro_batch(0, micro)).loss.isfinite()
    engine.train()
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters[:3]):
        assert all(parameter.isfinite().all() for parameter in parameters[:3])


def run(case: Case, lazy: bool = False, evaluates: bool = False) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """In a rank: losses, weights, and the state of all blocks after the run."""
    with contextlib.ExitStack() as stack:
        if lazy:
            stack.enter_context(LazyStreams())
        engine = tiny.initialize(case)
        stack.callback(engine.destroy)
        losses = []
        for step in range(case.steps):
            losses += tiny.optimizer_step(engine, step)
            if evaluates and step % 2:
                evaluate(engine)
        return losses, tiny.weights(engine), tiny.block_states(engine)


def differences(case: Case, **options: bool) -> list[str]:
    """In a rank: what differs between weights on the host, in a run with these options, and on the device."""
    losses, weights, states = run(case, **options)
    true_losses, true_weights, true_states = run(replace(case, waiting="device"))
    found = [] if losses == true_losses else [f"losses {losses} instead of {true_losses}"]
    found += [name for name in true_weights if not torch.equal(weights[name], true_weights[name])]
    pairs = zip(states, true_states, strict=True)
    return found + [f"state of block {n}" for n, pair in enumerate(pairs) if not tiny.identical(*pair)]


FACTORS = {
    "ranks": (1, 2),
    "dtype": ("fp32", "bf16", "fp16"),
    "strategy": STRATEGIES,
    "layers_per_block": (1, 2, 6),
    "max_block_numel": (None, FINER),
    "step": ("streamed", "block"),
    "place": ("cpu", "none"),
    "offload": (False, True),
    "checkpointing": (False, True),
    "tied": (False, True),
    "decay_groups": (False, True),
    "optimizer": ("AdamW", "momentum"),
}


def possible(row: Row) -> bool:
    if row.get("offload"):  # the step on the host has no other place for state
        return row["optimizer"] == "AdamW" and row["place"] == "cpu" and row["step"] == "block"
    return row["place"] == "cpu" or row["step"] == "block"


TABLE = [Case(stage=3, waiting="cpu", cycles=1, **row) for row in pairwise(FACTORS, possible)]
SAMPLE = [
    Case(stage=3, waiting="cpu", ranks=2, dtype="bf16", strategy="top2down"),
    Case(stage=3, waiting="cpu", layers_per_block=2, strategy="random", tied=True, checkpointing=True),
    Case(stage=3, waiting="cpu", ranks=2, dtype="bf16", offload=True, cycles=1),
]
FINER_ON_HOST = Case(stage=3, waiting="cpu", ranks=2, dtype="bf16", max_block_numel=FINER, offload=True, cycles=1)


@pytest.mark.parametrize("case", others_slow([*SAMPLE, FINER_ON_HOST, *TABLE], SAMPLE), ids=str)
def test_the_place_of_weights_does_not_matter(case: Case) -> None:
    for found in run_on_ranks(case.ranks, differences, case, evaluates=case in SAMPLE):
        assert found == []


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=3, waiting="cpu", dtype="bf16", step="streamed"),
        Case(stage=3, dtype="bf16", step="streamed", ranks=2, cycles=1),
        pytest.param(
            Case(stage=3, waiting="cpu", dtype="bf16", step="block", ranks=2, checkpointing=True),
            marks=pytest.mark.slow,
        ),
        pytest.param(Case(stage=3, waiting="cpu", offload=True, ranks=2), marks=pytest.mark.slow),
        pytest.param(Case(stage=3, waiting="cpu", tied=True, strategy="random"), marks=pytest.mark.slow),
        pytest.param(Case(stage=3, waiting="cpu", max_block_numel=FINER, ranks=2), marks=pytest.mark.slow),
        pytest.param(Case(stage=3, dtype="bf16"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_copies_of_weights_wait_for_what_they_must(case: Case) -> None:
    skip_on_a_device()
    for found in run_on_ranks(case.ranks, differences, case, lazy=True, evaluates=True):
        assert found == []


def still_gathered(case: Case, mode: str) -> tuple[list[int], list[int]]:
    """In a rank: the elements that are gathered after each backward pass, and after forward passes without gradients.

    Vectors that always stay gathered are not counted.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    engine = tiny.initialize(case)
    engine.train(mode == "train")

    def gathered() -> int:
        parameters = [p for p in engine.module.parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
        return sum(p.ds_numel for p in parameters if not p.ds_persist)

    trained, evaluated = [], []
    for step in range(case.steps):
        for micro in range(tiny.ACCUMULATION):
            engine.backward(engine(**tiny.micro_batch(step, micro)).loss)
            trained.append(gathered())
            engine.step()
        with torch.no_grad():
            engine(**tiny.micro_batch(step, 0))
        evaluated.append(gathered())
    engine.destroy()
    return trained, evaluated


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_weight_stays_gathered_whatever_the_mode(mode: str) -> None:
    for trained, evaluated in run_on_ranks(1, still_gathered, Case(stage=3, dtype="bf16"), mode):
        assert not any(trained) and not any(evaluated), (trained, evaluated)


class Moved(AssertionError):
    """The whole model is moved to the device."""


def places(case: Case) -> dict[str, set[str]]:
    """In a rank: where buffers and the rank's partitions of weights are, of a model that was loaded to the host."""
    llama = tiny.model(case.dtype)
    llama.model.norm.requires_grad_(False)
    with Waits() as waits, contextlib.ExitStack() as stack:
        waits.declare([*llama.parameters(), *llama.buffers()], "host")
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", side_effect=Moved))
        engine = tiny.initialize(case, llama=llama)
        stack.callback(engine.destroy)
        named = {"weights": [p.ds_tensor for p in llama.parameters()], "buffers": llama.buffers()}
        return {name: {waits.place(tensor) for tensor in tensors} for name, tensors in named.items()}


@pytest.mark.parametrize(("weights", "place"), [("device", "device"), ("cpu", "pinned")])
def test_zero_3_moves_no_whole_model_to_the_device(weights: str, place: str) -> None:
    for found in run_on_ranks(2, places, Case(stage=3, ranks=2, dtype="bf16", waiting=weights)):
        assert found == {"weights": {place}, "buffers": {"device"}}


@dataclass
class Gathers:
    """Bytes of gathered weights on the device, and of everything on it."""

    most: int  # gathered at a time
    bound: int
    kept: int  # of the vectors that stay gathered, and of what the engine keeps
    rest: dict[str, int]  # on the device after each stage of the run


def gathers(case: Case, folder: str) -> Gathers:
    """In a rank: a run under the harness from start-up to export."""
    from deepspeed.runtime.zero.partition_parameters import Init

    from hift_ds.launch.model.tokenizer import byte_tokenizer
    from hift_ds.launch.runtime.export import export_model
    from hift_ds.zero.gathering import Gathering

    llama = wide(case.dtype)
    memory = DeviceMemory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory)
        stack.enter_context(memory.placed_on_host(FileEngine, "load"))
        stack.enter_context(memory.placed_on_host(Init, "_partition_param"))
        stack.enter_context(memory.labels("gathered", Gathering, "start"))
        memory.declare(llama.parameters(), "host")
        engine = tiny.initialize(case, llama=llama)
        stack.callback(engine.destroy)
        rest = {"start": memory.live["total"]}
        for step in range(case.steps):
            tiny.optimizer_step(engine, step)
            if step % 2:
                evaluate(engine)
        engine.empty_partition_cache()
        rest["training"] = memory.live["total"]
        engine.save_checkpoint(folder)
        engine.load_checkpoint(folder)
        rest["checkpoint"] = memory.live["total"]
        export_model(engine, byte_tokenizer(), Path(folder) / "model", None)
        rest["export"] = memory.live["total"]
        size = torch.finfo(tiny.DTYPES[case.dtype]).bits // 8
        numels = [p.ds_numel for p in llama.parameters()]
        small = size * sum(n for n in numels if n <= 1000)
        bound = size * (2 * largest_hidden_layer(llama) + max(numels)) + small
        ledger = engine.memory_ledger()["device"]
        return Gathers(memory.peak["gathered"], bound, small + sum(ledger.values()), rest)


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=3, waiting="cpu", ranks=2, dtype="bf16", step="streamed"),
        pytest.param(Case(stage=3, waiting="cpu", step="block"), marks=pytest.mark.slow),
        pytest.param(Case(stage=3, waiting="cpu", ranks=2, checkpointing=True), marks=pytest.mark.slow),
        pytest.param(Case(stage=3, waiting="cpu", ranks=2, offload=True, dtype="bf16"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_layers_and_a_parameter_are_gathered_at_most(case: Case, tmp_path: Path) -> None:
    for seen in run_on_ranks(case.ranks, gathers, case, str(tmp_path)):
        print(seen)
        assert seen.most <= seen.bound
        assert all(nbytes <= seen.kept + SMALL for nbytes in seen.rest.values()), seen
