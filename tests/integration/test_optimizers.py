"""Optimizers of transformers' Trainer and of DeepSpeed's config against the plain loop; the whole table is in
tests/proofs/test_optimizers.py."""

import shutil
import tempfile
from typing import Any

import pytest
import torch

from tests.support import optimizers, tiny
from tests.support.ranks import run_on_ranks


@pytest.mark.parametrize(
    ("name", "stage", "dtype"),
    [
        ("adamw_8bit", 0, "fp32"),
        ("adamw_8bit", 0, "bf16"),
        ("ademamix_8bit", 0, "bf16"),
        ("stable_adamw", 0, "bf16"),
        ("adafactor", 0, "fp32"),
        ("lion_32bit", 2, "bf16"),
        ("rmsprop_bnb", 3, "bf16"),
    ],
)
def test_training_is_the_plain_loop(name: str, stage: int, dtype: str) -> None:
    assert run_on_ranks(1, optimizers.difference, name, stage, dtype) == [0.0]


@pytest.mark.parametrize(
    ("name", "stage", "texts"),
    [
        ("adamw_8bit", 2, ("AdamW is not element-wise", "'state1' is quantized", "use stage 0")),
        ("ademamix", 3, ("'state1'", "use stage 0")),
        ("stable_adamw", 1, ("depends on others", "use stage 0")),
        ("grokadamw", 2, ("parameter groups", "adamw_torch")),
        ("lomo", 0, ("inside the backward pass", "adamw_torch")),
    ],
)
def test_others_are_refused_before_a_weight_changes(name: str, stage: int, texts: tuple[str, ...]) -> None:
    (message,) = run_on_ranks(1, optimizers.difference, name, stage, "fp32")
    assert isinstance(message, str) and all(text in message for text in texts), message


def muon(stage: int, dtype: str) -> float | str:
    """In a rank: DeepSpeed's Muon without its compiler, which takes a minute and rounds each shape differently."""
    with torch.compiler.set_stance("force_eager"):
        return optimizers.config_difference("Muon", {}, stage, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_muon_by_the_config_is_exact_at_stage_0(dtype: str) -> None:
    assert run_on_ranks(1, muon, 0, dtype) == [0.0]


def test_muon_by_the_config_is_refused_where_tensors_are_flattened() -> None:
    (message,) = run_on_ranks(1, muon, 2, "bf16")
    assert "MuonWithAuxAdam is not element-wise" in message and "use stage 0" in message


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("OneBitAdam", ("optimizer.type='OneBitAdam'", "neither", "AdamW")),
        ("MuAdam", ("optimizer.type='muadam'", "pip install mup")),
        pytest.param(
            *("Lamb", ("optimizer.type='lamb'", "fused kernel", "AdamW")),
            marks=pytest.mark.skipif(tiny.DEVICE != "cpu", reason="the kernel may work here"),
        ),
    ],
)
def test_a_name_of_the_config_that_this_machine_lacks_is_named(kind: str, texts: tuple[str, ...]) -> None:
    (message,) = run_on_ranks(1, optimizers.config_difference, kind, {}, 0, "fp32")
    assert isinstance(message, str) and all(text in message for text in texts), message


def resumed(name: str, stage: int, dtype: str) -> tuple[float, bool]:
    """In a rank: six steps, and four of them in one engine and two in another that loads its checkpoint.

    Returns the largest difference of the weights, and whether all state is the same.
    """
    from hift_ds.optim.properties import parts

    folder = tempfile.mkdtemp()
    ends: list[Any] = []
    states: list[Any] = []
    try:
        for first in (0, 4):
            optimizers.forget_overrides()
            llama = optimizers.model(dtype)
            engine = optimizers.engine_of(llama, optimizers.made(name, llama), stage, dtype)
            try:
                if first:
                    assert engine.load_checkpoint(folder)[0] is not None
                optimizers.take_steps(engine, range(first, 4))
                if not first:
                    engine.save_checkpoint(folder)
                optimizers.take_steps(engine, range(4, 6))
                ends.append(tiny.weights(engine))
                of_blocks = [block.items() for block in tiny.block_states(engine)]
                states.append([{(n, i): part for n, t in own for i, part in enumerate(parts(t))} for own in of_blocks])
            finally:
                engine.destroy()
    finally:
        shutil.rmtree(folder)
    same = all(tiny.identical(ours, theirs) for ours, theirs in zip(*states, strict=True))
    return tiny.largest_difference(*ends), same


@pytest.mark.parametrize(("name", "dtype"), [("adamw_8bit", "fp32"), ("stable_adamw", "bf16")])
def test_a_run_continues_with_the_same_bits(name: str, dtype: str) -> None:
    """8-bit state, and a step count in the parameter groups."""
    assert run_on_ranks(1, resumed, name, 0, dtype) == [(0.0, True)]


def host_bytes(name: str, dtype: str) -> tuple[int, float, int]:
    """In a rank: bytes of state in host memory after a cycle, as predicted for each element, and elements."""
    from hift_ds.state.trial import examine

    optimizers.forget_overrides()
    llama = optimizers.model(dtype)
    made: Any = optimizers.made(name, llama)
    predicted = examine(made).state_bytes
    engine = optimizers.engine_of(llama, made, 0, dtype)
    try:
        optimizers.take_steps(engine, range(len(engine.blocks)))
        embeddings = llama.model.embed_tokens.weight.numel()  # in 32 bits, as the Trainer does
        numel = sum(p.numel() for p in llama.parameters() if p.dim() > 1) - embeddings
        vectors = sum(p.numel() for p in llama.parameters() if p.dim() == 1) + embeddings
        maps = 2 * 1024 * sum(p.dim() > 1 for p in llama.parameters())
        return engine.memory_ledger()["host"]["optimizer_state"] - 8 * vectors - maps, predicted, numel
    finally:
        engine.destroy()


def test_the_ledger_and_the_prediction_know_8_bit_state() -> None:
    ((held, predicted, numel),) = run_on_ranks(1, host_bytes, "adamw_8bit", "bf16")
    assert 2 < predicted < 2.04
    assert held == pytest.approx(predicted * numel, rel=0.02)
