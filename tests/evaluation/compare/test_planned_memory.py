"""What the planner is asked for a training of a comparison: every setting that it knows, as the run has it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import hift_ds
from hift_ds.evaluation.compare.planned_memory import planned_memory, request_of
from hift_ds.evaluation.compare.settings import load_comparison
from hift_ds.launch.config.settings import load_settings
from hift_ds.planner.api import default_reserve
from hift_ds.planner.models import load_config
from hift_ds.planner.plan import Plan, Planner
from hift_ds.planner.request import Request
from tests.support.paths import REPOSITORY

CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)  # fmt: skip
GIB = 2**30
SAME = {"batch_size": 2, "seq_len": 512, "ranks": 2, "accelerator": "cpu", "task": "causal-lm"}

PLANS: dict[str, Plan] = {}


@pytest.fixture(autouse=True)
def equal_requests_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_it = Planner.plan

    def known(planner: Planner, request: Request) -> Plan:
        key = repr(replace(request, zero_stage=request.stage))
        if key not in PLANS:
            PLANS[key] = plan_it(planner, request)
        return PLANS[key]

    monkeypatch.setattr(Planner, "plan", known)


def planned(tmp_path: Path, name: str, **sections: dict[str, Any]) -> dict[str, int] | None:
    row = {"name": name, **{key: value for key, value in sections.items() if key in ("method", "training")}}
    deepspeed = {"zero_optimization": {"stage": 2}, **sections.get("deepspeed", {})}
    text = {
        "model": {"config": {"model_type": "llama"}, "tokenizer": "byte", **sections.get("model", {})},
        "data": {"path": str(tmp_path)},
        "tasks": [{"name": "sst2", "path": str(tmp_path)}],
        "methods": [row],
        "budgets": [{"samples": 32}],
        "training": {"batch_size": 4},
        "deepspeed": deepspeed,
        "output": {"dir": str(tmp_path / "out")},
    }
    path = tmp_path / "compare.yaml"
    path.write_text(json.dumps(text))
    comparison = load_comparison(str(path), world_size=2)
    settings = comparison.run_settings(comparison.rows[0], 4, 0, 1e-3, 2)
    return planned_memory(settings, CONFIG, 512, ranks=2)


def plan(method: str, **options: Any) -> dict[str, int]:
    return hift_ds.plan_memory(CONFIG, method=method, **(SAME | options)).as_dict()["device"]


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "hift": ("hift", {}, {"precision": "fp32"}),
    "bf16": ("hift", {"deepspeed": {"bf16": {"enabled": True}}}, {"precision": "mixed-hi"}),
    "full bf16": ("full", {"deepspeed": {"bf16": {"enabled": True}}}, {"precision": "mixed"}),
    "m": ("hift", {"deepspeed": {"hift": {"layers_per_block": 3}}}, {"layers_per_block": 3, "precision": "fp32"}),
    "cut": (
        "hift",
        {"deepspeed": {"hift": {"max_block_numel": 100_000}}},
        {"max_block_numel": 100_000, "precision": "fp32"},
    ),
    "balance": ("hift", {"deepspeed": {"hift": {"balance": True}}}, {"balance": True, "precision": "fp32"}),
    "resident": (
        "hift",
        {"deepspeed": {"hift": {"offload": {"device": "none"}}}},
        {"offload_device": "none", "precision": "fp32"},
    ),
    "whole blocks": (
        "hift",
        {"deepspeed": {"hift": {"offload": {"step": "block"}}}},
        {"offload_step": "block", "precision": "fp32"},
    ),
    "buffer": (
        "hift",
        {"deepspeed": {"hift": {"offload": {"buffer_size": 65536}}}},
        {"buffer_size": 65536, "precision": "fp32"},
    ),
    "slots": (
        "hift",
        {"deepspeed": {"hift": {"offload": {"buffer_size": 65536, "prefetch": 262144}}}},
        {"buffer_size": 65536, "prefetch": 262144, "precision": "fp32"},
    ),
    "host": (
        "full",
        {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
        {"offload_optimizer": "cpu", "precision": "fp32"},
    ),
    "stage 3": (
        "hift",
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
        {"zero_stage": 3, "precision": "fp32"},
    ),
    "sgdm": (
        "full",
        {"deepspeed": {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}},
        {"optimizer": "sgdm", "precision": "fp32"},
    ),
    "sgd": ("full", {"training": {"optimizer": "SGD"}}, {"optimizer": "sgd", "precision": "fp32"}),
    "lion": ("hift", {"training": {"optimizer": "Lion"}}, {"optimizer": "lion", "precision": "fp32"}),
    "recomputed": (
        "full",
        {"model": {"gradient_checkpointing": True}},
        {"activation_checkpointing": True, "precision": "fp32"},
    ),
    "checkpoints on the host": (
        "full",
        {"model": {"gradient_checkpointing": "cpu"}},
        {"activation_checkpointing": True, "checkpoint_offload": True, "precision": "fp32"},
    ),
    "eager": ("full", {"model": {"attention": "eager"}}, {"attention": "eager", "precision": "fp32"}),
    "loss chunk": ("full", {"training": {"loss_chunk": 16}}, {"loss_chunk": 16, "precision": "fp32"}),
    "accumulation": (
        "full",
        {"training": {"micro_batch_size": 1}},
        {"batch_size": 1, "gradient_accumulation_steps": 2, "precision": "fp32"},
    ),
    "lora": ("lora", {"method": {"lora_rank": 32}}, {"lora_rank": 32, "precision": "fp32"}),
    "mezo": ("mezo", {}, {"precision": "fp32"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_of_the_run_s_settings(case: str, tmp_path: Path) -> None:
    method, sections, options = CASES[case]
    expected = plan(method, **options)
    assert planned(tmp_path, method, **sections) == expected
    if options != {"precision": "fp32"}:  # the setting matters: without it the plan is another
        assert plan(method, precision="fp32") != expected


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("prefix", {}),
        ("mezo-adam", {}),
        ("hift", {"deepspeed": {"hift": {"freeze": ["*embed*"]}}}),
        ("full", {"training": {"optimizer": "RMSprop"}}),
    ],
)
def test_what_the_planner_does_not_know_has_no_plan(method: str, sections: dict[str, Any], tmp_path: Path) -> None:
    assert planned(tmp_path, method, **sections) is None


def test_shipped_comparisons_have_plans_for_the_planner_s_methods() -> None:
    """Of SmolLM2 with fewer layers: what can be planned does not depend on their number."""
    smollm2 = load_config("smollm2-135m")
    smollm2.num_hidden_layers = 8
    smollm2.layer_types = smollm2.layer_types[:8] if getattr(smollm2, "layer_types", None) else None
    for path in sorted((REPOSITORY / "configs").glob("*_smollm2*.yaml")):
        overrides = ["data.path=null", "tasks=[rte]"]
        comparison = load_comparison(str(path), overrides)
        for row in comparison.rows:
            if row.method in ("full", "hift", "lora", "mezo"):
                settings = comparison.run_settings(row, 4, 0, 1e-3, 1)
                assert planned_memory(settings, smollm2, 64, ranks=1), (path, row.label)


# Config -> preset of its model, ranks, GiB of the card, GiB of host memory that its header names for a rank.
CARDS = {
    "llama7b_8gb.yaml": ("llama-2-7b", 1, 8, 76.1),
    "llama7b_32gb_host.yaml": ("llama-2-7b", 1, 24, 26.1),
    "llama13b_12gb.yaml": ("llama-2-13b", 1, 12, 74.6),
    "qwen32b_24gb.yaml": ("qwen2.5-32b", 1, 24, 187.9),
    "llama70b_24gb.yaml": ("llama-3-70b", 1, 24, 404.5),
    "llama70b_4x24gb.yaml": ("llama-3-70b", 4, 24, 101.1),
}
_LARGE = [name for name in CARDS if "7b" not in name or "70b" in name]  # minutes


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in _LARGE)) for n in CARDS])
def test_a_config_for_a_card_is_planned_to_fit(name: str) -> None:
    preset, ranks, memory, host = CARDS[name]
    request = the_request_of(name, preset, ranks)
    device = sum(Planner(request).plan(request).device.values())
    assert device <= memory * GIB - default_reserve(memory * GIB)
    assert f"{device / GIB:.1f} GiB on the device" in (REPOSITORY / "configs" / name).read_text()


@pytest.mark.parametrize("name", CARDS)
def test_the_header_of_a_config_has_the_planned_host_memory(name: str) -> None:
    preset, ranks, _, host = CARDS[name]
    request = the_request_of(name, preset, ranks)
    planned = sum(Planner(request).off_device(request, "host").values())
    assert f"{planned / GIB:.1f}" == f"{host}"
    assert f"and {host} GiB of host memory" in (REPOSITORY / "configs" / name).read_text().replace("\n#", "")


def the_request_of(name: str, preset: str, ranks: int) -> Request:
    settings = load_settings(str(REPOSITORY / "configs" / name), (), ranks)
    request = request_of(settings, preset, settings.data.max_length, ranks)
    assert request is not None and request.problems() == []
    return replace(request, accelerator="gpu")
