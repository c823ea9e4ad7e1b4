"""Predictions on a task's examples.

A causal model predicts the candidate with the highest average log-likelihood, or writes an answer by greedy decoding.
A model with a classification head predicts the class with the highest logit, or the number of a regression.

The procedure follows section 4 and table 13 of the paper, and MeZO (Malladi et al. 2023). Under ZeRO-3 all ranks must
make the same calls.
"""

from __future__ import annotations

import functools
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
from hift_ds.launch.data.batches import collate, collate_prompts, on_device
from hift_ds.launch.data.encoding import EvalExample, Example, beginning, encode, spaced, tokenize_segments
from hift_ds.launch.errors import UserError
from hift_ds.launch.model.loading import evaluating
from hift_ds.model.positions import position_limit

CHUNK = 2**20  # about so many fp32 logits of candidates' tokens exist at a time: 4 MiB, which fits into caches


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
    found: list[Tensor] = []  # logits (texts, classes) in this order, on the device
    with evaluating(model):
        device = next(model.parameters()).device
        for start in range(0, len(order), batch_size):
            inputs = collate([encoded[i] for i in order[start : start + batch_size]], padding)
            del inputs["labels"]
            (inputs,) = on_device([inputs], device)
            found.append(model(**inputs).logits.float())
            if (outputs := found[-1].shape[-1]) != len(task.labels):
                raise UserError(
                    f"{task.name} has {len(task.labels)} classes, but the model's head has {outputs} outputs"
                )
            after_batch()
    ordered = torch.cat(found).cpu()  # the host waits only here
    logits = torch.empty_like(ordered)
    logits[order] = ordered
    if task.regression:
        return Predictions(logits.squeeze(-1).tolist(), counts["truncated"])
    chances = logits.log_softmax(-1).tolist()
    losses = [-chances[i][one.target] for i, one in enumerate(examples)]
    return Predictions(logits.argmax(dim=-1).tolist(), counts["truncated"], losses)


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
    fit = functools.partial(_fitted, tokenizer, beginning(tokenizer))
    for prompt, candidate in pairs:
        prompt_ids, answer = tokenize_segments(tokenizer, [prompt, spaced(prompt, candidate)])
        kept, cut = fit(prompt_ids, max_length and max_length - len(answer))
        truncated.append(cut)
        cases.append((kept, answer))
    # The last token predicts nothing, so one-token candidates after the same prompt share a forward pass.
    inputs: dict[tuple[int, ...], list[int]] = {}
    for i, (kept, answer) in enumerate(cases):
        inputs.setdefault((*kept, *answer[:-1]), []).append(i)
    order = sorted(inputs, key=len, reverse=True)  # little padding, and out-of-memory errors come first
    read: list[int] = []  # the pairs in the order in which their chances are computed
    chances: list[Tensor] = []  # log-probabilities of the candidates' tokens, on the device
    with evaluating(model):
        device = next(model.parameters()).device
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            # The first position that predicts an answer token.
            first = min(len(cases[i][0]) - 1 for ids in batch for i in inputs[ids])
            rows = [(row, i) for row, ids in enumerate(batch) for i in inputs[ids]]
            read += [i for _, i in rows]
            # The row, the position and the token of each token of a candidate, (3, tokens).
            where = torch.tensor(
                [
                    (row, len(cases[i][0]) - 1 - first + number, token)
                    for row, i in rows
                    for number, token in enumerate(cases[i][1])
                ]
            ).T.contiguous()
            logits, where = _logits(model, tokenizer, batch, first, where, device)
            for row, position, token in where.split(max(1, CHUNK // logits.shape[-1]), dim=1):
                some = logits[row, position].float().log_softmax(-1)
                chances.append(some.gather(-1, token[:, None]).squeeze(-1))
            del logits
            after_batch()
    means = [0.0] * len(pairs)
    found = torch.cat(chances).cpu() if chances else torch.empty(0)  # the host waits only here
    for i, own in zip(read, found.split([len(cases[i][1]) for i in read]), strict=True):
        means[i] = own.mean().item()
    return means, truncated


def _logits(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[int, ...]],
    first: int,
    where: Tensor,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the logits (sequences, positions from `first` on, vocabulary) of right-padded sequences.

    Also return the tensor `where` on the device.
    """
    inputs = collate([Example(list(ids), []) for ids in batch], _padding(tokenizer))
    del inputs["labels"]
    positions = torch.arange(first, inputs["input_ids"].shape[1])
    (moved,) = on_device([{**inputs, "logits_to_keep": positions, "where": where}], device)
    where = moved.pop("where")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:  # logits of whole prompts are large
        del moved["logits_to_keep"]
    return model(**moved, use_cache=False).logits[:, -len(positions) :], where


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
    limit, opening = max_length and max_length - task.max_new_tokens, beginning(tokenizer)
    fitted = [_fitted(tokenizer, opening, tokenize_segments(tokenizer, [prompt])[0], limit) for prompt in prompts]
    cases = [kept for kept, _ in fitted]
    order = sorted(range(len(cases)), key=lambda i: len(cases[i]), reverse=True)
    end = model.generation_config.eos_token_id
    written = _Written(task, tokenizer)
    values = [""] * len(prompts)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = collate_prompts([EvalExample([], [], prompt_ids=cases[i]) for i in batch], _padding(tokenizer))
            (inputs,) = on_device([inputs], next(model.parameters()).device)
            length = inputs["input_ids"].shape[1]
            ends = _AnswerEnds(written, length) if beams["num_beams"] == 1 else _BeamEnds(written, length)
            tokens = model.generate(  # (sequences, prompt + new tokens)
                **inputs,
                **beams,
                stopping_criteria=[ends],
                do_sample=False,
                max_new_tokens=task.max_new_tokens,
                pad_token_id=_padding(tokenizer),
                eos_token_id=tokenizer.eos_token_id if end is None else end,
            )
            for i, answer in zip(batch, written.answers(tokens[:, length:].tolist()), strict=True):
                values[i] = answer
            after_batch()
    return Predictions(values, sum(cut for _, cut in fitted))


class _Written:
    """Reads what a model has written for a task."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self._task, self._tokenizer, self._decode = task, tokenizer, Decoder(tokenizer)
        self._can_stop: dict[int, bool] = {}

    def answers(self, rows: list[list[int]]) -> list[str]:
        """Return the answers in rows of new tokens."""
        read = _solution if self._task.solution else read_answer
        return [read(text, self._task.stops) for text in self._texts(rows)]

    def has_stop(self, row: list[int]) -> tuple[bool, bool]:
        """Return whether the text of new tokens has one of the task's stop texts, and whether that ends the answer."""
        (text,) = self._texts([row])
        has = any(stop in text for stop in self._task.stops)
        return has, has and (self._task.solution or has_ended(text, self._task.stops))

    def can_stop(self, token: int) -> bool:
        """Return whether a text may have a stop text after this token that it did not have before.

        Then the token's own text has the last character of a stop text, or a part of a character, which the tokens
        before it may complete.
        """
        if token not in self._can_stop:
            (text,) = self._texts([[token, token]])  # twice, because some tokenizers drop the first space of a text
            ends = [stop[-1:] for stop in self._task.stops]
            # Some tokenizers drop a space at the end of a text, or an apostrophe's spaces once both are there.
            hidden = any(end in " '" for end in ends)
            self._can_stop[token] = hidden or "\ufffd" in text or any(end in text for end in ends)
        return self._can_stop[token]

    def _texts(self, rows: list[list[int]]) -> list[str]:
        if self._task.solution:  # as lm-evaluation-harness decodes them
            return self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return self._decode(rows)


def _solution(text: str, stops: Sequence[str]) -> str:
    return until(text, stops).strip()


class _AnswerEnds(StoppingCriteria):
    """Ends a sequence when its answer has ended. A stop text before the answer, such as a line break, ends nothing.

    It looks at the sequences whose newest token may have ended them: to decode all of them after each token would take
    longer than a small model. Sequences keep their rows in greedy decoding.
    """

    def __init__(self, written: _Written, prompt_length: int) -> None:
        self._written, self._length = written, prompt_length
        self._open: dict[int, list[int]] = {}  # new tokens of the rows that have not ended
        self._ended: Tensor | None = None
        self._stopped: set[int] = set()  # rows with a stop text before the answer, which each token may end

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._ended is None:
            self._open = {row: [] for row in range(len(input_ids))}
            self._ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        newest = input_ids[:, self._length :].tolist()
        self._length = input_ids.shape[1]
        ended = []
        for row, tokens in self._open.items():
            tokens += newest[row]
            if row in self._stopped or any(map(self._written.can_stop, newest[row])):
                has_stop, ends = self._written.has_stop(tokens)
                if has_stop:
                    self._stopped.add(row)
                if ends:
                    ended.append(row)
        if ended:
            for row in ended:
                del self._open[row]
            over = [row not in self._open for row in range(len(input_ids))]
            self._ended = torch.tensor(over, device=input_ids.device)
        return self._ended


class _BeamEnds(StoppingCriteria):
    """The same for beams, which change their rows."""

    def __init__(self, written: _Written, prompt_length: int) -> None:
        self._written, self._length = written, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows = input_ids[:, self._length :].tolist()
        return torch.tensor([self._written.has_stop(row)[1] for row in rows], device=input_ids.device)


def _fitted(
    tokenizer: PreTrainedTokenizerBase, opening: list[int], prompt_ids: list[int], limit: int | None
) -> tuple[list[int], bool]:
    """Return a prompt's tokens after those of `opening`, and whether it was cut on the left to `limit`.

    Some token must predict the first answer token, so an empty prompt becomes the beginning-of-sequence token (or
    end-of-sequence), even if the tokenizer does not add it.
    """
    start = opening
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
