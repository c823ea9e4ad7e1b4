"""The examples outside the repository, with what the wheel installs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import ENVIRONMENT
from tests.support.integrations import model_folder, rows_file
from tests.support.paths import REPOSITORY
from tests.support.ranks import free_port

# At the end of each process: where the modules of hift_ds were, and whether the repository was on the path. The
# repository is installed in the environment of the tests, too.
NOTE = f"""
import atexit, os, pathlib, sys
def note():
    files = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "hift_ds"]
    files += [one for one in sys.path if os.path.abspath(one) == {str(REPOSITORY)!r}]
    pathlib.Path(__file__).with_name(f"{{os.getpid()}}.txt").write_text("\\n".join(files))
atexit.register(note)
"""
LAUNCHERS = {
    "deepspeed": ["--num_gpus", "1", "--master_port", "PORT"],
    "deepspeed, two ranks": ["--num_gpus", "2", "--master_port", "PORT"],
    "torchrun": ["--nproc_per_node", "1", "--master_port", "PORT"],
    "accelerate": ["launch", "--use_deepspeed", "--num_processes", "1", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "PORT"],
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files where it runs
    for name in ("hift_ds", "launch", "evaluation", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    return folder / "site"


def run(launcher: str, script: str, site: Path, folder: Path, *columns: str, chat: bool = False) -> list[list[str]]:
    """Run an example of the examples' folder in `folder`; for each process that ended, where its modules were."""
    shutil.copytree(REPOSITORY / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "notes").mkdir()
    (folder / "notes" / "sitecustomize.py").write_text(NOTE)
    model_folder(folder / "start")
    rows_file(folder / "rows.jsonl", *columns, chat=chat)
    program = str(Path(sys.executable).with_name(launcher.partition(",")[0]))
    options = [free_port() if one == "PORT" else one for one in LAUNCHERS[launcher]]
    command = [sys.executable, program, *options, f"examples/{script}"]
    command += ["--model", "start", "--data", "rows.jsonl", "--output", "end"]
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in unset}
    environment |= {"PYTHONPATH": f"{folder / 'notes'}:{site}", "HF_HOME": str(folder / "cache")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [note.read_text().splitlines() for note in (folder / "notes").glob("*.txt")]


@pytest.mark.parametrize(
    "launcher", [pytest.param(one, marks=pytest.mark.slow if number else ()) for number, one in enumerate(LAUNCHERS)]
)
def test_the_trainer_s_example_runs_with_the_wheel(launcher: str, site: Path, tmp_path: Path) -> None:
    notes = run(launcher, "trainer.py", site, tmp_path)
    ranks = [files for files in notes if str(site / "hift_ds" / "engine.py") in files]
    assert len(ranks) == (2 if "two" in launcher else 1)
    assert [file for files in notes for file in files if not file.startswith(f"{site}/hift_ds/")] == []
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "end"))
    assert start.keys() == end.keys() and not any(torch.equal(start[name], end[name]) for name in start)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed"])  # with two ranks on CPUs, accelerate gathers as NCCL would
@pytest.mark.parametrize(
    ("script", "columns"),
    [
        ("sft.py", ("prompt", "completion")),
        ("dpo.py", ("prompt", "chosen", "rejected")),
        ("grpo.py", ("prompt",)),
        ("reward.py", ("prompt", "chosen", "rejected")),
    ],
)
def test_the_examples_of_trl_run_with_the_wheel(
    script: str, columns: tuple[str, ...], launcher: str, site: Path, tmp_path: Path
) -> None:
    notes = run(launcher, script, site, tmp_path, *columns, chat=True)
    ranks = [files for files in notes if str(site / "hift_ds" / "engine.py") in files]
    assert len(ranks) == 1
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "end"))
    assert start.keys() - {"lm_head.weight"} == end.keys() - {"lm_head.weight", "score.weight"}
    (log,) = (tmp_path / "end").glob("checkpoint-*/trainer_state.json")
    blocks = [step["hift/block"] for step in json.loads(log.read_text())["log_history"] if "hift/block" in step]
    assert blocks and all(block == step % 5 for step, block in enumerate(blocks))
