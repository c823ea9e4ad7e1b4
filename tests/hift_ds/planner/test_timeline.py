"""The simulated device, on programs whose times are known, and what operations of PyTorch cost."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from hift_ds.planner import timeline
from hift_ds.planner.timeline import (
    ATTENTION,
    BUS_SHARE,
    BUS_SHARE_BOTH,
    CARDS,
    FETCH,
    HOST,
    KERNEL,
    MAIN,
    MEMORY_SHARE,
    PRODUCT,
    STEP,
    STORE,
    TO_DEVICE,
    TO_HOST,
    Card,
    Operation,
    Trace,
    simulate,
)

CARD = Card(flops=1.0, flops_fp32=1.0, memory=1.0 / MEMORY_SHARE, bus=1.0 / BUS_SHARE)  # a byte takes a second


def kernel(seconds: float, *after: int, stream: str = MAIN) -> Operation:
    return Operation(stream, nbytes=seconds, after=after)


def copy(stream: str, seconds: float, *after: int) -> Operation:
    return Operation(stream, TO_DEVICE if stream == FETCH else TO_HOST, nbytes=seconds, after=after)


def times(*program: Operation, host: float = 0.0) -> list[tuple[float, float]]:
    found = simulate(program, CARD, host)
    return [(pytest.approx(begun), pytest.approx(done)) for begun, done in zip(found.begun, found.done, strict=True)]


def test_operations_of_a_stream_follow_each_other() -> None:
    assert times(kernel(2), kernel(3)) == [(0, 2), (2, 5)]


def test_kernels_and_copies_run_beside_each_other() -> None:
    assert times(kernel(2), copy(FETCH, 3), kernel(1, 1)) == [(0, 2), (0, 3), (3, 4)]


def test_kernels_of_two_streams_share_the_device() -> None:
    assert times(kernel(2), kernel(1, stream=STEP)) == [(0, 3), (0, 2)]


def test_copies_in_both_directions_slow_each_other_down() -> None:
    slow = BUS_SHARE / BUS_SHARE_BOTH
    assert times(copy(FETCH, 2), copy(STORE, 1)) == [(0, slow + 1), (0, slow)]


def test_copies_in_one_direction_are_made_in_the_order_of_issue() -> None:
    """Also those of several streams, and also if the earlier one has to wait."""
    other = Operation(MAIN, TO_DEVICE, nbytes=1)
    assert times(copy(FETCH, 2), other) == [(0, 2), (2, 3)]
    assert times(kernel(5, stream=STEP), copy(FETCH, 2, 0), other) == [(0, 5), (5, 7), (7, 8)]


def test_the_host_issues_one_operation_after_the_other() -> None:
    assert times(kernel(1), kernel(1), copy(FETCH, 1), host=2.0) == [(0, 1), (2, 3), (4, 5)]


def test_the_host_waits() -> None:
    program = [kernel(5), copy(FETCH, 1), Operation(HOST, after=(0,)), kernel(1)]
    assert times(*program, host=1.0) == [(0, 5), (1, 2), (5, 5), (5, 6)]


def test_a_wait_for_what_comes_later_is_an_error() -> None:
    with pytest.raises(ValueError, match="never done"):
        simulate([kernel(1, 1), kernel(1)], CARD)


def test_what_operations_cost() -> None:
    with FakeTensorMode(), Trace() as trace:
        x = torch.empty(4, 128, 64, dtype=torch.bfloat16)
        weight = torch.empty(32, 64, dtype=torch.bfloat16)
        y = F.linear(x, weight)
        y.view(2, 2, 128, 32).transpose(1, 2)
        y.add(torch.zeros(1, dtype=torch.bfloat16).expand(4, 128, 32))
        F.scaled_dot_product_attention(*[x.view(4, 128, 4, 16).transpose(1, 2)] * 3, is_causal=True)
    product, zeros, add, attention = trace.passes["forward"]
    assert product.kind == PRODUCT and product.flops == 2 * 4 * 128 * 64 * 32
    assert product.nbytes == 2 * (x.numel() + weight.numel() + y.numel()) and not product.fp32
    assert zeros.kind == add.kind == KERNEL and add.nbytes == 2 * (2 * y.numel() + 1)
    assert attention.kind == ATTENTION and attention.flops == 4 * 4 * 4 * 128 * 128 * 16 / 2


def test_the_backward_pass_of_attention_is_counted() -> None:
    with FakeTensorMode(), Trace() as trace:
        x = torch.empty(1, 2, 64, 16, dtype=torch.bfloat16, requires_grad=True)
        loss = F.scaled_dot_product_attention(x, x, x).sum()
        trace.phase = "backward"
        loss.backward()
    (forward,) = [one for one in trace.passes["forward"] if one.kind == ATTENTION]
    (backward,) = [one for one in trace.passes["backward"] if one.kind == ATTENTION]
    assert forward.flops == 4 * 2 * 64 * 64 * 16 and backward.flops == 2.5 * forward.flops


def test_cards_have_plausible_rates() -> None:
    for name, card in CARDS.items():
        assert card.flops > card.flops_fp32 > 1e13 and 2e11 < card.memory < 1e13, name
        assert card.bus in (timeline._PCIE4 / 2, timeline._PCIE4, timeline._PCIE5), name
    assert [name for name, card in CARDS.items() if card.measured] == ["h200"]
