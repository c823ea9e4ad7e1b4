"""What a judge's endpoint may send back: which text is the reply, and what it costs, over HTTP on loopback."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hift_ds.evaluation.mt_bench.judge import SpendingLimit
from hift_ds.evaluation.mt_bench.replies import MOST_TOKENS, Reply, Unread, bound, read
from tests.evaluation.mt_bench.test_judge import run_judge
from tests.evaluation.mt_bench.test_mt_bench import judge as judge_command
from tests.support.judge_stub import serving, stored, write_answers, write_bench

TEXT = "Good.\nRating: [[8]]"
USAGE = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
MOST = (7000, 2048)


def body(content: Any = TEXT, usage: Any = USAGE, ended: str | None = "stop", **message: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": ended}
    return json.dumps({"choices": [choice], **({} if usage is None else {"usage": usage})}).encode()


def stream(*events: Any) -> bytes:
    lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}" for event in events]
    return "\n\n".join([": keep-alive", *lines, "data: [DONE]", ""]).encode()


def delta(content: Any, ended: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": ended}], **more}


def thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": [{"type": "text", "text": text}]}


def part(text: Any, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": text}


# --- texts --------------------------------------------------------------------------------------------

READ = {
    "a text": (body(), TEXT),
    "thinking, then text (Magistral)": (body([thinking("Rating: [[1]]"), part(TEXT)]), TEXT),
    "one part (OpenAI)": (body([part(TEXT)]), TEXT),
    "output_text": (body([part(TEXT, "output_text")]), TEXT),
    "thinking with a signature (Anthropic)": (
        body([{"type": "thinking", "thinking": "hm", "signature": "x"}, part(TEXT)]),
        TEXT,
    ),
    "redacted thinking": (body([{"type": "redacted_thinking", "data": "x"}, part(TEXT)]), TEXT),
    "reasoning with a text of its own": (body([part("Rating: [[1]]", "reasoning"), part(TEXT)]), TEXT),
    "parts are paragraphs": (body([part("Good."), part("Rating: [[8]]")]), TEXT),
    "white space joins parts": (body([part("Good.\nRating: "), part("[[8]]")]), TEXT),
    "texts as parts": (body(["Good.", "Rating: [[8]]"]), TEXT),
    "a part without type": (body([{"text": TEXT}]), TEXT),
    "a part outside a list": (body(part(TEXT)), TEXT),
    "thinking beside the content": (body(TEXT, reasoning_content="Rating: [[1]]"), TEXT),
    "only thinking beside the content": (body(None, reasoning_content=TEXT), ""),
    "only thinking in parts": (body([thinking(TEXT)]), ""),
    "a thinking block in the text": (body(f"<think>\nRating: [[1]]\n</think>\n\n{TEXT}"), f"\n\n{TEXT}"),
    "a block that the template opened": (body(f"Rating: [[1]]\n</think>{TEXT}"), TEXT),
    "a block that is not closed": (body(f"<think>{TEXT}"), ""),
    "a refusal beside the content": (body(None, refusal="I will not."), "I will not."),
    "a refusal as a part": (body([{"type": "refusal", "refusal": "I will not."}]), "I will not."),
    "no content": (json.dumps({"choices": [{"message": {"role": "assistant"}}], "usage": USAGE}).encode(), ""),
    "an empty list": (body([]), ""),
    "parts without text": (body([part(None), part(7), {"type": "image_url", "image_url": {}}]), ""),
    "a list of one completion": (b"[" + body() + b"]", TEXT),
    "a byte order mark": (b"\xef\xbb\xbf" + body(), TEXT),
    "a stream": (
        stream(delta("Good.\nRat"), delta("ing: [[8]]"), delta(None, "stop"), {"choices": [], "usage": USAGE}),
        TEXT,
    ),
    "a stream with parts": (
        stream(delta([thinking("Rating: [[1]]")]), delta([part(TEXT)], "stop", usage=USAGE)),
        TEXT,
    ),
    "a stream that says only how it ends": (
        stream(delta(TEXT), {"choices": [{"index": 0, "finish_reason": "stop"}], "usage": USAGE}),
        TEXT,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_the_text_parts_are_the_reply(name: str) -> None:
    content, text = READ[name]
    assert read(content, MOST) == Reply(text, "stop", 1000, 500)


UNREAD = {
    "empty choices": json.dumps({"choices": [], "usage": USAGE}).encode(),
    "no choices": json.dumps({"id": "1", "usage": USAGE}).encode(),
    "choices of null": json.dumps({"choices": None, "usage": USAGE}).encode(),
    "an object of choices": json.dumps({"choices": {"0": {}}, "usage": USAGE}).encode(),
    "a choice of null": json.dumps({"choices": [None], "usage": USAGE}).encode(),
    "a choice that is a text": json.dumps({"choices": [TEXT], "usage": USAGE}).encode(),
    "a message that is a text": json.dumps({"choices": [{"message": TEXT}], "usage": USAGE}).encode(),
    "no message": json.dumps({"choices": [{"finish_reason": "stop"}], "usage": USAGE}).encode(),
    "content of 7": body(7),
    "content of true": body(True),
    "parts of numbers": body([1, 2]),
    "an error": json.dumps({"error": {"message": "over\nloaded", "code": 502}, "usage": USAGE}).encode(),
    "an error as text": json.dumps({"error": "overloaded", "usage": USAGE}).encode(),
    "a list with an error": json.dumps([{"error": {"message": "quota"}}, {"usage": USAGE}]).encode(),
    "another form": json.dumps({"result": {"response": TEXT, "usage": USAGE}, "success": True}).encode(),
    "a list in a list": json.dumps([[{"usage": USAGE}]]).encode(),
    "cut off after the usage": json.dumps({"usage": USAGE, "choices": [{"message": {"content": TEXT}}]}).encode()[:-9],
    "HTML around JSON": b"<pre>" + body() + b"</pre>",
    "a stream with an error": stream({"error": {"message": "quota"}, "usage": USAGE}),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_no_reply_has_its_cost(name: str) -> None:
    found = read(UNREAD[name], MOST)
    assert isinstance(found, Unread) and found.reason.startswith("HTTP 200 with a")
    assert (found.prompt_tokens, found.completion_tokens, found.estimated) == (1000, 500, False)
    said = {"an error": "over loaded", "an error as text": "overloaded", "a list with an error": "quota"}
    assert said.get(name, "") in found.reason


NOT_JSON = (b"", b"<html>\n<body>Sign in</body>", body()[:-9], b"7", b"null", b'"text"', b"[]", b"[[]]",
            b"\xff\xfe\x00", b"[" * 100_000, b'{"usage": {"prompt_tok',
            b'{"choices": [], "usage": {"prompt_tokens": ' + b"9" * 5000 + b"}}")  # fmt: skip


@pytest.mark.parametrize("content", NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_cannot_be_read_counts_with_its_bound(content: bytes) -> None:
    found = read(content, MOST)
    assert isinstance(found, Unread) and found.estimated
    assert (found.prompt_tokens, found.completion_tokens) == MOST


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4, False)),
        ({"input_tokens": 3, "output_tokens": 4}, (3, 4, False)),
        ({"prompt_tokens": "3", "completion_tokens": 4.0}, (3, 4, False)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 50}, (3, 47, False)),  # thinking only in the sum
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 0}, (3, 4, False)),
        ({"prompt_tokens": 3, "total_tokens": 50}, (3, 47, False)),
        ({"completion_tokens": 4, "total_tokens": 50}, (46, 4, False)),
        ({"total_tokens": 50}, (0, 50, False)),
        ({"prompt_tokens": 3}, (3, 2048, True)),
        ({"prompt_tokens": -3, "completion_tokens": 4}, (7000, 4, True)),
        ({"prompt_tokens": 3, "completion_tokens": 10**30}, (3, 2048, True)),
        ({"prompt_tokens": True, "completion_tokens": [4]}, (7000, 2048, True)),
        ({"prompt_tokens": 0.5, "completion_tokens": float("nan")}, (7000, 2048, True)),
        ({"prompt_tokens": "many", "completion_tokens": None}, (7000, 2048, True)),
        ({"prompt_tokens": "٣", "completion_tokens": float("inf")}, (7000, 2048, True)),
        ({}, (7000, 2048, True)),
        ([3, 4], (7000, 2048, True)),
        ("7", (7000, 2048, True)),
        (None, (7000, 2048, True)),
    ],
)
def test_counts_of_wrong_kinds(usage: Any, tokens: tuple[int, int, bool]) -> None:
    found = read(body(usage=usage), MOST)
    assert (found.prompt_tokens, found.completion_tokens, found.estimated) == tokens
    within = read(json.dumps({"choices": [{"message": {"content": TEXT}, "usage": usage}]}).encode(), MOST)
    assert (within.prompt_tokens, within.completion_tokens, within.estimated) == tokens  # in the choice
    inner = {"usage": {"prompt_tokens": 900, "completion_tokens": 900, "total_tokens": 1800}}
    if isinstance(usage, dict) and tokens[2] is False and "total_tokens" in usage and len(usage) == 3:
        outer = read(json.dumps({"choices": [{"message": {"content": TEXT}} | inner], "usage": usage}).encode(), MOST)
        assert (outer.prompt_tokens, outer.completion_tokens, outer.estimated) == tokens


def test_the_bound_of_a_request() -> None:
    messages = [{"role": "user", "content": "é" * 100}]
    prompt, reply = bound({"messages": messages, "max_tokens": 5}, 2048)
    assert 200 <= prompt < 300 and reply == 5
    assert bound({"messages": messages, "max_completion_tokens": 4096, "n": 2}, 2048) == (prompt, 8192)
    assert bound({"messages": messages}, 2048) == (prompt, 2048)
    assert bound({"messages": [{"role": "user", "content": "\ud800"}]}, 1)[0] > 0


def mangled(draw: random.Random) -> bytes:
    """A body with values of wrong kinds in random places, or cut off."""
    odd: list[Any] = [None, True, -1, 1e300, 10**40, "", "7", [], {}, [[]], [None], {"text": 7}, {"type": "text"}]

    def value(depth: int) -> Any:
        kind = draw.random()
        if depth == 0 or kind < 0.3:
            return draw.choice(odd)
        if kind < 0.5:
            return [value(depth - 1) for _ in range(draw.randint(0, 3))]
        names = ("choices", "message", "delta", "content", "usage", "prompt_tokens", "completion_tokens",
                 "total_tokens", "finish_reason", "refusal", "text", "type", "error")  # fmt: skip
        return {name: value(depth - 1) for name in names if draw.random() < 0.6}

    choice = {"message": {"content": value(3)}, "finish_reason": value(1)}
    whole = {"choices": [choice], "usage": draw.choice([USAGE, value(2)])}
    text = json.dumps(whole if draw.random() < 0.6 else value(5)).encode()
    text = stream(json.loads(text), value(3)) if draw.random() < 0.2 else text
    return text[: draw.randrange(len(text) + 1)] if draw.random() < 0.2 else text


@pytest.mark.parametrize("n", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_any_body_is_a_reply_or_unread_and_has_a_cost(n: int) -> None:
    draw = random.Random(n)
    kinds = set()
    for _ in range(n):
        found = read(mangled(draw), MOST)
        counts = found.prompt_tokens, found.completion_tokens
        assert all(type(count) is int and 0 <= count <= MOST_TOKENS for count in counts)
        kinds.add((type(found), found.estimated))
    assert len(kinds) == 4


# --- limits over HTTP ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["thinking, then text (Magistral)", "one part (OpenAI)", "a stream"])
def test_ratings_until_the_limit(name: str, tmp_path: Path) -> None:
    with serving(lambda _: (200, {}, READ[name][0])) as stub:
        verdicts, outcome = run_judge(tmp_path, stub, limit=SpendingLimit(tokens=5000), workers=1)
        assert len(stub.requests) == 4  # 1,500 tokens each
    assert [one["rating"] for one in verdicts] == [8.0] * 4
    assert outcome.stopped == "6000 tokens are spent, the limit is 5000"


BAD = {**UNREAD, "HTML": NOT_JSON[1], "cut off": NOT_JSON[2], "usage of texts": body(7, {"prompt_tokens": "x"})}


@pytest.mark.parametrize("name", [*BAD, "the connection ends early", "too slow", "an error with usage"])
def test_the_limit_holds_over_restarts_whatever_comes_back(name: str, tmp_path: Path) -> None:
    def respond(_: Any) -> Any:
        if name == "the connection ends early":
            return 200, {"Content-Length": "99999"}, body()
        if name == "too slow":
            stub.released.wait(2)
        return 500 if name == "an error with usage" else 200, {}, BAD.get(name, body())

    limit = SpendingLimit(tokens=5000)
    limits = {"backoff": 0.001, "timeout": 5.0 if name in BAD else 0.2}
    with serving(respond) as stub:
        counts = []
        for _ in range(3):  # the same command again
            verdicts, outcome = run_judge(tmp_path, stub, limit=limit, workers=1, limits=limits)
            counts.append(len(stub.requests))
    lines = stored(tmp_path / "verdicts.jsonl")
    costs = [line["prompt_tokens"] + line["completion_tokens"] for line in lines]
    assert verdicts == [] and counts[0] == counts[1] == counts[2] == len(lines)
    assert sum(costs) >= 5000 > sum(costs[:-1])  # the last request reached the limit
    assert outcome.spent == sum(costs) and f"{sum(costs)} tokens are spent" in str(outcome.stopped)
    assert outcome.estimated == sum("estimated" in line for line in lines) in (0, len(lines))


@pytest.mark.parametrize("name", ["thinking, then text (Magistral)", "empty choices"])
def test_several_workers_exceed_the_limit_by_what_is_under_way(name: str, tmp_path: Path) -> None:
    content = READ[name][0] if name in READ else UNREAD[name]
    with serving(lambda _: (stub.released.wait(0.02), (200, {}, content))[1]) as stub:
        for _ in range(2):
            _, outcome = run_judge(
                tmp_path, stub, questions=20, limit=SpendingLimit(tokens=15_000), workers=8, limits={"backoff": 0.001}
            )
        assert 10 <= len(stub.requests) <= 10 + 7
    assert sum(line["prompt_tokens"] + line["completion_tokens"] for line in stored(tmp_path / "verdicts.jsonl")) == (
        1500 * len(stub.requests)
    )


def test_thinking_and_cut_off_replies_are_no_verdicts(tmp_path: Path) -> None:
    replies = {
        (81, 1): (body([thinking(TEXT)]), "an empty reply"),
        (81, 2): (body(TEXT, ended="max_tokens"), "cut off at the token limit"),
        (82, 1): (body(TEXT, ended="length"), "cut off at the token limit"),
        (82, 2): (body(TEXT, ended="SAFETY"), "withheld by the endpoint's content filter"),
        (83, 1): (body([{"type": "refusal", "refusal": "No."}]), "no verdict in the published form in the last line"),
    }
    with serving(lambda request: (200, {}, replies.get(request.unit, (body(), ""))[0])) as stub:
        verdicts, outcome = run_judge(tmp_path, stub, questions=3, asks=2)
    assert outcome.failed == 5 and outcome.missing == {} and outcome.spent == 1500 * 11
    for one in verdicts:
        _, reason = replies.get((one["question_id"], one["turn"]), ("", ""))
        assert one.get("reason", "") == (f"{reason}; {reason}" if reason else "")


def test_the_command_says_what_is_estimated_and_how_to_mend_it(tmp_path: Path, capsys: Any) -> None:
    write_bench(tmp_path / "bench", 3)
    write_answers(tmp_path / "m.jsonl", "m", range(81, 84), "text")
    more = ["--token-limit", "5000", "--workers", "1"]
    with serving(lambda _: (200, {}, b"<html>Sign in</html>")) as stub:
        code, out = judge_command(tmp_path, stub.url, capsys, *more)
    n = len(stub.requests)
    assert code == 3 and f"{n} requests did not report theirs" in out and 'If a "spending" line was not charged' in out
    assert "HTTP 200 with a body that is not a chat completion: <html>Sign in</html>" in out
    with serving(lambda _: (200, {}, body())) as stub:
        assert "stopped: " in judge_command(tmp_path, stub.url, capsys, *more)[1] and stub.requests == []
        lines = (tmp_path / "verdicts.jsonl").read_text().splitlines(True)
        (tmp_path / "verdicts.jsonl").write_text("".join(line for line in lines if '"spending"' not in line))
        code, out = judge_command(tmp_path, stub.url, capsys, *more)
    assert len(stub.requests) == 4 and "4 new verdicts" in out and "did not report" not in out
