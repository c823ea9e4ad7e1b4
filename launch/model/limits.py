"""Whether tokenized examples fit the sizes of a model: its positions, its vocabulary and its token types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hift_ds.launch.errors import UserError
from hift_ds.model.positions import position_limit


def check_limits(
    model: Any,
    tokenizer: Any,
    examples: Mapping[str, Iterable[Any]],
    found: Mapping[str, Mapping[str, Any]],
    longest: int,
    answered: int,
) -> list[str]:
    """Refuse examples that the model cannot take, before its weights are loaded.

    Args:
        model: the model on the meta device.
        examples: the examples (`input_ids`) by "training" and "held-out".
        found: the `highest_token` and the `highest_type` in these examples, by the same names.
        longest: tokens of the longest example, after truncation to `data.max_length`.
        answered: tokens of the longest held-out prompt with `training.max_new_tokens`; 0 if nothing is generated.

    Returns:
        Notes for the user.

    Raises:
        UserError: naming every problem.
    """
    notes: list[str] = []
    problems = _position_problems(model, longest, answered)
    size = _vocabulary(model)
    # Examples are read only where one has such a token.
    tokens = {
        f"{part} examples": (one.input_ids for one in own)
        for part, own in examples.items()
        if size is not None and found[part]["highest_token"] >= size
    }
    problems += token_problems(model, tokenizer, tokens, notes)
    problems += _type_problems(model, max(one["highest_type"] for one in found.values()))
    if problems:
        raise UserError("\n".join(problems))
    return notes


def _position_problems(model: Any, longest: int, answered: int) -> list[str]:
    limit = position_limit(model).tokens
    if limit is None:
        return []
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None) or limit
    reserved = f" ({stated - limit} of its {stated} positions are for padding)" if stated > limit else ""
    problems = []
    if longest > limit:
        problems.append(
            f"data.max_length: the longest example has {longest} tokens, but the model takes at most "
            f"{limit}{reserved}. Set data.max_length={limit} (longer examples are truncated and counted), or use a "
            "model with more."
        )
    if answered > limit:
        problems.append(
            f"training.max_new_tokens: the longest held-out prompt and its answer need {answered} positions, but the "
            f"model takes at most {limit} tokens{reserved}. Lower training.max_new_tokens by at least "
            f"{answered - limit}, or set data.eval_examples=0."
        )
    return problems


def token_problems(
    model: Any, tokenizer: Any, parts: Mapping[str, Iterable[Sequence[int]]], notes: list[str]
) -> list[str]:
    """Return the problems of texts with tokens that the model does not have.

    Args:
        model: the model, which may be on the meta device.
        parts: the token ids of each text, by the name of the texts. They are read only if the tokenizer has tokens that
            the model does not have.
        notes: gets a note if no text has such a token.
    """
    size = _vocabulary(model)
    vocabulary = tokenizer.get_vocab()
    if size is None or max(vocabulary.values(), default=0) < size:
        return []
    outside = f"{sum(one >= size for one in vocabulary.values())} tokens of the tokenizer have ids from {size}"
    problems = []
    for part, texts in parts.items():
        using, number, first = 0, 0, 0
        for number, ids in enumerate(texts, 1):  # noqa: B007
            if (highest := max(ids, default=0)) >= size:
                using, first = using + 1, first or highest
        if using:
            problems.append(
                f"model.tokenizer: {using} of {number} {part} have a token that the model does "
                f"not have, e.g. {tokenizer.convert_ids_to_tokens(first)!r} (id {first}); its "
                f"vocabulary has {size} tokens."
            )
    if problems:
        problems.append(
            f"{outside}. Give the model more tokens in Python: model = "
            f"transformers.{type(model).__name__}.from_pretrained(OLD); model.resize_token_embeddings"
            f"({max(vocabulary.values()) + 1}); model.save_pretrained(NEW). Then set model.name_or_path=NEW and, "
            "unless it is set, model.tokenizer=OLD. Or use a tokenizer without them."
        )
    else:
        notes.append(f"note: {outside}, which the model does not have; no text has one")
    return problems


def highest_ids(model: Any) -> tuple[int | None, int | None]:
    """Return the highest token id and token type that a model takes; None: any."""
    size, types = _vocabulary(model), getattr(model.config.get_text_config(), "type_vocab_size", None)
    return size and size - 1, types and types - 1


def _vocabulary(model: Any) -> int | None:
    return getattr(model.get_input_embeddings(), "num_embeddings", None)


def _type_problems(model: Any, highest: int) -> list[str]:
    types = getattr(model.config.get_text_config(), "type_vocab_size", None)
    if not types or highest < types:
        return []
    return [
        f"model.tokenizer: it marks texts with the token types 0 to {highest}, but the model has {types} "
        "(type_vocab_size). Use the model's own tokenizer (model.tokenizer=null), or put both texts into one column."
    ]
