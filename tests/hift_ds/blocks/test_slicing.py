"""Blocks finer than a layer: cut by module, tensor and rows, and evened out."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from hift_ds.blocks.block import Block
from hift_ds.blocks.partition import partition_model


def names_of(blocks: list[Block]) -> list[str]:
    return [block.name for block in blocks]


def check_finer(model: nn.Module, blocks: list[Block], limit: int) -> None:
    """Every element is in one block, none of which is larger than allowed; rows are alone in theirs, in order."""
    named = dict(model.named_parameters())
    covered: dict[str, int] = {}
    for block in blocks:
        numel = 0
        for name in block.parameter_names:
            start, stop = block.slices.get(name, (0, named[name].shape[0]))
            assert covered.get(name, 0) == start < stop, name
            covered[name] = stop
            numel += named[name][start:stop].numel()
        assert block.numel == numel <= limit, block.name
        assert not block.slices or set(block.slices) == set(block.parameter_names) and len(block.slices) == 1
    assert covered == {name: p.shape[0] for name, p in named.items() if p.requires_grad}
    assert len(set(names_of(blocks))) == len(blocks)


@pytest.mark.parametrize("m", [1, 2, 7])
@pytest.mark.parametrize("limit", [64, 321, 1000, 4097, 10**9])
def test_every_element_is_in_one_block_of_the_size_asked_for(m: int, limit: int) -> None:
    model = shaped(5, tied=False)
    blocks = partition_model(model, m, max_block_numel=limit)
    check_finer(model, blocks, limit)
    if limit == 10**9:
        assert blocks == partition_model(model, m)


def shaped(layers: int, tied: bool) -> nn.Module:
    """A Llama with a vocabulary that dwarfs its layers, without data."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=5000, tie_word_embeddings=tied, **sizes)
        )


def test_cuts_are_between_modules_then_tensors_then_rows() -> None:
    model = shaped(2, tied=False)  # a layer: attention 4 x 1024, feed-forward 3 x 2048, norms 2 x 32
    names = names_of(partition_model(model, max_block_numel=6200))
    assert names[0] == "embeddings: model.embed_tokens.weight[0:192]"
    layer = "model.layers.0: "
    assert [name for name in names if layer in name] == [
        layer + "self_attn + input_layernorm + post_attention_layernorm",
        layer + "mlp",
    ]
    names = names_of(partition_model(model, max_block_numel=4500))
    assert [name for name in names if layer in name] == [
        layer + "self_attn",
        layer + "mlp.gate_proj + mlp.up_proj",
        layer + "mlp.down_proj + input_layernorm + post_attention_layernorm",
    ]
    names = names_of(partition_model(model, max_block_numel=1024))
    assert layer + "mlp.up_proj.weight[32:64]" in names and layer + "self_attn.k_proj" in names


def test_a_part_is_named_by_its_innermost_module() -> None:
    names = names_of(partition_model(shaped(1, tied=False), max_block_numel=100_000))
    assert names[-3:] == ["head: model.norm", "head: lm_head.weight[0:2500]", "head: lm_head.weight[2500:5000]"]


def test_parts_are_as_even_as_they_can_be() -> None:
    blocks = partition_model(shaped(2, tied=False), max_block_numel=100_000)
    assert [block.slices.get("model.embed_tokens.weight") for block in blocks[:2]] == [(0, 2500), (2500, 5000)]


def test_balance_cuts_what_is_large_and_joins_what_is_small() -> None:
    model = shaped(6, tied=True)  # embeddings 160,000, a layer 10,304, the head 32
    whole = partition_model(model)
    assert [block.numel for block in whole] == [160_000, *[10_304] * 6, 32]
    blocks = partition_model(model, balance=True)
    check_finer(model, blocks, 10_304 * 9 // 8)
    assert names_of(blocks)[-1] == "model.layers.5 + head"
    assert max(block.numel for block in blocks) < 1.3 * min(block.numel for block in blocks)
    strict = partition_model(model, max_block_numel=10_304, balance=True)
    assert names_of(strict)[-1] == "head", "it would not be within the limit together with a layer"


def test_a_row_larger_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_block_numel=20: .*embed_tokens.weight \(32\).*at least"):
        partition_model(shaped(2, tied=True), max_block_numel=20)
