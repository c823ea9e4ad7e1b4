"""What a failed cell leaves in memory, and what counts as a lack of memory."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hift_ds.evaluation.compare import cell as cell_module
from hift_ds.evaluation.compare.cell import Cells, freed, ran_out_of_memory


class Engine:
    """Like DeepSpeed's, it refers to itself."""

    def __init__(self) -> None:
        self.me = self
        self.state = torch.zeros(10)


made: list[weakref.ref[Engine]] = []


def train(engine: Engine, error: Exception) -> None:
    state = engine.state
    assert len(state)
    try:
        raise error
    except Exception as first:
        engine = Engine()  # of the function that handles the first error
        made.append(weakref.ref(engine))
        raise UserWarning("no engine") from first


def cell(error: Exception) -> None:
    engine = Engine()
    made.append(weakref.ref(engine))
    train(engine, error)


def test_what_a_failed_cell_has_made_is_freed_while_its_error_lives() -> None:
    made.clear()
    gc.disable()  # only `freed` collects
    try:
        with pytest.raises(UserWarning) as caught, freed():
            cell(ValueError("broken"))
        alive = [one() for one in made]
    finally:
        gc.enable()
    assert len(alive) == 2 and alive == [None, None]
    assert str(caught.value) == "no engine" and str(caught.value.__cause__) == "broken"
    assert {frame.name for frame in caught.traceback} >= {"cell", "train"}  # the places are still known


def test_a_lack_of_memory_is_recognized_wherever_it_began() -> None:
    assert ran_out_of_memory(torch.OutOfMemoryError("Tried to allocate 2 GiB"))
    assert ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert ran_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    try:
        try:
            raise MemoryError
        except MemoryError as error:
            raise ValueError("deepspeed: page-locking failed") from error
    except ValueError as error:
        assert ran_out_of_memory(error)
    assert not ran_out_of_memory(RuntimeError("shapes differ"))
    assert not ran_out_of_memory(ValueError("out of memory is not what this says"))


def test_nearly_equal_lengths_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    monkeypatch.setattr(cell_module, "planned_memory", lambda settings, config, length, ranks: planned.append(length))
    monkeypatch.setattr(cell_module, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1))
    comparison = SimpleNamespace(data=SimpleNamespace(max_length=90))
    cells: Any = SimpleNamespace(_plans={}, _config=lambda task: None, comparison=comparison)
    row, task = SimpleNamespace(label="full"), SimpleNamespace(name="sst2")
    for length in (61, 64, 33, 65, 90, 4):
        Cells._planned(cells, row, None, task, length)  # type: ignore[arg-type]
    assert planned == [64, 90, 32]  # 96 tokens are more than any example has


def test_torchs_own_error_of_the_host_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(caught.value)
