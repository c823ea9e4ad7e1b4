"""training.deterministic: the same bits again, and a clear message where an operation has no deterministic kernel."""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hift_ds.launch.errors import UserError
from hift_ds.launch.runtime.determinism import deterministic
from tests.support.comparisons import TINY as COMPARE_TINY
from tests.support.comparisons import write_data
from tests.support.ranks import run_on_ranks
from tests.support.training import arguments, records

SETTINGS = ("training.deterministic=true", "training.max_steps=6", "data.eval_examples=0")


def train_deterministically(argv: Sequence[str], with_put: bool = False, compare: bool = False) -> dict[str, Any]:
    """A run or a comparison on this rank; `with_put`: of a model with an operation that has no deterministic kernel."""
    import hift_ds.evaluation.compare.command
    from hift_ds.launch import train
    from hift_ds.launch.model import loading

    load, seen = loading.load_model, {}

    def put(*_: Any) -> None:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    def load_model(*args: Any) -> Any:
        model = load(*args)
        seen["mode"] = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
        seen["workspace"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        if with_put:
            model.register_forward_pre_hook(put)
        return model

    printed = io.StringIO()
    with mock.patch.object(loading, "load_model", load_model), contextlib.redirect_stderr(printed):
        with contextlib.redirect_stdout(io.StringIO()):
            code = (hift_ds.evaluation.compare.command if compare else train).main(argv)
    return {"code": code, "printed": printed.getvalue(), "after": torch.are_deterministic_algorithms_enabled(), **seen}


def run(out: Path, *settings: str, ranks: int = 1, **options: Any) -> dict[str, Any]:
    return run_on_ranks(ranks, train_deterministically, arguments(out, *SETTINGS, *settings), **options)[0]


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_two_runs_are_the_same_bits(ranks: int, stage: int, tmp_path: Path) -> None:
    settings = [f"deepspeed.zero_optimization.stage={stage}", "model.config.attention_dropout=0.1"]
    for name in ("one", "other"):
        result = run(tmp_path / name, *settings, ranks=ranks)
        assert result["code"] == 0, result["printed"]
        assert result["mode"] == (True, True) and result["workspace"] == ":4096:8"
        assert not result["after"]
    one, other = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
    kept = ("loss", "grad_norm")
    losses = [[[r[key] for key in kept] for r in records(tmp_path / name)] for name in ("one", "other")]
    assert losses[0] == losses[1]


def test_an_operation_without_a_deterministic_kernel(tmp_path: Path) -> None:
    result = run(tmp_path / "run", with_put=True)
    assert result["code"] == 2
    assert "error: training.deterministic: put_ does not have a deterministic implementation" in result["printed"]
    assert "Set training.deterministic=false" in result["printed"] and "Traceback" not in result["printed"]
    assert run(tmp_path / "off", "training.deterministic=false", with_put=True)["code"] == 0


def test_a_comparison(tmp_path: Path) -> None:
    """The setting holds in its trainings too."""
    settings = ["training.deterministic=true", "methods=[full]", "tasks=[sst2]", "evaluation.bootstrap=50"]
    settings += [f"data.path={write_data(tmp_path / 'data')}", f"output.dir={tmp_path / 'run'}"]
    argv = ["--config", COMPARE_TINY, *(part for one in settings for part in ("--set", one))]
    result = run_on_ranks(1, train_deterministically, argv, with_put=True, compare=True)[0]
    assert result["mode"] == (True, True) and not result["after"]
    (cell,) = map(json.loads, (tmp_path / "run" / "results.jsonl").read_text().splitlines())
    assert cell["status"] == "failed" and cell["reason"].startswith("training.deterministic: put_ does not have")


def test_other_errors_and_other_modes_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="something else"), deterministic(True):
        raise RuntimeError("something else")
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(UserError, match="training.deterministic"), deterministic(True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert not torch.are_deterministic_algorithms_enabled()
