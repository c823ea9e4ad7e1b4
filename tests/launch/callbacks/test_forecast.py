"""The time to the end, on a clock that the test moves: every step, evaluation and save takes what the test says."""

from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from hift_ds.launch.callbacks.callback import Step
from hift_ds.launch.callbacks.forecast import Forecast, as_time
from hift_ds.launch.config.settings import TrainingSettings

ORDER = [3, 0, 2, 1]
SECONDS = [1.0, 2.0, 4.0, 16.0]  # of a step on each block
EVALUATION, SAVE, RECORD = 30.0, 11.0, 0.25


class Simulated:
    """A run whose steps take known times. `times` is the clock at each step's record, and at the end."""

    def __init__(self, training: TrainingSettings, first: int = 0, evaluates: bool = True, creation: float = 1.0):
        self.now, self.done, self.creation = 1000.0, first, creation
        self.training, self.evaluates = training, evaluates
        self.forecast = Forecast(training, evaluates, SAVE, clock=lambda: self.now)
        self.forecast.use(lambda steps: ORDER[(self.done + steps) % 4], 4)
        self.left: dict[int, float | None] = {}
        self.at: dict[int, float] = {}
        self.evaluated_at: list[float] = []

    def event(self, seconds: float, counted: Any) -> None:
        self.now += seconds
        counted(seconds)

    def evaluate(self) -> None:
        self.event(EVALUATION, self.forecast.evaluated)
        self.evaluated_at.append(self.now)

    def run(self) -> None:
        training, last = self.training, self.training.max_steps
        if self.evaluates and not self.done:
            self.evaluate()
        begun = self.done
        for number in range(self.done + 1, last + 1):
            block, cycle = ORDER[(number - 1) % 4], (number - 1) // 4
            self.forecast.before_step(number)
            self.now += SECONDS[block] * (self.creation if number - begun <= 4 else 1)
            self.done = number
            self.forecast.describe(Step(number, {"block": block, "cycle": cycle}, 0.0))
            if training.eval_every and (number % training.eval_every == 0 or number == last):
                self.evaluate()
            self.left[number], self.at[number] = self.forecast.left(number), self.now
            if training.save_every and (number % training.save_every == 0 or number == last):
                self.event(SAVE, self.forecast.saved)
            self.now += RECORD
        if self.evaluates and not training.eval_every:
            self.evaluate()


PLAIN = TrainingSettings(max_steps=26)


@pytest.mark.parametrize(
    "training",
    [
        PLAIN,
        replace(PLAIN, save_every=5),
        replace(PLAIN, eval_every=6),
        replace(PLAIN, save_every=13, eval_every=13),
        replace(PLAIN, save_every=26, eval_every=26),
    ],
    ids=["steps", "saves", "evaluations", "both at the last step", "only at the last step"],
)
@pytest.mark.parametrize("first", [0, 9])
def test_the_estimate_is_what_it_takes(training: TrainingSettings, first: int) -> None:
    run = Simulated(training, first)
    run.run()
    assert [number for number, left in run.left.items() if left is None] == [first + n for n in (1, 2, 3)]
    for number, left in run.left.items():
        if left is None:
            continue
        expected = run.now - run.at[number]
        if all(at > run.at[number] for at in run.evaluated_at):  # a continued run knows none before its first
            expected -= EVALUATION * len(run.evaluated_at)
        # The records of the last step also come after its estimate.
        assert left == pytest.approx(expected, abs=RECORD + 1e-6), f"after step {number}"


def test_steps_that_create_state_count_until_there_are_others() -> None:
    run = Simulated(PLAIN, evaluates=False, creation=3.0)
    run.run()
    later = sum(SECONDS)
    assert run.left[4] == pytest.approx(3 * (5 * later + SECONDS[3] + SECONDS[0]) + 22 * RECORD)
    assert run.left[8] == pytest.approx(run.now - run.at[8], abs=RECORD)


def test_a_machine_that_becomes_slower_and_one_slow_step() -> None:
    run = Simulated(replace(PLAIN, max_steps=100), evaluates=False)
    usual = list(SECONDS)
    for number in count(1):
        block = ORDER[(number - 1) % 4]
        run.forecast.before_step(number)
        run.now += usual[block] * (2 if number > 40 else 1) * (50 if number == 30 else 1)
        run.done = number
        run.forecast.describe(Step(number, {"block": block, "cycle": (number - 1) // 4}, 0.0))
        if number in (32, 52, 80):
            expected = (100 - number) / 4 * sum(usual) * (2 if number > 50 else 1)
            assert run.forecast.left(number) == pytest.approx(expected), number
            assert run.forecast.longest == {32: 50 * usual[ORDER[29 % 4]], 52: 2 * 16.0, 80: 2 * 16.0}[number]
        if number == 80:
            break


def test_other_blocks_are_new() -> None:
    run = Simulated(PLAIN)
    run.run()
    run.forecast.use(lambda steps: steps % 2, 2)
    assert run.forecast.left(20) is None


def test_a_method_without_blocks_and_the_first_estimate() -> None:
    run = Simulated(replace(PLAIN, max_steps=10), evaluates=False)
    run.forecast.use(lambda steps: 0, 0)
    assert run.forecast.left(0) is None and run.forecast.outcome() is None
    for number in range(1, 4):
        run.forecast.before_step(number)
        run.now += 2.0
        run.forecast.describe(Step(number, {"block": 0, "cycle": number - 1}, 0.0))
        assert run.forecast.left(number) == 2.0 * (10 - number)
    assert run.forecast.outcome() == {"after_step": 1, "predicted_seconds": 18.0, "seconds": 4.0}


def test_times() -> None:
    texts = [as_time(s) for s in (0, 59.4, 59.6, 200, 3600, 7261, 90000, 86400 * 12 + 3600 * 5)]
    assert texts == ["0 s", "59 s", "1 min 0 s", "3 min 20 s", "1 h 0 min", "2 h 1 min", "1 d 1 h", "12 d 5 h"]
