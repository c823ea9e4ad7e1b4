"""MeZO on two ranks equals MeZO on one."""

import math
from typing import Any

import pytest
import torch

from hift_ds.optim.mezo import MeZO
from tests.hift_ds.optim.test_mezo import batch, copies, network, squared_error
from tests.support import tiny
from tests.support.ranks import run_on_ranks


def train_on_share(case: str) -> Any:
    """Five steps on this rank's part of the batch, 2 of 6 examples on rank 0; runs on every rank."""
    rank = torch.distributed.get_rank()
    model = network(torch.float64)
    optimizer = MeZO(model, lr=1e-2, seed=rank if case == "seeds" else 0)
    losses = []
    for step in range(5):
        x, y = batch(step, torch.float64)
        share = (x[:2], y[:2]) if rank == 0 else (x[2:], y[2:])

        def closure() -> Any:
            total = squared_error(model, share)  # noqa: B023
            return total + (math.nan if case == "nan" and rank == 1 and step == 4 else 0), len(share[0])  # noqa: B023

        before = copies(model)
        try:
            losses.append(optimizer.step(closure))
        except ValueError as error:
            return str(error)
    return losses, copies(model), optimizer.skipped, tiny.identical(before, copies(model))


def test_two_ranks_equal_one() -> None:
    alone = network(torch.float64)
    optimizer, losses = MeZO(alone, lr=1e-2), []
    for step in range(5):
        data = batch(step, torch.float64)
        losses.append(optimizer.step(lambda: (squared_error(alone, data), 6)))  # noqa: B023
    both = run_on_ranks(2, train_on_share, "equal")
    assert tiny.identical(both[0][1], both[1][1])
    assert both[0][0] == pytest.approx(losses, rel=1e-9)
    assert tiny.largest_difference(both[0][1], copies(alone)) < 1e-9

    both = run_on_ranks(2, train_on_share, "nan")  # on rank 1 in the last step: both skip it, and restore
    assert tiny.identical(both[0][1], both[1][1])
    assert [entry[2:] for entry in both] == [(1, True), (1, True)]
    assert all("differ in seed" in message for message in run_on_ranks(2, train_on_share, "seeds"))
