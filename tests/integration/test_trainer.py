"""HiFT inside the Trainer of transformers, held against the plain loop of Algorithm 1.

Runs are on ranks that live through the session. tests/proofs/test_trainer.py has all combinations.
"""

import contextlib
import functools
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support import integrations, tiny
from tests.support.ranks import run_on_ranks

ACCUMULATION = 2
STEPS = 12  # two cycles of five blocks, and two steps more
CYCLE = 5
RATE = 1e-3
WARMUP = 3
CLIP = 0.5
DECAY = 0.1
EPSILON = 1e-6  # above the usual 1e-8, with which Adam magnifies the rounding of gradients that nearly cancel
OPTIMIZER = {"type": "AdamW", "params": {key: "auto" for key in ("lr", "betas", "eps", "weight_decay")}}
SCHEDULE = {
    "type": "WarmupDecayLR",
    "params": {
        **{key: "auto" for key in ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")},
        "warmup_type": "linear",
    },
}


@dataclass(frozen=True)
class Run:
    """One training: what the script sets, and what the replay has to know.

    Attributes:
        optimizer: who makes the optimizer, "trainer" or "deepspeed" (a section of its config).
        schedule: who makes the schedule.
        callback: ``HiFTCallback`` instead of ``enabled``.
        arguments: of ``TrainingArguments``, in place of the defaults below.
        section: keys of the ``hift`` section.
    """

    stage: int = 2
    ranks: int = 1
    dtype: str = "fp32"
    tied: bool = False
    offload: bool = False
    optimizer: str = "trainer"
    schedule: str = "trainer"
    callback: bool = False
    arguments: tuple[tuple[str, Any], ...] = ()
    section: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        fields = type(self).__dataclass_fields__
        shown = {name: getattr(self, name) for name in fields if getattr(self, name) != fields[name].default}
        return "-".join(f"{name}={value}" for name, value in shown.items()) or "default"


@dataclass
class Trained:
    """What a training left on one rank."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    states: list[dict[str, Tensor]] = field(default_factory=list)  # of each block's optimizer
    micro_batches: list[list[dict[str, Any]]] = field(default_factory=list)  # of each step
    rates: list[set[float]] = field(default_factory=list)  # inside the optimizers' steps
    changed: list[set[str]] = field(default_factory=list)  # parameters, by each step but the last
    before: list[dict[str, Tensor]] = field(default_factory=list)  # weights before each step
    calls: list[list[int]] = field(default_factory=list)  # of each hidden layer, by step
    next_rate: float = 0.0  # of the schedule, after the last step
    frozen: list[str] = field(default_factory=list)  # parameters that do not require gradients afterwards
    history: list[dict[str, Any]] = field(default_factory=list)  # the Trainer's own log
    best: str | None = None  # the folder of the best checkpoint


@contextlib.contextmanager
def trainer(run: Run, folder: Path, out: Path) -> Iterator[Any]:
    """In a rank: a Trainer as a script makes it, with HiFT turned on."""
    import hift_ds

    with (
        integrations.fresh_process(),
        integrations.accelerate_on_cpu(),
        mock.patch("transformers.training_args.is_torch_bf16_gpu_available"),
    ):
        if run.callback:
            yield _trainer(run, folder, out, hift_ds.HiFTCallback(**dict(run.section)))
        else:
            with hift_ds.enabled(**dict(run.section)):
                yield _trainer(run, folder, out)


def _trainer(run: Run, folder: Path, out: Path, *callbacks: Any, model: Any = None) -> Any:
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    config = json.loads((integrations.EXAMPLES / "deepspeed_zero2.json").read_text())
    config["zero_optimization"] = {"stage": run.stage, "stage3_gather_16bit_weights_on_model_save": True}
    if run.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    config |= {"optimizer": OPTIMIZER} if run.optimizer == "deepspeed" else {}
    config |= {"scheduler": SCHEDULE} if run.schedule == "deepspeed" else {}
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "warmup_steps": WARMUP,
        "weight_decay": DECAY,
        "adam_epsilon": EPSILON,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": run.dtype == "bf16",
    }
    arguments = TrainingArguments(output_dir=str(out), **{"deepspeed": config} | defaults | dict(run.arguments))
    scores = iter([1.0, 3.0, 2.0, 2.0])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(json.loads(line)["text"]) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return Trainer(
        model=model or AutoModelForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=list(callbacks),
        compute_metrics=(lambda _: {"score": next(scores)}) if arguments.metric_for_best_model == "score" else None,
    )


def train(
    run: Run, folder: Path, out: Path, resume: str | None = None, save: bool = False, evaluate: bool = False
) -> Trained:
    """In a rank: a whole training."""
    result = Trained()
    with trainer(run, folder, out) as made:
        if evaluate:
            result.evaluated = made.evaluate()["eval_loss"]
            result.engines.append(type(made.deepspeed).__name__)
            made.deepspeed = None
        with (
            integrations.Recording(made.model, ACCUMULATION, weights=True) as seen,
            _counted(made.model, seen) as calls,
        ):
            made.train(resume_from_checkpoint=resume and str(out / resume))
        engine = made.deepspeed
        result.weights, result.states = integrations.all_weights(made.model), tiny.block_states(engine)
        result.micro_batches, result.rates, result.changed = seen.steps(), seen.rates, seen.changed()
        result.before, result.calls = seen.weights, calls
        result.next_rate = float(made.lr_scheduler.get_last_lr()[0])
        result.frozen = [name for name, parameter in made.model.named_parameters() if not parameter.requires_grad]
        result.history, result.best = made.state.log_history, made.state.best_model_checkpoint
        if save:
            made.save_model(str(out / "model"))
        engine.destroy()
    return result


@contextlib.contextmanager
def _counted(model: nn.Module, seen: integrations.Recording) -> Iterator[list[list[int]]]:
    """The forward passes of each hidden layer in each step, those of recomputation in a backward pass included."""
    calls: list[list[int]] = []

    def count(index: int, layer: nn.Module, *_: Any) -> None:
        if not model.training:
            return
        while len(calls) * ACCUMULATION < len(seen.micro_batches):
            calls.append([0] * integrations.LAYERS)
        calls[-1][index] += 1

    layers: Any = model.model.layers  # type: ignore[union-attr]
    # Checkpointing calls a layer's `forward` again, and hooks only of the modules in it.
    hooks = [one.self_attn.register_forward_pre_hook(functools.partial(count, i)) for i, one in enumerate(layers)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = integrations.model_folder(tmp_path_factory.mktemp("model"))
    integrations.rows_file(path / "rows.jsonl")
    return path


def scheduled(run: Run, steps: int) -> list[float]:
    """The rate of each step by the schedule of a run."""
    arguments = dict(run.arguments)
    total = arguments.get("max_steps", STEPS)
    if run.schedule == "deepspeed":
        from deepspeed.runtime.lr_schedules import WarmupDecayLR

        ends = {"warmup_max_lr": RATE, "warmup_num_steps": WARMUP, "total_num_steps": total}
        return integrations.step_rates(lambda o: WarmupDecayLR(o, warmup_type="linear", **ends), RATE, steps)
    from transformers import get_scheduler

    kind = arguments.get("lr_scheduler_type", "linear")
    options = arguments.get("lr_scheduler_kwargs")
    warmup = arguments.get("warmup_steps", WARMUP)
    return integrations.step_rates(
        lambda o: get_scheduler(kind, o, warmup, total, scheduler_specific_kwargs=options), RATE, steps
    )


def replayed(
    run: Run, folder: Path, of_ranks: list[Trained], rates: list[float]
) -> tuple[dict[str, Tensor], list[float]]:
    """The weights and gradient norms that the plain loop gives with the micro-batches of all ranks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(tiny.DTYPES[run.dtype])

    def make_optimizer(named: Any) -> torch.optim.Optimizer:
        decayed = [p for name, p in named if run.optimizer == "deepspeed" or "norm" not in name]
        rest = [p for name, p in named if not (run.optimizer == "deepspeed" or "norm" not in name)]
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
        fused = run.optimizer == "trainer"  # the Trainer's default; its kernel rounds differently
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=RATE, eps=EPSILON, fused=fused)

    steps = integrations.steps_of_ranks([one.micro_batches for one in of_ranks])
    norms: list[float] = []
    setting = {"clip": CLIP, "stage": run.stage, "ranks": run.ranks}
    return integrations.replay(model, steps, rates, make_optimizer, norms=norms, **setting), norms


def check(run: Run, folder: Path, out: Path) -> list[Trained]:
    """Train on all ranks; hold weights, rates, blocks and logs against the plain loop and the schedule."""
    results = run_on_ranks(run.ranks, train, run, folder, out)
    for other in results[1:]:
        assert tiny.identical(other.weights, results[0].weights), "the ranks hold different weights"
    hold(run, folder, results)
    return results


def hold(run: Run, folder: Path, results: list[Trained], steps: int = STEPS) -> None:
    ours, schedule = results[0], scheduled(run, STEPS + 1)
    rates = integrations.held(schedule[:steps], CYCLE)
    assert [sorted(of_step) for of_step in ours.rates] == [[rate] for rate in rates]
    assert min(rates) > 0, "no cycle is wasted"
    assert ours.next_rate == pytest.approx(schedule[steps], abs=1e-12), "the schedule counts steps"
    ids = [[batch["input_ids"].tolist() for batch in one.micro_batches[0]] for one in results]
    assert all(other != ids[0] for other in ids[1:]), "the ranks train on the same rows"
    truth, norms = replayed(run, folder, results, rates)
    assert tiny.largest_difference(ours.weights, truth) <= bound(run)
    blocks = integrations.block_names(run.tied)
    for step, changed in enumerate(ours.changed):
        assert changed <= set(blocks[step % CYCLE]), f"step {step} changed another block"
        assert changed and (run.dtype == "bf16" or len(changed) == len(blocks[step % CYCLE]))  # bf16 rounds some away
    assert not ours.frozen
    logged = [entry for entry in ours.history if "loss" in entry]
    assert [entry["hift/block"] for entry in logged] == [step % CYCLE for step in range(steps)]
    assert [entry["hift/cycle"] for entry in logged] == [step // CYCLE for step in range(steps)]
    assert [entry["hift/lr"] for entry in logged] == rates
    assert [entry["grad_norm"] for entry in logged] == pytest.approx(norms, rel=1e-5)


def bound(run: Run) -> float:
    return integrations.bound(run.stage, run.ranks) if not run.offload else 2e-5


@pytest.mark.parametrize(
    "run",
    [
        Run(stage=2),
        Run(stage=0, optimizer="deepspeed", dtype="bf16", callback=True),
        Run(stage=3, ranks=2, optimizer="deepspeed", schedule="deepspeed"),
        Run(stage=1, schedule="deepspeed", callback=True, section=(("strategy", "bottom2up"),)),
    ],
    ids=str,
)
def test_weights_rates_blocks_and_logs(run: Run, folder: Path, tmp_path: Path) -> None:
    check(run, folder, tmp_path)


# ---- learning rates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owners", [("trainer", "deepspeed"), ("deepspeed", "trainer")], ids="-".join)
def test_owners_of_optimizer_and_schedule(owners: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    """The other two are in the test above."""
    check(Run(optimizer=owners[0], schedule=owners[1]), folder, tmp_path)


EVALUATED = (("eval_strategy", "steps"), ("eval_steps", 3))
# No loss is that much better, so each evaluation but the first lowers the rate.
ON_PLATEAU = {"factor": 0.5, "patience": 0, "threshold": 100.0, "threshold_mode": "abs"}


def check_metric_schedule(kind: str, options: dict[str, Any], optimizer: str, folder: Path, out: Path) -> None:
    """A schedule that evaluations advance: after 3, 6, 9 and 12 steps. The rate changes with the next cycle."""
    from transformers import get_scheduler

    arguments = (*EVALUATED, ("lr_scheduler_type", kind), ("lr_scheduler_kwargs", options))
    run = Run(optimizer=optimizer, arguments=arguments)
    (ours,) = run_on_ranks(1, train, run, folder, out)
    losses = [entry["eval_loss"] for entry in ours.history if "eval_loss" in entry]
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule, after = get_scheduler(kind, dummy, scheduler_specific_kwargs=options), [RATE]
    for loss in losses:
        schedule.step(loss)
        after.append(dummy.param_groups[0]["lr"])
    assert len(after) == 5 and len(set(after)) > 2
    rates = [after[0]] * CYCLE + [after[1]] * CYCLE + [after[3]] * 2
    assert [sorted(of_step) for of_step in ours.rates] == [[rate] for rate in rates]
    assert ours.next_rate == after[4]
    assert tiny.largest_difference(ours.weights, replayed(run, folder, [ours], rates)[0]) == 0


@pytest.mark.parametrize("optimizer", ["trainer", "deepspeed"])
def test_a_schedule_that_follows_the_loss(optimizer: str, folder: Path, tmp_path: Path) -> None:
    check_metric_schedule("reduce_lr_on_plateau", ON_PLATEAU, optimizer, folder, tmp_path)


def evaluate_two_sets(metric: str, folder: Path, out: Path) -> tuple[str, list[float], list[float]]:
    """In a rank: the error of a training with two sets of held-out rows, the losses of the second, and the rates."""
    plateau = (("lr_scheduler_type", "reduce_lr_on_plateau"), ("lr_scheduler_kwargs", ON_PLATEAU))
    run = Run(optimizer="deepspeed", arguments=(*EVALUATED, *plateau, ("metric_for_best_model", metric)))
    error = ""
    with trainer(run, folder, out) as made:
        made.eval_dataset = {"first": made.eval_dataset, "second": made.train_dataset[4:8]}
        try:
            made.train()
        except KeyError as raised:
            error = str(raised)
        history = made.state.log_history
        made.deepspeed.destroy()
    losses = [entry["eval_second_loss"] for entry in history if "eval_second_loss" in entry]
    return error, losses, [entry["learning_rate"] for entry in history if "learning_rate" in entry]


def test_a_schedule_that_follows_one_of_several_sets(folder: Path, tmp_path: Path) -> None:
    ((error, losses, rates),) = run_on_ranks(1, evaluate_two_sets, "eval_second_loss", folder, tmp_path)
    assert not error and len(losses) == STEPS // 3
    assert rates == [RATE] * 6 + [RATE / 2] * 3 + [RATE / 4] * 3, "the evaluations after steps 6 and 9 lowered it"
    ((error, losses, _),) = run_on_ranks(1, evaluate_two_sets, "loss", folder, tmp_path)
    assert "'eval_loss'" in error and "eval_first_loss" in error and "eval_second_loss" in error and len(losses) == 1


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def check_resume(run: Run, folder: Path, out: Path, save_at: int = 7) -> None:
    """Train, and train again from a checkpoint in the middle of a cycle."""
    saving = (("save_strategy", "steps"), ("save_steps", save_at))
    run = replace(run, arguments=(*run.arguments, *saving))
    whole = run_on_ranks(run.ranks, train, run, folder, out)
    rest = run_on_ranks(run.ranks, train, run, folder, out, resume=f"checkpoint-{save_at}")
    for before, after in zip(whole, rest, strict=True):
        assert tiny.identical(after.weights, before.weights)
        assert len(after.states) == CYCLE
        assert all(tiny.identical(a, b) for a, b in zip(after.states, before.states, strict=True))
        assert after.rates == before.rates[save_at:] and after.next_rate == before.next_rate
        logged = [[entry for entry in one.history if "loss" in entry] for one in (before, after)]
        assert logged[0] == logged[1]


@pytest.mark.parametrize(
    "run",
    [Run(stage=2, schedule="deepspeed"), Run(stage=3, ranks=2, optimizer="deepspeed", dtype="bf16")],
    ids=str,
)
def test_resume_in_the_middle_of_a_cycle(run: Run, folder: Path, tmp_path: Path) -> None:
    check_resume(run, folder, tmp_path)


def check_best(run: Run, folder: Path, out: Path) -> None:
    """The second of four evaluations is the best: its weights are those at the end, and those that are saved."""
    saving = (("save_strategy", "steps"), ("save_steps", 3), ("load_best_model_at_end", True))
    scored = (("metric_for_best_model", "score"), ("greater_is_better", True))
    run = replace(run, arguments=(*run.arguments, *EVALUATED, *saving, *scored))
    results = run_on_ranks(run.ranks, train, run, folder, out, save=True)
    for ours in results:
        assert ours.best is not None and ours.best.endswith("checkpoint-6")
        assert tiny.identical(ours.weights, ours.before[6])
        assert not ours.frozen
    hold_saved(out / "model", results[0].weights)


def hold_saved(folder: Path, weights: dict[str, Tensor]) -> None:
    from transformers import AutoModelForCausalLM

    saved = dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").named_parameters())
    assert {name: tensor.dtype for name, tensor in saved.items()} == {n: t.dtype for n, t in weights.items()}
    assert tiny.identical(tiny.copies(saved), weights)


@pytest.mark.parametrize("run", [Run(stage=3, ranks=2)], ids=str)
def test_the_best_model_is_loaded_and_saved(run: Run, folder: Path, tmp_path: Path) -> None:
    check_best(run, folder, tmp_path)


# ---- evaluation ----------------------------------------------------------------------------------------------------


def evaluate_first(folder: Path, out: Path) -> dict[str, Any]:
    """In a rank: a Trainer that evaluates and then trains, and another one that trains the same model."""
    from transformers import AutoModelForCausalLM

    run = Run(stage=3, optimizer="deepspeed", arguments=(("eval_on_start", True),))
    result: dict[str, Any] = {}
    with trainer(run, folder, out) as made:
        result["loss"], result["engine"] = made.evaluate()["eval_loss"], type(made.deepspeed).__name__
        with pytest.raises(RuntimeError) as error:
            made.train()
        again = _trainer(run, folder, out, model=made.model)
        again.train()
        result["logged"] = [entry["eval_loss"] for entry in again.state.log_history if "eval_loss" in entry]
        with pytest.raises(RuntimeError) as other_error:
            again.train()
        result["errors"] = str(error.value), str(other_error.value)
        again.deepspeed.destroy()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        result["plain"] = plain(**again.data_collator([again.eval_dataset[i] for i in range(4)])).loss.item()
    return result


def test_evaluation_before_training(folder: Path, tmp_path: Path) -> None:
    """At ZeRO 3 the Trainer makes an engine for it; at other stages the Trainer refuses."""
    (result,) = run_on_ranks(1, evaluate_first, folder, tmp_path)
    assert result["engine"] == "DeepSpeedEngine"
    assert result["loss"] == pytest.approx(result["plain"], rel=1e-6)
    assert result["logged"] == [pytest.approx(result["plain"], rel=1e-6)]
    assert all("Make a new Trainer" in error and "eval_on_start=True" in error for error in result["errors"])


# ---- activation checkpointing --------------------------------------------------------------------------------------


def recomputed(step: int) -> list[int]:
    """Forward passes of each hidden layer in a step: once for each micro-batch, and again from the active block up."""
    block = step % CYCLE
    return [ACCUMULATION * (1 + (block <= layer + 1)) for layer in range(integrations.LAYERS)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_from_the_active_block_up(
    reentrant: bool, folder: Path, tmp_path: Path
) -> None:
    kwargs = ("gradient_checkpointing_kwargs", {"use_reentrant": reentrant})
    (ours,) = check(Run(arguments=(("gradient_checkpointing", True), kwargs)), folder, tmp_path)
    assert ours.calls == [recomputed(step) for step in range(STEPS)]


# ---- more of the Trainer -------------------------------------------------------------------------------------------


def find_batch_size(folder: Path, out: Path) -> tuple[Trained, int]:
    """In a rank: a training whose first batches do not fit."""
    result = Trained()
    arguments = (("auto_find_batch_size", True), ("per_device_train_batch_size", 4))
    with trainer(Run(arguments=arguments), folder, out) as made:

        def fits(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if len(kwargs["input_ids"]) > 2 and module.training:
                raise RuntimeError("CUDA out of memory.")

        refusing = made.model.register_forward_pre_hook(fits, with_kwargs=True)
        with integrations.Recording(made.model, ACCUMULATION, weights=True) as seen:
            made.train()
        refusing.remove()
        result.weights, result.micro_batches, result.rates = (
            integrations.all_weights(made.model),
            seen.steps(),
            seen.rates,
        )
        result.changed, result.next_rate = seen.changed(), made.lr_scheduler.get_last_lr()[0]
        result.frozen = [name for name, parameter in made.model.named_parameters() if not parameter.requires_grad]
        result.history = made.state.log_history
        made.deepspeed.destroy()
    return result, made._train_batch_size


def test_auto_find_batch_size(folder: Path, tmp_path: Path) -> None:
    """The engine of the batch size that does not fit leaves nothing behind, no frozen parameter above all."""
    ((ours, batch_size),) = run_on_ranks(1, find_batch_size, folder, tmp_path)
    assert batch_size == 2
    hold(Run(), folder, [ours])


# ---- reports and errors --------------------------------------------------------------------------------------------


def unframed(data: bytes) -> bytes:
    """The records of a file of W&B without the headers of its log format, which may cut a record anywhere: 7 bytes, of
    which the fifth and sixth are the length, in blocks of 32 KiB."""
    position, content = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
    return content


def log_to_wandb(folder: Path, out: Path) -> dict[str, list[float]]:
    """In a rank: what the file of an offline run of W&B holds of HiFT."""
    import wandb

    run = Run(stage=0, callback=True, arguments=(("report_to", "wandb"), ("max_steps", CYCLE + 1)))
    settings = {"WANDB_MODE": "offline", "WANDB_DIR": str(out), "WANDB_SILENT": "true"}
    with mock.patch.dict(os.environ, settings):
        wandb.teardown()  # W&B reads the environment once a process, and a test before this one may have had it do so
        train(run, folder, out)
        wandb.finish()
    (path,) = (out / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # W&B's own process may still write when `finish` returns
    logs = CYCLE + 2  # of each step and of the whole run, with three values each
    while (content := unframed(path.read_bytes())).count(b"train/hift/") < 2 * 3 * logs and time.monotonic() < deadline:
        time.sleep(0.1)
    # W&B's field 16 follows a value's name: a length, and the value as JSON.
    found = re.findall(rb"train/hift/(\w+)\x82\x01.([\d.e-]+)", content, re.DOTALL)
    names = sorted({name.decode() for name, _ in found})
    # Each value is in a record of the history and in one of the summary.
    return {name: [float(value) for one, value in found if one.decode() == name][::2] for name in names}


def test_the_run_of_wandb_has_rate_block_and_cycle(folder: Path, tmp_path: Path) -> None:
    (logged,) = run_on_ranks(1, log_to_wandb, folder, tmp_path)
    blocks, cycles, rates = logged["block"], logged["cycle"], logged["lr"]
    assert blocks[: CYCLE + 1] == [0, 1, 2, 3, 4, 0] and cycles[: CYCLE + 1] == [0] * CYCLE + [1]
    schedule = scheduled(Run(arguments=(("max_steps", CYCLE + 1),)), CYCLE + 1)
    assert rates[: CYCLE + 1] == pytest.approx([schedule[CYCLE - 1]] * CYCLE + [schedule[CYCLE]])


def with_model_init(callback: bool, folder: Path, out: Path) -> tuple[str, list[int]]:
    """In a rank: the error of a Trainer that makes its model in `train`, and the blocks of its steps."""
    from transformers import AutoModelForCausalLM

    run, error = Run(callback=callback, arguments=(("max_steps", CYCLE),)), ""
    with trainer(run, folder, out) as made:
        made.model_init = lambda: AutoModelForCausalLM.from_pretrained(folder)
        try:
            made.train()
        except RuntimeError as raised:
            error = str(raised)
        else:
            made.deepspeed.destroy()
    return error, [entry["hift/block"] for entry in made.state.log_history if "loss" in entry]


def test_a_callback_refuses_a_model_that_is_made_in_train(folder: Path, tmp_path: Path) -> None:
    (error, _), (nothing, blocks) = (run_on_ranks(1, with_model_init, it, folder, tmp_path)[0] for it in (True, False))
    assert "model_init" in error and "with hift_ds.enabled(...)" in error
    assert not nothing and blocks == list(range(CYCLE))


def without_deepspeed(callback: bool, folder: Path, out: Path) -> str:
    """In a rank: the error where the Trainer does not use DeepSpeed."""
    run = Run(callback=callback, arguments=(("deepspeed", None),))
    with pytest.raises(RuntimeError) as error, trainer(run, folder, out) as made:
        made.train()
    return str(error.value)


@pytest.mark.parametrize("callback", [True, False])
def test_a_trainer_without_deepspeed_is_an_error(callback: bool, folder: Path, tmp_path: Path) -> None:
    (message,) = run_on_ranks(1, without_deepspeed, callback, folder, tmp_path)
    assert "TrainingArguments(deepspeed='config.json')" in message


# ---- weights in host memory ----------------------------------------------------------------------------------------


def kept_best(run: Run, folder: Path, out: Path) -> list[dict[str, Any]]:
    """In a rank: the log of a training that is evaluated, saved, resumed at its best checkpoint, and exported."""
    with trainer(run, folder, out) as made:
        made.train()
        made.save_model(str(out / "model"))
        made.deepspeed.destroy()
        made.evaluate()  # of the model that is left
        return [{k: v for k, v in entry.items() if "loss" in k or "norm" in k} for entry in made.state.log_history]


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_in_host_memory(ranks: int, folder: Path, tmp_path: Path) -> None:
    saving = (("save_strategy", "steps"), ("save_steps", 3), ("load_best_model_at_end", True), *EVALUATED)
    found, saved = [], []
    for place in ("device", "cpu"):
        section = (("layers_per_block", 1), ("offload", {"weights": place}))
        run = Run(ranks=ranks, dtype="bf16", arguments=saving, section=section)
        found.append(run_on_ranks(ranks, kept_best, run, folder, tmp_path / place))
        saved.append(load_file(tmp_path / place / "model" / "model.safetensors"))
    assert found[0] == found[1] and tiny.identical(*saved)
