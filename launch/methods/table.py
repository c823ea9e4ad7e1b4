"""The training methods by name. A new one is one more entry of `METHODS`.

A method is what of the model is trained (`adapters.py`), by which engine, and how a step is taken. The
loop in launch/train.py is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from deepspeed import comm as dist

from hift_ds.launch.errors import nearest
from hift_ds.launch.methods.adapters import AdapterSettings


@dataclass(frozen=True)
class MethodSettings(AdapterSettings):
    """The `method` section of a run's YAML. What begins with lora_, mezo_ ... is for methods made of that part."""

    name: str = "hift"
    mezo_eps: float = 1e-3  # scale of the perturbation (Malladi et al. 2023)
    badam_switch_every: int = 50  # steps on a block (Luo et al. 2024)
    badam_order: str = "random"  # or ascending, descending
    galore_rank: int = 128  # of the gradients' projection (Zhao et al. 2024)
    galore_update_every: int = 200  # steps between two projections
    galore_scale: float = 0.25


# A micro-batch's part of the step's loss; to be called once, with gradients, or again and again without.
Share = Callable[[], torch.Tensor]


def gradient_step(engine: Any, shares: Sequence[Share]) -> tuple[float, bool]:
    """One optimizer step by back-propagation: this rank's part of the loss, and whether all ranks have updated weights.

    Where they have not, none has: a loss or a gradient was not finite.
    """
    loss = 0.0
    for number, share in enumerate(shares, start=1):
        value = share()
        # DeepSpeed takes the mean over micro-batches and ranks; what is wanted is their sum.
        engine.backward(value * (len(shares) * dist.get_world_size()))
        loss += value.item()
        if number == len(shares) and not _may_step(engine, loss):
            return loss, False
        engine.step()
    return loss, engine.was_step_applied()


def _may_step(engine: Any, loss: float) -> bool:
    """Whether loss and gradients are fit for DeepSpeed's own engine, which looks at neither in fp32 at stage 0, and at
    the gradients alone elsewhere; the other engines see for themselves. All ranks get the same answer.

    After a refusal this engine cannot go on: its window is left open.
    """
    if getattr(engine, "skips_by_itself", False) or engine.fp16_enabled():
        return True
    is_finite = math.isfinite(loss)
    if engine.zero_optimization_stage() == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        is_finite &= math.isfinite(torch.nn.utils.get_total_norm(gradients))
    flag = torch.tensor(float(is_finite), device=engine.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def forward_step(engine: Any, shares: Sequence[Share]) -> tuple[float, bool]:
    """The same by forward passes alone."""
    world = dist.get_world_size()
    # MeZO divides the ranks' sum by the sum of the second numbers, which is 1.
    loss = engine.optimizer.step(lambda: (sum(share().item() for share in shares), 1 / world))
    engine.step()
    return loss / world, engine.was_step_applied()


@dataclass(frozen=True)
class Method:
    """How a method trains.

    Attributes:
        engine: "hift": one block a step; "deepspeed": DeepSpeed's own engine; "mezo", "lomo", "badam", "galore": a
            package takes the step (`plain.py`); None: nothing is trained, there is only something to evaluate.
        adapter: what is trained, a key of `hift_ds.launch.methods.adapters.ADAPTERS`; None for all of the model.
        step: takes one optimizer step.
        parts: the prefixes of `MethodSettings` that it uses.
    """

    engine: str | None
    adapter: str | None = None
    step: Callable[[Any, Sequence[Share]], tuple[float, bool]] = gradient_step
    parts: tuple[str, ...] = ()

    @property
    def block_wise(self) -> bool:
        return self.engine == "hift"

    @property
    def uses_deepspeed(self) -> bool:
        return self.engine in ("hift", "deepspeed")

    @property
    def resumable(self) -> bool:
        return self.uses_deepspeed or self.engine in RESUMABLE

    def schedule_ticks(self, max_steps: int, n_blocks: int, steps_per_block: int) -> int:
        """How often the learning-rate schedule advances in `max_steps` optimizer steps.

        Block-wise training advances it once a cycle, so that all blocks of a cycle share one rate (HiFT paper,
        delayed update in Algorithm 1); a last cycle that is cut short still has its tick.
        """
        return math.ceil(max_steps / (n_blocks * steps_per_block)) if self.block_wise else max_steps


METHODS = {
    "hift": Method("hift"),
    "full": Method("deepspeed"),
    "lora": Method("deepspeed", "lora", parts=("lora",)),
    "prefix": Method("deepspeed", "prefix", parts=("prefix",)),
    "bitfit": Method("deepspeed", "bitfit"),
    "adapter": Method("deepspeed", "adapter", parts=("adapter",)),
    "prelayer": Method("deepspeed", "prelayer", parts=("prefix",)),
    "s4": Method("deepspeed", "s4", parts=("adapter", "lora", "prefix")),
    "full-top2": Method("deepspeed", "full-top2"),
    "linear-probing": Method("deepspeed", "linear-probing"),
    "mezo": Method("mezo", None, forward_step, ("mezo",)),
    "mezo-adam": Method("mezo", None, forward_step, ("mezo",)),
    "mezo-lora": Method("mezo", "lora", forward_step, ("mezo", "lora")),
    "mezo-prefix": Method("mezo", "prefix", forward_step, ("mezo", "prefix")),
    "lomo": Method("lomo"),
    "badam": Method("badam", parts=("badam",)),
    "galore": Method("galore", parts=("galore",)),
    "zero-shot": Method(None),
    "icl": Method(None),
}
RESUMABLE = ("mezo", "lomo")  # engines whose state is weights and a few tensors and numbers
TRAINED = {name: method for name, method in METHODS.items() if method.engine}


CHOICES = {"adapter_kind": ("houlsby", "lin"), "badam_order": ("random", "ascending", "descending")}


def method_problems(settings: MethodSettings, save_every: int | None, fp16: bool) -> list[str]:
    """Every mistake in the `method` section, and in what the method has to do with checkpoints and fp16."""
    name = settings.name
    if name not in TRAINED:
        what = (
            f"{name!r} trains nothing: compare it with `python -m evaluation.compare`"
            if name in METHODS
            else repr(name)
        )
        return [f"method.name: got {what}. Expected one of: {', '.join(TRAINED)}{nearest(name, TRAINED)}"]
    method, found = TRAINED[name], []
    for entry in fields(settings):
        value, dropout = getattr(settings, entry.name), "dropout" in entry.name
        key = f"method.{entry.name}: got {value!r}"
        if entry.name != "name" and value != entry.default and entry.name.partition("_")[0] not in method.parts:
            found.append(f"{key}, but method.name is {name!r}, which has no use for it. Remove it.")
        elif isinstance(value, str):
            allowed = CHOICES.get(entry.name, (value,))
            if value not in allowed:
                found.append(f"{key}. Expected one of: {', '.join(allowed)}{nearest(value, allowed)}")
        elif dropout and not 0 <= value < 1:
            found.append(f"{key}. Expected at least 0 and less than 1.")
        elif not dropout and value <= 0:
            found.append(f"{key}. Expected {'at least 1' if isinstance(entry.default, int) else 'more than 0'}.")
    if save_every and not method.resumable:
        found.append(
            f"training.save_every: got {save_every}, but {name}'s package cannot save all of its state, so a run could "
            "not be continued exactly. Set training.save_every=null."
        )
    if fp16 and not method.uses_deepspeed:
        found.append(f"deepspeed.fp16.enabled: true, but {name} has no loss scale here. Use bf16, or fp32.")
    return found


def schedule_factor(name: str, warmup_ratio: float, ticks: int, tick: int) -> float:
    """The learning rate at `tick` (0-based) as a fraction of the highest one.

    Warm-up rises over ceil(warmup_ratio x ticks) ticks and never starts at 0: under HiFT a tick is a whole cycle,
    and one with rate 0 would be a cycle for nothing. `linear` and `cosine` then fall, and would reach 0 one tick
    after the last.
    """
    warmup = math.ceil(warmup_ratio * ticks)
    if tick < warmup:
        return (tick + 1) / (warmup + 1)
    done = min(1.0, (tick - warmup) / max(1, ticks - warmup))
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[name]
