"""Models that compute their tokens one after the other: what is extrapolated equals what a simulation counts."""

import math
from typing import Any

import pytest

from hift_ds.config import ConfigError
from hift_ds.planner import plan as planning
from hift_ds.planner import search
from hift_ds.planner.api import plan_memory
from hift_ds.planner.extrapolation import Extrapolated, Extrapolation, NotLinearError, Point
from hift_ds.planner.plan import Planner
from hift_ds.planner.request import Request
from hift_ds.planner.search import Fit
from hift_ds.planner.simulation import LiveMemory

MAMBA = {"model_type": "mamba", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
ATTENTION = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": MAMBA,
    "falcon_mamba": {**MAMBA, "model_type": "falcon_mamba"},
    "rwkv": {"model_type": "rwkv", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2},
    "jamba": {
        "model_type": "jamba", "vocab_size": 256, "num_hidden_layers": 2, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2, **ATTENTION,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mamba", {"batch_size": 3, "loss_chunk": 32}),
        pytest.param("jamba", {"batch_size": 2, "activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("falcon_mamba", {"batch_size": 2, "method": "full"}, marks=pytest.mark.slow),
        pytest.param("rwkv", {"batch_size": 2}, marks=pytest.mark.slow),
        pytest.param("mamba", {"batch_size": 2, "checkpoint_offload": True, "loss_chunk": 40}, marks=pytest.mark.slow),
        pytest.param("jamba", {"batch_size": 2, "zero_stage": 3, "ranks": 2, "loss_chunk": 9}, marks=pytest.mark.slow),
    ],
)
def test_extrapolated_sizes_are_the_simulated_ones(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(RECURRENT[name], seq_len=36, **options)
    planner = Planner(request)
    blocks = planner.build(request).bounding_blocks()
    exact = [planner.simulate(request, block) for block in blocks]
    assert all(isinstance(memory, LiveMemory) for memory in exact)
    monkeypatch.setattr(planning, "_MANY_OPERATIONS", 1)
    planner = Planner(request)
    for block, memory in zip(blocks, exact, strict=True):
        found = planner.simulate(request, block)
        assert isinstance(found, Extrapolated) and found.lengths == (3, 4, 5)
        assert (found.peaks, found.host) == (memory.peaks, memory.host)


@pytest.mark.slow
def test_a_long_plan_takes_few_operations(capsys: pytest.CaptureFixture[str]) -> None:
    """A Python loop over 100,000 tokens alone would be millions of operations."""
    request = Request(MAMBA, seq_len=100_000)
    planner = Planner(request)
    plan = planner.plan(request)
    assert planner.operations < 200_000
    assert plan.extrapolated_from == [3, 4, 5] and "extrapolated from" in plan.notes[0]
    assert plan.as_dict()["extrapolated_from"] == [3, 4, 5]
    # Each layer keeps the discretized state of each token for backward: fp32, (tokens, 2 * hidden, state).
    assert plan.device["activations"] > 2 * 100_000 * 128 * 8 * 4
    short = plan_memory(MAMBA, seq_len=16)
    assert short.extrapolated_from is None


@pytest.mark.slow
def test_the_search_finds_the_longest_sequence() -> None:
    request = Request(MAMBA, seq_len=2048)
    planner = Planner(request)
    plan = planner.plan(request)
    before = planner.operations
    fit = Fit(planner, sum(plan.device.values()) * 3, 0).answer(plan).fit
    assert fit is not None and fit["fits"] and fit["not_searched"] == []
    assert planner.operations - before < 300_000
    longest = fit["longest_sequence"]
    planner.limit = None
    for length, fits in ((longest, True), (longest + 64, False)):
        other = planner.plan(Request(MAMBA, seq_len=length))
        assert (sum(other.device.values()) <= fit["gpu_memory"]) == fits


def test_the_search_ends_after_many_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(MAMBA, seq_len=2048)
    monkeypatch.setattr(search, "_MOST_OPERATIONS", 0)
    planner = Planner(request)
    plan = planner.plan(request)
    fit = Fit(planner, sum(plan.device.values()) * 3, 0).answer(plan).fit
    assert fit is not None and fit["fits"] and fit["not_searched"] == ["longest_sequence", "largest_batch"]


def test_a_plan_that_takes_too_many_operations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_MOST_OPERATIONS_OF_A_PLAN", 1)
    with pytest.raises(ConfigError, match="takes more than 1 simulated operations; use at most 32 tokens"):
        plan_memory(MAMBA, seq_len=2048)
    assert plan_memory(MAMBA, seq_len=32).extrapolated_from is None


def test_sizes_of_another_form_are_not_extrapolated() -> None:
    def simulate(point: Point) -> LiveMemory:
        memory = LiveMemory((1, 1))
        memory.allocate("activations", point.batch_size * point.seq_len**2)
        return memory

    with pytest.raises(NotLinearError):
        Extrapolation(simulate, 3, 1).at(Point(1, 1000, 0))


def test_local_attention_beyond_its_window_is_refused() -> None:
    """Such a sequence has a mask, whose size no short sequence shows."""
    sizes = {"lru_width": 64, "attention_window_size": 500, "vocab_size": 256, "num_hidden_layers": 3}
    model = {"model_type": "recurrent_gemma", **sizes, **ATTENTION}
    with pytest.raises(ConfigError, match="does not follow from shorter ones; use at most 500"):
        plan_memory(model, seq_len=600)


def test_a_window_that_no_layer_uses_is_no_limit() -> None:
    from hift_ds.planner.models import attention_window, load_config

    kinds = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "sliding_window": 64}
    assert attention_window(load_config({"model_type": "qwen3_next", **kinds})) == math.inf
    assert attention_window(load_config({"model_type": "recurrent_gemma", "attention_window_size": 500})) == 500


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 10**9), pytest.param(10**6, 10**6, marks=pytest.mark.slow)])
def test_the_search_for_a_change_reuses_forward_passes(batch_size: int, seq_len: int) -> None:
    """Ranks and places of the state do not change the activations, and most variants of a huge batch need none."""
    sizes = {"num_hidden_layers": 2, "vocab_size": 256, "max_position_embeddings": 64}
    request = Request({"model_type": "llama", **sizes, **ATTENTION}, batch_size=batch_size, seq_len=seq_len)
    planner = Planner(request)
    plan = planner.plan(request)
    before = planner.operations
    fit = Fit(planner, 2**30, 0).answer(plan).fit
    assert fit is not None and "sequences of" in fit["change"]
    assert planner.operations - before < 40 * before  # without reuse, more than 100 simulations of a block
