"""``hift.offload.weights: cpu`` changes no bit of a training, at any stage, in any order, with evaluations inside."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from hift_ds.weights.host import HostWeights
from hift_ds.weights.turns import Turns
from tests.support import tiny
from tests.support.lazy_streams import LazyStreams, MissingWait
from tests.support.pairwise import others_slow
from tests.support.parity import STRATEGIES
from tests.support.poisoned_slots import poisoned
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case
from tests.support.training import arguments, records


def make(case: Case, defer: bool = False, freeze: tuple[str, ...] = (), **offload: Any) -> Any:
    import hift_ds

    llama = tiny.model(case.dtype, case.tied)
    if case.checkpointing:
        hift_ds.checkpoint_activations(llama)
    config = tiny.ds_config(case)
    config["hift"] |= {"freeze": list(freeze)}
    config["hift"]["offload"] |= {"defer": defer, **offload}
    params = tiny.decay_groups(llama.named_parameters()) if case.decay_groups else None
    return hift_ds.initialize(model=llama, config=config, model_parameters=params)[0]


Result = tuple[list[Any], dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]


def trained(case: Case, lazy: bool = False, **offload: Any) -> Result:
    """In a rank: losses and gradient norms, weights, and all blocks' state; an evaluation after every third step."""
    with contextlib.ExitStack() as stack:
        if lazy:
            stack.enter_context(LazyStreams())
        else:
            stack.enter_context(poisoned())
        engine, seen = make(case, **offload), []
        stack.callback(engine.destroy)
        for step in range(case.steps):
            seen.append((tiny.optimizer_step(engine, step), float(engine.get_global_grad_norm())))
            if step % 3 == 2:
                engine.eval()
                with torch.no_grad():
                    seen.append(engine(**tiny.micro_batch(1000 + step, 0)).loss.item())
                engine.train()
        engine.settle()
        return seen, tiny.weights(engine), tiny.block_states(engine)


def same(ours: Result, truth: Result) -> bool:
    states = zip(ours[2], truth[2], strict=True)
    return ours[0] == truth[0] and tiny.identical(ours[1], truth[1]) and all(tiny.identical(a, b) for a, b in states)


def different(case: Case, lazy: bool = False, defer: bool = False, **offload: Any) -> list[str]:
    """In a rank: what is not as with the weights on the device."""
    truth = trained(replace(case, waiting="device"), **offload)
    return [] if same(trained(case, lazy, defer=defer, **offload), truth) else [str(case)]


WAITING = {"waiting": "cpu"}
CASES = [
    Case(stage=stage, dtype=dtype, strategy=strategy, **WAITING)
    for stage, dtypes in ((0, ("bf16", "fp32")), (1, ("bf16", "fp16", "fp32")), (2, ("bf16", "fp16", "fp32")))
    for dtype in dtypes
    for strategy in STRATEGIES
]
CASES += [
    Case(stage=stage, dtype="bf16", layers_per_block=2, decay_groups=True, checkpointing=stage == 2, **WAITING)
    for stage in (0, 1, 2)
]
CASES += [
    Case(stage=2, dtype="bf16", tied=True, layers_per_block=2, **WAITING),
    Case(stage=1, dtype="bf16", tied=True, checkpointing=True, step="block", **WAITING),
    Case(stage=0, dtype="bf16", max_block_numel=1500, steps_per_block=2, **WAITING),
    Case(stage=2, dtype="bf16", max_block_numel=1500, **WAITING),
    Case(stage=2, dtype="bf16", balance=True, optimizer="Adagrad", **WAITING),
    Case(stage=0, optimizer="Adafactor", tied=True, **WAITING),
    Case(stage=0, max_block_numel=1500, step="block", **WAITING),
]
TABLE = [CASES[0], CASES[4], CASES[7], CASES[11], CASES[14], CASES[19], *CASES[-10:]]


@pytest.mark.parametrize("case", others_slow(CASES, TABLE), ids=str)
def test_the_place_of_weights_does_not_matter(case: Case) -> None:
    assert run_on_ranks(1, different, case) == [[]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_with_deferred_updates(strategy: str) -> None:
    for stage, dtype in ((0, "fp32"), (2, "bf16")):
        case = Case(stage=stage, dtype=dtype, strategy=strategy, layers_per_block=2, **WAITING)
        assert run_on_ranks(1, different, case, defer=True) == [[]]


@pytest.mark.parametrize("lazy", (False, True))
@pytest.mark.parametrize("offload", ({"master": "fp32"}, {"moments": "8bit"}, {"prefetch": 2**20}), ids=str)
def test_with_each_format_of_state(offload: dict[str, Any], lazy: bool) -> None:
    case = Case(stage=2, dtype="bf16", layers_per_block=2, decay_groups=True, **WAITING)
    assert run_on_ranks(1, different, case, lazy=lazy, **offload) == [[]]


@pytest.mark.parametrize("stage", (0, 2))
def test_with_state_in_files(stage: int, tmp_path: Path) -> None:
    case = Case(stage=stage, dtype="bf16", place="nvme", **WAITING)
    assert run_on_ranks(1, different, case, nvme_path=str(tmp_path)) == [[]]


@pytest.mark.parametrize("defer", (False, True))
@pytest.mark.parametrize("case", (CASES[0], CASES[5], CASES[-3], CASES[-7]), ids=str)
def test_nothing_is_read_or_overwritten_too_early(case: Case, defer: bool) -> None:
    assert run_on_ranks(1, different, case, lazy=True, defer=defer) == [[]]


def cycles_with_a_save(case: Case, folder: str) -> tuple[Result, Result, Any]:
    """In a rank: the second half of a run, and the same by another engine from a checkpoint in the middle."""
    freeze = ("model.layers.1.*",)
    with poisoned():
        engine = make(case, freeze=freeze)
        half = len(engine.blocks) + 2
        for step in range(half):
            tiny.optimizer_step(engine, step)
        engine.save_checkpoint(folder, exclude_frozen_parameters=False)
        results = []
        for number in range(2):
            if number:
                engine.destroy()
                engine = make(case, freeze=freeze)
                tiny.optimizer_step(engine, 999)  # the slots hold something else
                engine.load_checkpoint(folder)
            seen = [tiny.optimizer_step(engine, step) for step in range(half, half + len(engine.blocks))]
            results.append((seen, tiny.weights(engine), tiny.block_states(engine)))
        engine.load_checkpoint(folder, load_module_only=True)
        loss = tiny.optimizer_step(engine, half)
        engine.destroy()
        return results[0], results[1], loss


@pytest.mark.parametrize("case", [CASES[0], CASES[5], replace(CASES[19], layers_per_block=1)], ids=str)
def test_a_run_continues_from_a_checkpoint(case: Case, tmp_path: Path) -> None:
    ((ours, continued, loaded),) = run_on_ranks(1, cycles_with_a_save, case, str(tmp_path / "cpu"))
    assert same(continued, ours)
    on_device = replace(case, waiting="device")
    ((truth, _, of_truth),) = run_on_ranks(1, cycles_with_a_save, on_device, str(tmp_path / "device"))
    assert same(ours, truth) and loaded == of_truth


def loaded_after_a_deferred_step(steps: int) -> bool:
    """In a rank: whether weights that are loaded while an update is due stay."""
    engine = make(Case(stage=2, dtype="bf16", waiting="cpu"), defer=True)
    for step in range(steps):
        tiny.optimizer_step(engine, step)
    zeros = {name: torch.zeros_like(value) for name, value in engine.module.state_dict().items()}
    tiny.optimizer_step(engine, steps)
    engine.module.load_state_dict(zeros)
    engine.settle()
    left = tiny.weights(engine)
    engine.destroy()
    return not any(value.any() for value in left.values())


def test_weights_that_are_loaded_stay() -> None:
    assert run_on_ranks(1, loaded_after_a_deferred_step, 3) == [True]


def exported(case: Case, folder: str) -> list[bool]:
    """In a rank: whether what is saved, generated and left behind is as with the weights on the device."""
    from transformers import LlamaForCausalLM

    found: list[Any] = []
    for waiting in ("device", "cpu"):
        with poisoned():
            engine = make(replace(case, waiting=waiting))
            for step in range(4):
                tiny.optimizer_step(engine, step)
            engine.module.save_pretrained(f"{folder}/{waiting}")
            engine.save_16bit_model(f"{folder}/{waiting}", "model.bin")
            ids = tiny.micro_batch(0, 0)["input_ids"]
            engine.eval()
            tokens = engine.module.generate(ids, max_new_tokens=5, do_sample=False)
            engine.destroy()
            left = tiny.copies(dict(engine.module.named_parameters()))
            with torch.no_grad():
                logits = engine.module(ids).logits
        loaded = LlamaForCausalLM.from_pretrained(f"{folder}/{waiting}", dtype=tiny.DTYPES[case.dtype])
        saved = tiny.copies(dict(loaded.named_parameters()))
        found.append((left, saved, {"tokens": tokens, "logits": logits}, torch.load(f"{folder}/{waiting}/model.bin")))
    pairs = zip(*found, strict=True)
    return [tiny.identical(ours, truth) for ours, truth in pairs] + [tiny.identical(found[1][0], found[1][1])]


@pytest.mark.parametrize("tied", (False, True))
def test_export_and_generation(tied: bool, tmp_path: Path) -> None:
    case = Case(stage=2, dtype="bf16", tied=tied, waiting="cpu")
    assert run_on_ranks(1, exported, case, str(tmp_path)) == [[True] * 5]


def refusals() -> list[str]:
    """In a rank: what is refused, and that the model of a refused engine is as before."""
    import hift_ds

    found = []
    engine = make(Case(stage=2, dtype="bf16", waiting="cpu"))
    with pytest.raises(RuntimeError) as refused:
        engine.offload_states()
    found.append(str(refused.value))
    engine.compile(backend="eager")
    with pytest.raises(ValueError) as refused_forward:
        engine(**tiny.micro_batch(0, 0))
    found.append(str(refused_forward.value))
    engine.destroy()
    llama = tiny.model("bf16")
    before = tiny.copies(dict(llama.named_parameters()))
    config = tiny.ds_config(Case(stage=2, dtype="bf16", waiting="cpu"))
    with mock.patch.object(HostWeights, "start", side_effect=MemoryError("a test")), pytest.raises(MemoryError):
        hift_ds.initialize(model=llama, config=config)
    assert tiny.identical(tiny.copies(dict(llama.named_parameters())), before)
    engine = hift_ds.initialize(model=llama, config=config)[0]
    tiny.optimizer_step(engine, 0)
    engine.destroy()
    return found


def test_what_is_refused() -> None:
    ((states, compiled),) = run_on_ranks(1, refusals)
    assert "wait in host memory already" in states and "weights='device'" in states
    assert "do not compile the model" in compiled


def without(case: Case, name: str) -> bool:
    """In a rank: whether the harness notices that a part of the order between copies is missing."""
    import hift_ds.weights.turns

    nothing: Any = {
        "wait": mock.patch.object(hift_ds.weights.turns, "wait", lambda event: None),
        "mark of a fill": mock.patch.object(hift_ds.weights.turns, "mark", lambda: None),
        "changed": mock.patch.object(Turns, "changed", lambda *_: None),
        "events of an update": mock.patch.object(Turns, "changed", _changed_at_once(Turns.changed)),
    }[name]
    truth = trained(replace(case, waiting="device"))
    try:
        with nothing:
            return not same(trained(case, lazy=True, defer=True), truth)
    except MissingWait:
        return True


def _changed_at_once(changed: Any) -> Any:
    return lambda turns, units, _: changed(turns, units, ())


@pytest.mark.parametrize("name", ("wait", "mark of a fill", "changed", "events of an update"))
def test_each_wait_is_noticed_if_it_is_missing(name: str) -> None:
    case = Case(stage=2, dtype="bf16", strategy="random", waiting="cpu")
    assert run_on_ranks(1, without, case, name) == [True]


def launched(argv: list[str]) -> None:
    """In a rank: a run of the command."""
    from hift_ds.launch import train

    train.main(argv)


def test_a_run_of_the_command(tmp_path: Path) -> None:
    """With held-out scores, checkpoints, the loss in chunks, and an export."""
    found = []
    for waiting in ("device", "cpu"):
        out = tmp_path / waiting
        common = ("training.save_every=4", "training.loss_chunk=8", "training.eval_every=4")
        place = f"deepspeed.hift.offload.weights={waiting}"
        run_on_ranks(1, launched, arguments(out, "training.max_steps=6", place, *common))
        model = load_file(out / "model" / "model.safetensors")
        losses = [(record["loss"], record.get("eval")) for record in records(out)]
        found.append((losses, model))
    (truth, weights), (losses, ours) = found
    assert losses == truth and tiny.identical(ours, weights)
