"""Slots on the device in which units take turns: what is copied there, when, and who waits for it.

A unit has one slot for good, so that its parameters never move: what autograd has saved of them is right whenever the
unit is in its slot. A slot is filled through tensors of its own. Their versions are not those of the parameters, so
autograd does not take a fill for a change.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from hift_ds.state.transfer import Lane, mark, wait
from hift_ds.weights.units import Unit


class Way(Enum):
    """Why a unit is used. In each of these, units follow each other in an order of its own."""

    FORWARD = "forward with gradients"
    BACKWARD = "backward"
    EVALUATION = "forward without gradients"


@dataclass(eq=False)
class Slot:
    """Device memory for one unit at a time.

    Attributes:
        area: the memory, as bytes.
        holds: the unit whose current weights it holds, or will hold after ``ready``.
        ready: event of the last fill; None: the main stream has waited for it.
    """

    area: torch.Tensor
    holds: Unit | None = None
    ready: Any = None


class Turns:
    """Brings units into their slots ahead of their use.

    While a unit is used, the one that followed it the last time is fetched, unless both have the same slot. In a
    backward pass, units are fetched only if the pass will reach them. The host never waits.

    Args:
        layers: the units that share slots, in model order.
        outside: the unit that has a slot of its own. It is fetched again as soon as it changes.
        lane: the stream for copies to the device.

    Attributes:
        awaited: the layers that a backward pass will reach, because a gradient arrives there.
        fills: number of units copied to the device so far.
    """

    def __init__(self, layers: Sequence[Unit], outside: Unit, lane: Lane):
        self._lane = lane
        self._layers, self._outside = list(layers), outside
        up = dict(zip(self._layers, self._layers[1:], strict=False))
        self._follows: dict[Way, dict[Unit, Unit]] = {
            Way.FORWARD: dict(up),
            Way.BACKWARD: {after: before for before, after in up.items()},
            Way.EVALUATION: {**up, self._layers[-1]: self._layers[0]},  # of the next pass
        }
        self._first = self._layers[0]  # of a forward pass with gradients
        self._way = Way.EVALUATION
        self._last: Unit | None = None
        self._current: Unit | None = None
        self._in_backward = False
        self.awaited: set[Unit] = set()
        self.fills = 0

    def enter(self, unit: Unit, way: Way) -> None:
        """Let what is issued next on the current stream find the weights of a unit in its slot, and fetch the next."""
        is_repeated = self._in_backward and way is Way.FORWARD  # by activation checkpointing
        if unit is self._current and (is_repeated or way is self._way):
            return
        # A script may read these weights without calling their modules, so any call brings them.
        self._bring(self._outside)
        if unit is self._outside:
            return
        self._in_backward |= way is Way.BACKWARD
        if not is_repeated:
            self._learn(unit, way)
        self._bring(unit)
        self._current = unit
        following = self._follows[way].get(unit)
        if following is None or following.slot is unit.slot:
            return
        if way is not Way.BACKWARD or following in self.awaited:
            self._fetch(following)

    def _learn(self, unit: Unit, way: Way) -> None:
        last, self._last = self._last, unit
        if way is self._way:
            if last is not None and last is not unit:
                self._follows[way][last] = unit
            return
        if self._way is Way.FORWARD and last is not None:
            self._follows[Way.FORWARD].pop(last, None)  # the pass ended there
        if way is Way.FORWARD:
            self._first = unit
        self._way = way

    def begin(self) -> None:
        """Before a forward pass of the whole model, or when no backward pass will follow."""
        self._current = None
        if self._in_backward:
            self._in_backward = False
            self.awaited.clear()

    def _fetch(self, unit: Unit) -> None:
        if unit.slot.holds is not unit and not unit.is_changing:
            self._fill(unit)

    def _bring(self, unit: Unit) -> None:
        if unit.slot.holds is not unit:
            self._fill(unit)
        self._arrive(unit)

    def _arrive(self, unit: Unit) -> None:
        if unit.slot.ready is not None:
            wait(unit.slot.ready)
            unit.slot.ready = None

    def _fill(self, unit: Unit) -> None:
        slot = unit.slot
        slot.holds = None
        # All that read the slot's earlier contents is issued. Passes may run in inference mode, the next one may not.
        with torch.inference_mode(False), torch.no_grad(), self._lane.after(mark(), *unit.written):
            if unit.targets:
                torch._foreach_copy_(unit.targets, unit.sources, non_blocking=True)
        slot.ready, slot.holds = self._lane.mark(), unit
        unit.written = ()  # later copies on this lane follow this one
        self.fills += 1

    def prepare(self) -> None:
        """Fetch what the next forward pass with gradients needs first. Call it when no backward pass will follow."""
        self.begin()
        self._fetch(self._outside)
        self._fetch(self._first)
        second = self._follows[Way.FORWARD].get(self._first)
        if second is not None and second.slot is not self._first.slot:
            self._fetch(second)

    def before_change(self, units: Collection[Unit]) -> None:
        """Let the current stream wait until nothing reads the host memory of these units, and fetch none of them."""
        for unit in units:
            if unit.slot.holds is unit:
                self._arrive(unit)
            unit.is_changing = True

    def unchanged(self, units: Collection[Unit]) -> None:
        """Fetch these units again: there is no change after all."""
        for unit in units:
            unit.is_changing = False

    def changed(self, units: Collection[Unit], written: Sequence[Any]) -> None:
        """Forget what the slots hold of these units.

        Args:
            units: their weights in host memory are changed.
            written: events after which the new weights are there.
        """
        for unit in units:
            unit.is_changing = False
            unit.written = (*unit.written, *written)
            if unit.slot.holds is unit:
                unit.slot.holds = None
            if unit is self._current:
                self._current = None

    def _units(self) -> tuple[Unit, ...]:
        return (*self._layers, self._outside)

    def spoiled(self) -> None:
        """Forget what the slots hold, because something else was written there."""
        for unit in self._units():
            unit.slot.holds = None
        self._current = None

    def synchronize(self) -> None:
        """Let the host wait until nothing reads or writes the host memory of any unit."""
        for event in (self._lane.mark(), *(event for unit in self._units() for event in unit.written)):
            if event is not None:
                event.synchronize()
        for unit in self._units():
            unit.written = ()
