"""Weights & Biases in a thread: training never waits for it and never fails because of it."""

from __future__ import annotations

import contextlib
import logging as python_logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from hift_ds.launch.config.settings import Settings
from hift_ds.launch.exit_codes import STOPPED

FINISH_SECONDS = 60.0  # time to write and send the remaining records at the end of a run
SECOND = 1.0  # time in which a process that closed its connection ends
END_SECONDS = 10.0  # time for the thread to notice that the process was killed


class Tracker:
    """A W&B run in its own thread. If W&B's service process is killed, stops or is slow, only its records are lost.

    Attributes:
        id: id of the W&B run, which another process can continue.
    """

    def __init__(self, run: Any, warn: Callable[[str], None]) -> None:
        self.id: str = run.id
        self._run, self._warn, self._given_up = run, warn, False
        self._service = _find_service()
        self._sent: queue.SimpleQueue[Callable[[Any], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Queue the record of a step."""
        values = flat(record)
        self._sent.put(lambda run: run.log(values, step=values["step"]))

    def close(self, summary: dict[str, Any] | None) -> None:
        """Send the summary and end the run, or give up after `FINISH_SECONDS`.

        Args:
            summary: None if the run was stopped and will be continued.
        """
        if summary is None:
            self._sent.put(lambda run: run.mark_preempting())
            self._sent.put(lambda run: run.finish(exit_code=STOPPED))
        else:
            values = flat(summary)
            self._sent.put(lambda run: run.summary.update(values))
            self._sent.put(lambda run: run.finish())
        self._sent.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._given_up = True
            why = ", since its process has ended," if self._is_gone() else ""
            self._warn(
                f"Weights & Biases did not finish within {FINISH_SECONDS:g} s{why} and was ended; `wandb sync` sends "
                "what it has written"
            )
            if self._service is not None:  # at exit W&B would wait for it without a limit
                self._service.kill()
            self._thread.join(END_SECONDS)

    def _work(self) -> None:
        try:
            while send := self._sent.get():
                if self._is_gone():  # W&B itself does not report it
                    raise ConnectionError
                send(self._run)
        except Exception as error:
            if not self._given_up:
                reason = "its process has ended" if self._is_gone(SECOND) else f"{type(error).__name__}: {error}"
                self._warn(f"Weights & Biases failed and is now off: {reason}")
            import wandb

            with contextlib.suppress(Exception):  # otherwise it retries at exit, and fails with a traceback
                wandb.teardown()

    def _is_gone(self, patience: float = 0.0) -> bool:
        """Return whether W&B's process has ended, or ends within `patience` seconds: it closes its connection first."""
        deadline = time.monotonic() + patience
        while self._service is not None:
            if not _is_alive(self._service):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return False


def start_wandb(folder: Path, settings: Settings, run_id: str | None, warn: Callable[[str], None]) -> Tracker | None:
    """Start the tracker of a run, if `logging.wandb` asks for it. If W&B cannot start, warn and return None."""
    logging = settings.logging
    if logging.wandb == "off":
        return None
    try:
        import wandb

        python_logging.raiseExceptions = False  # or W&B's log file prints a traceback for each line on a full disk
        if logging.wandb == "online" and not wandb.login(prompt=False):
            raise RuntimeError("there is no API key; run `wandb login`, or set logging.wandb=offline")
        run = wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_name,
            dir=str(folder),
            mode="online" if logging.wandb == "online" else "offline",
            id=run_id,
            resume="allow" if run_id else None,
            config=settings.as_dict(),
            settings=wandb.Settings(silent=not logging.verbose, init_timeout=20, finish_timeout=FINISH_SECONDS / 2),
        )
    except Exception as error:
        warn(f"Weights & Biases cannot start; training continues without it: {' '.join(str(error).split())}")
        return None
    return Tracker(run, warn)


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping; names are joined by slashes."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        found.update(flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value})
    return found


def _find_service() -> psutil.Process | None:
    """Return the service process that W&B has started."""
    return next((child for child in psutil.Process().children() if "wandb" in child.name()), None)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
