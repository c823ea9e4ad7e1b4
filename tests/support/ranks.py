"""Runs a function on N ranks: real processes, kept alive between calls; importing DeepSpeed costs seconds."""

import atexit
import gc
import importlib
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

TIMEOUT = 550.0  # seconds for one call, enough for DeepSpeed to compile its C++ optimizers once beside other work


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time; the message holds what each rank had to say."""


class RankPool:
    """`size` processes that form one gloo world. They start at the first call and live until `close`.

    A rank that raises leaves the others waiting in a collective, so after any failure the whole pool is replaced.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **kwargs: Any) -> list[Any]:
        """Calls `function(*args, **kwargs)` on every rank and returns the results in the order of ranks.

        The function must be importable by name (top level of a module), arguments and results must pickle.
        """
        if not self._processes:
            self._start()
        call = pickle.dumps((function.__module__, function.__qualname__, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(call)

        answers: list[tuple[bool, Any] | None] = [None] * self.size
        deadline = time.monotonic() + timeout
        while any(a is None for a in answers) and time.monotonic() < deadline:
            waiting = [p for p, a in zip(self._pipes, answers, strict=True) if a is None]
            for pipe in multiprocessing.connection.wait(waiting, timeout=deadline - time.monotonic()):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    self._processes[rank].join(timeout=5)
                    answers[rank] = (False, f"the process died, exit code {self._processes[rank].exitcode}")
            if any(a is not None and not a[0] for a in answers):
                deadline = min(deadline, time.monotonic() + 2)  # the others may only be waiting for the failed one

        if all(a is not None and a[0] for a in answers):
            return [a[1] for a in answers if a is not None]
        self.close()
        failed = {r: a[1] if a else "no answer" for r, a in enumerate(answers) if a is None or not a[0]}
        raise RankError(
            f"{function.__qualname__} failed on {len(failed)} of {self.size} ranks (limit {timeout:.0f} s)\n"
            + "\n".join(f"--- rank {rank} ---\n{text}" for rank, text in failed.items())
        )

    def close(self) -> None:
        """Ends the processes; the next call starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        # A process that has imported everything forks the ranks, so that only the first of a session waits for imports.
        # A GPU's driver does not survive a fork.
        context: Any = multiprocessing.get_context("forkserver" if _accelerator() == "cpu" else "spawn")
        context.set_forkserver_preload(["tests.support.imported"])
        meeting_point = os.path.join(tempfile.mkdtemp(prefix="hift-ranks-"), "store")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.size, meeting_point), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)


_pools: dict[int, RankPool] = {}
refused_to: str | None = None  # the fast test that runs now, if one does


def run_on_ranks(size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """`RankPool.run` on the session's pool of that size. Skips the test where there are fewer devices.

    Raises:
        RankError: the test is marked as fast, because of its folder.
    """
    if refused_to is not None:
        raise RankError(f"{refused_to} starts ranks: move it to tests/integration, or mark it as slow")
    if _accelerator() != "cpu":
        from deepspeed.accelerator import get_accelerator

        if get_accelerator().device_count() < size:
            pytest.skip(f"{size} ranks, and this machine has {get_accelerator().device_count()} devices")
    if size not in _pools:
        _pools[size] = RankPool(size)
        atexit.register(_pools[size].close)
    return _pools[size].run(function, *args, **kwargs)


def _accelerator() -> str:
    return os.environ.get("DS_ACCELERATOR", "cpu")


def free_port() -> str:
    """One that nobody listens on, for a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _serve(pipe: Connection, rank: int, size: int, meeting_point: str) -> None:
    """Life of one rank: joins the world, then answers calls until the pipe closes."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        # Nobody listens, the ranks meet at a file; but DeepSpeed names its shared memory by it, and two sessions of
        # tests may run at once.
        "MASTER_PORT": str(10_000 + os.getppid() % 50_000),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": _accelerator(),
    }
    import torch
    from deepspeed.accelerator import get_accelerator

    from hift_ds.launch.runtime import extensions

    extensions.prepare(rank=1)  # a pool that was ended while it compiled has left a lock; without words
    torch.set_num_threads(1)
    # torch has fp16 on any CPU, slowly; DeepSpeed asks for a processor that has it, too.
    get_accelerator().is_fp16_supported = lambda: True
    backend = get_accelerator().communication_backend_name()
    backend = "gloo" if backend == "ccl" else backend
    torch.distributed.init_process_group(backend, init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    while True:
        try:
            module, name, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = (True, function(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            message = pickle.dumps(answer)
        except Exception:
            message = pickle.dumps((False, f"the result does not pickle\n{traceback.format_exc()}"))
        pipe.send_bytes(message)
        del answer, message, args, kwargs
        gc.collect()
        gc.freeze()  # DeepSpeed collects often, and the modules imported by now need no looking through
