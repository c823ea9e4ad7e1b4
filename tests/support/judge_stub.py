"""A judge on loopback that replies as a test says, and a small MT-Bench with as many questions as the published one."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hift_ds.evaluation.mt_bench.questions import TEMPERATURES
from tests.support.data_fixtures import write_jsonl

Unit = tuple[int, int]  # question and turn
Respond = Callable[["Request"], tuple[int, dict[str, str], bytes]]


class Request:
    """What the stub was asked; `count` is how often it was asked this unit, from 1."""

    def __init__(self, body: dict[str, Any], headers: dict[str, str], count: int) -> None:
        self.body, self.headers, self.count = body, headers, count
        self.system, self.user = (message["content"] for message in body["messages"])
        self.unit = unit_of(self.user)


def unit_of(user: str) -> Unit:
    asked = re.findall(r"\bQ(\d+)T([12])\b", user)
    return int(asked[0][0]), max(int(turn) for _, turn in asked)


def completion(text: str | None, ended: str = "stop", tokens: int | None = 100, **message: Any) -> bytes:
    body: dict[str, Any] = {"choices": [{"message": {"content": text, **message}, "finish_reason": ended}]}
    if tokens is not None:
        body["usage"] = {"prompt_tokens": tokens - 10, "completion_tokens": 10}
    return json.dumps(body).encode()


def says(text: str | None, **more: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, completion(text, **more)


class Stub:
    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        self.requests: list[Request] = []
        self.released = threading.Event()  # for a test that lets requests wait
        self._lock = threading.Lock()
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    count = 1 + sum(one.unit == unit_of(body["messages"][-1]["content"]) for one in stub.requests)
                    request = Request(body, dict(self.headers), count)
                    stub.requests.append(request)
                status, headers, content = stub.respond(request)
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def units(self) -> list[Unit]:
        return [request.unit for request in self.requests]

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(respond: Respond) -> Iterator[Stub]:
    stub = Stub(respond)
    try:
        yield stub
    finally:
        stub.close()


PROMPT = "Rate."
FIRST = "[Question]\n{question}\n"
BOTH = "{question_1}\n{question_2}\n"


def write_bench(folder: Path, questions: int = 80) -> Path:
    """Files in the published formats: Q81T1, Q81T2, ...; references for math, coding and reasoning."""
    (folder / "reference_answer").mkdir(parents=True)
    categories = list(TEMPERATURES)
    rows = [
        {"question_id": n, "category": categories[(n - 81) % 8], "turns": [f"Q{n}T1: why?", f"Q{n}T2: and?"]}
        for n in range(81, 81 + questions)
    ]
    write_jsonl(folder / "question.jsonl", rows)
    references = [n for n, row in enumerate(rows, 81) if row["category"] in ("math", "coding", "reasoning")]
    write_answers(folder / "reference_answer" / "gpt-4.jsonl", "gpt-4", references or [81], "right")
    prompts = {
        "single-v1": FIRST + "{answer}",
        "single-math-v1": FIRST + "{ref_answer_1}\n{answer}",
        "single-v1-multi-turn": BOTH + "{answer_1}\n{answer_2}",
        "single-math-v1-multi-turn": BOTH + "{ref_answer_1}\n{ref_answer_2}\n{answer_1}\n{answer_2}",
        "pair-v2": FIRST + "{answer_a}\n{answer_b}",
        "pair-math-v1": FIRST + "{ref_answer_1}\n{answer_a}\n{answer_b}",
        "pair-v2-multi-turn": BOTH + "{answer_a_1}\n{answer_a_2}\n{answer_b_1}\n{answer_b_2}",
        "pair-math-v1-multi-turn": BOTH
        + "{ref_answer_1}\n{ref_answer_2}\n{answer_a_1}\n{answer_a_2}\n{answer_b_1}\n{answer_b_2}",
    }
    rows = [{"name": name, "system_prompt": PROMPT, "prompt_template": text} for name, text in prompts.items()]
    write_jsonl(folder / "judge_prompts.jsonl", rows)
    return folder


def write_answers(path: Path, model: str, numbers: Any, text: str, special: dict[Unit, str] | None = None) -> Path:
    special = special or {}
    rows = [
        {
            "question_id": n,
            "model_id": model,
            "choices": [{"index": 0, "turns": [special.get((n, t), f"{text} {n} {t}") for t in (1, 2)]}],
        }
        for n in numbers
    ]
    return write_jsonl(path, rows)


def stored(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
