"""HiFT inside Lightning's Trainer with its DeepSpeed strategy, on a CPU with the device check replaced."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import integrations, tiny
from tests.support.ranks import run_on_ranks

EPOCHS, STEPS_PER_EPOCH, ACCUMULATION, CYCLE = 3, 4, 2, 5
STEPS = EPOCHS * STEPS_PER_EPOCH
RATE = 1e-3
STOP = 7  # a step in the middle of the second cycle and of the second epoch
ADAMW = {"weight_decay": 0.1, "eps": 1e-6}
CLIP = 0.25


@dataclass(frozen=True)
class Case:
    """A run of Lightning; who makes the optimizer and the schedule: the ``script``, or the DeepSpeed ``config``."""

    stage: int = 2
    ranks: int = 1
    optimizer: str = "script"
    schedule: str = "script"
    interval: str = "step"
    dtype: str = "fp32"

    def __str__(self) -> str:
        parts = [f"stage{self.stage}", f"{self.ranks}rank", f"{self.optimizer}-optimizer", f"{self.schedule}-schedule"]
        return "-".join([*parts, *([self.interval] if self.interval != "step" else []), self.dtype])


@dataclass
class Outcome(integrations.Outcome):
    """Also the loss of Lightning's test."""

    tested: float


def config(case: Case) -> dict[str, Any]:
    """The DeepSpeed config, which Lightning completes."""
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.stage},
    }
    if case.optimizer == "config":
        made["optimizer"] = {"type": "AdamW", "params": {"lr": RATE, **ADAMW}}
    if case.schedule == "config":
        made["scheduler"] = {"type": "WarmupDecayLR", "params": decay_settings()}
    return made


def decay_settings() -> dict[str, Any]:
    return {"total_num_steps": STEPS, "warmup_min_lr": 0, "warmup_max_lr": RATE, "warmup_num_steps": 2}


def script_schedule(case: Case, optimizer: torch.optim.Optimizer) -> Any:
    """A warm-up from 0 and a decay to 0 after STEPS steps; or half the rate in each epoch."""
    if case.interval == "epoch":
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, 2, STEPS)


def rows(case: Case) -> list[dict[str, Tensor]]:
    """The same in each epoch."""
    made = torch.Generator().manual_seed(0)
    count = STEPS_PER_EPOCH * ACCUMULATION * case.ranks * 2
    ids = torch.randint(3, integrations.VOCABULARY, (count, 8), generator=made)
    return [{"input_ids": row, "labels": row} for row in ids]


class Loader(torch.utils.data.DataLoader):
    """Continues in the middle of an epoch, as Lightning asks loaders that have a state to do."""

    first = given = 0

    def __iter__(self) -> Any:
        first, self.first = self.first, 0
        for self.given, batch in enumerate(super().__iter__(), start=1):
            if self.given > first:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["given"]


def lightning_module(case: Case, model: nn.Module) -> Any:
    import lightning
    from lightning.pytorch.strategies import DeepSpeedStrategy

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.logged: list[dict[str, float]] = []
            self.evaluated: list[float] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.model(**batch).loss

        def on_train_batch_end(self, *_: Any) -> None:
            if not isinstance(self.trainer.strategy, DeepSpeedStrategy):
                return
            values = self.trainer.strategy.deepspeed_engine.log_values()
            if self.trainer.global_step > len(self.logged):
                self.logged.append(values)
            self.log_dict(values)

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("held_out", self.model(**batch).loss.float(), sync_dist=True)

        test_step = validation_step

        def on_validation_epoch_end(self) -> None:
            self.evaluated.append(float(self.trainer.callback_metrics["held_out"]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, **ADAMW)
            if case.schedule == "config":
                return optimizer
            schedule = {"scheduler": script_schedule(case, optimizer), "interval": case.interval}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    return Module()


def trainer(case: Case, out: Path, **settings: Any) -> Any:
    import lightning

    return lightning.Trainer(
        accelerator="cpu",
        devices=case.ranks,
        precision="bf16-mixed" if case.dtype == "bf16" else "32-true",
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATION,
        gradient_clip_val=CLIP,
        default_root_dir=out,
        log_every_n_steps=1,
        num_sanity_val_steps=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def train(case: Case, folder: Path, out: Path, resumes: bool = False) -> Outcome:
    """In a rank: train, and save a checkpoint at STOP; or resume there, from random weights."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DeepSpeedStrategy
    from transformers import AutoModelForCausalLM

    import hift_ds

    model = AutoModelForCausalLM.from_pretrained(folder).train()
    if resumes:
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    module = lightning_module(case, model)
    saves = ModelCheckpoint(out, "{step}", every_n_train_steps=STOP, save_top_k=-1)
    with integrations.lightning_on_cpu(), integrations.Recording(model, ACCUMULATION, weights=True) as seen:
        runs = trainer(case, out, strategy=DeepSpeedStrategy(config=config(case)), callbacks=[] if resumes else [saves])
        training, held_out = Loader(rows(case), batch_size=2), torch.utils.data.DataLoader(rows(case)[:8], batch_size=2)
        with hift_ds.enabled(layers_per_block=1):
            runs.fit(module, training, held_out, ckpt_path=f"{out}/step={STOP}.ckpt" if resumes else None)
            states = tiny.tensors(tiny.block_states(runs.strategy.deepspeed_engine))
            with pytest.raises(RuntimeError, match=r"call engine.step\(\)"):
                runs.strategy.deepspeed_engine.block_optimizers.step()
        assert all(parameter.requires_grad for parameter in model.parameters())
        weights = integrations.all_weights(model)
        tested = float(runs.test(module, held_out, verbose=False)[0]["held_out"])
        runs.strategy.deepspeed_engine.destroy()
    return Outcome(seen.steps(), seen.rates, seen.changed(), module.logged, module.evaluated, weights, states, tested)


def expected_rates(case: Case) -> list[float]:
    """Of each step, by the schedule itself."""
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    if case.schedule == "config":
        return integrations.step_rates(lambda optimizer: WarmupDecayLR(optimizer, **decay_settings()), RATE, STEPS)
    if case.interval == "epoch":
        return [RATE * 0.5 ** (step // STEPS_PER_EPOCH) for step in range(STEPS)]
    return integrations.step_rates(lambda optimizer: script_schedule(case, optimizer), RATE, STEPS)


def make_adamw(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([tensor for _, tensor in named], lr=RATE, **ADAMW)


def lightnings_share(model: nn.Module, batch: Any, count: int) -> Tensor:
    """Lightning divides the loss by the number of micro-batches, and then DeepSpeed does."""
    return integrations.token_share(model, batch, count) / ACCUMULATION


@torch.no_grad()
def loss_of(model: nn.Module, case: Case) -> float:
    """The mean over the held-out rows, of two at a time."""
    ids = torch.stack([row["input_ids"] for row in rows(case)[:8]]).reshape(4, 2, -1)
    return float(torch.stack([model.eval()(input_ids=two, labels=two).loss.float() for two in ids]).mean())


def check(case: Case, folder: Path, out: Path) -> None:
    """Hold a run against the plain loop, and its resumed second half against the first run."""
    ran = run_on_ranks(case.ranks, train, case, folder, out)
    first = ran[0]
    steps = integrations.steps_of_ranks([outcome.micro_batches for outcome in ran])
    assert len(steps) == STEPS
    for epoch in range(EPOCHS):
        of_epoch = steps[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
        seen = [str(row.tolist()) for step in of_epoch for one in step for row in one["input_ids"]]
        assert sorted(seen) == sorted(str(row["input_ids"].tolist()) for row in rows(case))

    rates = integrations.check_steps(ran, expected_rates(case), case.dtype)
    truth = integrations.load(folder, case.dtype)
    close = {"rel": 1e-5 if case.dtype == "fp32" else 1e-2}
    assert first.evaluated[0] == pytest.approx(loss_of(truth, case), **close)
    settings = {"clip": CLIP, "stage": case.stage, "ranks": case.ranks, "share": lightnings_share}
    end = integrations.replay(truth, steps, rates, make_adamw, **settings)
    assert tiny.largest_difference(first.weights, end) <= integrations.bound(case.stage, case.ranks)
    assert len(first.evaluated) == 1 + EPOCHS
    assert first.evaluated[-1] == pytest.approx(loss_of(truth, case), **close)
    assert first.tested == pytest.approx(first.evaluated[-1], **close)

    again = run_on_ranks(case.ranks, train, case, folder, out, resumes=True)
    for resumed, whole in zip(again, ran, strict=True):
        assert resumed.rates == whole.rates[STOP:] and resumed.logged[-1] == whole.logged[-1]
        assert tiny.identical(resumed.weights, whole.weights) and tiny.identical(resumed.states, whole.states)


@pytest.mark.parametrize(
    "case", [Case(stage=0), Case(stage=3, ranks=2, optimizer="config", schedule="config")], ids=str
)
def test_fit(case: Case, tmp_path: Path) -> None:
    check(case, integrations.model_folder(tmp_path / "tiny"), tmp_path)


def train_with_ddp(folder: Path, out: Path) -> list[Any]:
    """In a rank: what Lightning's own DDP strategy says inside ``enabled``."""
    from transformers import AutoModelForCausalLM

    import hift_ds

    model = AutoModelForCausalLM.from_pretrained(folder).train()
    start = integrations.all_weights(model)
    with integrations.lightning_on_cpu():
        runs = trainer(Case(), out, strategy="ddp", enable_checkpointing=False)
        with pytest.raises(RuntimeError) as error, hift_ds.enabled():
            runs.fit(lightning_module(Case(), model), Loader(rows(Case()), batch_size=2))
    return [str(error.value), runs.global_step, tiny.identical(integrations.all_weights(model), start)]


def test_another_strategy_is_an_error(tmp_path: Path) -> None:
    [(said, steps, is_untouched)] = run_on_ranks(1, train_with_ddp, integrations.model_folder(tmp_path / "m"), tmp_path)
    assert "strategy='deepspeed_stage_2' for Lightning" in said and steps == 0 and is_untouched
