"""Checkpoints on ranks."""

from pathlib import Path

import deepspeed

from tests.hift_ds.checkpoint.test_store import newest, save
from tests.support.ranks import run_on_ranks


def newest_for_two(folder: Path) -> int | None:
    """In one of two ranks: `newest`, which all ranks call together."""
    deepspeed.init_distributed(verbose=False)
    assert deepspeed.comm.get_world_size() == 2
    return newest(folder)


def test_each_rank_sees_damage_that_another_finds(tmp_path: Path) -> None:
    """Two ranks share the files: each hashes some of them, and both learn of all damage."""
    two = tmp_path / "two"
    save(two, 1)
    save(two, 2)
    assert run_on_ranks(2, newest_for_two, two) == [2, 2]
    for name in ("step2/state.pt", "step2/extra/note.json"):
        data = (two / name).read_bytes()
        (two / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
        assert run_on_ranks(2, newest_for_two, two) == [1, 1], name
        (two / name).write_bytes(data)
    assert run_on_ranks(2, newest_for_two, two) == [2, 2]
