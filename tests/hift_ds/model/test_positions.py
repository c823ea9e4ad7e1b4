"""The longest sequence of a model: one token more fails where a table has no row for it, and runs elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hift_ds.model.positions import position_limit

SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
SIDES = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16, "vocab_size": 64, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROWS = {"max_position_embeddings": 20}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA3: dict[str, Any] = {
    "text_config": {**SIZE, "head_dim": 8, "num_key_value_heads": 1, **ROWS},
    "vision_config": {**VISION, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"},  # 4 patches
    "mm_tokens_per_image": 4,
}
CLASSIFIER, DECODER = AutoModelForSequenceClassification, AutoModelForCausalLM

# architecture, class, configuration, longest sequence, whether one token more fails
MODELS = [
    ("bert", CLASSIFIER, {**SIZE, **ROWS}, 20, True),
    ("roberta", CLASSIFIER, {**SIZE, **ROWS, "pad_token_id": 1}, 18, True),
    ("roberta", CLASSIFIER, {**SIZE, **ROWS, "pad_token_id": 4}, 15, True),
    ("xlm-roberta", CLASSIFIER, {**SIZE, **ROWS, "pad_token_id": 1}, 18, True),
    ("camembert", DECODER, {**SIZE, **ROWS, "pad_token_id": 1, "is_decoder": True}, 18, True),
    ("mpnet", CLASSIFIER, {**SIZE, **ROWS}, 18, True),
    ("esm", CLASSIFIER, {**SIZE, **ROWS, "pad_token_id": 1, "position_embedding_type": "absolute"}, 18, True),
    ("esm", CLASSIFIER, {**SIZE, **ROWS, "pad_token_id": 1, "position_embedding_type": "rotary"}, 20, False),
    ("nystromformer", CLASSIFIER, {**SIZE, **ROWS, "num_landmarks": 4, "segment_means_seq_len": 4}, 20, True),
    ("opt", DECODER, {**SIZE, **ROWS, "ffn_dim": 16, "word_embed_proj_dim": 16}, 20, True),
    ("gpt2", DECODER, {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 20}, 20, True),
    ("openai-gpt", DECODER, {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 20}, 20, True),
    ("bart", CLASSIFIER, {**SIDES, **ROWS}, 20, True),
    ("whisper", DECODER, {**SIDES, "max_target_positions": 20, "max_source_positions": 12}, 20, True),
    ("llama", DECODER, {**SIZE, **ROWS}, 20, False),
    ("gemma3", DECODER, GEMMA3, 20, False),
    ("falcon", DECODER, {**SIZE, **ROWS, "alibi": True}, None, False),
    ("bloom", DECODER, {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64}, None, False),
    ("t5", CLASSIFIER, {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 64,
                        "n_positions": 8, "decoder_start_token_id": 0, "eos_token_id": 2}, None, False),
    ("xlnet", DECODER, {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "vocab_size": 64}, None, False),
    ("mamba", DECODER, {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 64, "state_size": 4}, None, False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "auto", "settings", "longest", "table"), MODELS, ids=[
    f"{kind} {longest}" for kind, _, _, longest, _ in MODELS
])  # fmt: skip
def test_the_longest_sequence(kind: str, auto: Any, settings: dict[str, Any], longest: int | None, table: bool) -> None:
    model = auto.from_config(AutoConfig.for_model(kind, **settings)).eval()
    limit = position_limit(model)
    assert limit == (longest, table)
    run(model, limit.tokens or 40)
    if not table:
        run(model, (limit.tokens or 40) + 1)
        return
    with pytest.raises((IndexError, RuntimeError)):
        run(model, limit.tokens + 1)


@torch.no_grad()
def run(model: Any, length: int) -> None:
    ids = torch.full((1, length), 5)
    ids[0, -1] = 2  # encoder-decoder models classify the end of a text
    model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_it_is_the_same_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = CLASSIFIER.from_config(AutoConfig.for_model("roberta", **SIZE, **ROWS, pad_token_id=1))
    assert position_limit(model) == (18, True)
