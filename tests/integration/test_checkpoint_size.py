"""What an engine says of the size of its checkpoints, against the files."""

from pathlib import Path
from typing import Any

import pytest

from hift_ds.checkpoint.files import FileEngine
from tests.support import tiny
from tests.support.parity import cases
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case


def said_and_saved(case: Case, folder: Path) -> tuple[int, int]:
    """In a rank: what the engine says before its first step, and the bytes of this rank's tensors after a cycle."""
    engine = tiny.initialize(case)
    try:
        said = engine.checkpoint_nbytes
        for step in range(case.k):
            tiny.optimizer_step(engine, step)
        assert engine.checkpoint_nbytes == said
        engine.save_checkpoint(str(folder), tag="one")
        names = [name for name in engine.checkpoint_engine.finish() if "generators" not in name]
        storages: dict[tuple[str, int], int] = {}
        for name in names:
            for tensor in tensors_in(FileEngine().load(str(folder / "one" / name), map_location="cpu")):
                storages[name, tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return said, sum(storages.values())
    finally:
        engine.destroy()


def tensors_in(value: Any) -> list[Any]:
    if hasattr(value, "untyped_storage"):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in inside for tensor in tensors_in(one)]


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(stage=stage, dtype=dtype, ranks=2) for stage in (0, 2, 3) for dtype in ("fp32", "bf16")],
        [Case(stage=2, dtype="bf16", moments="8bit"), Case(stage=1, dtype="bf16", place="none")],
        [Case(stage=2, dtype="bf16", optimizer="SGD"), Case(stage=2, dtype="bf16", offload=True)],
        [Case(stage=0, dtype="bf16", max_block_numel=2000)],
    ),
    ids=str,
)
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(case: Case, tmp_path: Path) -> None:
    found = run_on_ranks(case.ranks, said_and_saved, case, tmp_path)
    assert len({said for said, _ in found}) == 1
    saved = sum(nbytes for _, nbytes in found)
    # Shares of ranks are padded, and so are the ends of what is kept in 8 bits; there are counts of steps.
    assert 0.99 * found[0][0] <= saved <= 1.06 * found[0][0] + 4096
