"""Checkpoints as files: whole or not there, whatever happens to the disk, the process or the bytes.

The file layer alone, without a model; ``test_resume.py`` and ``test_kill.py`` have the engines.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hift_ds.checkpoint import command, generators, manifest, store
from hift_ds.checkpoint import files as checkpoint_files
from hift_ds.checkpoint.files import CheckpointError, FileEngine, Files
from hift_ds.checkpoint.lock import Lock


class Stage(int, Enum):
    """As DeepSpeed's, which Python 3.11.2 pickles as a call of `getattr`."""

    second = 2


def content(step: int) -> dict[str, Any]:
    return {"weights": torch.full((40,), float(step)), "step": step, "names": ["a", ("b", None)], "at": [Stage.second]}


def write_step(step: int) -> Callable[[str, str], Files]:
    """Writes two files: one as DeepSpeed does, one that only is there."""

    def write(folder: str, name: str) -> Files:
        files = FileEngine()
        files.create(None)
        files.save(content(step), os.path.join(folder, name, "state.pt"))
        Path(folder, name, "extra").mkdir()
        Path(folder, name, "extra", "note.json").write_text(json.dumps({"step": step}))
        return files.finish()

    return write


def save(folder: Path, step: int, tag: str | None = None) -> Path:
    return store.save(folder, tag or f"step{step}", write_step(step), {"step": step, "note": "Zürich"})


def newest(folder: Path) -> int | None:
    """The step that a resumed run would begin with, as its files have it; None: it would begin anew."""
    found = store.find(folder)
    if found is None:
        return None
    loaded = FileEngine().load(str(found.path / "state.pt"), map_location="cpu")
    assert (
        loaded["step"] == found.about["step"]
        and loaded["at"] == [2]
        and torch.equal(loaded["weights"], content(loaded["step"])["weights"])
    )
    return loaded["step"]


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with step1 and step2, not to be changed: tests copy it."""
    folder = tmp_path_factory.mktemp("pair")
    save(folder, 1)
    save(folder, 2)
    return folder


@pytest.fixture
def two(pair: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair, tmp_path / "two"))


def test_a_committed_checkpoint(two: Path) -> None:
    assert visible(two) == ["latest", "step1", "step2"] and (two / "latest").read_text() == "step2"
    assert newest(two) == 2
    found = store.find(two, "step1")
    assert found is not None and found.about == {"step": 1, "note": "Zürich"}
    assert sorted(found.files) == ["extra/note.json", "state.pt"]
    assert not list(two.glob(".saving-*"))


def test_saved_again_under_the_same_tag(two: Path) -> None:
    save(two, 3, tag="step2")
    assert newest(two) == 3 and visible(two) == ["latest", "step1", "step2"]


# ---- damage ----------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted((folder / "step2").rglob("*")) if path.is_file()]


@pytest.mark.parametrize("cut", ["0", "1", "half", "n-1"])
@pytest.mark.parametrize("name", ["step2/state.pt", "step2/extra/note.json", "step2/manifest.json"])
def test_a_file_that_was_cut(two: Path, name: str, cut: str) -> None:
    assert files_of(two) == ["step2/extra/note.json", "step2/manifest.json", "step2/state.pt"]
    data = (two / name).read_bytes()
    size = {"0": 0, "1": 1, "half": len(data) // 2, "n-1": len(data) - 1}[cut]
    (two / name).write_bytes(data[:size])
    assert newest(two) == 1


def test_200_flipped_bytes(two: Path) -> None:
    numbers = random.Random(5)
    names = files_of(two)
    for _ in range(200):
        path = two / numbers.choice(names)
        data = bytearray(path.read_bytes())
        place, change = numbers.randrange(len(data)), numbers.randrange(1, 256)
        data[place] ^= change
        path.write_bytes(data)
        assert newest(two) == 1, f"byte {place} of {path.name} changed by {change}"
        data[place] ^= change
        path.write_bytes(data)
    assert newest(two) == 2


@pytest.mark.parametrize("name", ["step2/state.pt", "step2/extra/note.json", "step2/manifest.json"])
def test_a_file_that_is_missing(two: Path, name: str) -> None:
    (two / name).unlink()
    assert newest(two) == 1


@pytest.mark.parametrize("pointer", [None, "", "step1", "nonsense", "../elsewhere", "/etc", "step2\nstep1", "\x00\xff"])
def test_the_pointer_is_only_a_hint(two: Path, pointer: str | None) -> None:
    (two / "latest").unlink()
    if pointer is not None:
        (two / "latest").write_bytes(pointer.encode("latin-1"))
    assert newest(two) == 2


def test_no_silent_start_from_nothing(two: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        (two / f"step{step}" / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* can be used.*step2.*0 bytes.*step1.*0 bytes"):
        store.find(two)
    with pytest.raises(CheckpointError, match=r"step2.*0 bytes"):
        store.find(two, "step2")
    with pytest.raises(CheckpointError, match="no checkpoint 'step9'"):
        store.find(two, "step9")
    assert store.find(tmp_path / "nothing") is None


def test_an_extra_file_is_not_ignored(two: Path) -> None:
    """DeepSpeed reads what matches a pattern, so a file that nobody committed might be read."""
    (two / "step2" / "mp_rank_01_model_states.pt").write_bytes(b"x")
    assert newest(two) == 1


# ---- what a checkpoint must not do -----------------------------------------------------------------------------


class Evil:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def reseal(folder: Path, **changes: Any) -> None:
    """Give a checkpoint a manifest that fits its files, as somebody would who wants them to be read."""
    path = folder / "manifest.json"
    old = json.loads(path.read_text())
    about = old["about"] | changes.pop("about", {})
    path.unlink()
    files: dict[str, Any] = {}
    manifest.write_manifest(folder, files, about)
    if changes:
        plain = json.loads(path.read_text())
        plain.pop("sha256 of the rest")
        plain["files"] |= changes["files"]
        path.write_text(manifest._sealed(plain))


def test_code_in_a_checkpoint_never_runs(two: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    torch.save({"weights": Evil(mark)}, two / "step2" / "state.pt")
    assert newest(two) == 1, "its hash is another"
    reseal(two / "step2")
    assert newest(two) == 1, "its hash is right, and it would run code"
    with pytest.raises(CheckpointError, match="more than tensors"):
        FileEngine().load(str(two / "step2" / "state.pt"))
    (two / "step2" / "state.pt").write_bytes(pickle.dumps(Evil(mark)))
    reseal(two / "step2")
    assert newest(two) == 1
    with pytest.raises(CheckpointError):
        FileEngine().load(str(two / "step2" / "state.pt"))
    assert not mark.exists()


def test_a_foreign_checkpoint_is_adopted_by_name(two: Path, tmp_path: Path) -> None:
    (two / "step2" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)has no manifest.json.*adopt"):
        store.find(two, "step2")
    assert command.main(["adopt", str(two / "step2")]) == 2, "any folder would do"
    (two / "step2" / "state.pt").rename(two / "step2" / "mp_rank_00_model_states.pt")
    assert command.main(["adopt", str(two / "step2")]) == 0
    assert store.find(two, "step2") is not None
    torch.save(Evil(tmp_path / "it_ran"), two / "step1" / "mp_rank_00_model_states.pt")
    (two / "step1" / "manifest.json").unlink()
    assert command.main(["adopt", str(two / "step1")]) == 2
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "extra/../../secret", "a\\b", ""])
def test_a_manifest_cannot_name_what_is_outside(two: Path, name: str) -> None:
    (two / "secret").write_text("")
    reseal(two / "step2", files={name: {"size": 0, "sha256": checkpoint_files.sha256_of(two / "secret")}})
    assert newest(two) == 1


def test_links_are_refused(two: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.pt"
    shutil.move(two / "step2" / "state.pt", outside)
    (two / "step2" / "state.pt").symlink_to(outside)
    assert newest(two) == 1
    shutil.move(two / "step1", tmp_path / "moved")
    (two / "step1").symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="link"):
        store.find(two)


def test_what_would_need_code_is_not_saved(tmp_path: Path) -> None:
    def write(folder: str, name: str) -> Files:
        files = FileEngine()
        files.save({"client": Evil(tmp_path / "it_ran")}, os.path.join(folder, name, "state.pt"))
        return files.finish()

    with pytest.raises(CheckpointError, match=r"client_state holds objects of .*mkdir"):
        store.save(tmp_path, "a", write, {"step": 1})
    assert visible(tmp_path) == []


@pytest.mark.parametrize("tag", ["", ".hidden", "a/b", "..", "latest", "a\0b"])
def test_a_tag_is_a_plain_name(tmp_path: Path, tag: str) -> None:
    with pytest.raises(CheckpointError, match="tag="):
        save(tmp_path, 1, tag=tag) if tag else store.save(tmp_path, "", write_step(1), {})


# ---- what a disk does ------------------------------------------------------------------------------------------


class Trouble:
    """A file layer in which the n-th operation fails, or each does, or the process ends there."""

    OPERATIONS = ("fsync", "replace", "rename", "mkdir")

    def __init__(self, fails_at: int, kind: str):
        self.left, self.kind, self.happened = fails_at, kind, False

    def now(self) -> bool:
        self.left -= 1
        self.happened |= self.left == 0
        return self.left == 0 or (self.kind != "once" and self.left < 0)

    def error(self) -> OSError:
        number = {"quota": errno.EDQUOT, "read-only": errno.EROFS}.get(self.kind, errno.ENOSPC)
        return OSError(number, os.strerror(number))


class Killed(BaseException):
    """The process ends here: nothing after it is done, no handler runs."""


@contextmanager
def troubled(trouble: Trouble, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name in Trouble.OPERATIONS:
            real = getattr(os, name)

            def operation(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                if trouble.kind != "short" and trouble.now():
                    raise Killed if trouble.kind == "kill" else trouble.error()
                return real(*args, **kwargs)

            patch.setattr(os, name, operation)
        real_write = checkpoint_files._HashedFile.write

        def write(self: Any, data: Any) -> int:
            if trouble.now():
                half = bytes(data)[: len(data) // 2]
                self._file.write(half)
                if trouble.kind == "kill":
                    raise Killed
                if trouble.kind == "short":
                    return real_write(self, data)  # a file that took less, and says so by its size
                raise trouble.error()
            return real_write(self, data)

        patch.setattr(checkpoint_files._HashedFile, "write", write)
        real_rmtree = shutil.rmtree

        def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
            if trouble.kind == "kill" and trouble.happened:
                raise Killed  # a dead process does not clean up
            real_rmtree(path, *args, **kwargs)
            if trouble.kind == "kill" and trouble.now():
                raise Killed

        patch.setattr(shutil, "rmtree", rmtree)
        yield


@pytest.mark.parametrize("good", range(3))
def test_the_systems_own_reason_is_named(good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what torch's archive says, which is closed after the failed write."""
    real, writes = checkpoint_files._HashedFile.write, []

    def write(self: Any, data: Any) -> int:
        writes.append(data)
        if len(writes) > good:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)

    monkeypatch.setattr(checkpoint_files._HashedFile, "write", write)
    engine = checkpoint_files.FileEngine()
    engine.create(None)
    engine.save({"some": torch.zeros(40_000), "more": torch.zeros(40_000)}, str(tmp_path / "file.pt"))
    with pytest.raises(CheckpointError, match="No space left on device"):
        engine.finish()


@pytest.mark.parametrize("kind", ["no space", "quota", "read-only", "once", "short", "kill"])
def test_every_operation_of_a_save_may_fail(kind: str, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each point in turn: the old checkpoint is whole afterwards, or the new one is; then saving works again."""
    failed = 0
    for point in range(1, 100):
        trouble = Trouble(point, kind)
        try:
            with troubled(trouble, monkeypatch):
                save(two, 3)
        except (CheckpointError, Killed) as error:
            failed += 1
            if kind in ("no space", "quota", "read-only"):  # whatever torch makes of it
                assert trouble.error().strerror in str(error)
            assert newest(two) in (2, 3)
            if newest(two) == 2:
                assert "step3" not in visible(two)
        else:
            assert newest(two) == 3, "the save was said to have worked"
        if not trouble.happened:
            assert newest(two) == 3
            break
        save(two, 4)
        assert newest(two) == 4
        assert not list(two.glob(".saving-*"))
        for step in (3, 4):
            shutil.rmtree(two / f"step{step}", ignore_errors=True)
        (two / "latest").write_text("step2")
    assert failed >= 12 and point > 12, "the points must have been reached"


def test_killed_while_a_tag_is_replaced(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = 0
    for point in range(1, 100):
        shutil.rmtree(two)
        save(two, 1)
        save(two, 2)
        trouble = Trouble(point, "kill")
        try:
            with troubled(trouble, monkeypatch):
                save(two, 3, tag="step2")
        except Killed:
            points += 1
        assert newest(two) in (2, 3), f"killed at operation {point}"
        if not trouble.happened:
            break
        save(two, 4)
        assert newest(two) == 4 and not list(two.glob(".*-*"))
    assert points > 12


def test_what_counts_is_on_the_disk_first(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that survives a loss of power: files, their folders, the new name, its folder, then the pointer.

    A file, or a name in a folder, is on the disk once that file or that folder was synced. A rename takes with it what
    is below.
    """
    done: list[tuple[str, str]] = []

    def path_of(descriptor: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), two)

    def recorded(name: str, describe: Callable[..., str]) -> None:
        real = getattr(os, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            done.append((name, describe(*args)))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, operation)

    recorded("fsync", path_of)
    for name in ("rename", "replace"):
        recorded(name, lambda source, target: os.path.relpath(target, two))
    save(two, 3)
    committed = done.index(("rename", "step3"))
    synced = {what for name, what in done[:committed] if name == "fsync"}
    inside = {str(path.relative_to(two / "step3")) for path in (two / "step3").rglob("*")}
    missing = {what for what in inside - {"manifest.json"} if f".saving-step3/{what}" not in synced}
    assert not missing and ".saving-step3" in synced
    # The manifest is the last file: it is synced under another name, renamed, and its folder is synced again.
    (manifest,) = (
        n for n, (name, what) in enumerate(done) if (name, what) == ("replace", ".saving-step3/manifest.json")
    )
    before, after = done[manifest - 1], done[manifest + 1 : committed]
    assert (
        before[0] == "fsync" and os.path.dirname(before[1]) == ".saving-step3" and ("fsync", ".saving-step3") in after
    )
    assert all(
        (two / "step3" / what).is_dir() or f".saving-step3/{what}" in {w for _, w in done[: manifest + 1]}
        for what in inside
    )
    pointer = done.index(("replace", "latest"))
    assert ("fsync", ".") in done[committed + 1 : pointer - 1], "the new name is synced before the pointer names it"
    assert done[pointer - 1][0] == "fsync" and ("fsync", ".") in done[pointer + 1 :]


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    checkpoint_files.write_durably(path, "old")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(errno.EIO, "the disk is broken")))
    with pytest.raises(OSError, match="the disk is broken"):
        checkpoint_files.write_durably(path, "new and longer")
    assert path.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a Linux device")
def test_a_device_that_is_full() -> None:
    files = FileEngine()
    files.save(content(1), "/dev/full")
    with pytest.raises(CheckpointError, match="/dev/full"):
        files.finish()


# ---- how fast it is ---------------------------------------------------------------------------------------------


def test_a_part_is_hashed_while_it_is_written(tmp_path: Path) -> None:
    """Neither waits for the other to end; when `write` returns, both have, since torch frees the memory then."""
    wrote, hashed, done = threading.Event(), threading.Event(), []

    class Disk(io.BytesIO):
        def write(self, data: Any) -> int:
            wrote.set()
            assert hashed.wait(20), "the hash waits for the disk"
            return super().write(data)

    class Hash:
        def update(self, data: Any) -> None:
            hashed.set()
            assert wrote.wait(20), "the disk waits for the hash"
            time.sleep(0.2)
            done.append(bytes(data))

    file = checkpoint_files._HashedFile(str(tmp_path / "file"))
    file._file.close()
    data = os.urandom(checkpoint_files._LARGE)
    file._file, file._hash = Disk(), Hash()  # type: ignore[assignment]
    file.write(data)
    assert done == [data] and file._file.getvalue() == data


@pytest.mark.parametrize("sizes", [(0, 1, 7), (2**18 - 1, 2**18, 3), (2**24 - 5, 10, 2**25 + 1, 2)])
def test_size_and_hash_are_those_of_the_file(sizes: tuple[int, ...], tmp_path: Path) -> None:
    numbers = random.Random(3)
    with checkpoint_files._HashedFile(str(tmp_path / "file")) as file:
        for size in sizes:
            part = bytearray(numbers.randbytes(size))
            file.write(part)
            part[:] = bytes(size)  # the memory belongs to somebody else now
    found = (tmp_path / "file").read_bytes()
    numbers = random.Random(3)
    assert found == b"".join(map(numbers.randbytes, sizes))
    assert file.entry == {"size": sum(sizes), "sha256": hashlib.sha256(found).hexdigest()}


def test_a_failed_write_leaves_no_thread_with_its_memory(tmp_path: Path) -> None:
    ended: list[bool] = []

    class Hash:
        def update(self, data: Any) -> None:
            time.sleep(0.3)
            ended.append(True)

    with pytest.raises(OSError, match="space"), checkpoint_files._HashedFile(str(tmp_path / "file")) as file:
        file._hash = Hash()  # type: ignore[assignment]
        with mock.patch.object(file, "_write", side_effect=OSError(errno.ENOSPC, "no space")):
            try:
                file.write(bytes(2**20))
            finally:
                assert ended
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hashing")]


def test_files_are_verified_at_the_same_time(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, both = checkpoint_files.sha256_of, threading.Barrier(2, timeout=20)

    def sha256_of(path: Path) -> str:
        both.wait()
        return real(path)

    monkeypatch.setattr(manifest, "sha256_of", sha256_of)
    assert newest(two) == 2


# ---- writers ---------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(two: Path) -> None:
    lock = Lock(two)
    with pytest.raises(CheckpointError, match=rf"(?s)another run \(process {os.getpid()} on .*\)"):
        save(two, 3)
    with pytest.raises(CheckpointError, match="another run"):
        store.prune(two, 1)
    lock.release()
    save(two, 3)
    assert newest(two) == 3


def test_pruning(tmp_path: Path) -> None:
    for step in range(1, 10):
        save(tmp_path, step)
    assert store.prune(tmp_path, None) == []
    assert sorted(store.prune(tmp_path, 2, 4)) == [f"step{step}" for step in (1, 2, 3, 5, 6, 7)]
    assert visible(tmp_path) == ["latest", "step4", "step8", "step9"]
    assert sorted(store.prune(tmp_path, 0)) == ["step4", "step8"]
    assert newest(tmp_path) == 9


def test_the_newest_is_of_the_highest_step(tmp_path: Path) -> None:
    """Whatever its name, and whatever was saved last."""
    for step, tag in ((10, "step10"), (11, "a"), (9, "step9")):
        save(tmp_path, step, tag)
    assert newest(tmp_path) == 11
    assert store.prune(tmp_path, 2) == ["step9"] and store.prune(tmp_path, 1) == ["step10"]
    assert newest(tmp_path) == 11


def random_sequence(folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save, fail, be killed, prune, lose files: there is always a whole checkpoint, and never an older one than was
    committed and not damaged since."""
    numbers = random.Random(seed)
    save(folder, 1)
    step, committed = 1, 1
    for _ in range(numbers.randrange(3, 9)):
        action = numbers.choice(["save", "save", "fail", "kill", "prune", "leftover", "second"])
        step += 1
        if action == "save":
            save(folder, step)
            committed = step
        elif action in ("fail", "kill"):
            trouble = Trouble(
                numbers.randrange(1, 25), "kill" if action == "kill" else numbers.choice(["once", "short", "quota"])
            )
            try:
                with troubled(trouble, monkeypatch):
                    save(folder, step)
                committed = step
            except (CheckpointError, Killed):
                found = newest(folder)
                assert found in (committed, step), f"seed {seed}: {found} after {committed}"
                committed = found
        elif action == "prune":
            trouble = Trouble(numbers.randrange(1, 6), numbers.choice(["kill", "once"]))
            try:
                with troubled(trouble, monkeypatch):
                    store.prune(folder, numbers.randrange(1, 4), numbers.choice([None, 3]))
            except (OSError, Killed):
                pass
        elif action == "leftover":
            (folder / f".saving-step{step}").mkdir()
            (folder / f".saving-step{step}" / "state.pt").write_bytes(b"half")
        else:
            lock = Lock(folder)
            with pytest.raises(CheckpointError):
                save(folder, step)
            lock.release()
        assert newest(folder) == committed, f"seed {seed}: after {action}"


def test_random_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(60):
        random_sequence(tmp_path / str(seed), seed, monkeypatch)


@pytest.mark.slow
def test_1000_random_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(1000):
        random_sequence(tmp_path / str(seed), seed, monkeypatch)
        shutil.rmtree(tmp_path / str(seed))


# ---- random numbers and the command line -----------------------------------------------------------------------


def test_generators_continue() -> None:
    import numpy

    def draw() -> list[float]:
        return [random.random(), float(numpy.random.rand()), float(numpy.random.randn()), float(torch.rand(()))]

    numpy.random.randn()  # so that the second of a pair is waiting
    state = generators.generator_states()
    expected = draw()
    draw()
    generators.restore_generator_states(state)
    assert draw() == expected


def test_verify_on_the_command_line(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["verify", str(two)]) == 0
    assert "step2: step 2, 2 files" in capsys.readouterr().out
    (two / "step2" / "state.pt").write_bytes(b"")
    assert command.main(["verify", str(two)]) == 1
    assert "0 bytes" in capsys.readouterr().out
    assert command.main(["verify", str(two / "nothing")]) == 2
