"""The command of the README through DeepSpeed's launcher, on one and two ranks."""

import socket
from pathlib import Path

import pytest

from tests.support.jobs import launch
from tests.support.training import arguments, records, summary

STAGES = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [pytest.param(r, s, marks=() if (r, s) in ((1, 2), (2, 3)) else pytest.mark.slow) for r in (1, 2) for s in STAGES],
)
def test_through_the_launcher(ranks: int, stage: int, tmp_path: Path) -> None:
    """The command of the README; by default with the default and the hardest ZeRO stage."""
    out = tmp_path / "run"
    done = launch(ranks, arguments(out, f"deepspeed=configs/deepspeed/zero{stage}.json", "logging.every=4"))
    assert done.returncode == 0, done.stdout + done.stderr
    final, steps = summary(out), records(out)
    assert final["ranks"] == ranks and len(steps) == 12
    assert final["loss_last_mean"] < final["loss_first_mean"] - 0.05
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.use_cache  # switched off for training only
    assert AutoTokenizer.from_pretrained(out / "model").decode([100]) != ""
    for text in ("step 12/12", "loss", "exact match before", "exact match after", "of 8 held-out", "tokens/s"):
        assert text in done.stdout
    for text in ("updates            2 x embeddings ... head", "answer before training", "answer after training"):
        assert text in done.stdout
    assert done.stdout.count("step 12/12") == 1  # rank 0 alone speaks


def test_a_port_that_is_in_use_is_said(tmp_path: Path) -> None:
    """As with two launchers on one machine; the default port is the same for both."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        done = launch(2, arguments(tmp_path / "run"), port := other.getsockname()[1])
    printed = done.stdout + done.stderr
    assert done.returncode == 2 and printed.count(f"error: port {port} of this machine is in use") == 1, printed
    assert "--master_port" in printed and "Traceback" not in printed and not (tmp_path / "run").exists()


def test_mistake_is_said_once_by_two_ranks(tmp_path: Path) -> None:
    done = launch(2, arguments(tmp_path / "run", "training.max_stepz=3"))
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("training.max_stepz: unknown key") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
