"""Masters and optimizer state in a checkpoint, by parameter name. Any number of ranks and ZeRO stage saved them.

A checkpoint describes each master by the elements of parameters that it holds (:class:`Span`). So a run that keeps the
elements elsewhere finds them by name. Where a master holds the same elements as before, its state is taken as a whole.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hift_ds.optim.properties import parts
from hift_ds.state.codec import Codec, Moment
from hift_ds.state.encoded import Slice, decoded


class Span(NamedTuple):
    """Consecutive elements of a flattened parameter in a master.

    Attributes:
        name: of the parameter.
        start: its first element here.
        numel: number of elements; 0: another rank has all elements of this parameter.
        place: where they begin in the flattened master.
    """

    name: str
    start: int
    numel: int
    place: int


class Counted(NamedTuple):
    """What an optimizer counts for some elements of the parameters of a master.

    Attributes:
        elements: first and last (exclusive) element of the only parameter; None: all elements of all parameters.
        counts: state without elements, such as the number of updates.
        settings: what the optimizer counts in its parameter group.
        is_new: no step has updated them yet.
    """

    elements: tuple[int, int] | None
    counts: dict[str, Any]
    settings: dict[str, Any]
    is_new: bool


class SavedMaster(NamedTuple):
    """One fp32 master of one rank in a checkpoint.

    Attributes:
        spans: what it holds. The rest of it is padding.
        numel: its elements.
        values: the master; None: the weights are the masters.
        state: state that has elements, by name.
        encoded: state in another format, by name: its codec and parts.
        slices: first and last (exclusive) element, and place in the encoded parts, of each slice.
        counted: what the optimizer counts.
    """

    spans: list[Span]
    numel: int
    values: torch.Tensor | None
    state: dict[str, torch.Tensor]
    encoded: dict[str, dict[str, Any]]
    slices: list[tuple[int, int, int]]
    counted: list[Counted]

    def entry(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it: plain values and tensors."""
        return {
            **self._asdict(),
            "spans": [tuple(span) for span in self.spans],
            "counted": [counted._asdict() for counted in self.counted],
        }

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "SavedMaster":
        """Return the master of what :meth:`entry` returned."""
        return cls(
            **{
                **entry,
                "spans": [Span(*span) for span in entry["spans"]],
                "slices": [tuple(cut) for cut in entry["slices"]],
                "counted": [Counted(**counted) for counted in entry["counted"]],
            }
        )


class SavedState:
    """All masters in a checkpoint, of all ranks, with their state.

    Args:
        masters: in any order.

    Attributes:
        names: of the parameters.
        encoded: names of the state that the checkpoint holds in another format.
    """

    def __init__(self, masters: Iterable[SavedMaster]):
        self._masters = list(masters)
        self._of_parameter: dict[str, list[tuple[SavedMaster, Span]]] = {}
        for master in self._masters:
            for span in master.spans:
                self._of_parameter.setdefault(span.name, []).append((master, span))
        self.names = set(self._of_parameter)
        self.encoded = sorted({name for master in self._masters for name in master.encoded})
        self._last_decoded: dict[str, tuple[SavedMaster, torch.Tensor]] = {}  # by the name of the state

    @classmethod
    def read(cls, of_ranks: Sequence[Mapping[str, Any]]) -> "SavedState":
        """Return the state in a checkpoint.

        Args:
            of_ranks: the optimizer state that each rank saved, with the entry ``masters``.

        Raises:
            ValueError: the state is not kept by parameter name.
        """
        if not all("masters" in entry for entry in of_ranks):
            raise ValueError(
                "the optimizer state in the checkpoint is not kept by parameter name: an earlier version of hift_ds, "
                "or a run without HiFT, saved it; continue with what saved it, or load only the weights with "
                "load_module_only=True"
            )
        return cls(SavedMaster.of(master) for entry in of_ranks for master in entry["masters"])

    def problems(self, spans: Sequence[Span], numel: int) -> list[str]:
        """Return why this run cannot continue with the state of a master; an empty list if it can.

        Args:
            spans: of the master in this run.
            numel: its elements.
        """
        missing = [span.name for span in spans if span.name not in self._of_parameter]
        if missing:
            return [f"it has no optimizer state of {', '.join(missing)}"]
        holders = [master for span in spans for master, _ in self._of_parameter[span.name]]
        found = []
        if self._same(spans, numel) is None:
            for master in holders:
                for name, value in master.state.items():
                    if not _is_separable(value, master.numel):
                        found.append(
                            f"its state {name!r} of {master.spans[0].name} is of a whole tensor, which other ranks, "
                            "ZeRO stages and blocks would cut elsewhere"
                        )
        return list(dict.fromkeys(found))

    def state_names(self, spans: Sequence[Span], numel: int) -> list[str]:
        """Return the names of the state of a master that has elements."""
        same = self._same(spans, numel)
        holders = [same] if same else [master for span in spans for master, _ in self._of_parameter[span.name]]
        return list(dict.fromkeys(name for master in holders for name in (*master.state, *master.encoded)))

    def codes(
        self, spans: Sequence[Span], numel: int, name: str, codec: Codec, slices: Sequence[Slice]
    ) -> dict[str, torch.Tensor] | None:
        """Return the encoded parts of a state, if this run keeps the same elements in the same format and place."""
        same = self._same(spans, numel)
        if same is None or name not in same.encoded or same.encoded[name]["codec"] != _named(codec):
            return None
        if same.slices != [(cut.start, cut.stop, cut.place) for cut in slices]:
            return None
        return same.encoded[name]["parts"]

    def values(self, spans: Sequence[Span], name: str | None, like: torch.Tensor) -> torch.Tensor | None:
        """Return a master, or its state of a name, for this run.

        Args:
            spans: of the master in this run.
            name: of the state; None: the master.
            like: the master of this run, for the shape. It is not read.

        Returns:
            A tensor in host memory, with zeros for padding, and for state that no step has made yet. State of a whole
            tensor has its own shape, all else that of ``like``. None: the weights are the masters.
        """
        if (same := self._same(spans, like.numel())) is not None:
            values = self._of(same, name)
            return values.view(like.shape) if values is not None and _is_separable(values, same.numel) else values
        holders = [master for span in spans for master, _ in self._of_parameter[span.name]]
        dtype = next((values.dtype for one in holders if (values := self._of(one, name)) is not None), None)
        if dtype is None:
            return None
        result = torch.zeros(like.shape, dtype=dtype, device="cpu")
        for span in spans:
            for source, begin, place, numel in self._overlaps(span):
                if (values := self._of(source, name)) is not None:
                    result.view(-1)[place : place + numel] = values.reshape(-1)[begin : begin + numel]
        return result

    def parameter(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return the masters of elements ``start`` to ``stop`` of a flattened parameter; None: they are its weights."""
        numel = stop - start
        return self.values([Span(name, start, numel, 0)], None, torch.empty(numel, device="meta"))

    def counted(self, spans: Sequence[Span], elements: tuple[int, int] | None = None) -> Counted:
        """Return what the optimizer counted.

        Args:
            spans: of one master of this run.
            elements: only for these elements of its only parameter.

        Raises:
            ValueError: it counted different numbers for these elements.
        """
        (first_name, first), *others = [
            (span.name, counted)
            for span in spans
            for master, _ in self._of_parameter[span.name]
            for counted in master.counted
            if _overlap(elements, counted.elements)
        ]
        for name, other in others:
            same_counts = _equal(first.counts, other.counts) and _equal(first.settings, other.settings)
            if not same_counts or first.is_new != other.is_new:
                raise ValueError(
                    f"parameters that this run trains together were updated differently often: {first_name} "
                    f"({_shown(first)}) and {name} ({_shown(other)})"
                )
        return first

    def _same(self, spans: Sequence[Span], numel: int) -> SavedMaster | None:
        """Return a master of the checkpoint that has these spans and as many elements."""
        of_first = (master for master, _ in self._of_parameter[spans[0].name])
        return next((one for one in of_first if one.spans == list(spans) and one.numel == numel), None)

    def _overlaps(self, span: Span) -> Iterator[tuple[SavedMaster, int, int, int]]:
        """Yield each master that has some elements of a span, where they begin there and in this run, and how many."""
        for master, theirs in self._of_parameter[span.name]:
            low = max(span.start, theirs.start)
            high = min(span.start + span.numel, theirs.start + theirs.numel)
            if low < high:
                yield master, theirs.place + low - theirs.start, span.place + low - span.start, high - low

    def _of(self, master: SavedMaster, name: str | None) -> torch.Tensor | None:
        """Return a master of the checkpoint, or its state of a name, decoded."""
        if name is None:
            return master.values
        if name not in master.encoded:
            return master.state.get(name)
        if name not in self._last_decoded or self._last_decoded[name][0] is not master:
            saved = master.encoded[name]
            slices = [Slice(0, start, stop, False, place) for start, stop, place in master.slices]
            codec = Moment(**saved["codec"])
            stored = [saved["parts"][part.name] for part in codec.parts]
            self._last_decoded[name] = master, decoded(codec, stored, slices, torch.Size([master.numel]))
        return self._last_decoded[name][1]


def encoded_entry(codec: Codec, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return what a checkpoint holds of state in another format."""
    return {"codec": _named(codec), "parts": dict(tensors)}


def _named(codec: Codec) -> dict[str, bool]:
    assert isinstance(codec, Moment)
    return {"signed": codec.signed, "root": codec.root}


def _is_separable(value: torch.Tensor, numel: int) -> bool:
    """Whether the elements of a state belong to the elements of its master, one to one."""
    (first, *others) = parts(value)
    return first is value and not others and value.is_floating_point() and value.numel() == numel


def _overlap(ours: tuple[int, int] | None, theirs: tuple[int, int] | None) -> bool:
    return ours is None or theirs is None or (ours[0] < theirs[1] and theirs[0] < ours[1])


def _equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(bool(ours[key] == theirs[key]) for key in ours)


def _shown(counted: Counted) -> str:
    values = {**counted.counts, **counted.settings}
    numbers = {name: value for name, value in values.items() if value is not None}
    return ", ".join(f"{name} {float(value):g}" for name, value in numbers.items()) or "no count"
