"""What is said of parameters that the loss does not depend on, and that the printed setting helps."""

import re
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

import hift_ds
from hift_ds.launch.config.settings import Settings, load_settings
from hift_ds.launch.errors import NotApplicable, UserError
from hift_ds.launch.make_engine import check_reach, find_blocks, make_engine, schedule_ticks
from tests.support.towers import BART, GEMMA3, TEXT, TOWER
from tests.support.training import TINY

MODELS = {"gemma3": GEMMA3, "bart": BART, "llama": TEXT}
CROSS_ATTENTION = ("encoder_attn.", "encoder_attn_layer_norm.")


def skeleton(kind: str) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **MODELS[kind]))


def checked(kind: str, *overrides: str) -> str:
    """The note about what text does not reach, which the caller knows from the names."""
    model, settings = skeleton(kind), load_settings(TINY, overrides)
    parts = TOWER if kind == "gemma3" else CROSS_ATTENTION
    unreached = [name for name, _ in model.named_parameters() if any(part in name for part in parts)]
    return check_reach(settings, find_blocks(settings, model), model, unreached)


def remedy(message: str) -> str:
    (found,) = re.findall(r'--set "(deepspeed\.hift\.freeze=.*)"', message)
    return found


def test_a_tower_that_text_does_not_reach_is_refused_with_the_setting_that_helps() -> None:
    with pytest.raises(UserError) as error:
        checked("gemma3")
    assert "2 of 6 blocks" in str(error.value) and "model.vision_tower.encoder.layers.0" in str(error.value)
    assert checked("gemma3", remedy(str(error.value))) == ""


def test_the_printed_setting_keeps_what_is_frozen_already() -> None:
    with pytest.raises(UserError) as error:
        checked("gemma3", "deepspeed.hift.freeze=['*norm*', '*.self_attn.q_proj.*']")
    assert "['*norm*', '*.self_attn.q_proj.*', 'model.vision_tower" in remedy(str(error.value))


@pytest.mark.parametrize("kind", [ValueError, MemoryError, OSError, AssertionError])
def test_what_the_engine_refuses_is_the_users_error(kind: type[Exception]) -> None:
    with mock.patch.object(hift_ds, "initialize", side_effect=kind("rank 1: why")):
        with pytest.raises(UserError, match="deepspeed: rank 1: why"):
            make_engine(skeleton("llama"), load_settings(TINY), lambda tick: 1.0)


def test_unreached_parameters_among_others_are_a_note() -> None:
    note = checked("bart")
    assert note.startswith("note: ") and "weight decay" in note
    assert checked("bart", remedy(note)) == ""


@pytest.mark.parametrize(
    ("overrides", "ticks"),
    [((), 5), (("deepspeed.hift.steps_per_block=2",), 3), (("deepspeed.hift.lr_ticks=step",), 20)],
)
def test_a_schedule_counts_cycles_or_steps(overrides: tuple[str, ...], ticks: int) -> None:
    settings = load_settings(TINY, ("training.max_steps=20", *overrides))
    assert schedule_ticks(settings, find_blocks(settings, skeleton("llama"))) == ticks


def test_blocks_of_reached_and_unreached_layers_are_a_note() -> None:
    assert checked("gemma3", "deepspeed.hift.layers_per_block=4").startswith("note: ")


@pytest.mark.parametrize("method", ["full", "mezo", "badam"])
def test_methods_without_blocks_leave_them_as_they_are(method: str) -> None:
    note = checked("gemma3", f"method.name={method}")
    assert note.startswith("note: ") and "stay as they are" in note


def test_nothing_is_said_of_a_model_without_such_parameters() -> None:
    assert checked("llama") == checked("llama", "method.name=full") == ""


def test_a_method_that_trains_only_unreached_weights_does_not_fit() -> None:
    settings: Settings = load_settings(TINY, ["method.name=bitfit"])
    model = skeleton("gemma3")
    with pytest.raises(NotApplicable, match="bitfit.*text does not reach"):
        tower = [name for name, _ in model.named_parameters() if name.startswith(TOWER)]
        make_engine(model, settings, lambda tick: 1.0, tower)
