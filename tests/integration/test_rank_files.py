"""Ranks that see different files, as on machines with drives of their own: they decide alike and end alike."""

import contextlib
import io
import json
import os
import shutil
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.ranks import run_on_ranks
from tests.support.training import SHORT, TINY, arguments, run_tiny

ROW = '{"prompt": "What is 3 + 4?", "completion": "7"}\n'


def train_at_home(argv: Sequence[str], homes: Sequence[str]) -> tuple[int, str]:
    """In a rank: the command with `~` as a folder of this rank's own; its exit code and what it printed."""
    from hift_ds.launch import train
    from hift_ds.launch.runtime import process

    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, HOME=homes[int(os.environ["RANK"])], LOCAL_RANK="0"),
        mock.patch.object(process, "time", types.SimpleNamespace(sleep=lambda seconds: None)),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        code = train.main(list(argv))
    return code, printed.getvalue()


@pytest.fixture
def homes(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "home0", tmp_path / "home1"]
    for home in made:
        home.mkdir()
    return made


def train(homes: Sequence[Path], *overrides: str, **resume: Any) -> tuple[list[int], str]:
    argv = arguments(Path("~/run"), *SHORT, *overrides, **resume)
    answers = run_on_ranks(2, train_at_home, argv, [str(home) for home in homes])
    return [code for code, _ in answers], answers[0][1]


OWN = ("data.name=jsonl", "data.path=~/rows.jsonl", "data.train_examples=null")


def files_of(homes: Sequence[Path]) -> set[str]:
    return {path.relative_to(homes[0].parent).as_posix() for home in homes for path in home.rglob("*")}


@pytest.mark.parametrize(
    ("rank1", "message"),
    [
        (ROW * 7 + ROW.replace("7", "8"), "train sha256: rank 1 has "),
        (ROW * 9, "train used: rank 1 has 9, rank 0 has 8"),
        (ROW * 7 + "{", "rank 1: ~/rows.jsonl:8: broken JSON"),
    ],
)
def test_other_rows_are_refused_on_all_ranks(rank1: str, message: str, homes: list[Path]) -> None:
    (homes[0] / "rows.jsonl").write_text(ROW * 8)
    (homes[1] / "rows.jsonl").write_text(rank1)
    before = files_of(homes)
    codes, printed = train(homes, *OWN)
    assert codes == [2, 2] and message in printed.replace(str(homes[1]), "~") and "Traceback" not in printed, printed
    assert files_of(homes) == before


def test_other_settings_are_refused(homes: list[Path]) -> None:
    for home, seed in zip(homes, (0, 1), strict=True):
        (home / "run.yaml").write_text(Path(TINY).read_text().replace("seed: 0", f"seed: {seed}"))
    argv = arguments(Path("~/run"), *SHORT)
    argv[argv.index(TINY)] = "~/run.yaml"
    (code0, printed), (code1, _) = run_on_ranks(2, train_at_home, argv, [str(home) for home in homes])
    assert (code0, code1) == (2, 2)
    assert "training.seed: rank 1 has 1, rank 0 has 0" in printed and "same YAML" in printed


def save_llama(folder: Path, layers: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from hift_ds.launch.model.tokenizer import byte_tokenizer

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=262, num_hidden_layers=layers, max_position_embeddings=512, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def test_other_models_are_refused(homes: list[Path]) -> None:
    for home, layers in zip(homes, (2, 3), strict=True):
        save_llama(home / "model", layers)
    model = ("model.config=null", "model.tokenizer=null", "model.name_or_path=~/model")
    codes, printed = train(homes, *model)
    assert codes == [2, 2] and "num_hidden_layers: rank 1 has 3, rank 0 has 2" in printed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks and two steps with a checkpoint of each."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run_tiny(2, out, *SHORT, "training.save_every=1")["code"] == 0
    return out


@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("resume", [None, "auto", "yes"])
def test_rank_0_decides_about_the_output_folder(
    owner: int, resume: str | None, homes: list[Path], finished: Path
) -> None:
    """Only one rank sees the earlier run. Rank 0 sends the path of the checkpoint, which rank 1 can read here."""
    shutil.copytree(finished, homes[owner] / "run")
    codes, printed = train(homes, "training.max_steps=3", "training.save_every=null", resume=resume)
    refused = {(0, None): "already holds a run", (1, "yes"): "there is no checkpoint to continue from"}
    if expected := refused.get((owner, resume)):
        assert codes == [2, 2] and expected in printed, printed
        return
    assert codes == [0, 0], printed
    assert ("the run continues after step 2" in printed) == (owner == 0)
    assert json.loads((homes[0] / "run" / "summary.json").read_text())["steps"] == 3


def test_rank_0_decides_that_a_run_is_finished(homes: list[Path], finished: Path) -> None:
    shutil.copytree(finished, homes[0] / "run")
    codes, printed = train(homes, resume="yes")
    assert codes == [0, 0] and "this run is finished after 2 steps" in printed
