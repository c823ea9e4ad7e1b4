"""The losses of language models and classifiers; a language model's logits can be computed a few tokens at a time.

The logits of all tokens are as wide as the vocabulary, and exist in 16 bit, in fp32 and as an fp32 gradient. They take
most of the memory of the head, and grow with the number of tokens. The chunked loss keeps the hidden states of all
tokens and the logits of one chunk. The backward pass recomputes the logits of each chunk (``torch.utils.checkpoint``).

DeepSpeed's ``TiledFusedLogitsLoss`` does not fit here. Its forward pass computes the gradient of the head for a loss of
weight 1, and its backward pass scales the gradient of the hidden states only. The head's gradient would be wrong with
a loss scale, or if the loss is divided by the number of tokens. It also accumulates into the head's gradient once per
chunk, and ZeRO's hooks count each time as a complete gradient. Autograd calls the hooks once, after all chunks.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # label of a token that is not a target
CHUNK_BYTES = 2**27  # of the fp32 logits of a default chunk
_CHUNK_MULTIPLE = 64  # tokens; matrix products are fast at multiples of this


@dataclass(frozen=True)
class Targets:
    """The tokens that a model must predict, and their positions in the batch.

    Attributes:
        kept: positions at which at least one sequence has a target, shape (kept,).
        rows: indices of the targets in the flattened (batch, kept) positions, shape (tokens,).
        values: the target tokens, shape (tokens,).
        most: the number of targets on the rank that has the most. None: unknown; at ZeRO-3 the ranks then exchange
            their numbers, for which the host waits.
    """

    kept: Tensor
    rows: Tensor
    values: Tensor
    most: int | None = None


def find_targets(labels: Tensor, most: int | None = None) -> Targets:
    """Return the targets of labels of shape (batch, length), where position t predicts label t + 1.

    Labels equal to ``IGNORED`` are not targets. The sizes of the result depend on the labels, so the host waits for
    labels on the device: find the targets before the labels are copied there.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    trained = shifted != IGNORED
    kept = trained.any(dim=0).nonzero().squeeze(1)
    return Targets(kept, trained[:, kept].flatten().nonzero().squeeze(1), shifted[trained], most)


def default_chunk(model: Any) -> int:
    """Return the number of tokens whose fp32 logits take at most ``CHUNK_BYTES``, at least 1."""
    tokens = CHUNK_BYTES // (4 * unwrapped(model).config.get_text_config().vocab_size)
    return tokens // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE or max(1, tokens)


ChunkLoss = Callable[[Tensor, Tensor], Tensor]  # hidden states and targets of some tokens -> their summed loss


def sum_chunks(loss: ChunkLoss, rows: Tensor, values: Tensor, chunks: int) -> Tensor:
    """Return the sum of the losses of all chunks. The backward pass recomputes each chunk.

    Args:
        loss: computes the summed loss of a chunk.
        rows: hidden states of the targets, shape (tokens, width).
        values: the targets, shape (tokens,).
        chunks: number of chunks.
    """
    lengths = [chunk_length(len(rows), chunks, index) for index in range(chunks)]
    total = rows.new_zeros((), dtype=torch.float32)
    for chunk, targets in zip(rows.split(lengths), values.split(lengths), strict=True):
        total = total + checkpoint(loss, chunk, targets, use_reentrant=False)
    return total


def chunk_length(tokens: int, chunks: int, index: int) -> int:
    """Return the length of a chunk. All lengths are almost equal; the first chunks are the longest."""
    length, longer = divmod(tokens, chunks)
    return length + (index < longer)


def summed_loss(
    call: Callable[..., Any],
    model: Any,
    inputs: Mapping[str, Tensor],
    targets: Targets,
    chunk: int | None = None,
    router_weight: float = 0.0,
    sum_chunks: Callable[..., Tensor] = sum_chunks,
) -> Tensor:
    """Return the sum of the cross-entropies of the targets, and the weighted router loss, a scalar in fp32.

    Args:
        call: runs the model on ``inputs``: the engine, whose hooks must run, or the model itself.
        model: the Hugging Face model in ``call``, or PEFT's wrapper of it.
        inputs: arguments of the model.
        targets: see :func:`find_targets`.
        chunk: tokens in a chunk of logits. None: :func:`default_chunk` if the model supports chunks. 0: all tokens.
            Nothing is recomputed if one chunk holds all tokens.
        router_weight: factor of :func:`router_loss`. A mean over all targets needs the number of targets for each call.
        sum_chunks: :func:`sum_chunks`; the memory planner replaces it.

    Raises:
        ValueError: ``chunk`` is not None, and the model does not support chunks.
    """
    chunks = 1 if chunk == 0 else _most_chunks(call, targets, chunk or default_chunk(model))
    if chunks > 1:
        problem = chunking_problem(model)
        if problem is None:
            split = _SplitForward(model)
            total = partial(sum_chunks, chunks=chunks)
            with _replaced(split.model, "forward", lambda **given: split.summed(given, targets, total, router_weight)):
                return call(**inputs)
        if chunk is not None:
            raise ValueError(problem)
    if "logits_to_keep" in inspect.signature(type(unwrapped(model)).forward).parameters:
        outputs = call(**inputs, logits_to_keep=targets.kept)
        logits = outputs.logits  # (batch, kept, vocabulary)
    else:
        outputs = call(**inputs)
        logits = outputs.logits[:, targets.kept]
    loss = F.cross_entropy(logits.flatten(0, 1)[targets.rows].float(), targets.values, reduction="sum")
    return loss + router_weight * router_loss(model, outputs) if router_weight else loss


def router_coefficient(model: Any) -> float:
    """Return the coefficient of the loss with which a mixture of experts balances its routers; 0 without one.

    It is the attribute of the model that its own loss uses.
    """
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return next((float(value) for name in names if (value := getattr(unwrapped(model), name, None))), 0.0)


def router_loss(model: Any, outputs: Any) -> Tensor | float:
    """Return the term that a mixture of experts adds to its own loss: the coefficient times the router loss.

    transformers returns the router loss as ``aux_loss`` if the configuration has ``output_router_logits``. It depends
    on all tokens of the call that are not padding.

    Returns:
        A scalar; 0 if the model returns no router loss.
    """
    loss = getattr(outputs, "aux_loss", None)
    return 0.0 if loss is None else router_coefficient(model) * loss


def classification_loss(call: Callable[..., Any], inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of a classifier, a scalar in fp32.

    For a model with one logit (regression), return the sum of the squared errors.

    Args:
        call: runs the model on ``inputs``.
        inputs: arguments of the model.
        labels: class or value of each example, shape (batch,).
    """
    logits = call(**inputs).logits.float()  # (batch, classes)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum")


def chunking_problem(model: Any) -> str | None:
    """Return why the logits of a model cannot be computed in chunks, or None if they can.

    The first call tries it on a few tokens. All ranks must call together.
    """
    inner = unwrapped(model)
    if inner not in _problems:
        _problems[inner] = _try_chunks(model)
    return _problems[inner]


_problems: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def _try_chunks(model: Any) -> str | None:
    problem = f"the logits of {type(unwrapped(model)).__name__} cannot be computed in chunks"
    device = next(unwrapped(model).parameters()).device
    inputs = {"input_ids": torch.arange(6, device=device)[None]}
    if unwrapped(model).config.is_encoder_decoder:
        return f"{problem}: the model has an encoder"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
            split = _SplitForward(model)
            with _replaced(split.model, "forward", lambda **given: split.logits(given)):
                ours = model(**inputs)
        if ours.shape != logits.shape:
            return f"{problem}: a chunk has the shape {tuple(ours.shape)} instead of {tuple(logits.shape)}"
        # Fake tensors have no values to compare.
        if type(logits) is Tensor and not torch.allclose(ours, logits, rtol=0, atol=0.01 * float(logits.abs().max())):
            return f"{problem}: the values differ from those of the whole logits"
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"{problem}: {' '.join(str(error).split())}"
    finally:
        model.train(was_training)
    return None


def unwrapped(model: Any) -> Any:
    """Return the Hugging Face model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _SplitForward:
    """A model's forward pass in two steps: the decoder, and the head on any of the hidden states.

    The second step runs the model's own forward pass with a decoder that returns given hidden states. The model
    therefore applies everything it does to its logits, such as scaling or soft-capping.

    Raises:
        ValueError: the model has no decoder apart from its head.
    """

    def __init__(self, model: Any):
        self.model = unwrapped(model)
        self._decoder = self.model.get_decoder()
        self._forward = self.model.forward
        path = next((name for name, module in self.model.named_modules() if module is self._decoder), "")
        if not path:
            raise ValueError("the model has no decoder apart from its head")
        above, _, name = path.rpartition(".")
        self._name: str = name
        self._parent = self.model.get_submodule(above)

    def summed(
        self, given: Mapping[str, Any], targets: Targets, sum_chunks: Callable[..., Tensor], router_weight: float
    ) -> Tensor:
        """Return the summed loss of the targets and the weighted router loss.

        ``sum_chunks(loss, rows, values)`` cuts the targets into chunks.
        """
        hidden, others = self._decode(given)
        of_router: Tensor | float = 0.0
        if router_weight and "router_logits" in others:
            # The model's own forward pass, with the head on one token.
            of_router = router_weight * router_loss(self.model, self._outputs(hidden[:, :1], others, given))
        others.pop("router_logits", None)  # otherwise each chunk would compute the router loss
        # Hidden states of the targets only, (tokens, width), without padding.
        row, column = targets.rows // len(targets.kept), targets.kept[targets.rows % len(targets.kept)]
        rows = hidden.flatten(0, 1).index_select(0, row * hidden.shape[1] + column)
        del hidden

        def loss(chunk: Tensor, values: Tensor) -> Tensor:
            logits = self._head(chunk[None], others)[0]
            return F.cross_entropy(logits.float(), values, reduction="sum")

        return sum_chunks(loss, rows, targets.values) + of_router

    def logits(self, given: Mapping[str, Any]) -> Tensor:
        """Return the logits of all tokens through both steps, shape (batch, length, vocabulary)."""
        return self._head(*self._decode(given))

    def _decode(self, given: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the last hidden states, shape (batch, length, width), and the other outputs of the decoder."""
        outputs = self._decoder(**{name: value for name, value in given.items() if value is not None})
        self._kind, others = type(outputs), dict(outputs)
        return others.pop("last_hidden_state"), others

    def _head(self, hidden: Tensor, others: dict[str, Any]) -> Tensor:
        return self._outputs(hidden, others, {}).logits

    def _outputs(self, hidden: Tensor, others: dict[str, Any], given: Mapping[str, Any]) -> Any:
        """Return the outputs of the model's forward pass with a decoder that returns ``hidden`` and ``others``."""
        outputs = self._kind(last_hidden_state=hidden, **others)
        with _replaced(self._parent, self._name, _Decoded(self._decoder, outputs)):
            return self._forward(**given)


class _Decoded:
    """Replaces a decoder and returns given outputs. Other attributes are those of the decoder."""

    def __init__(self, decoder: Any, outputs: Any):
        self._decoder, self._outputs = decoder, outputs

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self._outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module inside the context. A submodule stays registered with its hooks."""
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


def _most_chunks(call: Any, targets: Targets, chunk: int) -> int:
    """Return the most chunks of any rank. At ZeRO-3 each chunk gathers the head, so all ranks need equally many."""
    chunks = -(-len(targets.rows) // chunk)
    stage = getattr(call, "zero_optimization_stage", None)
    if stage is None or stage() < 3:
        return chunks
    from deepspeed import comm as dist

    if dist.get_world_size() == 1:
        return chunks
    if targets.most is not None:
        return -(-targets.most // chunk)
    most = torch.tensor(chunks, device=call.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
