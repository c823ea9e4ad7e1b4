"""Predictions of a causal model: the candidate of highest average log-likelihood, or a greedily decoded answer.

And those of a model with a classification head: the class of the highest logit, or the number of a regression.

Section 4 and table 13 of the paper, after MeZO (Malladi et al. 2023). Under ZeRO-3 every rank must score the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hift_ds.evaluation.tasks.catalog import Task, TaskExample
from hift_ds.evaluation.tasks.loading import classification_rows, few_shot
from hift_ds.launch.data.batches import collate, collate_prompts
from hift_ds.launch.data.encoding import EvalExample, Example, beginning, encode, spaced, tokenize_segments
from hift_ds.launch.errors import UserError
from hift_ds.launch.model.loading import evaluating


@dataclass
class Predictions:
    """Indices of candidates or texts, in the examples' order; `truncated` of the prompts were cut on the left.

    From `classify`: ids of classes or numbers; `truncated` of the texts were cut on the right.
    """

    values: list[Any]
    truncated: int


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
    """What `task.score` takes. Candidates of the same likelihood: the first.

    Args:
        demonstrations: solved examples to put before each prompt (in-context learning).
        batch_size: sequences at a time; it changes no prediction beyond rounding.
        max_length: tokens of a prompt with its answer; longer prompts lose their beginning. None = what the model's
            config names, if it does.
        num_beams: of written answers; 1 = greedy. The paper's table 4 has 10 for E2E.
        length_penalty: the power of its length by which a beam's log-likelihood is divided; 0.9 there.
        after_batch: called after each batch.
    """
    if not task.prompted:
        raise UserError(f"{task.name} has no template for prompts; use a model with a classification head")
    limit = max_length or getattr(model.config, "max_position_embeddings", None)
    before = few_shot(demonstrations)
    if task.max_new_tokens:
        beams = {"num_beams": num_beams, **({"length_penalty": length_penalty} if num_beams > 1 else {})}
        prompts = [before + one.prompt for one in examples]
        return _write(task, model, tokenizer, prompts, batch_size, limit, beams, after_batch)
    pairs = [(before + one.prompt, candidate) for one in examples for candidate in one.candidates]
    likelihoods, truncated = average_log_likelihoods(model, tokenizer, pairs, batch_size, limit, after_batch)
    values: list[int] = []
    start, cut = 0, 0
    for one in examples:
        stop = start + len(one.candidates)
        values.append(max(range(stop - start), key=lambda i, start=start: likelihoods[start + i]))  # type: ignore[misc]
        cut += any(truncated[start:stop])
        start = stop
    return Predictions(values, cut)


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
    """What `task.score(..., classified=True)` takes, from a model with a head for `task.labels`.

    Args:
        batch_size: texts at a time; it changes no prediction beyond rounding.
        max_length: tokens of a text or pair; longer ones are cut on the right, as in training. None = the less of what
            the tokenizer and the model's config name, if they do.
        after_batch: called after each batch.

    Raises:
        UserError: the task has no classes, the head has not as many, or a text has no tokens.
    """
    rows = classification_rows(examples)
    if not task.labels:
        raise UserError(f"{task.name} has no classes; use a causal language model")
    limits = (
        [max_length]
        if max_length
        else [getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length]
    )
    limit = min(one for one in limits if one is not None)
    encoded, counts = encode(
        rows, tokenizer, labels=list(task.labels), template=False, question=False, max_length=limit
    )
    if len(encoded) < len(examples):
        raise UserError(f"{task.name}: {len(examples) - len(encoded)} of {len(examples)} texts have no tokens")
    # A causal model with a head looks for the last token that is not padding by the config's own.
    padding = _padding(tokenizer) if model.config.pad_token_id is None else model.config.pad_token_id
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids), reverse=True)
    values: list[Any] = [None] * len(encoded)
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
            after_batch()
    return Predictions(values, counts["truncated"])


def average_log_likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int,
    max_length: int | None = None,
    after_batch: Callable[[], object] = lambda: None,
) -> tuple[list[float], list[bool]]:
    """For each pair of prompt and candidate, the mean log-probability (nats) of the candidate's tokens, in fp32.

    The candidate follows after a space where neither side has whitespace, with the tokens that training gives it.

    Returns:
        The means, and whether the prompt was cut on the left to fit `max_length` tokens.
    """
    cases = []  # tokens of prompt and candidate
    truncated = []
    for prompt, candidate in pairs:
        prompt_ids, answer = tokenize_segments(tokenizer, [prompt, spaced(prompt, candidate)])
        kept, cut = _fitted(tokenizer, prompt_ids, max_length and max_length - len(answer))
        truncated.append(cut)
        cases.append((kept, answer))
    # The last token predicts nothing, so candidates of one token after the same prompt need the model once.
    inputs: dict[tuple[int, ...], list[int]] = {}
    for i, (kept, answer) in enumerate(cases):
        inputs.setdefault((*kept, *answer[:-1]), []).append(i)
    order = sorted(inputs, key=len, reverse=True)  # little padding, and what does not fit in memory comes first
    means = [0.0] * len(pairs)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            first = min(len(cases[i][0]) - 1 for ids in batch for i in inputs[ids])  # predicts the first answer's start
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
    """Logits (sequences, positions from `first`, vocabulary) of right-padded sequences."""
    inputs = collate([Example(list(ids), []) for ids in batch], _padding(tokenizer))
    del inputs["labels"]
    longest = inputs["input_ids"].shape[1]
    positions = torch.arange(first, longest)
    some = "logits_to_keep" in inspect.signature(model.forward).parameters  # those of whole prompts are large
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
    """Answers up to the task's stop text, without the whitespace around them."""
    limit = max_length and max_length - task.max_new_tokens
    fitted = [_fitted(tokenizer, tokenize_segments(tokenizer, [prompt])[0], limit) for prompt in prompts]
    cases = [kept for kept, _ in fitted]
    order = sorted(range(len(cases)), key=lambda i: len(cases[i]), reverse=True)
    end = model.generation_config.eos_token_id
    options: dict[str, Any] = {"stop_strings": [task.stop], "tokenizer": tokenizer} if task.stop else {}
    values = [""] * len(prompts)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = collate_prompts([EvalExample([], [], prompt_ids=cases[i]) for i in batch], _padding(tokenizer))
            device = next(model.parameters()).device
            tokens = model.generate(  # (sequences, prompt + new tokens)
                **{key: value.to(device) for key, value in inputs.items()},
                **options,
                **beams,
                do_sample=False,
                max_new_tokens=task.max_new_tokens,
                pad_token_id=_padding(tokenizer),
                eos_token_id=tokenizer.eos_token_id if end is None else end,
            )
            new = tokens[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                values[i] = (text.partition(task.stop)[0] if task.stop else text).strip()
            after_batch()
    return Predictions(values, sum(cut for _, cut in fitted))


def _fitted(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], limit: int | None) -> tuple[list[int], bool]:
    """A prompt's tokens after the beginning-of-sequence token, and whether the first ones were left out to fit.

    Something must predict an answer's first token: an empty prompt begins with the beginning-of-sequence token (or
    else end-of-sequence), also where the tokenizer does not set it by itself.
    """
    start = beginning(tokenizer)
    if not start and not prompt_ids:
        start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    if limit is None or len(start) + len(prompt_ids) <= limit:
        return start + prompt_ids, False
    if limit <= len(start):
        raise UserError(f"max_length leaves {limit} tokens for the prompt beside the answer; raise it")
    return start + prompt_ids[len(start) - limit :], True


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token will do: padded places are masked."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
