"""Ranks are killed at any moment, in training and while saving: the run goes on from its last commit, bit for bit.

Real launcher, two ranks, SIGKILL, which no handler sees. One run is killed again and again; in the end its records and
its weights are those of a run that nobody touched.
"""

import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from hift_ds.checkpoint import store
from tests.support.jobs import Job
from tests.support.training import records, run_tiny

KEYS = ("step", "cycle", "block", "loss", "learning_rate", "grad_norm", "tokens", "skipped")
SETTINGS = ("data.eval_examples=0", "training.lr_schedule=linear", "model.config.attention_dropout=0.1")


def committed(out: Path) -> int:
    """The step of the newest whole checkpoint; 0: there is none."""
    found = store.find(out / "checkpoints")
    return found.about["step"] if found is not None else 0


def stop_in_save(rank: psutil.Process, folder: Path, numbers: random.Random) -> None:
    """Stop a rank (SIGSTOP) at some point of a save; rank 1 may reach the end of one before rank 0 has written it."""
    deadline = time.monotonic() + 100
    while True:
        while not any(folder.glob(".saving-*")):
            assert time.monotonic() < deadline, "no save was seen"
        time.sleep(numbers.uniform(0, 0.02))
        rank.suspend()
        if any(folder.glob(".saving-*")):
            return
        rank.resume()  # the save was over, so wait for the next


def kill_once(out: Path, settings: tuple[str, ...], numbers: random.Random, in_save: bool) -> tuple[str, int, bool]:
    """Start or continue the run, and kill a rank of it; where it was hit, the step that is committed then, and whether
    the other rank names it."""
    before, rank = committed(out), 0 if in_save else numbers.randrange(2)
    with Job(out, 2, *settings, resume="auto") as job:
        beginning = f"continues after step {before}" if before else "the run begins at its first step"
        job.until(lambda: beginning in job.text(), what=beginning)  # until then the records are those of the run before
        job.wait_for_step(before + numbers.randrange(1, 5))
        victim = job.rank(rank)
        if in_save:
            stop_in_save(victim, out / "checkpoints", numbers)
        else:
            time.sleep(numbers.uniform(0, 0.2))
            victim.suspend()
        where = "while saving" if any((out / "checkpoints").glob(".saving-*")) else "between saves"
        victim.send_signal(signal.SIGKILL)
        assert job.code(120) != 0
        is_named = f"error: rank {rank} (pid {victim.pid} on " in job.text() and "is dead" in job.text()
    return where, committed(out), is_named


def kills(tmp_path: Path, count: int, stage: int, seed: int) -> list[bool]:
    """Kill a run a number of times; whether each killed rank was named."""
    numbers = random.Random(seed)
    steps = 6 * count + 6
    settings = (*SETTINGS, f"training.max_steps={steps}", f"deepspeed.zero_optimization.stage={stage}")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run_tiny(2, straight, *settings)["code"] == 0
    saving = (*settings, "training.save_every=1")
    places: list[str] = []
    named: list[bool] = []
    for number in range(count):
        if committed(killed) >= steps - 5:
            break
        place, step, is_named = kill_once(killed, saving, numbers, in_save=count == 1 or numbers.random() < 0.5)
        places.append(place)
        named.append(is_named)
        print(f"kill {number + 1}: {place}, step {step} is committed", flush=True)
    assert len(places) == count
    ended = run_tiny(2, killed, *saving, resume="yes")
    assert ended["code"] == 0, ended["printed"]
    assert "while saving" in places
    assert [[r[key] for key in KEYS] for r in records(killed)] == [[r[key] for key in KEYS] for r in records(straight)]
    ours, truth = (load_file(out / "model" / "model.safetensors") for out in (killed, straight))
    assert ours.keys() == truth.keys() and all(ours[name].equal(truth[name]) for name in truth)
    print(f"{count} of {count} continued, 0 bits different; {places.count('while saving')} of them while saving")
    return named


def test_killed_while_saving(tmp_path: Path) -> None:
    """The other rank names the killed one, as in training (`test_a_killed_rank_is_named`)."""
    assert kills(tmp_path, 1, stage=2, seed=3) == [True]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_25_times(tmp_path: Path, stage: int) -> None:
    kills(tmp_path, 25, stage, seed=stage)
