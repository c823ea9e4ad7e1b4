"""`launch/quickstart.py` where the package index cannot be reached."""

import json
import subprocess
import sys
from pathlib import Path

from hift_ds.launch import quickstart
from tests import ENVIRONMENT
from tests.support.paths import REPOSITORY


def test_without_the_wheel_it_says_so_and_takes_a_small_model(tmp_path: Path) -> None:
    settings = {"output.dir": tmp_path / "run", "training.max_steps": 2, "data.eval_examples": 0}
    command = [sys.executable, "launch/quickstart.py"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = ENVIRONMENT | {"PIP_NO_INDEX": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"pip could not download {quickstart.PACKAGE}" in done.stderr
    assert "a tiny model from scratch (configs/tiny.yaml)" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["model"] == "llama from scratch"
    assert list((tmp_path / "cache" / "hift_ds").iterdir()) == []
