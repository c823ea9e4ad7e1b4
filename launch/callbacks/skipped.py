"""Steps that updated nothing because a loss or a gradient was not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed import comm as dist

from hift_ds.launch.callbacks.callback import Callback, Step
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.errors import UserError, shown
from hift_ds.launch.methods.table import METHODS


class SkippedSteps(Callback):
    """Describe each skipped step, and end the run when too many follow one another.

    Args:
        settings: settings of the run; `training.max_skipped_steps` is the longest series of skipped steps allowed.
    """

    def __init__(self, engine: Any, settings: Settings) -> None:
        self.engine, self.training = engine, settings.training
        # DeepSpeed's own engine cannot take another step after one that it skipped, except in fp16.
        can_continue = METHODS[settings.method.name].engine != "deepspeed" or engine.fp16_enabled()
        self.limit = settings.training.max_skipped_steps if can_continue else 0
        self.in_a_row = 0

    def describe(self, step: Step) -> None:
        """Add to the record of a skipped step:

        `not_finite`: "loss" or "gradient"; `ranks`: the ranks with such a loss, if not all; `rows`: the batch's
        examples, as indices of the training data, or of a stream the places of their rows.

        Steps that fp16 skips while it searches for a loss scale do not count, as long as the scale can still fall.
        """
        record = step.record
        if not record["skipped"]:
            self.in_a_row = 0
        elif record["loss"] is None or not _may_lower_scale(self.engine):
            self.in_a_row += 1
            is_loss = record["loss"] is None
            ranks = _ranks_with(self.engine.device, not math.isfinite(step.own_loss)) if is_loss else []
            record |= {"not_finite": "loss" if is_loss else "gradient", "rows": list(step.rows)}
            record["ranks"] = ranks if len(ranks) < dist.get_world_size() else []

    def after_step(self, step: Step, total: float) -> bool:
        """End the run, on all ranks alike, if too many steps in a row were skipped.

        Raises:
            UserError: naming the step, the block and the batch.
        """
        if self.in_a_row <= self.limit:
            return False
        record = step.record
        where = f" on rank {', '.join(map(str, record['ranks']))}" if record["ranks"] else ""
        again = f", and the {self.in_a_row - 1} steps before it were skipped too" if self.in_a_row > 1 else ""
        allowed = (
            f"training.max_skipped_steps allows {self.limit} skipped steps in a row."
            if self.limit == self.training.max_skipped_steps
            else "With this method the first such step ends the run."
        )
        raise UserError(
            f"training has diverged: the {record['not_finite']} is not finite{where} at step {step.number}{again}. "
            f"Block {record['block']} ({record['block_name']}), learning rate {record['learning_rate']:g}, examples "
            f"{shown(record['rows'])} of the training data (the full list is in metrics.jsonl). The weights are those "
            f"after step {step.number - self.in_a_row}. Lower training.learning_rate or training.max_grad_norm, check "
            f"these examples, or use bf16 or fp32 instead of fp16. {allowed}"
        )


def _may_lower_scale(engine: Any) -> bool:
    if not engine.fp16_enabled() or not engine.dynamic_loss_scale():
        return False
    return float(engine.optimizer.loss_scale) > engine.dynamic_loss_scale_args()["min_scale"]


def _ranks_with(device: torch.device, is_it: bool) -> list[int]:
    flags = torch.zeros(dist.get_world_size(), device=device)
    flags[dist.get_rank()] = float(is_it)
    dist.all_reduce(flags)
    return [rank for rank, flag in enumerate(flags.tolist()) if flag]
