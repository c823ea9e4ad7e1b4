"""MT-Bench's files, answers of a tiny model, and the command: killed and continued, without a key, with one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hift_ds.evaluation.mt_bench import command as mt_bench
from hift_ds.evaluation.mt_bench.endpoint import Endpoint, checked_base_url
from hift_ds.evaluation.mt_bench.judge import tasks
from hift_ds.evaluation.mt_bench.questions import (
    PAIRWISE,
    SINGLE,
    Answers,
    find_folder,
    read_answers,
    read_bench,
    read_prompts,
    read_questions,
)
from hift_ds.evaluation.mt_bench.replies import Reply
from hift_ds.launch.errors import UserError
from hift_ds.launch.methods.adapters import ADAPTERS, save_adapter
from hift_ds.launch.methods.settings import AdapterSettings
from hift_ds.launch.model.loading import files_sha256
from hift_ds.launch.model.tokenizer import byte_tokenizer
from tests.support.data_fixtures import CHATML, SHARED
from tests.support.judge_stub import Request, completion, says, serving, stored, write_answers, write_bench

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = SHARED / "mt_bench"
KEY = "sk-canary-5f0c7e"


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="../shared/data/mt_bench is not there")
def test_the_published_files() -> None:
    bench = read_bench(PUBLISHED)
    assert [question.id for question in bench.questions] == list(range(81, 161))
    assert Counter(question.category for question in bench.questions) == dict.fromkeys(mt_bench.TEMPERATURES, 10)
    assert list(bench.references) == list(range(101, 131))
    answers = [Answers(name, {q.id: ("one {x}", "two [[9]]") for q in bench.questions}) for name in "ab"]
    single, pairs = tasks(bench, answers[:1], SINGLE, "j"), tasks(bench, answers, PAIRWISE, "j")
    assert (len(single), len(pairs)) == (160, 320)
    assert Counter(task.prompt.name for task in single) == {
        "single-v1": 50,
        "single-v1-multi-turn": 50,
        "single-math-v1": 30,
        "single-math-v1-multi-turn": 30,
    }
    system, user = single[40].messages()  # question 101, turn 1
    fence = system["content"].split("lines <")[1].split(">")[0]
    assert f"[The Start of Assistant's Answer]\n<{fence}>\none {{x}}\n</{fence}>\n[The End of" in user["content"]
    assert bench.references[101][0] in user["content"] and bench.references[101][1] not in user["content"]
    second = single[41].messages()[1]["content"]
    assert bench.references[101][1] in second and "two [ [9]]" in second
    assert bench.references[101][1] in pairs[41].messages()[1]["content"]


def broken(path: Path, line: int, change: Any) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = change if isinstance(change, str) else json.dumps({**json.loads(lines[line - 1]), **change})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("file", "line", "change", "message"),
    [
        ("question.jsonl", 3, "{", "broken JSON"),
        ("question.jsonl", 3, "[1]", "expected a JSON object"),
        ("question.jsonl", 3, {"question_id": "83"}, "'question_id': expected the question's number, got '83'"),
        ("question.jsonl", 3, {"question_id": 82}, "a second line for question 82"),
        ("question.jsonl", 2, {"category": "codng"}, "'codng', expected one of .*; did you mean 'coding'?"),
        ("question.jsonl", 1, {"turns": ["one"]}, "'turns': expected a list of two texts"),
        ("question.jsonl", 1, '{"id": 81}', "'question_id': .*it has only 'id'"),
        ("reference_answer/gpt-4.jsonl", 1, {"choices": []}, "'choices'"),
        ("reference_answer/gpt-4.jsonl", 2, {"model_id": "other"}, "one model a file"),
        ("judge_prompts.jsonl", 1, {"prompt_template": "{question}"}, "expected the fields answer, question, got"),
        ("judge_prompts.jsonl", 1, {"prompt_template": "{question"}, "'prompt_template'"),
        ("judge_prompts.jsonl", 2, {"name": "single-v1"}, "a second prompt 'single-v1'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, file: str, line: int, change: Any, message: str) -> None:
    write_bench(tmp_path / "bench", 8)
    broken(tmp_path / "bench" / file, line, change)
    with pytest.raises(UserError, match=rf"{file}:{line}: .*{message}"):
        read_bench(tmp_path / "bench")


def test_a_missing_file_or_prompt_is_named(tmp_path: Path) -> None:
    write_bench(tmp_path / "bench", 8)
    broken(tmp_path / "bench" / "judge_prompts.jsonl", 8, {"name": "pair-math-v1-multi-turns"})
    with pytest.raises(UserError, match="no prompt 'pair-math-v1-multi-turn'; did you mean"):
        read_prompts(tmp_path / "bench" / "judge_prompts.jsonl")
    (tmp_path / "bench" / "question.jsonl").unlink()
    with pytest.raises(UserError, match="question.jsonl: cannot be read: No such file"):
        read_questions(tmp_path / "bench" / "question.jsonl")


def test_where_the_files_may_be(tmp_path: Path) -> None:
    """A folder of all three; FastChat's data, with the judge's prompts above; neither."""
    bench = write_bench(tmp_path / "all", 4)
    assert find_folder(str(bench)) == bench
    data = tmp_path / "data"
    shutil.copytree(bench, data / "mt_bench")
    (data / "mt_bench" / "judge_prompts.jsonl").rename(data / "judge_prompts.jsonl")
    for given in (data, tmp_path, data / "mt_bench"):
        folder = find_folder(str(given))
        assert folder == data / "mt_bench" and read_bench(folder) == read_bench(bench)
    (data / "judge_prompts.jsonl").unlink()
    shutil.rmtree(data / "mt_bench" / "reference_answer")
    with pytest.raises(
        UserError, match="judge_prompts.jsonl, .*gpt-4.jsonl; the Space lmsys/mt-bench has the questions"
    ):
        read_bench(data / "mt_bench")
    with pytest.raises(UserError, match="no question.jsonl in"):
        find_folder(str(bench / "reference_answer"))
    with pytest.raises(UserError, match="--data nowhere: no such folder .*spaces/OWNER/NAME"):
        find_folder("nowhere")


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the local cache, as the Hub's library fills it; what is not there cannot be fetched, and that is said."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "spaces--someone--mt-bench"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    inner = cached / "snapshots" / commit / "data" / "mt_bench"
    bench = write_bench(tmp_path / "all", 4)
    shutil.copytree(bench, inner)
    for data in ("spaces/someone/mt-bench", "spaces/someone/mt-bench@main", f"spaces/someone/mt-bench@{commit}"):
        assert find_folder(data) == inner and read_bench(find_folder(data)) == read_bench(bench)
    for data in ("datasets/someone/mt-bench", "spaces/nobody/mt-bench", "spaces/someone/mt-bench@other"):
        with pytest.raises(UserError, match=f"--data {data}: cannot be fetched from the Hub"):
            find_folder(data)


# --- answers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of bytes with a chat template, whose own settings ask for sampling of the one best token."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=1.5, max_new_tokens=3)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(tiny: Path) -> Any:
    from hift_ds.evaluation.mt_bench.chat_model import ChatModel

    return ChatModel(str(tiny), dtype="float32")


USER = [{"role": "user", "content": "Why?"}]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    from hift_ds.evaluation.mt_bench.chat_model import ChatModel

    with pytest.raises(UserError, match=f"^'{tmp_path}/none' does not exist. Expected a Hub id"):
        ChatModel(str(tmp_path / "none"))


def test_greedy_replies_are_the_models_own(tiny: Path, chat: Any) -> None:
    tokenizer, model = byte_tokenizer(), LlamaForCausalLM.from_pretrained(tiny)
    tokens = tokenizer("<|user|>Why?<eos><|assistant|>", add_special_tokens=False)["input_ids"]
    start = len(tokens)
    while len(tokens) < start + 12 and tokens[-1] != 2:
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    reply = chat.ask(USER, 0.0, 12)
    assert reply.text == tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()
    assert (reply.ended, reply.prompt_tokens, reply.completion_tokens) == ("length", start, 12)


@pytest.mark.parametrize("method", ["prefix", "adapter"])
def test_an_adapter_beside_the_model(method: str, tiny: Path, chat: Any, tmp_path: Path, capsys: Any) -> None:
    """Replies are those of the module that was trained; answers name the adapter, and another one's are not its own."""
    from hift_ds.evaluation.mt_bench.chat_model import ChatModel

    torch.manual_seed(1)
    module: Any = ADAPTERS[method](LlamaForCausalLM.from_pretrained(tiny), AdapterSettings())
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    save_adapter(module, tmp_path / "model")
    tokens = torch.tensor([byte_tokenizer()("<|user|>Why?<eos><|assistant|>", add_special_tokens=False)["input_ids"]])
    start = tokens.shape[1]
    with torch.no_grad():
        for _ in range(8):
            new = module.eval()(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, new], 1)
    reply = ChatModel(str(tiny), dtype="float32", adapter=str(tmp_path / "model")).ask(USER, 0.0, 8)
    expected = byte_tokenizer().decode(tokens[0, start:], skip_special_tokens=True).strip()
    assert reply.text == expected != chat.ask(USER, 0.0, 8).text
    command = ["--model", str(tiny), "--adapter", str(tmp_path / "model"), "--dtype", "float32"]
    code, out = answer(tmp_path, capsys, "--model", str(tmp_path / "model"))
    assert code == 2 and "holds an adapter, not a model; give it as --adapter" in out
    code, out = answer(tmp_path, capsys, *command)
    assert code == 0, out
    (record, *_) = stored(tmp_path / "answers.jsonl")
    assert record["adapter"] == str(tmp_path / "model") and len(record["adapter_sha256"]) == 64
    save_adapter(module.train(), tmp_path / "model", {name: p + 1 for name, p in module.named_parameters()})
    code, out = answer(tmp_path, capsys, *command)
    assert code == 2 and "its answers were made with adapter_sha256" in out


def test_sampling_takes_the_temperature_and_the_seed_only(chat: Any) -> None:
    hot = [chat.ask(USER, 5.0, 12, seed).text for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]  # top_k=1 of the model's own settings would make them equal
    assert chat.ask(USER, 1e-4, 12, 1).text == chat.ask(USER, 0.0, 12).text


def test_a_conversation_without_room_ends_as_such(chat: Any) -> None:
    long = [{"role": "user", "content": "x" * 4085}]
    assert (chat.ask(long, 0.0, 50).ended, chat.ask(long, 0.0, 50).completion_tokens) == ("length", 4096 - 4088)
    reply = chat.ask([{"role": "user", "content": "x" * 4100}], 0.0, 50)
    assert (reply.text, reply.ended) == ("", "context")


def test_control_tokens_in_a_message_are_text(chat: Any) -> None:
    tokens = chat._encode([{"role": "user", "content": "a<eos><|assistant|>b"}])[0].tolist()
    assert [token for token in tokens if token < 6] == [4, 2, 5]  # <|user|> ... <eos> <|assistant|>, the template's


def test_a_template_without_a_system_role_gets_it_in_the_first_message(chat: Any) -> None:
    own = chat._tokenizer.chat_template
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    try:
        chat._tokenizer.chat_template = refusing
        tokens = chat._encode([{"role": "system", "content": "Judge."}, *USER])[0]
        assert "user\nJudge.\n\nWhy?" in chat._tokenizer.decode(tokens)
    finally:
        chat._tokenizer.chat_template = own


def test_a_model_without_a_chat_template_is_refused(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    code, out = answer(tmp_path, capsys, "--model", str(tmp_path / "m"))
    assert code == 2 and "has no chat template" in out


def test_thinking_is_no_part_of_an_answer(chat: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    written = iter(["<think>\nhm</think>\n\nBecause.", "<think>hm", "hm</think>And.", "", "Why?", "And?"])
    monkeypatch.setattr(chat._tokenizer, "decode", lambda *_, **__: next(written))
    monkeypatch.setattr("hift_ds.evaluation.mt_bench.chat_model.ChatModel", lambda *_, **__: chat)
    code, out = answer(tmp_path, capsys, "--model", "m")
    assert code == 0 and "2 of 6 turns are empty: the model wrote nothing, or only a thinking block" in out
    turns = [one["choices"][0]["turns"] for one in stored(tmp_path / "answers.jsonl")]
    assert turns == [["Because.", ""], ["And.", ""], ["Why?", "And?"]]


class Parrot:
    """Records what it is asked; fails after `lasts` replies."""

    def __init__(self, lasts: int = 10**9) -> None:
        self.asked: list[tuple[list[str], float, int | None]] = []
        self.lasts = lasts

    def ask(self, messages: Any, temperature: float, max_tokens: int, seed: int | None = None, **_: Any) -> Reply:
        if len(self.asked) == self.lasts:
            raise KeyboardInterrupt
        self.asked.append(([message["content"] for message in messages], temperature, seed))
        return Reply(f"re {messages[-1]['content']}", "stop", 1, 1)


def test_answers_in_two_turns_with_the_published_temperatures_continue(tmp_path: Path) -> None:
    questions = read_questions(write_bench(tmp_path / "bench", 16) / "question.jsonl")
    whole, first, second = Parrot(), Parrot(lasts=7), Parrot()
    assert mt_bench.answer(questions, lambda: whole, tmp_path / "a.jsonl", model_id="p") == 16
    assert whole.asked[:2] == [
        (["Q81T1: why?"], 0.7, whole.asked[0][2]),
        (["Q81T1: why?", "re Q81T1: why?", "Q81T2: and?"], 0.7, whole.asked[1][2]),
    ]
    assert len({seed for _, _, seed in whole.asked}) == 32
    by_category = {q.category: whole.asked[2 * n][1] for n, q in enumerate(questions)}
    assert by_category == {
        **dict.fromkeys(("writing", "roleplay"), 0.7),
        **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
        **dict.fromkeys(("stem", "humanities"), 0.1),
    }
    with pytest.raises(KeyboardInterrupt):
        mt_bench.answer(questions, lambda: first, tmp_path / "b.jsonl", model_id="p")
    assert len(stored(tmp_path / "b.jsonl")) == 3
    assert mt_bench.answer(questions, lambda: second, tmp_path / "b.jsonl", model_id="p") == 13
    assert second.asked == whole.asked[6:]
    assert read_answers(tmp_path / "a.jsonl") == read_answers(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="made with seed 0, but this run has 1"):
        mt_bench.answer(questions, lambda: whole, tmp_path / "b.jsonl", model_id="p", seed=1)
    broken(tmp_path / "bench" / "question.jsonl", 2, {"turns": ["Q82T1: how?", "Q82T2: and?"]})
    with pytest.raises(UserError, match="its answer 82 is to a different question"):
        questions = read_questions(tmp_path / "bench" / "question.jsonl")
        mt_bench.answer(questions, lambda: whole, tmp_path / "b.jsonl", model_id="p")


def test_answers_of_other_weights_are_not_continued(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("hift_ds.evaluation.mt_bench.chat_model.ChatModel", lambda *_, **__: Parrot())
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"1")
    assert answer(tmp_path, capsys, "--model", str(tmp_path / "m"))[0] == 0
    assert answer(tmp_path, capsys, "--model", str(tmp_path / "m"))[0] == 0
    (tmp_path / "m" / "model.safetensors").write_bytes(b"2")
    code, out = answer(tmp_path, capsys, "--model", str(tmp_path / "m"))
    assert code == 2 and "its answers were made with files_sha256" in out


# --- the command --------------------------------------------------------------------------------------


def command(capsys: Any, *arguments: Any) -> tuple[int, str]:
    code = mt_bench.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def answer(folder: Path, capsys: Any, *arguments: str) -> tuple[int, str]:
    if not (folder / "bench").exists():
        write_bench(folder / "bench", 3)
    options = ["--data", folder / "bench", "--answers", folder / "answers.jsonl", "--dtype", "float32"]
    return command(capsys, "answer", *options, "--max-new-tokens", "8", *arguments)


def test_a_tiny_model_answers_and_judges_by_the_command(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    verdicts = tmp_path / "verdicts.jsonl"
    judged = ["--verdicts", verdicts, "--judge-local", tiny, "--judge-max-tokens", "8", "--asks", "2"]
    code, out = answer(tmp_path, capsys, "--model", str(tiny), *judged)
    assert code == 0, out
    assert "is answered, 3 of 3" in out and "3 new answers, 3 in total" in out and "6 of 6 turns are cut off" in out
    assert "6 new verdicts (6 failed), 0 stored before, 0 of 6 missing" in out  # a random judge gives no rating
    first = (tmp_path / "answers.jsonl").read_bytes()
    assert [verdict.get("asked") for verdict in stored(verdicts)].count(2) == 6
    code, out = answer(tmp_path, capsys, "--model", str(tiny), *judged)
    assert "0 new answers, 3 in total" in out and "0 new verdicts (0 failed), 6 stored before" in out
    assert (tmp_path / "answers.jsonl").read_bytes() == first
    (tmp_path / "answers.jsonl").unlink()
    answer(tmp_path, capsys, "--model", str(tiny))
    same = [
        [r["choices"] for r in map(json.loads, text.splitlines())]
        for text in (first, (tmp_path / "answers.jsonl").read_bytes())
    ]
    assert same[0] == same[1]
    code, out = command(capsys, "show", "--verdicts", verdicts)
    assert code == 0 and out.splitlines()[0] == f"tiny: mean rating from 1 to 10 by tiny@{files_sha256(str(tiny))[:8]}"
    assert out.splitlines()[-1].split() == ["total", "-", "-", "-", "0", "6"]


def test_local_judges_of_one_name_are_two(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    write_bench(tmp_path / "bench", 1)
    write_answers(tmp_path / "m.jsonl", "m", [81], "text")
    monkeypatch.setattr("hift_ds.evaluation.mt_bench.chat_model.ChatModel", lambda *_, **__: Parrot())
    options = ["judge", "--data", tmp_path / "bench", "--answers", tmp_path / "m.jsonl", "--asks", "1"]
    for run, new in (("a", 2), ("b", 2), ("a", 0)):
        model = tmp_path / run / "model"
        model.mkdir(parents=True, exist_ok=True)
        (model / "model.safetensors").write_text(run)
        code, out = command(capsys, *options, "--verdicts", tmp_path / "v.jsonl", "--judge-local", model)
        assert code == 0 and f"{new} new verdicts" in out
    assert len({verdict["judge"] for verdict in stored(tmp_path / "v.jsonl")}) == 2


def test_show_prints_means_by_category_and_turn(tmp_path: Path, capsys: Any) -> None:
    write_bench(tmp_path / "bench", 8)
    write_answers(tmp_path / "m.jsonl", "m", range(81, 89), "text")
    rating = {(81, 1): "[[9]]", (81, 2): "[[4]]", (82, 1): "none"}
    with serving(lambda request: says(rating.get(request.unit, "[[5]]"))) as stub:
        code, out = judge(tmp_path, stub.url, capsys)
    assert code == 0 and "16 new verdicts (1 failed)" in out
    code, out = command(capsys, "show", "--verdicts", tmp_path / "verdicts.jsonl")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:]}
    assert rows["writing"] == ["6.50", "9.00", "4.00", "2", "0"]
    assert rows["roleplay"] == ["5.00", "-", "5.00", "1", "1"]
    assert rows["total"] == ["5.20", "5.57", "4.88", "15", "1"]
    code, out = command(capsys, "show", "--verdicts", tmp_path / "verdicts.jsonl", "--json")
    assert json.loads(out)["single"][0]["categories"]["total"]["mean"] == pytest.approx(78 / 15)


def judge(folder: Path, url: str, capsys: Any, *more: Any) -> tuple[int, str]:
    return command(capsys, *judge_arguments(folder, url, *more))


def judge_arguments(folder: Path, url: str, *more: Any) -> list[str]:
    options: list[Any] = ["judge", "--data", folder / "bench", "--answers", folder / "m.jsonl"]
    options += [
        "--verdicts",
        folder / "verdicts.jsonl",
        "--judge-url",
        url,
        "--judge-model",
        "stub",
        "--backoff",
        "0.01",
    ]
    return [str(option) for option in [*options, *more]]


def test_missing_verdicts_are_reported(tmp_path: Path, capsys: Any) -> None:
    write_bench(tmp_path / "bench", 8)
    write_answers(tmp_path / "m.jsonl", "m", range(81, 89), "text")

    def respond(request: Request) -> Any:
        return (400, {}, b"too long") if request.unit == (82, 1) else says("[[5]]")

    with serving(respond) as stub:
        code, out = judge(tmp_path, stub.url, capsys)
        assert code == 3 and "15 new verdicts (0 failed), 0 stored before, 1 of 16 missing" in out
        assert "missing: question 82, turn 1, m: HTTP 400" in out and "the same command continues" in out
        (tmp_path / "verdicts.jsonl").unlink()
        code, out = judge(tmp_path, stub.url, capsys, "--token-limit", "300", "--workers", "1")
        assert code == 3 and "stopped: 300 tokens are spent, the limit is 300" in out and "missing: 8 more" in out
        assert "the same command with a higher limit continues" in out
        more = ["--request", '{"max_tokens": null, "max_completion_tokens": 7}']
        judge(tmp_path, stub.url, capsys, *more)
        body = stub.requests[-1].body
        assert "max_tokens" not in body and (body["max_completion_tokens"], body["model"]) == (7, "stub")


def test_no_key_is_said_before_any_answer_is_generated(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(mt_bench, "answer", lambda *_, **__: pytest.fail("an answer was generated"))
    arguments = ["--verdicts", tmp_path / "v.jsonl", "--judge-url", "https://judge.example/v1", "--judge-model", "m"]
    for key in (None, "", "  ", "two words", "new\nline", "schlüssel"):
        if key is not None:
            monkeypatch.setenv("OPENAI_API_KEY", key)
        code, out = answer(tmp_path, capsys, "--model", "no/model", *arguments)
        assert code == 2 and out.startswith("error: ") and "OPENAI_API_KEY" in out and "Traceback" not in out
        assert not (key or "").strip() or key not in out
    assert not (tmp_path / "answers.jsonl").exists() and not (tmp_path / "v.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["judge"], "the following arguments are required"),
        (["juge"], "invalid choice: 'juge'"),
        (["show", "--verdicts", "no/file.jsonl"], "no/file.jsonl: cannot be read: No such file"),
        (["--workers", "0"], "'0': expected an integer of at least 1"),
        (["--timeout", "nan"], "'nan': expected a number above 0"),
        (["--request", "[]"], "expected a JSON object"),
        (["--cost-limit", "1"], "--cost-limit needs --prompt-price"),
        (["--judge-url", "https://user:secret@host/v1"], "contains a user name"),
        (["--judge-url", "https://host/v1?key=secret"], "contains a user name"),
        (["--judge-url", "ftp://host"], "'ftp://host': expected something like"),
        (["--judge-url", "http://[::1"], "malformed"),
        (["--judge-local", "m"], "--judge-local excludes --judge-url"),
        (["--mode", "pairwise"], "the answers of two models, got 1"),
        (["--answers", "no.jsonl"], "no.jsonl: cannot be read"),
        (["--verdicts", "no/folder/v.jsonl"], "no/folder/v.jsonl: cannot be written"),
    ],
)
def test_mistakes_are_said_without_a_traceback(tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    if arguments[0].startswith("-"):
        write_bench(tmp_path / "bench", 1)
        write_answers(tmp_path / "m.jsonl", "m", [81], "text")
        arguments = judge_arguments(tmp_path, "http://127.0.0.1:9/v1", *arguments)
    code, out = command(capsys, *arguments)
    assert code == 2 and out.startswith("error: ") and message in out and "secret" not in out
    assert not (tmp_path / "verdicts.jsonl").exists()


def start(folder: Path, url: str, *more: Any, **environment: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "evaluation.mt_bench", *judge_arguments(folder, url, *more)]
    pipe = subprocess.PIPE
    env = {**os.environ, **environment}

    def heed_interrupts() -> None:  # a shell starts what is in its background deaf to them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        arguments, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_interrupts
    )


def test_killed_at_77_of_160_and_started_again(tmp_path: Path) -> None:
    write_bench(tmp_path / "bench")
    write_answers(tmp_path / "m.jsonl", "m", range(81, 161), "text")
    verdicts = tmp_path / "verdicts.jsonl"

    def respond(request: Request) -> Any:
        if len(stub.requests) > 77:
            stub.released.wait()
        return says("Rating: [[6]]")

    with serving(respond) as stub:
        process = start(tmp_path, stub.url)
        try:
            deadline = time.monotonic() + 60
            while not verdicts.exists() or verdicts.read_bytes().count(b"\n") < 77:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        before = {(one["question_id"], one["turn"]) for one in stored(verdicts)}
        assert len(before) == 77
        assert len(stub.requests) <= 77 + 4
        with verdicts.open("ab") as file:  # as if it had been killed while it wrote
            file.write(b'{"question_id": 160, "turn": 2, "mode": "sin')
    with serving(lambda _: says("Rating: [[6]]")) as other:  # what the killed process sent may come later than this
        process = start(tmp_path, other.url)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        again = other.units()
    assert "83 new verdicts (0 failed), 77 stored before, 0 of 160 missing" in out
    after = [(one["question_id"], one["turn"]) for one in stored(verdicts)]
    assert len(after) == len(set(after)) == 160
    assert len(again) == len(set(again)) == 83 and before.isdisjoint(again)


def test_an_interrupt_keeps_what_is_under_way(tmp_path: Path) -> None:
    write_bench(tmp_path / "bench", 20)
    write_answers(tmp_path / "m.jsonl", "m", range(81, 101), "text")

    def respond(request: Request) -> Any:
        if len(stub.requests) > 5:
            stub.released.wait()
        return says("Rating: [[6]]")

    with serving(respond) as stub:
        process = start(tmp_path, stub.url)
        deadline = time.monotonic() + 60
        while len(stub.requests) < 9 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        stub.released.set()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "the same command continues" in err and "Traceback" not in err
        assert len(stored(tmp_path / "verdicts.jsonl")) == len(stub.requests) == 9


def test_the_key_is_in_no_file_and_no_output(tmp_path: Path) -> None:
    """The stub sends the key back wherever it can: in replies, in errors and in headers."""
    write_bench(tmp_path / "bench", 3)
    write_answers(tmp_path / "m.jsonl", "m", range(81, 84), "text")

    def respond(request: Request) -> Any:
        sent = request.headers["Authorization"]
        if request.count == 1:
            return 500, {"X-Key": sent}, sent.encode()
        if request.unit == (83, 2):
            return 400, {}, f"bad key {sent}".encode()
        return 200, {"X-Key": sent}, completion(f"You sent {sent}\n\nRating: [[6]]")

    outputs = ""
    with serving(respond) as stub:
        outputs += "".join(start(tmp_path, stub.url, OTHER_KEY=KEY, **NO_KEY).communicate(timeout=60))
        assert "Authorization" not in stub.requests[0].headers or KEY not in stub.requests[0].headers["Authorization"]
        stub.requests.clear()
        more = ["--key-env", "OTHER_KEY", "--workers", "2"]
        outputs += "".join(start(tmp_path, stub.url, *more, OTHER_KEY=KEY, **NO_KEY).communicate(timeout=60))
        assert {request.headers["Authorization"] for request in stub.requests} == {f"Bearer {KEY}"}
    with serving(lambda request: (401, {}, request.headers["Authorization"].encode())) as stub:
        (tmp_path / "verdicts.jsonl").rename(tmp_path / "first.jsonl")
        outputs += "".join(start(tmp_path, stub.url, *more, OTHER_KEY=KEY, **NO_KEY).communicate(timeout=60))
    assert "5 new verdicts" in outputs and "HTTP 400" in outputs and "HTTP 401" in outputs and "[key]" in outputs
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == [] and KEY not in outputs
    assert "You sent Bearer [key]" in (tmp_path / "first.jsonl").read_text()
    assert KEY not in repr(Endpoint("http://localhost/v1", "m", KEY))


NO_KEY = {"OPENAI_API_KEY": ""}


def test_base_urls() -> None:
    assert checked_base_url("http://localhost:8000/v1/") == "http://localhost:8000/v1"
    assert [mt_bench.is_loopback(f"http://{host}/v1") for host in ("localhost:1", "127.0.0.9", "[::1]:80")] == [
        True
    ] * 3
    assert not mt_bench.is_loopback("http://localhost.example/v1")
