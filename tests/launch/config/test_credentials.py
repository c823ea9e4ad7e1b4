"""Secrets of the environment reach nothing that a run writes or prints, and settings that hold one are refused."""

import os

import pytest

from hift_ds.launch.config import credentials
from hift_ds.launch.config.settings import load_settings
from hift_ds.launch.errors import UserError
from tests.support.training import TINY

# All that the program and its libraries read; an endpoint's key may have any name (--key-env).
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "COMET_API_KEY",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GH_TOKEN", "JUDGE_PASSWORD",
)  # fmt: skip
CANARIES = {name: f"{number:02}canary{'c0ffee' * 6}"[:40] for number, name in enumerate(VARIABLES)}


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
