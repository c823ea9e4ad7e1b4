"""Examples that a model cannot take are refused before its weights are loaded, and what the message advises works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hift_ds.launch.data.encoding import EvalExample, Example
from hift_ds.launch.errors import UserError
from hift_ds.launch.model import loading
from hift_ds.launch.model.limits import check_limits
from hift_ds.launch.model.settings import ModelSettings
from hift_ds.launch.model.tokenizer import byte_tokenizer

SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 262}
CLASSIFY = "sequence-classification"


def model(kind: str, **keys: Any) -> Any:
    auto = AutoModelForCausalLM if kind == "llama" else AutoModelForSequenceClassification
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(kind, **{**SIZE, "pad_token_id": 1, **keys}))


def example(*ids: int, types: list[int] | None = None) -> Example:
    return Example(list(ids), 0, types)


def check(model: Any, tokenizer: Any, *train: Example, held_out: Any = (), answered: int = 0) -> list[str]:
    longest = max(len(one.input_ids) for one in train)
    examples = {"training": train, "held-out": held_out}
    found = {
        part: {
            "highest_token": max((token for one in own for token in one.input_ids), default=-1),
            "highest_type": max((kind for one in own for kind in one.token_type_ids or ()), default=-1),
        }
        for part, own in examples.items()
    }
    return check_limits(model, tokenizer, examples, found, longest, answered)


@pytest.mark.parametrize(("kind", "limit"), [("roberta", 64), ("bert", 66), ("llama", 66)])
def test_positions(kind: str, limit: int) -> None:
    one = model(kind, max_position_embeddings=66)
    assert check(one, byte_tokenizer(), example(*[9] * limit), answered=limit) == []
    with pytest.raises(UserError) as error:
        check(one, byte_tokenizer(), example(*[9] * 67), answered=70)
    lengths, answers = str(error.value).splitlines()
    assert f"Set data.max_length={limit} " in lengths and f"by at least {70 - limit}," in answers
    assert ("(2 of its 66 positions are for padding)" in lengths) == (kind == "roberta")


def larger_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|end|>"]})  # ids 262 and 263
    return tokenizer


def test_tokens_that_the_model_does_not_have() -> None:
    held_out = [EvalExample([9, 263], 0), EvalExample([9, 10], 0), EvalExample([262], 0)]
    with pytest.raises(UserError) as error:
        check(model("llama"), larger_tokenizer(), example(9, 262), example(9, 8), held_out=held_out)
    first, second, remedy = str(error.value).splitlines()
    assert "1 of 2 training examples" in first and "'<|tool|>' (id 262)" in first and "has 262 tokens" in first
    assert "2 of 3 held-out examples" in second and "'<|end|>' (id 263)" in second
    assert "resize_token_embeddings(264)" in remedy


def test_following_the_advice(tmp_path: Path) -> None:
    """The code in the message makes a model that takes the tokens."""
    small, tokenizer = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZE)), larger_tokenizer()
    small.save_pretrained(tmp_path / "old")
    with pytest.raises(UserError) as error:
        check(small, tokenizer, example(9, 262))
    code = re.search(r"(model = transformers.*)\. Then set", str(error.value))
    assert code is not None
    code_for_paths = code[1].replace("OLD", repr(str(tmp_path / "old"))).replace("NEW", repr(str(tmp_path / "new")))
    exec(code_for_paths, {"transformers": __import__("transformers")})
    assert check(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), tokenizer, example(9, 262)) == []


def test_tokens_that_no_example_uses() -> None:
    (note,) = check(model("llama"), larger_tokenizer(), example(9, 261))
    assert note.startswith("note: 2 tokens of the tokenizer have ids from 262")
    assert check(model("llama", vocab_size=300), larger_tokenizer(), example(9, 263)) == []


@pytest.mark.parametrize(("types", "refused"), [(2, False), (1, True), (0, False)])  # 0: no types, any is ignored
def test_token_types(types: int, refused: bool) -> None:
    given = (model("bert", type_vocab_size=types or 1), byte_tokenizer(), example(9, 10, types=[0, 1]))
    given[0].config.type_vocab_size = types
    if refused:
        with pytest.raises(UserError, match=r"the token types 0 to 1, but the model has 1 .* into one column"):
            check(*given)
    else:
        assert check(*given) == []


# Padding --------------------------------------------------------------------------------------------


def padded(tmp_path: Path, tokenizer: Any, kind: str, task: str, **keys: Any) -> tuple[Any, Any, list[str]]:
    """The configuration and tokenizer of a checkpoint as they are loaded, and what is said."""
    AutoConfig.for_model(kind, **{**SIZE, **keys}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, said = AutoTokenizer.from_pretrained(tmp_path), []
    settings = ModelSettings(name_or_path=str(tmp_path), task=task)
    return loading.load_config(settings, loaded, say=said.append), loaded, said


def with_pad(token: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = token  # a new one has the id 262
    return tokenizer


def test_a_padding_token_that_the_model_does_not_have(tmp_path: Path) -> None:
    _, tokenizer, said = padded(tmp_path, with_pad("[PAD]"), "llama", "causal-lm")
    assert tokenizer.pad_token == "<eos>"
    assert said == [
        "note: model.tokenizer: '<eos>' is the padding token instead of '[PAD]', whose id 262 the model does not have"
    ]
    larger = padded(tmp_path, with_pad("[PAD]"), "llama", "causal-lm", vocab_size=263)
    assert larger[1].pad_token == "[PAD]" and not larger[2]


def test_neither_padding_nor_end(tmp_path: Path) -> None:
    tokenizer = with_pad("[PAD]")
    tokenizer.eos_token = "[END]"
    with pytest.raises(UserError, match=r"padding token '\[PAD\]' has the id 26\d, but the model has 262 tokens"):
        padded(tmp_path, tokenizer, "llama", "causal-lm")


@pytest.mark.parametrize(
    ("kind", "pad_token_id", "expected"),
    [("roberta", 1, "<bos>"), ("llama", 2, "<eos>"), ("llama", None, "<pad>"), ("llama", -1, "<pad>")],
)
def test_classifiers_pad_with_the_token_that_they_take_for_padding(
    kind: str, pad_token_id: int | None, expected: str, tmp_path: Path
) -> None:
    config, tokenizer, said = padded(tmp_path, byte_tokenizer(), kind, CLASSIFY, pad_token_id=pad_token_id)
    assert tokenizer.pad_token == expected and config.pad_token_id == tokenizer.pad_token_id
    assert len(said) == (expected != "<pad>")


def test_language_models_pad_as_their_tokenizer_does(tmp_path: Path) -> None:
    config, tokenizer, said = padded(tmp_path, byte_tokenizer(), "llama", "causal-lm", pad_token_id=2)
    assert tokenizer.pad_token == "<pad>" and config.pad_token_id == 2 and not said


# Quantized weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "method"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "a method without a name"),
    ],
)
def test_quantized_checkpoints_are_refused_without_weights(keys: Any, method: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"are quantized \({method}\)") as error:
        padded(tmp_path, byte_tokenizer(), "llama", "causal-lm", **keys)
    assert str(error.value).startswith("model.name_or_path: ")
