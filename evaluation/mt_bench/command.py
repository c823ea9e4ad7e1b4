"""MT-Bench: let a model answer, let a judge rate the answers, and show the results.

    python -m evaluation.mt_bench answer --data MT_BENCH --model runs/gsm8k/model --answers hift.jsonl
    python -m evaluation.mt_bench judge --data MT_BENCH --answers hift.jsonl full.jsonl --verdicts verdicts.jsonl \\
        --judge-url https://api.openai.com/v1 --judge-model gpt-4 --token-limit 1000000
    python -m evaluation.mt_bench show --verdicts verdicts.jsonl

MT_BENCH is a folder with the published files (FastChat's fastchat/llm_judge/data), or a Space or dataset on the Hub
with them (spaces/lmsys/mt-bench has only the questions). The judge is an OpenAI-compatible endpoint, whose key is read
from an environment variable, or a local model (--judge-local). `answer` and `judge` continue an interrupted run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tqdm import tqdm

from hift_ds import paths
from hift_ds.evaluation.json_lines import Place, Record, RecordFile, field, read_records
from hift_ds.evaluation.mt_bench import judge, verdicts
from hift_ds.evaluation.mt_bench.endpoint import (
    Endpoint,
    Message,
    checked_base_url,
    is_loopback,
    key_from_environment,
)
from hift_ds.evaluation.mt_bench.questions import (
    PAIRWISE,
    SINGLE,
    TEMPERATURES,
    Bench,
    Question,
    find_folder,
    read_answers,
    read_bench,
    read_questions,
)
from hift_ds.evaluation.mt_bench.replies import Reply
from hift_ds.launch.errors import UserError

FILLED, FULL = "context", "the conversation filled the model's positions"
MISSING = 3  # the exit code if verdicts are missing; 2 is a user error


# --- answers ------------------------------------------------------------------------------------------


class Chat(Protocol):
    """A model that answers; see `ChatModel.ask`."""

    def ask(
        self, messages: Sequence[Message], temperature: float, max_tokens: int, seed: int | None = None
    ) -> Reply: ...


def answer(
    questions: Sequence[Question],
    load: Callable[[], Chat],
    path: Path,
    *,
    model_id: str,
    max_tokens: int = 1024,
    seed: int = 0,
    source: dict[str, Any] | None = None,
) -> int:
    """Answer both turns of each question that the file does not have yet; return the number of new answers.

    The file has the published format, with the answers of one model. An answer depends only on the seed and the
    question, so an interrupted and continued run gives the same answers.

    Args:
        load: loads the model; called only if questions are left.
        source: more facts about the origin of the answers, e.g. the model's path; a continued run must have the same.

    Raises:
        UserError: the file has answers that were made with other settings.
    """
    made_by = {"model_id": model_id, "max_new_tokens": max_tokens, "seed": seed, **(source or {})}
    with RecordFile(path, _question_id) as file:
        for record in file.records.values():
            differing = [key for key, value in made_by.items() if record.get(key) != value]
            if differing:
                key = differing[0]
                raise UserError(
                    f"{path}: its answers were made with {key} {record.get(key)!r}, but this run has "
                    f"{made_by[key]!r}; use the same settings or another file"
                )
        for question in questions:
            asked = file.records.get(question.id, {}).get("questions")
            if asked not in (None, list(question.turns)):
                raise UserError(f"{path}: its answer {question.id} is to a different question; give another file")
        waiting = [question for question in questions if question.id not in file]
        if not waiting:
            return 0
        model = load()
        bar = tqdm(waiting, desc="answers", disable=None)
        for number, question in enumerate(bar, 1):
            record = _answered(question, model, made_by)
            file.add(record)
            if bar.disable:
                print(f"question {question.id} is answered, {number} of {len(waiting)}", flush=True)
            for turn, ended in enumerate(record["ended"], 1):
                if ended == FILLED:
                    bar.write(f"warning: question {question.id}, turn {turn}: {FULL}", file=sys.stderr)
    return len(waiting)


def _answered(question: Question, model: Chat, made_by: dict[str, Any]) -> Record:
    messages: list[Message] = []
    replies = []
    temperature = TEMPERATURES[question.category]
    for turn, text in enumerate(question.turns, 1):
        messages.append({"role": "user", "content": text})
        digest = hashlib.sha256(f"{made_by['seed']}:{question.id}:{turn}".encode()).digest()
        seed = int.from_bytes(digest[:6], "big")
        replies.append(model.ask(messages, temperature, made_by["max_new_tokens"], seed))
        messages.append({"role": "assistant", "content": replies[-1].text})
    return {
        "question_id": question.id,
        "answer_id": f"{made_by['model_id']}-{question.id}",
        **made_by,
        "temperature": temperature,
        "questions": list(question.turns),
        "choices": [{"index": 0, "turns": [reply.text for reply in replies]}],
        "ended": [reply.ended for reply in replies],
        "tstamp": round(time.time(), 3),
    }


def _question_id(where: Place, record: Record) -> Hashable:
    return int(field(where, record, "question_id", int, "the question's number"))


# --- the command --------------------------------------------------------------------------------------


def _run_answer(options: argparse.Namespace) -> int:
    folder = find_folder(options.data)
    bench = read_bench(folder) if options.verdicts else None
    asked = _judge(options) if options.verdicts else None  # a missing key is an error before anything is generated
    questions = bench.questions if bench else read_questions(folder / "question.jsonl")
    model_id = options.model_id or Path(options.adapter or options.model).name
    from hift_ds.evaluation.mt_bench.chat_model import ChatModel  # slow to import
    from hift_ds.launch.model.loading import files_sha256

    def load() -> Chat:
        return ChatModel(options.model, revision=options.revision, dtype=options.dtype, adapter=options.adapter)

    adapter = {"adapter": options.adapter, "adapter_sha256": files_sha256(options.adapter)} if options.adapter else {}
    source = {
        "model": options.model,
        "files_sha256": files_sha256(options.model),  # a model that was trained further is another model
        "revision": options.revision,
        "dtype": options.dtype,
        **adapter,
    }
    settings = {"max_tokens": options.max_new_tokens, "seed": options.seed}
    new = answer(questions, load, options.answers, model_id=model_id, source=source, **settings)
    print(f"{options.answers}: {new} new answers, {len(questions)} in total")
    ended = [end for record in read_records(options.answers, _question_id).values() for end in record.get("ended", [])]
    for word, meaning in (("length", "cut off"), (FILLED, f"empty: {FULL}")):
        if word in ended:
            print(f"{ended.count(word)} of {len(ended)} turns are {meaning}")
    texts = [text for turns in read_answers(options.answers).turns.values() for text in turns]
    if empty := sum(not text.strip() for text in texts) - ended.count(FILLED):
        print(f"{empty} of {len(texts)} turns are empty: the model wrote nothing, or only a thinking block")
    if bench is None or asked is None:
        return 0
    return _judge_files(options, bench, [options.answers], SINGLE, *asked)


def _run_judge(options: argparse.Namespace) -> int:
    bench = read_bench(find_folder(options.data))
    return _judge_files(options, bench, options.answers, options.mode, *_judge(options))


def _judge(options: argparse.Namespace) -> tuple[str, Callable[[], judge.Judge]]:
    """Return the judge's name and a function that loads it.

    Raises:
        UserError: the arguments or the key are wrong.
    """
    if options.judge_local is not None:
        if options.judge_url is not None or options.judge_model is not None:
            raise UserError("--judge-local excludes --judge-url and --judge-model; remove them or --judge-local")

        def load() -> judge.Judge:
            from hift_ds.evaluation.mt_bench.chat_model import ChatModel

            return ChatModel(options.judge_local, dtype=options.dtype)

        from hift_ds.launch.model.loading import files_sha256  # slow to import

        digest = files_sha256(options.judge_local)
        if digest is None:  # on the Hub
            return options.judge_local, load
        return f"{Path(options.judge_local).name}@{digest[:8]}", load  # many folders are named "model"
    if options.judge_url is None or options.judge_model is None:
        raise UserError("no judge: give --judge-url and --judge-model, or --judge-local")
    url = checked_base_url(options.judge_url)
    key = key_from_environment(url, options.key_env)
    if key and url.startswith("http://") and not is_loopback(url):
        print("warning: the key goes to this http:// URL unencrypted; use https", file=sys.stderr)
    if options.cost_limit is not None and not (options.prompt_price or options.completion_price):
        raise UserError("--cost-limit needs --prompt-price and --completion-price (per million tokens)")
    limits = {"tries": options.tries, "timeout": options.timeout, "backoff": options.backoff}
    endpoint = Endpoint(url, options.judge_model, key, extra=options.request, **limits)
    return options.judge_model, lambda: endpoint


def _judge_files(
    options: argparse.Namespace,
    bench: Bench,
    files: Sequence[Path],
    mode: str,
    name: str,
    load: Callable[[], judge.Judge],
) -> int:
    to_do = judge.tasks(bench, [read_answers(path) for path in files], mode, name)
    limit = judge.SpendingLimit(options.token_limit, options.cost_limit, options.prompt_price, options.completion_price)
    workers = 1 if options.judge_local is not None else options.workers  # a local model writes one reply at a time
    numbers = {"workers": workers, "asks": options.asks, "max_tokens": options.judge_max_tokens}
    outcome = judge.run(to_do, load(), options.verdicts, limit=limit, **numbers)
    print(
        f"{options.verdicts}: {outcome.stored} new verdicts ({outcome.failed} failed), {outcome.before} stored before, "
        f"{len(outcome.missing)} of {len(to_do)} missing"
    )
    if outcome.estimated:
        print(
            f"{outcome.spent} tokens are counted for {options.verdicts}. {outcome.estimated} requests did not report "
            "theirs: each counts with a token for each byte of the prompt and the whole limit of a reply, marked "
            '"estimated" in the file. If a "spending" line was not charged, remove it',
            file=sys.stderr,
        )
    if not outcome.missing:
        return 0
    if outcome.stopped:
        print(f"stopped: {outcome.stopped}", file=sys.stderr)
    for key, reason in list(outcome.missing.items())[:5]:
        print(f"missing: question {key[0]}, turn {key[1]}, {' and '.join(key[3])}: {reason}", file=sys.stderr)
    if len(outcome.missing) > 5:
        print(f"missing: {len(outcome.missing) - 5} more", file=sys.stderr)
    how = "the same command with a higher limit" if outcome.limited else "the same command"
    print(f"{how} continues with the missing verdicts", file=sys.stderr)
    return MISSING


def _run_show(options: argparse.Namespace) -> int:
    summary = verdicts.summarize(verdicts.read_verdicts(options.verdicts))
    print(json.dumps(summary, indent=2, ensure_ascii=False) if options.json else verdicts.tables(summary))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _number(kind: type, above: float | None = None, at_least: float | None = None) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        wanted = f"above {above:g}" if above is not None else f"of at least {at_least:g}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (above is not None and value <= above) or (at_least or 0) > value:
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {noun} {wanted}")
        return value

    return parse


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a JSON object")
    return value


_DATA = "folder with the published files (question.jsonl ...), or spaces/OWNER/NAME or datasets/OWNER/NAME on the Hub"


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m evaluation.mt_bench", description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="answer|judge|show", parser_class=_Parser)

    to_answer = commands.add_parser(
        "answer", help="let a model answer; with --verdicts also judge its answers", allow_abbrev=False
    )
    to_answer.set_defaults(run=_run_answer)
    add = to_answer.add_argument
    add("--data", required=True, metavar="DATA", help=_DATA)
    add("--model", required=True, help="a Hugging Face folder or Hub id, with a chat template")
    add("--revision", help="git revision of a model on the Hub")
    add("--adapter", metavar="DIR", help="OUT/model of a run whose method cannot be merged (prefix, adapter ...) into "
        "its base model, which is --model")  # fmt: skip
    add(
        "--model-id",
        help="the model's name in answers and verdicts; default: the last component of --adapter or --model",
    )
    add("--answers", type=paths.to_write, required=True, metavar="FILE", help="JSON lines to write or continue")
    add("--max-new-tokens", type=_number(int, at_least=1), default=1024, help="limit for a turn (default: 1024)")
    add("--seed", type=int, default=0, help="seed of sampled answers (default: 0)")
    add(
        "--verdicts",
        type=paths.to_write,
        metavar="FILE",
        help="also judge the answers (single grading) and write verdicts to this file",
    )
    _add_judge(to_answer)

    to_judge = commands.add_parser("judge", help="let a judge rate answers", allow_abbrev=False)
    to_judge.set_defaults(run=_run_judge)
    add = to_judge.add_argument
    add("--data", required=True, metavar="DATA", help=_DATA)
    add("--answers", type=paths.to_write, required=True, nargs="+", metavar="FILE", help="one file for each model")
    add("--mode", choices=(SINGLE, PAIRWISE), default=SINGLE, help="pairwise: two models, in both orders")
    add("--verdicts", type=paths.to_write, required=True, metavar="FILE", help="JSON lines to write or continue")
    _add_judge(to_judge)

    to_show = commands.add_parser("show", help="show mean ratings, wins and flips", allow_abbrev=False)
    to_show.set_defaults(run=_run_show)
    to_show.add_argument("--verdicts", type=paths.to_write, required=True, metavar="FILE")
    to_show.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser


def _add_judge(parser: argparse.ArgumentParser) -> None:
    count, positive, price = _number(int, at_least=1), _number(float, above=0), _number(float, at_least=0)
    add = parser.add_argument_group("the judge").add_argument
    add("--judge-url", metavar="URL", help="URL of an OpenAI-compatible endpoint, up to /v1")
    add("--judge-model", metavar="NAME", help="the model's name at the endpoint")
    add("--key-env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with the key (default: "
        "OPENAI_API_KEY); endpoints on this machine need none")  # fmt: skip
    add("--judge-local", metavar="MODEL", help="use a local model instead: a Hugging Face folder or Hub id")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="precision of local models")
    add("--judge-max-tokens", type=count, default=2048, help="limit for a reply (default: 2048)")
    add("--request", type=_json_object, default={}, metavar="JSON", help="more fields of each request; null removes: "
        '\'{"max_tokens": null, "max_completion_tokens": 4096}\'')  # fmt: skip
    add("--workers", type=count, default=4, help="concurrent requests (default: 4)")
    add("--asks", type=count, default=3, help="how often to ask until a reply has a verdict (default: 3)")
    add("--tries", type=count, default=6, help="attempts for one reply after status 429, 5xx or a timeout (default: 6)")
    add("--timeout", type=positive, default=120.0, help="seconds to wait for a reply (default: 120)")
    add(
        "--backoff",
        type=positive,
        default=1.0,
        help="seconds before the second attempt; doubles each time (default: 1)",
    )
    add("--token-limit", type=count, help="stop asking after this many tokens for the verdicts of the file")
    add("--cost-limit", type=positive, help="stop asking after this cost")
    add("--prompt-price", type=price, default=0.0, help="cost of a million prompt tokens")
    add("--completion-price", type=price, default=0.0, help="cost of a million reply tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; return the exit code: 0, 2 user error, 3 verdicts missing, 130 interrupted."""
    try:
        options = _parser().parse_args(argv)
        code: int = options.run(options)
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished answers are stored, and the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
