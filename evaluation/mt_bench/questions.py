"""Read MT-Bench's published files: questions, the judge's prompts, references, and models' answers.

Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (2023), and the files published with it:
`question.jsonl`, `judge_prompts.jsonl`, `reference_answer/gpt-4.jsonl`. Answers have the format of the references, so
published answers can be judged too.

All three are in FastChat's fastchat/llm_judge/data. The publisher's Space on the Hub, lmsys/mt-bench, has only the
questions; other repositories on the Hub have copies of all files.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from pathlib import Path

from hift_ds import paths
from hift_ds.evaluation.json_lines import Place, Record, field, read_json_lines
from hift_ds.launch.errors import UserError, looked_in, nearest

TEMPERATURES = {  # by category, as published
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
SINGLE, PAIRWISE = "single", "pairwise"
Turns = tuple[str, str]

# The names of the prompts without and with references.
_NAMES = {SINGLE: ("single-v1", "single-math-v1"), PAIRWISE: ("pair-v2", "pair-math-v1")}
# The fields of a template for the first turn and for both turns; _REFERENCE_FIELDS are added with references.
_FIELDS = {
    (SINGLE, 1): {"question", "answer"},
    (SINGLE, 2): {"question_1", "question_2", "answer_1", "answer_2"},
    (PAIRWISE, 1): {"question", "answer_a", "answer_b"},
    (PAIRWISE, 2): {"question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"},
}
_REFERENCE_FIELDS = {1: {"ref_answer_1"}, 2: {"ref_answer_1", "ref_answer_2"}}


@dataclass(frozen=True)
class Question:
    """A question of two turns."""

    id: int
    category: str
    turns: Turns


@dataclass(frozen=True)
class Prompt:
    """A judge's prompt: the system message, and a template with fields in braces."""

    name: str
    system: str
    template: str


@dataclass(frozen=True)
class Answers:
    """A model's answers by question id."""

    model: str
    turns: dict[int, Turns]


@dataclass(frozen=True)
class Bench:
    """Everything that judging needs. The keys of `prompts` are (mode, turn, whether there is a reference)."""

    questions: list[Question]
    references: dict[int, Turns]
    prompts: dict[tuple[str, int, bool], Prompt]


def find_folder(data: str) -> Path:
    """Find the folder with `question.jsonl`: `data`, or `mt_bench` inside it. A repository on the Hub is downloaded.

    Args:
        data: a folder, or spaces/OWNER/NAME or datasets/OWNER/NAME with an optional @REVISION.

    Raises:
        UserError: there is no such folder, or the Hub cannot be reached.
    """
    if reason := paths.fault(data, reads=True):
        raise UserError(f"--data: {reason}")
    place = Path(data).expanduser()
    if not place.is_dir():
        place = _fetched(data)
    for inner in ("", "mt_bench", "data/mt_bench"):
        if (place / inner / "question.jsonl").is_file():
            return place / inner
    raise UserError(f"--data {data}: no question.jsonl in {place}, nor in mt_bench or data/mt_bench in it")


def _fetched(data: str) -> Path:
    repository = re.fullmatch(r"(space|dataset)s/([^/@]+/[^/@]+)(?:@(.+))?", data)
    if repository is None:
        raise UserError(
            f"--data {data}: no such folder{looked_in(data)}; expected the folder of MT-Bench's files, or "
            "spaces/OWNER/NAME or datasets/OWNER/NAME on the Hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kind, name, revision = repository.groups()
    try:
        wanted = ["*question.jsonl", "*judge_prompts.jsonl", "*reference_answer/gpt-4.jsonl"]
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--data {data}: cannot be fetched from the Hub: {reason}; give a folder instead") from error


def read_bench(folder: Path) -> Bench:
    """The published files in a folder, the judge's prompts there or in the one above, as published.

    Raises:
        UserError: a file is absent or a line wrong; names file and line.
    """
    prompts = folder / "judge_prompts.jsonl"
    if not prompts.is_file() and (folder.parent / prompts.name).is_file():
        prompts = folder.parent / prompts.name
    references = folder / "reference_answer" / "gpt-4.jsonl"
    lacking = [str(path) for path in (prompts, references) if not path.is_file()]
    if lacking:
        raise UserError(
            f"the judge's files are not there: {', '.join(lacking)}; the Space lmsys/mt-bench has the questions alone, "
            "all three are in FastChat's fastchat/llm_judge/data"
        )
    return Bench(read_questions(folder / "question.jsonl"), read_answers(references).turns, read_prompts(prompts))


def read_questions(path: Path) -> list[Question]:
    """The questions in the file's order. Raises UserError as `read_bench`."""
    questions: list[Question] = []
    seen: set[int] = set()
    for where, record in read_json_lines(path):
        question = Question(_id(where, record, seen), _category(where, record), _turns(where, record))
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: no question in it")
    return questions


def read_answers(path: Path) -> Answers:
    """One model's answers, or the references. Raises UserError as `read_bench`, and for answers of two models."""
    model, first = "", ""
    turns: dict[int, Turns] = {}
    seen: set[int] = set()
    for where, record in read_json_lines(path):
        name = field(where, record, "model_id", str, "the model's name")
        if first and name != model:
            raise UserError(f"{where}: an answer of {name!r}, but {first} is one of {model!r}; one model a file")
        model, first = name, first or where
        choices = field(where, record, "choices", list, "a list with one object that has 'turns'")
        if len(choices) != 1 or not isinstance(choices[0], dict):
            raise UserError(f"{where}: 'choices': expected a list with one object that has 'turns'")
        turns[_id(where, record, seen)] = _turns(where, choices[0])
    if not turns:
        raise UserError(f"{path}: no answer in it")
    return Answers(model, turns)


def read_prompts(path: Path) -> dict[tuple[str, int, bool], Prompt]:
    """The eight prompts that the published judge uses. Raises UserError as `read_bench`."""
    named: dict[str, tuple[Place, Prompt]] = {}
    for where, record in read_json_lines(path):
        name, system, template = (
            field(where, record, key, str, "a text") for key in ("name", "system_prompt", "prompt_template")
        )
        if name in named:
            raise UserError(f"{where}: a second prompt {name!r}, the first is {named[name][0]}")
        named[name] = (where, Prompt(name, system, template))
    prompts = {}
    for mode, turn in _FIELDS:
        for with_reference in (False, True):
            name = _NAMES[mode][with_reference] + ("-multi-turn" if turn == 2 else "")
            if name not in named:
                raise UserError(f"{path}: no prompt {name!r}{nearest(name, named)}")
            where, prompt = named[name]
            wanted = _FIELDS[mode, turn] | (_REFERENCE_FIELDS[turn] if with_reference else set())
            try:
                found = {key for _, key, _, _ in string.Formatter().parse(prompt.template) if key is not None}
            except ValueError as error:
                raise UserError(f"{where}: 'prompt_template': {error}") from None
            if found != wanted:
                raise UserError(
                    f"{where}: 'prompt_template': expected the fields {', '.join(sorted(wanted))}, got "
                    f"{', '.join(sorted(found)) or 'none'}"
                )
            prompts[mode, turn, with_reference] = prompt
    return prompts


def _id(where: Place, record: Record, seen: set[int]) -> int:
    number: int = field(where, record, "question_id", int, "the question's number")
    if number in seen:
        raise UserError(f"{where}: a second line for question {number}; remove one")
    seen.add(number)
    return number


def _category(where: Place, record: Record) -> str:
    name: str = field(where, record, "category", str, "a category")
    if name not in TEMPERATURES:
        known = ", ".join(TEMPERATURES)
        raise UserError(f"{where}: 'category': got {name!r}, expected one of {known}{nearest(name, TEMPERATURES)}")
    return name


def _turns(where: Place, record: Record) -> Turns:
    turns = field(where, record, "turns", list, "a list of two texts")
    if len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{where}: 'turns': expected a list of two texts, got {len(turns)} values")
    return turns[0], turns[1]
