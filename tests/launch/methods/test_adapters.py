"""What each method trains, on tiny models: sizes by the papers' formulas, starts, and that the rest stays as it was."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

import hift_ds
from hift_ds.evaluation.tasks.scoring import average_log_likelihoods
from hift_ds.launch.errors import NotApplicable, UserError
from hift_ds.launch.methods.adapters import (
    ADAPTERS,
    load_adapter,
    merge,
    save_adapter,
    trained_parameters,
)
from hift_ds.launch.methods.settings import AdapterSettings
from hift_ds.launch.model.tokenizer import byte_tokenizer
from hift_ds.model import loss as losses

L, D, FF, V = 4, 32, 48, 64  # layers, width, of the MLP, vocabulary
KV = 16  # width of Llama's keys: 2 of 4 heads
R, M, P = 2, 3, 5  # rank, bottleneck, virtual tokens
SETTINGS = AdapterSettings(lora_rank=R, lora_alpha=2 * R, prefix_tokens=P, adapter_size=M)
SIZES: dict[str, Any] = {"hidden_size": D, "intermediate_size": FF, "num_hidden_layers": L, "num_attention_heads": 4}
LONG = {"max_position_embeddings": 40, "vocab_size": V}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
GPT2: dict[str, Any] = {
    "n_embd": D,
    "n_layer": L,
    "n_head": 4,
    "n_positions": 40,
    "vocab_size": V,
    "initializer_range": 0.2,
}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, **LONG, **NO_ENDS, num_key_value_heads=2, initializer_range=0.2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(  # tied
        GPT2Config(**GPT2, **NO_ENDS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, **LONG, **NO_DROPOUT, initializer_range=0.2)),
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(**SIZES, **LONG, **NO_DROPOUT, initializer_range=0.2)
    ),
}
CAUSAL = ("llama", "gpt2")
CASES = [(method, model) for method in ADAPTERS for model in MODELS if (method, model) != ("bitfit", "llama")]
IDENTITIES = ("lora", "adapter", "bitfit", "full-top2", "linear-probing")


def base(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@functools.cache
def _made(method: str, name: str) -> Any:
    model = base(name)
    torch.manual_seed(1)
    return ADAPTERS[method](model, SETTINGS).eval()


def made(method: str, name: str, noise: float = 0.0) -> Any:
    """A method's module around a base model; ``noise``: trained away from its start, at random."""
    module = copy.deepcopy(_made(method, name))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad and noise:
                p.add_(noise * torch.randn(p.shape, generator=generator))
    return module


def batch(length: int = 9, rows: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(4, V, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(module: Any, **inputs: Tensor) -> Tensor:
    return module(**(inputs or batch())).logits


def loss_of(module: Any, chunk: int = 0) -> Tensor:
    """As the training loop computes it."""
    given = batch()
    if losses.unwrapped(module).can_generate():
        return losses.summed_loss(module, module, given, losses.find_targets(given["input_ids"]), chunk)
    return losses.classification_loss(module, given, torch.tensor([0, 1, 1]))


# --- what is trained ----------------------------------------------------------------------------------------------

BOTTLENECK = 2 * D * M + D + M
HEADS = {"llama": 0, "gpt2": 0, "bert": 2 * D + 2, "roberta": D * D + D + 2 * D + 2}
LORAS = {"llama": R * (D + D) + R * (D + KV), "gpt2": R * (D + 3 * D)}  # query and value; all three in one matrix
WIDTHS = {"llama": KV}  # of keys
BIASES = {"llama": 0, "gpt2": 3 * D + D + 4 * D + D + 2 * D}  # in a layer
LAYERS = {"llama": 2 * D * D + 2 * D * KV + 3 * D * FF + 2 * D, "gpt2": 12 * D * D + 13 * D}


def expected(method: str, name: str, kind: str = "houlsby") -> int:
    """Trained weights by the papers' formulas."""
    per_lora, width = LORAS.get(name, 2 * R * (D + D)), WIDTHS.get(name, D)
    biases = BIASES.get(name, 4 * D + FF + D + 2 * D)
    outside = {"llama": 0, "gpt2": D}.get(name, D + D * (name == "bert"))  # biases: final norm; embeddings, pooler
    norm = D if name == "llama" else 2 * D
    layer = LAYERS.get(name, 4 * (D * D + D) + 2 * D * FF + FF + D + 4 * D)
    of_prefix = 2 * P * width
    follows = {"llama": D, "gpt2": 2 * D, "bert": D * D + D}.get(name, 0)
    return (
        HEADS[name]
        + {
            "lora": L * per_lora,
            "prefix": L * of_prefix,
            "bitfit": L * biases + outside,
            "adapter": L * 2 * BOTTLENECK + (2 * L + 1) * norm if kind == "houlsby" else L * (BOTTLENECK + 2 * D),
            "prelayer": L * D * P,
            "s4": 6 * BOTTLENECK + 2 * per_lora + 3 * of_prefix + 2 * biases,  # four layers: one in each group
            "full-top2": 2 * layer + follows,
            "linear-probing": V * D if name in CAUSAL else 0,
        }[method]
    )


@pytest.mark.parametrize(("method", "name"), CASES)
def test_as_many_weights_are_trained_as_the_papers_say(method: str, name: str) -> None:
    assert trained_parameters(made(method, name)) == expected(method, name)


WORDS = {
    "lora": ("lora_",),
    "prefix": ("virtual_tokens.key", "virtual_tokens.value"),
    "bitfit": (".bias",),
    "adapter": (".adapter.", "norm", "Norm", ".ln_"),
    "prelayer": ("virtual_tokens.hidden",),
    "s4": ("lora_", "virtual_tokens", ".adapter.", ".bias"),
    "full-top2": ("layers.2.", "layers.3.", "layer.2.", "layer.3.", "h.2.", "h.3.", "norm", "ln_f", "pooler"),
    "linear-probing": ("lm_head",),
}


@pytest.mark.parametrize(("method", "name"), CASES)
def test_the_loss_falls_and_all_else_stays_bit_by_bit(method: str, name: str) -> None:
    module = made(method, name).train()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert all(any(word in n for word in (*WORDS[method], "classifier")) for n in trained)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-3)
    found = []
    for _ in range(4):
        loss = loss_of(module)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < found[0]
    after = dict(module.named_parameters())
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved <= trained
    # RoBERTa's and BERT's keys get no gradient from their bias: it moves all of a query's scores alike.
    assert all("key" in n for n in trained - moved) or method in ("bitfit", "s4", "full-top2")
    assert len(moved) > 0.8 * len(trained)


@pytest.mark.parametrize("method", IDENTITIES)
@pytest.mark.parametrize("name", MODELS)
def test_the_start_is_the_base_model(method: str, name: str) -> None:
    if (method, name) in CASES:
        assert torch.equal(logits(made(method, name)), logits(base(name)))


@pytest.mark.parametrize("name", MODELS)
def test_lins_adapters(name: str) -> None:
    """One a layer, after it, with a norm of its own; the model's norms stay."""
    torch.manual_seed(1)
    module = ADAPTERS["adapter"](base(name), AdapterSettings(adapter_size=M, adapter_kind="lin")).eval()
    assert trained_parameters(module) == expected("adapter", name, "lin")
    assert torch.equal(logits(module), logits(base(name)))
    ups = [p for n, p in module.named_parameters() if n.endswith("adapter.up.bias")]
    with torch.no_grad():
        ups[-1].fill_(2.0)  # moves the last layer's output, which the plain model then goes on with
    ours = module(**batch(), output_hidden_states=True)
    plain = base(name)
    top = plain.get_submodule([block.name for block in hift_ds.partition_model(plain) if block.name != "head"][-1])
    top.register_forward_hook(lambda _, __, out: (out[0] + 2.0, *out[1:]) if isinstance(out, tuple) else out + 2.0)
    assert torch.equal(ours.logits, logits(plain)) and not torch.equal(ours.logits, logits(base(name)))


def test_houlsbys_adapters_come_before_the_residual_sums() -> None:
    """With the ups' biases alone, an adapter adds a vector to what its sub-layer adds."""
    module, plain = made("adapter", "bert"), base("bert")
    shift = torch.linspace(-1, 1, D)
    with torch.no_grad():
        for n, p in module.named_parameters():
            if n.endswith("adapter.up.bias"):
                p.copy_(shift)
        for layer in plain.bert.encoder.layer:
            layer.attention.output.dense.bias += shift
            layer.output.dense.bias += shift
    torch.testing.assert_close(logits(module), logits(plain))
    assert not torch.allclose(logits(module), logits(base("bert")), atol=0.01)


@pytest.mark.parametrize("method", ["lora", "prefix", "adapter", "prelayer", "s4"])
def test_a_seed_gives_one_start(method: str) -> None:
    states = []
    for seed in (5, 5, 6):
        model = base("gpt2")  # always the same
        torch.manual_seed(seed)
        states.append(ADAPTERS[method](model, SETTINGS).state_dict())
    ours, again, other = states
    assert all(torch.equal(ours[n], again[n]) for n in ours)
    assert not all(torch.equal(ours[n], other[n]) for n in ours)


def test_the_groups_of_s4() -> None:
    module = made("s4", "gpt2")
    parts = [
        {
            part
            for n, p in module.named_parameters()
            if n.startswith(f"transformer.h.{layer}.") and p.requires_grad
            for part in ("adapter", "virtual_tokens", "lora", "bias")
            if part in n and not (part == "bias" and "adapter" in n)
        }
        for layer in range(L)
    ]
    assert parts == [
        {"adapter", "lora"},
        {"adapter", "virtual_tokens"},
        {"adapter", "virtual_tokens", "bias"},
        {"virtual_tokens", "bias", "lora"},
    ]


@pytest.mark.parametrize(
    ("layers", "sizes"), [(4, [1, 1, 1, 1]), (12, [2, 4, 4, 2]), (32, [5, 11, 11, 5]), (13, [2, 5, 4, 2])]
)
def test_the_groups_are_a_spindle(layers: int, sizes: list[int]) -> None:
    from hift_ds.launch.methods.adapters import _spindle

    groups = _spindle([str(i) for i in range(layers)])
    assert [len(group) for group in groups] == sizes and sum(groups, []) == [str(i) for i in range(layers)]


# --- virtual tokens -----------------------------------------------------------------------------------------------


def padded(side: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Texts of 9, 4 and 6 tokens in one batch, and each alone."""
    rows = [row[:length] for row, length in zip(batch()["input_ids"], (9, 4, 6), strict=True)]
    gaps = [(9 - len(row), 0) if side == "left" else (0, 9 - len(row)) for row in rows]
    ids = torch.stack([F.pad(row, gap) for row, gap in zip(rows, gaps, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(row), gap) for row, gap in zip(rows, gaps, strict=True)])
    return {"input_ids": ids, "attention_mask": mask}, rows


def llama_with_tokens(model: Any, hidden: list[Tensor], row: Tensor) -> Tensor:
    """PreLayer's definition, computed plainly: longer sequences, and all virtual states replaced before each layer."""
    count, length = len(hidden[0]), len(row)
    mask = torch.full((count + length, count + length), float("-inf")).triu(1)[None, None]
    text = model.model.embed_tokens(row[None])
    positions = torch.arange(-count, length)[None]
    for layer, tokens in zip(model.model.layers, hidden, strict=True):
        both = torch.cat([tokens[None], text], dim=1)
        rotations = model.model.rotary_emb(both, positions)
        text = layer(both, attention_mask=mask, position_embeddings=rotations)[:, count:]
    return model.lm_head(model.model.norm(text))[0]


def gpt2_with_tokens(model: Any, hidden: list[Tensor], row: Tensor) -> Tensor:
    count, length = len(hidden[0]), len(row)
    mask = torch.full((count + length, count + length), float("-inf")).triu(1)[None, None]
    text = model.transformer.wte(row[None]) + model.transformer.wpe(torch.arange(length)[None])
    for layer, tokens in zip(model.transformer.h, hidden, strict=True):
        text = layer(torch.cat([tokens[None], text], dim=1), attention_mask=mask)[:, count:]
    return model.lm_head(model.transformer.ln_f(text))[0]


def bert_with_tokens(model: Any, hidden: list[Tensor], row: Tensor) -> Tensor:
    text = model.bert.embeddings(row[None])
    for layer, tokens in zip(model.bert.encoder.layer, hidden, strict=True):
        text = layer(torch.cat([tokens[None], text], dim=1))[:, len(tokens) :]
    return model.classifier(model.bert.pooler(text))[0]


PLAIN = {"llama": llama_with_tokens, "gpt2": gpt2_with_tokens, "bert": bert_with_tokens}


@pytest.mark.parametrize(
    ("name", "side"), [("llama", "left"), ("llama", "right"), ("gpt2", "right"), ("bert", "right")]
)
def test_prelayer_is_the_plain_computation(name: str, side: str) -> None:
    module, plain = made("prelayer", name, noise=0.3), base(name)
    hidden = [p.detach() for n, p in module.named_parameters() if n.endswith("virtual_tokens.hidden")]
    if name == "bert":  # the head is trained, too
        plain.classifier.load_state_dict(module.classifier.state_dict())
    inputs, rows = padded(side)
    ours = logits(module, **inputs)
    if name != "bert":
        ours = ours[inputs["attention_mask"] == 1]
    with torch.no_grad():
        truth = [PLAIN[name](plain, hidden, row) for row in rows]
    torch.testing.assert_close(ours, torch.stack(truth) if name == "bert" else torch.cat(truth), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(module), logits(base(name)), atol=0.01)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefix_is_a_full_cache(name: str) -> None:
    module, plain = made("prefix", name, noise=0.3), base(name)
    cache = DynamicCache()
    keys = [p.detach()[None] for n, p in module.named_parameters() if n.endswith("virtual_tokens.key")]
    values = [p.detach()[None] for n, p in module.named_parameters() if n.endswith("virtual_tokens.value")]
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, layer)
    row = batch()["input_ids"][:1]
    inputs = {"attention_mask": torch.ones(1, P + row.shape[1]), "position_ids": torch.arange(row.shape[1])[None]}
    truth = logits(plain, input_ids=row, past_key_values=cache, **inputs)
    torch.testing.assert_close(logits(module, input_ids=row), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefix_starts_as_real_tokens(name: str) -> None:
    """The tokens that were drawn, in front of the text, give the same."""
    torch.manual_seed(1)
    tokens = torch.randint(V, (1, P))
    plain, row = base(name), batch()["input_ids"][:1]
    positions = torch.cat([torch.arange(P), torch.arange(9) + (P if name == "llama" else 0)])[None]
    truth = logits(plain, input_ids=torch.cat([tokens, row], dim=1), position_ids=positions)[:, P:]
    for method in ("prefix", "prelayer"):
        torch.testing.assert_close(logits(made(method, name), input_ids=row), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["prefix", "prelayer", "s4", "adapter"])
@pytest.mark.parametrize("name", CAUSAL)
def test_padding_and_cache_change_no_answer(method: str, name: str) -> None:
    module = made(method, name, noise=0.3)
    inputs, rows = padded("left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = torch.cat([module.generate(row[None], **options, use_cache=False)[:, len(row) :] for row in rows])
    assert len({tuple(row) for row in alone.tolist()}) == len(rows)
    for use_cache in (True, False):
        assert torch.equal(module.generate(**inputs, **options, use_cache=use_cache)[:, 9:], alone)
    inputs, rows = padded("right")
    ours = logits(module, **inputs)
    for i, row in enumerate(rows):
        torch.testing.assert_close(ours[i, : len(row)], logits(module, input_ids=row[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["prefix", "prelayer", "lora"])
def test_scoring_takes_any_batch_size(method: str) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), initializer_range=0.2))
    module = ADAPTERS[method](llama, SETTINGS)
    pairs = [("it was", "great"), ("it was not", "terrible"), ("A?", "yes")]
    one, three = (average_log_likelihoods(module, tokenizer, pairs, size)[0] for size in (1, 3))
    assert one == pytest.approx(three, abs=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_of_either_kind(implementation: str) -> None:
    model = base("llama")
    model.set_attn_implementation(implementation)
    torch.manual_seed(1)
    ours = logits(ADAPTERS["prefix"](model, SETTINGS))
    torch.testing.assert_close(ours, logits(made("prefix", "llama")), rtol=1e-4, atol=1e-4)


def test_a_decoder_with_a_classifier_keeps_no_cache_of_virtual_tokens() -> None:
    """Its config turns a cache on; PreLayer would then see its tokens once more with each call."""
    found = []
    for method in ("prelayer", "prelayer", "prefix"):
        torch.manual_seed(0)
        module = ADAPTERS[method](
            LlamaForSequenceClassification(LlamaConfig(**SIZES, **LONG, pad_token_id=0, initializer_range=0.2)),
            SETTINGS,
        ).eval()
        logits(module)
        found.append(logits(module))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)


# --- in training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTERS)
def test_checkpointing_and_chunks_change_no_gradient(method: str) -> None:
    name = "gpt2" if method == "bitfit" else "llama"
    gradients = []
    for checkpointing, chunk in ((None, 0), ("device", 0), ("host", 0), (None, 5)):
        module = made(method, name, noise=0.1).train()
        if checkpointing:
            hift_ds.checkpoint_activations(losses.unwrapped(module), offload=checkpointing == "host")
        assert losses.chunking_problem(module) is None
        loss_of(module, chunk).backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    plain, *others = gradients
    assert plain
    for other in others:
        assert other.keys() == plain.keys()
        for n in plain:
            torch.testing.assert_close(other[n], plain[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case[1] in ("llama", "roberta")])
def test_in_bf16(method: str, name: str) -> None:
    """New modules have the model's type, and the start is that of fp32, rounded."""
    torch.manual_seed(1)
    module = ADAPTERS[method](base(name).bfloat16(), SETTINGS)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    loss_of(module.train()).backward()
    rounded = made(method, name).bfloat16()  # as DeepSpeed casts
    assert torch.isfinite(logits(rounded)).all()
    torch.testing.assert_close(logits(rounded).float(), logits(made(method, name)), rtol=0.1, atol=0.25)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_copy_is_apart(method: str, name: str) -> None:
    module = made(method, name, noise=0.1)
    before = logits(module)
    twin = copy.deepcopy(module)
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(logits(module), before) and not torch.equal(logits(twin), before)


# --- after training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "name"), CASES)
def test_saved_and_loaded_is_the_same_bit_by_bit(method: str, name: str, tmp_path: Path) -> None:
    module = made(method, name, noise=0.1)
    save_adapter(module, tmp_path)
    model = base(name)
    drawn = torch.get_rng_state()
    again = load_adapter(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(logits(again.eval()), logits(module))
    assert trained_parameters(again) == trained_parameters(module)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]
    record = json.loads((tmp_path / "adapter.json").read_text())
    assert (record["method"], record["base_model"]) == (method, None)  # made from a config


@pytest.mark.parametrize("method", ["adapter", "prefix", "lora"])
def test_an_adapter_keeps_where_generation_stops(method: str, tmp_path: Path) -> None:
    module = made(method, "gpt2")
    module.generation_config.eos_token_id = [3, 5]
    save_adapter(module, tmp_path)
    again = load_adapter(base("gpt2"), tmp_path)
    assert again.generation_config.eos_token_id == [3, 5]


def test_whole_weights_may_be_given(tmp_path: Path) -> None:
    """As for ZeRO-3, where the module has parts of them."""
    module, start = made("adapter", "gpt2", noise=0.1), made("adapter", "gpt2")
    save_adapter(start, tmp_path, module.state_dict())
    assert torch.equal(logits(load_adapter(base("gpt2"), tmp_path).eval()), logits(module))


def test_what_is_no_adapter_of_this_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter. Expected adapter.json and adapter.safetensors"):
        load_adapter(base("gpt2"), tmp_path)
    module = made("prefix", "llama")
    module.config.name_or_path = "SOMEBODY/llama"
    save_adapter(module, tmp_path)
    with pytest.raises(UserError, match=r"another model than GPT2LMHeadModel.*\(SOMEBODY/llama\)"):
        load_adapter(base("gpt2"), tmp_path)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_merged_is_a_plain_model(method: str, name: str, tmp_path: Path) -> None:
    module = made(method, name, noise=0.1)
    before = logits(module)
    merged = merge(module)
    if method in ("prefix", "adapter", "prelayer", "s4"):
        assert merged is None
        return
    merged.save_pretrained(tmp_path)
    again = type(base(name)).from_pretrained(tmp_path).eval()
    assert type(merged) is type(base(name))
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)
    assert method == "lora" or torch.equal(logits(again), before)


def test_linear_probing_unties_and_says_so(tmp_path: Path) -> None:
    module = made("linear-probing", "gpt2", noise=0.1)
    assert torch.equal(module.transformer.wte.weight, base("gpt2").transformer.wte.weight)
    merge(module).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, module.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.transformer.wte.weight)


# --- what does not fit --------------------------------------------------------------------------------------------


def experts() -> Any:
    """One of them is shared, a plain MLP, but not all of what the layer adds."""
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **LONG, num_key_value_heads=2, num_experts=4))


def t5() -> Any:
    sizes: dict[str, Any] = {"d_model": D, "d_ff": FF, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": V}
    return T5ForSequenceClassification(T5Config(**sizes, eos_token_id=1))


def short() -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 3}, **LONG))


@pytest.mark.parametrize(
    ("method", "model", "reason"),
    [
        ("bitfit", MODELS["llama"], "'bitfit' does not fit LlamaForCausalLM: it has no biases"),
        ("adapter", experts, "model.layers.0 whose output is that of its MLP"),
        ("prefix", t5, "it has an encoder and a decoder"),
        ("prelayer", t5, "it has an encoder and a decoder"),
        ("s4", short, "3 hidden layers"),
    ],
)
def test_what_does_not_fit_says_why(method: str, model: Callable[[], Any], reason: str) -> None:
    with pytest.raises(NotApplicable, match=reason):
        ADAPTERS[method](model(), SETTINGS)


def test_s4_says_that_there_are_no_biases() -> None:
    with pytest.warns(UserWarning, match="LlamaForCausalLM has no biases"):
        ADAPTERS["s4"](base("llama"), SETTINGS)


def test_an_unknown_kind_of_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="'pfeiffer'. Expected one of: houlsby, lin"):
        ADAPTERS["adapter"](base("gpt2"), AdapterSettings(adapter_kind="pfeiffer"))
