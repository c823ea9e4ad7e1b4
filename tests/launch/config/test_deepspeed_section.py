"""DeepSpeed's section: wrong values are named by key before anything is loaded, and each "auto" has a value."""

import json
from pathlib import Path
from typing import Any

import pytest

from hift_ds.launch.config.library_checks import check_with_libraries
from hift_ds.launch.config.settings import Settings, load_settings
from hift_ds.launch.errors import UserError
from tests.support.training import TINY


def load(section: dict[str, Any], *overrides: str, folder: Path | None = None) -> Settings:
    """Settings with a section, which is given as a file if there is a folder."""
    given = json.dumps(section)
    if folder is not None:
        (folder / "ds.json").write_text(given)
        given = str(folder / "ds.json")
    settings = load_settings(TINY, [f"deepspeed={given}", *overrides])
    check_with_libraries(settings, TINY)
    return settings


def lines(section: dict[str, Any], *overrides: str, folder: Path | None = None) -> list[str]:
    with pytest.raises(UserError) as raised:
        load(section, *overrides, folder=folder)
    return [line.removeprefix("  - ") for line in str(raised.value).splitlines()[1:]]


def optimizer(kind: str = "AdamW", **params: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2}, "optimizer": {"type": kind, "params": params}}


def schedule(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


TEXT = "The quotes make it a text; remove them."
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "eps": (optimizer(eps="1e-08"), f"deepspeed.optimizer.params.eps: got '1e-08', expected a number. {TEXT}"),
    "lr": (optimizer(lr="3e-3"), f"deepspeed.optimizer.params.lr: got '3e-3', expected a number. {TEXT}"),
    "decay": (optimizer(weight_decay="0"), "deepspeed.optimizer.params.weight_decay: got '0', expected a number."),
    "betas": (optimizer(betas=["0.9", 0.99]), "deepspeed.optimizer.params.betas: got ['0.9', 0.99], expected a list"),
    "beta of 1": (optimizer(betas=[0.9, 1.0]), "deepspeed.optimizer.params.betas: got 1.0. Expected less than 1."),
    "one beta": (optimizer(betas=[0.9]), "deepspeed.optimizer.params.betas: got [0.9]"),
    "negative eps": (optimizer(eps=-1e-8), "deepspeed.optimizer.params.eps: got -1e-08. Expected at least 0."),
    "negative lr": (optimizer(lr=-1), "deepspeed.optimizer.params.lr: got -1.0. Expected at least 0."),
    "bool": (optimizer(eps=True), "deepspeed.optimizer.params.eps: got True, expected a number."),
    "number for bool": (optimizer(amsgrad=1), "deepspeed.optimizer.params.amsgrad: got 1, expected true or false."),
    "misspelled": (optimizer(epsilon=1e-8), "deepspeed.optimizer.params.epsilon: unknown key"),
    "other optimizer's": (optimizer("SGD", betas=[0.9, 0.99]), "deepspeed.optimizer.params.betas: unknown key"),
    "momentum": (optimizer("SGD", momentum="0.9"), "deepspeed.optimizer.params.momentum: got '0.9'"),
    "nesterov": (optimizer("SGD", nesterov=True), "deepspeed.optimizer.params"),
    "clipping inside": (optimizer(max_grad_norm=1), "deepspeed.optimizer.params.max_grad_norm: the optimizer does not"),
    "too large": (optimizer(weight_decay=1e300), "deepspeed.optimizer.params.weight_decay: got 1e+300"),
    "unknown optimizer": (optimizer("AdmaW"), "deepspeed.optimizer.type: got 'AdmaW'. Expected an optimizer of"),
    "case of a name": (optimizer("sgd"), "did you mean 'SGD'?"),
    "no optimizer": (optimizer("lr_scheduler"), "deepspeed.optimizer.type: got 'lr_scheduler'"),
    "needs a closure": (optimizer("LBFGS"), "deepspeed.optimizer.type: got 'LBFGS', which evaluates the loss several"),
    "sparse gradients": (
        optimizer("SparseAdam"),
        "deepspeed.optimizer.type: got 'SparseAdam', which has no weight decay",
    ),
    "type of the type": ({"optimizer": {"type": 5}}, "deepspeed.optimizer.type: got 5, expected text."),
    "inner key": ({"optimizer": {"parms": {}}}, "deepspeed.optimizer.parms: unknown key"),
    "clipping": ({"gradient_clipping": "1.0"}, f"deepspeed.gradient_clipping: got '1.0', expected a number. {TEXT}"),
    "negative clipping": ({"gradient_clipping": -1}, "deepspeed.gradient_clipping: got -1.0. Expected at least 0."),
    "aio": ({"aio": {"block_size": "1048576"}}, "deepspeed.aio.block_size: got '1048576', expected a whole number."),
    "key of aio": ({"aio": {"block_sizee": 1}}, "did you mean 'block_size'?"),
    "bool for a count": ({"steps_per_print": True}, "deepspeed.steps_per_print: got True, expected a whole number"),
    "section": ({"aio": 5}, "deepspeed.aio: got 5, expected a mapping."),
    "zero": (
        {"zero_optimization": {"stage": "2"}},
        f"deepspeed.zero_optimization.stage: got '2', expected a whole number. {TEXT}",
    ),
    "zero, text": (
        {"zero_optimization": {"reduce_bucket_size": "5e8"}},
        f"deepspeed.zero_optimization.reduce_bucket_size: got '5e8', expected a whole number. {TEXT}",
    ),
    "zero, bool as text": (
        {"zero_optimization": {"overlap_comm": "true"}},
        f"deepspeed.zero_optimization.overlap_comm: got 'true', expected true or false or null. {TEXT}",
    ),
    "zero, number for bool": ({"zero_optimization": {"overlap_comm": 1}}, "overlap_comm: got 1, expected true or"),
    "zero, misspelled": ({"zero_optimization": {"ofload_optimizer": {}}}, "did you mean 'offload_optimizer'?"),
    "zero, inner": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memry": True}}},
        "deepspeed.zero_optimization.offload_optimizer.pin_memry: unknown key",
    ),
    "zero, device": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
        "deepspeed.zero_optimization.offload_optimizer.device: got 'gpu'. Expected one of: none, cpu, nvme",
    ),
    "zero, limit": ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 0}}, "reduce_bucket_size: got 0"),
    "bf16": ({"bf16": {"enabled": "yes"}}, "deepspeed.bf16.enabled: got 'yes', expected true or false."),
    "fp16": ({"fp16": {"loss_scale": "0"}}, f"deepspeed.fp16.loss_scale: got '0', expected a number. {TEXT}"),
    "activations": (
        {"activation_checkpointing": {"number_checkpoints": "4"}},
        "deepspeed.activation_checkpointing.number_checkpoints: got '4', expected a whole number or null.",
    ),
    "profiler": ({"flops_profiler": {"profile_step": 0}}, "flops_profiler.profile_step: got 0. Expected at least 1."),
    "monitor": ({"tensorboard": {"enabled": 1}}, "deepspeed.tensorboard.enabled: got 1, expected true or false."),
    "dtype": ({"data_types": {"grad_accum_dtype": "float"}}, "deepspeed.data_types.grad_accum_dtype: got 'float'."),
    "schedule": (schedule("WarmupLR", warmup_min_lr="0"), "deepspeed.scheduler.params.warmup_min_lr: got '0'"),
    "schedule's steps": (schedule("WarmupLR", warmup_num_steps=0), "warmup_num_steps: got 0. Expected at least 1."),
    "schedule's type": (
        schedule("WarmupLR", warmup_type="exp"),
        "warmup_type: got 'exp'. Expected one of: log, linear",
    ),
    "schedule without a length": (
        schedule("WarmupDecayLR"),
        "params.total_num_steps: not set, and WarmupDecayLR needs",
    ),
    "schedule of another": (schedule("WarmupLR", total_num_steps=9), "params.total_num_steps: unknown key"),
    "unknown schedule": (schedule("WarmUpLR"), "did you mean 'WarmupLR'?"),
    "schedule with arguments": (schedule("ReduceLROnPlateau"), "deepspeed.scheduler.params"),
    "unused": ({"autotuning": {"enabled": True}}, "deepspeed.autotuning: has no effect here"),
    "together": (
        {"zero_optimization": {"stage": 2}, "prescale_gradients": True},
        "deepspeed.prescale_gradients: got True, which ZeRO does not support",
    ),
}


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named_by_key(name: str, as_file: bool, tmp_path: Path) -> None:
    section, expected = WRONG[name]
    rate = ["training.learning_rate=null"]  # so that the section's own rate is not compared with it
    found = lines(section, *rate, folder=tmp_path if as_file else None)
    assert len(found) == 1 and expected in found[0], found


def test_all_at_once() -> None:
    section = optimizer(lr="1e-3", weight_decay="0") | {"gradient_clipping": "1", "aio": {"queue_depth": "8"}}
    assert len(lines(section, "training.learning_rate=null")) == 4
    section = optimizer(betas=["0.9"], eps="1") | {"fp16": {"hysteresis": "2"}, "bf16": {"enabled": 1}}
    section["zero_optimization"] = {"stage": 2, "sub_group_size": "1e9", "overlap_com": True}
    assert len(lines(section)) == 6


def test_numbers_of_other_tools_are_taken() -> None:
    """JSON files have whole numbers as 1e9, and null for what is left out."""
    section = optimizer(lr=1, betas=[0.9, 0.95], foreach=False) | {
        "zero_optimization": {"stage": 3, "sub_group_size": 1e9, "offload_param": None},
        "steps_per_print": 1e9,
        "scheduler": None,
    }
    settings = load(section, "training.learning_rate=null")
    assert settings.deepspeed["steps_per_print"] == 10**9 and "scheduler" not in settings.deepspeed


@pytest.mark.parametrize("kind", ["Adam", "adamw", "SGD", "Adagrad", "Lion", "Adafactor", "RMSprop", "NAdam"])
def test_optimizers_that_are_taken(kind: str) -> None:
    assert load(optimizer(kind)).deepspeed["optimizer"]["type"] == kind


SCHEDULES = {
    "MultiStepLR": {"milestones": [10, 20]},
    "StepLR": {"step_size": 10},
    "CosineAnnealingLR": {"T_max": 100},
    "OneCycleLR": {"max_lr": 1e-3, "total_steps": 100},
    "LinearLR": {"total_iters": 10},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-4},
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_that_are_taken(kind: str) -> None:
    assert load(schedule(kind, **SCHEDULES[kind])).deepspeed["scheduler"]["params"] == SCHEDULES[kind]


# ---- auto --------------------------------------------------------------------------------------------------------


class Config:
    hidden_size = 100


TRAINER: dict[str, Any] = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
    "zero_optimization": {
        "stage": 3,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


def test_a_file_of_the_trainer_is_filled_in(tmp_path: Path) -> None:
    settings = load(TRAINER, "training.warmup_ratio=0.2", folder=tmp_path).for_model(Config, ticks=20)
    section = settings.deepspeed
    assert (section["train_batch_size"], section["gradient_accumulation_steps"]) == (4, 2)
    assert section["train_micro_batch_size_per_gpu"] == 2 and section["gradient_clipping"] == 1.0
    assert section["optimizer"]["params"] == {"lr": 3e-3, "weight_decay": 0.0}  # the rest is the optimizer's own
    assert settings.dtype == "bfloat16" and section["fp16"]["enabled"] is False
    zero = section["zero_optimization"]  # the numbers are those of transformers/integrations/deepspeed.py
    assert zero["reduce_bucket_size"] == 10_000 and zero["stage3_prefetch_bucket_size"] == 9_000
    assert zero["stage3_param_persistence_threshold"] == 1_000
    assert section["scheduler"]["params"] == {
        "warmup_min_lr": pytest.approx(3e-3 / 5),
        "warmup_max_lr": 3e-3,
        "warmup_num_steps": 4,
        "total_num_steps": 20,
    }
    said = "\n".join(settings.notes)
    for key in ("optimizer.params.betas", "bf16.enabled: auto is true", "reduce_bucket_size: auto is 10000"):
        assert key in said
    assert '"auto"' not in json.dumps(section)


def test_the_dtype_of_auto() -> None:
    for section, dtype in (
        ({"bf16": {"enabled": "auto"}}, "bfloat16"),
        ({"fp16": {"enabled": "auto"}}, "float32"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "float16"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": "auto"}}, "float32"),
    ):
        assert load(section).dtype == dtype


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, "zero_optimization.overlap_comm"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}}, "offload_optimizer.device"),
        ({"steps_per_print": "auto"}, "steps_per_print"),
        (schedule("OneCycle", cycle_min_lr=0.1, cycle_max_lr="auto"), "scheduler.params.cycle_max_lr"),
    ],
)
def test_an_auto_that_nothing_decides_is_refused(section: dict[str, Any], key: str) -> None:
    (line,) = lines(section)
    assert f"{key}: got 'auto'" in line


def test_an_auto_that_needs_the_width_of_a_model_without_one() -> None:
    with pytest.raises(UserError, match="reduce_bucket_size: got 'auto', which is computed from the model's hidden_"):
        load({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}).for_model(object(), ticks=1)


# ---- with the method ---------------------------------------------------------------------------------------------


def test_a_schedule_that_nothing_reads_is_refused() -> None:
    (line,) = lines(schedule("WarmupLR"), "method.name=mezo")
    assert line.startswith("deepspeed.scheduler: given, but method 'mezo' does not use DeepSpeed.")


def test_a_warmup_ratio_that_nothing_reads_is_refused() -> None:
    (line,) = lines(schedule("WarmupLR", warmup_num_steps=3), "training.warmup_ratio=0.1")
    assert line.startswith("training.warmup_ratio: got 0.1, but deepspeed.scheduler decides about the warm-up.")
    load(schedule("WarmupLR", warmup_num_steps="auto"), "training.warmup_ratio=0.1")  # the remedy
