"""Masters and optimizer state that a block keeps in fewer bytes, in a format of ``codec.py``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from deepspeed.utils import logger

from hift_ds.config import CODEC_ALIGNMENT
from hift_ds.state.allocator import scratch
from hift_ds.state.codec import BLOCK, Codec
from hift_ds.state.transfer import Run

# Elements that are encoded at a time outside of a step, where no slot limits the temporary memory.
_PIECE = 2**22


class Slice(NamedTuple):
    """Elements ``start`` to ``stop`` of the ``number``-th master.

    Attributes:
        whole: these are all of its elements.
        place: where the slice begins in encoded buffers, in elements: a multiple of ``CODEC_ALIGNMENT``.
    """

    number: int
    start: int
    stop: int
    whole: bool
    place: int = 0

    @property
    def room(self) -> int:
        """Elements from the start of this slice to the next one's, in encoded buffers."""
        return -(-(self.stop - self.start) // CODEC_ALIGNMENT) * CODEC_ALIGNMENT


def view(tensor: torch.Tensor, cut: Slice) -> torch.Tensor:
    """Return a slice of a tensor: flat, or, if the slice is whole, the tensor in its shape."""
    return tensor if cut.whole else tensor.view(-1)[cut.start : cut.stop]


def without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the meta device like another one, which is not read."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class EncodedState:
    """The encoded values of one block, in the store.

    A value is what belongs to each element of a master: the master itself (``None``), or optimizer state of a name.

    Args:
        codecs: the format of each value that is encoded.
        slices: all slices of the masters that this rank trains.
        buffer: returns the buffer in the store for number of the master, name of the value, number of the part, and a
            tensor with the buffer's shape and dtype.
    """

    def __init__(
        self,
        codecs: Mapping[str | None, Codec],
        slices: Sequence[Slice],
        buffer: Callable[[tuple[int, str | None, int], torch.Tensor], torch.Tensor],
    ):
        self.codecs = codecs
        self._buffer = buffer
        self._slices: dict[int, list[Slice]] = {}
        for cut in slices:
            self._slices.setdefault(cut.number, []).append(cut)
        self._known: set[tuple[int, str | None]] = set()

    def reserve(self) -> None:
        """Make all buffers."""
        for number in self._slices:
            for name in self.codecs:
                self._clear_ends(number, name)

    def _parts(self, number: int, name: str | None) -> list[torch.Tensor]:
        """Return the buffers of a value."""
        size = sum(cut.room for cut in self.slices(number))
        return [
            self._buffer((number, name, i), torch.empty(size // part.grain, dtype=part.dtype, device="meta"))
            for i, part in enumerate(self.codecs[name].parts)
        ]

    def _clear_ends(self, number: int, name: str | None) -> None:
        """Zero what lies between two slices: it is encoded together with the end of a slice.

        If several blocks share a master, zero everything: a block may be saved before the first step of another.
        """
        for cut in self.slices(number):
            if len(self.slices(number)) > 1:
                for values in self.pieces(name, cut):
                    values.zero_()
            for part, values in zip(self.codecs[name].parts, self._parts(number, name), strict=True):
                end = cut.place + cut.room
                values[(end - CODEC_ALIGNMENT) // part.grain : end // part.grain].zero_()

    def clear(self, name: str | None) -> None:
        """Zero all parts of a value: masters are then their weights."""
        for number in self._slices:
            for values in self._parts(number, name):
                values.zero_()

    def pieces(self, name: str | None, cut: Slice) -> list[torch.Tensor]:
        """Return the encoded parts of a slice in the store, room included."""
        return _pieces(self.codecs[name], self._parts(cut.number, name), cut)

    def runs(self, name: str | None, chunk: Sequence[Slice], is_known: bool) -> list[Run]:
        """Return, for each part of a value, what to copy to a slot for a chunk; only the room if nothing is known."""
        of_parts = zip(*(self.pieces(name, cut) for cut in chunk), strict=True)
        return [
            Run(
                [piece if is_known else without_memory(piece) for piece in pieces],
                [piece.numel() for piece in pieces],
            )
            for pieces in of_parts
        ]

    def set_known(self, number: int, name: str | None) -> None:
        """Record that the store has this value of a master."""
        self._known.add((number, name))

    def names(self, number: int) -> list[str | None]:
        """Return the names of the values that the store has for a master."""
        return [name for name in self.codecs if (number, name) in self._known]

    @torch.no_grad()
    def write(self, number: int, name: str | None, values: torch.Tensor) -> None:
        """Encode a value of a master, on the device of ``values``, and copy it to the store.

        Blocks of codes whose values did not change keep their codes: what was decoded may be encoded differently.

        Args:
            number: of the master.
            name: of the value.
            values: as many fp32 elements as the master has.
        """
        codec, was_known = self.codecs[name], (number, name) in self._known
        for cut in _small(self.slices(number)):
            new = values.new_zeros(cut.room, dtype=torch.float32)
            new[: cut.stop - cut.start] = values.reshape(-1)[cut.start : cut.stop]
            held = self.pieces(name, cut)
            encoded = [torch.empty_like(part, device=values.device) for part in held]
            codec.encode(new.clone(), encoded)
            if was_known and name is not None:
                old = [part.to(values.device) for part in held]
                decoded = torch.empty_like(new)
                codec.decode(old, decoded)
                is_same = (decoded == new).view(-1, BLOCK).all(dim=1, keepdim=True)
                for part, before in zip(encoded, old, strict=True):
                    of_blocks = part.view(len(is_same), -1)
                    of_blocks.copy_(torch.where(is_same, before.view_as(of_blocks), of_blocks))
            for part, result in zip(held, encoded, strict=True):
                part.copy_(result)
        self._known.add((number, name))

    def read(
        self,
        number: int,
        name: str | None,
        shape: torch.Size,
        weights: torch.Tensor | None = None,
        folder: str | None = None,
    ) -> torch.Tensor:
        """Return a value of a master, decoded: a new fp32 tensor in host memory. What no block trains is zero.

        Args:
            number: of the master.
            name: of the value.
            shape: of the master.
            weights: those of the master, on any device, if the value is the master.
            folder: let the tensor be a file there, which takes no anonymous memory, if there is room.
        """
        return decoded(self.codecs[name], self._parts(number, name), self.slices(number), shape, weights, folder)

    def load(self, number: int, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load an encoded value of a master, as :meth:`parts_of` returned it."""
        for part, held in zip(self.codecs[name].parts, self._parts(number, name), strict=True):
            held.copy_(tensors[part.name])
        self._known.add((number, name))

    def slices(self, number: int) -> list[Slice]:
        """Return the slices of a master."""
        return self._slices.get(number, [])

    def parts_of(self, number: int) -> dict[str, dict[str, torch.Tensor]]:
        """Return the encoded state of a master by name and part, for a checkpoint."""
        return {
            name: {part.name: t for part, t in zip(codec.parts, self._parts(number, name), strict=True)}
            for name, codec in self.codecs.items()
            if name is not None and (number, name) in self._known
        }

    def forget_state(self) -> None:
        """Forget all state, but not the masters."""
        self._known = {(number, name) for number, name in self._known if name is None}


@torch.no_grad()
def decoded(
    codec: Codec,
    stored: Sequence[torch.Tensor],
    slices: Sequence[Slice],
    shape: torch.Size,
    weights: torch.Tensor | None = None,
    folder: str | None = None,
) -> torch.Tensor:
    """Return a value of a master, decoded: a new fp32 tensor in host memory. What is in no slice is zero.

    Args:
        codec: its format.
        stored: its parts.
        slices: those of the master.
        shape: of the master.
        weights: those of the master, on any device, if the value is the master.
        folder: let the tensor be a file there, which takes no anonymous memory, if there is room.
    """
    result = _zeros(stored[0], shape, folder)
    for cut in _small(slices):
        values, size = stored[0].new_zeros(cut.room, dtype=torch.float32), cut.stop - cut.start
        if weights is not None:
            values[:size].copy_(weights.reshape(-1)[cut.start : cut.stop])
        codec.decode(_pieces(codec, stored, cut), values)
        result.view(-1)[cut.start : cut.stop] = values[:size]
    return result


def _small(slices: Sequence[Slice]) -> Iterator[Slice]:
    """Yield slices in pieces."""
    for cut in slices:
        for start in range(cut.start, cut.stop, _PIECE):
            stop = min(start + _PIECE, cut.stop)
            yield Slice(cut.number, start, stop, False, cut.place + start - cut.start)


def _pieces(codec: Codec, buffers: Sequence[torch.Tensor], cut: Slice) -> list[torch.Tensor]:
    """Return the parts of a slice, room included."""
    return [
        values[cut.place // part.grain : (cut.place + cut.room) // part.grain]
        for part, values in zip(codec.parts, buffers, strict=True)
    ]


def _zeros(like: torch.Tensor, shape: torch.Size, folder: str | None) -> torch.Tensor:
    """Return zeros of fp32 in host memory, as ``like``, if possible in a file in the folder."""
    if folder is not None:
        try:
            return scratch(shape, torch.float32, folder)
        except OSError as error:
            logger.warning(f"masters are decoded in memory, and not in {folder!r}: {error.strerror}")
    return like.new_zeros(shape, dtype=torch.float32)
