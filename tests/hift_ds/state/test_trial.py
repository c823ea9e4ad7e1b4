"""The trial that decides whether an optimizer's tensors may be flattened and cut, and its refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hift_ds.state.trial import examine


class Example(torch.optim.Optimizer):
    """Momentum with a twist: one of ``TWISTS``."""

    def __init__(self, params: Any, twist: str = "", lr: Any = 0.1, **settings: Any):
        super().__init__(params, {"lr": lr, "momentum": 0.9, **settings})
        self.twist = TWISTS[twist]
        self.held: dict[str, Any] = {}
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(p.grad)
                self.twist(self, group, p, state)
                p.add_(momentum, alpha=-float(group["lr"]))


def on_large(change: Callable[..., None]) -> Callable[..., None]:
    return lambda self, group, p, state: change(p, state) if p.numel() >= 4096 else None


def counts_in_the_group(self: Any, group: Any, p: Any, state: Any) -> None:
    if p is group["params"][0]:
        group["k"] += 1
    p.mul_(1 - 0.01 * group["k"])


def raises(self: Any, group: Any, p: Any, state: Any) -> None:
    raise ArithmeticError("no such kernel")


def averages_beside_the_state(self: Any, group: Any, p: Any, state: Any) -> None:
    self.held["norm"] = 0.5 * self.held.get("norm", 0) + p.grad.norm()
    p.div_(1 + 1e-3 * self.held["norm"])


def counts_beside_the_state(self: Any, group: Any, p: Any, state: Any) -> None:
    self.count += 1


TWISTS: dict[str, Callable[..., None]] = {
    "": lambda *_: None,
    "counts in the group": counts_in_the_group,
    "raises": raises,
    "norm of large tensors": on_large(lambda p, state: p.div_(1 + p.grad.norm() * 1e-3)),
    "rows of large tensors": on_large(lambda p, state: state.setdefault("rows", torch.zeros(p.shape[0]))),
    "blocks of large tensors": on_large(lambda p, state: state.setdefault("scale", torch.zeros(p.numel() // 256 + 1))),
    "object in the state": lambda self, group, p, state: state.setdefault("projector", object()),
    "state in the group": lambda self, group, p, state: group.setdefault("memory", {}).setdefault(p, p.clone()),
    "averages beside the state": averages_beside_the_state,
    "counts beside the state": counts_beside_the_state,
    "state of nothing": lambda self, group, p, state: self.state["all"].update(n=1),
    "rate must be a tensor": lambda self, group, p, state: p.add_(group["lr"].item()),
}


def example(twist: str = "", **settings: Any) -> Example:
    return Example([torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(4))], twist, **settings)


def test_an_elementwise_optimizer_may_be_cut() -> None:
    traits = examine(example())
    assert (traits.shaped, traits.state_bytes, traits.counted) == (None, 4.0, frozenset())
    assert traits.state == (("momentum", torch.float32),)


def test_state_is_known_of_all_parameter_groups_before_a_step() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(3))], "amsgrad": amsgrad} for amsgrad in (False, True)]
    traits = examine(torch.optim.AdamW(groups))
    assert traits.state == tuple((name, torch.float32) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
    assert traits.state_bytes == 12
    assert examine(torch.optim.SGD(groups[0]["params"])).state == ()
    assert examine(torch.optim.Adagrad(groups[0]["params"])).state == (("sum", torch.float32),)


def test_state_of_a_shaped_optimizer_is_not_known_before_a_step() -> None:
    assert examine(example("rows of large tensors")).state == ()


def test_an_own_count_in_the_group_is_noticed() -> None:
    traits = examine(example("counts in the group", k=0))
    assert traits.counted == {"k"} and traits.shaped is None


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("norm of large tensors", "depends on others of its tensor"),
        ("rows of large tensors", "'rows' has the shape (67,)"),
        ("blocks of large tensors", "'scale' has the shape"),
    ],
)
def test_large_tensors_that_must_stay_whole_are_noticed(twist: str, reason: str) -> None:
    assert reason in str(examine(example(twist)).shaped)


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("raises", "raises ArithmeticError: no such kernel"),
        ("object in the state", "state 'projector' is a object"),
        ("state in the group", "parameter groups ('memory')"),
        ("averages beside the state", "depends on more than the parameters"),
        ("counts beside the state", "its steps change its attribute 'count'"),
        ("state of nothing", "'all', which belongs to no parameter"),
    ],
)
def test_state_that_cannot_leave_the_device_is_refused(twist: str, reason: str) -> None:
    with pytest.raises(ValueError, match="HiFT cannot train with Example of tests") as error:
        examine(example(twist))
    assert reason in str(error.value) and "optim='adamw_torch'" in str(error.value)


def test_a_rate_that_is_a_tensor_stays_one_and_is_not_changed() -> None:
    rate = torch.tensor(0.25)
    optimizer = example("rate must be a tensor", lr=rate)
    examine(optimizer)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25


def test_an_optimizer_is_not_changed() -> None:
    optimizer = example("counts in the group", k=0)
    before = [dict(group) for group in optimizer.param_groups]
    seed = torch.get_rng_state()
    examine(optimizer)
    assert optimizer.param_groups == before and not optimizer.state
    assert torch.equal(torch.get_rng_state(), seed)


def test_an_optimizer_with_state_is_refused() -> None:
    """Each block begins without state, so the state would be lost."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(ValueError, match="made state, and each block begins without state"):
        examine(optimizer)


def test_a_subclass_of_a_known_optimizer_is_tried() -> None:
    class Scaled(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.div_(p.grad.norm())
            super().step()

    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    assert examine(torch.optim.AdamW([parameter])).shaped is None
    assert "depends on others" in str(examine(Scaled([parameter])).shaped)


def test_muon_of_torch_is_tried_on_matrices() -> None:
    """It takes no other parameters."""
    traits = examine(torch.optim.Muon([torch.nn.Parameter(torch.zeros(3, 4))]))
    assert "depends on others" in str(traits.shaped) or "raise" in str(traits.shaped)
    assert traits.state_bytes == 4.0


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS of torch: a trial step .* raises TypeError: .*closure"):
        examine(torch.optim.LBFGS([torch.nn.Parameter(torch.zeros(3, 4))]))
