"""What a training costs: FLOPs by counting weights against hand computation, and the peak of a process's memory."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hift_ds.evaluation.cost.flops import forward_flops, training_flops
from hift_ds.evaluation.cost.process_memory import peak_memory

V, D, FF, KV, L = 11, 8, 12, 4, 2
LAYER = 2 * D * D + 2 * D * KV + 3 * D * FF  # weights in products


@pytest.fixture(scope="module")
def llama() -> Any:
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=FF, num_hidden_layers=L, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def names_of(model: nn.Module, *parts: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if not parts or any(part in name for part in parts)]


def test_flops_of_a_stack() -> None:
    stack = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7, bias=False))
    assert forward_flops(stack, 10, 0) == 10 * 2 * (15 + 35)
    everything = 10 * 2 * (15 + 35) * 3 - 10 * 2 * 15  # nobody needs the gradient of the input
    assert training_flops(stack, names_of(stack), 10, 0) == everything
    assert training_flops(stack, ["2.weight"], 10, 0) == 10 * 2 * (15 + 35 + 35)
    assert training_flops(stack, ["0.bias"], 10, 0) == 10 * 2 * (15 + 35 + 35)  # through the upper one, to no weight
    assert training_flops(stack, [], 10, 0) == forward_flops(stack, 10, 0)


def test_flops_of_llama(llama: Any) -> None:
    tokens, predicted = 100, 30
    products = 2 * (L * LAYER * tokens + V * D * predicted)
    assert forward_flops(llama, tokens, predicted) == products
    assert training_flops(llama, names_of(llama), tokens, predicted) == 3 * products
    head = 2 * V * D * predicted
    assert training_flops(llama, names_of(llama, "lm_head"), tokens, predicted) == products + head
    top = training_flops(llama, names_of(llama, "model.norm", "lm_head"), tokens, predicted)
    assert top == products + 2 * head  # HiFT's highest block
    layer = 2 * LAYER * tokens
    q, k, v = 2 * D * D * tokens, 2 * D * KV * tokens, 2 * D * KV * tokens
    upper = training_flops(llama, names_of(llama, "layers.1"), tokens, predicted)
    assert upper == products + head + 2 * layer - q  # the first product of the lowest layer; its others have one below
    assert k == v < q
    bottom = training_flops(llama, names_of(llama, "embed_tokens"), tokens, predicted)
    assert bottom == 2 * products  # no weight's gradient in a product, all inputs'


def test_flops_of_tied_weights() -> None:
    """The head's product has a gradient where the embeddings are trained."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=FF, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with_head = training_flops(model, ["model.embed_tokens.weight"], 10, 10)
    products = forward_flops(model, 10, 10)
    assert with_head == 2 * products + 2 * V * D * 10


def test_peak_memory_of_a_stretch_of_work() -> None:
    """What is alive for a while counts, what was before does not, and of a number of things the sum."""
    before = torch.ones(2**23)
    garbage = [torch.ones(2**22)]
    garbage.append(garbage)  # only the collector frees it
    del garbage
    with peak_memory() as peak:
        gc.collect()
        for _ in range(3):
            some = [torch.ones(2**22), torch.ones(2**22)]  # 16 MiB each
            time.sleep(0.2)  # the sampler must see it
            del some
    # Two rounds together would be twice as much. The allocator may keep one tensor of the round before.
    assert len(before) == 2**23 and 2**25 * 0.9 < peak.above < 2**25 * 1.9
    assert "above its start" in peak.kind


def test_pages_that_were_freed_before_hide_nothing() -> None:
    """Small pieces, which the allocator keeps among others that are alive."""
    pieces = [torch.ones(2**13) for _ in range(2**12)]  # 32 KiB each
    kept = pieces[::64]
    del pieces
    with peak_memory() as peak:
        again = [torch.ones(2**13) for _ in range(2**11)]
    assert len(kept) + len(again) == 2**6 + 2**11 and 2**26 * 0.9 < peak.above < 2**26 * 1.5
