"""The loss of a batch as training and evaluation take it: summed, so that whoever cuts the data may divide."""

from __future__ import annotations

from typing import Any

import torch

from hift_ds.model import loss as losses


def summed_loss(engine: Any, batch: dict[str, torch.Tensor], task: str, chunk: int | None = None) -> torch.Tensor:
    """Sum of the cross-entropies of a micro-batch's trained tokens (classification: of its examples), in fp32.

    A sum, so that whoever knows the number of targets in the whole window can make the mean over all of them: then
    the same global batch has the same loss however it is cut into micro-batches and ranks.
    """
    inputs = {key: value.to(engine.device) for key, value in batch.items()}
    labels = inputs.pop("labels")
    if task == "sequence-classification":
        return losses.classification_loss(engine, inputs, labels)
    return losses.summed_loss(engine, engine.module, inputs, losses.find_targets(labels), chunk)
