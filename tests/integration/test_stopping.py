"""A signal to one rank stops all ranks after the same step, and the run continues as if nothing had happened.

tests/system/test_preemption.py does the same through the launcher.
"""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hift_ds.launch.exit_codes import STOPPED
from tests.support.ranks import run_on_ranks
from tests.support.training import arguments, records, run_tiny, summary, train_and_compare

RUN = ("training.max_steps=7", "data.eval_examples=0", "output.export=false")


def train_and_signal(argv: Sequence[str], rank: int, step: int, number: int) -> dict[str, Any]:
    """Run the command line on this rank. After `step`, signal `number` is sent to the process of `rank`."""
    from hift_ds.launch.callbacks.stop_on_signal import Stopping

    after_step = Stopping.after_step
    handlers = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}

    def and_signal(stopping: Stopping, done: Any, total: float) -> bool:
        ends = after_step(stopping, done, total)
        if done.number == step and torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 30
            while not stopping.asked.reasons and time.monotonic() < deadline:
                time.sleep(0.01)  # a thread reads the signal
        return ends

    try:
        with mock.patch.object(Stopping, "after_step", and_signal):
            return train_and_compare(argv)
    finally:
        for one, handler in handlers.items():  # a stopped process ignores further signals
            signal.signal(one, handler)


@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT)], ids=["last", "first"])
def test_all_ranks_stop_after_the_same_step(rank: int, number: int, tmp_path: Path) -> None:
    out, straight = tmp_path / "run", tmp_path / "straight"
    seen = run_on_ranks(2, train_and_signal, arguments(out, *RUN), rank, 3, number)
    assert [one["code"] for one in seen] == [STOPPED, STOPPED], seen[0]["printed"]
    saved = out / "checkpoints" / "step4"  # the first step whose sum over ranks tells both
    said = f"stopped by {signal.Signals(number).name} after step 4; checkpoint {saved}; continue with --resume"
    assert said in seen[0]["printed"] and "Traceback" not in seen[0]["printed"]
    assert sorted(path.name for path in (out / "checkpoints").glob("step*")) == ["step4"]
    assert [record["step"] for record in records(out)] == [1, 2, 3, 4] and not (out / "summary.json").exists()

    assert run_tiny(2, out, *RUN, resume="yes")["code"] == 0
    assert run_tiny(2, straight, *RUN)["code"] == 0
    losses = [[record["loss"] for record in records(folder)] for folder in (out, straight)]
    assert losses[0] == losses[1] and len(losses[0]) == 7


def test_in_the_evaluation_after_training_the_last_step_is_saved(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ("training.max_steps=2", "data.eval_examples=8", "training.eval_batch_size=1")
    (seen,) = run_on_ranks(1, train_and_signal, arguments(out, *settings), 0, 2, signal.SIGTERM)
    assert seen["code"] == STOPPED and "stopped by SIGTERM after step 2; checkpoint" in seen["printed"]
    assert not (out / "model").exists()
    assert run_tiny(1, out, *settings, resume="yes")["code"] == 0
    assert len(records(out)) == 2 and summary(out)["score_n"] == 8 and (out / "model").is_dir()


def test_a_method_that_cannot_be_continued_saves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("badam")
    argv = arguments(tmp_path, *RUN, "method.name=badam")
    (seen,) = run_on_ranks(1, train_and_signal, argv, 0, 2, signal.SIGTERM)
    assert seen["code"] == STOPPED, seen["printed"]
    assert "nothing was saved: method 'badam' cannot be continued" in seen["printed"]
    assert not (tmp_path / "checkpoints").exists()
