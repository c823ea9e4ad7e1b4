"""Secrets of the environment reach nothing that a run writes or prints, and settings that hold one are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hift_ds.launch.config import credentials
from hift_ds.launch.config.settings import load_settings
from hift_ds.launch.errors import UserError
from tests import ENVIRONMENT
from tests.support.paths import REPOSITORY
from tests.support.training import TINY, arguments

# All that the program and its libraries read; an endpoint's key may have any name (--key-env).
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "COMET_API_KEY",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GH_TOKEN", "JUDGE_PASSWORD",
)  # fmt: skip
CANARIES = {name: f"{number:02}canary{'c0ffee' * 6}"[:40] for number, name in enumerate(VARIABLES)}


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
    "failure", ["good", "traceback", *(pytest.param(f, marks=pytest.mark.slow) for f in ("settings", "model"))]
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


@pytest.mark.parametrize(
    "override",
    [
        "deepspeed.comet.api_key=abc",
        "deepspeed.wandb={enabled: true, token: abcdefgh}",
        "logging.wandb_api_key=abc",
        "model.config.hf_token=abc",
        "model.name_or_path=hf_abcdefghijklmnopqrstuvwxyz012345",
        "data.path=https://me:swordfish@example.org/x.jsonl",
        "training.max_steps={secret}",
        "logging.wandb_name=run of {secret}",
    ],
)
def test_settings_that_hold_a_secret_are_refused(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    override = override.replace("{secret}", CANARIES["HF_TOKEN"])
    with pytest.raises(UserError, match="Remove it.*environment") as raised:
        load_settings(TINY, [override])
    message = str(raised.value)
    assert override.partition("=")[0].split(".")[-1] in message or "wandb" in message
    for secret in (CANARIES["HF_TOKEN"], "abc", "hf_abc", "swordfish"):
        assert secret not in message


def test_what_only_looks_alike_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ids, a commit, an address without a password, and a variable with a word as its value."""
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "tiny.yaml and more")
    node = {
        "model": {
            "config": {"pad_token_id": 0, "eos_token": "</s>"},
            "tokenizer": "byte",
            "revision": "0123456789" * 4,
        },
        "data": {"path": "https://example.org/EMPTY", "columns": {"prompt": "token_count"}},
        "api_key": None,
    }
    assert credentials.problems(node) == []
    assert credentials.redacted("EMPTY tiny.yaml and more") == "EMPTY tiny.yaml and more"


def test_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abcdefgh")
    monkeypatch.setenv("WANDB_API_KEY", "abcdefgh-and-longer")
    text = "1 abcdefgh-and-longer 2 abcdefgh 3 http://user:pass@proxy:8080 4"
    assert credentials.redacted(text) == "1 [WANDB_API_KEY] 2 [HF_TOKEN] 3 http://[removed]@proxy:8080 4"


def test_a_traceback_is_shown_without(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    try:
        raise RuntimeError(f"refused: {os.environ['HF_TOKEN']}")
    except RuntimeError as error:
        credentials.print_redacted(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    assert "RuntimeError: refused: [HF_TOKEN]" in shown and shown.startswith("Traceback")
