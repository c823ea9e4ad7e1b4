"""Encoded state: masters that come back bit for bit, and moments in 8 bits whose updates are those of fp32."""

from collections.abc import Callable

import pytest
import torch

from hift_ds.config import CODEC_ALIGNMENT
from hift_ds.optim.lion import Lion
from hift_ds.state import codec
from hift_ds.state.codec import FIRST_MOMENT, SECOND_MOMENT, Moment, Split
from hift_ds.state.placement import MOMENTS
from tests.support.waits import DEVICE, Waits

ALL = torch.arange(1 << 16, dtype=torch.int32)  # upper halves


def _stored(kind: codec.Codec, values: int) -> list[torch.Tensor]:
    return [torch.zeros(values // part.grain, dtype=part.dtype) for part in kind.parts]


def _of_patterns(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    return (upper.bitwise_left_shift(16) | lower).view(torch.float32)


def _after_split(values: torch.Tensor, keep_ties: bool = True) -> torch.Tensor:
    remainder, ties = _stored(Split(), values.numel())
    weights = values.bfloat16()
    before = values.clone()
    codec.split(values, remainder, ties)
    assert torch.equal(before.view(torch.int32), values.view(torch.int32))
    return codec.join(weights, remainder, ties if keep_ties else ties.zero_())


def _is_same(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Which elements have the same bits, or are both NaN."""
    return (values.view(torch.int32) == others.view(torch.int32)) | (values.isnan() & others.isnan())


# --- split masters ------------------------------------------------------------------------------------------


def test_masters_come_back_at_every_upper_half() -> None:
    """Infinities, overflow to infinity, zeros, denormals and NaN included; at all ties and beside them."""
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = _of_patterns(ALL, torch.tensor(lower, dtype=torch.int32))
        assert _is_same(_after_split(values), values).all(), hex(lower)
        lost = ~_is_same(_after_split(values, keep_ties=False), values)
        # Without their bits, ties that were rounded down are lost: every other one that is not NaN.
        assert lost.sum() == (32640 if lower == 0x8000 else 0)


def test_random_masters_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=generator).to(torch.int32)
    assert _is_same(_after_split(bits.view(torch.float32)), bits.view(torch.float32)).all()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_master_comes_back(part: int) -> None:
    lower = ALL.repeat(64)
    for first in range(part << 14, (part + 1) << 14, 64):
        values = _of_patterns(torch.arange(first, first + 64, dtype=torch.int32).repeat_interleave(1 << 16), lower)
        assert _is_same(_after_split(values), values).all(), hex(first)


def test_ties_of_lion_come_back() -> None:
    """Its updates are a power of two: then ties are common."""
    masters = (torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().float()
    optimizer = Lion([masters.requires_grad_()], lr=2.0**-14)
    generator, tied, lost = torch.Generator().manual_seed(1), 0.0, 0.0
    for _ in range(8):
        masters.grad = torch.randn(masters.shape, generator=generator)
        optimizer.step()
        values = masters.detach()
        assert torch.equal(_after_split(values), values)
        tied += (values.view(torch.int32).bitwise_and(0xFFFF) == 0x8000).float().mean().item() / 8
        lost += (_after_split(values, keep_ties=False) != values).float().mean().item() / 8
    assert tied > 0.1 and lost > 0.05


def test_bits_of_ties_are_in_order() -> None:
    values = torch.zeros(1024)
    down = _of_patterns(torch.tensor(0x3F80, dtype=torch.int32), torch.tensor(0x8000, dtype=torch.int32))
    places = [0, 9, 23, 1023]
    values[places] = down
    remainder, ties = _stored(Split(), 1024)
    codec.split(values, remainder, ties)
    assert [(j, b) for j, b in enumerate(ties.tolist()) if b] == [(0, 1), (1, 2), (2, 128), (127, 128)]


def test_empty_parts_are_the_weights() -> None:
    weights = torch.randn(1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    masters = weights.float()
    Split().decode(_stored(Split(), 1024), masters)
    assert torch.equal(masters, weights.float())


# --- moments in 8 bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_libraries(signed: bool) -> None:
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(codec.code_map(signed), create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_values_get_the_nearest_code(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1 << 16, generator=generator) * torch.randn(1 << 16, generator=generator).mul_(3).exp_()
    values = values if signed else values.abs_()
    codes, scales = _stored(FIRST_MOMENT, values.numel())
    codec.quantize(values.clone(), codes, scales, signed, root=False)
    blocks = values.view(-1, 256)
    assert torch.equal(scales, blocks.abs().amax(1))
    scaled = (blocks / scales[:, None]).double()
    errors = (scaled[:, :, None] - codec.code_map(signed).double()).abs()
    if not signed:
        errors[:, :, 0] = torch.inf  # only zero becomes zero
    found = errors.gather(2, codes.view(-1, 256, 1).long()).squeeze(2)
    assert (found <= errors.amin(2) + 2.0**-10 * scaled.abs()).all()


@pytest.mark.parametrize("kind", [FIRST_MOMENT, SECOND_MOMENT])
def test_zeros_stay_zero(kind: Moment) -> None:
    values = torch.zeros(1024)
    values[300], values[600], values[601] = 3.0, 1e-20, 1e-40
    stored, out = _stored(kind, 1024), torch.empty(1024)
    kind.encode(values.clone(), stored)
    kind.decode(stored, out)
    assert (out[values == 0] == 0).all() and out[300] == 3.0 and out[600] == pytest.approx(1e-20)
    kind.decode(_stored(kind, 1024), out)
    assert (out == 0).all()


def test_a_small_second_moment_does_not_become_zero() -> None:
    """Beside an outlier, it becomes larger: then the update is smaller, and never that of a division by eps."""
    values = torch.full((1024,), 1e-12)
    values[0] = 1e8
    stored, out = _stored(SECOND_MOMENT, 1024), torch.empty(1024)
    SECOND_MOMENT.encode(values.clone(), stored)
    SECOND_MOMENT.decode(stored, out)
    assert (out[1:256] > 1e-12).all() and out[256:].allclose(values[256:], rtol=1e-5)


def test_values_that_are_no_numbers_stay_visible() -> None:
    for value in (torch.nan, torch.inf):
        values = torch.ones(1024)
        values[5] = value
        for kind in (FIRST_MOMENT, SECOND_MOMENT):
            stored, out = _stored(kind, 1024), torch.empty(1024)
            kind.encode(values.clone(), stored)
            kind.decode(stored, out)
            assert not out[5].isfinite() and out[256:].isfinite().all()


def _normal(generator: torch.Generator, size: int) -> torch.Tensor:
    return torch.randn(size, generator=generator)


def _student(generator: torch.Generator, size: int) -> torch.Tensor:
    """Student's t with 2 degrees of freedom: its variance is infinite."""
    squares = torch.randn(2, size, generator=generator).square_().mean(0)
    return torch.randn(size, generator=generator) / squares.sqrt_()


def _cauchy(generator: torch.Generator, size: int) -> torch.Tensor:
    """Student's t with 1 degree of freedom: it has no mean."""
    return torch.randn(size, generator=generator) / torch.randn(size, generator=generator)


def _update_error(
    gradient: Callable[[torch.Generator, int], torch.Tensor], updates: int, second: Moment = SECOND_MOMENT
) -> tuple[float, float]:
    """Train with AdamW in fp32 and with encoded moments on the same gradients, whose sizes differ between elements.

    Returns:
        The norm of the difference of the sums of all updates, relative to those in fp32, and the largest sum of an
        element relative to the largest one in fp32.
    """
    size, generator = 1 << 16, torch.Generator().manual_seed(0)
    sizes = torch.randn(size, generator=generator).mul_(0.5).exp_().mul_(1e-4)
    exact, encoded = (torch.zeros(size, requires_grad=True) for _ in range(2))
    optimizers = [torch.optim.AdamW([one], lr=1e-3) for one in (exact, encoded)]
    moments = {"exp_avg": FIRST_MOMENT, "exp_avg_sq": second}
    stored = {name: _stored(kind, size) for name, kind in moments.items()}
    for _ in range(updates):
        exact.grad = encoded.grad = gradient(generator, size) * sizes
        for optimizer in optimizers:
            optimizer.step()
        for name, kind in moments.items():
            value = optimizers[1].state[encoded][name]
            kind.encode(value, stored[name])
            kind.decode(stored[name], value.fill_(torch.nan))
    exact, encoded = exact.detach(), encoded.detach()
    error = (encoded - exact).norm() / exact.norm()
    return error.item(), (encoded.abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("gradient", [_normal, _student])
@pytest.mark.parametrize("updates", [3, 24])
def test_updates_are_those_of_fp32(gradient: Callable[..., torch.Tensor], updates: int) -> None:
    """Three cycles with one step a block, and with eight."""
    error, largest = _update_error(gradient, updates)
    assert error <= 0.05 and largest < 1.1, (error, largest)


def test_outliers_make_no_large_updates() -> None:
    error, largest = _update_error(_cauchy, 24)
    assert error <= 0.1 and largest < 1.2, (error, largest)
    _, largest = _update_error(_cauchy, 24, Moment(signed=False, root=False))
    assert largest > 5, "such gradients do not need the root"


# --- both ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Split(), FIRST_MOMENT, SECOND_MOMENT])
def test_a_codec_in_pieces_gives_the_same_bits(kind: codec.Codec) -> None:
    values = torch.randn(8192, generator=torch.Generator().manual_seed(0)).abs_()
    stored = _stored(kind, 8192)
    kind.encode(values.clone(), stored)
    whole = values.bfloat16().float()
    kind.decode(stored, whole)
    for start in range(0, 8192, CODEC_ALIGNMENT):
        cut = slice(start, start + CODEC_ALIGNMENT)
        pieces, out = _stored(kind, CODEC_ALIGNMENT), values[cut].bfloat16().float()
        kind.encode(values[cut].clone(), pieces)
        kind.decode(pieces, out)
        assert torch.equal(out, whole[cut])
        for part, piece, of_all in zip(kind.parts, pieces, stored, strict=True):
            assert torch.equal(piece, of_all.view(-1, CODEC_ALIGNMENT // part.grain)[start // CODEC_ALIGNMENT])


def test_bytes_of_state() -> None:
    assert Split().bytes_per_value == 2.125 and FIRST_MOMENT.bytes_per_value == 1 + 4 / 256


def test_the_host_does_not_wait() -> None:
    for signed in (True, False):
        codec.tables(DEVICE, signed)
    values = torch.randn(8192).abs_()
    kinds = (Split(), FIRST_MOMENT, SECOND_MOMENT)
    everything = [(kind, _stored(kind, 8192)) for kind in kinds]
    with Waits() as waits:
        for kind, stored in everything:
            out = values.bfloat16().float()
            kind.encode(values.clone(), stored)
            kind.decode(stored, out)
        assert waits.seen == [] and waits.issued.total() > 20, waits.report()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.Adam(p),
        lambda p: Lion(p),
        lambda p: torch.optim.SGD(p, momentum=0.9),
    ],
)
def test_every_state_of_an_optimizer_has_a_codec(make: Callable[..., torch.optim.Optimizer]) -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    optimizer = make([parameter])
    optimizer.step()
    with_elements = {name for name, value in optimizer.state[parameter].items() if value.dim()}
    assert with_elements and with_elements <= MOMENTS[type(optimizer)].keys()
