"""State in files, in whole trainings: no bit changes, runs stop and continue, and nothing stays behind."""

import contextlib
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hift_ds.state import direct_io
from tests.integration.test_resume import check_stops
from tests.support import tiny
from tests.support.device_memory import skip_on_a_device
from tests.support.lazy_streams import LazyStreams
from tests.support.pairwise import others_slow
from tests.support.parity import FINER
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case


def trained(case: Case, lazy: bool) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """In a rank: weights and all blocks' state after the run."""
    with LazyStreams() if lazy else contextlib.nullcontext(), contextlib.ExitStack() as stack:
        engine: Any = tiny.initialize(case)
        stack.callback(engine.destroy)
        for step in range(case.steps):
            tiny.optimizer_step(engine, step)
        engine.settle()
        return tiny.weights(engine), tiny.block_states(engine)


def is_same(case: Case, lazy: bool) -> bool:
    """In a rank: whether a run leaves the same bits as with its state in host memory."""
    weights, states = trained(case, lazy)
    true_weights, true_states = trained(replace(case, in_files=None), False)
    pairs = zip(states, true_states, strict=True)
    return tiny.identical(weights, true_weights) and all(tiny.identical(a, b) for a, b in pairs)


CASES = [
    Case(stage=2, ranks=2, dtype="bf16", in_files="all"),
    Case(stage=3, ranks=2, in_files="moments"),
    Case(stage=1, dtype="bf16", in_files="moments", max_block_numel=FINER, clip=0.005),
    Case(stage=0, in_files="all", max_block_numel=FINER, strategy="random", steps_per_block=2),
    Case(stage=2, dtype="bf16", in_files="moments", step="block", strategy="top2down"),
    Case(stage=2, in_files="all", optimizer="momentum"),
    Case(stage=1, dtype="bf16", in_files="all", moments="8bit", max_block_numel=FINER, clip=0.005),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_files_change_no_bit(case: Case) -> None:
    direct_io.library()
    assert run_on_ranks(case.ranks, is_same, case, False) == [True] * case.ranks


@pytest.mark.parametrize("case", others_slow([CASES[2], CASES[4], CASES[6]], [CASES[2], CASES[6]]), ids=str)
def test_lazy_streams_change_no_training_in_files(case: Case) -> None:
    skip_on_a_device()
    direct_io.library()
    assert run_on_ranks(1, is_same, case, True) == [True]


STOPPED = [
    Case(stage=2, dtype="bf16", in_files="all"),
    Case(stage=3, ranks=2, in_files="moments", cycles=1),
    Case(stage=3, ranks=2, in_files="moments", max_block_numel=FINER),
]


@pytest.mark.parametrize("case", others_slow(STOPPED, STOPPED[:2]), ids=str)
def test_a_stopped_run_with_files_continues_bit_for_bit(case: Case, tmp_path: Path) -> None:
    direct_io.library()
    check_stops(case, tmp_path, (1, case.k + 1)[: case.cycles])


def save_with_a_broken_drive(folder: str) -> tuple[str, bool]:
    """In a rank: the error of saving while the drive of rank 1 fails, and whether saving works afterwards."""
    engine: Any = tiny.initialize(Case(stage=2, ranks=2, dtype="bf16", in_files="all"))
    tiny.optimizer_step(engine, 0)
    failing = mock.patch.object(direct_io.DirectIO, "release", side_effect=OSError(5, "not what was written"))
    with failing if engine.global_rank == 1 else contextlib.nullcontext():
        try:
            engine.save_checkpoint(folder)
            message = ""
        except ValueError as error:
            message = str(error)
    saved = engine.save_checkpoint(folder)
    engine.destroy()
    return message, saved


def test_all_ranks_raise_the_error_of_one_whose_files_fail_before_a_checkpoint(tmp_path: Path) -> None:
    direct_io.library()
    expected = "rank 1 could not finish its last step: [Errno 5] not what was written"
    assert run_on_ranks(2, save_with_a_broken_drive, str(tmp_path)) == [(expected, True)] * 2


def test_nothing_stays_behind_when_a_process_is_killed(tmp_path: Path) -> None:
    code = f"""
import time, torch
from hift_ds.state.allocator import HostMemory
host = HostMemory(folder={str(tmp_path)!r})
host.reserve(2**20)
host.empty(torch.empty(1000)).fill_(1)
print("ready", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        assert not list(tmp_path.iterdir())
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.iterdir())
