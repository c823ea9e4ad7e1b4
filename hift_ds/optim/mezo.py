"""MeZO: fine-tuning with forward passes alone, in the memory of inference.

Source: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333, Algorithm 1: the
slope of the loss along one random direction, from two forward passes, times that direction. The direction is never
kept: it is drawn again from its seed wherever it is needed, one piece of ``noise_chunk`` elements at a time.

Weights move in place, and rounding must not carry them away. Plain arithmetic, w + e - 2e + e, ends one unit in the
last place off for every other weight, and over many steps that is a random walk: bf16 weights of standard deviation
0.02 were off by 2.4e-3 (root mean square) after 1,000 steps of ``eps`` 1e-3 in which nothing was learned. So here

* every displacement is a whole number of the weight's own *unit*, the spacing of its type's numbers at
  |w| + 6 ``eps`` or a little more. Such sums are exact, and the unit can be told from the moved weight too;
* the update goes to the weights together with the way back, and is rounded stochastically to a whole number of units:
  right on average, however small it is, and what it leaves returns from the next perturbation bit for bit.

Where bits return, in fp32, bf16 and fp16 alike: for every weight that is a multiple of its unit, as all are after the
first update. The first time, finer bits, which weights not much larger than ``eps`` have, are rounded: by 4.2e-5 (root
mean square) for the bf16 weights above, by 6.3e-10 for such fp32 weights; after 1,000 steps it is the same. Where not:
one value just below a power of two (in bf16, at ``eps`` 1e-3, 1.984375) if its draw is beyond 3.9 standard deviations.
The unit bounds what the type can do: a weight stays where it is if its displacement is less than half of its unit (in
bf16, at ``eps`` 1e-3, weights above 0.25 do for most directions). Plain rounding does not move those either.
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

_REACH = 6.0  # standard deviations: a normal draw beyond it is not to be expected
_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}

Loss = Tensor | tuple[Tensor | float, Tensor | float]


class _Piece(NamedTuple):
    """Consecutive elements of one parameter."""

    weights: Tensor  # a view, flat
    group: dict[str, Any]
    moments: tuple[Tensor, ...]  # views of the same elements
    generator: torch.Generator  # seeded for this piece and step

    def noise(self) -> Tensor:
        """The direction z here: the first that is drawn from the seed, in the precision that is computed in."""
        wide = torch.promote_types(self.weights.dtype, torch.float32)
        return torch.empty_like(self.weights, dtype=wide).normal_(generator=self.generator)


class MeZO(torch.optim.Optimizer):
    """Zeroth-order SGD, or Adam on the same estimate; used like a torch optimizer whose closure has no backward pass.

    A step perturbs all trained weights by +eps z and by -eps z, calls the closure at each, and updates::

        g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps)
        theta <- theta - lr (g z + weight_decay theta)

    With ``adam`` the estimate g z goes through Adam's bias-corrected moments instead (decoupled weight decay).

    Memory above the weights: at most four fp32 pieces, 64 MiB (on a CPU 2 MiB), at any model size; none of it during
    the forward passes. With ``adam`` two fp32 moments in addition, 8 bytes a trained parameter: four times as much as
    bf16 weights take. LoRA or prefix parameters are trained by giving the PEFT model.

    Data parallel: every rank has the same weights, evaluates its own share of the batch, and tells the others four
    numbers. They are added in the order of ranks, so that all ranks take the same step, bit for bit. The direction does
    not depend on the number of devices, only on their kind: generators differ between a CPU and a GPU, and between GPUs
    with another number of multiprocessors.

    Args:
        params: a module, its ``named_parameters()``, parameters, or parameter groups. Those that do not require a
            gradient are left out, tied ones count once.
        lr: learning rate, of ``param_groups``: torch's schedulers work.
        eps: scale of the perturbation, the same for all groups.
        weight_decay: multiplied by ``lr``.
        adam: use Adam's moments.
        betas, adam_eps: Adam's.
        seed: of all directions.

    Attributes:
        steps, skipped: updates so far, and steps without one because a loss was not finite.
        projected_gradient: g of the last step.

    Raises:
        ValueError: nothing to train, a number out of range, weights that are partitioned by ZeRO 3, of another type
            than fp16, bf16, fp32 or fp64, not contiguous, or partly overlapping.
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
        """One step; returns the mean of the two losses, over all ranks.

        Both calls of the closure see the same state of torch's random numbers, so that dropout is the same.

        Args:
            closure: evaluates the model on this rank's share of the batch, without gradients. Returns the loss's sum
                and what it is to be divided by (tokens or examples), so that the mean is over all ranks' together; or
                the loss alone, whose mean over ranks is taken.

        If a loss is not finite on any rank, all ranks restore their weights and count the step as skipped. The weights
        are also restored when the closure raises.

        Raises:
            ValueError: no closure, a loss of more than one number, nothing to divide by on any rank, or ranks that are
                not at the same step of the same run.
        """
        if closure is None:
            raise ValueError("MeZO.step needs a closure that evaluates the loss; it has no gradients to step with")
        place = 0  # where the weights are, in perturbations
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
        """What an identical continuation needs beside the weights."""
        own = {"eps": self.eps, "adam": self.adam, "seed": self.seed, "steps": self.steps, "skipped": self.skipped}
        return {**super().state_dict(), "mezo": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there; what was saved replaces this instance's settings.

        Raises:
            ValueError: it is not of MeZO, was saved with or without Adam otherwise than this, or with other groups.
        """
        own = state_dict.get("mezo")
        if own is None:
            raise ValueError("this is not the state of a MeZO optimizer; load what MeZO.state_dict returned")
        if own["adam"] != self.adam:
            raise ValueError(f"the state was saved with adam={own['adam']}, this MeZO has adam={self.adam}")
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

    def _pieces(self) -> Iterator[_Piece]:
        """All trained weights, in the same order, pieces and seeds whenever it is asked in a step."""
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
                    yield _Piece(weights, group, tuple(moments), generator)
                index += 1

    def _move(self, place: int, by: int) -> None:
        """Move all weights from ``place`` (-1, 0 or 1 perturbations from theta) by that many perturbations."""
        if by:
            for piece in self._pieces():
                self._move_piece(piece, place, by)

    def _move_piece(self, piece: _Piece, place: int, by: int) -> None:
        wide, displacement = self._displacement(piece, piece.noise(), place)
        piece.weights.copy_(wide.add_(displacement, alpha=by))

    def _displacement(self, piece: _Piece, noise: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """The weights in the wide type, and eps z in whole units, which takes the place of ``noise``."""
        wide = piece.weights.to(noise.dtype)
        displacement = noise.mul_(self.eps)
        unit = self._unit_(torch.sub(wide, displacement, alpha=place), piece.weights.dtype)
        return wide, displacement.div_(unit).round_().mul_(unit)

    def _unit_(self, weights: Tensor, dtype: torch.dtype, lower: float = 1.25) -> Tensor:
        """The unit of each weight, given within half of one; takes its place.

        Where the unit doubles from u to 2u, weights are multiples of 2u from a certain size on, the edge, which is
        such a multiple itself because the margin is a power of two. ``lower``: how many u below the edge the unit
        counts as doubled. With 1.25, weights at edge - 2u and at the edge are told apart within half of their units;
        with 2 for rounding, no weight ends at edge - u, where it would be told as a wrong one.
        """
        kind = torch.finfo(dtype)
        margin = 2.0 ** math.ceil(math.log2(_REACH * self.eps))
        integer, exponent = _EXPONENT[weights.dtype]
        weights.abs_().add_(margin).mul_(1 + lower / 2 * kind.eps)
        weights.view(integer).bitwise_and_(exponent)  # leaves the power of two below
        return weights.mul_(kind.eps).clamp_min_(max(kind.tiny * kind.eps, torch.finfo(weights.dtype).tiny))

    def _update(self) -> None:
        """From theta - eps z to the new weights, with one rounding."""
        if self.adam:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter not in self.state:
                        self.state[parameter] = _moments(parameter)
        for piece in self._pieces():
            self._update_piece(piece)

    def _update_piece(self, piece: _Piece) -> None:
        noise = piece.noise()
        wide, displacement = self._displacement(piece, noise.clone(), -1)
        wide.add_(displacement)  # theta
        change = noise.mul_(self.projected_gradient)
        if self.adam:
            change = self._adam_(change, piece, out=displacement)
        change.add_(wide, alpha=piece.group["weight_decay"]).mul_(-piece.group["lr"])
        unit = self._unit_(torch.add(wide, change, out=displacement), piece.weights.dtype, lower=2)
        # In units: whole ones of theta, and what is left of it with the change, rounded up as often as it is worth.
        wide.div_(unit)
        change.div_(unit).add_(wide).sub_(wide.floor_())
        change.add_(torch.rand(change.shape, generator=piece.generator, dtype=change.dtype, device=change.device))
        piece.weights.copy_(wide.add_(change.floor_()).mul_(unit))

    def _adam_(self, gradient: Tensor, piece: _Piece, out: Tensor) -> Tensor:
        """Adam's direction for a gradient, in its place; ``out`` is for the moments' use."""
        (mean, square), (beta1, beta2) = piece.moments, piece.group["betas"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        count = self.steps + 1
        torch.div(square, 1 - beta2**count, out=out).sqrt_().add_(piece.group["adam_eps"])
        return torch.div(mean, out, out=gradient).div_(1 - beta1**count)

    def _over_ranks(self, *sums_and_counts: float) -> tuple[float, float]:
        """Both mean losses over all ranks; the same numbers on each of them."""
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
                    "MeZO's ranks differ in seed, in trained parameters or in the number of steps they have taken; "
                    "give all ranks the same, and resume all of them from the same checkpoint"
                )
            numbers = list(zip(*columns, strict=True))
        above, count_above, below, count_below = (sum(column) for column in zip(*numbers, strict=True))
        if not count_above or not count_below:
            raise ValueError("the closure counted 0 tokens or examples on all ranks; leave such batches out")
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
    """Parameter groups of what requires a gradient, each memory once."""
    entries = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    problems: list[str] = []
    found: list[tuple[str, int, int, str]] = []  # device, where each one begins and ends there, and its name
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
                problems.append(f"{name} is partitioned by ZeRO 3; use MeZO with whole weights on each rank")
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
            problems.append(f"{name} and {other} overlap in memory; each weight must be moved once")
    if problems:
        raise ValueError("MeZO cannot train these weights: " + "; ".join(problems))
    if not result:
        raise ValueError("MeZO has nothing to train: no parameter requires a gradient")
    return result


def _moments(parameter: Tensor) -> dict[str, Tensor]:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return {name: torch.zeros_like(parameter, dtype=wide) for name in ("exp_avg", "exp_avg_sq")}


def _hash(*numbers: int) -> int:
    """64 bits that tell these numbers from others. (A CPU's generator takes 32 of them.)"""
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
