"""Predictions on a task's examples.

A causal model predicts the candidate with the highest average log-likelihood, or writes an answer by greedy decoding.
A model with a classification head predicts the class with the highest logit, or the number of a regression.

The procedure follows section 4 and table 13 of the paper, and MeZO (Malladi et al. 2023). Under ZeRO-3 all ranks must
make the same calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria

from hift_ds.evaluation.tasks.catalog import Task, TaskExample
from hift_ds.evaluation.tasks.loading import classification_rows, few_shot
from hift_ds.launch.data.answers import Decoder, has_ended, read_answer, until
from hift_ds.launch.data.batches import collate, collate_prompts
from hift_ds.launch.data.encoding import EvalExample, Example, beginning, encode, spaced, tokenize_segments
from hift_ds.launch.errors import UserError
from hift_ds.launch.model.loading import evaluating
from hift_ds.model.positions import position_limit


@dataclass
class Predictions:
    """Predictions in the order of the examples.

    Attributes:
        values: from `predict`, indices of candidates or texts; from `classify`, indices of classes or numbers.
        truncated: how many prompts were cut on the left (`predict`), or texts on the right (`classify`).
        losses: the cross entropy (nats) of the right candidate among the candidates, by their average log-likelihoods,
            or of the right class, for each example that has one. Empty for written answers and regressions.
    """

    values: list[Any]
    truncated: int
    losses: list[float] = field(default_factory=list)


def predict(
    task: Task,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TaskExample],
    *,
    demonstrations: Sequence[TaskExample] = (),
    batch_size: int = 8,
    max_length: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    after_batch: Callable[[], object] = lambda: None,
) -> Predictions:
    """Predict with a causal language model, for `task.score`. Of equally likely candidates the first is predicted.

    Args:
        demonstrations: solved examples to put before each prompt (in-context learning).
        batch_size: sequences in a batch; it changes predictions only by rounding.
        max_length: tokens of a prompt with its answer; longer prompts lose their beginning. None = the maximum of the
            model's config, if it names one.
        num_beams: beams for written answers; 1 = greedy. The paper's table 4 uses 10 for E2E.
        length_penalty: a beam's log-likelihood is divided by its length to this power; table 4 uses 0.9.
        after_batch: called after each batch.

    Raises:
        UserError: the task has no prompt, or `max_length` leaves no room for the prompt.
    """
    if not task.prompted:
        raise UserError(f"{task.name} has no prompt; use a model with a classification head")
    limit = max_length or position_limit(model).tokens
    before = few_shot(demonstrations)
    if task.max_new_tokens:
        beams = {"num_beams": num_beams, **({"length_penalty": length_penalty} if num_beams > 1 else {})}
        prompts = [before + one.prompt for one in examples]
        return _write(task, model, tokenizer, prompts, batch_size, limit, beams, after_batch)
    pairs = [(before + one.prompt, candidate) for one in examples for candidate in one.candidates]
    likelihoods, truncated = average_log_likelihoods(model, tokenizer, pairs, batch_size, limit, after_batch)
    values: list[int] = []
    losses: list[float] = []
    start, cut = 0, 0
    for one in examples:
        stop = start + len(one.candidates)
        values.append(max(range(stop - start), key=lambda i, start=start: likelihoods[start + i]))  # type: ignore[misc]
        if one.label >= 0:
            losses.append(-torch.tensor(likelihoods[start:stop]).log_softmax(-1)[one.label].item())
        cut += any(truncated[start:stop])
        start = stop
    return Predictions(values, cut, losses)


def classify(
    task: Task,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TaskExample],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    after_batch: Callable[[], object] = lambda: None,
) -> Predictions:
    """Predict with a model that has a head for `task.labels`, for `task.score(..., classified=True)`.

    Args:
        batch_size: texts in a batch; it changes predictions only by rounding.
        max_length: tokens of a text or pair; longer ones are cut on the right, as in training. None = the smaller
            maximum of the tokenizer and the model's config.
        after_batch: called after each batch.

    Raises:
        UserError: the task has no classes, the head has another number of outputs, or a text has no tokens.
    """
    rows = classification_rows(examples)
    if not task.labels:
        raise UserError(f"{task.name} has no classes; use a causal language model")
    limits = [max_length] if max_length else [position_limit(model).tokens, tokenizer.model_max_length]
    limit = min(one for one in limits if one is not None)
    encoded, counts = encode(
        rows, tokenizer, labels=list(task.labels), template=False, question=False, max_length=limit
    )
    if len(encoded) < len(examples):
        raise UserError(f"{task.name}: {len(examples) - len(encoded)} of {len(examples)} texts have no tokens")
    # A causal model with a head finds the last token by the padding token of its config.
    padding = _padding(tokenizer) if model.config.pad_token_id is None else model.config.pad_token_id
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids), reverse=True)
    values: list[Any] = [None] * len(encoded)
    losses = [] if task.regression else [0.0] * len(encoded)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = collate([encoded[i] for i in batch], padding)
            del inputs["labels"]
            device = next(model.parameters()).device
            logits = model(**{key: value.to(device) for key, value in inputs.items()}).logits.float()
            if logits.shape[-1] != len(task.labels):
                raise UserError(
                    f"{task.name} has {len(task.labels)} classes, but the model's head has {logits.shape[-1]} outputs"
                )
            chosen = logits.squeeze(-1) if task.regression else logits.argmax(dim=-1)
            for i, value in zip(batch, chosen.tolist(), strict=True):
                values[i] = value
            if not task.regression:
                for i, chances in zip(batch, logits.log_softmax(-1).tolist(), strict=True):
                    losses[i] = -chances[examples[i].target]
            after_batch()
    return Predictions(values, counts["truncated"], losses)


def average_log_likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int,
    max_length: int | None = None,
    after_batch: Callable[[], object] = lambda: None,
) -> tuple[list[float], list[bool]]:
    """Return the mean log-probability (nats, in fp32) of the candidate's tokens for each (prompt, candidate) pair.

    A space separates prompt and candidate if neither side has whitespace. Tokenization is the same as in training.

    Returns:
        The means, and whether each prompt was cut on the left to fit in `max_length` tokens.
    """
    cases = []  # tokens of prompt and candidate
    truncated = []
    for prompt, candidate in pairs:
        prompt_ids, answer = tokenize_segments(tokenizer, [prompt, spaced(prompt, candidate)])
        kept, cut = _fitted(tokenizer, prompt_ids, max_length and max_length - len(answer))
        truncated.append(cut)
        cases.append((kept, answer))
    # The last token predicts nothing, so one-token candidates after the same prompt share a forward pass.
    inputs: dict[tuple[int, ...], list[int]] = {}
    for i, (kept, answer) in enumerate(cases):
        inputs.setdefault((*kept, *answer[:-1]), []).append(i)
    order = sorted(inputs, key=len, reverse=True)  # little padding, and out-of-memory errors come first
    means = [0.0] * len(pairs)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            # The first position that predicts an answer token.
            first = min(len(cases[i][0]) - 1 for ids in batch for i in inputs[ids])
            logits = _logits(model, tokenizer, batch, first)
            for row, ids in enumerate(batch):
                for i in inputs[ids]:
                    targets = torch.tensor(cases[i][1], device=logits.device)
                    begin = len(cases[i][0]) - 1 - first
                    chances = logits[row, begin : begin + len(targets)].float().log_softmax(-1)
                    means[i] = chances.gather(-1, targets[:, None]).mean().item()
            after_batch()
    return means, truncated


def _logits(model: Any, tokenizer: PreTrainedTokenizerBase, batch: Sequence[tuple[int, ...]], first: int) -> Tensor:
    """Return the logits (sequences, positions from `first` on, vocabulary) of right-padded sequences."""
    inputs = collate([Example(list(ids), []) for ids in batch], _padding(tokenizer))
    del inputs["labels"]
    longest = inputs["input_ids"].shape[1]
    positions = torch.arange(first, longest)
    some = "logits_to_keep" in inspect.signature(model.forward).parameters  # logits of whole prompts are large
    device = next(model.parameters()).device
    options = {"logits_to_keep": positions.to(device)} if some else {}
    logits = model(**{key: value.to(device) for key, value in inputs.items()}, **options, use_cache=False).logits
    return logits[:, -len(positions) :]


def _write(
    task: Task,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    max_length: int | None,
    beams: dict[str, Any],
    after_batch: Callable[[], object],
) -> Predictions:
    """Generate answers up to one of the task's stop texts, without what comes before them (`read_answer`).

    Solutions are searched for their answer, so what comes before it stays.
    """
    limit = max_length and max_length - task.max_new_tokens
    fitted = [_fitted(tokenizer, tokenize_segments(tokenizer, [prompt])[0], limit) for prompt in prompts]
    cases = [kept for kept, _ in fitted]
    order = sorted(range(len(cases)), key=lambda i: len(cases[i]), reverse=True)
    end = model.generation_config.eos_token_id
    written = _Written(task, tokenizer)
    values = [""] * len(prompts)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = collate_prompts([EvalExample([], [], prompt_ids=cases[i]) for i in batch], _padding(tokenizer))
            device = next(model.parameters()).device
            length = inputs["input_ids"].shape[1]
            tokens = model.generate(  # (sequences, prompt + new tokens)
                **{key: value.to(device) for key, value in inputs.items()},
                **beams,
                stopping_criteria=[_AnswerEnds(written, length)],
                do_sample=False,
                max_new_tokens=task.max_new_tokens,
                pad_token_id=_padding(tokenizer),
                eos_token_id=tokenizer.eos_token_id if end is None else end,
            )
            for i, answer in zip(batch, written.answers(tokens[:, length:]), strict=True):
                values[i] = answer
            after_batch()
    return Predictions(values, sum(cut for _, cut in fitted))


class _Written:
    """Reads what a model has written for a task."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self._task, self._tokenizer, self._decode = task, tokenizer, Decoder(tokenizer)

    def answers(self, tokens: Tensor) -> list[str]:
        """Return the answers in new tokens (sequences, tokens)."""
        read = _solution if self._task.solution else read_answer
        return [read(text, self._task.stops) for text in self._texts(tokens)]

    def have_ended(self, tokens: Tensor) -> list[bool]:
        """Return whether each answer has come to one of the task's stop texts."""
        stops = self._task.stops
        if self._task.solution:
            return [any(stop in text for stop in stops) for text in self._texts(tokens)]
        return [has_ended(text, stops) for text in self._texts(tokens)]

    def _texts(self, tokens: Tensor) -> list[str]:
        if self._task.solution:  # as lm-evaluation-harness decodes them
            return self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return self._decode(tokens.tolist())


def _solution(text: str, stops: Sequence[str]) -> str:
    return until(text, stops).strip()


class _AnswerEnds(StoppingCriteria):
    """Ends a sequence when its answer has ended. A stop text before the answer, such as a line break, ends nothing."""

    def __init__(self, written: _Written, prompt_length: int) -> None:
        self._written, self._prompt_length = written, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = self._written.have_ended(input_ids[:, self._prompt_length :])
        return torch.tensor(ended, device=input_ids.device)


def _fitted(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], limit: int | None) -> tuple[list[int], bool]:
    """Return a prompt's tokens with the beginning-of-sequence token, and whether it was cut on the left to `limit`.

    Some token must predict the first answer token, so an empty prompt becomes the beginning-of-sequence token (or
    end-of-sequence), even if the tokenizer does not add it.
    """
    start = beginning(tokenizer)
    if not start and not prompt_ids:
        start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    if limit is None or len(start) + len(prompt_ids) <= limit:
        return start + prompt_ids, False
    if limit <= len(start):
        raise UserError(f"max_length leaves {limit} tokens for the prompt next to the answer; raise it")
    return start + prompt_ids[len(start) - limit :], True


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token; any token works, because padding is masked."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
