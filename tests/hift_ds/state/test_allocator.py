"""Where buffers are, and the room for them, in host memory and on a drive."""

import errno
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from hift_ds.config import file_buffer_bytes
from hift_ds.state import allocator
from hift_ds.state.allocator import HostMemory, scratch

GIB = 2**30


@pytest.mark.parametrize(
    ("folder", "masters_in_files", "places"),
    [(False, True, ("host", "host")), (True, True, ("nvme", "nvme")), (True, False, ("host", "nvme"))],
)
def test_where_masters_and_moments_are(
    folder: bool, masters_in_files: bool, places: tuple[str, str], tmp_path: Path
) -> None:
    host = HostMemory(folder=str(tmp_path) if folder else None, masters_in_files=masters_in_files)
    host.reserve(3 * 4096, 4096)
    like = torch.empty(1000)
    master, *moments = (host.empty(like, of_master) for of_master in (True, False, False))
    assert (host.place(master), host.place(moments[0]), host.place(moments[1])) == (places[0], places[1], places[1])
    assert host.nbytes == 12_000
    for number, buffer in enumerate((master, *moments)):
        buffer.fill_(number)
    assert [buffer.unique().tolist() for buffer in (master, *moments)] == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("masters_in_files", "memory", "drive", "expected"),
    [
        (True, 3, 12, []),
        (True, 2, 12, ["need 2.02 GiB of host memory", "2.00 GiB are free", "max_block_numel"]),
        (True, 3, 11, ["need 12.00 GiB of the drive", "11.00 GiB are free", "larger drive"]),
        (False, 7, 8, []),
        (False, 6, 8, ["need 6.02 GiB of host memory", "hift.offload.nvme='all'"]),
        (False, 6, 7, ["need 6.02 GiB of host memory", "need 8.00 GiB of the drive"]),
    ],
)
def test_room_in_both_places(
    masters_in_files: bool, memory: int, drive: int, expected: list[str], tmp_path: Path
) -> None:
    """12 GiB of state, 4 of them masters; what passes between the drive and the device takes 2 GiB and two pieces."""
    host = HostMemory(folder=str(tmp_path), masters_in_files=masters_in_files, largest=GIB)
    assert file_buffer_bytes(GIB) == 2 * GIB + 2**24
    with (
        mock.patch.object(allocator, "available_memory", lambda: memory * GIB),
        mock.patch.object(allocator.shutil, "disk_usage", lambda _: SimpleNamespace(free=drive * GIB)),
    ):
        if not expected:
            host.check_room(12 * GIB, 4 * GIB)
            return
        with pytest.raises(ValueError) as error:
            host.check_room(12 * GIB, 4 * GIB)
    assert all(words in str(error.value) for words in expected), str(error.value)


def test_a_drive_that_is_full_after_the_check_is_an_error_at_once(tmp_path: Path) -> None:
    host = HostMemory(folder=str(tmp_path))
    with (
        mock.patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(OSError, match="No space left on device.*needs 8192 more bytes"),
    ):
        host.reserve(8192)
    assert not list(tmp_path.iterdir())


def test_scratch_tensors(tmp_path: Path) -> None:
    for shape, dtype in (((3, 5), torch.float32), ((0,), torch.bfloat16), ((), torch.int16), ((10_000,), torch.uint8)):
        values = scratch(shape, dtype, str(tmp_path))
        assert values.shape == shape and values.dtype == dtype
        assert torch.equal(values.fill_(3), torch.full(shape, 3, dtype=dtype))
    assert not list(tmp_path.iterdir())
