"""A model that is large beside the memory of Python itself, in files as from the Hub, for measurements of memory."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hift_ds.launch.model.tokenizer import byte_tokenizer


def save(folder: Path, hidden: int, layers: int, dtype: torch.dtype = torch.bfloat16, shards: str = "50GB") -> int:
    """Write a Llama of random weights, and a tokenizer. With 20 layers, no tensor has more than a hundredth of it.

    Returns:
        The number of its parameters.
    """
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config).to(dtype)
    llama.to_empty(device="cpu")
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    llama.save_pretrained(folder, max_shard_size=shards)
    tokenizer.save_pretrained(folder)
    return llama.num_parameters()
