"""What two GPUs show, in two ranks under DeepSpeed's launcher: weights, memory, waits, collectives beside copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

import hift_ds
from hift_ds.collectives import gather, rank, world_size
from hift_ds.config import with_deferred_step
from hift_ds.evaluation.cost.timed_methods import SHAPES, join_world, make_batch, make_model
from hift_ds.evaluation.gpu_check import trace, weights
from hift_ds.launch.model.batch_loss import summed_loss
from hift_ds.planner.models import load_config
from hift_ds.planner.plan import Planner
from hift_ds.planner.request import Request

# name -> ZeRO stage, the section hift.offload, and whether weights wait on the host at ZeRO 3
RUNS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "ZeRO 0": (0, {}, False),
    "ZeRO 2": (2, {}, False),
    "ZeRO 2, weights shared on the host": (2, {"weights": "cpu"}, False),
    "ZeRO 3": (3, {}, False),
    "ZeRO 3, weights on the host": (3, {}, True),
}


def check(shape: str, length: int, profiled: int) -> Iterator[dict[str, Any]]:
    """Compare the weights that the ranks train with a plain loop's, then measure some runs. All ranks call it.

    Args:
        shape: name of a model shape.
        length: tokens of the one sequence of each rank.
        profiled: steps under the profiler.

    Yields:
        ``cases``: as `weights.check`. ``runs``: by name, of each rank ``planned`` and ``peak`` bytes on the device,
        ``seconds`` of a step, and ``trace``: `trace.summary`; or ``reason``: why a run failed. ``continued``: whether
        one rank that loads a checkpoint of all has ``equal`` weights, and its ``block``.
    """
    yield from weights.check({}, ranks=world_size())
    runs: dict[str, Any] = {}
    for name, (stage, offload, on_host) in RUNS.items():
        try:
            own = _measure(shape, length, profiled, stage, offload, on_host)
        except Exception as error:  # one run must not hide the others
            own = {"reason": f"{type(error).__name__}: {str(error)[:300]}"}
        runs[name] = gather(own)
        yield {"runs": runs}
    yield {"continued": _continued()}


def _continued() -> dict[str, Any]:
    """Save a checkpoint with all ranks, and let one rank load it in a process of its own; return what it found."""
    with tempfile.TemporaryDirectory() as own:
        folder = gather(own)[0]
        engine = _tiny_engine()
        try:
            for number in range(2 * len(engine.blocks) - 1):
                batch = make_batch("tiny", number, 1, 16)
                engine.backward(engine(**batch).loss)
                engine.step()
            engine.save_checkpoint(folder, tag="two")
            if rank() == 0:
                torch.save(engine.module.state_dict(), Path(folder, "weights.pt"))
        finally:
            engine.destroy()
        found: dict[str, Any] = {}
        if rank() == 0:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
            alone = {name: value for name, value in os.environ.items() if name not in names}
            command = [sys.executable, "-m", "hift_ds.evaluation.gpu_check.several", folder]
            done = subprocess.run(command, env=alone, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            last = (done.stdout.splitlines() or [""])[-1]
            found = (
                json.loads(last) if last.startswith("{") else {"reason": (done.stderr.splitlines() or [""])[-1][:300]}
            )
        return gather(found)[0]


def _tiny_engine() -> Any:
    config = {
        "train_batch_size": world_size(),
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 2},
        "hift": {},
    }
    return hift_ds.initialize(model=make_model("tiny", "bf16"), config=config)[0]


def main() -> None:
    """On one rank: load the checkpoint in a folder, compare its weights, and take a step."""
    join_world()
    folder = sys.argv[1]
    engine = _tiny_engine()
    engine.load_checkpoint(folder, tag="two")
    saved = torch.load(Path(folder, "weights.pt"), map_location=engine.device)
    equal = all(torch.equal(value, saved[name]) for name, value in engine.module.state_dict().items())
    block = engine.active_block
    loss = engine(**make_batch("tiny", 0, 1, 16)).loss
    engine.backward(loss)
    engine.step()
    print(json.dumps({"equal": equal, "block": block, "blocks": len(engine.blocks), "loss": float(loss)}))


def _measure(
    shape: str, length: int, profiled: int, stage: int, offload: dict[str, Any], on_host: bool
) -> dict[str, Any]:
    accelerator = get_accelerator()
    request = Request(
        load_config(SHAPES[shape]),
        seq_len=length,
        zero_stage=stage,
        ranks=world_size(),
        weights=offload.get("weights", "device"),
        offload_param="cpu" if on_host else "none",
        accelerator="cpu" if accelerator.device_name() == "cpu" else "gpu",
    )
    try:
        planned = sum(Planner(request).plan(request).device.values())
    except hift_ds.ConfigError as error:
        raise ValueError(f"the planner: {error}") from error
    zero: dict[str, Any] = {"stage": stage}
    if on_host:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "zero_optimization": zero,
        "hift": with_deferred_step({"offload": offload}),
    }
    model = make_model(shape, "bf16", stage == 3 or offload.get("weights") == "cpu")
    engine = hift_ds.initialize(model=model, config=config)[0]
    batch = make_batch(shape, 0, 1, length)

    def step() -> None:
        loss = summed_loss(engine, batch, "causal-lm", None)
        engine.backward(loss / batch["input_ids"].numel())
        engine.step()

    try:
        for _ in engine.blocks:
            step()
        accelerator.synchronize()
        accelerator.reset_peak_memory_stats()
        begun = time.perf_counter()
        for _ in engine.blocks:
            step()
        accelerator.synchronize()
        found: dict[str, Any] = {"seconds": (time.perf_counter() - begun) / len(engine.blocks), "planned": planned}
        found["peak"] = accelerator.max_memory_allocated()
        while engine.active_block != max(0, len(engine.blocks) // 2 - 2):
            step()
        return found | {"trace": trace.profile(step, profiled, engine.module)}
    finally:
        engine.destroy()


if __name__ == "__main__":
    main()
