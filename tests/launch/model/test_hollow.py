"""A rank that gets its weights from another one loads none."""

import gc
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hift_ds.evaluation.cost.process_memory import anonymous, peak_memory
from hift_ds.launch.model.hollow import without_weights


def saved(folder: Path) -> LlamaForCausalLM:
    """A model of 70 MB, in bf16, whose input and output embeddings are the same."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=4096, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return model


def test_it_has_the_model_without_memory_for_it(tmp_path: Path) -> None:
    truth = saved(tmp_path)
    size = sum(parameter.nbytes for parameter in truth.parameters())
    assert size > 70 * 10**6
    with peak_memory():  # from here on, freed memory goes back to the system at once
        pass
    gc.collect()
    before = anonymous()
    with without_weights(), peak_memory() as peak:
        model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert anonymous() - before < 0.1 * size
    assert peak.above < 0.5 * size
    assert not any(parameter.any() for parameter in model.parameters())
    assert anonymous() - before < 0.1 * size  # to read zeros takes no memory
    named = {name: parameter.shape for name, parameter in truth.named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == named
    assert model.lm_head.weight is model.model.embed_tokens.weight
    whole = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, buffer in whole.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
    assert anonymous() - before > 1.9 * size  # in fp32
