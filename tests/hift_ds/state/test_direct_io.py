"""State in files by DeepSpeed's asynchronous I/O: what is looked at through a mapping, and what fails unheard."""

import contextlib
import gc
import os
import random
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import hift_ds.state.allocator
import hift_ds.state.direct_io
import hift_ds.state.transfer
from hift_ds.state.allocator import HostMemory
from hift_ds.state.arena import ALIGNMENT
from hift_ds.state.direct_io import PAGE, DirectIO, Job, _Handles, _Piece
from hift_ds.state.step import BlockState
from hift_ds.state.transfer import Lane, Staging, wait
from tests.hift_ds.state.test_transfer import CPU, SLOTS, Owner, random_steps, same
from tests.support.lazy_streams import Late, LazyStreams, MissingWait

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


@contextlib.contextmanager
def pieces(number: int) -> Iterator[None]:
    """The cache has so many pieces of a page."""
    with (
        mock.patch.object(hift_ds.state.direct_io, "AIO_CHUNK", PAGE),
        mock.patch.object(hift_ds.state.allocator, "file_buffer_bytes", lambda _: number * PAGE),
    ):
        yield


@pytest.fixture(params=(2, 24, 1000))
def small_pieces(request: pytest.FixtureRequest) -> Any:
    """Pieces of a page: tensors of a few thousand elements are in several. The cache holds less than a chunk, less than
    a block, or everything."""
    with pieces(request.param):
        yield


@pytest.fixture
def few_pieces() -> Any:
    """Less than two chunks, so that pieces are given up whose copies may still be under way."""
    with pieces(6):
        yield


# ---- what mappings and direct I/O see of each other -----------------------------------------------------------------


def mix(folder: Path, seed: int, rounds: int) -> int:
    """Random reads and writes of three tensors, by both ways, against tensors in memory; returns the comparisons."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    host, direct = direct_memory(folder)
    reading, writing = Lane(), Lane()
    truth = [torch.randn(size, generator=generator) for size in (1, 3000, 100_000)]
    if chance.random() < 0.5:
        host.reserve(sum(values.nbytes + ALIGNMENT for values in truth))  # one file, not three
    mapped = [host.empty(values) for values in truth]
    for buffer, values in zip(mapped, truth, strict=True):
        buffer.copy_(values)
    last: list[Any] = [None] * len(truth)
    compared = 0

    def a_slice(size: int) -> slice:
        start = chance.randrange(size)
        return slice(start, size if chance.random() < 0.5 else min(size, start + chance.randrange(1, 20_000)))

    for _ in range(rounds):
        which = chance.randrange(len(truth))
        values, buffer = truth[which], mapped[which]
        cut = a_slice(values.numel())
        action = chance.random()
        if action > 0.9:
            direct.read_ahead([buffer[cut] for buffer, cut in ((b, a_slice(b.numel())) for b in mapped)])
            continue
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
            if action < 0.8:
                some = chance.randrange(values.numel())
                assert torch.equal(buffer[some:], values[some:])
                compared += 1
            else:
                some = chance.randrange(values.numel())
                values[some : some + 500] = buffer[some : some + 500].mul_(0.5)
    return compared


@needs_aio
def test_mappings_and_direct_io_see_the_same(tmp_path: Path, small_pieces: None) -> None:
    assert mix(tmp_path, seed=0, rounds=2000) > 700


@needs_aio
def test_mappings_and_direct_io_see_the_same_in_large_chunks(tmp_path: Path) -> None:
    assert mix(tmp_path, seed=1, rounds=500) > 150


@needs_aio
@pytest.mark.slow
def test_mappings_and_direct_io_see_the_same_in_50000_rounds(tmp_path: Path, small_pieces: None) -> None:
    mix(tmp_path, seed=2, rounds=50_000)


@needs_aio
@pytest.mark.parametrize("step", SLOTS)
def test_random_steps_are_those_in_memory(step: str, tmp_path: Path, small_pieces: None) -> None:
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
def test_lazy_streams_change_nothing(step: str, tmp_path: Path, small_pieces: None) -> None:
    assert lazy_steps(step, tmp_path)


def without(attribute: str) -> Any:
    """A mutation: what is known of this event is forgotten."""
    return mock.patch.object(_Piece, attribute, property(lambda _: None, lambda *_: None), create=True)


MUTATIONS: dict[str, Callable[[], Any]] = {
    "a piece is used by two copies at once: to the device": lambda: without("fetched"),
    "a piece is used by two copies at once: from the device": lambda: without("stored"),
    "a file is written before the copies from the device": lambda: mock.patch.object(
        hift_ds.state.direct_io, "_synchronize", lambda _: None
    ),
    "a copy does not wait for what is computed": lambda: mock.patch.object(
        hift_ds.state.transfer, "mark", lambda: None
    ),
    "a copy does not wait for the file": lambda: mock.patch.object(Late, "result", lambda _, timeout=None: None),
    "what was changed is not written": lambda: mock.patch.object(DirectIO, "_write_behind", lambda *_: None),
}


@needs_aio
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_no_wait_can_be_taken_out(mutation: str, tmp_path: Path, few_pieces: None) -> None:
    with MUTATIONS[mutation]():
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
    host.reserve(12 * 3070 + 6 * ALIGNMENT)
    owner = Owner([3000, 70], True, torch.Generator().manual_seed(0))
    state = BlockState(owner, host, Staging(CPU, SLOTS[step], direct), bytes_per_element=12)
    for _ in range(2):
        for gradient in owner.gradients:
            gradient.fill_(1.0)
        state.step()
    return state, owner


def forget(state: BlockState) -> None:
    """Let the files have everything, and the cache nothing."""
    direct = state._host.direct
    assert direct is not None
    direct._copies.submit(direct._empty).result()


@needs_aio
def test_a_write_that_fails_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    state, _ = one_block(tmp_path, "block")
    with WritesFail():
        state.step()
        forget(state)
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
    forget(state)
    if settled:
        state.settle()  # the next read is not DeepSpeed's
    host = state._host
    assert host.direct is not None
    for file in host.direct._files:
        size = os.fstat(file.fd).st_size
        os.ftruncate(file.fd, 0)
        if not settled:
            os.ftruncate(file.fd, size)
    with pytest.raises(OSError, match="ends after 0 of" if settled else "not what was written"):
        state.step()


@needs_aio
def test_what_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    state, _ = one_block(tmp_path)
    forget(state)
    assert state._host.direct is not None
    files = state._host.direct._files
    files[:] = [file._replace(fd=10**8) for file in files]  # no such descriptor
    with pytest.raises(OSError, match="refuses a file"):
        state.step()


@needs_aio
def test_an_owner_that_is_collected_may_release(tmp_path: Path) -> None:
    """As DeepSpeed's engine does. The threads are gone by then."""
    released = []

    class Owner:
        def __init__(self) -> None:
            self.host, self.direct = direct_memory(tmp_path)
            self.buffer = self.host.empty(torch.empty(3000))
            self.cycle = self

        def __del__(self) -> None:
            self.direct.release([self.buffer])
            released.append(True)

    owner = Owner()
    owner.direct.write([(torch.ones(3000), owner.buffer)], Lane()).synchronize()
    owner.direct._copies.submit(lambda: None).result()
    time.sleep(0.1)  # for the threads to wait
    del owner
    gc.collect()
    assert released


# ---- it is asynchronous, and takes no memory ------------------------------------------------------------------------


@contextlib.contextmanager
def held_up(method: str) -> Iterator[threading.Event]:
    """Files are not read or written until the event is set."""
    gate, move = threading.Event(), getattr(_Handles, method)

    def at_the_gate(*args: Any) -> None:
        assert gate.wait(20)
        move(*args)

    with mock.patch.object(_Handles, method, at_the_gate):
        yield gate


@needs_aio
def test_a_slot_is_filled_while_others_work(tmp_path: Path) -> None:
    state, owner = one_block(tmp_path)
    forget(state)
    with held_up("read") as gate:
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
@pytest.mark.parametrize("step", SLOTS)
def test_files_are_written_behind(step: str, tmp_path: Path) -> None:
    """A step ends, and the next one gets what it wrote, while nothing can be written."""
    state, owner = one_block(tmp_path, step)
    state.settle()
    with held_up("write") as gate:
        state.step()
        state.prefetch()
        arrived = []
        for chunk in state._fetched.values():
            wait(chunk.ready)
            arrived += [master.clone() for master in chunk.masters if master is not None]
        gate.set()
        state.settle()
    masters = torch.cat([master.detach() for master, _ in owner.masters()])
    found = torch.cat(arrived)
    assert torch.equal(found, masters[: found.numel()])


@needs_aio
def test_what_is_written_does_not_change_until_it_is(tmp_path: Path) -> None:
    """Else the file could get a part of what comes later, which the checksum would not fit."""
    host, direct = direct_memory(tmp_path)
    first, second = torch.full((3000,), 1.0), torch.full((3000,), 2.0)
    buffer = host.empty(first)
    with held_up("write") as gate:
        direct.write([(first, buffer)], Lane()).synchronize()
        direct.read_ahead([buffer])  # writes what was changed
        later = direct.write([(second, buffer)], Lane())
        time.sleep(0.1)
        assert not later._future.done()
        gate.set()
        later.synchronize()
    direct.release([buffer])
    assert torch.equal(buffer, second)


@needs_aio
def test_a_file_is_read_after_it_is_written(tmp_path: Path) -> None:
    """What a piece held is written behind, and the piece is given to another place, before it is needed again."""
    with pieces(3):
        host, direct = direct_memory(tmp_path)
        host.reserve(4 * PAGE)
        values = torch.arange(1024.0)
        buffer, *others = (host.empty(values) for _ in range(4))
        copy = torch.zeros_like(values)
        with held_up("write") as gate:
            direct.write([(values, buffer)], Lane())
            direct.read_ahead(others)
            reading = direct.read([(copy, buffer)], Lane())
            time.sleep(0.1)
            gate.set()
            reading.synchronize()
    assert torch.equal(copy, values)


@needs_aio
def test_a_block_is_read_ahead_as_a_whole(tmp_path: Path) -> None:
    """And what is stepped before it stays, even if there is no room for both."""
    with pieces(60):
        host, direct = direct_memory(tmp_path)
        host.reserve(12 * 20_000 * 2)
        blocks = [host.empty(torch.empty(60_000)) for _ in range(2)]  # 59 pages each
        places = [[place for place, _, _ in direct._places(block)] for block in blocks]
        for block, held in ((0, set(places[0])), (1, set(places[0]) | {places[1][0]})):
            direct.read_ahead([blocks[block]])
            direct._copies.submit(lambda: None).result()
            assert set(direct._held) == held
        for start in range(0, 60_000, 10_000):
            part = blocks[0][start : start + 10_000]
            values = torch.empty(10_000)
            direct.read([(values, part)], Lane())
            direct.write([(values, part)], Lane())
        direct.read_ahead([blocks[1]])
        direct._copies.submit(lambda: None).result()
        assert set(places[1]) <= set(direct._held)


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
        assert (host.direct is not None) == by_aio
    owner = Owner([4 * 2**20], True, torch.Generator().manual_seed(0))
    before = mapped_memory()
    state = BlockState(owner, host, Staging(CPU, 2**20, host.direct), bytes_per_element=12)
    for _ in range(2):
        state.step()
    grown = mapped_memory() - before
    if by_aio:
        assert host.direct is not None and sum(buffer.nbytes for buffer in host.direct.buffers) == 32 * 2**20
        host.direct._copies.submit(host.direct._empty).result()
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
        assert HostMemory(folder=str(tmp_path)).direct is None
        ours = random_steps(3, 60, SLOTS["streamed"], prefetch=True, folder=str(tmp_path))
    first, _ = (call.args[0] for call in logger.warning.call_args_list)
    assert "memory-mapped files" in first and "no such thing" in first
    assert same(ours, random_steps(3, 60, SLOTS["streamed"], prefetch=False))


SHORT = RuntimeError("can't allocate memory: you tried to allocate 9 bytes\nand a long trace")


@needs_aio
@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (("_can_lock", {"return_value": False}), "GiB of page-locked memory: the system refuses it.*ulimit -l"),
        (("_can_lock", {"side_effect": SHORT}), "GiB of page-locked memory: can't allocate memory[^\n]*$"),
        (("DirectIO._locked", {"side_effect": MemoryError("2 GiB")}), "GiB of page-locked memory: 2 GiB"),
        (("DirectIO.check_folder", {"side_effect": OSError(22, "Invalid argument")}), "nvme_path.*Invalid argument"),
    ],
)
def test_it_is_not_used_where_it_does_not_work(broken: tuple[str, Any], expected: str, tmp_path: Path) -> None:
    what, how = broken
    with (
        mock.patch(f"hift_ds.state.direct_io.{what}", **how),
        mock.patch.object(hift_ds.state.direct_io, "logger") as logger,
    ):
        host = HostMemory(folder=str(tmp_path))
        host.reserve(PAGE)  # a rank that raised here would leave the others waiting
        assert host.direct is None
    (message,) = (call.args[0] for call in logger.warning.call_args_list)
    assert re.search(expected, message), message


@needs_aio
@pytest.mark.parametrize("is_pinned", (True, False))
def test_a_device_decides_itself_what_it_page_locks(is_pinned: bool, tmp_path: Path) -> None:
    """The limit of the system (ulimit -l) does not hold for what CUDA registers."""
    with (
        mock.patch.object(hift_ds.state.direct_io, "_can_lock", lambda _: False),
        mock.patch.object(hift_ds.state.direct_io, "get_accelerator") as accelerator,
        mock.patch.object(hift_ds.state.direct_io, "Arena") as arena,
        mock.patch.object(DirectIO, "check_folder"),
        mock.patch.object(torch.Tensor, "is_pinned", lambda _: is_pinned),
    ):
        accelerator().device_name.return_value = "fake"
        arena().empty.return_value = torch.empty(2 * PAGE, dtype=torch.uint8)
        direct = hift_ds.state.direct_io.open_direct_io(str(tmp_path), None, 2 * PAGE)
    assert (direct is not None) == is_pinned


def test_what_the_system_reads_in_parts_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(250)))
    read, buffer = os.preadv, torch.zeros(200, dtype=torch.uint8)
    with (tmp_path / "file").open("rb") as file:
        with mock.patch.object(os, "preadv", lambda fd, views, offset: read(fd, [views[0][:7]], offset)):
            assert hift_ds.state.direct_io._read_by_system(buffer, file.fileno(), 20) == 200
            assert buffer.tolist() == list(range(20, 220))
            assert hift_ds.state.direct_io._read_by_system(buffer, file.fileno(), 200) == 50
