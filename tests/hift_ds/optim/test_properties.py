"""An optimizer restricted to some parameters: its settings, its state, its step."""

import torch

from hift_ds.optim.properties import restrict


def test_a_restricted_optimizer_has_the_settings_of_each_group() -> None:
    """Against an optimizer made by hand with the same settings. The defaults differ from both groups."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(7)) for _ in range(3)]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    first = {"lr": 0.1, "betas": (0.5, 0.6), "weight_decay": 0.3, "eps": 1e-3, "amsgrad": True}
    second = {"lr": 0.2, "betas": (0.7, 0.8), "weight_decay": 0.4, "eps": 1e-2, "amsgrad": False}
    whole = torch.optim.AdamW([{"params": ours[:1], **first}, {"params": ours[1:], **second}], lr=1e-5)
    clone, sources = restrict(whole, [ours[0], ours[2]])
    truth = torch.optim.AdamW([{"params": copies[:1], **first}, {"params": copies[2:], **second}])
    assert sources == [0, 1]
    for _ in range(3):
        for p, q in zip(ours, copies, strict=True):
            p.grad = torch.randn(7)
            q.grad = p.grad.clone()
        clone.step()
        truth.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, copies, strict=True))
    assert set(clone.state) == {ours[0], ours[2]} and not whole.state


def test_a_restricted_optimizer_leaves_out_groups_without_a_parameter() -> None:
    ours = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    whole = torch.optim.SGD([{"params": ours[:1], "lr": 0.5}, {"params": ours[1:], "lr": 0.25}], lr=1.0)
    clone, sources = restrict(whole, ours[1:])
    ours[1].grad = torch.ones(2)
    clone.step()
    assert sources == [1] and ours[1].tolist() == [0.75, 0.75] and ours[0].tolist() == [1.0, 1.0]
