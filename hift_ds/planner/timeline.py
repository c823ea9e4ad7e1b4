"""When the operations of a step run: a simulation of the host, which issues them, and of the streams of one device.

A program is a list of operations in the order in which the host issues them. Those of one stream run one after the
other. Kernels of several streams share the device's units, and copies in both directions share the bus. The copies in
one direction are made in the order in which they were issued, whatever their streams. A drive does one thing at a time.
An operation begins when it is issued, the one before it on its stream is done, and all those are done that it waits
for.

The constants below turn FLOPs and bytes into seconds. They were fitted to a few rows of measurements, and the tests of
this module hold the others against them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# Streams; HOST: the host waits. Layers' weights have a stream of their own. A drive reads and writes by turns.
HOST, MAIN, FETCH, STORE, STEP, WEIGHTS, DRIVE = "host", "main", "fetch", "store", "step", "weights", "drive"
PRODUCT, ATTENTION, KERNEL, TO_DEVICE, TO_HOST = "product", "attention", "kernel", "to device", "to host"
READ, WRITE = "read", "write"  # of files

# Attainable shares of the rates in CARDS. Matrix products, attention (of half the FLOPs if it is causal) and all other
# kernels: fitted to the kernels of a step of LLaMA-7B's shape with 8,192 tokens, the mean of three H200
# (2026-11-27 and 2026-11-28: 510, 547 and 565 ms).
PRODUCT_SHARE = 0.77
ATTENTION_SHARE = 0.52
MEMORY_SHARE = 0.54
# Copies of page-locked memory beside one of them: 55 GB/s one way, and 50 GB/s each way both ways at once.
BUS_SHARE = 0.87
BUS_SHARE_BOTH = 0.79
# Copies of memory that is not page-locked go through a buffer of the driver, and the host waits for each of them. Their
# rate, as a share of that of page-locked memory, is an assumption: no machine was measured.
PAGEABLE_SHARE = 0.33
# A kernel of a few elements.
KERNEL_SECONDS = 5e-6
# The host's time to issue one operation of a model from Python, with modules and autograd, on 16 cores beside these
# H200. It belongs to a machine: steps with 512 tokens, which the host limits, give 30, 33 and 36 microseconds.
HOST_SECONDS = 33e-6


class Card(NamedTuple):
    """Rates of a device by its data sheet.

    Attributes:
        flops: FLOP/s of dense bf16 matrix products that accumulate in fp32.
        flops_fp32: FLOP/s in fp32, without TF32.
        memory: bytes/s of device memory.
        bus: bytes/s of the bus in one direction.
        read, write: bytes/s of the drive with the state in files; not the device's own.
        measured: whether predictions were held against a card of this kind.
    """

    flops: float
    flops_fp32: float
    memory: float
    bus: float
    measured: bool = False
    read: float = 3e9
    write: float = 2e9


_PCIE5, _PCIE4 = 63e9, 31.5e9  # 16 lanes
CARDS = {
    # NVIDIA's data sheets; tensor cores without sparsity. The SXM versions, except where the name says otherwise.
    "b200": Card(2250e12, 75e12, 8.0e12, _PCIE5),
    "h200": Card(989e12, 67e12, 4.8e12, _PCIE5, measured=True),
    "h100": Card(989e12, 67e12, 3.35e12, _PCIE5),
    "h100-pcie": Card(756e12, 51e12, 2.0e12, _PCIE5),
    "a100": Card(312e12, 19.5e12, 2.04e12, _PCIE4),  # 80 GB
    "a100-40gb": Card(312e12, 19.5e12, 1.56e12, _PCIE4),
    "l40s": Card(362e12, 91.6e12, 0.864e12, _PCIE4),
    "l4": Card(121e12, 30.3e12, 0.3e12, _PCIE4),
    "a6000": Card(155e12, 38.7e12, 0.768e12, _PCIE4),
    "a10": Card(125e12, 31.2e12, 0.6e12, _PCIE4),
    # White papers of the Ada, Ampere and Blackwell GeForce cards: bf16 with fp32 accumulation.
    "5090": Card(209.5e12, 104.8e12, 1.792e12, _PCIE5),
    "4090": Card(165.2e12, 82.6e12, 1.008e12, _PCIE4),
    "4080": Card(97.5e12, 48.7e12, 0.717e12, _PCIE4),
    "4070": Card(58.3e12, 29.1e12, 0.504e12, _PCIE4),
    "4060": Card(30.2e12, 15.1e12, 0.272e12, _PCIE4 / 2),  # 8 lanes
    "3090": Card(71e12, 35.6e12, 0.936e12, _PCIE4),
}


class Operation(NamedTuple):
    """What the host issues.

    Attributes:
        stream: where it runs; ``HOST``: the host waits for ``after``.
        kind: ``PRODUCT``, ``ATTENTION``, ``KERNEL``, ``TO_DEVICE``, ``TO_HOST``, ``READ`` or ``WRITE``.
        flops: floating-point operations of matrix products and attention.
        nbytes: bytes that a kernel reads and writes, or that cross the bus.
        after: operations that it waits for, by their index in the program.
        fp32: products are computed in fp32.
        enters: number of the layer whose forward or backward pass begins with it; None: it is no layer's first.
    """

    stream: str
    kind: str = KERNEL
    flops: float = 0
    nbytes: float = 0
    after: tuple[int, ...] = ()
    fp32: bool = False
    enters: int | None = None

    @property
    def is_copy(self) -> bool:
        """Whether it uses the bus."""
        return self.kind in (TO_DEVICE, TO_HOST)

    @property
    def uses(self) -> str:
        """What it shares with the others that use the same: a direction of the bus, the drive, or the units."""
        return self.kind if self.is_copy else DRIVE if self.kind in (READ, WRITE) else KERNEL

    def seconds(self, card: Card) -> float:
        """Return the time it takes if nothing else uses the device."""
        if self.stream == HOST:
            return 0.0
        if self.is_copy:
            return self.nbytes / (BUS_SHARE * card.bus)
        if self.kind in (READ, WRITE):
            return self.nbytes / (card.read if self.kind == READ else card.write)
        share = PRODUCT_SHARE if self.kind == PRODUCT else ATTENTION_SHARE
        peak = card.flops_fp32 if self.fp32 else card.flops
        return max(self.flops / (share * peak), self.nbytes / (MEMORY_SHARE * card.memory), KERNEL_SECONDS)

    def times(self, count: float) -> Operation:
        """Return the operation for a batch that is ``count`` times as large. Products read the weights once."""
        nbytes = self.nbytes if self.kind == PRODUCT else count * self.nbytes
        return self._replace(flops=count * self.flops, nbytes=nbytes)


class Timeline(NamedTuple):
    """When each operation of a program was issued and ran, in seconds from the start."""

    issued: list[float]
    begun: list[float]
    done: list[float]


def simulate(program: Sequence[Operation], card: Card, host_seconds: float = HOST_SECONDS) -> Timeline:
    """Run a program.

    Args:
        program: the operations in the order of issue.
        card: the device.
        host_seconds: the host's time to issue one operation.

    Raises:
        ValueError: an operation waits for one that is issued later on.
    """
    count = len(program)
    issued, begun, done = [math.inf] * count, [math.inf] * count, [math.inf] * count
    queues: dict[str, deque[int]] = {}
    copies: dict[str, deque[int]] = {TO_DEVICE: deque(), TO_HOST: deque()}  # that are not done, in the order of issue
    running: dict[str, list[Any]] = {}  # stream -> index, and seconds left at the full rate
    now, following, host_free = 0.0, 0, 0.0
    finished = 0
    while finished < count:
        while following < count and host_free <= now:  # the host
            operation = program[following]
            if operation.stream == HOST:
                if not all(done[index] <= now for index in operation.after):
                    break
                issued[following] = begun[following] = done[following] = now
                finished += 1
            else:
                issued[following] = now
                queues.setdefault(operation.stream, deque()).append(following)
                if operation.is_copy:
                    copies[operation.kind].append(following)
                host_free = now + host_seconds
            following += 1
        for stream, queue in queues.items():
            if not queue or stream in running:
                continue
            operation = program[queue[0]]
            is_next = not operation.is_copy or copies[operation.kind][0] == queue[0]
            if is_next and all(done[index] <= now for index in operation.after):
                index = queue.popleft()
                begun[index] = now
                running[stream] = [index, operation.seconds(card)]
        at_work = [program[index].uses for index, _ in running.values()]
        both = BUS_SHARE_BOTH / BUS_SHARE if {TO_DEVICE, TO_HOST} <= set(at_work) else 1.0
        rates = {kind: (both if kind in copies else 1.0) / at_work.count(kind) for kind in set(at_work)}
        ends = [now + left / rates[kind] for kind, (_, left) in zip(at_work, running.values(), strict=True)]
        if host_free > now and following < count:
            ends.append(host_free)
        if not ends:
            if finished < count:
                raise ValueError(f"operation {min(following, count - 1)} waits for one that is never done")
            break
        then = min(ends)
        for kind, (stream, entry) in zip(at_work, list(running.items()), strict=True):
            entry[1] -= (then - now) * rates[kind]
            if entry[1] <= 1e-12:
                done[entry[0]] = then
                finished += 1
                if kind in copies:
                    copies[kind].popleft()
                del running[stream]
        now = then
    return Timeline(issued, begun, done)


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor that are in memory: those of an expanded one count once."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride else 1
    return numel * tensor.element_size()


def work_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, stream: str = MAIN) -> Operation:
    """Return the work of an operation of PyTorch that was called with these arguments and returned ``result``."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
    nbytes = sum(_nbytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())
    fp32 = any(tensor.dtype == torch.float32 for tensor in tensors[:1])
    name = func.__name__
    if "scaled_dot_product" in name:
        of_backward = "backward" in name
        shapes = [tuple(argument.shape) for argument in args if isinstance(argument, Tensor)][: 3 + of_backward]
        flops = (sdpa_backward_flop_count if of_backward else sdpa_flop_count)(*shapes)
        named = zip(func._schema.arguments, args, strict=False)
        is_causal = {**{argument.name: value for argument, value in named}, **kwargs}.get("is_causal")
        return Operation(stream, ATTENTION, flops / 2 if is_causal else flops, nbytes, fp32=fp32)
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return Operation(stream, PRODUCT, formula(*args, **kwargs, out_val=result), nbytes, fp32=fp32)
    return Operation(stream, KERNEL, 0, nbytes)


_NO_KERNEL = ("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh")


def has_kernel(func: Any) -> bool:
    """Whether an operation of PyTorch runs a kernel: views and allocations do not."""
    returns = func._schema.returns
    is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    return not is_view and func.namespace != "prim" and func._overloadpacket.__name__ not in _NO_KERNEL


class Trace(TorchDispatchMode):
    """Collects the work of all operations inside the mode.

    Attributes:
        passes: ``forward`` and ``backward`` -> the operations, in order.
        phase: the pass that operations are added to; the caller sets it.
        layer: number of the layer whose pass has begun; the caller sets it, and the next operation takes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.layer: int | None = None
        self._entered: tuple[str, int | None] = self.phase, None
        self.passes: dict[str, list[Operation]] = {"forward": [], "backward": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if has_kernel(func):
            operation = work_of(func, args, kwargs or {}, result)
            if self._entered != (self.phase, self.layer):
                self._entered = self.phase, self.layer
                operation = operation._replace(enters=self.layer)
            self.passes[self.phase].append(operation)
        return result


def kernel_seconds(operations: Iterable[Operation], card: Card) -> float:
    """Return the time of all kernels, one after the other."""
    return sum(operation.seconds(card) for operation in operations if operation.uses == KERNEL)
