"""The room for optimizer state on the host: what the ranks of a machine need together, decided alike by all of them."""

import os
import socket
from unittest import mock

import deepspeed
import pytest

from tests.support.ranks import run_on_ranks

GIB = 2**30
STATE = "masters and optimizer state"


def check(needed: list[int], free: list[int], hosts: list[str]) -> str | None:
    """In a rank: the error of `HostMemory.check_room`. The launcher's numbers of ranks on a machine are not there."""
    from hift_ds.state import allocator

    deepspeed.init_distributed(verbose=False)
    rank = int(os.environ["RANK"])
    without = {name: value for name, value in os.environ.items() if name not in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")}
    with (
        mock.patch.dict(os.environ, without, clear=True),
        mock.patch.object(allocator, "available_memory", lambda: free[rank]),
        mock.patch.object(socket, "gethostname", lambda: hosts[rank]),
    ):
        try:
            allocator.HostMemory().check_room(needed[rank])
        except ValueError as error:
            return str(error)
    return None


def reserve(needed: list[int]) -> str | None:
    """In a rank: the error of `HostMemory.reserve`."""
    from hift_ds.state.allocator import HostMemory

    deepspeed.init_distributed(verbose=False)
    try:
        HostMemory().reserve(needed[int(os.environ["RANK"])])
    except MemoryError as error:
        return str(error)
    return None


def test_all_ranks_raise_the_error_of_one_that_does_not_get_its_memory() -> None:
    first, second = run_on_ranks(2, reserve, [2**20, 2**62])
    assert first == second and first.startswith(f"rank 1: {STATE}: 4294967296.00 GiB of host memory")
    assert "ulimit -v" in first and "hift.offload.device='nvme'" in first
    assert run_on_ranks(2, reserve, [2**20, 2**20]) == [None, None]


@pytest.mark.parametrize(
    ("needed", "free", "hosts", "expected"),
    [
        ([3, 3], [7, 7], ["a", "a"], None),
        ([4, 4], [7, 7], ["a", "a"], "8.00 GiB of host memory on a, and 7.00 GiB are free"),
        ([4, 4], [8, 7], ["a", "a"], "8.00 GiB of host memory on a, and 7.00 GiB are free"),  # asked at other times
        ([4, 4], [7, 7], ["a", "b"], None),
        ([4, 4], [7, 3], ["a", "b"], "4.00 GiB of host memory on b, and 3.00 GiB are free"),
    ],
)
def test_all_ranks_get_one_answer(needed: list[int], free: list[int], hosts: list[str], expected: str | None) -> None:
    answers = run_on_ranks(2, check, [n * GIB for n in needed], [n * GIB for n in free], hosts)
    assert answers[0] == answers[1]
    assert (
        answers[0] is None
        if expected is None
        else expected in answers[0] and "hift.offload.device='nvme'" in answers[0]
    )
