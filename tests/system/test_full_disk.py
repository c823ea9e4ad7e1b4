"""A disk that fills up while two ranks save: the old checkpoint stays, both ranks end, and the run continues later.

``tests/hift_ds/checkpoint/test_store.py`` lets each operation of a save fail in turn.
"""

import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from hift_ds.checkpoint import store
from tests.support.jobs import Job, alive
from tests.support.training import records, run_tiny, summary

SETTINGS = ("data.eval_examples=0", "training.max_steps=12", "training.save_every=4", "training.keep_last=null")


def full_disks() -> list[tuple[str, int, int]]:
    """Method, ZeRO stage and KiB of a file system with room for none to five checkpoints of the tiny model."""
    rng = random.Random(5)
    return [(("hift", "full")[i % 2], rng.choice((1, 2, 3)), rng.randrange(2500, 9000)) for i in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stage", "size"), full_disks())
def test_a_full_disk_keeps_the_old_checkpoint(method: str, stage: int, size: int, tmp_path: Path) -> None:
    """Both ranks end within a minute, through the launcher, and the run continues when there is room."""
    out = tmp_path / "run"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(out)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        zero = f"deepspeed.zero_optimization.stage={stage}"
        settings = (*SETTINGS, "output.export=false", f"method.name={method}", zero)
        with Job(out, 2, *settings, "training.save_every=1") as job:
            job.wait_for_step(1)
            ranks = [job.rank(0), job.rank(1)]
            assert job.code(300) == 2, job.text()
            since = time.time() - (out / "metrics.jsonl").stat().st_mtime
            assert not any(alive(rank) for rank in ranks)
        assert since < 60, f"ended {since:.0f} s after the last step"
        print(f"full after {len(records(out))} steps, ended {since:.1f} s after the last one")
        assert "could not be saved" in job.text() and "No space left" in job.text(), job.text()
        found = store.find(out / "checkpoints")
        assert (found.about["step"] if found else 0) == len(records(out)) - 1
        assert not list((out / "checkpoints").glob(".saving-*"))
        subprocess.run(["mount", "-o", "remount,size=50m", str(out)], check=True)
        resumed = run_tiny(2, out, *settings, resume="yes" if found else "auto")
        assert resumed["code"] == 0 and summary(out)["steps"] == 12, resumed["printed"]
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)
