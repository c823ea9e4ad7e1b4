"""How the store holds a block's state in fewer bytes, and how a chunk on the device is encoded and decoded.

A chunk is one flat vector for each tensor of state. Encoding and decoding take a constant number of operations,
whatever number of parameters a chunk holds. They work within blocks of ``BLOCK`` elements at most, so that a step in
chunks gives the same bits as a step of the whole block. The host never waits for the device.

* :class:`Split` holds an fp32 master beside its bf16 weight in 17 bits, exactly.
* :class:`Moment` holds an fp32 moment in 8 bits and one fp32 scale for each ``BLOCK`` elements, not exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch

# Elements that share a scale, as in bitsandbytes and torchao.
BLOCK = 256
# Bits 0 to 16 of an fp32 number, and their value at a tie that bf16 rounds down: to the even upper half.
_LOWER_BITS, _ROUNDED_DOWN = 0x1FFFF, 0x8000
# Multiplied by the first, an int64 of eight bytes 0 or 1 has the lowest bit of byte i at bit 56 + i. No two partial
# products meet, so nothing is carried. The second copies a byte into all eight, and the third keeps bit i of byte i.
_GATHER, _SPREAD, _DIAGONAL = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - (1 << 64)
# Scaled values are encoded by their fp16 pattern. Times this, those from 1.9e-9 to 1 are normal numbers of fp16.
_FP16_RANGE = 2.0**15
# No scale is smaller, so that values can be divided by it.
_SMALLEST_SCALE = 2.0**-100


def split(values: torch.Tensor, remainder: torch.Tensor, ties: torch.Tensor) -> None:
    """Store what the bf16 weights (``values.bfloat16()``, rounded to nearest even) lack of fp32 masters.

    Takes 5 bytes of temporary memory an element.

    Args:
        values: fp32[n], n a multiple of 8.
        remainder: int16[n]; receives the lower half of each value.
        ties: uint8[n / 8]; bit i of byte j becomes 1 if element 8j + i is half way between two bf16 numbers and its
            weight is the one nearer to zero. Without it the value could as well be the same distance below the weight.
    """
    bits = values.view(torch.int32)
    remainder.copy_(bits)  # int32 to int16 keeps the lower half
    is_tie = bits.bitwise_and(_LOWER_BITS).eq(_ROUNDED_DOWN)
    packed = is_tie.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56)
    ties.copy_(packed)  # int64 to uint8 keeps the lowest byte


def join(
    weights: torch.Tensor, remainder: torch.Tensor, ties: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the fp32 masters that :func:`split` was given, bit for bit; a NaN may be another NaN.

    Takes 1 byte of temporary memory an element, on a CPU 4.

    Args:
        weights: bf16[n], or these values in fp32; may be ``out``.
        remainder, ties: what :func:`split` stored.
        out: fp32[n], receives the masters; None: a new tensor.
    """
    if out is None:
        out = torch.empty_like(weights, dtype=torch.float32)
    bits = out.copy_(weights).view(torch.int32)
    is_tie = ties.long().mul_(_SPREAD).bitwise_and_(_DIAGONAL).view(torch.uint8).ne_(0)
    # The remainder has a sign: from half way on it leads to the weight's lower neighbour plus the lower half, which is
    # right if the weight was rounded up. A tie that was rounded down is one neighbour higher.
    bits.add_(is_tie, alpha=1 << 16).add_(remainder)
    return out


def quantize(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, signed: bool, root: bool) -> None:
    """Store fp32 values in 8 bits.

    Values are divided by the largest magnitude in their block, and encoded by the nearest number of :func:`code_map`,
    up to 2**-11 of the value. A zero stays zero. If ``signed`` is false, no other value becomes zero within 11 decades
    below the block's largest: it is encoded as the smallest positive number.

    Takes 4 bytes of temporary memory an element.

    Args:
        values: fp32[n], n a multiple of ``BLOCK``. It is overwritten.
        codes: uint8[n], receives the codes.
        scales: fp32[n / BLOCK], receives the largest magnitude of each block.
        signed: values may be negative.
        root: encode the square roots, for values whose quotients span twice as many decades as the codes. A second
            moment that becomes zero beside a first moment that does not makes a very large update.
    """
    _, encoding = tables(values.device, signed)
    if root:
        values.sqrt_()
    blocks = values.view(-1, BLOCK)
    torch.amax(blocks.abs() if signed else blocks, 1, out=scales)
    scales.clamp_(min=_SMALLEST_SCALE)
    half = torch.empty_like(blocks, dtype=torch.float16)
    torch.div(blocks, scales.div(_FP16_RANGE).unsqueeze(1), out=half)
    patterns = values.view(torch.int32).copy_(half.view(-1).view(torch.uint16))
    torch.index_select(encoding, 0, patterns, out=codes)


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, signed: bool, root: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the values that :func:`quantize` stored. Codes and scales that are all zero give zeros.

    Takes 4 bytes of temporary memory an element.

    Args:
        codes, scales, signed, root: as in :func:`quantize`.
        out: fp32[n], receives the values; None: a new tensor.
    """
    if out is None:
        out = torch.empty_like(codes, dtype=torch.float32)
    numbers, _ = tables(codes.device, signed)
    torch.index_select(numbers, 0, codes.int(), out=out)
    out.view(-1, BLOCK).mul_(scales.unsqueeze(1))
    return out.square_() if root else out


def code_map(signed: bool) -> torch.Tensor:
    """Return the 256 numbers in [-1, 1], or in [0, 1], that a code stands for, in rising order: fp32[256] on the host.

    This is the dynamic data type of Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.2.
    bitsandbytes and torchao have the same numbers. A decade has twice as many numbers as the one below it: without
    signs 128 between 0.1 and 1, and 2 between 1e-7 and 1e-6.

    Args:
        signed: negative values have codes, too; each decade then has half as many numbers for each sign.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, device="cpu")
        middles = ((ends[:-1] + ends[1:]) / 2 * 10 ** (decade - 6)).tolist()
        numbers += middles + [-middle for middle in middles if signed]
    return torch.tensor(sorted(numbers), device="cpu")


@cache
def tables(device: torch.device, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return :func:`code_map` (fp32[256]) and the code of each fp16 pattern (uint8[65536]) on a device.

    The first call for a device waits for it. Make it before the first step.
    """
    numbers = code_map(signed)
    middles = (numbers[1:].double() + numbers[:-1].double()) / 2
    if not signed:
        middles[0] = 0  # only zero becomes zero
    patterns = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.float16)
    encoding = torch.bucketize(patterns.double() / _FP16_RANGE, middles)
    return numbers.to(device), encoding.to(torch.uint8).to(device)


class Part(NamedTuple):
    """One of the tensors that hold encoded values. ``grain``: values that an element of it holds or belongs to."""

    name: str
    dtype: torch.dtype
    grain: int


class Codec(Protocol):
    """How fp32 values are held in the store.

    Attributes:
        parts: the tensors that hold n values, each with n / grain elements. n is a multiple of ``CODEC_ALIGNMENT``.
        temporary: bytes of temporary memory an element that encoding or decoding takes on the device.
    """

    parts: tuple[Part, ...]
    temporary: int

    def prepare(self, device: torch.device) -> None:
        """Make what encoding and decoding need on a device, so that no step waits for it."""
        return

    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor]) -> None:
        """Write values (fp32[n]) into the parts. ``values`` may be overwritten."""
        ...

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Write the values of the parts into ``out`` (fp32[n])."""
        ...

    @property
    def bytes_per_value(self) -> float:
        """Bytes of all parts for each value."""
        return sum(part.dtype.itemsize / part.grain for part in self.parts)


@dataclass(frozen=True)
class Split(Codec):
    """What a master has and its bf16 weight lacks. Parts that are all zero give the weights."""

    parts = (Part("remainder", torch.int16, 1), Part("ties", torch.uint8, 8))
    temporary = 5

    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor]) -> None:
        """Call :func:`split`."""
        remainder, ties = stored
        split(values, remainder, ties)

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Turn the weights in ``out`` into masters, by :func:`join`."""
        remainder, ties = stored
        join(out, remainder, ties, out)


@dataclass(frozen=True)
class Moment(Codec):
    """A first moment (``signed``), or a second one by its root (``root``). Parts that are all zero give zeros."""

    signed: bool
    root: bool
    parts = (Part("codes", torch.uint8, 1), Part("scales", torch.float32, BLOCK))
    temporary = 4

    def prepare(self, device: torch.device) -> None:
        """Make the tables."""
        tables(device, self.signed)

    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor]) -> None:
        """Call :func:`quantize`."""
        codes, scales = stored
        quantize(values, codes, scales, self.signed, self.root)

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Call :func:`dequantize`."""
        codes, scales = stored
        dequantize(codes, scales, self.signed, self.root, out)


FIRST_MOMENT, SECOND_MOMENT = Moment(signed=True, root=False), Moment(signed=False, root=True)
