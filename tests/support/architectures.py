"""Small models of many architectures of transformers, with the layers that HiFT should see in each.

Only depths are set: on the meta device width costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LM, SEQ2SEQ, CLS, BASE = "CausalLM", "Seq2SeqLM", "SequenceClassification", ""
IMAGE, TEXT_IMAGE, CTC, SPEECH = "ImageClassification", "ImageTextToText", "CTC", "SpeechSeq2Seq"


@dataclass(frozen=True)
class Architecture:
    """``embeddings`` and ``head`` are module or parameter paths, all that the first and last layer should hold."""

    model_type: str
    task: str  # AutoModelFor<task>, AutoModel for ""
    config: dict[str, Any]
    hidden: int
    embeddings: str
    head: str
    attached: dict[str, str] = field(default_factory=dict)  # path outside of the layers -> its hidden layer
    label: str = ""

    def __str__(self) -> str:
        return f"{self.model_type}{self.label}-{self.task or 'base'}"


def _llama_like(model_type: str, tied: bool = False, **config: Any) -> Architecture:
    head = "model.norm" if tied else "model.norm lm_head"
    return Architecture(model_type, LM, {"num_hidden_layers": 3, **config}, 3, "model.embed_tokens", head)


def _bert_like(model_type: str, prefix: str, head: str, layers: str = "num_hidden_layers") -> Architecture:
    return Architecture(model_type, CLS, {layers: 3}, 3, f"{prefix}.embeddings", head)


def _encoder_decoder(model_type: str, embeddings: str, head: str, norm: str = "", **config: Any) -> Architecture:
    """Two encoder and three decoder layers; ``norm``: the encoder's final norm, which goes with its last layer."""
    attached = {norm: norm.rpartition(".")[0] + ".layers.1"} if norm else {}
    config = {"encoder_layers": 2, "decoder_layers": 3, **config}
    return Architecture(model_type, SEQ2SEQ, config, 5, embeddings, head, attached)


def _t5_like(model_type: str, **config: Any) -> Architecture:
    config = {"num_layers": 2, "num_decoder_layers": 3, **config}
    attached = {"encoder.final_layer_norm": "encoder.block.1"}
    return Architecture(model_type, SEQ2SEQ, config, 5, "shared", "decoder.final_layer_norm", attached)


def _vision_language(model_type: str, vision: str, projector: str, embeddings: str, **config: Any) -> Architecture:
    """Two vision layers, then three of the language model; ``vision``: the path of the vision layers."""
    config = {"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 3}, **config}
    head = "model.language_model.norm" + ("" if config.get("tie_word_embeddings") else " lm_head")
    embeddings += " model.language_model.embed_tokens"
    return Architecture(model_type, TEXT_IMAGE, config, 5, embeddings, head, {projector: f"{vision}.1"})


_RESNET = {"model_type": "resnet", "depths": [1, 1, 1, 2], "out_features": ["stage4"]}
_CLIP_TOWER = "model.vision_tower.embeddings model.vision_tower.pre_layrnorm"
_SPEECH_FRONT = "{0}.masked_spec_embed {0}.feature_extractor {0}.feature_projection {0}.encoder.pos_conv_embed"

# fmt: off
ARCHITECTURES = [
    # --- decoders
    _llama_like("llama"),
    _llama_like("mistral"),
    _llama_like("qwen2"),
    _llama_like("qwen3"),
    _llama_like("phi3"),
    _llama_like("olmo2"),
    _llama_like("stablelm"),
    _llama_like("nemotron", num_key_value_heads=2, num_attention_heads=4),
    _llama_like("glm4"),
    _llama_like("gemma2", tied=True),
    _llama_like("gemma3_text", tied=True),
    _llama_like("cohere", tied=True),
    _llama_like("starcoder2", tied=True),
    _llama_like("smollm3", tied=True),
    _llama_like("llama", tied=True, tie_word_embeddings=True),
    Architecture("olmo", LM, {"num_hidden_layers": 3}, 3, "model.embed_tokens", "lm_head"),
    Architecture("phi", LM, {"num_hidden_layers": 3}, 3, "model.embed_tokens", "model.final_layernorm lm_head"),
    Architecture("gpt2", LM, {"n_layer": 3}, 3, "transformer.wte transformer.wpe", "transformer.ln_f"),
    Architecture(
        "gpt_neo", LM, {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}, 2,
        "transformer.wte transformer.wpe", "transformer.ln_f",
    ),
    Architecture("gptj", LM, {"n_layer": 3}, 3, "transformer.wte", "transformer.ln_f lm_head"),
    Architecture(
        "gpt_neox", LM, {"num_hidden_layers": 1}, 1, "gpt_neox.embed_in", "gpt_neox.final_layer_norm lm_head"
    ),
    Architecture("codegen", LM, {"n_layer": 3}, 3, "transformer.wte", "transformer.ln_f lm_head"),
    Architecture("gpt_bigcode", LM, {"n_layer": 3}, 3, "transformer.wte transformer.wpe", "transformer.ln_f"),
    Architecture("falcon", LM, {"num_hidden_layers": 3}, 3, "transformer.word_embeddings", "transformer.ln_f"),
    Architecture(
        "bloom", LM, {"n_layer": 3}, 3,
        "transformer.word_embeddings transformer.word_embeddings_layernorm", "transformer.ln_f",
    ),
    Architecture("mpt", LM, {"n_layers": 3}, 3, "transformer.wte", "transformer.norm_f"),
    Architecture("ctrl", LM, {"n_layer": 3}, 3, "transformer.w", "transformer.layernorm lm_head"),
    Architecture("openai-gpt", LM, {"n_layer": 3}, 3, "transformer.tokens_embed transformer.positions_embed", ""),
    Architecture("xglm", LM, {"num_layers": 3}, 3, "model.embed_tokens", "model.layer_norm"),
    Architecture(
        "biogpt", LM, {"num_hidden_layers": 3}, 3, "biogpt.embed_tokens biogpt.embed_positions", "biogpt.layer_norm"
    ),
    Architecture(
        "opt", LM, {"num_hidden_layers": 3}, 3,
        "model.decoder.embed_tokens model.decoder.embed_positions", "model.decoder.final_layer_norm",
    ),
    Architecture(  # OPT-350M's shape: projections around the stack, no final norm
        "opt", LM, {"num_hidden_layers": 3, "word_embed_proj_dim": 512, "do_layer_norm_before": False}, 3,
        "model.decoder.embed_tokens model.decoder.embed_positions model.decoder.project_in",
        "model.decoder.project_out", label="-350m",
    ),
    Architecture(
        "xlnet", LM, {"n_layer": 3}, 3, "transformer.mask_emb transformer.word_embedding", "lm_loss"
    ),
    Architecture(
        "reformer", LM, {"is_decoder": True, "attn_layers": ["local", "lsh", "local"]}, 3,
        "reformer.embeddings", "reformer.encoder.layer_norm lm_head",
    ),
    # --- mixtures of experts
    _llama_like("mixtral"),
    _llama_like("qwen2_moe"),
    _llama_like("qwen3_moe"),
    _llama_like("deepseek_v2"),
    _llama_like("deepseek_v3"),
    _llama_like("gpt_oss"),
    _llama_like("olmoe"),
    _llama_like("granitemoe"),
    _llama_like("phimoe"),
    _llama_like("llama4_text"),
    Architecture("longcat_flash", LM, {"num_layers": 3}, 3, "model.embed_tokens", "model.norm lm_head"),
    _t5_like("switch_transformers"),
    _encoder_decoder("nllb-moe", "model.shared", "model.decoder.layer_norm", "model.encoder.layer_norm"),
    # --- state-space and hybrid
    Architecture("mamba", LM, {"num_hidden_layers": 3}, 3, "backbone.embeddings", "backbone.norm_f"),
    Architecture("mamba2", LM, {"num_hidden_layers": 3}, 3, "backbone.embeddings", "backbone.norm_f lm_head"),
    Architecture("falcon_mamba", LM, {"num_hidden_layers": 3}, 3, "backbone.embeddings", "backbone.norm_f"),
    Architecture("rwkv", LM, {"num_hidden_layers": 3}, 3, "rwkv.embeddings", "rwkv.ln_out head"),
    Architecture("xlstm", LM, {"num_hidden_layers": 3}, 3, "backbone.embeddings", "backbone.out_norm lm_head"),
    Architecture(
        "jamba", LM, {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}, 4,
        "model.embed_tokens", "model.final_layernorm lm_head",
    ),
    Architecture(
        "bamba", LM, {"num_hidden_layers": 3, "attn_layer_indices": [1]}, 3,
        "model.embed_tokens", "model.final_layernorm lm_head",
    ),
    Architecture("falcon_h1", LM, {"num_hidden_layers": 3}, 3, "model.embed_tokens", "model.final_layernorm lm_head"),
    Architecture(  # one transformer layer shared by two hybrid layers: its weights belong to the first of them
        "zamba", LM, {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}, 4,
        "model.embed_tokens", "model.final_layernorm",
    ),
    Architecture(
        "recurrent_gemma", LM, {"num_hidden_layers": 3}, 3, "model.embed_tokens", "model.final_norm"
    ),
    _llama_like("qwen3_next", num_hidden_layers=3),
    Architecture("lfm2", LM, {"num_hidden_layers": 3}, 3, "model.embed_tokens", "model.embedding_norm"),
    Architecture(
        "nemotron_h", LM, {"layers_block_type": ["mamba", "attention", "moe"]}, 3,
        "model.embeddings", "model.norm_f lm_head",
    ),
    # --- encoders
    _bert_like("bert", "bert", "bert.pooler classifier"),
    _bert_like("roberta", "roberta", "classifier"),
    _bert_like("xlm-roberta", "roberta", "classifier"),
    _bert_like("deberta-v2", "deberta", "pooler classifier"),
    _bert_like("distilbert", "distilbert", "pre_classifier classifier", layers="n_layers"),
    _bert_like("longformer", "longformer", "classifier"),
    _bert_like("fnet", "fnet", "fnet.pooler classifier"),
    _bert_like("mobilebert", "mobilebert", "mobilebert.pooler classifier"),
    _bert_like("squeezebert", "transformer", "transformer.pooler classifier"),
    Architecture(
        "bert", LM, {"num_hidden_layers": 3, "is_decoder": True}, 3, "bert.embeddings", "cls", label="-decoder"
    ),
    Architecture(
        "deberta-v2", CLS,
        {"num_hidden_layers": 3, "relative_attention": True, "norm_rel_ebd": "layer_norm", "position_buckets": 8}, 3,
        "deberta.embeddings deberta.encoder.rel_embeddings deberta.encoder.LayerNorm", "pooler classifier",
        label="-relative",
    ),
    Architecture(
        "electra", CLS, {"num_hidden_layers": 3}, 3, "electra.embeddings electra.embeddings_project", "classifier"
    ),
    Architecture(  # one layer, used 12 times
        "albert", CLS, {}, 1,
        "albert.embeddings albert.encoder.embedding_hidden_mapping_in", "albert.pooler classifier",
    ),
    Architecture(
        "mpnet", CLS, {"num_hidden_layers": 3}, 3,
        "mpnet.embeddings mpnet.encoder.relative_attention_bias", "classifier",
    ),
    Architecture(
        "modernbert", CLS, {"num_hidden_layers": 3}, 3, "model.embeddings", "model.final_norm head classifier"
    ),
    Architecture("funnel", CLS, {"block_sizes": [1, 2, 2]}, 5, "funnel.embeddings", "classifier"),
    Architecture(  # three encoders in a row
        "canine", CLS, {"num_hidden_layers": 2}, 4, "canine.char_embeddings", "canine.pooler classifier",
        {
            "canine.chars_to_molecules": "canine.initial_char_encoder.layer.0",
            "canine.projection": "canine.encoder.layer.1",
        },
    ),
    Architecture(  # each layer's parts are in four parallel lists
        "xlm", LM, {"n_layers": 3}, 3,
        "transformer.position_embeddings transformer.embeddings transformer.layer_norm_emb", "pred_layer.proj.bias",
    ),
    # --- encoder-decoders
    _t5_like("t5"),
    _t5_like("longt5"),
    _t5_like("umt5"),
    _encoder_decoder(
        "bart",
        "model.shared model.encoder.embed_positions model.encoder.layernorm_embedding "
        "model.decoder.embed_positions model.decoder.layernorm_embedding", "",
    ),
    _encoder_decoder(
        "mbart",
        "model.shared model.encoder.embed_positions model.encoder.layernorm_embedding "
        "model.decoder.embed_positions model.decoder.layernorm_embedding",
        "model.decoder.layer_norm", "model.encoder.layer_norm",
    ),
    _encoder_decoder("pegasus", "model.shared", "model.decoder.layer_norm", "model.encoder.layer_norm"),
    _encoder_decoder("m2m_100", "model.shared", "model.decoder.layer_norm", "model.encoder.layer_norm"),
    _encoder_decoder("marian", "model.shared", ""),
    Architecture(
        "prophetnet", SEQ2SEQ, {"num_encoder_layers": 2, "num_decoder_layers": 3}, 5,
        "prophetnet.word_embeddings prophetnet.encoder.position_embeddings prophetnet.encoder.embeddings_layer_norm "
        "prophetnet.decoder.position_embeddings prophetnet.decoder.ngram_embeddings "
        "prophetnet.decoder.embeddings_layer_norm", "",
    ),
    Architecture(  # the final norms are registered before the layers
        "t5gemma", SEQ2SEQ, {"encoder": {"num_hidden_layers": 2}, "decoder": {"num_hidden_layers": 3}}, 5,
        "model.encoder.embed_tokens model.decoder.embed_tokens", "model.decoder.norm",
        {"model.encoder.norm": "model.encoder.layers.1"},
    ),
    Architecture(
        "encoder-decoder", SEQ2SEQ,
        {
            "encoder": {"model_type": "bert", "num_hidden_layers": 2},
            "decoder": {"model_type": "gpt2", "n_layer": 3, "add_cross_attention": True},
        }, 5,
        "encoder.embeddings decoder.transformer.wte decoder.transformer.wpe", "decoder.transformer.ln_f",
        {"encoder.pooler": "encoder.encoder.layer.1"},
    ),
    # --- vision
    Architecture("vit", IMAGE, {"num_hidden_layers": 3}, 3, "vit.embeddings", "vit.layernorm classifier"),
    Architecture("deit", BASE, {"num_hidden_layers": 3}, 3, "embeddings", "layernorm pooler"),
    Architecture("beit", IMAGE, {"num_hidden_layers": 3}, 3, "beit.embeddings", "beit.pooler classifier"),
    Architecture("dinov2", IMAGE, {"num_hidden_layers": 3}, 3, "dinov2.embeddings", "dinov2.layernorm classifier"),
    Architecture(
        "swin", IMAGE, {"depths": [1, 1, 2, 1], "num_heads": [3, 6, 12, 24]}, 5,
        "swin.embeddings", "swin.layernorm classifier",
        {"swin.encoder.layers.0.downsample": "swin.encoder.layers.0.blocks.0"},
    ),
    Architecture(
        "convnext", IMAGE, {"depths": [1, 1, 2, 1]}, 5, "convnext.embeddings", "convnext.layernorm classifier",
        {"convnext.encoder.stages.2.downsampling_layer": "convnext.encoder.stages.2.layers.0"},
    ),
    Architecture("resnet", IMAGE, {"depths": [1, 1, 2, 1]}, 5, "resnet.embedder", "classifier"),
    Architecture("regnet", IMAGE, {"depths": [1, 1, 2, 1]}, 5, "regnet.embedder", "classifier"),
    Architecture(  # the last stage's projections after its transformer layers are no head
        "mobilevit", IMAGE, {}, 13, "mobilevit.conv_stem", "mobilevit.conv_1x1_exp classifier",
        {"mobilevit.encoder.layer.4.fusion": "mobilevit.encoder.layer.4.transformer.layer.2"},
    ),
    Architecture(  # stages and embeddings take turns in one list
        "swiftformer", IMAGE, {"depths": [1, 1, 2, 1]}, 5,
        "swiftformer.patch_embed swiftformer.encoder.network.1 swiftformer.encoder.network.3 "
        "swiftformer.encoder.network.5", "norm head dist_head",
    ),
    Architecture("mobilenet_v2", IMAGE, {}, 16, "mobilenet_v2.conv_stem", "mobilenet_v2.conv_1x1 classifier"),
    Architecture("mobilenet_v1", IMAGE, {}, 26, "mobilenet_v1.conv_stem", "classifier"),
    Architecture(
        "vit_mae", "PreTraining", {"num_hidden_layers": 2, "decoder_num_hidden_layers": 3}, 5,
        "vit.embeddings decoder.mask_token decoder.decoder_embed",
        "decoder.decoder_norm decoder.decoder_pred", {"vit.layernorm": "vit.layers.1"},
    ),
    Architecture(  # DETR freezes its ResNet; the projection out of it is left of the last ResNet layer
        "detr", "ObjectDetection",
        {"use_timm_backbone": False, "backbone_config": _RESNET, "encoder_layers": 2, "decoder_layers": 2}, 5,
        "model.query_position_embeddings", "model.decoder.layernorm class_labels_classifier bbox_predictor",
        {"model.input_projection": "model.backbone.model.encoder.stages.3.layers.1"},
    ),
    # --- audio
    # A LayerNorm that is registered before the layers, and whose name does not say that it is the final one, goes
    # with the embeddings. That is how wav2vec2 runs; in the conformer and in "stable" variants it runs last.
    Architecture(
        "wav2vec2", CTC, {"num_hidden_layers": 3}, 3,
        _SPEECH_FRONT.format("wav2vec2") + " wav2vec2.encoder.layer_norm", "lm_head",
    ),
    Architecture(
        "hubert", CTC, {"num_hidden_layers": 3}, 3,
        _SPEECH_FRONT.format("hubert") + " hubert.encoder.layer_norm", "lm_head",
    ),
    Architecture(
        "wav2vec2-conformer", CTC, {"num_hidden_layers": 3, "vocab_size": 32}, 3,
        _SPEECH_FRONT.format("wav2vec2_conformer") + " wav2vec2_conformer.encoder.layer_norm", "lm_head",
    ),
    Architecture(
        "whisper", SPEECH, {"encoder_layers": 2, "decoder_layers": 3}, 5,
        "model.encoder.conv1 model.encoder.conv2 model.decoder.embed_tokens model.decoder.embed_positions",
        "model.decoder.layer_norm", {"model.encoder.layer_norm": "model.encoder.layers.1"},
    ),
    Architecture(
        "speech_to_text", SPEECH, {"encoder_layers": 2, "decoder_layers": 3}, 5,
        "model.encoder.conv model.decoder.embed_tokens", "model.decoder.layer_norm",
        {"model.encoder.layer_norm": "model.encoder.layers.1"},
    ),
    Architecture("audio-spectrogram-transformer", BASE, {"num_hidden_layers": 3}, 3, "embeddings", "layernorm"),
    Architecture(
        "parakeet_ctc", CTC, {"encoder_config": {"num_hidden_layers": 3}}, 3, "encoder.subsampling", "ctc_head"
    ),
    # --- several modalities
    Architecture(
        "clip", BASE, {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 3}}, 5,
        "text_model.embeddings vision_model.embeddings vision_model.pre_layrnorm",
        "logit_scale vision_model.post_layernorm visual_projection text_projection",
        {"text_model.final_layer_norm": "text_model.encoder.layers.1"},
    ),
    Architecture(
        "siglip", BASE, {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 3}}, 5,
        "text_model.embeddings vision_model.embeddings",
        "logit_scale logit_bias vision_model.post_layernorm vision_model.head",
        {"text_model.head": "text_model.encoder.layers.1"},
    ),
    _vision_language("llava", "model.vision_tower.encoder.layers", "model.multi_modal_projector", _CLIP_TOWER),
    _vision_language(
        "llava_next", "model.vision_tower.encoder.layers", "model.multi_modal_projector",
        "model.image_newline " + _CLIP_TOWER,
    ),
    _vision_language(
        "paligemma", "model.vision_tower.encoder.layers", "model.multi_modal_projector",
        "model.vision_tower.embeddings", tie_word_embeddings=True,
        vision_config={"model_type": "siglip_vision_model", "num_hidden_layers": 2},
    ),
    _vision_language(
        "gemma3", "model.vision_tower.encoder.layers", "model.multi_modal_projector",
        "model.vision_tower.embeddings", tie_word_embeddings=True,
    ),
    _vision_language(
        "qwen2_vl", "model.visual.blocks", "model.visual.merger", "model.visual.patch_embed", vision_config={"depth": 2}
    ),
    _vision_language(
        "qwen3_vl", "model.visual.blocks", "model.visual.deepstack_merger_list",
        "model.visual.patch_embed model.visual.pos_embed", vision_config={"depth": 2},
    ),
    Architecture(  # the projector is registered after both towers
        "audioflamingo3", SEQ2SEQ,
        {"audio_config": {"num_hidden_layers": 2}, "text_config": {"model_type": "qwen2", "num_hidden_layers": 3}}, 5,
        "model.audio_tower.conv1 model.audio_tower.conv2 model.language_model.embed_tokens",
        "model.language_model.norm lm_head",
        {"model.multi_modal_projector": "model.audio_tower.layers.1"},
    ),
    Architecture(  # its convolutions are registered after the layers that they feed
        "qwen3_asr", SEQ2SEQ,
        {
            "audio_config": {"num_hidden_layers": 2, "encoder_layers": 2},
            "text_config": {"model_type": "qwen3", "num_hidden_layers": 3},
        }, 5,
        "model.audio_tower.conv2d1 model.audio_tower.conv2d2 model.audio_tower.conv2d3 "
        "model.language_model.embed_tokens", "model.language_model.norm",
        {"model.multi_modal_projector": "model.audio_tower.layers.1"},
    ),
    Architecture(
        "blip-2", TEXT_IMAGE,
        {
            "vision_config": {"num_hidden_layers": 2}, "qformer_config": {"num_hidden_layers": 2},
            "text_config": {"model_type": "opt", "num_hidden_layers": 3},
        }, 7,
        "query_tokens vision_model.embeddings qformer.layernorm language_model.model.decoder.embed_tokens "
        "language_model.model.decoder.embed_positions", "language_model.model.decoder.final_layer_norm",
        {
            "vision_model.post_layernorm": "vision_model.encoder.layers.1",
            "language_projection": "qformer.encoder.layer.1",
        },
    ),
    Architecture(
        "layoutlmv3", CLS, {"num_hidden_layers": 3}, 3,
        "layoutlmv3.cls_token layoutlmv3.pos_embed layoutlmv3.embeddings layoutlmv3.patch_embed layoutlmv3.LayerNorm "
        "layoutlmv3.norm layoutlmv3.encoder.rel_pos_bias layoutlmv3.encoder.rel_pos_x_bias "
        "layoutlmv3.encoder.rel_pos_y_bias", "classifier",
    ),
    Architecture("vilt", BASE, {"num_hidden_layers": 3}, 3, "embeddings", "layernorm pooler"),
    # --- other
    Architecture(
        "decision_transformer", BASE, {"n_layer": 3}, 3,
        "encoder.wte encoder.wpe embed_timestep embed_return embed_state embed_action embed_ln",
        "encoder.ln_f predict_state predict_action predict_return",
    ),
    Architecture(
        "time_series_transformer", BASE, {"prediction_length": 4, "encoder_layers": 2, "decoder_layers": 3}, 5,
        "encoder.value_embedding encoder.layernorm_embedding decoder.value_embedding decoder.layernorm_embedding", "",
    ),
]
