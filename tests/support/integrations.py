"""What the tests of HiFT inside other frameworks share: a tiny model folder, rows, what a framework passes to the
model, and its replay by the plain loop of Algorithm 1."""

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hift_ds.evaluation.cost.plain_loop import NamedTensors, PlainHiFT
from tests.support import tiny
from tests.support.paths import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
LAYERS = 3  # hidden layers; with the embeddings and the head n = 5
VOCABULARY = 262  # of the byte tokenizer
WORDS = "the a red blue old new small large house river stone bird runs sleeps falls shines slowly often".split()


def model_folder(folder: Path, tied: bool = False) -> Path:
    """Write a Llama of about 30,000 weights and its tokenizer, which is bytes with a chat template."""
    from tests.support.towers import save_model

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": tied, "use_cache": False}
    save_model(folder, "llama", {**size, **tokens, **more, "initializer_range": 0.1})
    return folder


def block_names(tied: bool = False) -> list[list[str]]:
    """The blocks of the model of `model_folder`, written down by hand."""
    return tiny.block_names(tied=tied, layers=LAYERS)


def rows_file(path: Path, *columns: str, count: int = 32, chat: bool = False) -> Path:
    """Write JSON Lines with a few words in each column; rows have different lengths.

    Args:
        chat: the column prompt is a list of one user's message, and the others of one assistant's.
    """
    chosen = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            row: dict[str, Any] = {}
            for one in columns or ("text",):
                row[one] = " ".join(chosen.choices(WORDS, k=chosen.randint(1, 5)))
                if chat:
                    row[one] = [{"role": "user" if one == "prompt" else "assistant", "content": row[one]}]
            file.write(json.dumps(row) + "\n")
    return path


@contextlib.contextmanager
def fresh_process() -> Iterator[None]:
    """Let accelerate and transformers find what they find in a new process: no singletons, no DeepSpeed config, and the
    environment variables as they were. Ranks of the tests run many trainings in one process."""
    with mock.patch.dict(os.environ):
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


def accelerate_on_cpu() -> Any:
    """Let accelerate see all ranks: with DeepSpeed on CPUs, it takes each rank for the only one."""
    from accelerate import DistributedType, PartialState

    return mock.patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_CPU))


@contextlib.contextmanager
def lightning_on_cpu() -> Iterator[None]:
    """Let Lightning's DeepSpeed strategy run on CPUs: without its check of the device, and with numbered devices."""
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    devices = staticmethod(lambda count: [torch.device("cpu", rank) for rank in range(int(count))])
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(DeepSpeedStrategy, "setup_environment", DDPStrategy.setup_environment),
        mock.patch.object(CPUAccelerator, "get_parallel_devices", devices),
    ):
        yield


class Recording(contextlib.AbstractContextManager):
    """What each training forward pass of a model gets, and the learning rates inside the steps of its optimizers.

    Args:
        model: the model, not the engine.
        accumulation: micro-batches of a step on this rank.
        weights: also copy all weights before each step.

    Attributes:
        micro_batches: the keyword arguments of each forward pass in training mode, on the host.
        rates: for each optimizer step, the different learning rates that the parameter groups had in it.
        weights: the weights before each step.
    """

    def __init__(self, model: nn.Module, accumulation: int = 1, weights: bool = False) -> None:
        self.micro_batches: list[dict[str, Any]] = []
        self.rates: list[set[float]] = []
        self.weights: list[dict[str, Tensor]] = []
        self._accumulation = accumulation
        self._with_weights = weights
        self._hooks = [
            model.register_forward_pre_hook(self._note_batch, with_kwargs=True),
            register_optimizer_step_pre_hook(self._note_rates),
        ]

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note_batch(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if self._with_weights and len(self.micro_batches) % self._accumulation == 0:
            module.state_dict()  # finishes a deferred update
            self.weights.append(all_weights(module))
        self.micro_batches.append(
            {key: value.to("cpu", copy=True) if torch.is_tensor(value) else value for key, value in kwargs.items()}
        )

    def _note_rates(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        step = len(self.micro_batches) // self._accumulation
        if step == 0:
            return  # a trial step while the engine is made
        while len(self.rates) < step:
            self.rates.append(set())
        self.rates[step - 1] |= {float(group["lr"]) for group in optimizer.param_groups}

    def steps(self) -> list[list[dict[str, Any]]]:
        """The micro-batches of each step."""
        count = self._accumulation
        return [self.micro_batches[i : i + count] for i in range(0, len(self.micro_batches), count)]

    def changed(self) -> list[set[str]]:
        """The names of the parameters that each step changed, without the last step."""
        pairs = zip(self.weights, self.weights[1:], strict=False)
        return [{name for name in before if not torch.equal(before[name], after[name])} for before, after in pairs]


@dataclass
class Outcome:
    """What a run of a loop left on a rank.

    Attributes:
        logged: the engine's values for the log after each step.
        evaluated: losses of the held-out rows, the first before training.
        states: of the optimizers of all blocks.
    """

    micro_batches: list[list[dict[str, Any]]]
    rates: list[set[float]]
    changed: list[set[str]]
    logged: list[dict[str, float]]
    evaluated: list[float]
    weights: dict[str, Tensor]
    states: dict[str, Tensor]


def check_steps(ran: Sequence[Outcome], schedule: Sequence[float], dtype: str = "fp32") -> list[float]:
    """Hold rates, blocks and logs of a run on all ranks against the schedule, which counts steps; return the rate of
    each step."""
    first, cycle = ran[0], len(block_names())
    for other in ran[1:]:
        assert tiny.identical(other.weights, first.weights), "the ranks hold different weights"
        assert other.rates == first.rates
    rates = held(schedule, cycle)
    assert all(len(of_step) == 1 for of_step in first.rates)
    assert [min(of_step) for of_step in first.rates] == pytest.approx(rates, rel=1e-12)
    assert [values["hift/lr"] for values in first.logged] == pytest.approx(rates, rel=1e-12)
    assert [values["hift/block"] for values in first.logged] == [step % cycle for step in range(len(rates))]
    check_changed(first.changed, dtype)
    return rates


def load(folder: Path, dtype: str) -> nn.Module:
    """The model of the folder with all its parameters in a type, named as in `tiny`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(tiny.DTYPES[dtype])
    return model


def check_changed(changed: Sequence[set[str]], dtype: str = "fp32") -> None:
    """Each step changed the weights of one block, in the order of the blocks, and no others. In bf16, a step may be too
    small for a weight."""
    blocks = block_names()
    for step, names in enumerate(changed):
        block = set(blocks[step % len(blocks)])
        assert names and names <= block and (dtype == "bf16" or names == block), f"step {step} changed {names}"


def all_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's whole weights on every rank, copied to the host; under ZeRO 3, too."""
    import deepspeed

    named = dict(model.named_parameters())
    is_cut = any(hasattr(parameter, "ds_id") for parameter in named.values())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=is_cut):
        return tiny.copies(named)


def bound(stage: int, ranks: int) -> float:
    """How far weights may be from the replay: ranks add gradients, and stage 3 the squares of a norm, in another
    order."""
    return 0.0 if stage <= 2 and ranks == 1 else 2e-5


def steps_of_ranks(of_ranks: Sequence[list[list[dict[str, Any]]]]) -> list[list[dict[str, Any]]]:
    """The micro-batches of each step over all ranks."""
    return [[one for of_rank in step for one in of_rank] for step in zip(*of_ranks, strict=True)]


def step_rates(make_schedule: Callable[[torch.optim.Optimizer], Any], rate: float, steps: int) -> list[float]:
    """The learning rate of each step, by the schedule itself ticking every step on an optimizer of its own."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = make_schedule(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


def held(rates: Sequence[float], cycle: int) -> list[float]:
    """The same with one rate through each cycle: that of its first step or, where it is 0, of its last.

    Args:
        rates: the rate of each step; whole cycles, or the last cycle's first rate is above 0.
        cycle: steps of a cycle.
    """
    firsts = range(0, len(rates), cycle)
    of_cycles = [rates[first] or rates[first + cycle - 1] for first in firsts]
    return [of_cycles[step // cycle] for step in range(len(rates))]


def token_share(model: nn.Module, batch: Any, count: int) -> Tensor:
    """What a micro-batch adds to the step's loss: weighted by tokens where the framework passes their number in all
    micro-batches of the step, else the mean of the micro-batches' means."""
    loss = model(**batch).loss
    return loss if batch.get("num_items_in_batch") is not None else loss / count


class _Replay(PlainHiFT):
    """The plain loop with the gradients' norm and the clipping as DeepSpeed's stages round them.

    Attributes:
        stage: the ZeRO stage.
    """

    stage = 0

    def _clip(self, grads: list[Tensor]) -> None:
        if not self.clip:
            return
        if self.stage == 0 and self.model.dtype == torch.float32:
            norm = torch.stack([grad.norm(2.0) for grad in grads]).pow(2.0).sum().pow(0.5)
            factor = (torch.tensor(self.clip) / (norm + 1e-6)).clamp(max=1)  # not a reciprocal times a number
        else:
            norm = torch.linalg.vector_norm(torch.stack([tiny.NORMS[self.stage](one) for one in self._by_group()]))
            factor = 1 / ((norm + 1e-6) / self.clip).clamp(min=1)
        torch._foreach_mul_(grads, factor)
        self.grad_norm = norm.item()

    def _by_group(self) -> list[list[Tensor]]:
        groups = self.optimizers[self.active_block].param_groups
        return [found for group in groups if (found := [p.grad for p in group["params"] if p.grad is not None])]


def replay(
    model: nn.Module,
    steps: Sequence[Sequence[dict[str, Any]]],
    rates: Sequence[float],
    make_optimizer: Callable[[NamedTensors], torch.optim.Optimizer],
    *,
    blocks: Sequence[Sequence[str]] | None = None,
    order: Sequence[int] | None = None,
    clip: float = 0.0,
    stage: int = 0,
    ranks: int = 1,
    share: Callable[[nn.Module, Any, int], Tensor] = token_share,
    norms: list[float] | None = None,
) -> dict[str, Tensor]:
    """Train a model by the plain loop of Algorithm 1; return its weights.

    Args:
        model: the model as it was before training, in the precision of training.
        steps: the micro-batches of each step, of all ranks.
        rates: the learning rate of each step, of all parameter groups.
        make_optimizer: makes a block's optimizer from its (name, tensor) pairs.
        blocks: the parameter names of each block; None: one layer per block.
        stage: the ZeRO stage, which decides how the gradients' norm is rounded.
        ranks: the number of ranks, in whose order the micro-batches of a step are.
        share: what a micro-batch adds to the step's loss, from the model, the micro-batch and their number.
        norms: receives the norm of each step's gradient before clipping, which Adam's weights hardly depend on.
    """
    if blocks is None:
        blocks = block_names(tied=model.config.tie_word_embeddings)
    loop = _Replay(model.train(), blocks, make_optimizer, order=order, clip=clip, share=share)
    loop.stage = stage
    for micro_batches, rate in zip(steps, rates, strict=True):
        for group in loop.optimizers[loop.active_block].param_groups:
            group["lr"] = rate
        if stage < 2:  # each rank accumulates, then ranks add
            loop.step(micro_batches, ranks)
        else:  # ranks add after each micro-batch
            count = len(micro_batches) // ranks
            loop.step([one for i in range(count) for one in micro_batches[i::count]], count)
        if norms is not None:
            norms.append(loop.grad_norm)
    return tiny.copies(dict(model.named_parameters()))
