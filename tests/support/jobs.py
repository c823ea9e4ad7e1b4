"""Training runs in processes of their own, through the real launcher."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests import ENVIRONMENT
from tests.support.paths import REPOSITORY
from tests.support.ranks import free_port
from tests.support.training import arguments

ENDLESS = ("training.max_steps=100000", "data.eval_examples=0", "output.export=false")


def launch(
    ranks: int,
    argv: Sequence[str],
    port: int | None = None,
    script: str = "launch/train.py",
    before: Callable[[], None] | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus RANKS launch/train.py ARGV`, as a user would type it, with these environment variables.

    `before` runs in the launcher.
    """
    command = [
        sys.executable,
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(port or free_port()),
        script,
        *argv,
    ]
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= variables
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, preexec_fn=before
    )


class Job:
    """A training run in the background, in a process group of its own; nothing of it is left at the end."""

    def __init__(self, out: Path, ranks: int, *overrides: str, resume: str | None = None) -> None:
        self.out, self.ranks, self.printed = out, ranks, out.with_name(f"{out.name}.{time.monotonic_ns()}.txt")
        argv = ["launch/train.py", *arguments(out, *overrides, resume=resume)]
        self.port = ""
        if ranks > 1:
            self.port = free_port()
            script = str(Path(sys.executable).with_name("deepspeed"))
            argv = [script, "--num_gpus", str(ranks), "--master_port", self.port, *argv]
        unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        environment = {key: value for key, value in ENVIRONMENT.items() if key not in unset}
        with self.printed.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *argv],
                cwd=REPOSITORY,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Tests that a shell started in the background hand on that it is ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        for left in Path("/dev/shm").glob(f"deepspeed_*_{self.port}_*") if self.port else ():  # 66 MB for each rank
            left.unlink(missing_ok=True)

    def text(self) -> str:
        return self.printed.read_text()

    def until(self, condition: Callable[[], Any], seconds: float = 400, what: str = "the condition") -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what} did not come in {seconds} s:\n{self.text()}"
            time.sleep(0.02)
        return value

    def wait_for_step(self, step: int) -> None:
        metrics = self.out / "metrics.jsonl"

        def reached() -> bool:
            assert self.process.poll() is None, self.text()
            return metrics.exists() and metrics.read_text().count("\n") >= step

        self.until(reached, what=f"step {step}")

    def rank(self, rank: int) -> psutil.Process:
        text = self.until(lambda: (log := self.out / "logs" / f"rank{rank}.log").exists() and log.read_text())
        return psutil.Process(int(re.findall(r"pid (\d+) on", text)[-1]))

    def launcher(self) -> psutil.Process:
        return self.rank(0).parent()

    def code(self, seconds: float = 60) -> int:
        return self.process.wait(timeout=seconds)

    def ends(self, processes: list[psutil.Process], seconds: float) -> float:
        """Seconds until all the processes are gone."""
        started = time.monotonic()
        self.until(lambda: not any(alive(process) for process in processes), seconds, f"the end of {processes}")
        return time.monotonic() - started

    def kill(self, stopped: psutil.Process) -> None:
        """End a stopped rank, once launch.py has seen that another has exited, as it would itself 30 s later."""
        self.until(lambda: "Killing subprocess" in self.text(), 30, "launch.py's end")
        stopped.kill()


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
