"""The losses of language models and classifiers; a language model's logits can be computed a piece at a time.

The logits of all tokens are as wide as the vocabulary, and exist in 16 bit, in fp32 and as an fp32 gradient. They take
most of the memory of the head, and grow with the number of tokens. The chunked loss keeps the hidden states of all
tokens and the logits of one piece:

* The forward pass computes the loss of one chunk of tokens at a time.
* The backward pass computes the logits of each chunk again, and from them the gradient of the chunk's hidden states.
* If the head is trained, the backward pass also computes the logits of all tokens for one slice of the vocabulary at a
  time, and from them those rows of the head's gradient.

Each row of either gradient is therefore the result of one matrix product, as with all logits at once. A sum over chunks
would be rounded for each chunk, and needs the head's gradient up to three times. The price is one more product with the
head than in a chunked loss that sums the head's gradient, in steps that train the head.

DeepSpeed's ``TiledFusedLogitsLoss`` does not fit here. Its forward pass computes the gradient of the head for a loss of
weight 1, and its backward pass scales the gradient of the hidden states only. The head's gradient would be wrong with
a loss scale, or if the loss is divided by the number of tokens. It also accumulates into the head's gradient once per
chunk, and ZeRO's hooks count each time as a complete gradient. Here, all pieces are computed inside one call of the
head, around which ZeRO-3 gathers its weight, and autograd gets one gradient.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # label of a token that is not a target
CHUNK_BYTES = 2**27  # of the fp32 logits of a default chunk
_CHUNK_MULTIPLE = 64  # tokens or rows; matrix products are fast at multiples of this
SMALLER = 4  # pieces beside the head's gradient are smaller than chunks by this factor


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


class Pieces:
    """How the logits of some tokens are cut. The memory planner replaces it.

    Args:
        chunk: tokens whose logits exist at a time.
    """

    def __init__(self, chunk: int):
        self.chunk = chunk

    def of_tokens(self, tokens: int) -> Iterable[slice]:
        """Return the chunks of tokens."""
        return (slice(start, start + self.chunk) for start in range(0, tokens, self.chunk))

    def of_gradient(self, tokens: int, vocabulary: int) -> Iterable[tuple[slice, slice]]:
        """Return tokens and rows of the vocabulary of each piece from which rows of the head's gradient are computed.

        All tokens are in each piece. The head's gradient exists beside them, so they are smaller than the chunks.
        """
        width = max(1, self.chunk * vocabulary // (SMALLER * max(1, tokens)))
        width = width // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE or width
        return ((slice(0, tokens), slice(start, start + width)) for start in range(0, vocabulary, width))


Finish = Callable[[Tensor], Tensor]  # what a model does to outputs of the head, such as scaling; the shape stays


class _HeadLoss(torch.autograd.Function):
    """The summed cross-entropy of a linear head, whose logits exist one piece at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        finish: Finish | None,
        targets: Tensor,
        pieces: Pieces,
    ) -> Tensor:
        """Return the sum, a scalar in fp32.

        Args:
            hidden: input of the head, shape (tokens, width).
            weight, bias: of the head, shapes (vocabulary, width) and (vocabulary,).
            finish: see ``Finish``; None: nothing.
            targets: shape (tokens,).
            pieces: how the logits are cut.
        """
        total = torch.zeros((), device=hidden.device)
        log_sums = torch.empty(len(hidden), device=hidden.device)  # of the exponentials of each token's logits
        for tokens in pieces.of_tokens(len(hidden)):
            total += _chunk_loss(hidden[tokens], weight, bias, finish, targets[tokens], log_sums[tokens])
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums)
        ctx.finish, ctx.pieces = finish, pieces
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        """Return the gradients of the hidden states, the weight and the bias."""
        hidden, weight, bias, targets, log_sums = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]

        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        if of_hidden is not None:
            for tokens in ctx.pieces.of_tokens(len(hidden)):
                gradient = _output_gradient(hidden[tokens], weight, bias, ctx.finish, targets[tokens], scale)
                torch.mm(gradient, weight, out=of_hidden[tokens])
                del gradient  # before the next piece
        of_weight = torch.empty_like(weight) if needs_weight else None
        of_bias = torch.empty_like(bias) if needs_bias else None
        if needs_weight or needs_bias:
            for tokens, rows in ctx.pieces.of_gradient(len(hidden), len(weight)):
                head = weight[rows], None if bias is None else bias[rows], ctx.finish
                places = targets[tokens] - rows.start
                gradient = _output_gradient(hidden[tokens], *head, places, scale, log_sums[tokens])
                if of_weight is not None:
                    torch.mm(gradient.t(), hidden[tokens], out=of_weight[rows])
                if of_bias is not None:
                    torch.sum(gradient, 0, out=of_bias[rows])
                del gradient
        return of_hidden, of_weight, of_bias, None, None, None


def _chunk_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, finish: Finish | None, targets: Tensor, log_sums: Tensor
) -> Tensor:
    """Return the summed loss of some tokens, and write the logarithm of the sum of each token's exponentials."""
    logits = F.linear(hidden, weight, bias)
    logits = (finish(logits) if finish else logits).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    torch.add(losses, logits.gather(1, targets[:, None]).squeeze(1), out=log_sums)
    return losses.sum()


def _output_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    finish: Finish | None,
    places: Tensor,
    scale: Tensor,
    log_sums: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the head's output, shape (tokens, rows).

    Args:
        hidden: shape (tokens, width).
        weight, bias: rows of the head, shapes (rows, width) and (rows,).
        finish: see ``Finish``; None: nothing.
        places: the target of each token, counted from the first row. It may be outside of these rows.
        scale: the gradient of the summed loss.
        log_sums: as :func:`_chunk_loss` wrote them; None: the rows are the whole vocabulary.
    """
    output = F.linear(hidden, weight, bias)
    with torch.enable_grad():
        logits = finish(output.requires_grad_()) if finish else output
    kind, gradient = logits.dtype, logits.detach()
    if finish is None:
        del output, logits
    # The probabilities, in fp32, as the backward pass of the cross-entropy computes them.
    gradient = (gradient.float().log_softmax(1) if log_sums is None else gradient - log_sums[:, None]).exp_()
    index = places.clamp(0, len(weight) - 1)
    gradient.mul_(scale).scatter_add_(1, index[:, None], (places == index).to(gradient.dtype).mul_(-scale)[:, None])
    gradient = gradient.to(kind)
    return torch.autograd.grad(logits, output, gradient)[0] if finish else gradient


def summed_loss(
    call: Callable[..., Any],
    model: Any,
    inputs: Mapping[str, Tensor],
    targets: Targets,
    chunk: int | None = None,
    router_weight: float = 0.0,
    pieces: Callable[[int], Pieces] = Pieces,
) -> Tensor:
    """Return the sum of the cross-entropies of the targets, and the weighted router loss, a scalar in fp32.

    Args:
        call: runs the model on ``inputs``: the engine, whose hooks must run, or the model itself.
        model: the Hugging Face model in ``call``, or PEFT's wrapper of it.
        inputs: arguments of the model.
        targets: see :func:`find_targets`.
        chunk: tokens in a chunk of logits. None: :func:`default_chunk` if the model supports chunks. 0: all tokens.
            Nothing is recomputed if one chunk holds all tokens; the model then computes all logits.
        router_weight: factor of :func:`router_loss`. A mean over all targets needs the number of targets for each call.
        pieces: makes the :class:`Pieces`; the memory planner replaces it.

    Raises:
        ValueError: ``chunk`` is not None, and the model does not support chunks.
    """
    most = default_chunk(model) if chunk is None else chunk
    if most and _most_targets(call, targets) > most:
        problem = chunking_problem(model)
        if problem is None:
            split, cut = _SplitForward(model), pieces(most)
            with _replaced(split.model, "forward", lambda **given: split.summed(given, targets, cut, router_weight)):
                return call(**inputs)
        if chunk is not None:
            raise ValueError(problem)
        _warn_once(f"{problem}; the logits of all tokens exist at once")
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


@cache
def _warn_once(message: str) -> None:
    from deepspeed.utils import log_dist  # a plan needs no DeepSpeed

    log_dist(message, ranks=[0], level=logging.WARNING)


def _try_chunks(model: Any) -> str | None:
    problem = f"the logits of {type(unwrapped(model)).__name__} cannot be computed in chunks"
    device = next(unwrapped(model).parameters()).device
    inputs = {"input_ids": torch.arange(6, device=device)[None]}
    if unwrapped(model).config.is_encoder_decoder:
        return f"{problem}: the model has an encoder"
    head = unwrapped(model).get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return f"{problem}: its head is {type(head).__module__}.{type(head).__name__}, not torch.nn.Linear"
    modes = {module: module.training for module in model.modules()}  # parts may differ, as frozen towers do
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
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"{problem}: {' '.join(str(error).split())}"
    finally:
        for module, mode in modes.items():
            module.training = mode
    return None


def unwrapped(model: Any) -> Any:
    """Return the Hugging Face model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _SplitForward:
    """A model's forward pass in steps: the decoder, the head, and what the model does to the head's output.

    The last step runs the model's own forward pass with a decoder and a head that return given tensors. The model
    therefore applies everything it does to its logits, such as scaling or soft-capping.

    Raises:
        ValueError: the model has no decoder apart from its head.
    """

    def __init__(self, model: Any):
        self.model = unwrapped(model)
        self._forward = self.model.forward
        self._decoder, self._head = self.model.get_decoder(), self.model.get_output_embeddings()
        paths = {id(module): name for name, module in self.model.named_modules()}
        self._paths = [paths.get(id(module), "") for module in (self._decoder, self._head)]
        if not all(self._paths):
            raise ValueError("the model has no decoder apart from its head")

    def summed(self, given: Mapping[str, Any], targets: Targets, pieces: Pieces, router_weight: float) -> Tensor:
        """Return the summed loss of the targets and the weighted router loss."""
        hidden, others = self._decode(given)
        of_router: Tensor | float = 0.0
        if router_weight and "router_logits" in others:
            # The model's own forward pass, with the head on one token.
            of_router = router_weight * router_loss(self.model, self._outputs(hidden[:, :1], others, given))
        others.pop("router_logits", None)  # otherwise each piece would compute the router loss
        # Hidden states of the targets only, (tokens, width), without padding.
        row, column = targets.rows // len(targets.kept), targets.kept[targets.rows % len(targets.kept)]
        rows = hidden.flatten(0, 1).index_select(0, row * hidden.shape[1] + column)
        del hidden

        def compute(*head: Any) -> Any:
            return _HeadLoss.apply(*head, targets.values, pieces)

        return self._inside_head(rows, others, compute) + of_router

    def logits(self, given: Mapping[str, Any]) -> Tensor:
        """Return the logits of all tokens, put together from pieces, shape (batch, length, vocabulary)."""
        hidden, others = self._decode(given)

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None, finish: Finish | None) -> Tensor:
            chunks = [F.linear(tokens, weight, bias).tensor_split(2, dim=1) for tokens in hidden.tensor_split(2)]
            return torch.cat([torch.cat([finish(part) if finish else part for part in row], 1) for row in chunks])

        return self._inside_head(hidden.flatten(0, 1), others, compute).unflatten(0, hidden.shape[:2])

    def _inside_head(self, rows: Tensor, others: dict[str, Any], compute: Callable[..., Tensor]) -> Tensor:
        """Return ``compute(input, weight, bias, finish)`` of the head, computed inside a call of the head.

        The hooks of the head run once: ZeRO-3 gathers its weight around the call, and around its backward pass.

        Args:
            rows: hidden states, shape (tokens, width).
            others: other outputs of the decoder.
            compute: its arguments are the head's input of shape (tokens, width), its weight and bias, and what the
                model does to the head's output, or None if that is nothing.
        """
        inputs: list[Tensor] = []
        blank = rows.new_zeros(1, 1, 1)

        def keep(hidden: Tensor) -> Tensor:
            inputs.append(hidden)
            return blank

        changed = self._outputs(rows[None], others, {}, keep).logits is not blank
        finish = partial(self._finish, rows.new_zeros(1, 1, rows.shape[-1]), others) if changed else None
        (hidden,) = inputs

        def forward(hidden: Tensor) -> Tensor:
            given: list[Any] = [hidden.flatten(0, -2), self._head.weight, self._head.bias]
            kind = hidden.device.type
            if torch.is_autocast_enabled(kind):  # it does not reach the pieces; autograd reverses these casts
                given = [tensor if tensor is None else tensor.to(torch.get_autocast_dtype(kind)) for tensor in given]
            with torch.autocast(kind, enabled=False):
                return compute(*given, finish)

        with _replaced(self._head, "forward", forward):
            return self._head(hidden)

    def _finish(self, hidden: Tensor, others: dict[str, Any], output: Tensor) -> Tensor:
        """Return what the model makes of an output of the head, of the same shape (tokens, columns)."""
        return self._outputs(hidden, others, {}, lambda _: output[None]).logits.squeeze(0)

    def _decode(self, given: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the last hidden states, shape (batch, length, width), and the other outputs of the decoder."""
        outputs = self._decoder(**{name: value for name, value in given.items() if value is not None})
        self._kind, others = type(outputs), dict(outputs)
        return others.pop("last_hidden_state"), others

    def _outputs(self, hidden: Tensor, others: dict[str, Any], given: Mapping[str, Any], head: Any = None) -> Any:
        """Return the outputs of the model's forward pass with a decoder that returns ``hidden`` and ``others``.

        Args:
            head: replaces the head; None: the model's own.
        """
        outputs = self._kind(last_hidden_state=hidden, **others)
        with ExitStack() as stack:
            parts = _StandIn(self._decoder, lambda *_, **__: outputs), head and _StandIn(self._head, head)
            for path, part in zip(self._paths, parts, strict=True):
                above, _, name = path.rpartition(".")
                if part is not None:
                    stack.enter_context(_replaced(self.model.get_submodule(above), name, part))
            return self._forward(**given)


class _StandIn:
    """Replaces a module in calls. Other attributes are those of the module."""

    def __init__(self, module: Any, call: Callable[..., Any]):
        self._module, self._call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


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


def _most_targets(call: Any, targets: Targets) -> int:
    """Return the number of targets, at ZeRO-3 the largest of any rank: all ranks then call the same modules."""
    own = len(targets.values)
    stage = getattr(call, "zero_optimization_stage", None)
    if stage is None or stage() < 3:
        return own
    from deepspeed import comm as dist

    if dist.get_world_size() == 1:
        return own
    if targets.most is not None:
        return targets.most
    most = torch.tensor(own, device=call.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
