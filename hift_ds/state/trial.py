"""A trial of an optimizer on small tensors: may its tensors be flattened and cut, and can its state leave the device?

The trial compares the optimizer's own steps with those of :class:`~hift_ds.state.step.BlockState`, so whatever an
optimizer does with its state, in ``optimizer.state`` or elsewhere, the answer is about the code that will train.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import FusedAdam
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hift_ds.optim.properties import ELEMENTWISE, overrides, parts, restrict, with_initial_state
from hift_ds.state.allocator import HostMemory
from hift_ds.state.step import BlockState
from hift_ds.state.transfer import Staging

# Shapes of the tensors of a trial, by number of dimensions. 8-bit optimizers keep small tensors in 32 bits (up to 4,096
# elements), and quantize the others in blocks of 128 to 2,048 elements, which divide some of these and not others.
_MATRICES = ((67, 130), (128, 256))
_SHAPES = {1: ((5003,), (40,)), 2: _MATRICES}
_CHUNK = 8192 + 256  # elements in a chunk of the trial
_STEPS = 3
_RATE = 1e-2
_REMEDY = "use another optimizer, such as AdamW (with transformers' Trainer: optim='adamw_torch')"
_COUNTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Traits:
    """What HiFT may do with the tensors of an optimizer.

    Attributes:
        shaped: why its tensors must stay whole; None: it is element-wise. The update of an element then depends on
            that element's own history only, and all state has the parameter's shape, so that tensors can be flattened,
            sharded and cut.
        state_bytes: bytes of state that travel, for each element of a large tensor.
        counted: settings in its parameter groups that its own steps change, such as a number of steps.
        state: name and dtype of each tensor of state, all of the parameter's shape, so that they can be allocated
            before the first step makes them; empty for an optimizer that is not element-wise.
    """

    shaped: str | None
    state_bytes: float
    counted: frozenset[str] = frozenset()
    state: tuple[tuple[str, torch.dtype], ...] = ()


def examine(optimizer: torch.optim.Optimizer, on_host: bool = False) -> Traits:
    """Find out what HiFT may do with the tensors of an optimizer, and refuse one that it cannot train with.

    Args:
        optimizer: it is not changed.
        on_host: the optimizer computes on the host (``offload_optimizer: cpu``).

    Raises:
        ValueError: HiFT would not be exact with this optimizer; the message has the reason and a remedy.
    """
    device = torch.device("cpu" if on_host else get_accelerator().current_device_name())
    reason = _refusal(optimizer)
    if reason is None and type(optimizer) in ELEMENTWISE:
        state = _known_state(optimizer, device)
        return Traits(None, sum(dtype.itemsize for _, dtype in state), state=state)
    if reason is None:
        with torch.random.fork_rng(devices=[]):
            found = _tried(optimizer, device)
        if isinstance(found, Traits):
            return found
        reason = found
    raise ValueError(f"HiFT cannot train with {_name(optimizer)}: {reason}")


def _name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__name__} of {type(optimizer).__module__.partition('.')[0]}"


def _refusal(optimizer: Any) -> str | None:
    """Return why an optimizer is refused, as far as it is known without a trial."""
    if hasattr(optimizer, "fused_backward") or hasattr(optimizer, "optimizer_dict"):  # LOMO; layer-wise in transformers
        return f"it updates weights inside the backward pass, so there is no step of a block; {_REMEDY}"
    if getattr(optimizer, "is_paged", False):
        return (
            "its state is in CUDA's managed memory, which moves by itself, and HiFT moves state to host memory by "
            "itself; use is_paged=False (with transformers' Trainer: the optim without 'paged_', and adamw_torch in "
            "place of paged_adamw_32bit)"
        )
    if all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
        return (
            "its train() and eval() switch all weights between two versions, outside of a step, and HiFT only has "
            f"the state of one block at hand; {_REMEDY}"
        )
    if type(optimizer) is FusedAdam and get_accelerator().device_name() == "cpu":
        return "DeepSpeed's kernel for CPUs keeps one step count for the whole process; use torch.optim.AdamW"
    if optimizer.state and with_initial_state(optimizer) is optimizer:
        return (
            "earlier steps, a loaded checkpoint or its constructor made state, and each block begins without state; "
            "pass an optimizer without state, such as a new AdamW (with transformers' Trainer: optim='adamw_torch')"
        )
    return None


def _known_state(optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[tuple[str, torch.dtype], ...]:
    """Return what a step makes of a known optimizer's state, in any of its parameter groups."""
    ones = torch.ones(8, device=device)
    trial, _ = restrict(optimizer, [])
    trial.param_groups = []
    for group in optimizer.param_groups:
        parameter = torch.nn.Parameter(ones.clone())
        parameter.grad = ones.clone()
        trial.param_groups.append({**group, "params": [parameter]})
    trial = with_initial_state(trial)
    trial.step()
    return _state_of_shape(trial.state.values())


def _state_of_shape(states: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, torch.dtype], ...]:
    """Return name and dtype of all state with elements, for an element-wise optimizer."""
    found = {name: value.dtype for state in states for name, value in state.items() if parts(value)}
    return tuple(found.items())


def _tried(optimizer: torch.optim.Optimizer, device: torch.device) -> Traits | str:
    """Return what a trial finds, or why the optimizer is refused."""
    groups = list(_groups(optimizer, device))
    try:
        stepped = _Whole(optimizer, groups)
        truth = stepped.run()
        if fault := _state_fault(stepped.optimizer) or _attribute_fault(optimizer, stepped.optimizer):
            return f"{fault}; {_REMEDY}"
        moved = _Moved(optimizer, groups).run()
    except Exception as error:  # an optimizer may raise anything
        shapes = ", ".join(str(tuple(start.shape)) for group in groups for start in group.starts)
        return f"a trial step on tensors of shapes {shapes} raises {type(error).__name__}: {error}; {_REMEDY}"
    if not _same(truth, moved, groups):
        return (
            "a step depends on more than the parameters, their gradients and optimizer.state, which is all that HiFT "
            f"keeps of a block; {_REMEDY}"
        )
    state_bytes = stepped.state_bytes()
    shaped = _why_whole(optimizer, stepped)
    if shaped is None:
        try:
            flat = _Moved(optimizer, groups, per_element=4 + int(state_bytes)).run()
        except Exception as error:
            shaped = f"steps on parts of tensors raise {type(error).__name__}: {error}"
        else:
            shaped = None if _same(truth, flat, groups) else "the update of an element depends on others of its tensor"
    state = _state_of_shape(stepped.optimizer.state.values()) if shaped is None else ()
    return Traits(shaped, state_bytes, stepped.counted(), state)


class _Group:
    """A parameter group of a trial: settings, first values of its parameters, and gradients of each step."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        shapes: list[tuple[int, ...]],
        generator: torch.Generator,
        device: torch.device,
    ):
        self.settings = dict(settings)
        rate = settings.get("lr")
        if rate is not None:  # some optimizers need a tensor, others have no rate
            self.settings["lr"] = torch.full_like(rate, _RATE) if torch.is_tensor(rate) else _RATE
        self.starts = [torch.randn(shape, generator=generator).mul_(0.02).to(device) for shape in shapes]
        self.gradients = []  # their scale differs over each tensor and between steps, so that norms of parts do
        for step in range(_STEPS):
            scaled = []
            for start in self.starts:
                scale = torch.logspace(-2, 1, start.numel()).view(start.shape) * (1, 8, 0.3)[step]
                scaled.append((torch.randn(start.shape, generator=generator) * scale).to(device))
            self.gradients.append(scaled)


def _groups(optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[_Group]:
    """Yield a group for each kind of parameter group: of other settings that are no numbers, or other dimensions."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        dims = sorted({max(len(getattr(p, "ds_shape", p.shape)), 1) for p in group["params"]})  # ds_shape: ZeRO-3
        kind = repr([dims, {k: type(v) if type(v) in (int, float, torch.Tensor) else v for k, v in settings.items()}])
        if kind not in seen:
            seen.add(kind)
            shapes = [
                shape for dim in dims for shape in _SHAPES.get(dim) or [(2,) * (dim - 2) + last for last in _MATRICES]
            ]
            yield _Group(settings, shapes, generator, device)


class _Whole:
    """The optimizer's own steps on whole tensors."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: list[_Group]):
        self.groups = groups
        self.optimizer, _ = restrict(optimizer, [])
        self.parameters = [[torch.nn.Parameter(start.clone()) for start in group.starts] for group in groups]
        self.optimizer.param_groups = [
            {**_copied(group.settings), "params": members}
            for group, members in zip(groups, self.parameters, strict=True)
        ]

    def run(self) -> list[torch.Tensor]:
        """Return the flat parameters of each group after all steps."""
        for step in range(_STEPS):
            for group, members in zip(self.groups, self.parameters, strict=True):
                for parameter, gradient in zip(members, group.gradients[step], strict=True):
                    parameter.grad = gradient.clone()
            self.optimizer.step()
        return [torch.cat([p.detach().flatten() for p in members]) for members in self.parameters]

    def counted(self) -> frozenset[str]:
        """Return the settings that the steps have changed."""
        pairs = zip(self.groups, self.optimizer.param_groups, strict=True)
        return frozenset(
            key
            for group, after in pairs
            for key, before in group.settings.items()
            if (not torch.equal(before, after[key]) if torch.is_tensor(before) else before is not after[key])
        )

    def state_bytes(self) -> float:
        """Return the bytes of state for each element of a larger tensor, from those of two large tensors."""
        sizes = {}
        for members in self.parameters:
            for parameter in members:
                state = self.optimizer.state[parameter]
                sizes[parameter.numel()] = sum(part.nbytes for value in state.values() for part in parts(value))
        (small, few), (large, many) = sorted(sizes.items())[-2:]
        return max(many - few, 0) / (large - small) if few <= many else many / large


class _Moved:
    """The steps of a :class:`BlockState`, as the owner of its masters.

    If the optimizer computes on the host, so does the trial, from other host buffers.

    Args:
        optimizer: the optimizer to try.
        groups: what to step.
        per_element: bytes of master and state of one element, to flatten each group and cut it into chunks; None: whole
            tensors.
    """

    factor = None

    def __init__(self, optimizer: torch.optim.Optimizer, groups: list[_Group], per_element: int | None = None):
        device = groups[0].starts[0].device
        self.optimizer, _ = restrict(optimizer, [])
        join: Callable[[list[torch.Tensor]], list[torch.Tensor]] = (
            (lambda tensors: [tensor.clone() for tensor in tensors])
            if per_element is None
            else (lambda tensors: [torch.cat([tensor.flatten() for tensor in tensors])])
        )
        starts = [join(group.starts) for group in groups]
        self._gradients = [[g for group in groups for g in join(group.gradients[step])] for step in range(_STEPS)]
        self._weights = [start for own in starts for start in own]
        masters = [[torch.nn.Parameter(start.clone()) for start in own] for own in starts]
        self._masters = [(master, number) for number, own in enumerate(masters) for master in own]
        self.optimizer.param_groups = [
            {**_copied(group.settings), "params": own} for group, own in zip(groups, masters, strict=True)
        ]
        self._per_element = per_element or 0
        self._staging = Staging(device, _CHUNK * per_element if per_element else None)
        self._step = 0

    def run(self) -> list[torch.Tensor]:
        """Return the flat parameters of each group after all steps."""
        # Not an attribute: in a cycle with its owner, it would keep device memory until Python's next collection.
        state = BlockState(self, HostMemory(pin_memory=False), self._staging, self._per_element)
        for self._step in range(_STEPS):
            state.step()
        state.settle()
        groups = sorted({number for _, number in self._masters})
        return [
            torch.cat([w.flatten() for w, (_, own) in zip(self._weights, self._masters, strict=True) if own == number])
            for number in groups
        ]

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        return list(self._masters)

    def gradient_parts(self, index: int) -> list[torch.Tensor]:
        return [self._gradients[self._step][index]]

    def weights(self, index: int) -> torch.Tensor:
        return self._weights[index]

    def first_element(self) -> int:
        return 0


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in settings.items()}


def _state_fault(optimizer: torch.optim.Optimizer) -> str | None:
    """Return what of an optimizer's state cannot leave the device, or would be lost there."""
    parameters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for key, state in optimizer.state.items():
        if key not in parameters:
            return f"its state has the entry {key!r}, which belongs to no parameter and to no block"
        for name, value in state.items():
            is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) or is_traceable_wrapper_subclass(value)
            if not is_plain and not isinstance(value, _COUNTS):
                return (
                    f"its state {name!r} is a {type(value).__name__}; only tensors and numbers can move to host memory "
                    "and into checkpoints"
                )
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name != "params" and _holds_elements(value):
                return f"it keeps tensors in its parameter groups ({name!r}) and not in optimizer.state"
    return None


def _attribute_fault(optimizer: torch.optim.Optimizer, stepped: torch.optim.Optimizer) -> str | None:
    """Return an attribute in which an optimizer counts; it would be in no checkpoint."""
    for name, before in vars(optimizer).items():
        after = vars(stepped).get(name)
        if type(before) in (int, float, torch.Tensor) and after is not before:
            return f"its steps change its attribute {name!r}, which is in no checkpoint"
    return None


def _holds_elements(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_elements, value.values()))
    return any(map(_holds_elements, value)) if isinstance(value, (list, tuple)) else bool(parts(value))


def _why_whole(optimizer: torch.optim.Optimizer, stepped: _Whole) -> str | None:
    """Return why tensors must stay whole, as far as the settings and the state show it."""
    for members in stepped.parameters:
        for parameter in members:
            state = stepped.optimizer.state[parameter]
            for name, value in state.items():
                if any(part is not value or part.shape != parameter.shape for part in parts(value)):
                    quantized = [key for key in state for part in parts(state[key]) if part.dtype == torch.uint8]
                    if quantized:
                        return f"the state {quantized[0]!r} is quantized in blocks of a tensor"
                    shapes = f"{tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}"
                    return f"the state {name!r} has the shape {shapes}"
    settings = overrides(optimizer)
    if any(id(parameter) in settings for group in optimizer.param_groups for parameter in group["params"]):
        return "bitsandbytes has settings for single tensors"
    return None


def _same(truth: list[torch.Tensor], other: list[torch.Tensor], groups: list[_Group]) -> bool:
    """Return whether two runs made the same updates, up to rounding."""
    for ours, theirs, group in zip(truth, other, groups, strict=True):
        start = torch.cat([start.flatten() for start in group.starts])
        largest = (ours - start).abs().max()
        if not (ours - theirs).abs().max() <= 1e-5 * largest:  # also if one is not finite
            return False
    return True
