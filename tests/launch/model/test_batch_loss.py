"""The summed loss of a batch against plain cross entropy, and what is said of the loss."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hift_ds.launch.model.batch_loss import loss_note, summed_loss
from tests.support.tiny import model


class Engine:
    """A model in place of an engine."""

    device = torch.device("cpu")

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def loss_and_gradient(empty_first: bool) -> list[Any]:
    """Return the window's loss, the expected one, and the worst relative error of a gradient.

    One of the two micro-batches may have no trained token.
    """
    llama = model()
    ids = torch.arange(24).reshape(2, 12) % 60
    labels = torch.where(torch.arange(12) > 6, ids, -100)
    if empty_first:
        labels[0] = -100
    loss = torch.zeros(())
    for row in range(2):
        batch = {"input_ids": ids[row : row + 1], "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
        part = summed_loss(Engine(llama), batch | {"labels": labels[row : row + 1]}, "causal-lm")
        part.backward()
        loss = loss + part.detach()
    reference = model()
    logits = reference(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    expected.backward()
    pairs: Any = zip(llama.parameters(), reference.parameters(), strict=True)
    worst = max(((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in pairs)
    return [loss.item(), expected.item(), worst]


@pytest.mark.parametrize("empty_first", [False, True])
def test_summed_loss_against_plain_cross_entropy(empty_first: bool) -> None:
    loss, expected, gradient_error = loss_and_gradient(empty_first)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradient_error < 1e-5


@pytest.mark.parametrize(
    ("attributes", "wanted", "said"),
    [
        ({"router_aux_loss_coef": 0.02}, True, "includes the router loss of the experts times 0.02"),
        ({"aux_loss_coef": 0.5}, False, "no term that balances the experts"),
        ({"router_aux_loss_coef": 0.0}, False, ""),
        ({}, True, "Model has no router loss"),  # a classifier of a mixture of experts
        ({"z_loss_coefficient": 0.1}, False, "z_loss_coefficient=0.1"),
        ({}, False, ""),
    ],
)
def test_what_is_said_of_the_loss(attributes: dict[str, float], wanted: bool, said: str) -> None:
    model = type("Model", (), attributes | {"config": SimpleNamespace(output_router_logits=wanted)})()
    note = loss_note(model)
    assert note.startswith("note: ") and said in note if said else note == ""
