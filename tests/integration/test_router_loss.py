"""Training a mixture of experts with its router loss, against a plain PyTorch loop on the model's own outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.towers import TEXT, save_model
from tests.support.training import records, run_tiny

MIXTRAL = TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True,
                  "router_aux_loss_coef": 10.0}  # fmt: skip
ROWS = [{"prompt": f"{word} is ", "completion": word * 2} for word in ("a", "bcd", "efghij", "kl")]
BLOCKS = ("embed_tokens", "layers.0.", "layers.1.", "")  # the last one: the rest


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Each step has all four rows, one in a micro-batch: their order does not matter."""
    save_model(tmp_path / "mixtral", "mixtral", MIXTRAL)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [
        f"model.name_or_path={tmp_path / 'mixtral'}", "model.config=null", f"data.path={tmp_path / 'rows.jsonl'}",
        "data.name=jsonl", "data.template=false", "data.train_examples=null", "data.eval_examples=0",
        "training.batch_size=4", "training.micro_batch_size=1", "training.max_grad_norm=0", "training.max_steps=4",
        "training.learning_rate=1e-3",
    ]  # fmt: skip


def plain_loop(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Algorithm 1 in PyTorch, and the router losses from the outputs of transformers: a mean over four forwards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder).train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(row["prompt"])["input_ids"] for row in ROWS]
    ends = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in ROWS]
    count = sum(map(len, ends))
    losses = []
    named = dict(model.named_parameters())
    taken: set[str] = set()
    for part in BLOCKS:
        block = [name for name in named if part in name and name not in taken]
        taken |= set(block)
        for name, parameter in named.items():
            parameter.requires_grad_(name in block)
        optimizer = torch.optim.AdamW([named[name] for name in block], lr=1e-3, weight_decay=0.0)
        total = 0.0
        for text, end in zip(texts, ends, strict=True):
            outputs = model(input_ids=torch.tensor([text + end]), use_cache=False)
            logits = outputs.logits[0, len(text) - 1 : -1]
            loss = F.cross_entropy(logits, torch.tensor(end), reduction="sum") / count + 10.0 * outputs.aux_loss / 4
            if loss.requires_grad:
                loss.backward()
            total += loss.item()
        optimizer.step()
        model.zero_grad()
        losses.append(total)
    return losses, {name: parameter.detach() for name, parameter in named.items()}


@pytest.mark.parametrize(
    ("ranks", "stage", "more"),
    [
        (1, 0, ()),
        pytest.param(2, 2, (), marks=pytest.mark.slow),
        (1, 3, ("training.loss_chunk=4",)),
        pytest.param(2, 3, (), marks=pytest.mark.slow),
        pytest.param(1, 2, ("model.gradient_checkpointing=true",), marks=pytest.mark.slow),
    ],
)
def test_one_cycle_is_that_of_a_plain_loop(
    ranks: int, stage: int, more: tuple[str, ...], options: list[str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    options = [*options, *more, f"deepspeed.zero_optimization.stage={stage}"]
    result = run_tiny(ranks, tmp_path / "out", *options)
    assert result["code"] == 0 and "includes the router loss" in result["printed"]
    losses, weights = plain_loop(tmp_path / "mixtral")
    assert [record["loss"] for record in records(tmp_path / "out")] == pytest.approx(losses, rel=1e-6)
    trained = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").named_parameters())
    for name, expected in weights.items():
        # Adam's first step is the sign of a gradient times the rate; a gradient near 0 can round to the other sign.
        wrong = (trained[name] - expected).abs() > 1e-5
        assert wrong.float().mean() < 0.01, name


@pytest.mark.parametrize("method", ["mezo", pytest.param("full", marks=pytest.mark.slow)])
def test_other_methods_and_held_out_losses(method: str, options: list[str], tmp_path: Path) -> None:
    held_out = [f"data.eval_path={tmp_path / 'held_out.jsonl'}", "data.eval_examples=null", "training.eval_every=1"]
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": "x is ", "completion": "xx"}) + "\n")
    result = run_tiny(1, tmp_path / "out", *options, *held_out, f"method.name={method}", "training.max_steps=1")
    assert result["code"] == 0
    (record,) = records(tmp_path / "out")
    assert record["loss"] > 20 and record["held_out"]["loss"] < 10  # ln 262 = 5.6, and 10 x the router loss, about 2


def test_held_out_answers_are_generated_without_the_router_loss(tmp_path: Path) -> None:
    """transformers cannot compute a router loss for the padded prompts of a batch while it generates."""
    sizes = "hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2"
    mixtral = f"{{model_type: mixtral, {sizes}, num_key_value_heads: 2, num_local_experts: 2}}"
    overrides = [f"model.config={mixtral}", "model.config.output_router_logits=true", "training.max_steps=1"]
    result = run_tiny(1, tmp_path / "run", *overrides)
    assert result["code"] == 0, result["printed"]
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["output_router_logits"] is True
