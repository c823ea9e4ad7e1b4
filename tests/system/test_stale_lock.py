"""A run starts although a killed process left the lock of an extension."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hift_ds.launch.runtime import extensions
from tests import ENVIRONMENT
from tests.support.paths import REPOSITORY


@pytest.mark.slow
def test_a_run_with_a_stale_lock_does_not_hang(folder: Path) -> None:
    """A whole run, whose communication is such an extension; the folder is a copy of the tests' own, with a lock."""
    built = Path(ENVIRONMENT.get("TORCH_EXTENSIONS_DIR") or extensions.get_default_build_root())
    shutil.rmtree(folder)
    if built.exists():
        ignored = shutil.ignore_patterns("lock", "cpu_adam", "fused_adam")
        shutil.copytree(built, folder, ignore=ignored)
    lock = folder / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    settings = [f"output.dir={folder / 'run'}", "training.max_steps=1", "data.eval_examples=0", "output.export=false"]
    command = [sys.executable, "launch/train.py", "--config", "configs/tiny.yaml"]
    command += [part for one in settings for part in ("--set", one)]
    environment = ENVIRONMENT | {"TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"deleted {lock}" in done.stderr and not lock.exists()
