"""Stopping a run from outside, and ranks that die or hang: real processes, real signals, through the real launcher."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hift_ds.launch.exit_codes import RANK_LOST, STOPPED
from tests.support.jobs import ENDLESS, Job, alive
from tests.support.training import records, run_tiny, summary


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[float]]:
    """The losses of a run that nobody stopped, by its number of ranks."""
    known: dict[int, list[float]] = {}

    def losses(ranks: int) -> list[float]:
        if ranks not in known:
            out = tmp_path_factory.mktemp("unstopped") / "run"
            settings = ("training.max_steps=60", "data.eval_examples=0", "output.export=false")
            assert run_tiny(ranks, out, *settings)["code"] == 0
            known[ranks] = [record["loss"] for record in records(out)]
        return known[ranks]

    return losses


def assert_saved(job: Job, losses: list[float]) -> int:
    """The job saved its last step, and a resumed run does each later step once, as if nothing had been; that step."""
    step = len(records(job.out))
    assert (job.out / "checkpoints" / "latest").read_text() == f"step{step}", job.text()
    assert [path.name for path in (job.out / "checkpoints").glob("step*")] == [f"step{step}"]
    assert f"after step {step}; checkpoint {job.out / 'checkpoints' / f'step{step}'}; continue" in job.text()
    assert 'launch/train.py", line' not in job.text()  # the outer `deepspeed` itself has a traceback after SIGINT
    resumed = run_tiny(job.ranks, job.out, *ENDLESS[1:], f"training.max_steps={step + 3}", resume="yes")
    assert resumed["code"] == 0, resumed["printed"]
    assert [record["step"] for record in records(job.out)] == list(range(1, step + 4))
    assert [record["loss"] for record in records(job.out)] == losses[: step + 3]
    return step


def to_rank_1(job: Job) -> None:
    job.rank(1).send_signal(signal.SIGTERM)


def to_launch_py(job: Job) -> None:
    job.launcher().send_signal(signal.SIGTERM)


def to_the_group(job: Job) -> None:
    os.killpg(job.process.pid, signal.SIGINT)


def to_deepspeed(job: Job) -> None:
    job.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("send", "code", "said"),
    [
        (to_rank_1, STOPPED, "SIGTERM"),
        pytest.param(to_launch_py, 1, "SIGTERM", marks=pytest.mark.slow),  # launch.py knows no other code then
        pytest.param(to_the_group, -signal.SIGINT, "SIGINT( and SIGTERM)?", marks=pytest.mark.slow),
        pytest.param(to_deepspeed, -signal.SIGTERM, "the end of its launcher", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_save_the_same_step(send: Any, code: int, said: str, tmp_path: Path, unstopped: Any) -> None:
    with Job(tmp_path / "run", 2, *ENDLESS) as job:
        job.wait_for_step(3)
        processes = [job.rank(0), job.rank(1), job.launcher()]
        send(job)
        assert job.ends(processes, 60) < 30
        assert job.code() == code, job.text()
        assert re.search(f"stopped by {said} after step", job.text()), job.text()
        assert_saved(job, unstopped(2))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_at_seeded_moments(ranks: int, tmp_path: Path, unstopped: Any) -> None:
    """Three of one process, 20 of two ranks."""
    draw, moments = random.Random(ranks), 3 if ranks == 1 else 20
    seconds, steps = [], []
    for number in range(moments):
        with Job(tmp_path / str(number), ranks, *ENDLESS) as job:
            job.wait_for_step(draw.randrange(1, 20))
            time.sleep(draw.uniform(0, 0.5))
            target = job.rank(draw.randrange(ranks)) if ranks == 1 or draw.random() < 0.5 else job.launcher()
            processes = [job.rank(rank) for rank in range(ranks)]
            target.send_signal(signal.SIGTERM)
            seconds.append(job.ends(processes, 60))
            assert job.code() == (1 if ranks > 1 and target not in processes else STOPPED), job.text()
            steps.append(assert_saved(job, unstopped(ranks)))
    print(f"{len(seconds)} of {moments} saved, after steps {steps}; the slowest took {max(seconds):.1f} s")
    assert max(seconds) < 30


@pytest.mark.slow
def test_before_the_first_step_it_exits_at_once(tmp_path: Path) -> None:
    with Job(tmp_path / "run", 1, "data.eval_examples=512", "training.eval_batch_size=1") as job:
        job.rank(0).send_signal(signal.SIGTERM)  # it is loading the model, or evaluating it
        assert job.code(10) == STOPPED
        assert "stopped by SIGTERM: nothing was trained yet" in job.text() and "Traceback" not in job.text()
        assert not (job.out / "metrics.jsonl").exists()


@pytest.mark.slow
def test_in_the_evaluation_after_training_the_last_step_is_saved(tmp_path: Path) -> None:
    settings = ("training.max_steps=2", "data.eval_examples=48", "training.eval_batch_size=1")
    with Job(tmp_path / "run", 1, *settings) as job:
        job.wait_for_step(2)
        time.sleep(0.5)
        job.process.send_signal(signal.SIGTERM)
        assert job.code() == STOPPED, job.text()
        assert "stopped by SIGTERM after step 2; checkpoint" in job.text()
    assert not (job.out / "model").exists()
    assert run_tiny(1, job.out, *settings, resume="yes")["code"] == 0
    assert len(records(job.out)) == 2 and summary(job.out)["score_n"] == 48 and (job.out / "model").is_dir()


@pytest.mark.slow
def test_a_method_that_cannot_be_continued_says_so(tmp_path: Path) -> None:
    with Job(tmp_path / "run", 1, *ENDLESS, "method.name=badam") as job:
        job.wait_for_step(2)
        job.process.send_signal(signal.SIGTERM)
        assert job.code() == STOPPED, job.text()
        assert "nothing was saved: method 'badam' cannot be continued" in job.text()
        assert not (job.out / "checkpoints").exists()


# ---- ranks that die or hang ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_ends_the_run(tmp_path: Path) -> None:
    stop_a_rank(tmp_path / "run", limit=8, stopped=1)


@pytest.mark.slow
def test_ten_stopped_ranks(tmp_path: Path) -> None:
    draw, limit = random.Random(0), 8
    seconds = [stop_a_rank(tmp_path / str(n), limit, draw.randrange(2), draw, wait=n < 2) for n in range(10)]
    print(
        f"{len(seconds)} of 10 ended with 76, after {min(seconds):.1f} to {max(seconds):.1f} s; the limit is {limit} s"
    )


def stop_a_rank(out: Path, limit: float, stopped: int, draw: Any = None, wait: bool = False) -> float:
    """SIGSTOP one of two ranks; the seconds until the other has exited. `wait`: for the launcher to end the first."""
    with Job(out, 2, *ENDLESS, f"training.rank_timeout={limit}") as job:
        job.wait_for_step(draw.randrange(1, 20) if draw else 3)
        time.sleep(draw.uniform(0, 0.5) if draw else 0)
        victim, other, launcher = job.rank(stopped), job.rank(1 - stopped), job.launcher()
        victim.send_signal(signal.SIGSTOP)
        seconds = job.ends([other], limit + 30)
        assert seconds < limit + 10
        assert re.search(
            rf"error: rank {stopped} \(pid {victim.pid} on \S+\) is stopped; last heartbeat \d+ s ago, after step "
            rf"\d+: {out / 'logs' / f'rank{stopped}.log'}",
            job.text(),
        ), job.text()
        assert "training.rank_timeout" in job.text() and "Traceback" not in job.text()
        assert "is stopped" in (out / "logs" / f"rank{1 - stopped}.log").read_text()
        if not wait:
            job.kill(victim)
        job.ends([victim, launcher], 60)  # launch.py kills it 30 s after SIGTERM, which a stopped process does not hear
        assert job.code() == RANK_LOST
        return seconds


@pytest.mark.slow
def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    with Job(tmp_path / "run", 2, *ENDLESS) as job:
        job.wait_for_step(3)
        victim, other = job.rank(1), job.rank(0)
        victim.kill()
        assert job.ends([other], 60) < 20
        assert f"error: rank 1 (pid {victim.pid} on " in job.text() and "is dead" in job.text(), job.text()
        assert str(job.out / "logs" / "rank1.log") in job.text() and "Traceback" not in job.text()
        assert job.code() in (256 - signal.SIGKILL, RANK_LOST)  # of what launch.py saw gone first


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_that_waits_for_another(tmp_path: Path) -> None:
    with Job(tmp_path / "run", 2, *ENDLESS) as job:
        job.wait_for_step(3)
        victim, other = job.rank(1), job.rank(0)
        victim.send_signal(signal.SIGSTOP)
        other.send_signal(signal.SIGTERM)
        time.sleep(7)
        assert alive(other)  # in a collective, for up to training.rank_timeout
        other.send_signal(signal.SIGTERM)
        assert job.ends([other], 20) < 5
        assert "SIGTERM again: exiting at once, without saving" in job.text()
        job.kill(victim)
        assert job.code() == 128 + signal.SIGTERM
