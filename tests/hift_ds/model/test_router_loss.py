"""The router loss of mixtures of experts, against the loss that each model of transformers computes from labels."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hift_ds.model.activations import checkpoint_activations
from hift_ds.model.loss import IGNORED, find_targets, router_coefficient, summed_loss

COEFFICIENT = 10.0  # so large that a wrong router loss is a wrong loss
SIZE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "num_experts_per_tok": 2, "output_router_logits": True}  # fmt: skip
LOCAL = SIZE | {"num_local_experts": 4, "router_aux_loss_coef": COEFFICIENT}
EXPERTS = SIZE | {"num_experts": 4, "moe_intermediate_size": 16, "router_aux_loss_coef": COEFFICIENT}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "olmoe": EXPERTS,
    "jetmoe": {**LOCAL, "num_key_value_heads": 4, "kv_channels": 8, "aux_loss_coef": COEFFICIENT},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 64, "output_router_logits": True,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": COEFFICIENT},
    },
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "gpt_oss": LOCAL | {"head_dim": 8},
    "phimoe": LOCAL,
    "granitemoe": LOCAL,
    "minimax": LOCAL | {"head_dim": 8, "block_size": 4},
}  # fmt: skip
SLOW = list(FAMILIES)[5:]
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAMILIES]


def make(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **FAMILIES[name] | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batch() -> tuple[dict[str, Tensor], Tensor]:
    """Two examples, one of them padded, some tokens without a loss: the router loss counts all but the padding."""
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, :4] = IGNORED
    return {"input_ids": ids, "attention_mask": mask}, labels


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_models_own(name: str, chunk: int) -> None:
    model, (inputs, labels) = make(name), batch()
    targets = find_targets(labels)
    count = len(targets.values)
    own = model(**inputs, labels=labels)
    expected = gradients(own.loss, model)
    loss = summed_loss(model, model, inputs, targets, chunk, router_weight=count) / count
    assert own.aux_loss * COEFFICIENT > 9  # of a loss around 24, or 14
    assert loss.item() == pytest.approx(own.loss.item(), rel=3e-7)  # sum and mean round differently
    found = gradients(loss, model)
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        if chunk == 0:
            assert torch.equal(gradient, expected[parameter]), parameter
        else:  # chunks sum in another order
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 5])
def test_with_activation_checkpoints(chunk: int) -> None:
    model, (inputs, labels) = make("mixtral").train(), batch()
    targets = find_targets(labels)
    expected = gradients(summed_loss(model, model, inputs, targets, chunk, router_weight=3.0), model)
    checkpoint_activations(model)
    found = gradients(summed_loss(model, model, inputs, targets, chunk, router_weight=3.0), model)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 5])
def test_without_a_weight_or_without_router_logits_it_is_left_out(chunk: int) -> None:
    inputs, labels = batch()
    targets = find_targets(labels)
    model, plain = make("mixtral"), make("mixtral", output_router_logits=False)
    expected = summed_loss(plain, plain, inputs, targets, chunk)
    assert torch.equal(summed_loss(model, model, inputs, targets, chunk), expected)
    assert torch.equal(summed_loss(plain, plain, inputs, targets, chunk, router_weight=5.0), expected)


def test_the_coefficient_of_an_adapted_model() -> None:
    from peft import LoraConfig, get_peft_model

    model = make("mixtral")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    assert router_coefficient(adapted) == router_coefficient(model) == COEFFICIENT
