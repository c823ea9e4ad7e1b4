"""The drive that a run needs: the truth is a list of checkpoints that is kept as the store keeps it."""

import itertools
from pathlib import Path
from unittest import mock

import pytest
import torch

from hift_ds.launch.config.settings import TrainingSettings
from hift_ds.launch.runtime import drive
from hift_ds.launch.runtime.drive import Room, as_size, checkpoints_at_once, room


def most_at_once(training: TrainingSettings) -> int:
    """Save at each step that may save, with the worst choice of the best one, and delete as `Checkpoints` does."""
    highest, there, best = 0, [], None
    for step in range(1, training.max_steps + 1):
        is_best = training.keep_best and step % training.eval_every == 0
        if not (is_best or step == training.max_steps or training.save_every and step % training.save_every == 0):
            continue
        if is_best and best is None:  # the first one stays the best: it is the oldest
            best = step
        there.append(step)
        highest = max(highest, len(there))
        if training.keep_last is not None:
            kept = [one for one in there if one != best][-training.keep_last :]
            every = training.keep_every
            there = [one for one in there if one in kept or one == best or every and one % every == 0]
    return highest


def test_the_number_of_checkpoints_is_what_the_store_keeps() -> None:
    options = itertools.product((None, 1, 4, 7, 30), (None, 1, 2, 5), (None, 8, 12), (False, True))
    for save_every, keep_last, keep_every, keep_best in options:
        training = TrainingSettings(
            max_steps=25,
            save_every=save_every,
            keep_last=keep_last,
            keep_every=keep_every,
            keep_best=keep_best,
            eval_every=6 if keep_best else None,
        )
        truth, found = most_at_once(training), checkpoints_at_once(training)
        spare = keep_best + bool(keep_every)  # those that are kept may be among the last
        assert truth <= found <= truth + spare, training


def test_what_is_there_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints" / "step4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step4" / "state.pt").write_bytes(bytes(700))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(50))
    (tmp_path / "logs").write_bytes(bytes(9999))
    training = TrainingSettings(max_steps=20, save_every=4)
    found = room(tmp_path, training, 700, 100)
    assert (found.checkpoints, found.present, found.needed) == (3, 750, 3 * 700 + 100 - 750)
    assert found.free > 2**20


@pytest.mark.parametrize(
    ("free", "changes", "parts", "absent"),
    [
        (
            58,
            {},
            ["up to 3 checkpoints of 19.0 GB (training.keep_last=2)", "a model of 3.0 GB; 58.0 GB are free"],
            ["warning"],
        ),
        (57, {}, ["warning: the run needs 58.0 GB of free room on the drive of output.dir", "keep_last=1"], []),
        (57, {"keep_last": 1}, ["warning", "output.dir"], ["keep_last=1 without"]),
        (57, {"save_every": None}, ["(if the run is stopped)", "warning"], ["keep_last"]),
    ],
)
def test_too_little_room_is_a_warning_with_its_remedy(
    free: int, changes: dict[str, int | None], parts: list[str], absent: list[str]
) -> None:
    training = TrainingSettings(**{"max_steps": 20, "save_every": 4, **changes})
    text = Room(19 * 10**9, 3, 3 * 10**9, 2 * 10**9, free * 10**9).report(training)
    assert [part for part in parts if part not in text] == [] == [part for part in absent if part in text]


def test_sizes() -> None:
    assert [as_size(size) for size in (0, 2_600_000, 999_000_000, 1_840_000_000)] == [
        "0 MB",
        "3 MB",
        "999 MB",
        "1.8 GB",
    ]


def test_the_time_of_a_save_grows_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks write at the same time."""
    clock = iter([0.0, 2.0])
    ranks = mock.Mock(get_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(drive, "dist", ranks)
    monkeypatch.setattr(drive.time, "perf_counter", lambda: next(clock))
    assert drive.seconds_of_save(tmp_path, 10 * drive.PROBE, torch.device("cpu")) == 10.0
    assert ranks.all_reduce.called
    assert not list(tmp_path.iterdir())
