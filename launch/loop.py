"""The training loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from hift_ds.launch.callbacks.callback import Callback, Step, finite
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.data.batches import Batch, Share, Window, load_windows, on_device
from hift_ds.launch.data.loading import Data
from hift_ds.launch.make_engine import block_names
from hift_ds.launch.methods.steps import take_step
from hift_ds.launch.methods.table import METHODS
from hift_ds.launch.model.batch_loss import summed_loss
from hift_ds.launch.runtime.ranks import StepSums


def train(
    engine: Any,
    data: Data,
    pad_token_id: int,
    settings: Settings,
    callbacks: Sequence[Callback] = (),
    first_step: int = 0,
) -> None:
    """Train from step `first_step` (0-based) to `training.max_steps`, or until a callback ends training.

    A step takes one global batch of `training.batch_size` examples, cut into micro-batches and over the ranks.
    """
    training, rank, world = settings.training, dist.get_rank(), dist.get_world_size()
    share = Share(pad_token_id, training.batch_size, settings.micro_batch_size, rank, world)
    last_step, workers = training.max_steps, settings.data.workers
    loader = load_windows(data.train, training.seed, share, first_step, last_step, workers, data.position)
    names, ledgers, sums = block_names(engine), Ledgers(engine), StepSums(engine.device, len(callbacks))

    def fetch() -> tuple[Window | None, list[Batch]]:
        window = next(loader, None)
        return window, on_device(window.batches, engine.device) if window else []

    engine.train()
    window, batches = fetch()
    for number in range(first_step + 1, training.max_steps + 1):
        for callback in callbacks:
            callback.before_step(number)
        started = time.perf_counter()
        assert window is not None
        tokens, targets, rows, position = float(window.tokens), float(window.targets), window.rows, window.position
        block, cycle = getattr(engine, "active_block", 0), getattr(engine, "cycle", number - 1)
        learning_rate = engine.basic_optimizer.param_groups[0]["lr"]
        # Dropout depends only on the step and the rank, so a resumed run draws the same masks.
        torch.manual_seed((training.seed * 1_000_003 + number - 1) * world + rank)
        forwards = len(batches) * world
        losses = [functools.partial(loss_share, engine, batch, settings, targets, forwards) for batch in batches]

        def before_step(loss: torch.Tensor, number: int = number) -> None:
            """While the device computes gradients: sum what is known, and fetch the next batches."""
            nonlocal window, batches
            sums.start(loss, [callback.contribution(number) for callback in callbacks])
            window, batches = fetch()

        is_applied = take_step(METHODS[settings.method.name], engine, losses, before_step)
        own_loss, loss, *totals = sums.read()
        for callback in callbacks:
            callback.taken(number)
        seconds = time.perf_counter() - started
        record = {"step": number, "cycle": cycle, "block": block, "block_name": names[block], "loss": finite(loss)}
        record |= {"learning_rate": learning_rate, "tokens": int(tokens), "trained_tokens": int(targets)}
        record |= {"seconds": seconds, "tokens_per_second": tokens / seconds, "skipped": not is_applied}
        data.position = position
        step = Step(number, record | engine_record(engine) | ledgers.record(block, cycle), own_loss, rows, position)
        for callback in callbacks:
            callback.describe(step)
        if any([c.after_step(step, total) for c, total in zip(callbacks, totals, strict=True)]):
            break
    if hasattr(engine, "settle"):
        engine.settle()


def loss_share(engine: Any, batch: Batch, settings: Settings, targets: float, forwards: int) -> torch.Tensor:
    """Return a micro-batch's share of the step's loss.

    The step's loss is the mean over all `targets` of the global batch, and for a mixture of experts also the mean of
    the router losses of its micro-batches.

    Args:
        forwards: number of micro-batches of the step, over all ranks.
    """
    # The sum is divided by the targets, and the router loss is not a sum over them.
    router_weight = targets / forwards
    return summed_loss(engine, batch, settings.model.task, settings.training.loss_chunk, router_weight) / targets


class Ledgers:
    """The memory ledger for the record of each step.

    To count it takes milliseconds, and from the third cycle on it repeats: by then all blocks have state. From then on,
    the last ledger after a step on the block is recorded.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._last: dict[int, Any] = {}

    def record(self, block: int, cycle: int) -> dict[str, Any]:
        """Return the ledger after a step on a block in a cycle, as `memory`; nothing if the engine has none."""
        if not hasattr(self._engine, "memory_ledger"):
            return {}
        if cycle < 2 or block not in self._last:
            self._last[block] = self._engine.memory_ledger()
        return {"memory": self._last[block]}


def engine_record(engine: Any) -> dict[str, Any]:
    """Return what the engine knows about the step it has just taken."""
    norm = engine.get_global_grad_norm()
    record: dict[str, Any] = {"grad_norm": None if norm is None else finite(float(norm))}
    if hasattr(engine, "log_values") and engine.was_step_applied():
        record["learning_rate"] = engine.log_values()["hift/lr"]  # with lr_ticks: step it is not the schedule's
    if engine.fp16_enabled():
        record["loss_scale"] = float(engine.optimizer.loss_scale)
    if engine.device.type != "cpu":
        record["memory_allocated"] = get_accelerator().memory_allocated()  # by the allocator: activations too
    return record
