"""Scripts with loops of their own, started by their launchers, against the plain loop."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ENVIRONMENT
from tests.support import integrations, tiny
from tests.support.paths import REPOSITORY
from tests.support.ranks import free_port

CYCLE = 5
LAUNCHERS = {
    "accelerate": ["launch", "--config_file", str(REPOSITORY / "examples" / "accelerate_zero2.yaml")],
    "torchrun": [],
    "deepspeed": ["--no_local_rank"],
}
SCRIPT = """
import argparse, deepspeed, hift_ds, torch
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup
parser = argparse.ArgumentParser()
for name in ("--model", "--data", "--output"):
    parser.add_argument(name)
arguments = parser.parse_args()
model = AutoModelForCausalLM.from_pretrained(arguments.model).train()
config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
          "zero_optimization": {"stage": 2},
          "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1}}}
schedule = lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 0, 12)
with hift_ds.enabled():
    engine, *_ = deepspeed.initialize(model=model, config=config, lr_scheduler=schedule)
    torch.manual_seed(torch.distributed.get_rank())
    for _ in range(24):
        ids = torch.randint(3, 262, (2, 8))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
if torch.distributed.get_rank() == 0:
    model.save_pretrained(arguments.output)
"""
ADAMW = {"lr": 1e-4, "weight_decay": 0.1}
CLIP = 1.0


def run(folder: Path, launcher: str, ranks: int, script: str, *options: str) -> tuple[str, list[Any]]:
    """Run an example in `folder`, outside the repository; return what it printed, and what each rank recorded."""
    port = ["--num_processes", str(ranks), "--main_process_port", free_port(), "--mixed_precision", "no"]
    if launcher != "accelerate":
        count = {"torchrun": "--nproc_per_node", "deepspeed": "--num_gpus"}[launcher]
        port = [count, str(ranks), "--master_port", free_port()]
    command = [sys.executable, str(Path(sys.executable).with_name(launcher)), *LAUNCHERS[launcher], *port]
    command += [str(REPOSITORY / "tests" / "support" / "recorded.py"), str(folder)]
    command += [str(REPOSITORY / "examples" / script), "--model", "tiny", "--data", "rows.jsonl", "--output", "out"]
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in unset}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [*command, *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    return printed, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def cosine(ticks: int, each: int = 1) -> Any:
    """A schedule as in the examples, of which each step makes some ticks."""
    from transformers import get_cosine_schedule_with_warmup

    def made(optimizer: torch.optim.Optimizer) -> Any:
        schedule = get_cosine_schedule_with_warmup(optimizer, ticks // 20, ticks)
        once = schedule.step
        schedule.step = lambda: [once() for _ in range(each)]
        return schedule

    return made


def check(folder: Path, ranks: int, recorded: list[Any], rates: list[float], dtype: str, share: Any) -> None:
    """Hold the exported weights against the plain loop on what the ranks recorded."""
    rates = integrations.held(rates, CYCLE)
    for _, seen in recorded:
        assert [max(of_step) for of_step in seen] == [min(of_step) for of_step in seen] == pytest.approx(rates)
    truth = load(folder / "tiny", tiny.DTYPES[dtype])
    end = integrations.replay(
        truth,
        integrations.steps_of_ranks([steps for steps, _ in recorded]),
        rates,
        lambda named: torch.optim.AdamW([tensor for _, tensor in named], **ADAMW),
        clip=CLIP,
        stage=2,
        ranks=ranks,
        share=share,
    )
    exported = tiny.copies(dict(load(folder / "out", tiny.DTYPES[dtype]).named_parameters()))
    if dtype == "bf16" and ranks > 1:  # ranks add their gradients in bf16: the last digit of weights may differ
        start = tiny.copies(dict(load(folder / "tiny", tiny.DTYPES[dtype]).named_parameters()))
        assert tiny.update_error(exported, tiny.Outcome(start, end, [], [], [])) <= 0.1
    else:
        assert tiny.largest_difference(exported, end) <= integrations.bound(2, ranks)


@pytest.mark.parametrize(
    ("ranks", "resumes"), [(1, False), *[pytest.param(ranks, True, marks=pytest.mark.slow) for ranks in (1, 2)]]
)
def test_the_loop_on_accelerate(ranks: int, resumes: bool, tmp_path: Path) -> None:
    integrations.model_folder(tmp_path / "tiny")
    integrations.rows_file(tmp_path / "rows.jsonl")
    printed, recorded = run(tmp_path, "accelerate", ranks, "accelerate_loop.py", "--save_every", "3")
    steps = 12 // ranks
    rates = integrations.step_rates(cosine(12, ranks), ADAMW["lr"], steps)
    check(tmp_path, ranks, recorded, rates, "fp32", integrations.token_share)
    assert all(f"step {step}: loss" in printed for step in range(1, steps + 1)) and "'hift/block': 4" in printed
    assert {"step_3", "step_6"} <= set(os.listdir(tmp_path / "out"))

    if not resumes:
        return
    whole = load(tmp_path / "out", torch.float32)
    run(tmp_path, "accelerate", ranks, "accelerate_loop.py", "--resume", "out/step_3")
    again = load(tmp_path / "out", torch.float32)
    assert tiny.identical(dict(again.named_parameters()), dict(whole.named_parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", (1, 2))
def test_the_lightning_module(ranks: int, tmp_path: Path) -> None:
    integrations.model_folder(tmp_path / "tiny")
    integrations.rows_file(tmp_path / "rows.jsonl", count=36)  # 32 to train
    printed, recorded = run(tmp_path, "torchrun", ranks, "lightning_module.py")
    steps = 12 // ranks
    rates = integrations.step_rates(cosine(steps), ADAMW["lr"], steps)

    def share(model: Any, batch: Any, count: int) -> Any:  # Lightning divides, and then DeepSpeed does
        return integrations.token_share(model, batch, count) / 2

    check(tmp_path, ranks, recorded, rates, "bf16", share)
    assert "held_out_loss" in printed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("launcher", ("torchrun", "deepspeed"))
def test_a_script_that_calls_deepspeed(launcher: str, ranks: int, tmp_path: Path) -> None:
    integrations.model_folder(tmp_path / "tiny")
    (tmp_path / "script.py").write_text(SCRIPT)
    _, recorded = run(tmp_path, launcher, ranks, str(tmp_path / "script.py"))
    rates = integrations.step_rates(cosine(12), ADAMW["lr"], 12)
    check(tmp_path, ranks, recorded, rates, "fp32", integrations.token_share)
