"""MeZO: fine-tuning with forward passes only, in the memory of inference.

Source: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333, Algorithm 1. Two
forward passes give the slope of the loss along a random direction, and the update is the slope times the direction. The
direction is never stored. Each use draws it again from its seed, one chunk of ``noise_chunk`` elements at a time.

Weights move in place, and rounding errors must not accumulate. The plain sequence w + e - 2e + e leaves every second
weight off by one unit in the last place, which is a random walk over many steps: bf16 weights with standard deviation
0.02 were off by 2.4e-3 (root mean square) after 1,000 steps of ``eps`` 1e-3 with no update at all. This implementation
avoids the walk in two ways:

* Every displacement is a whole number of the weight's *grid spacing*: the spacing of its type's numbers at |w| + 6
  ``eps``, or slightly more. Such sums are exact, and the spacing can be computed from the displaced weight as well.
* One rounding covers both the way back and the update. It rounds stochastically to a multiple of the spacing, so small
  updates are right on average, and the next perturbation returns to the result bit for bit.

A perturbation therefore restores, in fp32, bf16 and fp16, every weight that is a multiple of its spacing. After the
first update, all weights are. The first perturbation rounds the finer bits of weights that are not much larger than
``eps``: by 4.2e-5 (root mean square) for the bf16 weights above and 6.3e-10 for such fp32 weights. The error is the
same after 1,000 steps. The exception is one value just below each power of two (in bf16 at ``eps`` 1e-3: 1.984375) if
its draw exceeds 3.9 standard deviations.

The type limits what a perturbation can do: a weight does not move if its displacement is less than half of its spacing.
In bf16 at ``eps`` 1e-3 that holds for weights above 0.25 and most directions. Plain rounding does not move them either.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from hift_ds.config import noise_chunk

_MAX_DEVIATION = 6.0  # in standard deviations; normal draws practically never exceed it
# type -> integer type of the same size, and the mask of the exponent's bits
_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}

# The loss of a batch: a mean, or a sum and the number to divide it by.
Loss = Tensor | tuple[Tensor | float, Tensor | float]


class _Chunk(NamedTuple):
    """Consecutive elements of one parameter."""

    weights: Tensor  # a flat view
    group: dict[str, Any]
    moments: tuple[Tensor, ...]  # flat views of Adam's moments of the same elements; empty without Adam
    generator: torch.Generator  # seeded for this chunk and step

    def noise(self) -> Tensor:
        """Return the direction z of this chunk, in at least fp32. Only the first call after seeding returns z."""
        wide = torch.promote_types(self.weights.dtype, torch.float32)
        return torch.empty_like(self.weights, dtype=wide).normal_(generator=self.generator)


class MeZO(torch.optim.Optimizer):
    """Zeroth-order SGD, or Adam with the same gradient estimate. Use it like a torch optimizer with a closure.

    The closure needs no backward pass. A step perturbs all trained weights by +eps z and by -eps z, calls the closure
    at each, and updates::

        g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps)
        theta <- theta - lr (g z + weight_decay theta)

    With ``adam``, the estimate g z passes through Adam's bias-corrected moments (with decoupled weight decay).

    Memory in addition to the weights: at most four fp32 chunks, 64 MiB (on a CPU 2 MiB), for any model size, and none
    of it during the forward passes. ``adam`` adds two fp32 moments, 8 bytes per trained parameter, which is four times
    the size of bf16 weights. To train LoRA or prefix parameters, pass the PEFT model.

    Data parallelism: every rank has the same weights and evaluates its own share of the batch. The ranks exchange four
    numbers and add them in rank order, so that all take the same step bit for bit. The direction depends on the kind of
    device but not on the number of devices: random generators differ between CPUs and GPUs, and between GPUs with
    different numbers of multiprocessors.

    Args:
        params: a module, its ``named_parameters()``, parameters, or parameter groups. Parameters that require no
            gradient are left out. A tied parameter counts once.
        lr: learning rate. It is in ``param_groups``, so torch's schedulers work.
        eps: scale of the perturbation for all groups.
        weight_decay: decoupled weight decay, multiplied by ``lr``.
        adam: use Adam's moments.
        betas: Adam's coefficients.
        adam_eps: Adam's epsilon.
        seed: seed of all directions.

    Attributes:
        steps: number of updates.
        skipped: number of steps without an update because of a non-finite loss.
        projected_gradient: g of the last step.

    Raises:
        ValueError: nothing to train, an argument is out of range, or a weight is partitioned by ZeRO-3, not fp16, bf16,
            fp32 or fp64, not contiguous, or overlaps another one partly.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        adam: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        seed: int = 0,
    ):
        _check_numbers(lr=lr, eps=eps, weight_decay=weight_decay, betas=betas, adam_eps=adam_eps)
        self.eps, self.adam, self.seed = eps, adam, seed
        self.steps = self.skipped = 0
        self.projected_gradient = math.nan
        groups = _trained(params)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "adam_eps": adam_eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> float:  # type: ignore[override]
        """Perform one step, and return the mean of the two losses over all ranks.

        Both calls of the closure start from the same state of torch's random generators, so dropout is the same. If a
        loss is non-finite on any rank, all ranks restore their weights and count the step as skipped. An exception in
        the closure also restores the weights.

        Args:
            closure: evaluates the model, without gradients, on this rank's share of the batch. It returns the sum of
                the loss and the number of tokens or examples to divide by; the mean is then over those of all ranks.
                Or it returns the loss alone; the mean is then over the ranks.

        Raises:
            ValueError: there is no closure, the loss is not a scalar, all ranks count 0 tokens or examples, or the
                ranks are not at the same step of the same run.
        """
        if closure is None:
            raise ValueError("MeZO.step needs a closure that evaluates the loss; pass one: optimizer.step(closure)")
        place = 0  # the weights are at theta + place * eps z
        before = _random_state()
        try:
            self._move(place, 1)
            place = 1
            above = _sum_and_count(closure())
            self._move(place, -2)
            place = -1
            _set_random_state(before)
            below = _sum_and_count(closure())
            losses = self._over_ranks(*above, *below)
        except BaseException:
            self._move(place, -place)
            raise
        self.projected_gradient = (losses[0] - losses[1]) / (2 * self.eps)
        if math.isfinite(self.projected_gradient):
            self._update()
            self.steps += 1
        else:
            self._move(place, -place)
            self.skipped += 1
        return (losses[0] + losses[1]) / 2

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an identical continuation needs in addition to the weights."""
        own = {"eps": self.eps, "adam": self.adam, "seed": self.seed, "steps": self.steps, "skipped": self.skipped}
        return {**super().state_dict(), "mezo": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. Saved settings replace those of this instance.

        Raises:
            ValueError: the state is not from MeZO, has another value of ``adam``, or has other parameter groups.
        """
        own = state_dict.get("mezo")
        if own is None:
            raise ValueError("this is not the state of a MeZO optimizer; load what MeZO.state_dict returned")
        if own["adam"] != self.adam:
            raise ValueError(
                f"the state was saved with adam={own['adam']}, this MeZO has adam={self.adam}; use the saved value"
            )
        super().load_state_dict(state_dict)
        self.eps, self.seed, self.steps, self.skipped = own["eps"], own["seed"], own["steps"], own["skipped"]
        # torch casts state to the parameter's type; moments are wider.
        saved = state_dict["state"]
        for index, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            if index in saved:
                moments = _moments(parameter)
                for name, moment in moments.items():
                    moment.copy_(saved[index][name])
                self.state[parameter] = moments

    def _chunks(self) -> Iterator[_Chunk]:
        """Yield all trained weights in chunks. Order and seeds are the same for each call within a step."""
        generators: dict[torch.device, torch.Generator] = {}
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.device not in generators:
                    generators[parameter.device] = torch.Generator(parameter.device)
                generator = generators[parameter.device]
                tensors = [t.detach().view(-1) for t in (parameter, *self.state.get(parameter, {}).values())]
                size = noise_chunk(parameter.device.type)
                for number, start in enumerate(range(0, parameter.numel(), size)):
                    generator.manual_seed(_hash(self.seed, self.steps + self.skipped, index, number))
                    weights, *moments = (t[start : start + size] for t in tensors)
                    yield _Chunk(weights, group, tuple(moments), generator)
                index += 1

    def _move(self, place: int, by: int) -> None:
        """Move all weights by ``by`` perturbations, from ``place`` (-1, 0 or 1) perturbations away from theta."""
        if by:
            for chunk in self._chunks():
                self._move_chunk(chunk, place, by)

    def _move_chunk(self, chunk: _Chunk, place: int, by: int) -> None:
        wide, displacement = self._displacement(chunk, chunk.noise(), place)
        chunk.weights.copy_(wide.add_(displacement, alpha=by))

    def _displacement(self, chunk: _Chunk, noise: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Return the weights in the type of ``noise``, and eps z rounded to the spacing, which overwrites ``noise``."""
        wide = chunk.weights.to(noise.dtype)
        displacement = noise.mul_(self.eps)
        spacing = self._spacing_(torch.sub(wide, displacement, alpha=place), chunk.weights.dtype)
        return wide, displacement.div_(spacing).round_().mul_(spacing)

    def _spacing_(self, weights: Tensor, dtype: torch.dtype, lower: float = 1.25) -> Tensor:
        """Replace weights, known to within half a spacing, by their grid spacing.

        At a certain size of the weight, the edge, the spacing doubles from u to 2u. The edge is a multiple of 2u,
        because the margin is a power of two. ``lower`` is how many u below the edge the doubled spacing begins. With
        1.25, the spacing of weights at edge - 2u and at the edge is right even if the weights are known to half a
        spacing only. The update uses 2, so that it rounds no weight to edge - u, whose spacing would be found wrong.
        """
        kind = torch.finfo(dtype)
        margin = 2.0 ** math.ceil(math.log2(_MAX_DEVIATION * self.eps))
        integer, exponent = _EXPONENT[weights.dtype]
        weights.abs_().add_(margin).mul_(1 + lower / 2 * kind.eps)
        weights.view(integer).bitwise_and_(exponent)  # keeps the largest power of two below
        return weights.mul_(kind.eps).clamp_min_(max(kind.tiny * kind.eps, torch.finfo(weights.dtype).tiny))

    def _update(self) -> None:
        """Move the weights from theta - eps z to the updated ones, with one rounding."""
        if self.adam:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter not in self.state:
                        self.state[parameter] = _moments(parameter)
        for chunk in self._chunks():
            self._update_chunk(chunk)

    def _update_chunk(self, chunk: _Chunk) -> None:
        noise = chunk.noise()
        wide, displacement = self._displacement(chunk, noise.clone(), -1)
        wide.add_(displacement)  # theta
        change = noise.mul_(self.projected_gradient)
        if self.adam:
            change = self._adam_(change, chunk, out=displacement)
        change.add_(wide, alpha=chunk.group["weight_decay"]).mul_(-chunk.group["lr"])
        spacing = self._spacing_(torch.add(wide, change, out=displacement), chunk.weights.dtype, lower=2)
        # Divide by the spacing. The whole part of theta stays; the rest and the change are rounded stochastically.
        wide.div_(spacing)
        change.div_(spacing).add_(wide).sub_(wide.floor_())
        change.add_(torch.rand(change.shape, generator=chunk.generator, dtype=change.dtype, device=change.device))
        chunk.weights.copy_(wide.add_(change.floor_()).mul_(spacing))

    def _adam_(self, gradient: Tensor, chunk: _Chunk, out: Tensor) -> Tensor:
        """Update the moments, and replace the gradient by Adam's direction. ``out`` is scratch memory."""
        (mean, square), (beta1, beta2) = chunk.moments, chunk.group["betas"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        count = self.steps + 1
        torch.div(square, 1 - beta2**count, out=out).sqrt_().add_(chunk.group["adam_eps"])
        return torch.div(mean, out, out=gradient).div_(1 - beta1**count)

    def _over_ranks(self, *sums_and_counts: float) -> tuple[float, float]:
        """Return both mean losses over all ranks, the same numbers on each rank."""
        numbers = [sums_and_counts]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            sizes = [parameter.numel() for group in self.param_groups for parameter in group["params"]]
            run = float(_hash(self.seed, self.steps, self.skipped, *sizes) >> 11)  # a double holds 53 bits
            device = self.param_groups[0]["params"][0].device
            mine = torch.tensor([*sums_and_counts, run], dtype=torch.float64, device=device)
            gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, mine)
            *columns, runs = zip(*(row.tolist() for row in gathered), strict=True)
            if len(set(runs)) > 1:
                raise ValueError(
                    "MeZO's ranks differ in seed, in trained parameters or in the number of steps; use the same seed "
                    "and parameters on all ranks, and resume all of them from the same checkpoint"
                )
            numbers = list(zip(*columns, strict=True))
        above, count_above, below, count_below = (sum(column) for column in zip(*numbers, strict=True))
        if not count_above or not count_below:
            raise ValueError("the closure counted 0 tokens or examples on all ranks; skip batches without any")
        return above / count_above, below / count_below


def _check_numbers(lr: float, eps: float, weight_decay: float, betas: tuple[float, float], adam_eps: float) -> None:
    problems = [
        f"{name}={value!r}: expected a finite number {text}"
        for name, value, good, text in (
            ("lr", lr, 0 <= lr < math.inf, "of at least 0"),
            ("eps", eps, 0 < eps < math.inf, "above 0, such as 1e-3"),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "of at least 0"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "of at least 0 and below 1 for each"),
            ("adam_eps", adam_eps, 0 < adam_eps < math.inf, "above 0, such as 1e-8"),
        )
        if not good
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _trained(params: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
    """Return parameter groups of the parameters that require a gradient, without duplicates."""
    entries = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    problems: list[str] = []
    found: list[tuple[str, int, int, str]] = []  # device, start and end address, name
    seen: set[tuple[Any, ...]] = set()
    result = []
    for group in groups:
        kept: list[Any] = []
        members = group["params"]
        for entry in [members] if isinstance(members, Tensor) else members:
            name, parameter = entry if isinstance(entry, tuple) else (f"parameter of shape {tuple(entry.shape)}", entry)
            if not parameter.requires_grad:
                continue
            if parameter.is_meta:
                problems.append(f"{name} is on the meta device; load its weights first")
            elif hasattr(parameter, "ds_id"):
                problems.append(f"{name} is partitioned by ZeRO-3; use MeZO with whole weights on each rank")
            elif parameter.dtype not in (torch.float16, torch.bfloat16, *_EXPONENT):
                problems.append(f"{name} is {parameter.dtype}; expected float16, bfloat16, float32 or float64")
            elif not parameter.is_contiguous():
                problems.append(f"{name} is not contiguous; set .data to .data.contiguous()")
            else:
                where = (parameter.device, parameter.data_ptr(), parameter.nbytes)
                if parameter.numel() and where in seen:
                    continue
                seen.add(where)
                kept.append(entry)
                start = parameter.data_ptr()
                found.append((str(parameter.device), start, start + parameter.nbytes, name))
        if kept:
            result.append({**group, "params": kept})
    for (device, _, end, name), (its_device, start, _, other) in pairwise(sorted(found)):
        if device == its_device and start < end:
            problems.append(f"{name} and {other} overlap in memory; train only one of them")
    if problems:
        raise ValueError("MeZO cannot train these weights: " + "; ".join(problems))
    if not result:
        raise ValueError("MeZO has nothing to train: no parameter requires a gradient")
    return result


def _moments(parameter: Tensor) -> dict[str, Tensor]:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return {name: torch.zeros_like(parameter, dtype=wide) for name in ("exp_avg", "exp_avg_sq")}


def _hash(*numbers: int) -> int:
    """Return a 64-bit hash of these numbers. (A CPU's generator uses 32 bits of a seed.)"""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")


def _sum_and_count(loss: Loss) -> tuple[float, float]:
    total, count = loss if isinstance(loss, tuple) else (loss, 1.0)
    if isinstance(total, Tensor) and total.numel() != 1:
        raise ValueError(f"the closure's loss has shape {tuple(total.shape)}; expected one number")
    return float(total), float(count)


def _random_state() -> tuple[Tensor, Tensor]:
    return torch.get_rng_state(), get_accelerator().get_rng_state()


def _set_random_state(state: tuple[Tensor, Tensor]) -> None:
    torch.set_rng_state(state[0])
    get_accelerator().set_rng_state(state[1])
