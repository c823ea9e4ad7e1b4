"""Evaluation on held-out examples: the score of greedy answers or predicted classes, or the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from deepspeed import comm as dist
from transformers import PreTrainedTokenizerBase

from hift_ds.launch.callbacks.callback import Callback, Step, finite
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.data.answers import Decoder
from hift_ds.launch.data.batches import collate, collate_prompts, trained_tokens
from hift_ds.launch.data.encoding import EvalExample
from hift_ds.launch.data.loading import Data
from hift_ds.launch.data.scores import Score
from hift_ds.launch.model.batch_loss import summed_loss
from hift_ds.launch.model.loading import evaluating


class EvaluationInterrupted(Exception):
    """A rank was asked to stop during an evaluation."""


class HeldOut(Callback):
    """Evaluate every `training.eval_every` steps, and put the result into the step's record as `held_out`.

    Args:
        evaluate: evaluates the engine on all ranks and returns what `evaluate` below returns.

    Attributes:
        latest: step and result of the latest evaluation; None before the first.
    """

    def __init__(self, every: int | None, last: int, evaluate: Callable[[], dict[str, Any] | None]) -> None:
        self.every, self.last, self.evaluate = every, last, evaluate
        self.latest: tuple[int, dict[str, Any] | None] | None = None  # step and result

    def describe(self, step: Step) -> None:
        """Evaluate, if it is due. If a signal interrupts the evaluation, `held_out` is None."""
        is_due = self.every and (step.number % self.every == 0 or step.number == self.last)
        if is_due and step.record["loss"] is not None:  # a run that has diverged ends here
            step.record["held_out"] = None
            with contextlib.suppress(EvaluationInterrupted):
                result = self.evaluate()
                self.latest = step.number, result
                step.record["held_out"] = {key: value for key, value in (result or {}).items() if key != "sample"}


def better(result: dict[str, Any], than: dict[str, Any]) -> bool:
    """Return whether a held-out result beats an earlier one: by a lower loss, or a score that is at least as high.

    Of equal scores the later one wins: a model that does not answer anything right yet still learns.
    """
    if "score" in result:
        return result["score"] >= than["score"]
    return result["loss"] is not None and (than["loss"] is None or result["loss"] < than["loss"])


@torch.no_grad()
def evaluate(
    engine: Any,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """Score the model on the held-out examples, which the ranks share. Every rank must call it.

    Args:
        after_batch: called on every rank after each batch, equally often.

    Returns:
        None if nothing is held out. If the data has a score: `metric`, `score` (0 to 1), the counts `correct`,
        `unanswered` and `n`, and `sample`, the first held-out example's `prompt`, `answer` and `expected`. Otherwise
        `loss`, the mean over all trained tokens in nats (None if it is not finite), and `n`.
    """
    if not data.eval:
        return None
    rank, world = dist.get_rank(), dist.get_world_size()
    size = settings.training.eval_batch_size or settings.micro_batch_size
    mine = range(rank, len(data.eval), world)
    # Under ZeRO-3 a forward pass gathers weights from all ranks, so a rank that has run out of examples repeats the
    # first one and does not count it.
    n_batches = -(-len(range(0, len(data.eval), world)) // size)
    predict = _generate if settings.model.task == "causal-lm" else _classify
    measure = _loss if data.score is None else predict
    engine.eval()
    # Sums, so that memory does not grow with the examples; the host does not wait for the losses.
    losses, tokens = torch.zeros((), dtype=torch.float64, device=engine.device), 0
    score = Score("", 0, 0) if data.score is None else data.score([], [])
    first: Any = None
    try:
        with evaluating(engine.module):
            for index in range(n_batches):
                batch = [data.eval[i] for i in mine[index * size : (index + 1) * size]]
                found: list[Any] = measure(engine, batch or [data.eval[0]], tokenizer, settings)
                if batch and data.score is not None:
                    score += data.score(found, batch)
                    first = found[0] if index == 0 else first
                elif batch:
                    for loss, n in found:
                        losses, tokens = losses + loss.double(), tokens + n
                after_batch()
        if settings.zero_stage == 3 and hasattr(engine, "empty_partition_cache"):
            engine.empty_partition_cache()  # weights that were prefetched for a forward pass that does not come
    finally:
        engine.train()
    if data.score is None:
        sums = torch.stack((losses, torch.tensor(tokens, dtype=torch.float64, device=engine.device)))
        dist.all_reduce(sums)
        loss, tokens = sums.tolist()
        return {"loss": finite(loss / tokens), "n": len(data.eval)}
    score = _sum_over_ranks(score, engine.device)
    return {"metric": score.metric, "score": score.value, "correct": score.correct, "n": score.n,
            "unanswered": score.unanswered, "sample": _sample(data, first) if rank == 0 else None}  # fmt: skip


def _loss(
    engine: Any, batch: list[EvalExample], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[tuple[torch.Tensor, int]]:
    """Return the summed loss of the batch's trained tokens, in nats, on the device, and their number."""
    inputs = collate(batch, tokenizer.pad_token_id)
    loss = summed_loss(engine, inputs, settings.model.task, settings.training.loss_chunk)
    return [(loss, trained_tokens(inputs))]


def _generate(
    engine: Any, batch: list[EvalExample], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[str]:
    """Return greedy answers as text. Every rank makes one forward pass per token while any rank still generates."""
    inputs = {key: value.to(engine.device) for key, value in collate_prompts(batch, tokenizer.pad_token_id).items()}
    stop = engine.module.generation_config.eos_token_id
    tokens = engine.module.generate(  # (batch, prompt + new tokens)
        **inputs,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=settings.training.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id if stop is None else stop,
        synced_gpus=settings.zero_stage == 3 and dist.get_world_size() > 1,
    )
    return Decoder(tokenizer)(tokens[:, inputs["input_ids"].shape[1] :].tolist())


def _classify(
    engine: Any, batch: list[EvalExample], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[int]:
    """Return predicted label ids."""
    inputs = {key: value.to(engine.device) for key, value in collate(batch, tokenizer.pad_token_id).items()}
    del inputs["labels"]
    return engine.module(**inputs).logits.argmax(dim=-1).tolist()


def _sum_over_ranks(score: Score, device: torch.device) -> Score:
    counts = torch.tensor([score.correct, score.n, score.unanswered], device=device)
    dist.all_reduce(counts)
    return Score(score.metric, *counts.tolist())


def _sample(data: Data, prediction: Any) -> dict[str, str]:
    """Return the first held-out example with its prediction, which is the first of rank 0."""
    answer = prediction if isinstance(prediction, str) else data.report["labels"][prediction]
    return {"prompt": data.eval[0].prompt, "answer": answer, "expected": data.eval[0].reference}
