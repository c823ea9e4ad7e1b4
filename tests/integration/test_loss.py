"""The loss in chunks through the engine, at every ZeRO stage."""

import pytest
import torch
from torch import Tensor

from hift_ds.launch.model.batch_loss import summed_loss
from hift_ds.model import loss as losses
from tests.hift_ds.model.test_loss import CHUNK
from tests.support import tiny
from tests.support.pairwise import others_slow
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case


def trained(case: Case, chunk: int, uneven: bool) -> tuple[list[float], dict[str, Tensor]]:
    """In a rank: losses and weights after a run in chunks; ``uneven``: the ranks have different numbers of tokens."""
    engine = tiny.initialize(case)
    found, rank = [], torch.distributed.get_rank()
    try:
        for step in range(case.steps):
            for micro in range(tiny.ACCUMULATION):
                given = tiny.micro_batch(step, micro, rank)
                labels = given["labels"].clone()
                if uneven:
                    labels[:, : 9 * rank + step % 3] = losses.IGNORED
                loss = summed_loss(engine, {**given, "labels": labels}, "causal-lm", chunk)
                engine.backward(loss / 22)
                engine.step()
                found.append(loss.item())
        return found, tiny.weights(engine)
    finally:
        engine.destroy()


ENGINES = [Case(stage=stage, cycles=1) for stage in range(4)] + [Case(stage=0, tied=True), Case(stage=3, tied=True)]
ENGINES += [Case(stage=2, dtype="bf16"), Case(stage=3, checkpointing=True)]
ENGINES += [Case(stage=2, ranks=2), Case(stage=3, ranks=2), Case(stage=3, ranks=2, tied=True, checkpointing=True)]


TABLE = [Case(cycles=1), Case(tied=True), Case(stage=2, dtype="bf16"), Case(stage=3, checkpointing=True)]
TABLE += [Case(stage=2, ranks=2)]


@pytest.mark.parametrize("case", others_slow(ENGINES, TABLE), ids=str)
def test_the_engine_trains_the_same(case: Case) -> None:
    """Bound: Adam divides by the gradient's size, so where a gradient nearly cancels its rounding is magnified."""
    uneven = case.ranks > 1
    whole = run_on_ranks(case.ranks, trained, case, 0, uneven)
    chunked = run_on_ranks(case.ranks, trained, case, CHUNK, uneven)
    start = tiny.copies(dict(tiny.model(case.dtype, case.tied).named_parameters()))
    for (truth, expected), (ours, weights) in zip(whole, chunked, strict=True):
        tolerance = 1e-4 if case.dtype == "fp32" else 2e-3
        assert ours == pytest.approx(truth, rel=tolerance)
        wrong = sum((weights[n].double() - expected[n].double()).square().sum() for n in expected)
        moved = sum((expected[n].double() - start[n].double()).square().sum() for n in expected)
        assert (wrong / moved).sqrt() < (1e-3 if case.dtype == "fp32" else 5e-2)
