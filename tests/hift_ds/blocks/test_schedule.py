"""The order of blocks, by itself."""

import random
from typing import Any

import pytest

from hift_ds.blocks.schedule import STRATEGIES, BlockSchedule


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("blocks", (1, 2, 7))
@pytest.mark.parametrize("steps_per_block", (1, 3))
def test_each_cycle_trains_every_block_in_the_same_order(strategy: str, blocks: int, steps_per_block: int) -> None:
    schedule = BlockSchedule(blocks, strategy, steps_per_block, seed=5)
    cycles = []
    for cycle in range(3):
        visited = []
        for step in range(blocks * steps_per_block):
            assert schedule.cycle == cycle
            visited.append(schedule.active_block)
            assert schedule.advance() == (step == blocks * steps_per_block - 1)
        cycles.append(visited)
    assert cycles[0] == cycles[1] == cycles[2]
    assert cycles[0] == [block for block in schedule.order for _ in range(steps_per_block)]
    expected = list(range(blocks))
    if strategy == "top2down":
        expected.reverse()
    if strategy == "random":
        random.Random(5).shuffle(expected)
    assert list(schedule.order) == expected


def test_the_seed_decides_the_random_order_and_no_other() -> None:
    orders = {BlockSchedule(8, "random", seed=seed).order for seed in range(20)}
    assert len(orders) > 15 and all(sorted(order) == list(range(8)) for order in orders)
    assert BlockSchedule(8, "bottom2up", seed=1).order == BlockSchedule(8, "bottom2up", seed=2).order


def test_a_saved_position_continues() -> None:
    schedule = BlockSchedule(5, "random", 2, seed=1)
    for _ in range(13):
        schedule.advance()
    resumed = BlockSchedule(5, "random", 2, seed=1)
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(20):
        assert (resumed.active_block, resumed.cycle) == (schedule.active_block, schedule.cycle)
        assert resumed.advance() == schedule.advance()


@pytest.mark.parametrize("kind", ({"num_blocks": 4}, {"strategy": "top2down"}, {"steps_per_block": 2}, None))
def test_another_order_begins_with_a_cycle(kind: dict[str, Any] | None) -> None:
    schedule = BlockSchedule(5)
    other = BlockSchedule(**{"num_blocks": 5, **(kind or {})})
    for step in range(11):
        if step % 5:
            assert schedule.steps_left(schedule.state_dict()) == 5 - step % 5
            with pytest.raises(ValueError, match=f"{5 - step % 5} steps before the end of a cycle"):
                other.load_state_dict(schedule.state_dict(), same_blocks=kind is not None)
        else:
            other.load_state_dict(schedule.state_dict(), same_blocks=kind is not None)
            assert (other.cycle, other.active_block, other.step % other.steps_per_cycle) == (
                step // 5,
                other.order[0],
                0,
            )
        schedule.advance()


@pytest.mark.parametrize(
    "arguments",
    ({"num_blocks": 0}, {"num_blocks": 2, "steps_per_block": 0}, {"num_blocks": 2, "strategy": "up"}),
)
def test_bad_values_are_named(arguments: dict) -> None:
    with pytest.raises(ValueError, match=str(list(arguments.values())[-1])):
        BlockSchedule(**arguments)
