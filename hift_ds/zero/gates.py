"""Where a forward pass waits for the update of the last step, if that runs beside it (``hift.offload.defer``)."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch

from hift_ds.state.transfer import Staging

_LAYER = re.compile(r"(?:.*?\.)??\d+(?=\.)")  # the outermost element of a list of layers in a parameter's name


class UpdateGates:
    """Hooks that let the device wait for the update of a block before anything reads its weights.

    A block whose parameters all lie in layers of the model is read when one of these layers runs. All others are read
    from the beginning of a forward pass, as far as anybody knows. A layer counts only once its own forward pass was
    seen, because a model may use the weights of a layer without calling it.

    Args:
        module: the model.
        blocks: the names of each block's parameters.
        staging: knows which update is under way, and finishes it.
    """

    def __init__(self, module: torch.nn.Module, blocks: Sequence[Sequence[str]], staging: Staging):
        self._staging = staging
        self._layers = [_layers_of(module, names) for names in blocks]
        self._called: set[str] = set()
        self._hooks: list[Any] = []
        if not staging.can_defer:
            return
        trained = {name.rpartition(".")[0] for names in blocks for name in names}
        for owner in map(module.get_submodule, trained):  # however a model is saved or loaded, it asks these
            self._hooks.append(owner.register_state_dict_pre_hook(self._finish))
            self._hooks.append(owner.register_load_state_dict_pre_hook(self._finish))
        self._module = module
        outside = {
            name.rpartition(".")[0]
            for names, own in zip(blocks, self._layers, strict=True)
            if not own
            for name in names
        }
        for owner in (module, *map(module.get_submodule, outside)):  # a script may call a part of the model
            self._hooks.append(owner.register_forward_pre_hook(self._finish_unless_gated, prepend=True))
        for name in {name for layers in self._layers for name in layers}:
            layer = module.get_submodule(name)
            gate = functools.partial(self._enter, name)
            self._hooks.append(layer.register_forward_pre_hook(gate, prepend=True))

    def remove(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _finish(self, *_: Any) -> None:
        self._staging.finish_update()

    def _finish_unless_gated(self, *_: Any) -> None:
        """Before the model, or a module outside its layers, runs."""
        layers = self._layers[self._staging.updating]
        if not layers or not layers <= self._called:
            self._staging.finish_update()

    def _enter(self, name: str, *_: Any) -> None:
        """Before a layer runs: start an update that is late, and finish that of the layer's own weights."""
        self._called.add(name)
        self._staging.start_update()
        if name in self._layers[self._staging.updating]:
            self._staging.finish_update()

    def leave_to_compiler(self) -> bool:
        """Defer no more updates if the model is compiled: a compiler would take the hooks for a part of the model.

        Returns:
            Whether it was compiled since the last call.
        """
        is_compiled = bool(self._hooks) and has_compiled(self._module)
        if is_compiled:
            self._staging.finish_update()
            self._staging.can_defer = False
            self.remove()
        return is_compiled


def _layers_of(module: torch.nn.Module, parameters: Sequence[str]) -> frozenset[str]:
    """Return the names of the layers that hold all of these parameters; none if some are held elsewhere, too."""
    owned = {id(module.get_parameter(name)) for name in parameters}
    names = [name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in owned]
    found = [_LAYER.match(name) for name in names]
    if not all(found):
        return frozenset()
    return frozenset(match.group() for match in found if match)


def has_compiled(model: torch.nn.Module) -> bool:
    """Return whether a module of a model is compiled."""
    modules = model.modules()
    return any(one._compiled_call_impl is not None or type(one).__name__ == "OptimizedModule" for one in modules)
