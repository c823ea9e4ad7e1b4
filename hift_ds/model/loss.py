"""The loss of a causal language model, with the logits of a few tokens at a time.

Logits are as wide as the vocabulary: 16-bit, in fp32, and the fp32 gradient they are most of what the head needs, and
grow with the tokens. Here the hidden states of all tokens are there, and the logits of one chunk, in forward and in
backward, where each chunk's are computed again (``torch.utils.checkpoint``).

DeepSpeed's ``TiledFusedLogitsLoss`` is not used: its forward already takes the gradients of the weights, for a loss
with the weight 1, and its backward scales the hidden states' gradient alone. With a loss scale, or a loss that is
divided by the number of tokens, the head's gradient would be wrong. It also adds to it once a chunk, which each time
counts as a gradient for the hooks of ZeRO; autograd does so once, when all chunks are summed.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the label of a token that is not trained
CHUNK_BYTES = 2**27  # of one chunk's fp32 logits, by default
_GRANULE = 64  # tokens: matrix products like such multiples


@dataclass(frozen=True)
class Targets:
    """What is to be predicted, and where.

    Attributes:
        kept: positions that some example trains, (kept,).
        rows: of the flattened (batch, kept), those that are trained, (tokens,).
        values: the token that is to be predicted at each of them, (tokens,).
    """

    kept: Tensor
    rows: Tensor
    values: Tensor


def find_targets(labels: Tensor) -> Targets:
    """The targets of labels, (batch, length), ``IGNORED`` where there is none: position t predicts token t + 1."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    trained = shifted != IGNORED
    kept = trained.any(dim=0).nonzero().squeeze(1)
    return Targets(kept, trained[:, kept].flatten().nonzero().squeeze(1), shifted[trained])


def default_chunk(model: Any) -> int:
    """Tokens whose fp32 logits take at most ``CHUNK_BYTES``, at least one."""
    tokens = CHUNK_BYTES // (4 * unwrapped(model).config.get_text_config().vocab_size)
    return tokens // _GRANULE * _GRANULE or max(1, tokens)


def summed_loss(
    call: Callable[..., Any], model: Any, inputs: Mapping[str, Tensor], targets: Targets, chunk: int | None = None
) -> Tensor:
    """Sum of the cross-entropies of the targets, in fp32.

    Args:
        call: runs the model on ``inputs``: the engine, so that its hooks and its scaling of the loss take part, or the
            model itself.
        model: the Hugging Face model in it, or PEFT's wrapper of one.
        chunk: tokens whose logits exist at a time. None: ``default_chunk``, where the model allows it. 0: all. Where
            all tokens fit into one chunk nothing is recomputed.

    Raises:
        ValueError: a chunk was asked for, and the model's logits cannot be had so.
    """
    chunks = 1 if chunk == 0 else _agreed(call, -(-len(targets.rows) // (chunk or default_chunk(model))))
    if chunks > 1:
        problem = why_not(model)
        if problem is None:
            route = _Route(model)
            with _shadowed(route.model, "forward", lambda **given: route.summed(given, targets, chunks)):
                return call(**inputs)
        if chunk is not None:
            raise ValueError(problem)
    if "logits_to_keep" in inspect.signature(type(unwrapped(model)).forward).parameters:
        logits = call(**inputs, logits_to_keep=targets.kept).logits  # (batch, kept, vocabulary)
    else:
        logits = call(**inputs).logits[:, targets.kept]
    return F.cross_entropy(logits.flatten(0, 1)[targets.rows].float(), targets.values, reduction="sum")


def classification_loss(call: Callable[..., Any], inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Sum of the examples' cross-entropies, in fp32; ``labels``: (batch,).

    Where the model has one logit it is regression: the sum of the squared errors.
    """
    logits = call(**inputs).logits.float()  # (batch, classes)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum")


def why_not(model: Any) -> str | None:
    """Why a model's logits cannot be had in chunks; None where they can. Found once, by trying it on a few tokens.

    All ranks must ask together.
    """
    inner = unwrapped(model)
    if inner not in _found:
        _found[inner] = _try(model)
    return _found[inner]


_found: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def _try(model: Any) -> str | None:
    problem = f"the logits of {type(unwrapped(model)).__name__} cannot be computed for some tokens at a time"
    device = next(unwrapped(model).parameters()).device
    inputs = {"input_ids": torch.arange(6, device=device)[None]}
    if unwrapped(model).config.is_encoder_decoder:
        return f"{problem}: it has an encoder"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
            route = _Route(model)
            with _shadowed(route.model, "forward", lambda **given: route.logits(given)):
                ours = model(**inputs)
        if ours.shape != logits.shape:
            return f"{problem}: they have the shape {tuple(ours.shape)} instead of {tuple(logits.shape)}"
        # Simulated tensors have no values.
        if type(logits) is Tensor and not torch.allclose(ours, logits, rtol=0, atol=0.01 * float(logits.abs().max())):
            return f"{problem}: they are not the same"
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"{problem}: {' '.join(str(error).split())}"
    finally:
        model.train(was_training)
    return None


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside PEFT's, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _Route:
    """A model's way to its logits in two parts: through its decoder, and on from any of the hidden states.

    The second part is the model's own forward on a decoder that only returns what it was given, so whatever the model
    does to its logits is done.
    """

    def __init__(self, model: Any):
        self.model = unwrapped(model)
        self._decoder = self.model.get_decoder()
        self._forward = self.model.forward
        path = next((name for name, module in self.model.named_modules() if module is self._decoder), "")
        if not path:
            raise ValueError("it has no decoder apart from its head")
        above, _, name = path.rpartition(".")
        self._name: str = name
        self._parent = self.model.get_submodule(above)

    def summed(self, given: Mapping[str, Any], targets: Targets, chunks: int) -> Tensor:
        hidden, others = self._decode(given)
        # Flat, (tokens, width): a batch's padding is not in it.
        row, column = targets.rows // len(targets.kept), targets.kept[targets.rows % len(targets.kept)]
        rows = hidden.flatten(0, 1).index_select(0, row * hidden.shape[1] + column)
        del hidden

        def loss(chunk: Tensor, values: Tensor) -> Tensor:
            logits = self._head(chunk[None], others)[0]
            return F.cross_entropy(logits.float(), values, reduction="sum")

        length, longer = divmod(len(targets.rows), chunks)
        lengths = [length + 1] * longer + [length] * (chunks - longer)
        total = rows.new_zeros((), dtype=torch.float32)
        for chunk, values in zip(rows.split(lengths), targets.values.split(lengths), strict=True):
            total = total + checkpoint(loss, chunk, values, use_reentrant=False)
        return total

    def logits(self, given: Mapping[str, Any]) -> Tensor:
        return self._head(*self._decode(given))

    def _decode(self, given: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The last hidden states, (batch, length, width), and what else the decoder returns."""
        outputs = self._decoder(**{name: value for name, value in given.items() if value is not None})
        self._kind, others = type(outputs), dict(outputs)
        return others.pop("last_hidden_state"), others

    def _head(self, hidden: Tensor, others: dict[str, Any]) -> Tensor:
        outputs = self._kind(last_hidden_state=hidden, **others)
        with _shadowed(self._parent, self._name, _Decoded(self._decoder, outputs)):
            return self._forward().logits


class _Decoded:
    """Stands for a decoder that has run; what else somebody wants of it, it has."""

    def __init__(self, decoder: Any, outputs: Any):
        self._decoder, self._outputs = decoder, outputs

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self._outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


@contextmanager
def _shadowed(module: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module has another value. A submodule stays registered, with all that hangs on it."""
    missing = object()
    before = module.__dict__.get(name, missing)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


def _agreed(call: Any, chunks: int) -> int:
    """The most chunks of any rank, where the head is gathered for each, so that all ranks gather as often."""
    stage = getattr(call, "zero_optimization_stage", None)
    if stage is None or stage() < 3:
        return chunks
    from deepspeed import comm as dist

    if dist.get_world_size() == 1:
        return chunks
    most = torch.tensor(chunks, device=call.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
