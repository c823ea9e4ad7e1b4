"""The weights of a model in host memory, and on the device only while a layer is used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hift_ds.collectives import rank
from hift_ds.state.allocator import HostMemory
from hift_ds.state.arena import ALIGNMENT
from hift_ds.state.transfer import Lane, Staging
from hift_ds.weights.node import Node
from hift_ds.weights.turns import Slot, Turns, Way
from hift_ds.weights.units import Unit, find_units


class HostWeights:
    """Keeps a model's weights in host memory, and brings each layer's to the device for its forward and backward pass.

    The weights in host memory are the true ones: optimizers, checkpoints and ``state_dict`` read and write those. A
    parameter's ``data`` is a view of a slot, where the weights are only while their layer is used. Two slots serve all
    layers in turn. What is outside of the layers has a slot of its own, and stays there. Buffers are not touched.

    All ranks have the weights of rank 0, and those of a machine share them (``node.py``).

    To set up, make each block's optimizer inside :meth:`on_device`, and call :meth:`keep` for what it has flattened, or
    :meth:`gather` before. Then call :meth:`start`. All ranks do the same.

    Args:
        model: the module, with its weights in host memory.
        device: where the slots are.
        pin_memory: page-lock the host memory.

    Attributes:
        node: the ranks of this machine.

    Raises:
        ValueError: the model has no layers, or ranks cannot share memory.
    """

    def __init__(self, model: nn.Module, device: torch.device, pin_memory: bool):
        self._model, self._device = model, device
        remedy = "keep the weights on the device: hift.offload.weights='device'"
        self.node = Node(device, pin_memory)
        map_memory = self.node.map if self.node.is_shared else None
        self._memory = HostMemory(pin_memory, purpose="weights", remedy=remedy, map_memory=map_memory)
        self._layers, self._outside = find_units(model)
        self._unit_of = {p: unit for unit in (*self._layers, self._outside) for p in unit.parameters}
        self._of_host = {parameter: parameter.data.to("cpu") for parameter in model.parameters()}
        self._kept: set[nn.Parameter] = set()  # those that are in `_memory`
        self._hooks: list[Any] = []
        self._turns: Turns | None = None
        for parameter in self._of_host:
            self._take_off_device(parameter)

    # ---- set-up ------------------------------------------------------------------------------------------------

    def _take_off_device(self, parameter: nn.Parameter) -> None:
        """Let a parameter have its shape on the device, and no memory.

        Its device never changes: autograd would forget the hooks that wait for its gradient.
        """
        nothing = torch.empty(1, dtype=parameter.dtype, device=self._device)
        parameter.data = nothing.expand(parameter.shape) if parameter.numel() else nothing[:0].view(parameter.shape)

    @contextmanager
    def on_device(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Have the weights of these parameters on the device inside the ``with`` statement."""
        for parameter in parameters:
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._device)
            if parameter in self._kept or rank() == 0:
                parameter.data.copy_(self._of_host[parameter])
            if parameter not in self._kept:
                self.node.broadcast(parameter.data)
        try:
            yield
        finally:
            for parameter in parameters:
                self._take_off_device(parameter)

    def keep(self, flat: torch.Tensor, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        """Keep the weights of some parameters in one piece of host memory.

        Args:
            flat: a flat tensor on the device.
            parameters: their ``data`` are views of ``flat``.

        Returns:
            The copy of ``flat`` in host memory.
        """
        buffer = self._memory.empty(torch.empty_like(flat, device="meta"))
        if self.node.is_first:
            buffer.copy_(flat)
        for parameter in parameters:
            start = parameter.data.storage_offset() - flat.storage_offset()
            self._move(parameter, buffer[start : start + parameter.numel()].view(parameter.shape))
        return buffer

    def _move(self, parameter: nn.Parameter, to: torch.Tensor) -> None:
        self._of_host[parameter].data = to  # whoever has the tensor of the parameter has this one
        self._kept.add(parameter)

    def start(self, staging: Staging) -> None:
        """Bring all other weights into page-locked memory, allocate the slots, and let the model use them.

        Args:
            staging: issues the updates of the weights, and brings them to host memory.
        """
        self._staging = staging
        units = (*self._layers, self._outside)
        for unit in units:
            self.gather(unit.parameters)
        self.node.meet()  # what others kept is there
        places = _lay_out(units, self._of_host, self._memory.buffers)
        lane, count = Lane(), min(2, len(self._layers))
        own = [*(self._layers[number::count] for number in range(count)), [self._outside]]
        for members in own:
            slot = Slot(torch.empty(max(unit.nbytes for unit in members), dtype=torch.uint8, device=self._device))
            lane.outlives(slot.area)
            for unit in members:
                unit.slot = slot
                unit.targets = [slot.area[start : start + len(source)] for start, source in places[unit].pieces]
                for parameter, start in places[unit].parameters:
                    parameter.data = _typed(slot.area, start, parameter)
        self._turns = Turns(self._layers, self._outside, lane)
        self._install(self._turns)
        self._turns.prepare()

    def gather(self, parameters: Sequence[nn.Parameter]) -> None:
        """Bring parameters that are not kept yet together in one buffer."""
        parameters = [parameter for parameter in parameters if parameter not in self._kept]
        sizes = [-(-parameter.nbytes // ALIGNMENT) * ALIGNMENT for parameter in parameters]
        if not sum(sizes):
            return
        buffer = self._memory.empty(torch.empty(sum(sizes), dtype=torch.uint8, device="meta"))
        start = 0
        for parameter, size in zip(parameters, sizes, strict=True):
            view = _typed(buffer, start, parameter)
            if not self.node.is_shared:
                view.copy_(self._of_host[parameter])
            else:
                with self.on_device([parameter]):
                    if self.node.is_first:
                        view.copy_(parameter.data)
            self._move(parameter, view)
            start += size
        self.node.meet()

    def _install(self, turns: Turns) -> None:
        for unit in (*self._layers, self._outside):
            for module in unit.modules:
                self._hooks.append(module.register_forward_pre_hook(partial(_before_forward, turns, unit)))
        for unit in self._layers:
            for module in unit.modules:
                hook = partial(_after_forward, turns, unit)
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        self._hooks.append(self._model.register_forward_pre_hook(partial(_before_pass, turns, self._outside)))
        for module in self._model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                self._hooks.append(module.register_state_dict_post_hook(partial(self._show_host)))
                self._hooks.append(module.register_load_state_dict_pre_hook(self._load_host))

    # ---- the weights in host memory ----------------------------------------------------------------------------

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the weights of a parameter in host memory: the same tensor at every call."""
        return self._of_host[parameter]

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The host memory of all weights. Of the ranks of a machine, only the first one has it."""
        return self._memory.buffers if self.node.is_first else []

    def before_change(self, parameters: Iterable[nn.Parameter]) -> None:
        """Before an update of the weights of parameters: let the device's current stream wait for who reads them.

        :meth:`changed` or :meth:`unchanged` must follow.
        """
        assert self._turns is not None
        self._turns.before_change(self._units_of(parameters))

    def changed(self, parameters: Iterable[nn.Parameter], *written: Any) -> Any:
        """After an update of the weights of parameters is issued: fetch them again when they are needed.

        All ranks call it.

        Args:
            parameters: the parameters.
            written: events after which the new weights that this rank writes are in host memory.

        Returns:
            An event after which those of all ranks are there; None: it has passed, or there is no other rank.
        """
        assert self._turns is not None
        of_all = self.node.after_all(written) if self.node.is_shared else None
        self._turns.changed(self._units_of(parameters), written if of_all is None else (of_all,))
        return of_all

    def unchanged(self, parameters: Iterable[nn.Parameter]) -> None:
        """After an update that did not take place."""
        assert self._turns is not None
        self._turns.unchanged(self._units_of(parameters))

    def prepare(self) -> None:
        """Start to fetch what the next forward pass needs first."""
        assert self._turns is not None
        self._turns.prepare()

    def _units_of(self, parameters: Iterable[nn.Parameter]) -> Collection[Unit]:
        return {self._unit_of[parameter]: None for parameter in parameters}.keys()

    def settle(self) -> None:
        """Finish the last update, and wait until the host memory of all weights can be read.

        It can be changed as well if no other rank shares it, or after :meth:`Node.meet`.
        """
        if self._turns is not None:
            self._staging.finish_update()
            self._turns.synchronize()

    def forget_slots(self) -> None:
        """Fetch all weights again when they are needed, because a parameter's ``data`` was written to."""
        if self._turns is not None:
            self._turns.spoiled()

    def _show_host(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        self.settle()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if prefix + name in state_dict:
                state_dict[prefix + name] = self._of_host[parameter]

    def _load_host(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self.settle()
        self.forget_slots()  # torch copies to where the parameters are now
        self.node.meet()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            value = state_dict.get(prefix + name)
            if self.node.is_first and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                self._of_host[parameter].copy_(value)
        self.node.meet()

    def release(self) -> None:
        """Leave the model with its weights in host memory, as a plain module."""
        self.settle()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter, weights in self._of_host.items():
            is_shared = self.node.is_shared and parameter in self._kept
            parameter.data = self.node.private(weights) if is_shared else weights


def _before_forward(turns: Turns, unit: Unit, *_: Any) -> None:
    turns.enter(unit, Way.FORWARD if torch.is_grad_enabled() else Way.EVALUATION)


def _before_pass(turns: Turns, outside: Unit, *_: Any) -> None:
    turns.begin()
    _before_forward(turns, outside)


def _before_backward(turns: Turns, unit: Unit, _: torch.Tensor) -> None:
    turns.enter(unit, Way.BACKWARD)


def _after_forward(turns: Turns, unit: Unit, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Let the backward pass of a module begin with its weights in their slot."""
    if not torch.is_grad_enabled():
        return
    passed = {id(value) for value in tree_leaves((args, kwargs))}  # comes from elsewhere, and so does its gradient
    for value in tree_leaves(output):
        if isinstance(value, torch.Tensor) and value.grad_fn is not None and id(value) not in passed:
            value.register_hook(partial(_before_backward, turns, unit))
            turns.awaited.add(unit)


class _Places:
    """Where a unit's pieces and parameters are in its slot."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, torch.Tensor]] = []
        self.parameters: list[tuple[nn.Parameter, int]] = []


def _lay_out(
    units: Iterable[Unit], weights: dict[nn.Parameter, torch.Tensor], buffers: Iterable[torch.Tensor]
) -> dict[Unit, _Places]:
    """Find the pieces of host memory that hold each unit alone, and their places in a slot of the unit.

    A piece begins at the same offset to the alignment as in host memory, so that kernels treat it alike.
    """
    unit_of = {parameter: unit for unit in units for parameter in unit.parameters}
    flat = {buffer.data_ptr(): buffer.view(-1).view(torch.uint8) for buffer in buffers}
    members: dict[int, list[tuple[int, nn.Parameter]]] = defaultdict(list)
    places = {unit: _Places() for unit in units}
    for parameter, tensor in weights.items():
        if not tensor.nbytes:
            places[unit_of[parameter]].parameters.append((parameter, 0))
            continue
        base = tensor.untyped_storage().data_ptr()
        members[base].append((tensor.data_ptr() - base, parameter))
    for base, entries in members.items():
        entries.sort(key=lambda entry: entry[0])
        for unit, run in _runs(entries, unit_of.__getitem__):
            begin, end = run[0][0], run[-1][0] + run[-1][1].nbytes
            start = -(-unit.nbytes // ALIGNMENT) * ALIGNMENT + begin % ALIGNMENT
            unit.nbytes = start + end - begin
            source = flat[base][begin:end]
            unit.sources.append(source)
            places[unit].pieces.append((start, source))
            places[unit].parameters += [(parameter, start + offset - begin) for offset, parameter in run]
    return places


def _runs(
    entries: Sequence[tuple[int, nn.Parameter]], unit_of: Callable[[nn.Parameter], Unit]
) -> Iterator[tuple[Unit, list[tuple[int, nn.Parameter]]]]:
    """Yield runs of neighbors of the same unit."""
    run: list[tuple[int, nn.Parameter]] = []
    for entry in entries:
        if run and unit_of(run[-1][1]) is not unit_of(entry[1]):
            yield unit_of(run[-1][1]), run
            run = []
        run.append(entry)
    if run:
        yield unit_of(run[-1][1]), run


def _typed(area: torch.Tensor, start: int, like: nn.Parameter) -> torch.Tensor:
    """Return a part of an area with the shape and dtype of a parameter."""
    return area[start : start + like.nbytes].view(like.dtype).view(like.shape)
