"""A Hugging Face causal model with a chat template, as the model that answers questions or as a local judge."""

from __future__ import annotations

import functools
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from jinja2 import TemplateError
from transformers import GenerationConfig

from hift_ds.evaluation.mt_bench.endpoint import Message
from hift_ds.evaluation.mt_bench.replies import Reply, Unread
from hift_ds.launch.data.answers import without_thinking
from hift_ds.launch.errors import UserError
from hift_ds.launch.methods.adapters import SETTINGS as ADAPTER_FILE
from hift_ds.launch.methods.adapters import load_adapter
from hift_ds.launch.model.loading import load_config, load_model, load_tokenizer
from hift_ds.launch.model.settings import ModelSettings
from hift_ds.model.positions import position_limit


class ChatModel:
    """A chat model on the accelerator, or on the CPU without one. It writes one reply at a time.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        seed: the seed of sampled replies; a call of `ask` may pass another one.
        adapter: the folder of an adapter that a training run has saved.

    Raises:
        UserError: the model or the adapter cannot be loaded, or the tokenizer has no chat template.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        dtype: str = "bfloat16",
        seed: int = 0,
        adapter: str | None = None,
    ) -> None:
        settings = ModelSettings(name_or_path=name, revision=revision)
        if (Path(name).expanduser() / ADAPTER_FILE).is_file():
            raise UserError(
                f"{name!r} holds an adapter, not a model; give it as --adapter, and give its base model as --model "
                f"({ADAPTER_FILE} names it)"
            )
        if problems := settings.problems():
            raise UserError("\n".join(text.removeprefix("model.name_or_path: ") for text in problems))
        self._tokenizer: Any = load_tokenizer(settings)
        if not self._tokenizer.chat_template:
            raise UserError(f"{name!r}: its tokenizer has no chat template, which MT-Bench needs; give a chat model")
        config = load_config(settings, self._tokenizer, None)
        accelerator = get_accelerator()
        model = load_model(settings, config, dtype, functools.partial(print, file=sys.stderr))
        whole: Any = model if adapter is None else load_adapter(model, adapter)
        self._model: Any = whole.to(accelerator.current_device_name(), model.dtype).eval()
        self._positions = position_limit(model).tokens
        self._seed = seed
        self._lock = threading.Lock()
        known = self._model.generation_config.eos_token_id
        ends = {self._tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
        self._ends = sorted(end for end in ends if end is not None)
        added = self._tokenizer.added_tokens_decoder.values()
        special = {*self._tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        # Calls of `generate` take missing settings from here.
        self._model.generation_config = GenerationConfig()
        # In the text of a message these would become control tokens, as if the template had written them.
        self._special = re.compile("|".join(map(re.escape, sorted(filter(None, special), key=len, reverse=True))))

    def stop(self) -> None:
        """Do nothing: a local model has no waiting requests."""

    @torch.no_grad()
    def ask(
        self,
        messages: Sequence[Message],
        temperature: float,
        max_tokens: int,
        seed: int | None = None,
        *,
        paid: Callable[[Unread], None] | None = None,
    ) -> Reply:
        """Reply to a conversation: greedy at temperature 0, otherwise sampled from all tokens.

        Only the temperature shapes the sampling. The model's own generation settings (top-p, penalties) are not used,
        so that models are comparable. A thinking block is no part of the reply's text. `ended` is "stop", "length"
        (`max_tokens`, or no positions left), or "context" with an empty text if the conversation leaves no position for
        a reply. `paid` is never called.
        """
        with self._lock:
            tokens = self._encode(messages)
            room = max_tokens if self._positions is None else min(max_tokens, self._positions - tokens.shape[1])
            if room < 1:
                return Reply("", "context", tokens.shape[1], 0)
            pad = self._tokenizer.pad_token_id
            how: dict[str, Any] = {"do_sample": False}
            if temperature > 0:
                how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            torch.manual_seed(self._seed if seed is None else seed)
            written = self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=GenerationConfig(
                    max_new_tokens=room, eos_token_id=self._ends or None, pad_token_id=pad, use_cache=True, **how
                ),
            )[0, tokens.shape[1] :].tolist()
        stopped = bool(written) and written[-1] in self._ends
        text = without_thinking(self._tokenizer.decode(written, skip_special_tokens=True)).strip()
        return Reply(text, "stop" if stopped else "length", tokens.shape[1], len(written))

    def _encode(self, messages: Sequence[Message]) -> torch.Tensor:
        """Return the token ids (1, length) of the conversation up to the reply."""
        plain = [{**one, "content": self._special.sub(_broken, one["content"])} for one in messages]
        try:
            encoded = self._template(plain)
        except TemplateError:
            if plain[0]["role"] != "system":
                raise
            # The template has no system role: put the system text before the first message.
            merged = {"role": "user", "content": f"{plain[0]['content']}\n\n{plain[1]['content']}"}
            encoded = self._template([merged, *plain[2:]])
        return encoded.to(self._model.device)

    def _template(self, messages: list[Message]) -> torch.Tensor:
        tokens: torch.Tensor = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        return tokens


def _broken(found: re.Match[str]) -> str:
    token = found[0]
    return f"{token[0]} {token[1:]}" if len(token) > 1 else ""
