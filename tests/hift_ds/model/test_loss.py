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


def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
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
        with mock.patch.object(losses, "checkpoint", side_effect=AssertionError("recomputed for nothing")):
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

    model = Mixing(tiny.model().config).train()
    with pytest.raises(ValueError, match="logits of Mixing cannot be computed in chunks: the values differ"):
        summed_loss(Alone(model), batch(), "causal-lm", CHUNK)
    assert model.training
    whole = summed_loss(Alone(model), batch(), "causal-lm", 0)
    assert torch.equal(summed_loss(Alone(model), batch(), "causal-lm"), whole)


# --- memory ------------------------------------------------------------------------------------------------------


class Widest(LiveMemory):
    """Counts tensors as wide as the vocabulary only."""

    def count(self, storage: Any, category: str) -> None:
        super().count(storage, category if storage.nbytes() % VOCABULARY == 0 else "buffers")


VOCABULARY = 10007  # a prime, so that nothing else is a multiple of it


def logits_at_most(batch_size: int, length: int, chunk: int) -> int:
    """Bytes of tensors of the vocabulary's width at a time, with the embeddings active."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **sizes)).train()
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    ids = torch.arange(batch_size * length).reshape(batch_size, length)
    losses.chunking_problem(model)  # asked once, not to be counted
    memory = Widest()
    memory.ignore(model.parameters())
    with memory:
        summed_loss(Alone(model), {"input_ids": ids, "labels": ids}, "causal-lm", chunk).backward()
    return max(peak["activations"] for peak in memory.peaks.values())


def test_logits_do_not_grow_with_the_tokens() -> None:
    chunk = 16
    for batch_size, length in ((1, 64), (1, 256), (4, 128)):
        # Logits, log-probabilities and the gradient of either, for one chunk, and a little.
        assert logits_at_most(batch_size, length, chunk) <= 3.1 * 4 * chunk * VOCABULARY
    assert logits_at_most(1, 256, 0) > 10 * logits_at_most(1, 256, chunk)
