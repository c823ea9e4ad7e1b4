"""Tiny models with parts that text does not reach, as configurations of transformers and as folders."""

from pathlib import Path
from typing import Any

import torch

SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SIZE | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "vocab_size": 262,
               "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
VISION = SIZE | {"image_size": 28, "patch_size": 14}
GEMMA3 = {
    "text_config": TEXT | {"model_type": "gemma3_text", "sliding_window": 8},
    "vision_config": VISION | {"model_type": "siglip_vision_model"},
    "mm_tokens_per_image": 4,
}
BART = {"d_model": 16, "vocab_size": 262, "max_position_embeddings": 512, "decoder_start_token_id": 1,
        **{f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "attention_heads")},
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
TOWER = ("model.vision_tower.", "model.multi_modal_projector.")


def save_model(folder: Path, kind: str, config: dict[str, Any], task: str = "CausalLM") -> dict[str, torch.Tensor]:
    """Write a model of random weights and the byte tokenizer; return its weights by their names in the file."""
    import transformers
    from safetensors.torch import load_file

    from hift_ds.launch.model.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{task}")
    auto.from_config(transformers.AutoConfig.for_model(kind, **config)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def save_gemma3_processor(folder: Path) -> None:
    """Write a Gemma 3 processor around the byte tokenizer."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    from hift_ds.launch.model.tokenizer import CHAT_TEMPLATE, byte_tokenizer

    tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    images = {"boi_token": "<|system|>", "image_token": "<|user|>", "eoi_token": "<|assistant|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer, extra_special_tokens=images, **tokens
    )
    reader = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    Gemma3Processor(reader, tokenizer, image_seq_length=4).save_pretrained(folder)
