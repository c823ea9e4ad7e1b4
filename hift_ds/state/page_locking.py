"""How much host memory the system lets a run page-lock: found by trying, before weights are read or state is made.

No file names the limit. ``ulimit -l`` stops some devices, and NVIDIA's driver for Linux does not ask for it; WSL has a
limit of its own. So a trial decides, and the limits only say how much it must try.
"""

import contextlib
import ctypes
import os
import platform
import resource
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from hift_ds.collectives import gather
from hift_ds.state.arena import Region, clear_error
from hift_ds.state.free_memory import available_memory

_FIRST, _LEAST = 2**20, 2**16  # bytes of the first piece of a trial, and of its smallest
_SAMPLE = 2**24  # bytes that are copied to measure a rate
_LESS, _WITHOUT = "--set deepspeed.hift.offload.moments=8bit", "--set deepspeed.hift.offload.pin_memory=false"


def check_page_locking(wanted: Mapping[str, int], moved: float, required: str | None = None) -> str | None:
    """Find out whether all ranks of a machine may page-lock what they want. All ranks call it, with the same answer.

    Args:
        wanted: what this rank will page-lock: its purpose, and bytes.
        moved: bytes that a step of this rank copies between this memory and the device.
        required: the setting that demands it, for the message; None: the run can do without.

    Returns:
        A message with the size that is needed, the size that is allowed, what a step then costs, and the remedy; None:
        it is allowed.

    Raises:
        ValueError: with this message, if it is required.
    """
    nbytes, host = sum(wanted.values()), socket.gethostname()
    entries = gather((host, nbytes, available_memory()))
    needed = sum(size for name, size, _ in entries if name == host)
    has_room = needed <= min(free for name, _, free in entries if name == host)  # else another check says so
    with _trial(nbytes if has_room else 0) as allowed:
        entries = gather((host, nbytes, allowed if has_room else nbytes))  # while all ranks hold what they locked
    by_host: dict[str, tuple[int, int]] = {}
    for name, size, locked in entries:
        before = by_host.get(name, (0, 0))
        by_host[name] = before[0] + size, before[1] + locked
    refused = {name: sizes for name, sizes in by_host.items() if sizes[1] < sizes[0]}
    if not refused:
        return None
    name, (needed, locked) = next(iter(refused.items()))
    texts = gather(_explanation(moved) if host == name else None)
    purposes = " and ".join(purpose for purpose, size in wanted.items() if size)
    reason, cost, remedy = next(text for text in texts if text is not None)
    message = (
        f"{purposes} need {_size(needed)} of page-locked memory on {name}, and the system allows {_size(locked)}"
        f"{reason}. {cost}. To allow it: {remedy}"
    )
    if required is not None:
        raise ValueError(f"{required}: {message}. To run without it, slower: {_WITHOUT}")
    return (
        f"The run continues, slower. {message[0].upper()}{message[1:]}. To run without it, and without this message: "
        f"{_WITHOUT}. What cannot be page-locked stays pageable"
    )


@contextlib.contextmanager
def _trial(nbytes: int) -> Iterator[int]:
    """Page-lock up to so many bytes inside the ``with`` statement, as far as there is reason to doubt.

    Yields:
        The bytes that are allowed.
    """
    target = min(nbytes, _doubtful(nbytes))
    held: list[Region] = []
    total, size, grows = 0, _FIRST, True
    while total < target and size >= _LEAST:
        if (piece := _locked(min(size, target - total))) is not None:
            held.append(piece)
            total += len(piece)
        else:
            grows = False
        size = 2 * size if grows else size // 2
    yield nbytes if total >= target or not held and _has_slabs() else total


def _doubtful(nbytes: int) -> int:
    """Return how many bytes a trial must page-lock to know that all can be: a little more than a limit in its way."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if _is_wsl():
        return nbytes
    return _FIRST if limit == resource.RLIM_INFINITY or nbytes <= limit else limit + _FIRST


def _locked(nbytes: int) -> Region | None:
    """Return page-locked memory, or None if it is refused."""
    try:
        region = Region(nbytes)
        if get_accelerator().device_name() != "cpu":
            region.register()
        elif ctypes.CDLL(None).mlock(ctypes.c_void_p(region.address()), ctypes.c_size_t(nbytes)):
            return None  # what DeepSpeed's asynchronous I/O does there
    except (RuntimeError, MemoryError):
        clear_error()
        return None
    return region


def _has_slabs() -> bool:
    """Whether torch page-locks memory where the accelerator cannot register any. How much, only the run shows."""
    if get_accelerator().device_name() == "cpu":
        return False
    try:
        get_accelerator().pin_memory(torch.empty(_LEAST, dtype=torch.uint8))
    except RuntimeError:
        clear_error()
        return False
    return True


def _explanation(moved: float) -> tuple[str, str, str]:
    """Return why memory of this machine cannot be page-locked, what a step costs then, and the remedy."""
    limit, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    reason = "" if limit == resource.RLIM_INFINITY else f" (ulimit -l: {_size(limit)})"
    if get_accelerator().device_name() == "cpu":
        cost = "Without it, state in files goes through the page cache of the system instead of direct I/O"
    else:
        rate = _rate()
        cost = (
            f"Without it, the host waits up to {moved / rate:.2g} s in each step for copies of {_size(moved)}, at "
            f"{rate / 1e9:.2g} GB/s measured here, which page-locked memory hides behind the computation (hift-plan "
            "--no-pin-memory predicts a step)"
        )
    if _is_wsl():
        reason = " (WSL)"
        remedy = "raise memory= under [wsl2] in .wslconfig of the Windows user, then wsl --shutdown"
    elif Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        remedy = "start the container with --ulimit memlock=-1:-1 (only the provider of a rented pod can)"
    elif "SLURM_JOB_ID" in os.environ:
        remedy = "in slurm.conf, PropagateResourceLimitsExcept=MEMLOCK, and LimitMEMLOCK=infinity for slurmd"
    elif most == resource.RLIM_INFINITY:
        remedy = "ulimit -l unlimited, in the shell that starts the run"
    else:
        remedy = "a line '* - memlock unlimited' in /etc/security/limits.conf, and a new login"
    return reason, cost, f"{remedy}. To need less: {_LESS} (in a script, the same key of the config)"


def _rate() -> float:
    """Return the bytes a second of copies between the device and memory that is not page-locked, both ways."""
    device = get_accelerator().current_device_name()
    source = torch.zeros(_SAMPLE, dtype=torch.uint8)
    there = torch.zeros_like(source, device=device)
    get_accelerator().synchronize()
    start = time.perf_counter()
    there.copy_(source)
    source.copy_(there)
    get_accelerator().synchronize()
    return 2 * _SAMPLE / max(time.perf_counter() - start, 1e-9)


def _is_wsl() -> bool:
    return "microsoft" in platform.release().lower()


def _size(nbytes: float) -> str:
    if nbytes >= 2**29:
        return f"{nbytes / 2**30:.2f} GiB"
    return f"{nbytes / 2**10:.3g} KiB" if 0 < nbytes < 2**20 else f"{nbytes / 2**20:.3g} MiB"
