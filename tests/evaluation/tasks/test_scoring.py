"""Predictions of a tiny random Llama: against plain one-by-one computations, any batch size, and lm-eval's."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedTokenizerFast

from hift_ds.evaluation.tasks.catalog import TaskExample, find_task
from hift_ds.evaluation.tasks.loading import few_shot, load_task
from hift_ds.evaluation.tasks.scoring import _AnswerEnds, _BeamEnds, _Written, average_log_likelihoods, predict
from hift_ds.launch.data.answers import Decoder, has_ended
from hift_ds.launch.errors import UserError
from hift_ds.launch.model.tokenizer import byte_tokenizer
from tests.support.data_fixtures import SHARED, bpe, needs_shared
from tests.support.waits import Waits


@functools.cache
def llama(seed: int = 0, vocabulary: int = 400) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=4096, initializer_range=0.2, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


PAIRS = [
    ("it was", "great"), ("it was", "terrible, all in all"), ("it was great or", "no"), ("", "Human : who ran ?"),
    ("the good answer is yes or no?" * 9, "yes"), ("the good answer is yes or no?" * 9, "no"), ("A?\n", "yes it was"),
]  # fmt: skip


@torch.no_grad()
def one_by_one(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """The mean log-probability of the answer's tokens, each from a forward pass of its own over what precedes it."""
    apart = prompt == "" or prompt[-1].isspace()
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    whole = tokenizer(prompt + ("" if apart else " ") + answer, add_special_tokens=False).input_ids
    assert whole[: len(prompt_ids)] == prompt_ids
    before = prompt_ids or [tokenizer.eos_token_id]
    chances = []
    for token in whole[len(prompt_ids) :]:
        logits = model.eval()(torch.tensor([before])).logits[0, -1].double()
        chances.append((logits[token] - logits.logsumexp(0)).item())
        before = [*before, token]
    return sum(chances) / len(chances)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_average_log_likelihood_equals_one_by_one(batch_size: int) -> None:
    model, tokenizer = llama(), bpe()
    means, truncated = average_log_likelihoods(model, tokenizer, PAIRS, batch_size)
    expected = [one_by_one(model, tokenizer, *pair) for pair in PAIRS]
    assert means == pytest.approx(expected, abs=1e-5) and len(set(means)) == len(means)
    assert truncated == [False] * len(PAIRS)


def test_wrapped_models_without_logits_to_keep() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    ours, _ = average_log_likelihoods(Wrapped(), bpe(), PAIRS, 4)
    assert ours == pytest.approx(average_log_likelihoods(llama(), bpe(), PAIRS, 4)[0], abs=1e-6)


def test_long_prompts_lose_their_beginning() -> None:
    model, tokenizer = llama(), bpe()
    prompt = "the good answer is yes or no " * 9
    ids = tokenizer(prompt + "it was", add_special_tokens=False).input_ids
    answer = tokenizer(prompt + "it was great", add_special_tokens=False).input_ids[len(ids) :]
    pairs = [(prompt + "it was", "great"), ("it was", "great")]
    means, truncated = average_log_likelihoods(model, tokenizer, pairs, 2, max_length=20)
    kept = torch.tensor([ids[len(answer) - 20 :] + answer])
    assert kept.shape == (1, 20) and truncated == [True, False]
    with torch.no_grad():
        chances = model(kept).logits[0, -1 - len(answer) : -1].log_softmax(-1)
    expected = chances.gather(-1, torch.tensor(answer)[:, None]).mean().item()
    assert means[0] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UserError, match="max_length leaves 0 tokens for the prompt"):
        average_log_likelihoods(model, tokenizer, pairs, 2, max_length=len(answer))


def choices(n: int = 12) -> list[TaskExample]:
    words = ["red", "blue or green", "no", "yes it was"]
    return [
        TaskExample(f"rows:{i}", "the good answer is." * (i % 5 + 1), "", tuple(words[: 2 + i % 3]), i % 2)
        for i in range(n)
    ]


@pytest.mark.parametrize("start", ["", "the good answer is no\n\n"])
def test_choices_do_not_depend_on_the_batch(start: str) -> None:
    task, tokenizer = find_task("copa"), bpe()
    demonstrations = [TaskExample("d:1", start.removesuffix(" no\n\n"), "no")] if start else []
    assert few_shot(demonstrations) == start
    seen = set()
    for seed in range(4):
        model = llama(seed)
        expected, losses = [], []
        for one in choices():
            scores = [one_by_one(model, tokenizer, start + one.prompt, text) for text in one.candidates]
            expected.append(scores.index(max(scores)))
            losses.append(math.log(sum(math.exp(score - scores[one.label]) for score in scores)))
        for batch_size in (1, 5, 64):
            model.train()
            found = predict(task, model, tokenizer, choices(), batch_size=batch_size, demonstrations=demonstrations)
            assert found.values == expected and found.truncated == 0
            assert found.losses == pytest.approx(losses, abs=1e-5)
            assert model.training  # as it was
        seen.update(expected)
    assert len(seen) > 2  # the models do not always choose the same


@pytest.mark.parametrize("batch_size", [1, 5])
def test_of_equally_likely_candidates_the_first_is_chosen(batch_size: int) -> None:
    ties = [("no", "no"), ("yes it was", "yes it was", "yes it was"), ("red", "blue", "red"), ("blue", "red", "red")]
    examples = [TaskExample(f"rows:{i}", "the good answer is", "", words, 0) for i, words in enumerate(ties)]
    model, tokenizer = llama(), bpe()
    red_wins = one_by_one(model, tokenizer, "the good answer is", "red") > one_by_one(
        model, tokenizer, "the good answer is", "blue"
    )
    found = predict(find_task("copa"), model, tokenizer, examples, batch_size=batch_size)
    assert found.values == ([0, 0, 0, 1] if red_wins else [0, 0, 1, 0])
    assert found.losses[:2] == pytest.approx([math.log(2), math.log(3)], abs=1e-5)
    without = [dataclasses.replace(one, label=-1) for one in examples[:1]]  # no candidate is right
    assert predict(find_task("copa"), model, tokenizer, without + examples[1:]).losses == pytest.approx(
        found.losses[1:], abs=1e-5
    )


BLANKS = " \0\t\n\v\f\r\x1c\x1d\x1e\x1f"  # of what is one byte


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: str, n: int, stop: str) -> str:
    """The answer begins after white space; some bytes are no visible characters either."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    text = ""
    new: list[int] = []
    while len(new) < n and stop not in text:
        token = int(model.eval()(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == model.config.eos_token_id:
            break
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=True).lstrip(BLANKS)
    return text.split(stop)[0].strip(BLANKS)


def test_written_answers_do_not_depend_on_the_batch() -> None:
    tokenizer = byte_tokenizer()
    examples = [TaskExample("", f"Question: what is {'very ' * (i % 4)}{i}? Answer:", "") for i in range(10)]
    stopped = 0
    for seed in range(3):
        model = llama(seed, len(tokenizer))
        for stop in ("\n", ")", "V"):
            task = dataclasses.replace(find_task("squad"), stops=(stop,), max_new_tokens=12)
            expected = [greedy(model, tokenizer, one.prompt, 12, stop) for one in examples]
            stopped += sum(len(text) < 3 for text in expected)
            for batch_size in (1, 4, 10):
                found = predict(task, model, tokenizer, examples, batch_size=batch_size)
                assert found.values == expected and found.losses == []
    assert stopped  # some end by the stop text
    task = dataclasses.replace(find_task("squad"), max_new_tokens=12)
    cut = predict(task, llama(0, len(tokenizer)), tokenizer, examples, max_length=30)
    whole = predict(task, llama(0, len(tokenizer)), tokenizer, examples)
    assert cut.truncated == len(examples) and whole.truncated == 0
    last = [dataclasses.replace(one, prompt=one.prompt[-18:]) for one in examples]  # a byte is a token
    assert cut.values == predict(task, llama(0, len(tokenizer)), tokenizer, last).values


class Forced(LogitsProcessor):
    """Forces the tokens of a text after a prompt, and then the end."""

    def __init__(self, ids: list[int], end: int, start: int) -> None:
        self.ids, self.end, self.start = ids, end, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        done = input_ids.shape[1] - self.start
        forced = torch.full_like(scores, -1e9)
        forced[:, self.ids[done] if done < len(self.ids) else self.end] = 0
        return forced


class Writer:
    """A model that writes a text, and then the end, after every prompt; it counts the tokens it was let write."""

    def __init__(self, text: str, tokenizer: Any, end: int | None = None) -> None:
        model = llama(0, len(tokenizer))
        ids = tokenizer(text, add_special_tokens=False).input_ids
        end = model.config.eos_token_id if end is None else end
        generate = model.generate
        self.written = 0

        def forced(input_ids: torch.Tensor, **rest: Any) -> torch.Tensor:
            start = input_ids.shape[1]
            tokens = generate(input_ids=input_ids, logits_processor=[Forced(ids, end, start)], **rest)
            self.written = tokens.shape[1] - start
            return tokens

        self.model, self.forced = model, forced

    def __getattr__(self, name: str) -> Any:
        return self.forced if name == "generate" else getattr(self.model, name)


def about_paris(name: str) -> TaskExample:
    references: Any = {"squad": ("Paris",), "drop": (("Paris",),), "e2e": ("Paris",)}[name]
    prompt = "Question: what is the capital of France? Answer:"
    return TaskExample(where="row 1", prompt=prompt, completion="Paris", references=references)


WRITTEN = ("Paris", " Paris", "\nParis", "\n\n Paris\nLondon", "\r\nParis\r\n", "\u00a0\u200b\n\ufeffParis\u200b",
           "<think>\nLondon\n</think>\nParis\n", "<|assistant|>\nParis\n", "Answer:\nParis\nQ",
           "```\nParis\n```")  # fmt: skip
EMPTY = ("", "\n", "\n \u200b\n", "<think>\nParis\n", "<|im_start|>assistant\n", "Answer:\n", "\n" * 110 + "Paris")


@pytest.mark.parametrize("text", [*WRITTEN, *EMPTY])
@pytest.mark.parametrize("beams", [1, 2])
def test_written_answers_are_read_where_they_begin(text: str, beams: int) -> None:
    tokenizer = byte_tokenizer()
    for name in ("squad", "drop", "e2e"):
        task, example = find_task(name), about_paris(name)
        writer = Writer(text, tokenizer)
        found = predict(task, writer, tokenizer, [example] * 2, num_beams=beams)
        assert found.values == ["Paris" if text in WRITTEN else ""] * 2
        assert task.unanswered(found.values) == (0 if text in WRITTEN else 2)
        if name != "e2e":
            score = float(text in WRITTEN)
            assert task.score(found.values, [example] * 2) == {"f1": score, "exact_match": score}


def test_a_stop_text_ends_writing_after_the_answer_has_begun() -> None:
    tokenizer = byte_tokenizer()
    writer = Writer("\n\nParis\n" + "London\n" * 9, tokenizer)
    assert predict(find_task("squad"), writer, tokenizer, [about_paris("squad")]).values == ["Paris"]
    assert writer.written == len("\n\nParis\n")
    solution = "2 + 2 = 4\n#### 4\n"
    for stop in ("Question:", "</s>", "<|im_end|>"):
        writer = Writer(f"\n<think>\n{solution}{stop} what is 2 + 3?\n#### 5", tokenizer)
        example = TaskExample("row 1", "Question: 2 + 2?\nAnswer:", solution, references=(solution,))
        found = predict(find_task("arithmetic"), writer, tokenizer, [example])
        assert found.values == [f"<think>\n{solution}".strip()]  # as it was written
        assert writer.written == len(f"\n<think>\n{solution}{stop}")
        assert find_task("arithmetic").score(found.values, [example]) == {"exact_match": 1.0}
    assert find_task("gsm8k").unanswered(["", "4", "#### $4", "#### 4", "<think>"]) == 4


def llama_like() -> PreTrainedTokenizerFast:
    """A tokenizer that decodes as those of SentencePiece do: bytes make characters, and the first space is dropped."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {text: i for i, text in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256)), "\u2581"])}
    for text in (
        "Paris",
        "\u2581Paris",
        "Quest",
        "ion",
        ":",
        "\u2581:",
        ")",
        "\u2581)",
        "\n",
        "a",
        "\u2581a",
        "'",
        "<|channel|>final",
    ):
        vocabulary[text] = len(vocabulary)
    backend = Tokenizer(BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens(special)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


PARTS = ("Question:", "Quest", "ion", "\n", " ", ")", ":", ": ", "Paris", "a", "a'", "é", "日", "🙂", "Answer:",
         "<think>", "</think>", "```", "```py\n", "<|im_start|>", "assistant", "the answer is", "\u200b", "</",
         "s>")  # fmt: skip


def tokens_of(tokenizer: Any, n: int, random: Random) -> list[int]:
    """Tokens that a model could write: pieces of texts, single bytes and any others."""
    ids: list[int] = []
    while len(ids) < n:
        text = random.choice(PARTS)
        whole = tokenizer(text, add_special_tokens=False).input_ids
        names = [f"<0x{byte:02X}>" for byte in text.encode()]
        known = tokenizer.get_vocab()
        pieces = [known[name] for name in names if name in known] or whole
        ids += random.choice([whole, whole, pieces, pieces[:1], [random.randrange(len(tokenizer))]])
    return ids[:n]


@pytest.mark.parametrize("stops", [("\n",), ("Question:", "</s>"), (")", "é"), ("a'", "日"), (": ",)])
@pytest.mark.parametrize("make", [bpe, byte_tokenizer, llama_like])
@pytest.mark.parametrize("name", ["squad", "gsm8k"])
def test_answers_end_as_if_each_text_was_read_after_each_token(name: str, make: Any, stops: tuple[str, ...]) -> None:
    task, tokenizer, random = dataclasses.replace(find_task(name), stops=stops), make(), Random(f"{name} {stops}")
    decode = Decoder(tokenizer)
    ended = 0
    for _ in range(8):
        rows = [tokens_of(tokenizer, 20, random) for _ in range(6)]
        greedy, beams = (kind(_Written(task, tokenizer), 3) for kind in (_AnswerEnds, _BeamEnds))
        over = [False] * len(rows)
        for n in range(1, 21):
            if task.solution:
                texts = [tokenizer.decode(row[:n], skip_special_tokens=True) for row in rows]
                now = [any(stop in text for stop in stops) for text in texts]
            else:
                now = [has_ended(text, stops) for text in decode([row[:n] for row in rows])]
            over = [a or b for a, b in zip(over, now, strict=True)]
            ids = torch.tensor([[5, 6, 7, *row[:n]] for row in rows])
            assert greedy(ids, None).tolist() == over, [tokenizer.decode(row[:n]) for row in rows]
            assert beams(ids, None).tolist() == now
        ended += sum(over)
    assert 0 < ended < 48


def test_a_token_may_show_that_a_stop_text_was_in_the_answer() -> None:
    tokenizer = llama_like()
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(["<|channel|>final", "a"])])
    ends = _AnswerEnds(_Written(dataclasses.replace(find_task("squad"), stops=(">",)), tokenizer), 0)
    assert [ends(ids[:, :n], None).tolist() for n in (1, 2)] == [[False], [True]]  # "finala" opens nothing


def test_texts_are_read_where_a_token_may_end_them() -> None:
    tokenizer = byte_tokenizer()
    read: list[int] = []

    class Counting(_Written):
        def has_stop(self, row: list[int]) -> tuple[bool, bool]:
            read.append(len(row))
            return super().has_stop(row)

    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids for text in ("Rome\nRome", "London.Rn")])
    ends = _AnswerEnds(Counting(find_task("squad"), tokenizer), 0)
    for n in range(1, ids.shape[1] + 1):
        over = ends(ids[:, :n], None).tolist()
    assert over == [True, False] and read == [len("Rome\n")]  # not after the line break of a sequence that has ended


def forward_passes(model: torch.nn.Module) -> list[tuple[int, ...]]:
    """The shapes of the inputs of the forward passes from now on."""
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_the_host_waits_once_for_all_candidates() -> None:
    model, tokenizer = copy.deepcopy(llama()), bpe()
    expected = average_log_likelihoods(model, tokenizer, PAIRS, 2)
    passes = forward_passes(model)
    with Waits() as waits:
        found = average_log_likelihoods(model, tokenizer, PAIRS, 2)
    assert found == expected
    assert len(passes) == 3  # of six sequences: two candidates of one token share theirs
    assert [wait.kind for wait in waits.outside_the_model()] == ["blocking copy to the host"], waits.report()


def test_candidates_of_one_token_share_a_forward_pass() -> None:
    model, tokenizer = copy.deepcopy(llama()), byte_tokenizer()
    passes = forward_passes(model)
    average_log_likelihoods(model, tokenizer, [("a b ", "x"), ("a b ", "y"), ("a ", "x"), ("a b ", "xy")], 8)
    assert passes == [(3, 5)]


def test_the_host_waits_once_for_each_token_that_is_written() -> None:
    tokenizer = byte_tokenizer()
    writer = Writer("Paris in France", tokenizer)
    with Waits() as waits:
        predict(find_task("squad"), writer, tokenizer, [about_paris("squad")] * 4, batch_size=2)
    ours = [wait for wait in waits.outside_the_model() if wait.site.startswith("hift_ds/evaluation")]
    assert {wait.kind for wait in ours} == {"tolist"}, waits.report()
    assert len(ours) == 2 * (writer.written + 1)  # and once for the answers of a batch


def test_a_repeated_prompt_is_an_answer_and_a_wrong_one() -> None:
    tokenizer, example = byte_tokenizer(), about_paris("squad")
    task = find_task("squad")
    found = predict(task, Writer(example.prompt + " Paris", tokenizer), tokenizer, [example])
    assert task.unanswered(found.values) == 0 and task.score(found.values, [example])["exact_match"] == 0


@needs_shared
@pytest.mark.parametrize("shots", [0, 2])
def test_solutions_equal_those_of_lm_eval(shots: int) -> None:
    """GSM8K: what lm-evaluation-harness writes after our prompts, with its own batches and stopping; its own score."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-evaluation-harness is not installed")
    instance = pytest.importorskip("lm_eval.api.instance")
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    task, tokenizer, model = dataclasses.replace(find_task("gsm8k"), max_new_tokens=24), bpe(), llama(1)
    data = load_task(task, str(SHARED / "gsm8k"), seed=0, test_examples=10)
    demonstrations = data.demonstrations(shots, seed=0)
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=4096, device="cpu")
    before = few_shot(demonstrations)
    options = {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 24}
    requests = [
        instance.Instance("generate_until", {}, (before + one.prompt, options), 0, ("gsm8k", i, 1))
        for i, one in enumerate(data.test)
    ]
    theirs = [text.strip() for text in harness.generate_until(requests, disable_tqdm=True)]
    ours = predict(task, model, tokenizer, data.test, demonstrations=demonstrations, batch_size=4)
    assert ours.values == theirs and ours.truncated == 0
    assert len(set(theirs)) > 5 and all(theirs)
    # Its strict match, of answers that end in a number and of those above.
    strict = extraction.RegexFilter(r"#### (\-?[0-9\.\,]+)")
    answers = [one.completion if i % 3 else text for i, (one, text) in enumerate(zip(data.test, theirs, strict=True))]
    found = [numbers[0] for numbers in strict.apply([[text] for text in answers], [{}] * len(answers))]
    truths = [one.completion.rpartition("#### ")[2] for one in data.test]
    right = [a.replace(",", "") == b.replace(",", "") for a, b in zip(found, truths, strict=True)]
    assert task.score(answers, data.test) == {"exact_match": sum(right) / 10} and 0 < sum(right) < 10


@needs_shared
@pytest.mark.parametrize("name", ["rte", "boolq", "cb", "copa"])
def test_predictions_equal_those_of_lm_eval(name: str) -> None:
    """lm-evaluation-harness with our prompts and candidates: its log-likelihoods, averaged over its own tokens."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-evaluation-harness is not installed")
    instance = pytest.importorskip("lm_eval.api.instance")
    task, tokenizer, model = find_task(name), bpe(), llama(1)
    data = load_task(task, str(SHARED / "superglue"), seed=0, test_examples=24)
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=4096, device="cpu")
    requests = []
    for number, one in enumerate(data.test):
        for i, candidate in enumerate(one.candidates):
            arguments = (one.prompt, " " + candidate)
            requests.append(instance.Instance("loglikelihood", {}, arguments, i, (name, number, 1)))
    sums = [chance for chance, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    lengths = [len(harness._encode_pair(*request.args)[1]) for request in requests]
    theirs = [total / length for total, length in zip(sums, lengths, strict=True)]
    pairs = [(one.prompt, candidate) for one in data.test for candidate in one.candidates]
    ours, _ = average_log_likelihoods(model, tokenizer, pairs, 4)
    assert ours == pytest.approx(theirs, abs=1e-5)
    rest = iter(theirs)
    scores = [[next(rest) for _ in one.candidates] for one in data.test]
    assert predict(task, model, tokenizer, data.test).values == [one.index(max(one)) for one in scores]
