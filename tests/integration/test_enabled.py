"""`hift_ds.enabled`: what `deepspeed.initialize` makes inside it, and what is as before after it."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.support import tiny
from tests.support.ranks import run_on_ranks
from tests.support.tiny import LAYERS

BLOCKS = LAYERS + 2
STEPS = 2 * BLOCKS + 3


def config(stage: int = 0, **more: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, **more}


OPTIMIZER = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}


def batch(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(seed)).to(tiny.DEVICE)
    return {"input_ids": ids, "labels": ids}


def step(engine: Any, seed: int) -> None:
    engine.backward(engine(**batch(seed)).loss)
    engine.step()


def kinds() -> dict[str, Any]:
    """In a rank: the kinds of engines that calls make inside and outside, and whether the function is put back."""
    import deepspeed

    import hift_ds
    from hift_ds.integrations.interception import Interception

    original, found = deepspeed.initialize, {}

    def kind(trains: bool = True, **arguments: Any) -> str:
        llama = tiny.model().requires_grad_(trains)
        engine = deepspeed.initialize(model=llama, **arguments)[0]
        try:
            return type(engine).__name__ + (f" {len(engine.blocks)}" if hasattr(engine, "blocks") else "")
        finally:
            engine.destroy()

    with hift_ds.enabled(layers_per_block=2):
        found["optimizer in the config"] = kind(config=config(**OPTIMIZER))
        found["config_params"] = kind(config_params=config(**OPTIMIZER))
        found["no optimizer"] = kind(config=config(3))
        found["nothing to train"] = kind(False, config=config(**OPTIMIZER))
        found["section"] = kind(config=config(**OPTIMIZER, hift={"layers_per_block": 3}))
        found["disabled"] = kind(config=config(**OPTIMIZER, hift={"enabled": False}))
        llama = tiny.model()
        optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2)
        engine = deepspeed.initialize(None, llama, optimizer, config=config(1))[0]
        found["positional"] = f"{type(engine).__name__} {len(engine.blocks)}"
        engine.destroy()
        with hift_ds.enabled(layers_per_block=1):
            found["inner"] = kind(config=config(**OPTIMIZER))
        found["after inner"] = kind(config=config(**OPTIMIZER))
        with pytest.raises(ZeroDivisionError), hift_ds.enabled():
            raise ZeroDivisionError
        found["after an error"] = kind(config=config(**OPTIMIZER))
    assert deepspeed.initialize is original
    found["after"] = kind(config=config(**OPTIMIZER))
    with pytest.raises(ZeroDivisionError), hift_ds.enabled():
        raise ZeroDivisionError
    assert deepspeed.initialize is original

    with hift_ds.enabled(layers_per_block=2), hift_ds.enabled(layers_per_block=1):
        found["inner only"] = kind(config=config(**OPTIMIZER))
    assert deepspeed.initialize is original

    with pytest.raises(ValueError, match=r"layers_per_blok=2 .*did you mean 'layers_per_block'"):
        with hift_ds.enabled(layers_per_blok=2):
            pass
    with pytest.raises(RuntimeError, match="nothing called deepspeed.initialize"), hift_ds.enabled():
        pass
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(RuntimeError, match="SGD steps without a HiFT engine"), hift_ds.enabled():
        plain.step()
    plain.step()
    assert deepspeed.initialize is original

    outer = Interception({}, other := tiny.model())  # as HiFTCallback, which has its engine already
    deepspeed.initialize(model=other, config=config(**OPTIMIZER))[0].destroy()
    with pytest.raises(RuntimeError, match="SGD steps without a HiFT engine"), hift_ds.enabled():
        plain.step()
    plain.step()
    outer.close()
    assert deepspeed.initialize is original
    return found


def test_engines_with_an_optimizer_are_hift_engines_inside_only() -> None:
    (found,) = run_on_ranks(1, kinds)
    halves, all_layers = f"HiFTEngine {BLOCKS // 2}", f"HiFTEngine {BLOCKS}"
    assert found == {
        "optimizer in the config": halves,
        "config_params": halves,
        "no optimizer": "DeepSpeedEngine",
        "nothing to train": "DeepSpeedEngine",
        "section": f"HiFTEngine {BLOCKS // 3}",
        "disabled": "CheckpointingEngine",
        "positional": halves,
        "inner": all_layers,
        "after inner": halves,
        "inner only": all_layers,
        "after an error": halves,
        "after": "DeepSpeedEngine",
    }


def frozen_and_thawed(stage: int, folder: str) -> dict[str, Any]:
    """In a rank: names of the parameters that require gradients, at stages of a script's life."""
    import deepspeed

    import hift_ds

    llama = tiny.model()
    llama.model.norm.weight.requires_grad_(False)

    def trainable() -> set[str]:
        return {name for name, parameter in llama.named_parameters() if parameter.requires_grad}

    found = {"before": trainable()}
    with hift_ds.enabled(freeze=["model.layers.0.*"]):
        engine = deepspeed.initialize(model=llama, config=config(stage, **OPTIMIZER))[0]
        step(engine, 0)
        found["training"] = trainable()
    found["after"] = trainable()
    engine.eval()
    with torch.no_grad():
        engine(**batch(0))
    found["evaluated"] = trainable()
    engine.train()
    step(engine, 1)  # goes on outside
    found["training on"] = trainable()
    found["block"] = engine.log_values()["hift/block"]
    engine.save_checkpoint(folder)
    found["saved in training"] = trainable()
    engine.unfreeze()
    found["at the end"] = trainable()
    engine.save_checkpoint(folder, tag="end")
    found["saved"] = trainable()
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 2])
def test_after_training_parameters_require_gradients_as_before(stage: int, tmp_path: Any) -> None:
    (found,) = run_on_ranks(1, frozen_and_thawed, stage, str(tmp_path))
    everything = found["before"]
    assert "model.norm.weight" not in everything and "model.layers.0.mlp.up_proj.weight" in everything
    assert all(".layers.1." in name for name in found["training"]), "the second block is the second layer"
    assert found["after"] == found["evaluated"] == found["at the end"] == found["saved"] == everything
    assert found["saved in training"] == found["training on"]
    assert found["block"] == 1 and all(".layers.2." in name for name in found["training on"])


def warnings_of(steps: int, section: dict[str, Any]) -> list[str]:
    """In a rank: what is logged about a run of some steps, whose config holds a section."""
    import logging

    import deepspeed
    from deepspeed.utils import logger

    import hift_ds

    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with hift_ds.enabled(layers_per_block=1, strategy="random"):
            engine = deepspeed.initialize(model=tiny.model(), config=config(**OPTIMIZER, hift=section))[0]
            for number in range(steps):
                step(engine, number)
        engine.destroy()
    finally:
        logger.removeHandler(handler)
    return [message for message in records if "hift." in message or "cycle" in message]


def test_what_is_not_trained_or_not_used_is_named() -> None:
    (found,) = run_on_ranks(1, warnings_of, BLOCKS, {"lr_ticks": "step"})
    assert found == []
    (found,) = run_on_ranks(1, warnings_of, BLOCKS - 1, {})
    assert len(found) == 1 and f"ended after {BLOCKS - 1} steps" in found[0] and "layers_per_block" in found[0]
    (found,) = run_on_ranks(1, warnings_of, 0, {"layers_per_block": 2, "lr_ticks": "cycle"})
    assert len(found) == 1 and "hift.layers_per_block=2 of the DeepSpeed config replaces 1" in found[0]


def warm_up(optimizer: Any) -> Any:
    """Rises from 0 over half a cycle, then falls to 0 at the last step."""
    rise = BLOCKS // 2
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda tick: min(tick / rise, max(0.0, (STEPS - tick) / (STEPS - rise)))
    )


def trained(
    stage: int, owner: str, folder: str | None = None, resumes: bool = False, save_at: int = BLOCKS + 2
) -> tuple[list[float], list[float], list[torch.Tensor]]:
    """In a rank: the rates inside the optimizer's steps and of the logs, and the weights, of a run or its second part.

    Args:
        owner: who makes the optimizer and who the schedule, each `d` (DeepSpeed) or `s` (the script).
    """
    import deepspeed

    import hift_ds

    llama = tiny.model()
    own = torch.optim.AdamW(llama.parameters(), lr=1e-2, weight_decay=0.0) if owner[0] == "s" else None
    theirs = {} if own else {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0}}}
    script_schedule = None
    with hift_ds.enabled():
        given = warm_up if owner[1] == "d" else None
        engine, optimizer, _, schedule = deepspeed.initialize(
            model=llama, optimizer=own, lr_scheduler=given, config=config(stage, **theirs)
        )
        if owner[1] == "s":
            script_schedule = warm_up(own or optimizer.optimizer)
            script_schedule.optimizer._opt_called = True
        inside: list[float] = []

        def record(stepped: Any, args: Any, kwargs: Any) -> None:
            inside.append(float(stepped.param_groups[0]["lr"]))

        hook = register_optimizer_step_pre_hook(record)
        logged, first = [], 0
        if resumes:
            engine.load_checkpoint(folder)
            first = save_at
            if script_schedule is not None:
                script_schedule.load_state_dict(torch.load(f"{folder}/schedule.pt", weights_only=False))
        try:
            for number in range(first, STEPS):
                if folder and not resumes and number == save_at:
                    engine.save_checkpoint(folder)
                    if script_schedule is not None:
                        torch.save(script_schedule.state_dict(), f"{folder}/schedule.pt")
                before = len(inside)
                step(engine, number)
                assert len(set(inside[before:])) == 1, "the chunks of a step have one rate"
                del inside[before + 1 :]
                logged.append(engine.log_values()["hift/lr"])
                if script_schedule is not None:
                    script_schedule.step()
            last = (script_schedule or schedule).get_last_lr()[0]
        finally:
            hook.remove()
        weights = [tensor.clone() for tensor in tiny.weights(engine).values()]
        engine.destroy()
    assert last == pytest.approx(0.0), "the schedule has to end with the run"
    return inside, logged, weights


def expected_rates() -> list[float]:
    rise = BLOCKS // 2
    of_step = [1e-2 * min(tick / rise, max(0.0, (STEPS - tick) / (STEPS - rise))) for tick in range(STEPS)]
    of_cycle = [of_step[BLOCKS - 1], of_step[BLOCKS], of_step[2 * BLOCKS]]  # the first cycle begins at 0
    return [of_cycle[number // BLOCKS] for number in range(STEPS)]


@pytest.mark.parametrize("owner", ["dd", "ds", "sd", "ss"])
@pytest.mark.parametrize("stage", [0, 2])
def test_one_rate_in_a_cycle_whoever_owns_the_schedule(stage: int, owner: str, tmp_path: Any) -> None:
    """A stopped run continues with the same rates and bits from the middle of a cycle."""
    ((inside, logged, weights),) = run_on_ranks(1, trained, stage, owner, str(tmp_path))
    assert inside == logged == pytest.approx(expected_rates(), rel=1e-12)
    ((again, _, resumed),) = run_on_ranks(1, trained, stage, owner, str(tmp_path), resumes=True)
    assert again == inside[BLOCKS + 2 :]
    assert all(map(torch.equal, weights, resumed))


class WithoutRate(torch.optim.Optimizer):
    """Its parameter groups have no learning rate."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {"size": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["size"])


def trained_without_rates(kind: str) -> tuple[list[dict[str, float]], bool]:
    """In a rank: what is logged of each step, and whether all weights changed."""
    import deepspeed
    from transformers import Adafactor

    import hift_ds

    llama = tiny.model()
    before = tiny.copies(dict(llama.named_parameters()))
    parameters = llama.parameters()
    own = WithoutRate(parameters) if kind == "missing" else Adafactor(parameters, relative_step=True, lr=None)
    with hift_ds.enabled():
        engine = deepspeed.initialize(model=llama, optimizer=own, config=config(0))[0]
        logged = []
        for number in range(BLOCKS):
            step(engine, number)
            logged.append(engine.log_values())
    changed = [not torch.equal(tensor, before[name]) for name, tensor in llama.named_parameters()]
    engine.destroy()
    return logged, all(changed)


@pytest.mark.parametrize("kind", ["None", "missing"])
def test_optimizers_that_compute_their_own_rate(kind: str) -> None:
    ((logged, changed),) = run_on_ranks(1, trained_without_rates, kind)
    assert changed
    assert logged == [{"hift/block": block, "hift/cycle": 0} for block in range(BLOCKS)]


def other_ticks(folder: str) -> str:
    import hift_ds

    llama = tiny.model()
    engine = hift_ds.initialize(model=llama, config=config(**OPTIMIZER, hift={"lr_ticks": "step"}))[0]
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = hift_ds.initialize(model=tiny.model(), config=config(**OPTIMIZER))[0]
    with pytest.raises(ValueError) as error:
        engine.load_checkpoint(folder)
    engine.destroy()
    return str(error.value)


def test_a_checkpoint_with_another_kind_of_ticks_is_refused(tmp_path: Any) -> None:
    (message,) = run_on_ranks(1, other_ticks, str(tmp_path))
    assert "hift.lr_ticks='step'" in message and "'cycle'" in message


IMPORTS_LATE = """
import sys
from hift_ds.integrations.interception import Interception
assert not any(name.startswith("transformers") for name in sys.modules)
unused = Interception({})
unused.close()
assert not any(name.startswith("transformers") for name in sys.modules), "seconds for scripts that do not need it"
first, second = Interception({}), Interception({})
import transformers
assert "transformers.trainer" not in sys.modules
from transformers import Trainer
assert hasattr(Trainer.train, "__wrapped__")
first.close()
assert hasattr(Trainer.train, "__wrapped__")
second.close()
assert not hasattr(Trainer.train, "__wrapped__") and Trainer.train.__qualname__ == "Trainer.train"
assert not any(type(finder).__module__.startswith("hift_ds") for finder in sys.meta_path)
"""


def test_a_trainer_that_is_imported_inside_reports_too() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS_LATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def forwards(reentrant: bool | None, input_gradients: bool) -> tuple[list[list[int]], list[torch.Tensor]]:
    """In a rank: for each step, how often each layer ran forward; the weights at the end."""
    import deepspeed

    import hift_ds

    llama = tiny.model()
    if reentrant is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if input_gradients:
        llama.enable_input_require_grads()
    counts = [0] * LAYERS

    def count(number: int) -> Any:
        def hook(*_: Any) -> None:
            counts[number] += 1

        return hook

    for number, layer in enumerate(llama.model.layers):
        layer.self_attn.register_forward_pre_hook(count(number))
    found = []
    with hift_ds.enabled():
        engine = deepspeed.initialize(model=llama, config=config(2, **OPTIMIZER))[0]
        engine.train()
        for number in range(BLOCKS):
            counts[:] = [0] * LAYERS
            step(engine, number)
            found.append(list(counts))
        weights = [tensor.clone() for tensor in tiny.weights(engine).values()]
        engine.destroy()
    return found, weights


@pytest.mark.parametrize(("reentrant", "input_gradients"), [(True, True), (False, True), (True, False)])
def test_only_layers_from_the_active_block_up_are_recomputed(reentrant: bool, input_gradients: bool) -> None:
    ((found, weights),) = run_on_ranks(1, forwards, reentrant, input_gradients)
    # Block 0 holds the embeddings, block b layer b - 1, and the last block the head.
    assert found == [[2 if layer >= block - 1 else 1 for layer in range(LAYERS)] for block in range(BLOCKS)]
    ((_, plain),) = run_on_ranks(1, forwards, None, False)
    assert all(map(torch.equal, weights, plain))
