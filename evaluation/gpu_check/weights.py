"""Compare the weights that HiFT trains with those of a plain PyTorch loop of Algorithm 1, on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch

import hift_ds
from hift_ds.collectives import gather, rank, world_size
from hift_ds.config import with_deferred_step
from hift_ds.evaluation.cost.plain_loop import NamedTensors, PlainHiFT
from hift_ds.evaluation.cost.timed_methods import DTYPES, make_batch, make_model
from hift_ds.evaluation.gpu_check.promises import ON_HOST

# Bounds of the difference between two runs, as a fraction of what training changed (L2 norms over all weights). A
# wrong update rule, order of blocks or step count is at least 0.1. In fp32, the sums of a norm and atomic additions in
# backward kernels differ in their order. In bf16, a weight that is rounded up in one run and down in the other differs
# by 2^-8 of its value, several per cent of what 3 cycles change, and the gradients of later steps follow.
BOUNDS = {"fp32": 1e-3, "bf16": 5e-2}
EIGHT_BITS = 0.2  # moments in 8 bits are not exact: on a CPU, 0.034
CYCLES, BATCH, LENGTH = 3, 2, 32
# eps is above the usual 1e-8, with which Adam makes whole steps of gradients that are mere rounding.
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
CLIP = 0.02  # clips at every step


def check(offload: Mapping[str, Any], ranks: int = 1) -> Iterator[dict[str, Any]]:
    """Train with each stage and precision, and yield the errors so far.

    torch's AdamW takes the step, which the plain loop uses, too, except in two cases with the optimizer of a DeepSpeed
    config, which is a fused kernel on a GPU. In bf16, the store keeps split masters.

    Args:
        offload: the section ``hift.offload``. The step is deferred wherever the engine can do it.
        ranks: number of ranks, which share the examples of a step. All call it, and get the largest error.

    Yields:
        ``cases``: the error and the bound of each case by name, and why a case failed.
    """
    cases: dict[str, dict[str, Any]] = {}
    stages = (0, 1, 2, 3) if ranks == 1 else (0, 2, 3)
    todo: list[tuple[str, str, int, bool, dict[str, str]]] = [
        (f"{dtype} ZeRO {stage}", dtype, stage, False, {}) for dtype in BOUNDS for stage in stages
    ]
    todo += [(f"{d} ZeRO {s}, {ON_HOST}", d, s, False, {"weights": "cpu"}) for d, s in (("fp32", 0), ("bf16", 2))]
    if ranks == 1:
        todo += [(f"{dtype} ZeRO 2, AdamW of the config", dtype, 2, True, {}) for dtype in BOUNDS]
        todo.append(("bf16 ZeRO 2, moments in 8 bits", "bf16", 2, False, {"moments": "8bit"}))
    else:
        todo.append((f"bf16 ZeRO 3, {ON_HOST}", "bf16", 3, False, {"offload_param": "cpu"}))
    truths = {dtype: _plain(dtype) for dtype in BOUNDS}
    for name, dtype, stage, by_config, more in todo:
        bound = EIGHT_BITS if "moments" in more else BOUNDS[dtype]
        try:
            error = max(gather(_error(_train(dtype, stage, by_config, {**offload, **more}), *truths[dtype])))
        except Exception as problem:  # one case must not hide the others
            cases[name] = {"bound": bound, "reason": f"{type(problem).__name__}: {problem}"}
        else:
            cases[name] = {"bound": bound, "error": error, "holds": error <= bound}
        yield {"cases": cases}


def _model(dtype: str) -> Any:
    model = make_model("tiny", "fp32")
    with torch.no_grad():
        for parameter in model.parameters():  # 3: gradients far from zero in every layer
            parameter.data = (3 * parameter if parameter.dim() > 1 else parameter).to(DTYPES[dtype])
    return model


def _copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: weights.float().clone() for name, weights in model.state_dict().items()}


def _steps(blocks: int) -> range:
    return range(CYCLES * blocks)


def _plain(dtype: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights before and after the plain loop."""
    model = _model(dtype)
    start, blocks = _copies(model), [list(block.parameter_names) for block in hift_ds.partition_model(model)]

    def make_optimizer(named: NamedTensors) -> torch.optim.Optimizer:
        return torch.optim.AdamW([tensor for _, tensor in named], **ADAMW)

    loop = PlainHiFT(model, blocks, make_optimizer, clip=CLIP)
    for step in _steps(len(blocks)):
        loop.step([make_batch("tiny", step, BATCH, LENGTH)])
    return start, _copies(model)


def _train(dtype: str, stage: int, by_config: bool, offload: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Train with the engine; return the weights."""
    model, ranks = _model(dtype), world_size()
    waits = {"offload_param": {"device": "cpu", "pin_memory": True}} if "offload_param" in offload else {}
    offload = {key: value for key, value in offload.items() if key != "offload_param"}
    config = {
        "train_micro_batch_size_per_gpu": BATCH // ranks,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, **waits},
        "bf16": {"enabled": dtype == "bf16"},
        "hift": with_deferred_step({"offload": {"buffer_size": 65536, **offload}}),
    }
    if by_config:
        config["optimizer"] = {"type": "AdamW", "params": {**ADAMW, "betas": list(ADAMW["betas"])}}
    optimizer = None if by_config else torch.optim.AdamW(model.parameters(), **ADAMW)
    engine, *_ = hift_ds.initialize(
        model=model, optimizer=optimizer, model_parameters=list(model.parameters()), config=config
    )
    try:
        for step in _steps(len(engine.blocks)):
            batch = make_batch("tiny", step, BATCH, LENGTH)
            engine.backward(engine(**{name: rows[rank() :: ranks] for name, rows in batch.items()}).loss)
            engine.step()
        engine.settle()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
            return _copies(engine.module)
    finally:
        engine.destroy()


def _error(
    found: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> float:
    """Return the difference to the expected weights as a fraction of what training changed; NaN counts as infinite."""
    difference = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    change = sum(float((expected[name] - start[name]).double().square().sum()) for name in expected)
    error = math.sqrt(difference / change)
    return error if math.isfinite(error) else math.inf
