"""Answers that are generated for held-out examples, by a model that writes a given text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from hift_ds.launch.callbacks import held_out, records
from hift_ds.launch.data.encoding import EvalExample
from hift_ds.launch.data.scores import leading_words_match, number_match
from hift_ds.launch.model.tokenizer import byte_tokenizer


def generated(text: str) -> list[str]:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(one, special=True) for one in ("[THINK]", "[/THINK]", "<|im_start|>", "<|x|>")])
    written = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id, tokenizer.eos_token_id]

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([written] * len(input_ids))], dim=1)

    module = SimpleNamespace(generate=generate, generation_config=SimpleNamespace(eos_token_id=None))
    engine = SimpleNamespace(module=module, device=torch.device("cpu"))
    settings: Any = SimpleNamespace(training=SimpleNamespace(max_new_tokens=9), zero_stage=0)
    batch = [EvalExample([], [], prompt_ids=[5, 6]), EvalExample([], [], prompt_ids=[5, 6, 7])]
    first, second = held_out._generate(engine, batch, tokenizer, settings)
    assert first == second
    return [first]


@pytest.mark.parametrize(
    "text", ["great", "\n\nGreat", "<think>\nbad</think>great", "[THINK]bad[/THINK]great<|x|>", "\ufeffGreat.\nbad",
             "<|im_start|>assistant\ngreat"],
)  # fmt: skip
def test_label_words_are_read_where_the_answer_begins(text: str) -> None:
    score = leading_words_match(generated(text), [("great",)])
    assert (score.correct, score.unanswered) == (1, 0)


@pytest.mark.parametrize("text", ["", "\n \n", "<think>great", "[THINK]great", "<|im_start|>assistant", "<|x|>"])
def test_answers_that_are_empty_are_counted(text: str) -> None:
    score = leading_words_match(generated(text), [("great",)])
    assert (score.correct, score.unanswered) == (0, 1)
    assert number_match(generated(text), ["#### 4"]).unanswered == 1


def test_solutions_are_searched_as_they_were_written() -> None:
    for text, number in (
        ("<think>#### 4</think>#### 5", "4"),
        ("[THINK]#### 4[/THINK]#### 5", "4"),
        ("\n#### 5<|x|>", "5"),
    ):
        assert number_match(generated(text), [f"#### {number}"]).correct == 1


def test_the_line_of_a_step_says_how_many_answers_are_missing() -> None:
    found = {"metric": "exact_match", "score": 0.25, "unanswered": 3}
    assert records._held_out({"held_out": found}) == ["held-out exact match 25.0 % (3 without an answer)"]
    assert records._held_out({"held_out": found | {"unanswered": 0}}) == ["held-out exact match 25.0 %"]
