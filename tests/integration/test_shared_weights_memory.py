"""Memory of two ranks with ``hift.offload.weights: cpu``: one copy in the host memory of the machine, and no rest."""

import gc
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from tests.integration.test_device_memory import SMALL, wide
from tests.integration.test_host_weights_memory import holds_two_layers_and_the_active_block, peaks
from tests.integration.test_waits import MOST, steady_steps
from tests.support import tiny
from tests.support.pairwise import others_slow
from tests.support.ranks import RankError, RankPool, run_on_ranks
from tests.support.tiny import Case

WAITING: dict[str, Any] = {"waiting": "cpu", "ranks": 2}
CASES = [Case(stage=stage, dtype=dtype, **WAITING) for stage in (0, 1, 2) for dtype in ("bf16", "fp32")]


def of_mappings() -> dict[str, int]:
    """Bytes of this process's mappings of shared weights, by the keys of ``/proc/PID/smaps``."""
    found: dict[str, int] = {}
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = "/memfd:hift-weights (deleted)" in line
        elif is_ours and line.endswith(" kB"):
            name, size, _ = line.split()
            found[name[:-1]] = found.get(name[:-1], 0) + int(size) * 1024
    return found


def shared_and_private(case: Case) -> tuple[int, dict[str, int], dict[str, int], Any]:
    """In a rank: bytes of the model, of the mappings, and of the ledger; with an engine that was stepped."""
    gc.collect()
    before = of_mappings()  # of engines that Python does not free
    llama = wide(case.dtype)
    nbytes = sum(p.nbytes for p in llama.parameters())
    if distributed.get_rank():  # what the others have loaded does not matter
        for parameter in llama.parameters():
            parameter.data = torch.empty_like(parameter)
    engine = tiny.initialize(case, llama=llama)
    for step in range(len(engine.blocks)):
        tiny.optimizer_step(engine, step)
    distributed.barrier()
    mapped = {name: size - before.get(name, 0) for name, size in of_mappings().items()}
    ledger, weights = engine.memory_ledger(), tiny.weights(engine)
    distributed.barrier()
    engine.destroy()
    return nbytes, mapped, ledger, weights


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_a_machine_has_one_copy(case: Case) -> None:
    ranks = run_on_ranks(2, shared_and_private, case)
    nbytes = ranks[0][0]
    for _, mapped, _, _ in ranks:
        assert mapped["Rss"] == mapped["Shared_Clean"] + mapped["Shared_Dirty"] >= nbytes
    assert nbytes <= sum(mapped["Pss"] for _, mapped, _, _ in ranks) < 1.01 * nbytes + 2 * SMALL
    counted = [ledger["host"]["parameters"] for _, _, ledger, _ in ranks]
    assert nbytes <= counted[0] < 1.01 * nbytes + SMALL and counted[1] == 0
    assert tiny.identical(ranks[0][3], ranks[1][3])


@pytest.mark.parametrize("case", others_slow(CASES, [CASES[4]]), ids=str)
def test_each_device_holds_two_layers_and_the_active_block(case: Case, tmp_path: Path) -> None:
    for seen in run_on_ranks(2, peaks, case, str(tmp_path)):
        holds_two_layers_and_the_active_block(case, seen)


def killed() -> None:
    """In a rank: the second one is killed in the middle of a training."""
    engine = tiny.initialize(CASES[4])
    tiny.optimizer_step(engine, 0)
    if distributed.get_rank():
        os.kill(os.getpid(), signal.SIGKILL)
    tiny.optimizer_step(engine, 1)


def test_nothing_is_left_of_killed_ranks() -> None:
    names, pool = set(os.listdir("/dev/shm")), RankPool(2)
    with pytest.raises(RankError):
        pool.run(killed)
    assert not [name for name in set(os.listdir("/dev/shm")) - names if "hift" in name]


@pytest.mark.parametrize("case", others_slow([CASES[0], CASES[4]], [CASES[4]]), ids=str)
def test_a_steady_step_waits_at_most_once(case: Case) -> None:
    for seen in run_on_ranks(2, steady_steps, case):
        assert all(len(step) <= MOST for step in seen.waits), seen.report()
