"""The summed loss of a batch, for training and evaluation; the caller divides by the number of targets."""

from __future__ import annotations

from typing import Any

import torch

from hift_ds.model import loss as losses


def summed_loss(engine: Any, batch: dict[str, torch.Tensor], task: str, chunk: int | None = None) -> torch.Tensor:
    """Sum the cross-entropies of a micro-batch's trained tokens (for classification, of its examples), in fp32.

    The caller divides by the number of targets in the global batch, so that its mean loss does not depend on the number
    of micro-batches and ranks.

    Args:
        batch: from `hift_ds.launch.data.batches.collate`.
        task: "causal-lm" or "sequence-classification".
        chunk: tokens whose logits exist at a time; None: by size; 0: all.
    """
    inputs = {key: value.to(engine.device) for key, value in batch.items()}
    labels = inputs.pop("labels")
    if task == "sequence-classification":
        return losses.classification_loss(engine, inputs, labels)
    return losses.summed_loss(engine, engine.module, inputs, losses.find_targets(labels), chunk)
