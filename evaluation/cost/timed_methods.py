"""The training methods that are timed: each is made on the same model shape, warmed up, and timed in turns."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

import hift_ds
from hift_ds.blocks.block import numel_of
from hift_ds.evaluation.cost.flops import step_flops, trained_names
from hift_ds.evaluation.cost.plain_loop import PlainHiFT
from hift_ds.launch.config.checking import problem_list
from hift_ds.launch.config.library_checks import check_with_libraries
from hift_ds.launch.config.settings import Settings, check_settings
from hift_ds.launch.errors import UserError
from hift_ds.launch.loop import loss_share
from hift_ds.launch.make_engine import make_engine
from hift_ds.launch.methods.steps import take_step
from hift_ds.launch.methods.table import METHODS, TRAINED
from hift_ds.model.loss import Targets
from hift_ds.planner.models import PRESETS, load_config

Batch = dict[str, torch.Tensor]

SHAPES: dict[str, dict[str, Any]] = {  # models with random weights: the planner's decoders, and a tiny one
    "tiny": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    **{name: shape for name, shape in PRESETS.items() if shape["model_type"] != "roberta"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
METHOD_SECTIONS: dict[str, dict[str, Any]] = {  # name -> `method` section; "kept" is HiFT without offload
    **{name: {"name": name} for name in TRAINED},
    "badam": {"name": "badam", "badam_order": "ascending", "badam_switch_every": 10**9},
    "kept": {"name": "hift"},
}
NOTES = {
    "hift": "hift: the mean over a cycle, which is one step for each block.",
    "badam": "badam: the mean over one step on each block. Switching blocks, by default after every 50 steps, is not "
    "timed.",
    "galore": "galore: computing projections, by default every 200 steps, is part of the warm-up and not timed.",
}
LEARNING_RATE = 1e-4
CLIP = 1.0


@dataclass(frozen=True)
class Setup:
    """The workload that all methods share.

    Attributes:
        batch: examples per step.
        length: tokens per example.
        stock: use DeepSpeed's Adam and compute all logits at once, to compare with a plain loop; otherwise use the
            defaults of launch/train.py.
    """

    shape: str
    dtype: str
    stage: int
    batch: int
    length: int
    stock: bool = False

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.length


@dataclass
class TimedMethod:
    """A training method that is ready to be timed.

    Attributes:
        step: does a forward pass, a backward pass and an optimizer step on a batch.
        cycle: the number of steps that train each block once. Steps on different blocks take different times, so a
            measurement is the mean over a cycle.
        between: is called after each step and not timed.
        engine, settings: None for the plain loop.
        trained_parameters: parameters that a cycle trains; set by `warm_up`.
        flops: model FLOPs per step, the mean over a cycle; set by `warm_up`.
    """

    step: Callable[[Batch], Any]
    cycle: int = 1
    between: Callable[[], Any] = lambda: None
    engine: Any = None
    settings: Settings | None = None
    trained_parameters: int = 0
    flops: float = 0.0

    def warm_up(self, setup: Setup) -> None:
        """Run a cycle on short batches, which creates all state. With a cycle of one step, run a full batch too."""
        trained: dict[str, int] = {}
        flops = []
        for index in range(self.cycle):
            if self.settings is not None:
                names = trained_names(self.engine.module)
                trained |= {n: numel_of(p) for n, p in self.engine.module.named_parameters() if p.requires_grad}
                predicted = setup.batch * (setup.length - 1)
                flops.append(step_flops(self.engine, self.settings, names, setup.tokens, predicted))
            self.step(make_batch(setup.shape, index, 1, min(8, setup.length)))
            self.between()
        if self.cycle == 1:
            self.step(make_batch(setup.shape, 1, setup.batch, setup.length))
        self.trained_parameters, self.flops = sum(trained.values()), statistics.fmean(flops or [0.0])

    def destroy(self) -> None:
        """Free the engine."""
        if self.engine is not None:
            self.engine.destroy()


def make_model(shape: str, dtype: str, on_host: bool = False, layers: int | None = None) -> PreTrainedModel:
    """Make a model with the same weights in every call; its buffers stay in fp32.

    Args:
        on_host: in host memory, and not on the device.
        layers: number of its hidden layers; None: as the shape has them.
    """
    torch.manual_seed(0)
    values = SHAPES[shape] if layers is None else {**SHAPES[shape], "num_hidden_layers": layers}
    with torch.device("cpu" if on_host else get_accelerator().current_device_name()):
        model = AutoModelForCausalLM.from_config(load_config(values), dtype=DTYPES[dtype])
    model.config.use_cache = False
    return model.train()


def make_batch(shape: str, step: int, batch: int, length: int) -> Batch:
    """Make random token ids of shape (batch, length); the labels are the same."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(SHAPES[shape]["vocab_size"], (batch, length), generator=generator)
    ids = ids.to(get_accelerator().current_device_name())
    return {"input_ids": ids, "labels": ids}


def _targets(labels: torch.Tensor) -> Targets:
    """Return the targets of labels that are all trained on; unlike `find_targets` without waiting for the device."""
    batch, length = labels.shape
    kept, rows = (torch.arange(count, device=labels.device) for count in (length - 1, batch * (length - 1)))
    return Targets(kept, rows, labels[:, 1:].flatten())


def make_settings(name: str, setup: Setup, offload: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of a run with the method `METHOD_SECTIONS[name]`.

    Args:
        offload: the section ``hift.offload`` of HiFT; None or empty: its defaults.
    """
    if name == "kept":
        offload = {"device": "none"}
    raw = {
        "model": {"config": {"model_type": "llama"}, "tokenizer": "byte"},  # only for the checks of settings
        "method": METHOD_SECTIONS[name],
        "training": {
            "batch_size": setup.batch,
            "learning_rate": LEARNING_RATE,
            "max_grad_norm": CLIP,
            "loss_chunk": 0 if setup.stock else None,
        },
        "deepspeed": {
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": setup.stage},
            "bf16": {"enabled": setup.dtype == "bf16"},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": False} if setup.stock else {}},
            "hift": {"offload": dict(offload)} if offload and METHOD_SECTIONS[name]["name"] == "hift" else {},
        },
        "output": {"dir": "."},
    }
    problems: list[str] = []
    settings = check_settings(raw, 1, problems)
    if settings is None:
        raise UserError(problem_list(name, problems))
    check_with_libraries(settings, name)
    return settings


def make_timed_method(
    name: str, setup: Setup, model: Any = None, offload: Mapping[str, Any] | None = None
) -> TimedMethod:
    """Make a method of `METHOD_SECTIONS`, or "plain", HiFT as a plain PyTorch loop.

    Args:
        model: from `make_model`; None = a new one.
        offload: the section ``hift.offload`` of HiFT; None or empty: its defaults.

    Raises:
        UserError: the method does not apply to the model, or its package is not installed.
    """
    model = model or make_model(setup.shape, setup.dtype)
    blocks = hift_ds.partition_model(model)
    if name == "plain":
        plain = PlainHiFT(
            model,
            [list(block.parameter_names) for block in blocks],
            lambda named: torch.optim.AdamW([p for _, p in named], lr=LEARNING_RATE, weight_decay=0.0, foreach=True),
            clip=CLIP,
        )
        return TimedMethod(lambda batch: plain.step([batch]), len(blocks))
    settings = make_settings(name, setup, offload)
    method = METHODS[settings.method.name]
    engine = make_engine(model, settings, lambda tick: 1.0)
    engine.train()

    def step(batch: Batch) -> None:
        targets = _targets(batch["labels"])
        given = {**batch, "labels": targets}
        take_step(method, engine, [functools.partial(loss_share, engine, given, settings, len(targets.rows), 1)])

    timed_method = TimedMethod(step, len(blocks) if method.block_wise else 1, engine=engine, settings=settings)
    if method.engine == "badam":  # one step on each block, as in HiFT's cycle
        timed_method.cycle, timed_method.between = len(blocks), engine.optimizer.switch_trainable_params
    return timed_method


def time_in_turns(
    timed_methods: Mapping[str, TimedMethod], setup: Setup, units: int, cycle: int, stock_every: int = 1
) -> dict[str, list[float]]:
    """Time methods in turns on the same batches.

    Args:
        units: the number of measurements; each is the mean over `cycle` steps.
        stock_every: full fine-tuning takes only the first step of a cycle and every `stock_every`-th after it, because
            all its steps take the same time.

    Returns:
        Seconds per step by method, one mean for each measurement.
    """
    means: dict[str, list[float]] = {name: [] for name in timed_methods}
    label = f"{setup.dtype} stage {setup.stage}: {', '.join(timed_methods)}"
    with tqdm(total=units * cycle, desc=label, unit="step", leave=False, disable=None) as bar:
        for unit in range(units):
            seconds: dict[str, list[float]] = {name: [] for name in timed_methods}
            for step in range(cycle):
                index = unit * cycle + step
                data = make_batch(setup.shape, index, setup.batch, setup.length)
                first = index % len(timed_methods)
                for name in [*timed_methods][first:] + [*timed_methods][:first]:
                    if name != "full" or step % stock_every == 0:
                        seconds[name].append(timed(timed_methods[name].step, data))
                        timed_methods[name].between()
                bar.update()
            for name, values in seconds.items():
                means[name].append(statistics.fmean(values))
    return means


def timed(run: Callable[[Batch], Any], batch: Batch) -> float:
    """Return the seconds that `run(batch)` takes on the device."""
    get_accelerator().synchronize()
    start = time.perf_counter()
    run(batch)
    get_accelerator().synchronize()
    return time.perf_counter() - start


def join_world() -> None:
    """Make this process a world of one rank."""
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = get_accelerator().communication_backend_name()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo" if backend == "ccl" else backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
