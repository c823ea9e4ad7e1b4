"""Step time of HiFT against stock DeepSpeed's full fine-tuning and against a plain PyTorch loop.

    python -m evaluation.efficiency --model-shape smollm2-135m --batch 4 --length 256 --stages 0,1,2,3 --cycles 3
    python -m evaluation.efficiency --memory          peak memory instead (peak_memory.py)

All train the same model from the same weights on the same batches with AdamW, in one process, a step each in
turn. A step is forward, backward and optimizer step. HiFT's blocks differ in cost, so its unit is the mean over a whole
cycle, in which each block is trained once; every number is the median of those means with their least and greatest.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import hift_ds
from evaluation import peak_memory
from evaluation.plain_loop import PlainHiFT

Batch = dict[str, torch.Tensor]

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
CONTESTANTS = {
    "hift": "HiFT",
    "kept": "HiFT without offload",
    "full": "full fine-tuning",
    "plain": "plain loop",
}
ENGINES: dict[str, dict[str, Any]] = {  # the hift section of those that DeepSpeed runs
    "hift": {},
    "kept": {"offload": {"device": "none"}},
    "full": {"enabled": False},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STAGES = (0, 1, 2, 3)
LEARNING_RATE = 1e-4
CLIP = 1.0


@dataclass
class Contest:
    """Seconds a step of each contestant, one mean for each measured cycle."""

    dtype: str
    stage: int
    seconds: dict[str, list[float]]

    def ratios(self, other: str) -> list[float]:
        """HiFT's time divided by another's, cycle by cycle."""
        return [ours / theirs for ours, theirs in zip(self.seconds["hift"], self.seconds[other], strict=True)]


def make_model(shape: str, dtype: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], use_cache=False)).train()
    for p in model.parameters():
        p.data = p.data.to(DTYPES[dtype])
    return model.to(get_accelerator().current_device_name())


def make_batch(shape: str, step: int, batch: int, length: int) -> Batch:
    """Random tokens, batch x length, and the same as labels."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(SHAPES[shape]["vocab_size"], (batch, length), generator=generator)
    ids = ids.to(get_accelerator().current_device_name())
    return {"input_ids": ids, "labels": ids}


def deepspeed_step(engine: Any) -> Callable[[Batch], None]:
    def step(batch: Batch) -> None:
        engine.backward(engine(**batch).loss)
        engine.step()

    return step


def contest(
    names: Sequence[str],
    shape: str,
    dtype: str,
    stage: int,
    batch: int,
    length: int,
    cycles: int,
    stock_every: int,
) -> Contest:
    """Times them side by side for `cycles` cycles, after one on short batches in which all state is made."""
    config = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 0.0}},
    }
    engines = {
        name: hift_ds.initialize(model=make_model(shape, dtype), config=config | {"hift": section})[0]
        for name, section in ENGINES.items()
        if name in names
    }
    contestants: dict[str, Callable[[Batch], Any]] = {name: deepspeed_step(engine) for name, engine in engines.items()}
    hift = engines["hift"]
    if "plain" in names:
        plain = PlainHiFT(
            make_model(shape, dtype),
            [list(block.parameter_names) for block in hift.blocks],
            lambda named: torch.optim.AdamW([p for _, p in named], lr=LEARNING_RATE, weight_decay=0.0, foreach=True),
            clip=CLIP,
        )
        contestants["plain"] = lambda batch: plain.step([batch])
    a_cycle = len(hift.blocks)
    try:
        for step in range(a_cycle):
            for run in contestants.values():
                run(make_batch(shape, step, 1, min(8, length)))
        if "full" in contestants:
            contestants["full"](make_batch(shape, a_cycle, batch, length))

        means: dict[str, list[float]] = {name: [] for name in contestants}
        with tqdm(total=cycles * a_cycle, desc=f"{dtype} stage {stage}", unit="step", leave=False, disable=None) as bar:
            for cycle in range(cycles):
                seconds: dict[str, list[float]] = {name: [] for name in contestants}
                for step in range(a_cycle):
                    data = make_batch(shape, cycle * a_cycle + step, batch, length)
                    first = step % len(contestants)
                    for name in [*contestants][first:] + [*contestants][:first]:
                        if name == "full" and step % stock_every:
                            continue  # its steps all cost the same, so some of them are enough
                        seconds[name].append(timed(contestants[name], data))
                    bar.update()
                for name, values in seconds.items():
                    means[name].append(statistics.fmean(values))
    finally:
        for engine in engines.values():
            engine.destroy()
    return Contest(dtype, stage, means)


def timed(run: Callable[[Batch], Any], batch: Batch) -> float:
    get_accelerator().synchronize()
    start = time.perf_counter()
    run(batch)
    get_accelerator().synchronize()
    return time.perf_counter() - start


def machine() -> str:
    """Kind of machine, and the versions that decide its speed."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    device = get_accelerator().device_name()
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, device {device}, "
        f"torch {torch.__version__}, deepspeed {deepspeed.__version__}"
    )


def spread(values: Sequence[float], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(contests: Sequence[Contest]) -> str:
    """A Markdown table of seconds a step and of ratios."""
    others = [name for name in contests[0].seconds if name != "hift"]
    head = ["precision", "stage", *(f"{CONTESTANTS[name]}, s" for name in ("hift", *others))]
    head += [f"HiFT / {name}" for name in others]
    rows = [
        [
            c.dtype,
            str(c.stage),
            *(spread(c.seconds[name], 3) for name in ("hift", *others)),
            *(spread(c.ratios(name), 2) for name in others),
        ]
        for c in contests
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def comma_separated(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        for value in text.split(","):
            if value not in allowed:
                raise argparse.ArgumentTypeError(f"{value!r}: expected some of {','.join(allowed)}")
        return text.split(",")

    return parse


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least 1")
    return int(text)


def join_world() -> None:
    """Make this process a world of one rank."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.distributed.is_initialized():
        backend = get_accelerator().communication_backend_name()
        torch.distributed.init_process_group(
            "gloo" if backend == "ccl" else backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )


def main(arguments: Sequence[str] | None = None) -> list[Contest]:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.efficiency", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model-shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--batch", type=positive, default=4, help="examples a step")
    parser.add_argument("--length", type=positive, default=256, help="tokens an example")
    parser.add_argument(
        "--against",
        type=comma_separated([name for name in CONTESTANTS if name != "hift"]),
        default="full,plain",
        help="full: stock DeepSpeed; plain: a PyTorch loop; kept: HiFT with all state left on the device",
    )
    parser.add_argument("--stages", type=comma_separated([str(s) for s in STAGES]), default="0,1,2,3")
    parser.add_argument("--dtypes", type=comma_separated(list(DTYPES)), default="fp32,bf16")
    parser.add_argument("--cycles", type=positive, default=1, help="measured cycles; a cycle is a step for each block")
    parser.add_argument("--stock-every", type=positive, default=4, help="time full fine-tuning in every N-th step only")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of step time (Linux)")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    options = parser.parse_args(arguments)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")

    given = sys.argv[1:] if arguments is None else arguments
    origin = f"{datetime.date.today()}: python -m evaluation.efficiency {shlex.join(given)}"
    if options.memory:
        print(f"Peak memory above the loaded model on {machine()}\n{origin}", flush=True)
        print(f"{options.model_shape}, {options.batch} x {options.length} tokens, fp32, AdamW", flush=True)
        print("\n" + peak_memory.table(peak_memory.compare(options.model_shape, options.batch, options.length)))
        return []
    join_world()
    heading = [
        f"Step time on {machine()}",
        origin,
        f"{options.model_shape}, {options.batch} x {options.length} tokens, AdamW, median of cycle means "
        f"(least to greatest) over {options.cycles} cycles",
    ]
    print("\n".join(heading), flush=True)
    contests = []
    for dtype in options.dtypes:
        for stage in map(int, options.stages):
            contests.append(
                contest(
                    ["hift", *options.against],
                    options.model_shape,
                    dtype,
                    stage,
                    options.batch,
                    options.length,
                    options.cycles,
                    options.stock_every,
                )
            )
            gc.collect()  # the engines of one contest go before those of the next come
            if options.json:  # after each, so that a run that is stopped has written what it measured
                record = {"heading": heading, "contests": [asdict(c) for c in contests]}
                options.json.write_text(json.dumps(record, indent=1) + "\n")
    print("\n" + table(contests))
    return contests


if __name__ == "__main__":
    main()
