"""The harness finds every missing wait, and lets programs pass that wait for what they use."""

from collections.abc import Callable

import pytest
import torch

import hift_ds.state.transfer
from hift_ds.state.allocator import HostMemory
from hift_ds.state.transfer import Lane, mark, wait
from tests.support.lazy_streams import LazyStreams, MissingWait


def host_tensor(size: int = 8) -> torch.Tensor:
    buffer = HostMemory().empty(torch.empty(size, device="meta"))
    return buffer.fill_(1.0)


def nothing(lane: Lane, tensor: torch.Tensor) -> None: ...


def wait_for_event(lane: Lane, tensor: torch.Tensor) -> None:
    wait(lane.mark())


def wait_for_stream(lane: Lane, tensor: torch.Tensor) -> None:
    hift_ds.state.transfer.get_accelerator().current_stream().wait_stream(lane._stream)


def wait_through_another_lane(lane: Lane, tensor: torch.Tensor) -> None:
    other = Lane()
    with other.after(lane.mark()):
        pass
    wait(other.mark())


def wait_on_the_host(lane: Lane, tensor: torch.Tensor) -> None:
    lane.mark().synchronize()


def synchronize_all(lane: Lane, tensor: torch.Tensor) -> None:
    hift_ds.state.transfer.get_accelerator().synchronize()


def look_at_a_number(lane: Lane, tensor: torch.Tensor) -> None:
    with lane.after():
        bool(tensor[0] > 0)


def wait_for_another_event(lane: Lane, tensor: torch.Tensor) -> None:
    wait(Lane().mark())


def wait_for_an_earlier_event(lane: Lane, tensor: torch.Tensor) -> None:
    before = lane.mark()
    with lane.after():
        tensor.add_(1.0)
    wait(before)


def look_at_a_number_of_the_host(lane: Lane, tensor: torch.Tensor) -> None:
    """A step count, for example, is in host memory: to read it waits for nothing."""
    with lane.after():
        count = torch.zeros(()) + torch.tensor(1.0)
        count += 1
        assert count.item() == 2


def read(tensor: torch.Tensor) -> None:
    tensor.sum()


def write(tensor: torch.Tensor) -> None:
    tensor.add_(1.0)


SUFFICIENT = (
    wait_for_event,
    wait_for_stream,
    wait_through_another_lane,
    wait_on_the_host,
    synchronize_all,
    look_at_a_number,
)
INSUFFICIENT = (nothing, wait_for_another_event, wait_for_an_earlier_event, look_at_a_number_of_the_host)
CONFLICTS = [(write, read), (write, write), (read, write)]


@pytest.mark.parametrize("waiting", SUFFICIENT)
@pytest.mark.parametrize(("first", "second"), CONFLICTS)
def test_a_computation_that_waits_passes(first: Callable, second: Callable, waiting: Callable) -> None:
    with LazyStreams():
        lane, tensor = Lane(), torch.ones(8)
        with lane.after(mark()):
            first(tensor)
        waiting(lane, tensor)
        second(tensor)


@pytest.mark.parametrize("waiting", INSUFFICIENT)
@pytest.mark.parametrize(("first", "second"), CONFLICTS)
def test_a_computation_that_does_not_wait_is_found(first: Callable, second: Callable, waiting: Callable) -> None:
    with LazyStreams():
        lane, tensor = Lane(), torch.ones(8)
        with lane.after(mark()):
            first(tensor)
        waiting(lane, tensor)
        with pytest.raises(MissingWait, match=r"aten\.\w+\.\w+ on the main stream .* aten\.\w+\.\w+ on stream 1 "):
            second(tensor)


def test_a_stream_that_does_not_wait_for_the_main_one_is_found() -> None:
    with LazyStreams():
        lane, tensor = Lane(), torch.ones(8)
        with lane.after(), pytest.raises(MissingWait, match="on stream 1 reads .* on the main stream writes"):
            tensor.sum()


def test_reads_need_no_wait() -> None:
    with LazyStreams():
        lane, tensor = Lane(), torch.ones(8)
        with lane.after(mark()):
            read(tensor)
        read(tensor)
        wait(lane.mark())


def test_parts_of_one_storage_are_told_apart() -> None:
    with LazyStreams():
        lane, tensor = Lane(), torch.ones(8)
        with lane.after(mark()):
            tensor[:4].add_(1.0)
        tensor[4:].add_(1.0)
        with pytest.raises(MissingWait):
            tensor[3:5].sum()


def test_a_read_of_a_part_is_not_forgotten() -> None:
    """A later read of the whole on another stream does not stand for it."""
    with LazyStreams():
        lane, tensor = Lane(), torch.ones(8)
        with lane.after(mark()):
            tensor[:4].sum()
        tensor.sum()
        with pytest.raises(MissingWait):
            tensor.add_(1.0)


# ---- copies between host and device ---------------------------------------------------------------------------------


@pytest.mark.parametrize("knows", (True, False))
def test_a_copy_knows_what_the_stream_knew_that_it_waited_for(knows: bool) -> None:
    """From the main stream to the one that steps, and from there to the one that stores."""
    with LazyStreams():
        stepping, storing = Lane(), Lane()
        weights, host = torch.ones(8), host_tensor()
        with stepping.after(mark()):
            state = weights * 2
            stepped = stepping.mark()
        with storing.after(stepped if knows else mark()):
            if not knows:
                with pytest.raises(MissingWait, match="stream 2 reads .* stream 1 writes"):
                    host.copy_(state, non_blocking=True)
                return
            host.copy_(state, non_blocking=True)
            host.copy_(weights, non_blocking=True)
            storing.outlives(state)
        assert host.numpy().tolist() != [1.0] * 8  # code that the harness does not see
        storing.mark().synchronize()
        assert host.tolist() == [1.0] * 8
        del state


def test_a_computation_on_another_stream_waits_for_copies() -> None:
    with LazyStreams() as machine:
        fetching, stepping = Lane(), Lane()
        area, host = torch.zeros(8), host_tensor()
        with fetching.after(mark()):
            area.copy_(host, non_blocking=True)
        with stepping.after(mark()), pytest.raises(MissingWait, match="stream 2 writes .* stream 1 writes"):
            area.mul_(2.0)
        with stepping.after(fetching.mark()):
            area.mul_(2.0)
        wait(stepping.mark())
        assert area.tolist() == [2.0] * 8 and machine.copies == 1


@pytest.mark.parametrize("synchronized", (True, False))
def test_the_host_waits_before_it_uses_its_memory(synchronized: bool) -> None:
    with LazyStreams():
        lane, area, host = Lane(), torch.zeros(8), host_tensor()
        with lane.after(mark()):
            area.copy_(host, non_blocking=True)
        wait(lane.mark())
        area.sum()  # the copy has run, and the host does not know of it
        if synchronized:
            lane.mark().synchronize()
            host.zero_()
        else:
            with pytest.raises(MissingWait, match="on the host writes .* on stream 1 reads"):
                host.zero_()


def test_a_copy_that_blocks_is_waited_for() -> None:
    with LazyStreams():
        lane, area, host = Lane(), torch.zeros(8), host_tensor()
        host.copy_(area)
        host.zero_()
        with lane.after():  # the host knows of all that came before
            area.copy_(host)
        assert area.tolist() == [0.0] * 8


def test_lists_are_copied_as_tensors_are() -> None:
    with LazyStreams() as machine:
        lane, areas, hosts = Lane(), [torch.zeros(8), torch.zeros(3)], [host_tensor(), host_tensor(3)]
        with lane.after(mark()):
            torch._foreach_copy_(areas, hosts, non_blocking=True)
        with pytest.raises(MissingWait):
            areas[1].sum()
        wait(lane.mark())
        assert areas[1].tolist() == [1.0] * 3 and machine.copies == 2


# ---- memory ---------------------------------------------------------------------------------------------------------


def use_on_another_stream(outlives: bool, waits: bool, copies: bool) -> None:
    """Tensors of the main stream that another one uses, and that Python lets go of."""
    lane, tensor, host = Lane(), torch.ones(8), host_tensor()
    with lane.after(mark()):
        if copies:
            host.copy_(tensor, non_blocking=True)
        else:
            tensor.sum()
        if outlives:
            lane.outlives(tensor)
    if waits:
        wait(lane.mark())
    del tensor
    torch.ones(8)


@pytest.mark.parametrize("copies", (True, False))
@pytest.mark.parametrize(("outlives", "waits"), [(True, False), (False, True)])
def test_memory_may_be_freed_after_use(outlives: bool, waits: bool, copies: bool) -> None:
    with LazyStreams():
        use_on_another_stream(outlives, waits, copies)


@pytest.mark.parametrize("copies", (True, False))
def test_memory_that_is_freed_in_use_is_found(copies: bool) -> None:
    with LazyStreams(), pytest.raises(MissingWait, match="the main stream was freed .* stream 1 may still use it"):
        use_on_another_stream(outlives=False, waits=False, copies=copies)


def test_memory_of_another_stream_that_is_freed_in_use_is_found() -> None:
    with LazyStreams(), pytest.raises(MissingWait, match="memory of stream 1 was freed"):
        lane = Lane()
        with lane.after():
            made = torch.ones(8)
        wait(lane.mark())
        made.sum()
        del made
        torch.ones(8)


def test_what_is_freed_last_is_found_at_the_end() -> None:
    with pytest.raises(MissingWait, match="was freed"), LazyStreams():
        lane, tensor = Lane(), torch.ones(8)
        with lane.after(mark()):
            tensor.sum()
        del tensor


# ---- the recorded program -------------------------------------------------------------------------------------------


def test_the_program_has_what_each_operation_waits_for() -> None:
    with LazyStreams(record=True) as machine:
        fetching, stepping, storing = Lane(), Lane(), Lane()
        area, host = torch.zeros(8), host_tensor()
        with fetching.after(mark()):
            area.copy_(host, non_blocking=True)
        with stepping.after(mark(), fetching.mark()):
            area.mul_(2.0)
        with storing.after(stepping.mark()):
            torch._foreach_copy_([host, host[:4]], [area, area[:4]], non_blocking=True)
        torch.ones(3).view(3, 1).sum()
        storing.mark().synchronize()
    found = [(one.stream, one.kind, one.nbytes, one.after) for one in machine.program]
    assert found == [
        ("main", "kernel", 32, ()),  # zeros
        ("stream 1", "to device", 32, (0,)),
        ("stream 2", "kernel", 32, (0, 1)),
        ("stream 3", "to host", 48, (2,)),
        ("main", "kernel", 12, (0,)),  # ones
        ("main", "kernel", 16, (4,)),
        ("host", "kernel", 0, (3,)),
    ]
    with LazyStreams() as machine:
        torch.zeros(8).sum()
    assert not machine.program
