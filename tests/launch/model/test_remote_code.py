"""Code that comes with a model is run only if it is asked for by name, and revisions of the Hub can be pinned."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from hift_ds.launch.config.settings import load_settings
from hift_ds.launch.errors import UserError
from hift_ds.launch.model import loading
from hift_ds.launch.model.settings import ModelSettings
from hift_ds.launch.model.tokenizer import byte_tokenizer
from tests import ENVIRONMENT
from tests.support.paths import REPOSITORY
from tests.support.training import TINY

CODE = {
    "configuration_strange.py": """
from pathlib import Path
from transformers import LlamaConfig
Path({ran!r}).touch()
class StrangeConfig(LlamaConfig):
    model_type = "strange"
""",
    "modeling_strange.py": """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_strange import StrangeConfig
Path({ran!r}).touch()
class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
""",
    "tokenization_strange.py": """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({ran!r}).touch()
class StrangeTokenizer(PreTrainedTokenizerFast):
    pass
""",
}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 262,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose config, model and tokenizer are code of its own; `ran` appears when any of it is run."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name, code in CODE.items():
        (folder / name).write_text(code.format(ran=str(tmp_path / "ran")))
    edit(folder / "config.json", model_type="strange", auto_map={
        "AutoConfig": "configuration_strange.StrangeConfig",
        "AutoModelForCausalLM": "modeling_strange.StrangeForCausalLM",
    })  # fmt: skip
    edit(folder / "tokenizer_config.json", tokenizer_class="StrangeTokenizer",
         auto_map={"AutoTokenizer": [None, "tokenization_strange.StrangeTokenizer"]})  # fmt: skip
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("load", [loading.load_tokenizer, lambda settings: loading.load_config(settings, None, None)])
def test_code_of_a_model_is_not_run(load: Any, folder: Path, tmp_path: Path) -> None:
    settings = ModelSettings(name_or_path=str(folder))
    with pytest.raises(UserError, match="model.name_or_path.*was not run.*model.trust_remote_code=true") as raised:
        load(settings)
    assert str(folder) in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_known_architecture_is_not_needed_and_not_run(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", model_type="llama")
    settings = ModelSettings(name_or_path=str(folder), tokenizer="byte")
    config = loading.load_config(settings, loading.load_tokenizer(settings), None)
    loading.skeleton(settings, config)
    assert type(loading.load_model(settings, config, "float32")).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_code_that_is_asked_for_is_run(folder: Path, tmp_path: Path) -> None:
    settings = ModelSettings(name_or_path=str(folder), trust_remote_code=True)
    config = loading.load_config(settings, loading.load_tokenizer(settings), None)
    assert type(loading.load_model(settings, config, "float32")).__name__ == "StrangeForCausalLM"
    assert (tmp_path / "ran").exists()


def test_the_command_line_tells_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hift_ds.launch import train

    source = f"model={json.dumps({'name_or_path': str(folder)})}"
    argv = ["--config", TINY, "--set", source, "--set", f"output.dir={tmp_path / 'run'}"]
    before = dict(os.environ)
    try:
        assert train.main(argv) == 2
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert "model.trust_remote_code=true" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


# ---- revisions -----------------------------------------------------------------------------------------------------

PINNED = """
import sys
from hift_ds.launch.model import loading
from hift_ds.launch.model.settings import ModelSettings
for revision in (None, sys.argv[1], sys.argv[2]):
    settings = ModelSettings(name_or_path="some-org/some-model", revision=revision)
    config = loading.load_config(settings, loading.load_tokenizer(settings), None)
    at = f"@{revision}" if revision else ""
    other = ModelSettings(name_or_path="some-org/some-model", tokenizer=f"some-org/some-model{at}")
    tokenizers = loading.load_tokenizer(settings), loading.load_tokenizer(other)
    print(config.hidden_size, *(one.model_max_length for one in tokenizers))
"""


def test_revisions_are_what_is_loaded(tmp_path: Path) -> None:
    """A cache of the Hub with two commits of a model, the second of which is main; without the network."""
    repository = tmp_path / "hub" / "models--some-org--some-model"
    commits = ["a" * 40, "b" * 40]
    for size, commit in zip((16, 32), commits, strict=True):
        snapshot = repository / "snapshots" / commit
        AutoConfig.for_model("llama", **SIZES | {"hidden_size": size}).save_pretrained(snapshot)
        tokenizer = byte_tokenizer()
        tokenizer.model_max_length = size
        tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[1])
    environment = ENVIRONMENT | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", PINNED, *commits]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["32 32 32", "16 16 16", "32 32 32"], done.stderr


def test_a_revision_of_something_local_is_refused(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model.revision: 'main' is for models from the Hub"):
        load_settings(TINY, ["model.revision=main"])
    with pytest.raises(UserError, match="model.revision: 'main' is for models from the Hub"):
        load_settings(TINY, [f"model={json.dumps({'name_or_path': str(tmp_path), 'revision': 'main'})}"])
