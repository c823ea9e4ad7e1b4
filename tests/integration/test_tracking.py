"""A failing service or disk: a run loses W&B's records and nothing else, and stops where its own disk is full."""

import contextlib
import io
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from safetensors.torch import load_file

from hift_ds.launch.errors import UserError
from hift_ds.launch.runtime import outputs
from tests import ENVIRONMENT
from tests.support.paths import REPOSITORY
from tests.support.ranks import run_on_ranks
from tests.support.training import arguments, records, summary

SETTINGS = ("training.max_steps=7", "data.eval_examples=0")


def train_and_disturb(argv: Sequence[str], signal_to_wandb: int = 0, file_size: int | None = None) -> dict[str, Any]:
    """A run on this rank; after three steps W&B's process gets a signal, or files can grow no further."""
    from hift_ds.launch import train
    from hift_ds.launch.callbacks import records as log_records
    from hift_ds.launch.runtime import tracking

    record_step, limits = log_records.RunLog.step, resource.getrlimit(resource.RLIMIT_FSIZE)
    hit: list[int] = []

    def step(log: Any, record: dict[str, Any], *left: Any) -> None:
        record_step(log, record, *left)
        if record["step"] != 3:
            return
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, limits[1]))
        for child in psutil.Process().children() if signal_to_wandb else ():
            if "wandb" in child.name():
                child.send_signal(signal_to_wandb)
                hit.append(child.pid)

    printed = io.StringIO()
    try:
        with (
            mock.patch.object(log_records.RunLog, "step", step),
            mock.patch.object(tracking, "FINISH_SECONDS", 4.0),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            code = train.main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {"code": code, "printed": printed.getvalue(), "hit": hit}


def disturbed(out: Path, *settings: str, **disturbance: Any) -> dict[str, Any]:
    return run_on_ranks(1, train_and_disturb, arguments(out, *SETTINGS, *settings), **disturbance)[0]


def disturbed_alone(out: Path, *settings: str, signal_to_wandb: int) -> dict[str, Any]:
    """In a process of its own, which must come to its end as well: W&B has something to do at exit."""
    program = (
        "import json, sys; from tests.integration.test_tracking import train_and_disturb;"
        "from hift_ds.launch.runtime.process import world_of_one;"
        "world_of_one(); print(json.dumps(train_and_disturb(sys.argv[2:], int(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", program, str(signal_to_wandb), *arguments(out, *SETTINGS, *settings)]
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"printed": result["printed"] + done.stderr}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without W&B."""
    out = tmp_path_factory.mktemp("off") / "run"
    assert disturbed(out)["code"] == 0
    return out


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_wandbs_process_is_lost_in_the_middle(name: str, undisturbed: Path, tmp_path: Path) -> None:
    """Killed, or stopped so that it answers nothing any more: the weights are those of a run without W&B."""
    out = tmp_path / "run"
    result = disturbed_alone(out, "logging.wandb=offline", signal_to_wandb=getattr(signal, name))
    assert result["code"] == 0, result["printed"]
    (process,) = result["hit"]
    assert not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    assert result["printed"].count("warning: Weights & Biases") == 1, result["printed"]
    assert ("its process has ended" in result["printed"]) == (name == "SIGKILL")  # said at the next step
    assert "Traceback" not in result["printed"]
    assert same_weights(out, undisturbed) and load_file(out / "model" / "model.safetensors")
    assert [one["loss"] for one in records(out)] == [one["loss"] for one in records(undisturbed)]
    assert summary(out)["steps"] == 7


def test_a_full_disk_stops_the_run_with_the_files_name(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = disturbed(out, file_size=1)
    assert result["code"] == 2
    assert f"error: {out / 'metrics.jsonl'}: cannot be written" in result["printed"]
    assert "--resume" in result["printed"] and "Traceback" not in result["printed"]
    assert len(records(out)) == 3  # whole lines
    assert not (out / "model").exists() and not (out / "summary.json").exists()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    """Nothing can be made in /proc, whoever asks."""
    with pytest.raises(UserError, match="'/proc' cannot be written to"):
        outputs.check_writable(Path("/proc/hift/run"))
    settings = ["model.tokenizer=some-org/not-asked-for"]
    result = run_on_ranks(1, train_and_disturb, arguments(Path("/proc/hift/run"), *settings))[0]
    assert result["code"] == 2 and "output.dir: '/proc/hift/run'" in result["printed"]
    before = sorted(tmp_path.iterdir())
    outputs.check_writable(tmp_path / "a" / "b")
    assert sorted(tmp_path.iterdir()) == before
