"""What a trial of page-locking finds, how much it tries, and what is said of it."""

import platform
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hift_ds.state import arena
from hift_ds.state import page_locking as module
from hift_ds.state.page_locking import check_page_locking

MIB, GIB = 2**20, 2**30
STATE, WEIGHTS = "masters and optimizer state", "weights"


class Device:
    """A device that registers at most so many bytes at a time, or cannot register memory at all.

    Args:
        most: bytes; None: it cannot.
        pins: whether torch page-locks memory.
    """

    def __init__(self, most: int | None, pins: bool = True):
        self.most, self.pins, self.highest, self.refusals = most, pins, 0, 0
        self.held: dict[int, int] = {}

    def device_name(self) -> str:
        return "fake"

    def current_device_name(self) -> str:
        return "cpu"

    def synchronize(self) -> None:
        pass

    def register_host_memory(self, address: int, nbytes: int) -> bool:
        if self.most is None:
            return False
        if sum(self.held.values()) + nbytes > self.most:
            self.refusals += 1
            raise RuntimeError("out of memory")
        self.held[address] = nbytes
        self.highest = max(self.highest, sum(self.held.values()))
        return True

    def unregister_host_memory(self, address: int) -> None:
        del self.held[address]

    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.pins:
            raise RuntimeError("not supported")
        return tensor


@pytest.fixture
def system() -> Iterator[Any]:
    """Returns a function that sets the device, the limit (soft and hard) and the kernel's name."""
    with mock.patch.multiple(Path, exists=lambda _: False), mock.patch.dict("os.environ", clear=False) as environment:
        environment.pop("SLURM_JOB_ID", None)
        patches = []

        def use(most: int | None, limit: int, hard: int = -1, release: str = "6.8.0", pins: bool = True) -> Device:
            device = Device(most, pins)
            for patch in (
                mock.patch.object(module, "get_accelerator", lambda: device),
                mock.patch.object(arena, "get_accelerator", lambda: device),
                mock.patch.object(resource, "getrlimit", lambda _: (limit, hard)),
                mock.patch.object(platform, "release", lambda: release),
                mock.patch.object(module, "available_memory", lambda: 2**40),
            ):
                patch.start()
                patches.append(patch)
            return device

        yield use
        for patch in reversed(patches):
            patch.stop()


def test_a_limit_that_holds_is_found_and_said(system: Any) -> None:
    """64 MiB, and none: 75 GiB are wanted, and the trial makes twice the limit at most."""
    device = system(64 * MIB, 64 * MIB)
    text = check_page_locking({STATE: 75 * GIB, WEIGHTS: 0}, 4e9)
    assert text.startswith(f"The run continues, slower. {STATE.capitalize()} need 75.00 GiB of page-locked memory on ")
    assert "the system allows 64 MiB (ulimit -l: 64 MiB)" in text and "copies of 3.73 GiB" in text
    assert "GB/s measured here" in text and "ulimit -l unlimited" in text
    for setting in ("moments=8bit", "pin_memory=false"):
        assert f"--set deepspeed.hift.offload.{setting}" in text
    assert device.highest == 64 * MIB and not device.held and text.endswith("stays pageable")
    system(0, 0, pins=False)
    text = check_page_locking({STATE: GIB, WEIGHTS: GIB}, 4e9)
    assert (
        f"{STATE.capitalize()} and {WEIGHTS} need 2.00 GiB" in text
        and "the system allows 0 MiB (ulimit -l: 0 MiB)" in text
    )
    system(512 * 2**10, 512 * 2**10)
    assert "the system allows 512 KiB (ulimit -l: 512 KiB)" in check_page_locking({STATE: GIB}, 4e9)


def test_a_setting_that_demands_it_is_an_error_with_its_name(system: Any) -> None:
    system(0, 0, pins=False)
    with pytest.raises(
        ValueError, match=r"^hift\.offload\.pin_memory=true: .* the system allows 0 MiB.*pin_memory=false$"
    ):
        check_page_locking({STATE: GIB}, 4e9, "hift.offload.pin_memory=true")


@pytest.mark.parametrize("limit", [8 * MIB, 0])
def test_a_limit_that_the_device_does_not_ask_for_is_none(limit: int, system: Any) -> None:
    """As with NVIDIA's driver for Linux. The trial takes little more than the limit, not 75 GiB."""
    device = system(2**40, limit)
    assert check_page_locking({STATE: 75 * GIB}, 4e9) is None
    assert limit < device.highest <= limit + MIB and not device.held


def test_what_is_below_a_limit_takes_one_small_piece(system: Any) -> None:
    for limit in (resource.RLIM_INFINITY, 100 * GIB):
        device = system(2**40, limit)
        assert check_page_locking({STATE: 75 * GIB}, 4e9) is None and device.highest == MIB


def test_a_device_that_registers_nothing_is_believed_if_torch_page_locks(system: Any) -> None:
    system(None, resource.RLIM_INFINITY)
    assert check_page_locking({STATE: GIB}, 4e9) is None
    system(None, resource.RLIM_INFINITY, pins=False)
    assert "allows 0 MiB. Without it" in check_page_locking({STATE: GIB}, 4e9)


def test_wsl_is_tried_to_the_end(system: Any) -> None:
    """Its limit is in no file."""
    device = system(40 * MIB, resource.RLIM_INFINITY, release="6.6.87.2-microsoft-standard-WSL2")
    text = check_page_locking({STATE: 64 * MIB}, 4e9)
    assert "64 MiB of page-locked memory" in text and "allows 40 MiB (WSL)" in text and ".wslconfig" in text
    assert not device.held
    device = system(64 * MIB, resource.RLIM_INFINITY, release="6.6.87.2-microsoft-standard-WSL2")
    assert check_page_locking({STATE: 64 * MIB}, 4e9) is None and device.highest == 64 * MIB


def test_the_ranks_of_a_machine_count_together(system: Any) -> None:
    """The other rank of this machine gets nothing of a limit for both, and another machine gets all."""
    system(2**40, resource.RLIM_INFINITY)
    others = iter(
        [[("here", GIB, 2**40), ("there", GIB, 2**40)], [("here", GIB, 0), ("there", GIB, GIB)], [None, None]]
    )
    with mock.patch.object(module.socket, "gethostname", lambda: "here"):
        with mock.patch.object(module, "gather", lambda own: [own, *next(others)]):
            text = check_page_locking({STATE: GIB}, 4e9)
    assert "need 2.00 GiB of page-locked memory on here, and the system allows 1.00 GiB" in text


@pytest.mark.parametrize(
    ("hard", "files", "variables", "remedy"),
    [
        (-1, "", {}, "ulimit -l unlimited, in the shell that starts the run"),
        (0, "", {}, "/etc/security/limits.conf"),
        (0, "", {"SLURM_JOB_ID": "1"}, "PropagateResourceLimitsExcept=MEMLOCK"),
        (0, "/.dockerenv", {}, "--ulimit memlock=-1:-1"),
        (0, "/run/.containerenv", {}, "--ulimit memlock=-1:-1"),
    ],
)
def test_the_remedy_is_that_of_the_place(
    hard: int, files: str, variables: dict[str, str], remedy: str, system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    system(0, 0, hard, pins=False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == files)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert remedy in check_page_locking({STATE: GIB}, 4e9)


def test_with_too_little_memory_nothing_is_tried(system: Any) -> None:
    """Another check says so, and a trial could end the process."""
    device = system(0, 0, pins=False)
    with mock.patch.object(module, "available_memory", lambda: GIB):
        assert check_page_locking({STATE: 2 * GIB}, 4e9) is None
    assert not device.refusals
