"""The program that the engine's stepper issues, recorded under lazy streams, on a simulated H200.

The stepper runs on a small block with slots that are as many times smaller as the block; the bytes of what it issues
are then multiplied. The passes of the model are those that the planner simulates.
"""

import functools
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

import hift_ds.state.step
from hift_ds.planner.plan import Planner
from hift_ds.planner.request import Request
from hift_ds.planner.step_time import Figures, StepTimes
from hift_ds.planner.timeline import CARDS, HOST, HOST_SECONDS, MAIN, TO_DEVICE, TO_HOST, Operation, simulate
from hift_ds.state.allocator import HostMemory
from hift_ds.state.step import BlockState
from hift_ds.state.transfer import Staging
from tests.hift_ds.state.test_transfer import CPU, Owner
from tests.support.lazy_streams import LazyStreams

SMALLER = 64
SLOT = 2**26 // SMALLER
LAYER = 202_383_360 // SMALLER  # elements of a layer of LLaMA-7B, which ZeRO holds in one tensor
H200 = CARDS["h200"]
RUNS = {
    "512 tokens": Request("llama-7b", master="fp32"),
    "8,192 tokens with checkpointing": Request(
        "llama-7b", seq_len=8192, zero_stage=0, activation_checkpointing=True, master="fp32"
    ),
}  # fmt: skip


@functools.cache
def planned(run: str) -> tuple[dict[str, list[Operation]], Figures]:
    """The passes of a step on the middle block, and what the planner predicts for it."""
    planner = Planner(RUNS[run])
    middle = len(planner.build(planner.request).blocks) // 2
    return planner.trace(planner.request, middle), StepTimes(planner, "h200").figures(planner.request, middle)


class Recorded(NamedTuple):
    program: list[Operation]
    steps: list[int]  # where each begins


def recorded(run: str, steps: int = 4, defer: bool = True) -> Recorded:
    passes, _ = planned(run)
    generator = torch.Generator().manual_seed(0)
    with LazyStreams(record=True) as machine:
        host, staging = HostMemory(), Staging(CPU, SLOT, None, 2, defer)
        states, owners = [], []
        for _ in range(2):
            owners.append(Owner([LAYER], True, generator))
            owners[-1].optimizer = torch.optim.AdamW(owners[-1].optimizer.param_groups[0]["params"], fused=True)
            states.append(BlockState(owners[-1], host, staging, bytes_per_element=12))
            states[-1].step()  # makes the state
            states[-1].settle()
        machine.program.clear()
        for stream in machine.streams:
            stream.last = set()
        begins, scaled = [], 0

        def scale() -> None:
            nonlocal scaled
            for index in range(scaled, len(machine.program)):
                machine.program[index] = (one := machine.program[index])._replace(nbytes=SMALLER * one.nbytes)
            scaled = len(machine.program)

        def model(operations: list[Operation]) -> None:
            nonlocal scaled
            for operation in operations:
                machine.record(operation)
            scaled = len(machine.program)

        for step in range(steps):
            begins.append(len(machine.program))
            half = len(passes["forward"]) // 2
            model(passes["forward"][:4])
            staging.start_update()  # the first layer runs
            scale()
            model(passes["forward"][4:half])
            staging.finish_update()
            model(passes["forward"][half:] + passes["backward"])
            machine.record(Operation(MAIN, TO_HOST, nbytes=8))  # whether to skip
            machine.record(Operation(HOST, after=(len(machine.program) - 1,)))
            state, following = states[step % 2], states[(step + 1) % 2]
            state.update(functools.partial(state.step, following), late=True)
            scale()
        for state in states:
            state.settle()
        return Recorded(machine.program[:scaled], begins)


def seconds(one: Recorded) -> float:
    """Of the last step but one, in which the host and the device work as in all later ones."""
    issued = simulate(one.program, H200).issued
    return issued[one.steps[-1]] - issued[one.steps[-2]]


def limits(run: str) -> dict[str, float]:
    passes, figures = planned(run)
    host = HOST_SECONDS * sum(map(len, passes.values()))
    return {"kernels": figures.kernels, "bus": figures.bus, "host": host}


def test_a_short_step_takes_little_longer_than_the_host_needs_for_the_model() -> None:
    assert seconds(recorded("512 tokens")) <= 1.15 * max(limits("512 tokens").values())


def test_a_long_step_takes_as_long_as_its_kernels() -> None:
    run = "8,192 tokens with checkpointing"
    assert seconds(recorded(run)) <= 1.05 * limits(run)["kernels"]


@pytest.mark.parametrize("run", RUNS)
def test_the_planner_predicts_the_program_of_the_stepper(run: str) -> None:
    """Copies, bytes and seconds."""
    one, (_, figures) = recorded(run), planned(run)
    step = one.program[one.steps[-2] : one.steps[-1]]
    assert seconds(one) == pytest.approx(figures.seconds, rel=0.03)
    for kind in (TO_DEVICE, TO_HOST):
        copies = [one.seconds(H200) for one in step if one.kind == kind and one.stream != MAIN]
        assert sum(copies) == pytest.approx(figures.bus, rel=0.01) and len(copies) == 37, kind
    assert sum(operation.stream == HOST for operation in step) == 1
    streams = {operation.stream for operation in step}
    assert len(streams) == 5 and {HOST, MAIN} < streams


def test_it_shows_if_the_update_is_not_deferred() -> None:
    run = "8,192 tokens with checkpointing"
    assert seconds(recorded(run, defer=False)) > 1.05 * limits(run)["kernels"]


def test_it_shows_if_the_host_waits_for_each_chunk() -> None:
    def wait(event: Any) -> None:
        event.synchronize()

    with mock.patch.object(hift_ds.state.step, "wait", wait):
        assert seconds(recorded("512 tokens")) > 1.5 * max(limits("512 tokens").values())
