"""Parameters that the loss does not depend on: found without data, and written as patterns that freeze exactly them."""

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import hift_ds
from hift_ds.model.reach import freeze_patterns, unreached_by_example, unreached_by_text, unreached_parameters
from tests.support import tiny
from tests.support.towers import BART, GEMMA3, SIZE, TEXT

LM = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OCR = {"hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
       "patch_size": 8, "output_channels": 8, "global_attn_indexes": [1], "window_size": 2}  # fmt: skip
MOE = TEXT | {"num_local_experts": 4, "num_experts_per_tok": 1}
# name -> model type, task, config, the patterns that freeze what text does not reach
CASES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "gemma3": ("gemma3", "CausalLM", GEMMA3, ["model.vision_tower.*", "model.multi_modal_projector.*"]),
    "gemma3 classifier": ("gemma3", "SequenceClassification", GEMMA3 | {"num_labels": 2, "pad_token_id": 0},
                          ["model.vision_tower.*", "model.multi_modal_projector.*"]),
    "got_ocr2": ("got_ocr2", "CausalLM", {"text_config": TEXT | {"model_type": "qwen2"}, "vision_config": OCR},
                 ["model.vision_tower.*", "model.multi_modal_projector.*"]),
    "a decoder's cross-attention": ("bart", "CausalLM", BART, ["model.decoder.layers.*.encoder_attn.*",
                                                              "model.decoder.layers.*.encoder_attn_layer_norm.*"]),
    "an encoder's pooler": ("big_bird", "CausalLM", SIZE | LM | {"is_decoder": True, "attention_type": "original_full"},
                            ["bert.pooler.*"]),
    "llama": ("llama", "CausalLM", TEXT, []),
    "tied": ("llama", "CausalLM", TEXT | {"tie_word_embeddings": True}, []),
    "experts": ("mixtral", "CausalLM", MOE, []),
    "bert": ("bert", "SequenceClassification", SIZE | LM, []),
}  # fmt: skip


def make(name: str, device: str = "cpu") -> Any:
    kind, task, options, _ = CASES[name]
    torch.manual_seed(0)
    with torch.device(device):
        return getattr(transformers, f"AutoModelFor{task}").from_config(
            transformers.AutoConfig.for_model(kind, **options)
        )


def without_gradient(model: Any) -> list[str]:
    """What a training step on the model's own loss leaves without a gradient."""
    ids = torch.arange(3, 15).view(1, 12)
    labels = ids if model.can_generate() else torch.tensor([1])
    model.eval()(input_ids=ids, labels=labels).loss.backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("name", CASES)
def test_text_does_not_reach_what_gets_no_gradient(name: str) -> None:
    expected = without_gradient(make(name))
    found = unreached_by_text(make(name, "meta"), longest=12)
    assert found == expected
    assert bool(expected) == bool(CASES[name][3])


@pytest.mark.parametrize("name", CASES)
def test_the_patterns_freeze_what_gets_no_gradient_and_nothing_else(name: str) -> None:
    model = make(name)
    unreached = without_gradient(model)
    names = [parameter_name for parameter_name, _ in model.named_parameters()]
    patterns = freeze_patterns(unreached, names)
    assert patterns == CASES[name][3]
    assert [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)] == unreached
    blocks = hift_ds.partition_model(model, freeze=patterns)
    assert not {n for block in blocks for n in block.parameter_names} & set(unreached)


@pytest.mark.parametrize(
    ("unreached", "others", "patterns"),
    [
        (["a.x.w", "a.x.b"], ["a.y.w"], ["a.x.*"]),
        (["a.w"], ["a.b"], ["a.w"]),
        (["w"], ["a.b"], ["w"]),
        (["l.0.c.w", "l.1.c.w"], ["l.0.d.w", "l.1.d.w"], ["l.*.c.*"]),
        # `*` also matches dots, so the joined pattern would freeze l.2.d.c.w.
        (["l.0.c.w", "l.1.c.w"], ["l.0.d.w", "l.1.d.w", "l.2.d.c.w"], ["l.0.c.*", "l.1.c.*"]),
        (["l.2.w", "l.3.w"], ["l.0.w", "l.1.w"], ["l.2.*", "l.3.*"]),  # the last layers
        ([], ["a.b"], []),
    ],
)
def test_patterns(unreached: list[str], others: list[str], patterns: list[str]) -> None:
    assert freeze_patterns(unreached, unreached + others) == patterns


def test_layers_that_are_not_used_are_found() -> None:
    model = tiny.model()
    model.config.num_hidden_layers = 3  # of four
    loss = model(input_ids=torch.arange(8)[None]).logits.sum()
    assert unreached_parameters(model, loss) == [n for n, _ in model.named_parameters() if "layers.3." in n]


def test_experts_that_the_tokens_do_not_choose_are_not_unused() -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, expert_capacity=8, num_layers=2, num_sparse_encoder_layers=1,
        num_decoder_layers=2, num_sparse_decoder_layers=1, num_heads=2, num_experts=8, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    ids = torch.tensor([[3, 4]])
    logits = model(input_ids=ids, decoder_input_ids=ids).logits
    logits.sum().backward()
    assert any("expert_" in name for name, p in model.named_parameters() if p.grad is None or not p.grad.any())
    assert unreached_parameters(model, logits) == []


class Experts(nn.Module):
    """A list of experts of which the first runs, as the code of some models on the Hub has it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.tower = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.shared = nn.Parameter(torch.ones(2))

    def forward(self) -> Any:
        return self.experts[0](self.shared) + self.tower[0](self.shared)


def test_one_expert_stands_for_all_and_one_layer_does_not() -> None:
    model = Experts()
    assert unreached_parameters(model, model()) == [f"tower.{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]


def test_frozen_parameters_are_not_reported() -> None:
    model = Experts()
    model.tower.requires_grad_(False)
    assert unreached_parameters(model, model()) == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpoints_hide_parameters(reentrant: bool) -> None:
    model = tiny.model().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = model(input_ids=torch.arange(8)[None]).logits.sum()
    if not reentrant:
        assert unreached_parameters(model, loss) == []
        return
    with pytest.raises(ValueError, match="use_reentrant=False"):
        unreached_parameters(model, loss)


def test_a_model_that_needs_data_is_run_on_an_example() -> None:
    config = transformers.AutoConfig.for_model("bart", **BART, num_labels=2)  # it looks for the end of the text
    with torch.device("meta"):
        skeleton = transformers.BartForSequenceClassification(config)
    assert unreached_by_text(skeleton, 12) is None
    model = transformers.BartForSequenceClassification(config).train()
    model.extra = nn.Linear(2, 2)
    ids = torch.tensor([[3, 4, 5, config.eos_token_id]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([1])}
    assert unreached_by_example(model, batch) == ["extra.weight", "extra.bias"]
    assert model.training
    assert unreached_by_example(model, {}) == []  # a forward pass that fails tells nothing
