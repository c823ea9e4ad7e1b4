"""Parsing a settings file imports no heavy library, and a run does not repeat bitsandbytes' warning at every start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ENVIRONMENT
from tests.support.paths import REPOSITORY

HEAVY = ("torch", "transformers", "deepspeed", "peft", "accelerate", "bitsandbytes", "datasets", "pandas")
LOAD = f"""
import sys
from hift_ds.launch.config.settings import load_settings
settings = load_settings(sys.argv[1], sys.argv[2:])
print(settings.training.max_steps, *sorted(set({HEAVY!r}) & set(sys.modules)))
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("config", ["tiny", "quickstart"])
def test_parsing_settings_imports_no_heavy_library(config: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    overrides = ["training.max_steps=7"]
    overrides += [f"model.name_or_path={tmp_path / 'model.gguf'}"] if config == "quickstart" else []
    done = run_python("-c", LOAD, f"configs/{config}.yaml", *overrides)
    assert done.stdout.split() == ["7"], done.stdout + done.stderr


def test_a_refused_setting_imports_no_heavy_library() -> None:
    done = run_python("-X", "importtime", "-c", LOAD, "configs/tiny.yaml", "training.max_steps=0", "method.name=lora")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "training.max_steps: got 0" in done.stderr
    assert "yaml" in imported and not imported.intersection(HEAVY)


AS_SCRIPT = """
import importlib.util, runpy, sys
sys.path[0], sys.argv = "launch", ["launch/train.py", "--help"]
try:
    runpy.run_path("launch/train.py", run_name="__main__")
except SystemExit as ended:
    assert not ended.code
print(*[name for name in ("runtime", "callbacks", "errors") if importlib.util.find_spec(name)])
print(*sorted({"torch", "peft", "bitsandbytes"}.intersection(sys.modules)))
"""


def test_the_training_script_hides_and_loads_no_library_of_others() -> None:
    """The rooms of launch/ are not importable at the top level, where `runtime` or `data` could be somebody else's.

    The import of bitsandbytes logs "Failed to load CPU gemm_4bit_forward ..." on some CPUs.
    """
    done = run_python("-c", AS_SCRIPT)
    assert done.returncode == 0 and "usage: launch/train.py" in done.stdout and "--config FILE" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["", "torch"], done.stdout


NOISY_PEFT = """
import logging
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "No module named 'kernels'")
logger.warning("another warning")
"""
IMPORT_PEFT = """
import logging
from hift_ds.launch.methods.adapters import import_peft
import_peft()
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward later")
"""


def test_importing_peft_hides_only_that_warning(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text(NOISY_PEFT)
    done = run_python("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{IMPORT_PEFT}")
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stderr.splitlines() if "gemm_4bit" in line or "another" in line]
    assert shown == ["another warning", "Failed to load CPU gemm_4bit_forward later"]
