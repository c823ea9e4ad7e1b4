"""The loss in chunks: the same numbers as with all logits at once, through every ZeRO stage, and less memory."""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hift_ds.launch.model.batch_loss import summed_loss
from hift_ds.model import loss as losses
from hift_ds.planner.simulation import LiveMemory
from tests.support import tiny

# fp32: chunks sum in another order, which is some units in the last place (6e-8), and as many as there are chunks.
SAME = 1e-6
CHUNK = 5  # of 22 trained tokens a batch: 5 chunks, of 4 and 5 tokens


class Alone:
    """A model that stands for an engine."""

    device = torch.device(tiny.DEVICE)

    def __init__(self, module: Any):
        self.module = module

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def gemma() -> Any:
    """Its logits are capped by a tanh, strongly here: without it the loss is another one."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    options = {"vocab_size": 64, "head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 0.5}
    llama = Gemma2ForCausalLM(Gemma2Config(**sizes, **options, use_cache=False, attn_implementation="eager"))
    with torch.no_grad():
        llama.lm_head.weight.mul_(20)
    return llama.train().to(tiny.DEVICE)


def adapted(targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=targets)
    return get_peft_model(tiny.model(), lora).train()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny.model,
    "tied": functools.partial(tiny.model, tied=True),
    "gemma2": gemma,
    "peft": adapted,
}
BLOCKS = {"embeddings": "embed_tokens", "middle": "layers.2.", "head": ("norm.weight", "lm_head"), "all": ""}


def batch() -> dict[str, Tensor]:
    """Two examples, one of them padded, some tokens not trained."""
    made = tiny.micro_batch(0, 0)
    mask = torch.ones_like(made["input_ids"])
    mask[1, 9:] = 0
    labels = made["labels"].masked_fill(mask == 0, losses.IGNORED)
    labels[0, :2] = losses.IGNORED
    return {"input_ids": made["input_ids"], "attention_mask": mask, "labels": labels}


def computed(name: str, active: str, chunk: int | None, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    model = MODELS[name]()
    for parameter_name, parameter in model.named_parameters():
        wanted = BLOCKS[active]
        inside = any(part in parameter_name for part in ([wanted] if isinstance(wanted, str) else wanted))
        parameter.requires_grad_(inside if name != "peft" else "lora" in parameter_name)
    loss = summed_loss(Alone(model), batch(), "causal-lm", chunk)
    (loss * scale).backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def plain(name: str) -> Tensor:
    """The loss by the model's own forward and torch, without a line of ours."""
    given = batch()
    logits = MODELS[name]()(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    flat = logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(flat, given["labels"][:, 1:].flatten(), reduction="sum").detach()


CASES = [("llama", active) for active in BLOCKS] + [("tied", "embeddings"), ("tied", "all"), ("gemma2", "middle")]


@pytest.mark.parametrize(("name", "active"), [*CASES, ("gemma2", "all"), ("peft", "all")])
def test_chunks_change_nothing(name: str, active: str) -> None:
    whole, truth = computed(name, active, 0)
    chunked, ours = computed(name, active, CHUNK)
    torch.testing.assert_close(whole, plain(name), rtol=SAME, atol=0)
    torch.testing.assert_close(chunked, whole, rtol=SAME, atol=0)
    assert ours.keys() == truth.keys() and truth
    for key in truth:
        assert (ours[key] - truth[key]).norm() <= 10 * SAME * truth[key].norm(), key


def test_one_chunk_is_no_chunk() -> None:
    whole, truth = computed("llama", "all", 0)
    for chunk in (None, 100):
        with mock.patch.object(losses, "Pieces", side_effect=AssertionError("recomputed for nothing")):
            loss, ours = computed("llama", "all", chunk)
        assert torch.equal(loss, whole) and tiny.identical(ours, truth)


@pytest.mark.parametrize("active", ["embeddings", "head"])
def test_a_loss_scale_scales_all_gradients(active: str) -> None:
    """By a power of two, so bit for bit: what a fused loss with gradients of its own would get wrong."""
    _, truth = computed("llama", active, CHUNK)
    _, scaled = computed("llama", active, CHUNK, scale=1024.0)
    assert tiny.identical(scaled, {name: gradient * 1024 for name, gradient in truth.items()})


def test_an_accumulated_gradient_is_one_gradient() -> None:
    """ZeRO's hooks count how often a parameter's gradient is ready."""
    model, ready = tiny.model(tied=True), []
    model.lm_head.weight.register_post_accumulate_grad_hook(ready.append)
    summed_loss(Alone(model), batch(), "causal-lm", CHUNK).backward()
    assert len(ready) == 1


def wide(kind: str, dtype: torch.dtype, seed: int) -> Any:
    """A large vocabulary and peaked predictions; ``kind``: "llama", "biased" or "gemma2", which is tied and capped."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 3001, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 4, "use_cache": False}  # fmt: skip
    if kind == "gemma2":
        config = Gemma2Config(**sizes, final_logit_softcapping=3.0, attn_implementation="eager")
        model: Any = Gemma2ForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    if kind == "biased":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(3001))
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model.to(dtype).train().to(tiny.DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "biased", "gemma2"])
def test_errors_are_not_larger_than_those_of_all_logits_at_once(kind: str, dtype: torch.dtype) -> None:
    """Against fp64 with the same weights. A gradient summed over chunks in bf16 has 1.2 times the error, or more.

    The bounds are above 1: the sums of exponentials for the head's gradient are rounded once more, and single errors
    differ, in fp32 by the order of the sums in a matrix product.
    """
    scale = 2.0**12 / 199 if dtype == torch.float16 else 1 / 199  # a loss scale, and the mean over all targets
    squares: dict[str, dict[int, float]] = {}
    for seed in range(3):
        ids = torch.randint(3001, (1, 200), generator=torch.Generator().manual_seed(seed)).to(tiny.DEVICE)
        truth = wide(kind, dtype, seed).double()
        logits = truth(input_ids=ids).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") * scale).backward()
        expected = {name: parameter.grad for name, parameter in truth.named_parameters()}
        for chunk in (0, 64, 13):
            model = wide(kind, dtype, seed)
            (summed_loss(Alone(model), {"input_ids": ids, "labels": ids}, "causal-lm", chunk) * scale).backward()
            for name, parameter in model.named_parameters():
                error = (parameter.grad.double() - expected[name]).norm() / expected[name].norm()
                found = squares.setdefault(name, {})
                found[chunk] = found.get(chunk, 0) + float(error) ** 2
    most = 1.25 if dtype == torch.float32 else 1.02
    for name, found in squares.items():
        for chunk in (64, 13):
            assert found[chunk] ** 0.5 <= most * found[0] ** 0.5, (name, chunk)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_autocast_reaches_the_head(name: str) -> None:
    found = []
    for chunk in (0, CHUNK):
        model = MODELS[name]()
        with torch.autocast(tiny.DEVICE, torch.bfloat16):
            loss = summed_loss(Alone(model), batch(), "causal-lm", chunk)
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters()]))
    (whole, truth), (chunked, ours) = found
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=0)  # fp32 would differ by 1e-3
    for gradient, expected in zip(ours, truth, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() <= 1e-2 * expected.norm()


def test_all_pieces_are_computed_in_one_call_of_the_head() -> None:
    """ZeRO-3 gathers its weight around each call, and around the backward pass of each."""
    model, calls = tiny.model(), []
    losses.chunking_problem(model)
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append("forward"))
    model.lm_head.register_full_backward_pre_hook(lambda *_: calls.append("backward"))
    summed_loss(Alone(model), batch(), "causal-lm", CHUNK).backward()
    assert calls == ["forward", "backward"]


def test_the_default_is_by_the_size_of_the_vocabulary() -> None:
    from transformers import AutoConfig

    class Model:
        def __init__(self, vocabulary: int):
            self.config = AutoConfig.for_model("llama", vocab_size=vocabulary)

    assert [losses.default_chunk(Model(size)) for size in (32000, 152064, 10**6, 10**9)] == [1024, 192, 33, 1]


def test_what_cannot_be_cut_is_refused_or_left_whole() -> None:
    """A model whose head sees its neighbors."""
    from transformers import LlamaForCausalLM

    class Mixing(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            if kwargs.get("input_ids") is not None:
                outputs.logits = outputs.logits.roll(1, dims=-1)
            return outputs

    mixing, on_head = Mixing(tiny.model().config).train(), adapted(("q_proj", "lm_head"))
    for model, reason in (
        (mixing, "logits of Mixing cannot be computed in chunks: the values"),
        (on_head, "its head is peft"),
    ):
        with pytest.raises(ValueError, match=reason):
            summed_loss(Alone(model), batch(), "causal-lm", CHUNK)
        assert model.training
        whole = summed_loss(Alone(model), batch(), "causal-lm", 0)
        assert torch.equal(summed_loss(Alone(model), batch(), "causal-lm"), whole)


def test_the_trial_changes_no_mode_and_hides_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]

    def refuse(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(model.model, "forward", refuse)
        losses.chunking_problem(model)
    assert losses.chunking_problem(model) is None  # tried again
    assert [module.training for module in model.modules()] == modes


def test_why_logits_are_left_whole_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr("deepspeed.utils.log_dist", lambda message, **_: logged.append(message))
    monkeypatch.setattr(losses, "default_chunk", lambda _: CHUNK)
    losses._warn_once.cache_clear()
    model = adapted(("q_proj", "lm_head"))
    for _ in range(2):
        summed_loss(Alone(model), batch(), "causal-lm")
    assert len(logged) == 1 and "its head is peft" in logged[0]


# --- memory ------------------------------------------------------------------------------------------------------


class Widest(LiveMemory):
    """Counts tensors as wide as the vocabulary only."""

    def count(self, storage: Any, category: str) -> None:
        super().count(storage, category if storage.nbytes() % VOCABULARY == 0 else "buffers")


VOCABULARY = 10007  # a prime, so that nothing else is a multiple of it


def logits_at_most(
    batch_size: int, length: int, chunk: int, trained: str = "model.norm", width: int = 32, kind: Any = Widest
) -> int:
    """Bytes of tensors of the vocabulary's width at a time, of gradients, too; ``kind``: or of others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **sizes)).train()
    model.requires_grad_(False)
    model.get_submodule(trained).requires_grad_(True)
    ids = torch.arange(batch_size * length).reshape(batch_size, length)
    losses.chunking_problem(model)  # asked once, not to be counted
    memory = kind()
    memory.ignore(model.parameters())
    with memory:
        summed_loss(Alone(model), {"input_ids": ids, "labels": ids}, "causal-lm", chunk).backward()
    return max(peak["activations"] for peak in memory.peaks.values())


def test_logits_do_not_grow_with_the_tokens() -> None:
    chunk = 16
    for batch_size, length in ((1, 64), (1, 256), (4, 128)):
        # Logits and log-probabilities, or logits and their gradient, of one chunk.
        assert logits_at_most(batch_size, length, chunk) <= 2 * 4 * chunk * VOCABULARY
    assert logits_at_most(1, 256, 0) > 10 * logits_at_most(1, 256, chunk)


def test_the_gradient_of_the_head_exists_once() -> None:
    """And beside it, logits and their gradient of a piece of a quarter of a chunk, and some hidden states."""
    width, length, chunk = 256, 64, 32
    found = logits_at_most(1, length, chunk, "lm_head", width, LiveMemory)
    piece = chunk * VOCABULARY // losses.SMALLER
    assert found <= 4 * (VOCABULARY * width + 2 * piece + 4 * length * width)
