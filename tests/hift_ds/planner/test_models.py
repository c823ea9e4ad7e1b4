"""What the planner plans whole, what it refuses, and what it says about a model."""

import json
from pathlib import Path
from typing import Any

import pytest

from hift_ds.config import ConfigError
from hift_ds.planner import simulation
from hift_ds.planner.api import plan_memory
from hift_ds.planner.command import main
from hift_ds.planner.plan import Planner
from hift_ds.planner.request import Request
from tests.support.pairwise import others_slow

TEXT = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA = {"model_type": "llama", **TEXT}
ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
VISION = {**ENCODER, "image_size": 224, "patch_size": 14}
GEMMA3 = {
    "model_type": "gemma3", "mm_tokens_per_image": 16, "vision_config": {"model_type": "siglip_vision_model", **VISION},
    "text_config": {"model_type": "gemma3_text", **TEXT, "head_dim": 16, "max_position_embeddings": 4096},
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"model_type": "t5"}, "t5 is an encoder-decoder"),
        ({"model_type": "bart"}, "bart is an encoder-decoder"),
        ({"model_type": "m2m_100"}, "m2m_100 is an encoder-decoder"),
        ({"model_type": "whisper"}, "whisper is an encoder-decoder"),
        ({"model_type": "wav2vec2"}, "no wav2vec2 as causal-lm .*; use a model that reads and predicts text"),
        ({"model_type": "hubert"}, "no hubert as causal-lm"),
        ({"model_type": "clip"}, "no clip as causal-lm"),
        ({"model_type": "llava"}, "no llava as causal-lm .*save its text_config as a file"),
        ({"model_type": "idefics3"}, "no idefics3 as causal-lm .*save its text_config as a file"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({**LLAMA, "quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_cannot_be_planned_whole_is_refused(model: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        plan_memory(model, seq_len=16)
    assert len(caught.value.problems) == 1 and "try another precision" not in str(caught.value)


def test_the_text_model_of_a_refused_model_can_be_planned(tmp_path: Path) -> None:
    """The remedy of the error, followed."""
    from transformers import AutoConfig

    llava = AutoConfig.for_model("llava", text_config=LLAMA)
    file = tmp_path / "text.json"
    file.write_text(json.dumps(llava.get_text_config().to_dict()))
    assert plan_memory(str(file), seq_len=16).total_parameters == plan_memory(LLAMA, seq_len=16).total_parameters


def test_a_masked_language_model_is_said_to_be_planned_as_a_classifier() -> None:
    notes = plan_memory({"model_type": "bert", **ENCODER, "architectures": ["BertForMaskedLM"]}, seq_len=16).notes
    assert any("names BertForMaskedLM; the plan is for BertForSequenceClassification" in note for note in notes)
    assert not any("names" in note for note in plan_memory(LLAMA | {"architectures": ["LlamaForCausalLM"]}).notes)


@pytest.mark.parametrize(("offload_param", "shares"), [("none", 1), ("cpu", 1.5)])
def test_what_loading_takes_at_zero_3(offload_param: str, shares: float) -> None:
    """The embedding is nearly the whole model: a rank holds it, and with weights on the host also a half of all."""
    wide = LLAMA | {"vocab_size": 262_144, "hidden_size": 2048, "tie_word_embeddings": True}
    plan = plan_memory(wide, seq_len=16, zero_stage=3, ranks=2, offload_param=offload_param)
    (note,) = (note for note in plan.notes if note.startswith("while launch/train.py loads files"))
    size = 2 * plan.total_parameters / 2**30
    assert float(note.split()[-2]) == pytest.approx(shares * size, rel=0.06)


# --- more than one tower ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hift", "full"])
def test_a_tower_that_no_text_reaches_is_held_and_not_trained(method: str) -> None:
    """The text has 4096 positions, the tower 256 patches."""
    plan = plan_memory(GEMMA3, seq_len=1024, method=method, zero_stage=2, offload_optimizer="cpu")
    sizes = {"tower": 0, "text": 0}
    for name, shape in Planner(Request(GEMMA3)).build(Request(GEMMA3)).shapes.items():
        numel = 1
        for dimension in shape:
            numel *= dimension
        sizes["text" if "language_model" in name or "lm_head" in name else "tower"] += numel
    assert plan.total_parameters == sum(sizes.values()) and sizes["tower"] > 100_000
    assert plan.device["parameters"] == 2 * plan.total_parameters
    assert plan.host["master_weights"] == 4 * sizes["text"]
    if method == "hift":
        assert plan.freeze == ["model.vision_tower.*", "model.multi_modal_projector.*"]
        assert any('set hift.freeze to ["model.vision_tower.*"' in note for note in plan.notes)
        assert not any("vision" in block.name for block in plan.blocks)


def test_the_written_config_freezes_the_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = tmp_path / "config.json", tmp_path / "ds.json"
    model.write_text(json.dumps(GEMMA3))
    assert main(["--model", str(model), "--seq-len", "64", "--write-config", str(file), "--json"]) == 0
    freeze = ["model.vision_tower.*", "model.multi_modal_projector.*"]
    assert json.loads(file.read_text())["hift"]["freeze"] == freeze == json.loads(capsys.readouterr().out)["freeze"]


# --- positions ----------------------------------------------------------------------------------------------------


def test_more_tokens_than_rotary_positions_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "config.json"
    model.write_text(json.dumps(LLAMA))
    assert main(["--model", str(model), "--seq-len", "900", "--gpu-memory", "4GiB"]) == 0
    shown = capsys.readouterr().out
    assert "the model has 512 positions, fewer than the 900 tokens" in shown and "launch/train.py takes no" in shown
    assert "at most 512 tokens, the positions of the model; memory would allow" in shown
    plan = plan_memory(LLAMA, seq_len=512, gpu_memory="4GiB")
    assert not any("positions" in note for note in plan.notes) and plan.fit is not None
    assert plan.fit["positions"] == 512 and plan.fit["longest_sequence"] > 512


@pytest.mark.parametrize(
    ("model", "most"),
    [
        ({"model_type": "roberta", **ENCODER, "max_position_embeddings": 66, "pad_token_id": 1}, 64),
        ({"model_type": "opt", **ENCODER, "max_position_embeddings": 64}, 64),
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, 64),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_learned_positions_are_a_limit(model: dict[str, Any], most: int) -> None:
    with pytest.raises(ConfigError, match=f"the model has {most} positions; use at most {most}"):
        plan_memory(model, seq_len=most + 1)
    assert plan_memory(model, seq_len=most).positions == most


# --- huge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"batch_size": 10**6}, {"seq_len": 10**9}, {"batch_size": 999_999, "seq_len": 8}])
def test_huge_batches_take_as_few_operations_as_small_ones(options: dict[str, int]) -> None:
    small, huge = Planner(Request(LLAMA, seq_len=64)), Planner(Request(LLAMA, **options))
    small.plan(small.request)
    plan = huge.plan(huge.request)
    assert huge.operations < 3 * small.operations
    tokens = huge.request.batch_size * huge.request.seq_len
    assert plan.device["activations"] > tokens * 64 * 2 * 4 and plan.extrapolated_from is None


def test_more_elements_than_can_be_counted_are_refused() -> None:
    with pytest.raises(ConfigError, match="more elements than PyTorch can count; use fewer tokens"):
        plan_memory(LLAMA, batch_size=2**31 - 1, seq_len=2**31 - 1)


SHORT_AND_LONG = [(1, 300, 64), (3, 171, 32), (2, 12, 1)]  # sequences, tokens of each, tokens of a chunk
WAYS: list[dict[str, Any]] = [{}, {"method": "full"}, {"activation_checkpointing": True, "zero_stage": 3}]


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "chunk", "options"),
    others_slow(
        [(*tokens, options) for tokens in SHORT_AND_LONG for options in WAYS],
        [(*tokens, options) for tokens, options in zip(SHORT_AND_LONG, WAYS, strict=True)],
    ),
)
def test_a_few_pieces_of_the_logits_have_the_peaks_of_all(
    batch_size: int, seq_len: int, chunk: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(LLAMA | {"vocab_size": 4096}, "hift", batch_size=batch_size, seq_len=seq_len, loss_chunk=chunk)
    request = Request(**{**vars(request), **options})

    def peaks() -> list[int]:
        planner = Planner(request)
        steps = [planner.simulate(request, block).peaks for block in planner.build(request).bounding_blocks()]
        return [sum(sizes.values()) for phases in steps for sizes in phases.values()]

    few = peaks()
    monkeypatch.setattr(simulation, "_FewPieces", simulation.Pieces)
    for planned, simulated in zip(few, peaks(), strict=True):
        assert simulated <= planned <= 1.002 * simulated
