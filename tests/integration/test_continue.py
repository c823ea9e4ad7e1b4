"""A run that meets a damaged checkpoint or a second writer: what it does and what it prints."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest

from hift_ds.checkpoint import command, store
from hift_ds.launch.callbacks import checkpoints
from hift_ds.launch.config.settings import load_settings
from hift_ds.launch.runtime.outputs import claim
from tests.support.paths import REPOSITORY
from tests.support.training import records, run_tiny

SETTINGS = ("data.eval_examples=0", "training.max_steps=12", "training.save_every=4", "training.keep_last=null")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the exported weights of a run that nothing happened to."""
    return run_tiny(1, tmp_path_factory.mktemp("straight") / "run", *SETTINGS)["digest"]


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that died after step 10 of 12, with checkpoints of steps 4 and 8."""
    out = tmp_path / "run"
    assert run_tiny(1, out, *SETTINGS, stop_after=10)["code"] is None
    return out


def damage(out: Path, tag: str) -> None:
    path = next((out / "checkpoints" / tag).glob("*model_states.pt"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_whole_checkpoint_is_used(stopped: Path, straight: str) -> None:
    damage(stopped, "step8")
    (stopped / "checkpoints" / "latest").write_text("../elsewhere")
    resumed = run_tiny(1, stopped, *SETTINGS, resume="auto")
    assert resumed["code"] == 0 and resumed["digest"] == straight
    assert "continues after step 4" in resumed["printed"]
    assert [record["step"] for record in records(stopped)] == list(range(1, 13))
    assert command.main(["verify", str(stopped / "checkpoints")]) == 0  # step8 is a new one


@pytest.mark.parametrize("resume", ["yes", "auto"])
def test_without_a_whole_one_nothing_is_begun(stopped: Path, resume: str) -> None:
    for tag in ("step4", "step8"):
        damage(stopped, tag)
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    refused = run_tiny(1, stopped, *SETTINGS, resume=resume)
    assert refused["code"] == 2 and "step8" in refused["printed"] and "step4" in refused["printed"]
    assert "damaged" in refused["printed"] and "Nothing was changed" in refused["printed"]
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_checkpoints_that_are_gone_are_missed(stopped: Path) -> None:
    shutil.rmtree(stopped / "checkpoints")
    for resume in ("yes", "auto"):
        refused = run_tiny(1, stopped, *SETTINGS, resume=resume)
        assert refused["code"] == 2 and "has none" in refused["printed"], refused["printed"]
    assert len(records(stopped)) == 10


def test_another_kind_of_run_is_refused_by_name(tmp_path: Path) -> None:
    """Told before anything is loaded."""
    out = tmp_path / "run"
    full = (*SETTINGS, "method.name=full")
    run_tiny(2, out, *full, "training.max_steps=4")
    for ranks, setting, name in (
        (1, "training.seed=0", "number of ranks: the run has 2, these settings have 1"),
        (2, "deepspeed.zero_optimization.stage=3", "zero_optimization.stage: the run has 2, these settings have 3"),
        (2, "deepspeed.hift.strategy=top2down", "deepspeed.hift.strategy: the run has nothing, these"),
        (2, "training.batch_size=8", "training.batch_size: the run has 4, these settings have 8"),
    ):
        refused = run_tiny(ranks, out, *full, setting, resume="yes")
        assert refused["code"] == 2 and name in refused["printed"], refused["printed"]
    assert len(records(out)) == 4


def test_the_model_may_be_at_another_path(tmp_path: Path) -> None:
    """It is known by its configuration and tokenizer; the weights are those of the checkpoint."""
    run_tiny(1, tmp_path / "made", *SETTINGS, "training.max_steps=1")
    model, moved = tmp_path / "made" / "model", tmp_path / "moved"
    own = (*SETTINGS, "model.config=null", "model.tokenizer=null", f"model.name_or_path={model}")
    straight = run_tiny(1, tmp_path / "straight", *own)["digest"]
    out = tmp_path / "run"
    assert run_tiny(1, out, *own, stop_after=6)["code"] is None
    model.rename(moved)
    resumed = run_tiny(
        1, out, *own[:-1], f"model.name_or_path={moved}", "deepspeed.hift.offload.master=fp32", resume="yes"
    )
    assert resumed["code"] == 0 and resumed["digest"] == straight, resumed["printed"]
    assert "offload.master fp32 (before: default)" in resumed["printed"]
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    refused = run_tiny(1, out, *own[:-1], f"model.name_or_path={moved}", "training.max_steps=16", resume="yes")
    assert refused["code"] == 2 and "configuration of the model" in refused["printed"]


def test_mezo_continues_on_another_number_of_ranks(tmp_path: Path) -> None:
    """All ranks hold the same; only the sum of the losses is rounded otherwise."""
    settings = (*SETTINGS, "method.name=mezo", "training.learning_rate=1e-5", "training.max_steps=8")
    out = tmp_path / "run"
    assert run_tiny(2, out, *settings, "training.max_steps=4")["code"] == 0
    resumed = run_tiny(1, out, *settings, resume="yes")
    assert resumed["code"] == 0 and "ranks 1 (before: 2)" in resumed["printed"], resumed["printed"]
    straight = run_tiny(1, tmp_path / "straight", *settings)["digest"]
    assert resumed["digest"] == pytest.approx(straight, rel=1e-4, abs=1e-4)
    losses = [[record["loss"] for record in records(path)] for path in (out, tmp_path / "straight")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_old_checkpoints_are_deleted(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ("data.eval_examples=0", "training.max_steps=10", "training.save_every=1", "training.keep_every=4")
    assert run_tiny(1, out, *settings)["code"] == 0
    kept = sorted(path.name for path in (out / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["step10", "step4", "step8", "step9"]


def test_a_second_run_in_the_same_folder_is_refused(stopped: Path) -> None:
    lock = claim(stopped)
    for resume, more in (("auto", ()), (None, ("output.overwrite=true",)), (None, ())):
        refused = run_tiny(1, stopped, *SETTINGS, *more, resume=resume)
        assert refused["code"] == 2 and f"process {os.getpid()} " in refused["printed"], refused["printed"]
    assert len(records(stopped)) == 10
    lock.release()
    assert run_tiny(1, stopped, *SETTINGS, resume="auto")["code"] == 0


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """The new one is there, and training goes on; on one rank, so that no other would wait for it."""
    engine = mock.Mock()
    settings = load_settings(str(REPOSITORY / "configs" / "tiny.yaml"), ["output.dir=runs/none"], 1)
    prune = mock.patch.object(store, "prune", side_effect=OSError("a device error"))
    with mock.patch.object(checkpoints, "dist", get_rank=lambda: 0), prune:
        checkpoints.Checkpoints(engine, settings).save(4)
    engine.save_checkpoint.assert_called_once()
    assert "could not be deleted: a device error" in capsys.readouterr().err
