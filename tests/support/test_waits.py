"""The harness that counts waits: each kind once, and none in a program that does not wait."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from hift_ds.state import transfer
from hift_ds.state.allocator import HostMemory
from tests.support.waits import DEVICE, TooEarly, Waits

X = torch.arange(4.0)  # made outside: on the device


def _host(*values: float) -> torch.Tensor:
    return torch.tensor(values)


WAITING: dict[str, tuple[Callable[[], Any], str]] = {
    "item": (lambda: X[0].item(), "item"),
    "bool": (lambda: bool(X[1]), "item"),
    "float": (lambda: float(X.sum()), "item"),
    "if": (lambda: 1 if (X > 0).any() else 0, "item"),
    "is_nonzero": (lambda: torch.is_nonzero(X[1]), "item"),
    "tolist": (lambda: X.tolist(), "tolist"),
    "tolist of a number": (lambda: X.sum().tolist(), "tolist"),
    "equal": (lambda: torch.equal(X, X), "equal"),
    "nonzero": (lambda: X.nonzero(), "nonzero"),
    "where": (lambda: torch.where(X > 0), "nonzero"),
    "masked_select": (lambda: X.masked_select(X > 0), "masked_select"),
    "mask": (lambda: X[X > 0], "index by a mask"),
    "values under a mask": (lambda: X.clone().__setitem__(X > 2, X[:1]), "index by a mask"),
    "unique": (lambda: X.unique(), "unique"),
    "repeat_interleave": (lambda: X.repeat_interleave(X.long()), "repeat_interleave"),
    "cpu": (lambda: X.cpu(), "blocking copy to the host"),
    "to cpu": (lambda: X.to("cpu", torch.float64), "blocking copy to the host"),
    "to cpu without waiting": (lambda: X.to("cpu", non_blocking=True), "copy to pageable memory"),
    "to the device": (lambda: _host(1, 2).to(DEVICE), "blocking copy to the device"),
    "to another tensor": (lambda: _host(1, 2).to(X), "blocking copy to the device"),
    "from pageable memory": (lambda: _host(1, 2).to(DEVICE, non_blocking=True), "copy from pageable memory"),
    "copy_": (lambda: X.clone().copy_(torch.zeros(4)), "blocking copy to the device"),
    "copy_ from pinned memory": (lambda: X.clone().copy_(_host(1).pin_memory()), "blocking copy to the device"),
    "tensor": (lambda: torch.tensor([1.0, 2.0], device=X.device), "tensor from Python data"),
    "tensor of a number": (lambda: torch.tensor(1.0, device="cpu:0"), "tensor from Python data"),
    "FloatTensor": (lambda: get_accelerator().FloatTensor([1.0]), "tensor from Python data"),
    "by the kind of device": (
        lambda: _host(1).to(get_accelerator().device_name()) + torch.zeros(1, device=get_accelerator().device_name()),
        "blocking copy to the device",
    ),
    "new_tensor": (lambda: X.new_tensor([1.0]), "tensor from Python data"),
    "synchronize": (lambda: (X + 1, get_accelerator().synchronize()), "synchronize of the accelerator"),
    "of a stream": (lambda: (X + 1, get_accelerator().current_stream().synchronize()), "synchronize of a stream"),
    "of an event": (lambda: (X + 1, transfer.mark().synchronize()), "synchronize of an event"),
}


@pytest.mark.parametrize("name", WAITING)
def test_each_kind_of_wait_is_counted_once(name: str) -> None:
    action, kind = WAITING[name]
    with Waits() as waits:
        action()
    assert [wait.kind for wait in waits.seen] == [kind]
    assert waits.seen[0].site.startswith("tests/support/test_waits.py:") and not waits.seen[0].in_model


def test_what_does_not_wait_counts_none() -> None:
    with Waits() as waits:
        host = _host(1, 2, 3, 4)
        assert bool(host[0]) and host.tolist() and torch.equal(host, host) and host[host > 1].numel() == 3
        assert host.nonzero().numel() == 4 and host.cpu() is host and host.to("cpu") is host
        pinned = get_accelerator().pin_memory(host)
        assert pinned.is_pinned() and get_accelerator().is_pinned(pinned) and not host.is_pinned()
        there = pinned.to(DEVICE, non_blocking=True)
        assert there.device == DEVICE == X.device and host.device == torch.device("cpu") and there.to(DEVICE) is there
        masked = there.masked_fill(there > 2, 0.0)
        masked[there > 2] = 1.0
        assert (masked * torch.tensor(2.0)).device == DEVICE, "a number of the host goes into any computation"
        assert get_accelerator().device_name() == "cpu" and get_accelerator().on_accelerator(X)
        assert not get_accelerator().on_accelerator(host) and X.to(get_accelerator().device_name()) is X
        torch.full((2,), 1.0, device=DEVICE).add_(torch.zeros(2, device=DEVICE)).copy_(there[:2])
        there.repeat_interleave(X.long(), output_size=6)
        torch.zeros_like(there).cumsum(0).index_select(0, there.long().clamp(max=1))
        assert waits.place(torch.zeros_like(there)) == "device" and waits.place(torch.zeros_like(host)) == "host"
        HostMemory().empty(torch.empty(4, device="meta")).copy_(there, non_blocking=True)
        get_accelerator().current_stream().synchronize()
        waits.reset()
        get_accelerator().current_stream().synchronize()  # covered
        get_accelerator().synchronize()
        assert waits.seen == []


def test_memory_is_the_devices_again_after_it_was_freed() -> None:
    with Waits() as waits:
        for _ in range(50):
            host = torch.zeros(4)
            assert waits.place(host) == "host"
            del host
            assert waits.place(torch.zeros(4, device=DEVICE)) == "device"


def test_a_wait_covers_what_its_stream_had_waited_for() -> None:
    with Waits() as waits:
        lane = transfer.Lane()
        first = transfer.mark()
        with lane.after(first):
            X + 1
        second = lane.mark()
        transfer.wait(second)
        (X + 1).sum().item()
        second.synchronize()
        first.synchronize()
        assert [wait.kind for wait in waits.seen] == ["item"]
        with lane.after():
            X + 1
        third = lane.mark()
        X.sum().item()  # waits for its own stream only
        third.synchronize()
        third.synchronize()
        assert [wait.kind for wait in waits.seen] == ["item", "item", "synchronize of an event"]


def test_a_copy_that_nothing_waited_for_must_not_be_read() -> None:
    with Waits():
        buffer = HostMemory().empty(torch.empty(4, device="meta"))
        buffer[:2].copy_(X[:2], non_blocking=True)
        buffer[2:].tolist()
        for read in (lambda: buffer[0].item(), buffer.tolist, lambda: buffer + 1):
            with pytest.raises(TooEarly, match=r"test_waits\.py:"):
                read()
        X.sum().item()
        assert buffer[:2].tolist() == [0.0, 1.0]


def test_hooks_inside_backward_are_watched() -> None:
    weights = torch.ones(2, requires_grad=True)
    weights.register_hook(lambda gradient: gradient.to("cpu").to(gradient.device))
    with Waits() as waits:
        (weights * 2).sum().backward()
    kinds = ["blocking copy to the host", "blocking copy to the device"]
    assert [wait.kind for wait in waits.seen] == kinds


@pytest.mark.parametrize("linear", ["torch's", "the one that ZeRO 3 leaves behind"])
def test_operations_of_a_model_are_told_from_others(linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    from tests.support import tiny

    is_torchs = linear == "torch's"
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear if is_torchs else zero3_linear_wrap)
    model, batch = tiny.model(), tiny.micro_batch(0, 0)
    with Waits() as waits:
        loss = model(**batch).loss
        loss.backward()
        assert set(waits.issued) == {"model"} and waits.issued["model"] > 100, waits.issued
        (model.lm_head.weight.grad * 2)[:3]
    (line,) = set(waits.issued) - {"model"}
    assert waits.issued[line] == 1 and line.startswith("tests/support/test_waits.py:")


def test_the_innermost_lines_of_deepspeed_and_of_the_project_are_named() -> None:
    from deepspeed.runtime.utils import clip_tensors_by_global_norm, is_invalid_grad_norm

    with Waits() as waits:
        clip_tensors_by_global_norm([X.clone()], global_norm=X.sum())
        is_invalid_grad_norm(X.sum())
    for wait in waits.seen:
        assert wait.site.startswith("deepspeed/runtime/utils.py:"), wait
        assert " from tests/support/test_waits.py:" in wait.site
    assert waits.seen and str(waits.seen[0]) in waits.report()
