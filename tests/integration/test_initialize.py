"""What `hift_ds.initialize` accepts, returns and refuses, and that DeepSpeed's own tools keep working with it."""

import ast
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hift_ds.checkpoint import manifest
from tests.support import tiny
from tests.support.parity import FINER
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case

STAGES = (0, 1, 2, 3)


def refusal(config: dict[str, Any], model: str = "llama", **arguments: Any) -> str:
    """In a rank: the message with which `initialize` refuses; "" where it does not."""
    import hift_ds

    modules = {"llama": tiny.model, "flat": lambda: torch.nn.Linear(4, 4), "frozen": tiny.model}
    module = modules[model]()
    if model == "frozen":
        module.requires_grad_(False)
    base = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    try:
        hift_ds.initialize(model=module, config={**base, **config}, **arguments)[0].destroy()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hift": {"strategy": "buttom2up"}}, ("strategy", "buttom2up", "bottom2up")),
        ({"hift": {"layers_per_block": 0}}, ("layers_per_block=0",)),
        ({"hift": {"layers_per_block": 7}}, ("layers_per_block", "7", "6")),
        ({"hift": {"freeze": ["*nothing*"]}}, ("*nothing*",)),
        ({"hift": {"freeze": ["*"]}}, ("train",)),
        ({"hift": {}, "fp16": {"enabled": True}}, ("fp16", "stage")),
        ({"hift": {}, "optimizer": None}, ("optimizer",)),
        ({"hift": {}, "optimizer": None, "zero_optimization": {"stage": 2}}, ("optimizer",)),
        ({"hift": {"x": 1}, "torch_autocast": {"enabled": True}}, ("hift.x",)),
    ],
)
def test_bad_configs_are_refused_by_name(config: dict[str, Any], words: tuple[str, ...]) -> None:
    (message,) = run_on_ranks(
        1,
        refusal,
        {k: v for k, v in config.items() if v is not None or k != "optimizer"}
        | ({"optimizer": {}} if "optimizer" in config else {}),
    )
    assert message and all(word in message for word in words), message


@pytest.mark.parametrize(("model", "word"), [("flat", "layers"), ("frozen", "train")])
def test_models_without_layers_or_without_anything_to_train_are_refused(model: str, word: str) -> None:
    (message,) = run_on_ranks(1, refusal, {}, model)
    assert word in message


def partial_optimizer() -> str:
    import hift_ds

    llama = tiny.model()
    optimizer = torch.optim.SGD(llama.lm_head.parameters(), lr=0.1)
    with pytest.raises(ValueError) as error:
        hift_ds.initialize(model=llama, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 1})
    return str(error.value)


def test_parameters_that_the_optimizer_lacks_are_named() -> None:
    (message,) = run_on_ranks(1, partial_optimizer)
    assert "model.embed_tokens.weight" in message and "hift.freeze" in message


def disabled() -> tuple[bool, bool]:
    from deepspeed import DeepSpeedEngine

    import hift_ds

    case = Case(stage=2)
    config = tiny.ds_config(case) | {"hift": {"enabled": False}}
    engine, optimizer, _, _ = hift_ds.initialize(model=tiny.model(), config=config)
    try:
        is_stock = isinstance(engine, DeepSpeedEngine) and not isinstance(engine, hift_ds.HiFTEngine)
        return is_stock, optimizer is engine.optimizer
    finally:
        engine.destroy()


def test_disabled_is_deepspeed_itself() -> None:
    """But for how it saves and loads."""
    assert run_on_ranks(1, disabled) == [(True, True)]


def frozen_stay(stage: int) -> tuple[list[str], list[str], int]:
    """In a rank: what moved, and what was frozen by a pattern or by the user, over a whole cycle."""
    import hift_ds

    llama = tiny.model()
    llama.model.norm.requires_grad_(False)
    config = tiny.ds_config(Case(stage=stage))
    config["hift"]["freeze"] = ["*layers.1.*", "*q_proj*"]
    engine = hift_ds.initialize(model=llama, config=config)[0]
    try:
        before = tiny.weights(engine)
        for step in range(2 * len(engine.blocks)):
            tiny.optimizer_step(engine, step)
        after = tiny.weights(engine)
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        return moved, [name for name in before if name not in moved], len(engine.blocks)
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_never_move_and_all_others_do(stage: int) -> None:
    ((moved, still, blocks),) = run_on_ranks(1, frozen_stay, stage)
    assert blocks == 5  # embeddings, three layers, head
    assert all(".layers.1." in name or "q_proj" in name or name == "model.norm.weight" for name in still)
    assert not any(".layers.1." in name or "q_proj" in name or name == "model.norm.weight" for name in moved)


def deepspeed_tools(stage: int, dtype: str, folder: str) -> None:
    """In a rank: DeepSpeed's per-parameter access and its checkpoint converter see all blocks, active or not."""
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
    )
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = tiny.initialize(Case(stage=stage, dtype=dtype, tied=True))
    try:
        for step in range(8):
            tiny.optimizer_step(engine, step)
        engine.save_checkpoint(folder)
        converted = get_fp32_state_dict_from_zero_checkpoint(folder)
        weights = tiny.weights(engine)
        assert set(converted) == set(weights) | {"lm_head.weight"}
        for name, parameter in engine.module.named_parameters():
            master = safe_get_full_fp32_param(parameter)
            assert torch.equal(master, converted[name])
            assert torch.equal(master.to(weights[name].dtype), weights[name])
            assert safe_get_full_optimizer_state(parameter, "exp_avg").abs().sum() > 0
            safe_set_full_fp32_param(parameter, torch.zeros_like(master))
            assert safe_get_full_fp32_param(parameter).abs().sum() == 0
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", (1, 2, 3))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_deepspeeds_own_tools_see_every_block(stage: int, dtype: str, tmp_path: Path) -> None:
    run_on_ranks(2, deepspeed_tools, stage, dtype, str(tmp_path))


def unused_block() -> tuple[str, str]:
    """What the engine says, and what it says when the printed setting is followed."""
    import hift_ds

    class TwoPaths(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama = tiny.model()
            self.head = torch.nn.Linear(4, 4)

        def forward(self, **batch: Any) -> Any:
            return self.llama(**batch)

    config = tiny.ds_config(Case()) | {
        "hift": {"strategy": "top2down", "freeze": ["llama.model.norm*", "llama.lm_head*"]}
    }

    def step() -> str:
        engine = hift_ds.initialize(model=TwoPaths(), config=config)[0]
        try:
            tiny.optimizer_step(engine, 0)
        except RuntimeError as error:
            return str(error)
        finally:
            engine.destroy()
        return ""

    message = step()
    (freeze,) = re.findall(r"hift\.freeze=(\[.*?\])", message)
    config["hift"]["freeze"] = ast.literal_eval(freeze)
    return message, step()


def test_a_block_that_the_loss_does_not_use_is_named_and_can_be_frozen() -> None:
    ((message, afterwards),) = run_on_ranks(1, unused_block)
    assert "head.weight, head.bias" in message and "'head.*'" in message and "use_reentrant" in message
    assert afterwards == ""


def warned_of_schedule() -> list[str]:
    import deepspeed

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    deepspeed.utils.logger.addHandler(handler)
    try:
        tiny.initialize(Case(scheduler="WarmupDecayLR")).destroy()
    finally:
        deepspeed.utils.logger.removeHandler(handler)
    return said


def test_a_schedule_with_an_end_is_explained() -> None:
    (said,) = run_on_ranks(1, warned_of_schedule)
    assert any("once per cycle" in line and "24 steps" in line for line in said), said


def warned_of_metric(ticks: str, metrics: dict[str, float]) -> tuple[list[str], float]:
    """In a rank: what is logged about a schedule that follows a metric, in two cycles; the rate at the end.

    Args:
        metrics: what each step receives.
    """
    import deepspeed

    import hift_ds

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    config = {"train_micro_batch_size_per_gpu": 1, "hift": {"lr_ticks": ticks}}
    llama = tiny.model()
    optimizer = torch.optim.SGD(llama.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    engine = hift_ds.initialize(model=llama, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]
    deepspeed.utils.logger.addHandler(handler)
    try:
        for step in range(2 * len(engine.blocks)):
            engine.backward(engine(**tiny.micro_batch(step, 0)).loss)
            engine.step(lr_kwargs=metrics or None)
    finally:
        deepspeed.utils.logger.removeHandler(handler)
    engine.destroy()
    return [line for line in said if "metric" in line], optimizer.param_groups[0]["lr"]


def test_a_schedule_that_follows_a_metric_and_gets_none_is_named() -> None:
    ((said, rate),) = run_on_ranks(1, warned_of_metric, "cycle", {})
    assert len(said) == 1 and "ReduceLROnPlateau" in said[0] and "lr_kwargs={'metrics': value}" in said[0]
    assert rate == 1.0
    assert run_on_ranks(1, warned_of_metric, "cycle", {"metrics": 1.0}) == [([], 0.5)], "the second cycle is no better"
    assert run_on_ranks(1, warned_of_metric, "step", {}) == [([], 1.0)], "the script advances it"


def other_blocks(folder: str) -> list[str]:
    """In a rank: what a checkpoint says to a run with other blocks, another order, or that was made without HiFT."""
    messages = []
    engine = tiny.initialize(Case(stage=1))
    tiny.optimizer_step(engine, 0)
    engine.save_checkpoint(folder, tag="hift")
    engine.destroy()
    # Stage 0: at others DeepSpeed's files hold an enumeration, which Python 3.11.2 writes as a call: not to be adopted.
    stock = tiny.initialize(Case(stage=0), stock=True)
    tiny.optimizer_step(stock, 0)
    stock.save_checkpoint(folder, tag="stock")
    stock.destroy()
    with pytest.raises(ValueError, match=r"(?s)has no manifest\.json.*adopt"):
        tiny.initialize(Case(stage=0)).load_checkpoint(folder, tag="stock")
    manifest.adopt(Path(folder, "stock"))
    for case, tag in (
        (Case(stage=1, layers_per_block=2), "hift"),
        (Case(stage=1, strategy="top2down"), "hift"),
        (Case(stage=0), "stock"),
    ):
        engine = tiny.initialize(case)
        with pytest.raises(ValueError) as error:
            engine.load_checkpoint(folder, tag=tag)
        messages.append(str(error.value))
        engine.destroy()
    return messages


def test_a_checkpoint_of_another_cut_in_the_middle_of_a_cycle_is_refused(tmp_path: Path) -> None:
    (messages,) = run_on_ranks(1, other_blocks, str(tmp_path))
    assert "layers_per_block" in messages[0] and "strategy" in messages[1]
    assert "is not kept by parameter name" in messages[2] and "a run without HiFT" in messages[2]


def train_after(predecessor: str, by_rows: bool) -> tuple[list[list[str]], dict[str, torch.Tensor], list[str]]:
    """In a rank: the blocks and weights of a training after another engine of the same model made a step of the last
    block, or was refused, and the parameters that are frozen after `destroy`."""
    import gc

    import hift_ds

    case = Case(stage=2, max_block_numel=FINER if by_rows else None, strategy="bottom2up")
    llama = tiny.model()
    if predecessor == "refused":
        config = {
            **tiny.ds_config(case),
            "hift": {"freeze": ["model.layers.*"], "max_block_numel": case.max_block_numel},
        }
        del config["optimizer"]
        optimizer = torch.optim.Adafactor(llama.parameters(), lr=1e-3)
        with pytest.raises(ValueError, match="not element-wise"):
            hift_ds.initialize(model=llama, optimizer=optimizer, config=config)
        assert all(parameter.requires_grad for parameter in llama.parameters())
        assert not any(parameter._post_accumulate_grad_hooks for parameter in llama.parameters())
    elif predecessor != "none":
        first = tiny.initialize(replace(case, strategy="top2down"), llama=llama)
        tiny.optimizer_step(first, 99)
        if predecessor == "destroyed":
            first.destroy()
        for parameter, start in zip(llama.parameters(), tiny.model().parameters(), strict=True):
            parameter.data.copy_(start.data)
    engine = tiny.initialize(case, llama=llama)
    if predecessor == "destroyed":
        del first
        gc.collect()  # a deleted engine must not change parameters that another one trains
    for step in range(3):
        tiny.optimizer_step(engine, step)
    blocks, weights = [list(block.parameter_names) for block in engine.blocks], tiny.weights(engine)
    engine.destroy()
    return blocks, weights, [name for name, parameter in llama.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize("by_rows", [False, True])
def test_an_engine_after_another_one_of_the_same_model(by_rows: bool) -> None:
    before = ("none", "destroyed", "alive", "refused")
    alone, *others = (run_on_ranks(1, train_after, predecessor, by_rows)[0] for predecessor in before)
    assert alone[2] == []
    for other in others:
        assert other[0] == alone[0] and other[2] == []
        assert tiny.identical(other[1], alone[1])
