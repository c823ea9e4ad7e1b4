"""Loading models: where generation stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig

from hift_ds.evaluation.cost.process_memory import peak_memory
from hift_ds.launch.model import weights
from hift_ds.launch.model.loading import load_model, stop_at
from hift_ds.launch.model.settings import ModelSettings
from tests.support import tiny


@pytest.mark.parametrize(
    ("known", "ends", "added", "stops"),
    [
        (2, [2], [], 2),
        (2, [5], [5], [2, 5]),
        ([2, 3], [3, 5], [5], [2, 3, 5]),
        (None, [5], [5], 5),
        (2, [], [], 2),
    ],
)
def test_generation_stops_where_training_ends_answers(
    known: Any, ends: list[int], added: list[int], stops: Any, tmp_path: Path
) -> None:
    model = tiny.model()
    model.generation_config.eos_token_id = known
    assert stop_at(model, ends) == added
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == stops
    # A model that writes nothing but 5 stops there, if it should.
    torch.nn.init.zeros_(loaded.model.embed_tokens.weight)
    loaded.lm_head = torch.nn.Linear(loaded.config.hidden_size, loaded.config.vocab_size)
    torch.nn.init.zeros_(loaded.lm_head.weight)
    loaded.lm_head.bias.data = torch.nn.functional.one_hot(torch.tensor(5), loaded.config.vocab_size).float()
    written = loaded.generate(torch.tensor([[7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 1:].tolist()
    assert written == ([5] if 5 in ends else [5] * 4)


def test_a_classifier_generates_nothing() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    assert stop_at(BertForSequenceClassification(BertConfig(vocab_size=16, **sizes)), [2]) == []


def test_a_model_comes_to_the_device_without_a_copy_in_host_memory(tmp_path: Path) -> None:
    """Weights on the meta device take no memory, as those on a GPU take none of the host's."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, vocab_size=512
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    settings = ModelSettings(name_or_path=str(tmp_path))
    above: dict[str | None, int] = {}
    with mock.patch.object(weights, "check_weights", lambda *_: []):  # which reads the values
        for device in ("meta", None, "meta"):  # the first time is that of imports and threads
            with peak_memory() as peak:
                model = load_model(settings, config, "float32", print, device)
            numel = sum(parameter.numel() for parameter in model.parameters())
            assert {parameter.device.type for parameter in model.parameters()} == {device or "cpu"}
            assert not any("_hf_hook" in vars(module) for module in model.modules())
            del model
            above[device] = peak.above
    assert above[None] >= 4 * numel > 60 * 2**20
    assert above["meta"] < 0.1 * above[None]
