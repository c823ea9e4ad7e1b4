"""What a run says, and when it stops, where a loss or a gradient is not finite. No rank has updated anything then."""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed import comm as dist

from hift_ds.launch.config.settings import Settings
from hift_ds.launch.data.batches import window_batches
from hift_ds.launch.errors import UserError, shown


class SkippedSteps:
    """Says what is known of a step that updated nothing, and stops the run at one too many in a row.

    Args:
        settings: of the run; `training.max_skipped_steps` is how many there may be.
        n_examples: of the training data.
        may_go_on: the engine can take another step after one that it left out.
    """

    def __init__(self, settings: Settings, n_examples: int, may_go_on: bool) -> None:
        self.training, self.n_examples = settings.training, n_examples
        self.limit = settings.training.max_skipped_steps if may_go_on else 0
        self.in_a_row = 0

    def note(self, engine: Any, record: dict[str, Any], own_loss: float) -> None:
        """Add to the record of a skipped step `not_finite` ("loss" or "gradient"), `ranks` (with such a loss, where it
        is only some) and `rows` (the batch's examples: indices of the training data). Every rank calls it.

        fp16's search for a loss scale is not such a step, nor does it count, as long as the scale can fall.
        """
        if not record["skipped"]:
            self.in_a_row = 0
        elif record["loss"] is None or not _may_lower_scale(engine):
            self.in_a_row += 1
            ranks = _ranks_with(engine.device, not math.isfinite(own_loss)) if record["loss"] is None else []
            record |= {"not_finite": "gradient" if record["loss"] is not None else "loss", "rows": self._rows(record)}
            record["ranks"] = ranks if len(ranks) < dist.get_world_size() else []

    def _rows(self, record: dict[str, Any]) -> list[int]:
        size = self.training.batch_size
        (rows,) = next(window_batches(self.n_examples, self.training.seed, size, size, 0, 1, record["step"] - 1))
        return rows

    def check(self, record: dict[str, Any]) -> None:
        """Stop the run, on all ranks alike, where the steps in a row are too many.

        Raises:
            UserError: naming the step, the block and the batch.
        """
        if self.in_a_row <= self.limit:
            return
        where = f" on rank {', '.join(map(str, record['ranks']))}" if record["ranks"] else ""
        again = f", and the {self.in_a_row - 1} steps before it were skipped too" if self.in_a_row > 1 else ""
        allowed = (
            f"Up to training.max_skipped_steps ({self.limit}) in a row are left out."
            if self.limit == self.training.max_skipped_steps
            else "With this method the first such step ends the run."
        )
        raise UserError(
            f"training has diverged: the {record['not_finite']} is not finite{where} at step {record['step']}{again}. "
            f"Block {record['block']} ({record['block_name']}), learning rate {record['learning_rate']:g}, examples "
            f"{shown(record['rows'])} of the training data (all in metrics.jsonl). The weights are those of step "
            f"{record['step'] - self.in_a_row}. Lower training.learning_rate or training.max_grad_norm, look at these "
            f"examples, or use bf16 or fp32 instead of fp16. {allowed}"
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
