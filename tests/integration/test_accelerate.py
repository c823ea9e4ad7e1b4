"""HiFT inside a training loop on accelerate."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import integrations, tiny
from tests.support.ranks import run_on_ranks

STEPS, ACCUMULATION, CYCLE = 12, 2, 5
RATE = 1e-3
STOP = 7  # a step in the middle of the second cycle
ADAMW = {"weight_decay": 0.1, "eps": 1e-6}
CLIP = 0.5


@dataclass(frozen=True)
class Case:
    """A training loop; who makes the optimizer and the schedule: the ``script``, or the DeepSpeed ``config``."""

    stage: int = 2
    ranks: int = 1
    optimizer: str = "script"
    schedule: str = "script"
    dtype: str = "fp32"
    in_code: bool = False  # DeepSpeedPlugin(zero_stage=...) instead of a DeepSpeed config

    def __str__(self) -> str:
        parts = [f"stage{self.stage}", f"{self.ranks}rank", f"{self.optimizer}-optimizer", f"{self.schedule}-schedule"]
        return "-".join(parts + ([self.dtype] if self.dtype != "fp32" else []) + (["in-code"] if self.in_code else []))


def plugin(case: Case) -> Any:
    from accelerate import DeepSpeedPlugin

    if case.in_code:
        return DeepSpeedPlugin(
            zero_stage=case.stage,
            gradient_accumulation_steps=ACCUMULATION,
            gradient_clipping=CLIP,
            zero3_init_flag=False,
            zero3_save_16bit_model=True,
        )
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": case.stage, "stage3_gather_16bit_weights_on_model_save": True},
    }
    if case.optimizer == "config":
        config["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "eps": ADAMW["eps"]}}
    if case.schedule == "config":
        names = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
        config["scheduler"] = {"type": "WarmupDecayLR", "params": {name: "auto" for name in names}}
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)


def script_schedule(optimizer: Any, ranks: int = 1) -> Any:
    """A warm-up from 0 and a decay to 0 after STEPS steps; accelerate advances a schedule once per step and rank."""
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, 2 * ranks, STEPS * ranks)


def optimizer_and_schedule(case: Case, model: nn.Module) -> tuple[Any, Any]:
    from accelerate.utils import DummyOptim, DummyScheduler

    if case.optimizer == "script":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=RATE, **ADAMW)
    else:
        optimizer = DummyOptim(model.parameters(), lr=RATE, weight_decay=ADAMW["weight_decay"])
    if case.schedule == "config":
        return optimizer, DummyScheduler(optimizer, total_num_steps=STEPS * case.ranks, warmup_num_steps=2)
    if case.optimizer == "config":  # accelerate takes no torch schedule here
        return optimizer, DummyScheduler(optimizer, lr_scheduler_callable=script_schedule)
    return optimizer, script_schedule(optimizer, case.ranks)


def batches(model: nn.Module, case: Case) -> list[list[dict[str, Tensor]]]:
    """Micro-batches of 2 rows for each step, of all ranks."""
    made = torch.Generator().manual_seed(0)
    rows = torch.randint(3, integrations.VOCABULARY, (STEPS, case.ranks * ACCUMULATION, 2, 8), generator=made)
    return [[{"input_ids": ids, "labels": ids} for ids in step] for step in rows]


def loaders(model: nn.Module, case: Case) -> tuple[Any, Any]:
    """Training rows in the order in which accelerate deals them to ranks, and rows to evaluate."""
    from torch.utils.data import DataLoader

    rows = [
        {key: value[row] for key, value in one.items()}
        for step in batches(model, case)
        for one in step
        for row in range(2)
    ]
    return DataLoader(rows, batch_size=2), DataLoader(rows[:8], batch_size=2)


@contextlib.contextmanager
def loop(case: Case, folder: Path) -> Iterator[Any]:
    """An accelerator and the model of the folder."""
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    with integrations.fresh_process(), integrations.accelerate_on_cpu():
        precision = "bf16" if case.dtype == "bf16" else "no"
        accelerator = Accelerator(deepspeed_plugin=plugin(case), mixed_precision=precision)
        model = AutoModelForCausalLM.from_pretrained(folder)
        yield accelerator, model


def train(
    case: Case, folder: Path, checkpoint: Path, resumes: bool = False, saved: Path | None = None
) -> integrations.Outcome:
    """In a rank: train, and save a checkpoint at STOP; or resume there, from random weights."""
    import hift_ds

    with loop(case, folder) as (accelerator, model), integrations.Recording(model, ACCUMULATION, weights=True) as seen:
        if resumes:
            for parameter in model.parameters():
                nn.init.normal_(parameter)
        prepared = (model, *optimizer_and_schedule(case, model), *loaders(model, case))
        logged: list[dict[str, float]] = []
        evaluated: list[float] = []
        with hift_ds.enabled(layers_per_block=1):
            engine, optimizer, schedule, loader, held_out = accelerator.prepare(*prepared)
            if resumes:
                accelerator.load_state(str(checkpoint))
                loader = accelerator.skip_first_batches(loader, STOP * ACCUMULATION)
            else:
                evaluated.append(evaluate(accelerator, engine, held_out))
            engine.train()
            for batch in loader:
                with accelerator.accumulate(engine):
                    accelerator.backward(engine(**batch).loss)
                    accelerator.clip_grad_norm_(engine.parameters(), CLIP)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    logged.append(engine.log_values())
                    if engine.global_steps == STOP and not resumes:
                        accelerator.save_state(str(checkpoint))
                    if engine.global_steps % CYCLE == 0:
                        evaluated.append(evaluate(accelerator, engine, held_out))
        assert all(parameter.requires_grad for parameter in model.parameters())
        if saved is not None:
            state = accelerator.get_state_dict(engine)
            plain = accelerator.unwrap_model(engine)
            plain.save_pretrained(saved, is_main_process=accelerator.is_main_process, state_dict=state)
            accelerator.wait_for_everyone()
        weights = integrations.all_weights(model)
        states = tiny.tensors(tiny.block_states(engine))
        engine.destroy()
        return integrations.Outcome(seen.steps(), seen.rates, seen.changed(), logged, evaluated, weights, states)


def evaluate(accelerator: Any, model: Any, rows: Any) -> float:
    model.eval()
    with torch.no_grad():
        losses = [accelerator.gather_for_metrics(model(**batch).loss.float().reshape(1)) for batch in rows]
    model.train()
    return float(torch.cat(losses).mean())


def expected_rates(case: Case) -> list[float]:
    """Of each step, by the schedule itself."""
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    if case.schedule == "config":
        return integrations.step_rates(
            lambda optimizer: WarmupDecayLR(optimizer, STEPS, warmup_max_lr=RATE, warmup_num_steps=2), RATE, STEPS
        )
    return integrations.step_rates(script_schedule, RATE, STEPS)


def make_adamw(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([tensor for _, tensor in named], lr=RATE, **ADAMW)


def check(case: Case, folder: Path, out: Path, resume: bool = True) -> None:
    """Hold a run against the plain loop, and its resumed second half against the first run."""
    ran = run_on_ranks(case.ranks, train, case, folder, out / "checkpoint", saved=out / "model")
    first = ran[0]
    assert all(other.evaluated == first.evaluated for other in ran[1:])

    steps = integrations.steps_of_ranks([outcome.micro_batches for outcome in ran])
    given = batches(None, case)  # in another order of the ranks within a step
    for step, made in zip(steps, given, strict=True):
        assert sorted(str(one["input_ids"]) for one in step) == sorted(str(one["input_ids"]) for one in made)

    rates = integrations.check_steps(ran, expected_rates(case), case.dtype)
    truth = integrations.load(folder, case.dtype)
    held_out = [one for step in given for one in step][:4]
    before = loss_of(truth, held_out)
    end = integrations.replay(truth, steps, rates, make_adamw, clip=CLIP, stage=case.stage, ranks=case.ranks)
    assert tiny.largest_difference(first.weights, end) <= integrations.bound(case.stage, case.ranks)
    assert first.evaluated[0] == pytest.approx(before, rel=1e-5 if case.dtype == "fp32" else 1e-2)
    assert len(first.evaluated) == 1 + STEPS // CYCLE and first.evaluated[-1] != first.evaluated[0]
    exported = integrations.load(out / "model", case.dtype)
    assert tiny.identical(tiny.copies(dict(exported.named_parameters())), first.weights)

    if resume:
        again = run_on_ranks(case.ranks, train, case, folder, out / "checkpoint", resumes=True)
        for resumed, whole in zip(again, ran, strict=True):
            assert tiny.identical(resumed.weights, whole.weights) and tiny.identical(resumed.states, whole.states)
            assert resumed.rates == whole.rates[STOP:] and resumed.logged == whole.logged[STOP:]


@torch.no_grad()
def loss_of(model: nn.Module, rows: Any) -> float:
    return float(torch.stack([model.eval()(**batch).loss.float() for batch in rows]).mean())


@pytest.mark.parametrize("case", [Case(ranks=2), Case(stage=3, optimizer="config", schedule="config")], ids=str)
def test_loop(case: Case, tmp_path: Path) -> None:
    check(case, integrations.model_folder(tmp_path / "tiny"), tmp_path)


def train_without_deepspeed(folder: Path) -> list[str]:
    """In a rank: what the training loop of a script says that asks for a CPU, and so gets no DeepSpeed."""
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    import hift_ds

    with integrations.fresh_process():
        accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin(Case()))
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        start = integrations.all_weights(model)
        said = []
        with pytest.raises(RuntimeError) as error, hift_ds.enabled():
            model, optimizer = accelerator.prepare(model, optimizer)
            accelerator.backward(model(**batches(model, Case())[0][0]).loss)
            optimizer.step()
            said.append("stepped")
        assert tiny.identical(integrations.all_weights(accelerator.unwrap_model(model)), start)
        return [*said, type(model).__name__, str(error.value)]


@pytest.mark.parametrize("ranks", (1, 2))
def test_a_loop_without_deepspeed_is_an_error(ranks: int, tmp_path: Path) -> None:
    folder = integrations.model_folder(tmp_path / "tiny")
    for said in run_on_ranks(ranks, train_without_deepspeed, folder):
        assert said[0] == "DistributedDataParallel" and "without cpu=True" in said[1], said
