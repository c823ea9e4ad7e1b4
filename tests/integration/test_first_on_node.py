"""Long work on one rank of a machine, for which the others wait."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from unittest import mock

import deepspeed
import pytest
from deepspeed import comm as dist

from hift_ds.launch.errors import UserError
from hift_ds.launch.runtime import ranks
from tests.support.ranks import run_on_ranks


def work(seconds: float, problem: str | None) -> Iterator[str | None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
        yield None
    if problem:
        raise UserError(problem)
    yield f"made by rank {dist.get_rank()}"


def wait(seconds: list[float], problems: list[str | None], a_node: int) -> tuple[str, int]:
    """In a rank: what it gets, and how often the ranks met."""
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = dist.get_rank()
    with (
        mock.patch.dict(os.environ, LOCAL_RANK=str(rank % a_node)),
        mock.patch.object(ranks, "MEETING", 0.1),
        mock.patch.object(ranks.collectives, "gather", wraps=ranks.collectives.gather) as gather,
    ):
        try:
            found = ranks.first_on_node(work(seconds[rank], problems[rank]))
        except UserError as error:
            found = str(error)
    return found, gather.call_count


@pytest.mark.parametrize(("a_node", "expected"), [(2, [0, 0]), (1, [0, 1])])
def test_ranks_of_a_machine_get_the_result_of_its_first(a_node: int, expected: list[int]) -> None:
    (first, met), (second, times) = run_on_ranks(2, wait, [0.6, 0.0], [None, "not called"][:a_node] + [None], a_node)
    assert [first, second] == [f"made by rank {rank}" for rank in expected]
    assert met == times > 3, "no rank waits in one collective all the time"


@pytest.mark.parametrize(
    ("problems", "a_node", "message"),
    [
        (["a", "b"], 2, "a"),
        (["a", "a"], 1, "a"),
        (["a", "b"], 1, "rank 0: a\nrank 1: b"),
        ([None, "b"], 1, "rank 1: b"),
    ],
)
def test_errors_are_those_of_the_ranks_that_work(problems: list[str | None], a_node: int, message: str) -> None:
    assert {found for found, _ in run_on_ranks(2, wait, [0.0, 0.0], problems, a_node)} == {message}
