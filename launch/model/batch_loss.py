"""The summed loss of a batch, for training and evaluation; the caller divides by the number of targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hift_ds.model import loss as losses


def summed_loss(
    engine: Any, batch: dict[str, Any], task: str, chunk: int | None = None, router_weight: float = 0.0
) -> torch.Tensor:
    """Sum the cross-entropies of a micro-batch's trained tokens (for classification, of its examples), in fp32.

    The caller divides by the number of targets in the global batch, so that its mean loss does not depend on the number
    of micro-batches and ranks.

    Args:
        batch: from `hift_ds.launch.data.batches.collate`. The `labels` of a language model may be `Targets`, for which
            the host does not wait.
        task: "causal-lm" or "sequence-classification".
        chunk: tokens whose logits exist at a time; None: by size; 0: all.
        router_weight: factor of the router loss of a mixture of experts, which is added; 0: leave it out.
    """
    device = engine.device
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if task == "sequence-classification":
        return losses.classification_loss(engine, inputs, labels.to(device))
    found = labels if isinstance(labels, losses.Targets) else losses.find_targets(labels)
    targets = replace(found, kept=found.kept.to(device), rows=found.rows.to(device), values=found.values.to(device))
    return losses.summed_loss(engine, engine.module, inputs, targets, chunk, router_weight)


def loss_note(model: Any) -> str:
    """Return a note about terms that a Hugging Face model adds to the cross-entropy in its own loss, or ""."""
    inner = losses.unwrapped(model)
    wanted = getattr(inner.config, "output_router_logits", False)
    coefficient = losses.router_coefficient(model)
    if coefficient and wanted:
        return (
            f"note: the training loss includes the router loss of the experts times {coefficient:g}, because the "
            "model's configuration has output_router_logits; held-out losses do not include it"
        )
    if coefficient:
        return (
            f"note: the training loss has no term that balances the experts. The model has a coefficient of "
            f"{coefficient:g} for its router loss, but output_router_logits is false. To add the router loss, set "
            "output_router_logits to true in the config.json of the model's folder (model.config.output_router_logits "
            "for a model from scratch)"
        )
    if wanted:
        kind = type(inner).__name__
        return f"note: output_router_logits is true, but {kind} has no router loss, so the training loss has none"
    if z := getattr(inner, "z_loss_coefficient", 0):
        return f"note: the model's own loss has a term with z_loss_coefficient={z:g}, which training leaves out"
    return ""
