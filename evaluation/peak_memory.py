"""Peak memory of training on a CPU, above the loaded model: HiFT with its state in files against stock DeepSpeed.

    python -m evaluation.efficiency --memory

All take the loss of ``launch/train.py``, with the logits of a chunk of tokens at a time. Every contestant trains in a
process of its own. What counts is anonymous memory, sampled from the kernel's own figures: pages of mapped files, which
the kernel writes out and drops when it needs the room, do not.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from evaluation.process_memory import peak_memory


@dataclass
class Peak:
    """Bytes of anonymous memory of one process."""

    method: str
    checkpointing: bool
    loaded: int  # with the model, before the engine is made
    peak: int

    @property
    def above(self) -> int:
        return self.peak - self.loaded


def train(method: str, checkpointing: bool, shape: str, batch: int, length: int) -> Peak:
    """In a process of its own: the peak over a cycle and its first step again (full fine-tuning: three steps)."""
    import hift_ds
    from evaluation.efficiency import join_world, make_batch, make_model
    from launch.train import summed_loss

    join_world()
    model = make_model(shape, "fp32")
    if checkpointing:
        hift_ds.checkpoint_activations(model)
    with peak_memory() as peak, tempfile.TemporaryDirectory() as folder:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": batch,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "hift": {"enabled": method == "hift"},
        }
        if method == "hift":
            config["hift"]["offload"] = {"device": "nvme", "nvme_path": folder}
        engine = hift_ds.initialize(model=model, config=config)[0]
        blocks = len(hift_ds.partition_model(model))
        for index in range(blocks + 1 if method == "hift" else 3):
            made = make_batch(shape, index, batch, length)
            engine.backward(summed_loss(engine, made, "causal-lm") / made["labels"][:, 1:].numel())
            engine.step()
        time.sleep(0.01)
        engine.destroy()
    return Peak(method, checkpointing, peak.start, peak.highest)


def compare(shape: str, batch: int, length: int) -> list[Peak]:
    """All contestants, one process after the other."""
    peaks = []
    for checkpointing in (False, True):
        for method in ("full", "hift"):
            arguments = [method, checkpointing, shape, batch, length]
            # A fixed threshold: freed tensors go back to the system at once, for every contestant.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
            command = [sys.executable, "-m", "evaluation.peak_memory", json.dumps(arguments)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            peaks.append(Peak(**json.loads(done.stdout.splitlines()[-1])))
    return peaks


def table(peaks: list[Peak]) -> str:
    """A Markdown table with the ratio of HiFT to full fine-tuning."""
    rows = [
        "| activation checkpointing | full fine-tuning, MiB | HiFT, MiB | HiFT / full |",
        "| --- | --- | --- | --- |",
    ]
    for full, hift in zip(peaks[::2], peaks[1::2], strict=True):
        named = "yes" if full.checkpointing else "no"
        sizes = f"{full.above / 2**20:.0f} | {hift.above / 2**20:.0f}"
        rows.append(f"| {named} | {sizes} | {hift.above / full.above:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(json.dumps(vars(train(*json.loads(sys.argv[1])))))
