"""Every process of the tests computes with one thread on DeepSpeed's CPU accelerator. Shared fixtures.

On a GPU, the tests of the engine run with `DS_ACCELERATOR=cuda`; what needs more ranks than there are devices skips.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

from tests.support import ranks

torch.set_num_threads(1)
_CACHE = tempfile.TemporaryDirectory(prefix="hift-ds-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name  # of this process and of those that it starts
TESTS = Path(__file__).parent
NOT_FAST = ("system", "integration", "proofs")  # folders of tests that start ranks or whole runs


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remove the shared memory of killed ranks of earlier sessions: 66 MiB each, which nobody else ever frees."""
    if hasattr(session.config, "workerinput"):
        return
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # another user's process, or one that has ended
            mapped += maps.read_text()
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"):
        if buffer.name not in mapped:
            buffer.unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder: what neither starts ranks nor is a long proof is fast.

    The tests that are not fast come first: at the end of a run, short files keep all workers busy.
    """
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0] not in NOT_FAST)
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder == "proofs":
            item.add_marker(pytest.mark.slow)
        elif folder not in NOT_FAST and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let only tests that are not fast start ranks."""
    ranks.refused_to = item.nodeid if item.get_closest_marker("fast") else None


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    """A small byte-level BPE without a chat template."""
    from tests.support.data_fixtures import bpe

    return bpe()


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    """The same with the chat template ChatML, without the markers of what is trained."""
    from tests.support.data_fixtures import CHATML_WITHOUT_MARKERS, bpe

    return bpe(CHATML_WITHOUT_MARKERS)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Publishers' folders with a few written rows, for comparisons."""
    from tests.support.comparisons import write_data

    return write_data(tmp_path_factory.mktemp("published"))


@pytest.fixture
def no_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no Java; METEOR takes seconds to start."""
    monkeypatch.setattr("hift_ds.evaluation.tasks.metrics.shutil", mock.Mock(which=lambda name: None))
