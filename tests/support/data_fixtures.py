"""Files, tokenizers and short cuts for the tests of data; the tokenizers as fixtures are in conftest.py."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from hift_ds.launch.data.batches import Order
from hift_ds.launch.data.encoding import IGNORED, Example
from hift_ds.launch.data.loading import load_data
from hift_ds.launch.data.settings import DataSettings
from tests.support.paths import REPOSITORY

SHARED = Path(os.environ.get("HIFT_DATA", REPOSITORY.parent / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data (../shared/data) is not there")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITHOUT_MARKERS = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TWO_TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "one THINK two"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "three"},
]


def bpe(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A small byte-level BPE as GPT-2's, with merges over letters, digits and line breaks."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "user assistant system Question Answer the good answer is yes or no 12 34 12 34\n\n\n\nyes it was great"
    backend.train_from_iterator([text] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        **{"pad_token": "<pad>", "eos_token": "<|im_end|>", **special},
    )


def window_batches(
    n: int, seed: int, global_batch: int, micro_batch: int, rank: int, world: int, start: int = 0
) -> Iterator[list[list[int]]]:
    """The micro-batches of a rank in each step from `start` on, as indices of examples: ranks take turns."""
    order = Order(n, seed, global_batch)
    for step in itertools.count(start):
        window = order.window(step)
        starts = range(rank * micro_batch, global_batch, micro_batch * world)
        yield [window[at : at + micro_batch] for at in starts]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(tokenizer: Any, *, task: str = "causal-lm", seed: int = 0, **settings: Any) -> Any:
    return load_data(DataSettings(**settings), tokenizer, task=task, seed=seed)


def load_rows(tokenizer: Any, folder: Path, rows: list[Any], **settings: Any) -> Any:
    path = write_jsonl(folder / "rows.jsonl", rows)
    return load(tokenizer, **{"name": "jsonl", "path": str(path), **settings})


def classify(tokenizer: Any, folder: Path, rows: list[Any], **settings: Any) -> Any:
    return load_rows(tokenizer, folder, rows, task="sequence-classification", **settings)


def trained_texts(tokenizer: Any, example: Example) -> list[str]:
    """The text of each stretch of trained tokens, decoded on its own."""
    assert isinstance(example.labels, list) and len(example.labels) == len(example.input_ids)
    pairs = list(zip(example.input_ids, example.labels, strict=True))
    assert all(label in (IGNORED, token) for token, label in pairs)  # not shifted
    stretches = itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in stretch]) for trained, stretch in stretches if trained]
