"""The command of the README through DeepSpeed's launcher, on one and two ranks."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ENVIRONMENT
from tests.support.jobs import launch
from tests.support.paths import REPOSITORY
from tests.support.ranks import free_port
from tests.support.training import SHORT, arguments, records, summary

STAGES = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [pytest.param(r, s, marks=() if (r, s) == (2, 3) else pytest.mark.slow) for r in (1, 2) for s in STAGES],
)
def test_through_the_launcher(ranks: int, stage: int, tmp_path: Path) -> None:
    """The command of the README; by default with two ranks at the hardest ZeRO stage."""
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


@pytest.mark.slow
def test_a_port_that_is_in_use_is_said(tmp_path: Path) -> None:
    """As with two launchers on one machine; the default port is the same for both."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        done = launch(2, arguments(tmp_path / "run"), port := other.getsockname()[1])
    printed = done.stdout + done.stderr
    assert done.returncode == 2 and printed.count(f"error: port {port} of this machine is in use") == 1, printed
    assert "--master_port" in printed and "Traceback" not in printed and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_mistake_is_said_once_by_two_ranks(tmp_path: Path) -> None:
    done = launch(2, arguments(tmp_path / "run", "training.max_stepz=3"))
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("training.max_stepz: unknown key") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_script_without_the_launcher_is_told_so() -> None:
    """DeepSpeed would ask for mpi4py."""
    if importlib.util.find_spec("mpi4py"):
        pytest.skip("with mpi4py, DeepSpeed makes a world of one rank")
    lines = "import hift_ds, torch; hift_ds.initialize(model=torch.nn.Linear(2, 2), config={'train_batch_size': 1})"
    outside = {name: v for name, v in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", lines], env=outside, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and "deepspeed --num_gpus 1 script.py" in done.stderr.splitlines()[-1]


APART = """
import os, sys
sys.path[0] = {repository!r}
os.environ["HOME"] = {home!r} + os.environ["RANK"]
os.environ["LOCAL_RANK"] = "0"
from hift_ds.launch.train import command
command()
"""


def launch_apart(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Two ranks under the launcher, each as on a machine of its own, with another home folder."""
    script = tmp_path / "apart.py"
    script.write_text(APART.format(repository=str(REPOSITORY), home=str(tmp_path / "home")))
    return launch(2, arguments(Path("~/run"), *SHORT, *overrides, resume="auto"), script=str(script))


@pytest.mark.slow
def test_ranks_that_see_different_files_do_not_part(tmp_path: Path) -> None:
    """Rank 1 sees checkpoints of an earlier run, rank 0 none, and each sees other rows: one error, and no hang."""
    for rank in (0, 1):
        home = tmp_path / f"home{rank}"
        (home / "run" / "checkpoints").mkdir(parents=True)
        (home / "rows.jsonl").write_text(f'{{"prompt": "a", "completion": "{rank}"}}\n' * 8)
    (tmp_path / "home1" / "run" / "checkpoints" / "latest").write_text("step2")
    own = ("data.name=jsonl", "data.path=~/rows.jsonl", "data.train_examples=null")
    done = launch_apart(tmp_path, *own)
    printed = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in printed, printed
    assert printed.count("error: the ranks have different data") == 1 and "train sha256: rank 1 has" in printed
    assert not (tmp_path / "home0" / "run" / "run.json").exists()


@pytest.mark.slow
def test_ranks_that_see_different_checkpoints_do_as_rank_0_does(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"home{rank}" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "home1" / "run" / "checkpoints" / "latest").write_text("step2")
    done = launch_apart(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no checkpoint yet; the run begins at its first step" in done.stdout
    assert summary(tmp_path / "home0" / "run")["steps"] == 2


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """Another launcher: it sets LOCAL_WORLD_SIZE and not LOCAL_SIZE."""
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2", "--master_port", free_port()]
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in unset}
    argv = [*command, "launch/train.py", *arguments(tmp_path / "run", *SHORT)]
    done = subprocess.run(argv, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path / "run")["ranks"] == 2
