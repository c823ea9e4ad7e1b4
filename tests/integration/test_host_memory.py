"""Host memory of a whole engine: the process takes what the ledger counts, in one region that is sized in advance."""

import gc
import json
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hift_ds.state import allocator, arena
from tests.support import tiny
from tests.support.pairwise import others_slow
from tests.support.parity import FINER
from tests.support.ranks import free_port, run_on_ranks
from tests.support.tiny import Case

STAGES = (0, 1, 2, 3)


def resident_and_counted(stage: int) -> list[tuple[int, int]]:
    """In a process of its own: by how much resident memory grew, and what the ledger counts, after set-up and a cycle.

    Weights are there before. The first engine is for the memory of libraries, which a second does not need.
    """
    import hift_ds
    from hift_ds.evaluation.cost.process_memory import anonymous, peak_memory

    config = tiny.ds_config(Case(stage=stage, dtype="bf16", layers_per_block=1))
    ids = torch.randint(512, (1, 8))
    with peak_memory():  # from here on, freed memory goes back to the system at once
        pass
    for _ in range(2):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=512,
                hidden_size=768,
                intermediate_size=1536,
                num_hidden_layers=3,
                num_attention_heads=4,
                use_cache=False,
            )
        ).bfloat16()
        gc.collect()
        before, seen = anonymous(), []
        engine = hift_ds.initialize(model=model, config=config)[0]

        def note(engine: Any, before: int = before, seen: list[tuple[int, int]] = seen) -> None:
            ledger = engine.memory_ledger()
            counted = sum(map(sum, (place.values() for place in ledger.values()))) - ledger["device"]["parameters"]
            seen.append((anonymous() - before, counted))

        note(engine)
        for _ in engine.blocks:
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        note(engine)
        engine.destroy()
        del engine, model
        gc.collect()
    return seen


@pytest.mark.parametrize("stage", others_slow(STAGES, [2]))
def test_the_process_takes_what_the_ledger_counts(stage: int) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    result = subprocess.run(
        [sys.executable, "-m", __name__, str(stage)], env=os.environ | ranks, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    at_start, after_a_cycle = json.loads(result.stdout.splitlines()[-1])
    print(at_start, after_a_cycle)
    for grown, counted in (at_start, after_a_cycle):
        assert counted > 170 * 2**20
        assert 0.9 * counted <= grown <= 1.02 * counted  # buffers that nothing was written to take no memory


def regions(case: Case) -> tuple[list[int], int]:
    """In a rank: the sizes of the regions of an engine after a cycle, and the bytes of its buffers."""
    made: list[int] = []

    class Counted(arena.Region):
        def __new__(cls, nbytes: int) -> "Counted":
            made.append(nbytes)
            return super().__new__(cls, nbytes)

    with mock.patch.object(arena, "Region", Counted):
        engine = tiny.initialize(case)
        try:
            for step in range(case.k):
                tiny.optimizer_step(engine, step)
            return made, engine.block_optimizers.host.nbytes
        finally:
            engine.destroy()


REGIONS: list[tuple[dict[str, Any], int, int]] = [
    (options, stage, ranks)
    for options in ({}, {"dtype": "bf16"}, {"max_block_numel": FINER})
    for stage in STAGES
    for ranks in (1, 2)
]


@pytest.mark.parametrize(
    ("options", "stage", "ranks"),
    others_slow(REGIONS, [one for one in REGIONS if "max_block_numel" not in one[0] or one[1:] in ((0, 2), (3, 1))]),
    ids=str,
)
def test_one_region_holds_all_state(options: dict[str, Any], stage: int, ranks: int) -> None:
    for made, used in run_on_ranks(ranks, regions, Case(stage=stage, ranks=ranks, **options)):
        (planned,) = made
        # Alignment and padding of small tensors. Split masters have room for a multiple of 1,024 elements.
        assert used <= planned <= used + (128 if options.get("dtype") == "bf16" else 64) * 2**10


def refusal(case: Case) -> str:
    """In a rank: the error of an engine on a machine with little free memory, of which it must take none."""
    with (
        mock.patch.object(allocator, "available_memory", lambda: 2**10),
        mock.patch.object(arena, "Region", mock.Mock(side_effect=AssertionError("mapped before the check"))),
    ):
        try:
            tiny.initialize(case).destroy()
        except ValueError as error:
            return str(error)
    return "none"


def test_too_little_room_is_an_error_before_anything_is_allocated() -> None:
    (error,) = run_on_ranks(1, refusal, Case(stage=2))
    assert "of host memory on" in error and "0.00 GiB are free" in error and "hift.offload.nvme_path" in error


if __name__ == "__main__":
    print(json.dumps(resident_and_counted(int(sys.argv[1]))))
