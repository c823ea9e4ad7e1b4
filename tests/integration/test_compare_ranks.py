"""Comparisons on two ranks: the same scores as on one; what fails on one rank alone, and on both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hift_ds.evaluation.report.results import read_results
from tests.support.comparisons import MEZO, arguments, cells_of, environment_alone, lines, once
from tests.support.paths import REPOSITORY
from tests.support.ranks import free_port


@pytest.mark.parametrize(
    "methods", [("full", "hift", "mezo-lora"), pytest.param(("lora", *MEZO), marks=pytest.mark.slow)]
)
def test_two_ranks_score_as_one(methods: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    """The same micro-batches; ZeRO sums their gradients in another order, so losses agree up to rounding."""
    rows = [f"{{name: {name}, learning_rates: [1e-6]}}" if name in MEZO else name for name in methods]
    settings = [f"methods=[{', '.join(rows)}]", "tasks=[sst2]", "training.micro_batch_size=4"]
    found = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        result = once(arguments(data, out, *settings), ranks=ranks)
        assert result["code"] == 0, result["printed"]
        assert len(lines(out / "runs.jsonl")) == len(lines(out / "results.jsonl")) == len(rows)
        found.append(read_results(out / "results.jsonl"))
    for one, two in zip(*found, strict=True):
        assert (one["ranks"], two["ranks"]) == (1, 2)
        assert [one[key] for key in ("score", "metrics", "bootstrap", "steps", "tokens", "flops")] == [
            two[key] for key in ("score", "metrics", "bootstrap", "steps", "tokens", "flops")
        ]
        assert one["loss_last"] == pytest.approx(two["loss_last"], rel=1e-5)


ALONE = """
import os, signal, sys, time
from hift_ds.evaluation.compare import cell
from hift_ds.evaluation.compare import command as compare
train = cell.train
def one_fails(*arguments):
    WAY
    return train(*arguments)
cell.train = one_fails
sys.exit(compare.main(sys.argv[1:]))
"""
SECOND = 'if os.environ["RANK"] == "1":'
RAISES = f'{SECOND} raise RuntimeError("the other rank waits in its first collective")'
# The launcher ends the other rank then, which is in no collective and has heard of nothing.
DIES = f"{SECOND} os.kill(os.getpid(), signal.SIGKILL)\n    time.sleep(300)"


@pytest.mark.slow
@pytest.mark.parametrize("way", [RAISES, DIES], ids=["raises", "dies"])
def test_a_rank_that_fails_alone_ends_the_comparison(way: str, data: Path, tmp_path: Path) -> None:
    """Through the real launcher: nothing waits for a time-out, the cause is said, and the cell is tried again."""
    script = tmp_path / "alone.py"
    script.write_text(ALONE.replace("WAY", way))
    argv = arguments(data, tmp_path / "out", "methods=[zero-shot, full]", "tasks=[sst2]", "training.rank_timeout=60")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [sys.executable, launcher, "--num_gpus", "2", "--master_port", free_port(), str(script), *argv]
    environment = environment_alone()
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, timeout=400, text=True)
    assert done.returncode not in (0, 2), done.stdout
    if way == RAISES:
        assert "only some ranks failed; the same command tries this cell again" in done.stderr, done.stderr
        assert "the other rank waits in its first collective" in done.stderr
        assert "the other rank waits in its first collective" in (tmp_path / "out" / "logs" / "rank1.log").read_text()
    assert [one["label"] for one in lines(tmp_path / "out" / "runs.jsonl")] == ["zero-shot"]
    begun = lines(tmp_path / "out" / "begun.jsonl")
    assert len(begun) == 2 and not any(one.get("stopped") for one in begun)


def test_ranks_that_fail_alike_go_on(data: Path, tmp_path: Path) -> None:
    settings = ["methods=[{name: lora, learning_rates: [1e-3]}, full]", "tasks=[sst2]"]
    result = once(arguments(data, tmp_path, *settings), ranks=2, broken="lora")
    assert result["code"] == 1
    found = cells_of(tmp_path)
    assert found["lora", "sst2"]["reason"] == "OutOfMemoryError: out of memory"
    assert found["full", "sst2"]["status"] == "ok"
