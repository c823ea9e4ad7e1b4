"""The `hift` section: what it takes, what it refuses, and that it says so all at once."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hift_ds import config
from hift_ds.config import MIN_BUFFER, ConfigError, HiFTConfig, OffloadConfig


def test_defaults_are_the_documented_ones() -> None:
    documented = {
        **{"enabled": True, "layers_per_block": 1, "strategy": "bottom2up", "seed": 0, "steps_per_block": 1},
        **{"freeze": [], "max_block_numel": None, "balance": False},
        "offload": {
            **{
                "device": "cpu",
                "step": "auto",
                "buffer_size": 67108864,
                "pin_memory": "auto",
                "prefetch": True,
                "defer": "auto",
            },
            "nvme_path": None,
            "weights": "device",
            "nvme": "all",
        },
    }
    assert HiFTConfig.from_dict(documented) == HiFTConfig.from_dict({}) == HiFTConfig.from_dict(None) == HiFTConfig()


def test_values_arrive() -> None:
    section = {
        "layers_per_block": 3,
        "strategy": "random",
        "seed": 7,
        "freeze": ["*.bias"],
        "offload": {"step": "block"},
    }
    built = HiFTConfig.from_dict(section)
    assert (built.layers_per_block, built.strategy, built.seed, built.freeze) == (3, "random", 7, ("*.bias",))
    assert built.offload == OffloadConfig(step="block")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"layer_per_block": 1}, ("layer_per_block", "layers_per_block")),
        ({"strategy": "buttom2up"}, ("buttom2up", "bottom2up", "top2down", "random")),
        ({"strategy": ["random"]}, ("random",)),
        ({"layers_per_block": 0}, ("layers_per_block=0", "from 1")),
        ({"layers_per_block": "2"}, ("'2'", "integer")),
        ({"layers_per_block": True}, ("True", "integer")),
        ({"steps_per_block": 0}, ("steps_per_block=0",)),
        ({"seed": 1.5}, ("seed=1.5",)),
        ({"enabled": "yes"}, ("'yes'", "true or false")),
        ({"freeze": "*.bias"}, ("freeze", "list")),
        ({"max_block_numel": 0}, ("max_block_numel=0", "null")),
        ({"balance": 1}, ("balance=1", "false")),
        ({"offload": {"device": "gpu"}}, ("offload.device='gpu'", "cpu, nvme or none")),
        ({"offload": {"device": "nvme"}}, ("offload.device='nvme'", "nvme_path")),
        ({"offload": {"device": "nvme", "nvme_path": "/nowhere"}}, ("nvme_path='/nowhere'", "create it")),
        ({"offload": {"device": "nvme", "nvme_path": "/proc"}}, ("nvme_path='/proc'", "cannot be written")),
        ({"offload": {"nvme_path": "/tmp"}}, ("nvme_path='/tmp'", "remove it")),
        ({"offload": {"nvme": "masters"}}, ("offload.nvme='masters'", "all or moments")),
        ({"offload": {"nvme": "moments"}}, ("offload.nvme='moments'", "device='cpu'", "remove it", "to nvme")),
        ({"offload": {"step": "whole"}}, ("offload.step='whole'", "streamed")),
        ({"offload": {"buffer_size": 1000}}, ("offload.buffer_size=1000", "65536")),
        ({"offload": {"prefetch": 2**18, "step": "block"}}, ("offload.prefetch=262144 ", "step='block'", "remove it")),
        (
            {"offload": {"prefetch": 2**18, "device": "none"}},
            ("offload.prefetch=262144 ", "device='none'", "remove it"),
        ),
        ({"offload": {"prefetch": 2**17 - 1}}, ("offload.prefetch=131071", "at least 131072")),
        (
            {"offload": {"buffer_size": 2**20, "step": "block"}},
            ("offload.buffer_size=1048576 ", "step='block'", "remove"),
        ),
        ({"offload": {"buffer_size": 2**20, "device": "none"}}, ("offload.buffer_size=1048576 ", "device='none'")),
        ({"offload": {"pin_memory": "as allowed"}}, ("offload.pin_memory='as allowed'", "true, false or auto")),
        ({"offload": {"defer": "later"}}, ("offload.defer='later'", "true, false or auto")),
        ({"offload": {"defer": "where possible"}}, ("offload.defer='where possible'", "true, false or auto")),
        ({"offload": {"step": "streamed", "device": "none"}}, ("offload.step='streamed' ", "device='none'", "remove")),
        ({"offload": {"prefetch": False, "device": "none"}}, ("offload.prefetch=False ", "device='none'", "remove")),
        ({"offload": {"defer": True, "step": "block"}}, ("offload.defer=true ", "step='block'", "to auto")),
        ({"offload": {"defer": True, "device": "none"}}, ("offload.defer=true ", "device='none'", "to auto")),
        (
            {"offload": {"defer": True, "device": "nvme", "nvme_path": "."}},
            ("offload.defer=true ", "device='nvme'", "to auto"),
        ),
        ({"offload": {"master": "bf16"}}, ("offload.master='bf16'", "auto, fp32 or split")),
        ({"offload": {"moments": 8}}, ("offload.moments=8", "fp32 or 8bit")),
        ({"offload": {"master": "split", "device": "none"}}, ("offload.master='split' ", "device='none'", "remove it")),
        (
            {"offload": {"moments": "8bit", "device": "none"}},
            ("offload.moments='8bit' ", "device='none'", "cpu or nvme"),
        ),
        ({"offload": {"weights": "host"}}, ("offload.weights='host'", "device or cpu")),
        (
            {"offload": {"weights": "cpu", "device": "none"}},
            ("offload.weights='cpu'", "offload.device='none'", "cpu or nvme"),
        ),
        ({"offload": {"pin": True}}, ("offload.pin", "pin_memory")),
        ({"offload": "cpu"}, ("offload='cpu'", "mapping")),
        ([], ("mapping",)),
        ("on", ("'on'", "mapping")),
    ],
)
def test_every_bad_value_is_named_with_its_remedy(section: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        HiFTConfig.from_dict(section)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        HiFTConfig.from_dict({"strategy": "x", "layers_per_block": 0, "speed": 1})
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(("offload", "count"), [("cpu", 2), ({"defer": True, "prefetch": 1}, 4), (None, 2)])
def test_problems_of_the_section_hide_none_of_the_rest(offload: Any, count: int) -> None:
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}, "elastic_checkpoint": True}
    found = config.problems({"zero_optimization": zero, "hift": {"offload": offload}})
    assert len(found) == count and "elastic_checkpoint" in found[-1], found


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ({"fp16": {"enabled": True}}, ("fp16", "stage=0")),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            ("offload_optimizer", "stage=0"),
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, ("nvme", "cpu")),
        (
            {
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "hift": {"offload": {"device": "none"}},
            },
            ("offload.device='none'", "offload_optimizer"),
        ),
        (
            {
                "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
                "hift": {"offload": {"prefetch": 2**20}},
            },
            ("offload.prefetch=1048576 ", "offload_optimizer.device='cpu'", "to true"),
        ),
        (
            {
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "hift": {"offload": {"defer": True}},
            },
            ("offload.defer=true ", "offload_optimizer.device='cpu'", "to auto"),
        ),
        (
            {
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "hift": {"offload": {"moments": "8bit"}},
            },
            ("offload.moments='8bit' ", "offload_optimizer.device='cpu'", "remove one"),
        ),
        (
            {"zero_optimization": {"stage": 3}, "hift": {"offload": {"defer": True}}},
            ("offload.defer=true ", "stage=3", "to auto"),
        ),
        (
            {"zero_optimization": {"stage": 3}, "hift": {"offload": {"weights": "cpu"}}},
            ("offload.weights='cpu'", "stage=3", "offload_param.device='cpu'"),
        ),
        (
            {
                "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
                "hift": {"offload": {"weights": "cpu"}},
            },
            ("offload.weights='cpu'", "offload_optimizer.device='cpu'", "remove offload_optimizer"),
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ("offload_param", "stage=3")),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ("offload_param", "use cpu")),
        ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}, ("cpu_offload_param", "offload_param: {")),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ("cpu_offload=True", "offload_optimizer: {")),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, ("zenflow",)),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, ("elastic_checkpoint",)),
        ({"torch_autocast": {"enabled": True}}, ("torch_autocast", "bf16")),
        ({"compile": {"deepcompile": True}}, ("deepcompile",)),
        ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, ("expert_parallel.enabled", "remove it")),
    ],
)
def test_what_cannot_be_exact_beside_hift_is_refused(rest: dict[str, Any], words: tuple[str, ...]) -> None:
    found = config.problems({"hift": {}, **rest})
    assert len(found) == 1 and all(word in found[0] for word in words), found
    assert config.problems({**rest, "hift": {"enabled": False}}) == []


@pytest.mark.parametrize("offload", [{}, {"defer": "auto"}, {"step": "block"}, {"device": "none"}])
def test_a_step_is_deferred_where_possible_if_the_loop_is_known(offload: dict[str, Any]) -> None:
    section = copy.deepcopy(config.with_deferred_step({"offload": offload}))
    assert HiFTConfig.from_dict(section).offload.defers
    for zero in ({"stage": 3}, {"stage": 1, "offload_optimizer": {"device": "cpu"}}):
        if zero["stage"] == 3 or "device" not in offload:
            assert config.problems({"zero_optimization": zero, "hift": section}) == []
    assert not config.with_deferred_step({"offload": {**offload, "defer": False}})["offload"]["defer"]
    assert not HiFTConfig.from_dict({"offload": offload}).offload.defers


BLOCKS = [[100_000], [900_000, 100_000]]  # the largest has 12 MB of state with AdamW


@pytest.mark.parametrize(
    ("given", "size", "count"),
    [
        ({}, 12_055_296, 2),  # one chunk, with room for alignment
        ({"buffer_size": 2**20}, 2**20, 2),
        ({"buffer_size": 2**20, "prefetch": 2**23}, 2**20, 8),
        ({"buffer_size": 2**20, "prefetch": 3 * 2**22}, 2**20, 12),
        ({"buffer_size": 2**16, "prefetch": 3 * 2**22}, 2**20, 12),  # at least a twelfth
        ({"buffer_size": 2**20, "prefetch": 2**20}, 2**19, 2),  # at most half
        ({"buffer_size": 2**22, "prefetch": 2**22}, 2**21, 2),
        ({"buffer_size": 2**20, "prefetch": 2**30}, 12_055_296, 2),  # at most both blocks' chunks
        ({"buffer_size": 2**22, "prefetch": 2**25}, 2**22, 6),
        ({"prefetch": 2 * MIN_BUFFER}, MIN_BUFFER, 2),
    ],
)
def test_slots_keep_to_the_budget_and_hold_at_most_two_blocks(given: dict[str, int], size: int, count: int) -> None:
    built = OffloadConfig(**given)
    assert built.slots(BLOCKS, ranks=1, per_element=12) == (size, count)
    assert isinstance(built.prefetch, bool) or size * count <= built.prefetch


def test_a_config_can_be_a_path(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"hift": {"seed": 3}}))
    assert config.read(path) == {"hift": {"seed": 3}}
    for content, word in (("{", "JSON"), ("[]", "object")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=word):
            config.read(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        config.read(tmp_path / "none.json")
