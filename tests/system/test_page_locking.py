"""The launcher under a limit of locked memory, on two ranks: said once, before weights are read."""

import functools
from pathlib import Path

import pytest

from tests.integration.test_page_locking import MIB, MOST
from tests.support.jobs import launch
from tests.support.limited_memory import limit_locked_memory
from tests.support.paths import REPOSITORY
from tests.support.training import SHORT, arguments, records

LOCKING = """
import os, sys
sys.path[0] = {repository!r}
from hift_ds.launch.model import loading
from hift_ds.launch.train import command
from tests.support.limited_memory import page_locking_by_mlock
load_model = loading.load_model

def said(*arguments, **options):
    print("weights are read" * (os.environ["RANK"] == "0"), flush=True)
    return load_model(*arguments, **options)

loading.load_model = said
with page_locking_by_mlock():
    command()
"""


def locking(folder: Path) -> str:
    """A script for the launcher that says when weights are read, and where mlock takes the place of a GPU's driver."""
    script = folder / "locking.py"
    script.write_text(LOCKING.format(repository=str(REPOSITORY)))
    return str(script)


ZERO = "deepspeed=configs/deepspeed/zero2.json"


def test_a_limit_that_is_too_low_is_said_once_before_weights_are_read(tmp_path: Path) -> None:
    script = locking(tmp_path)
    large = f"model.config.vocab_size={MOST * 2 // (10 * 64)}"
    demanded = "deepspeed.hift.offload.pin_memory=true"
    limited = functools.partial(limit_locked_memory, MOST)
    done = launch(2, arguments(tmp_path / "no", ZERO, *SHORT, large, demanded), script=script, before=limited)
    printed = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in printed and "weights are read" not in printed, printed
    assert printed.count("deepspeed: hift.offload.pin_memory=true: masters and optimizer state need ") == 1, printed
    limit = f"{2 * MOST / MIB:.3g} MiB (ulimit -l: {MOST / MIB:.3g} MiB)"  # that of a process, twice
    assert f"the system allows {limit}" in printed and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_run_without_page_locked_memory_says_so_once_before_weights_are_read(tmp_path: Path) -> None:
    none = functools.partial(limit_locked_memory, 0)
    done = launch(2, arguments(tmp_path / "run", ZERO, *SHORT), script=locking(tmp_path), before=none)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert printed.count("the system allows 0 MiB (ulimit -l: 0 MiB)") == 1, printed
    assert printed.index("the system allows 0 MiB") < printed.index("weights are read")
    assert len(records(tmp_path / "run")) == 2
