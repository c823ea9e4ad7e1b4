"""State in files by DeepSpeed's asynchronous I/O: what is looked at through a mapping, and what fails unheard."""

import os
import random
import resource
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import hift_ds.state.direct_io
import hift_ds.state.transfer
from hift_ds.state.allocator import HostMemory
from hift_ds.state.direct_io import DirectIO, Job, _Channel
from hift_ds.state.step import BlockState
from hift_ds.state.transfer import Lane, Staging, wait
from tests.hift_ds.state.test_transfer import CPU, SLOTS, Owner, random_steps, same
from tests.support.lazy_streams import LazyStreams, MissingWait

needs_aio = pytest.mark.usefixtures("aio")


@pytest.fixture(scope="module")
def aio() -> None:
    """Loading it asks the processor what it is, which takes seconds: not at import."""
    module, reason = hift_ds.state.direct_io.library()
    if module is None:
        pytest.skip(reason)


def direct_memory(folder: Path) -> tuple[HostMemory, DirectIO]:
    host = HostMemory(folder=str(folder))
    assert host.direct is not None
    return host, host.direct


@pytest.fixture
def small_chunks() -> Any:
    """A page each: tensors of a few thousand elements go in several."""
    with mock.patch.object(hift_ds.state.direct_io, "AIO_CHUNK", hift_ds.state.direct_io.PAGE):
        yield


# ---- what mappings and direct I/O see of each other -----------------------------------------------------------------


def mix(folder: Path, seed: int, rounds: int) -> int:
    """Random reads and writes of three tensors, by both ways, against tensors in memory; returns the comparisons."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    host, direct = direct_memory(folder)
    reading, writing = Lane(), Lane()
    truth = [torch.randn(size, generator=generator) for size in (1, 3000, 100_000)]
    mapped = [host.empty(values) for values in truth]
    for buffer, values in zip(mapped, truth, strict=True):
        buffer.copy_(values)
    last: list[Any] = [None] * len(truth)
    compared = 0

    def a_slice(size: int) -> slice:
        start = chance.randrange(-(-size // 1024)) * 1024
        stop = size if chance.random() < 0.5 else min(size, start + 1024 * chance.randrange(1, 20))
        return slice(start, stop)

    # What is written directly is cut as before until it is released: slices of a block's state do not change.
    cuts = [a_slice(values.numel()) for values in truth]
    for _ in range(rounds):
        which = chance.randrange(len(truth))
        values, buffer, cut = truth[which], mapped[which], cuts[which]
        action = chance.random()
        if action < 0.3:
            values[cut].normal_(generator=generator)
            last[which] = direct.write([(values[cut].clone(), buffer[cut])], writing, last[which])
        elif action < 0.6:
            copy = torch.full_like(values[cut], torch.nan)
            direct.read([(copy, buffer[cut])], reading, last[which]).synchronize()
            assert torch.equal(copy, values[cut])
            compared += 1
        else:
            if last[which] is not None:
                last[which].synchronize()
            direct.release([buffer])
            cuts[which] = a_slice(values.numel())
            if action < 0.8:
                some = chance.randrange(values.numel())
                assert torch.equal(buffer[some:], values[some:])
                compared += 1
            else:
                some = chance.randrange(values.numel())
                values[some : some + 500] = buffer[some : some + 500].mul_(0.5)
    return compared


@needs_aio
def test_mappings_and_direct_io_see_the_same(tmp_path: Path, small_chunks: None) -> None:
    assert mix(tmp_path, seed=0, rounds=2000) > 700


@needs_aio
def test_mappings_and_direct_io_see_the_same_in_large_chunks(tmp_path: Path) -> None:
    assert mix(tmp_path, seed=1, rounds=500) > 150


@needs_aio
@pytest.mark.slow
def test_mappings_and_direct_io_see_the_same_in_50000_rounds(tmp_path: Path, small_chunks: None) -> None:
    mix(tmp_path, seed=2, rounds=50_000)


@needs_aio
@pytest.mark.parametrize("step", SLOTS)
def test_random_steps_are_those_in_memory(step: str, tmp_path: Path, small_chunks: None) -> None:
    """Between the steps state is read and changed through the mappings."""
    truth = random_steps(3, 200, SLOTS[step], prefetch=False)
    assert same(random_steps(3, 200, SLOTS[step], prefetch=True, folder=str(tmp_path)), truth)


@needs_aio
def test_a_tensor_of_many_chunks(tmp_path: Path) -> None:
    host, direct = direct_memory(tmp_path)
    values = torch.arange(5 * 2**20 + 3, dtype=torch.float32)  # 20 MiB and a bit
    buffer, copy = host.empty(values), torch.zeros_like(values)
    written = direct.write([(values, buffer)], Lane())
    direct.read([(copy, buffer)], Lane(), written).synchronize()
    assert torch.equal(copy, values)
    direct.release([buffer])
    assert torch.equal(buffer, values)


def lazy_steps(step: str, folder: Path) -> bool:
    """Whether steps under lazy streams with prefetch, in files, are those without either in memory."""
    truth = random_steps(1, 60, SLOTS[step], prefetch=False)
    with LazyStreams():
        ours = random_steps(1, 60, SLOTS[step], prefetch=True, folder=str(folder))
    return same(ours, truth)


@needs_aio
@pytest.mark.parametrize("step", SLOTS)
def test_lazy_streams_change_nothing(step: str, tmp_path: Path, small_chunks: None) -> None:
    assert lazy_steps(step, tmp_path)


@needs_aio
@pytest.mark.parametrize("what", ("free", "written", "mark"))
def test_no_wait_can_be_taken_out(what: str, tmp_path: Path, small_chunks: None) -> None:
    broken: Any = {
        "free": lambda: mock.patch.object(_Channel, "free", property(lambda _: None, lambda *_: None), create=True),
        "written": lambda: mock.patch.object(hift_ds.state.direct_io, "_synchronize", lambda _: None),
        "mark": lambda: mock.patch.object(hift_ds.state.transfer, "mark", lambda: None),
    }[what]
    with broken():
        try:
            is_right = lazy_steps("streamed", tmp_path)
        except (MissingWait, OSError):  # an OSError: what was read is not what was written
            return
    assert not is_right, "nobody would notice"


# ---- nothing fails unheard ------------------------------------------------------------------------------------------


class WritesFail:
    """The kernel refuses all writes to files: DeepSpeed's handle does not say so."""

    def __enter__(self) -> None:
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, self._limits[1]))

    def __exit__(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)


def one_block(folder: Path, step: str = "streamed") -> tuple[BlockState, Owner]:
    host, direct = direct_memory(folder)
    owner = Owner([3000, 70], True, torch.Generator().manual_seed(0))
    state = BlockState(owner, host, Staging(CPU, SLOTS[step], direct), bytes_per_element=12)
    for _ in range(2):
        for gradient in owner.gradients:
            gradient.fill_(1.0)
        state.step()
    return state, owner


@needs_aio
def test_a_write_that_fails_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    state, _ = one_block(tmp_path, "block")
    with WritesFail():
        state.step()
    with pytest.raises(OSError, match="not what was written"):
        state.step()


@needs_aio
def test_a_write_that_fails_is_an_error_when_it_is_looked_at(tmp_path: Path) -> None:
    state, _ = one_block(tmp_path, "block")
    with WritesFail():
        state.step()
    with pytest.raises(OSError, match="not what was written"):
        state.settle()


@needs_aio
@pytest.mark.parametrize("settled", (False, True))
def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path, settled: bool) -> None:
    state, _ = one_block(tmp_path)
    for event in state._active.written:
        event.synchronize()
    if settled:
        state.settle()  # the next read is not DeepSpeed's
    host = state._host
    assert host.direct is not None
    for fd in host.direct._files.values():
        size = os.fstat(fd).st_size
        os.ftruncate(fd, 0)
        if not settled:
            os.ftruncate(fd, size)
    with pytest.raises(OSError, match="ends after 0 of" if settled else "not what was written"):
        state.step()


@needs_aio
def test_what_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    state, _ = one_block(tmp_path)
    state._staging.slots[0].free.synchronize()
    state._staging.slots[1].free.synchronize()
    assert state._host.direct is not None
    files = state._host.direct._files
    files.update(dict.fromkeys(files, 10**8))  # no such descriptor
    with pytest.raises(OSError, match="refuses a file"):
        state.step()


# ---- it is asynchronous, and takes no memory ------------------------------------------------------------------------


@needs_aio
def test_a_slot_is_filled_while_others_work(tmp_path: Path) -> None:
    state, owner = one_block(tmp_path)
    gate, finish = threading.Event(), _Channel.finish

    def at_the_gate(channel: _Channel) -> None:
        assert gate.wait(10)
        finish(channel)

    with mock.patch.object(_Channel, "finish", at_the_gate):
        state.prefetch()
        staged = state._fetched[0]
        assert not staged.ready._future.done()
        gate.set()
        wait(staged.ready)
    master, _ = owner.masters()[0]
    arrived = staged.masters[0]
    assert arrived is not None
    arrived = arrived.clone()
    state.settle()
    assert torch.equal(arrived, master.data.view(-1)[: arrived.numel()])


@needs_aio
def test_settled_is_written(tmp_path: Path) -> None:
    state, _ = one_block(tmp_path)
    written: Future[None] = Future()
    waits = threading.Event()

    class Watched(Job):
        def event(self) -> Any:
            waits.set()
            return super().event()

    state._active.written[0] = Watched(written)
    settling = threading.Thread(target=state.settle)
    settling.start()
    assert waits.wait(60), "nobody waited for the write"
    assert settling.is_alive()
    written.set_result(None)
    settling.join()


def mapped_memory() -> int:
    """Bytes of files that this process has in memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


@needs_aio
@pytest.mark.parametrize("by_aio", (True, False))
def test_state_is_not_in_memory(tmp_path: Path, by_aio: bool) -> None:
    library = hift_ds.state.direct_io.library() if by_aio else (None, "a test")
    with mock.patch.object(hift_ds.state.direct_io, "library", lambda: library):
        host = HostMemory(folder=str(tmp_path))
    owner = Owner([4 * 2**20], True, torch.Generator().manual_seed(0))
    before = mapped_memory()
    state = BlockState(owner, host, Staging(CPU, 2**20, host.direct), bytes_per_element=12)
    for _ in range(2):
        state.step()
    grown = mapped_memory() - before
    if by_aio:
        assert host.direct is not None and sum(buffer.nbytes for buffer in host.direct.buffers) == 32 * 2**20
        for event in state._active.written:
            event.synchronize()
        assert mapped_memory() - before < 2 * 2**20
    else:
        assert grown > 40 * 2**20


def test_without_it_files_are_mapped(tmp_path: Path) -> None:
    with (
        mock.patch.object(hift_ds.state.direct_io, "library", lambda: (None, "no such thing")),
        mock.patch.object(hift_ds.state.direct_io, "logger") as logger,
    ):
        host = HostMemory(folder=str(tmp_path))
        ours = random_steps(3, 60, SLOTS["streamed"], prefetch=True, folder=str(tmp_path))
    assert host.direct is None
    first, _ = (call.args[0] for call in logger.warning.call_args_list)
    assert "memory-mapped files" in first and "no such thing" in first
    assert same(ours, random_steps(3, 60, SLOTS["streamed"], prefetch=False))


@needs_aio
@pytest.mark.parametrize("what", ("memory", "folder"))
def test_it_is_not_used_where_it_does_not_work(what: str, tmp_path: Path) -> None:
    broken: Any = mock.patch.object(hift_ds.state.direct_io, "_can_lock", lambda _: False)
    if what == "folder":
        broken = mock.patch.object(DirectIO, "check_folder", side_effect=OSError(22, "Invalid argument"))
    with broken, mock.patch.object(hift_ds.state.direct_io, "logger") as logger:
        assert HostMemory(folder=str(tmp_path)).direct is None
    (message,) = (call.args[0] for call in logger.warning.call_args_list)
    assert ("ulimit -l" if what == "memory" else "Invalid argument") in message
