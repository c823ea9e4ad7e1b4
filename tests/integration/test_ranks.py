"""The runner of ranks: results in order, errors shown, dead and hung ranks noticed, and a new pool after each."""

import os
import time

import pytest
import torch

from tests.support.ranks import RankError, RankPool


def rank_and_sum(start: int) -> tuple[int, float]:
    total = torch.tensor(float(start + torch.distributed.get_rank()))
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), total.item()


def fail_on_rank_one(how: str) -> None:
    if torch.distributed.get_rank() == 1:
        if how == "raise":
            raise ValueError("rank one is unwell")
        if how == "die":
            os._exit(7)
        time.sleep(60)
    torch.distributed.barrier()


def test_results_errors_deaths_and_hangs() -> None:
    pool = RankPool(2)
    try:
        assert pool.run(rank_and_sum, 1) == [(0, 3.0), (1, 3.0)]
        processes = list(pool._processes)
        assert pool.run(rank_and_sum, start=2) == [(0, 5.0), (1, 5.0)]
        assert pool._processes == processes, "the same ranks serve the next call"
        with pytest.raises(RankError, match="(?s)rank 1 ---.*ValueError: rank one is unwell"):
            pool.run(fail_on_rank_one, "raise")
        assert not any(process.is_alive() for process in processes)
        with pytest.raises(RankError, match="rank 1 ---\nthe process died, exit code 7"):
            pool.run(fail_on_rank_one, "die")
        pool.run(rank_and_sum, 1)  # starts the ranks, so that the next limit is for the call alone
        with pytest.raises(RankError, match=r"limit 2 s(?s:.*)rank 1 ---\nno answer"):
            pool.run(fail_on_rank_one, "hang", timeout=2)
        assert pool.run(rank_and_sum, 1) == [(0, 3.0), (1, 3.0)]
    finally:
        pool.close()
