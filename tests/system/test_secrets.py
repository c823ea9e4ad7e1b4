"""Secrets of the environment reach nothing that a run writes or prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ENVIRONMENT
from tests.launch.config.test_credentials import CANARIES
from tests.support.paths import REPOSITORY
from tests.support.training import arguments


def run(folder: Path, *settings: str) -> "subprocess.CompletedProcess[str]":
    script = str(Path(sys.executable).with_name("deepspeed"))
    command = [sys.executable, script, "--num_gpus", "1", "--master_port", "0", "launch/train.py"]
    # Where libraries keep things: all of it is searched.
    homes = {name: str(folder / "home") for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "WANDB_DATA_DIR", "TMPDIR")}
    (folder / "home").mkdir(parents=True)
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= homes | CANARIES | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments(folder / "run", *settings)], cwd=REPOSITORY, env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip


def hits(folder: Path, *texts: str) -> list[str]:
    """Where a canary stands: in any byte of any file, in a file's name, or in the texts."""
    found = [f"{name} in the output" for name, value in CANARIES.items() if any(value in text for text in texts)]
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found += [f"{name} in {path}" for name, value in CANARIES.items() if value.encode() in content]
        found += [f"{name} names {path}" for name, value in CANARIES.items() if value in str(path)]
    return found


FAILURES = {
    "good": [],
    "settings": ["training.max_stepz=3"],
    "model": ["model.config=null", "model.name_or_path=/dev/null", "model.tokenizer=null"],
    "traceback": ['deepspeed.flops_profiler={"enabled": true, "profile_step": 1, "output_file": "/proc/none/x"}'],
}


@pytest.mark.parametrize(
    "failure", ["good", *(pytest.param(f, marks=pytest.mark.slow) for f in ("traceback", "settings", "model"))]
)
def test_canaries(failure: str, tmp_path: Path) -> None:
    """A whole run with W&B and checkpoints, and runs that fail, with a secret in every variable."""
    common = ["logging.wandb=offline", "logging.verbose=true", "training.save_every=2", "training.max_steps=3"]
    done = run(tmp_path, *common, "data.eval_examples=0", *FAILURES[failure])
    assert (done.returncode == 0) == (failure == "good"), done.stderr
    if failure == "good":
        written = {path.relative_to(tmp_path / "run").parts[0] for path in (tmp_path / "run").rglob("*")}
        assert {"run.json", "summary.json", "metrics.jsonl", "wandb", "checkpoints", "model"} <= written
    assert ("Traceback" in done.stderr) == (failure == "traceback"), done.stderr
    assert hits(tmp_path, done.stdout, done.stderr) == []


def test_canaries_are_found_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"...{CANARIES['HF_TOKEN']}")
    (tmp_path / CANARIES["GH_TOKEN"]).mkdir()
    assert len(hits(tmp_path, CANARIES["WANDB_API_KEY"])) == 3
