"""The built-in tasks: examples in the form of published ones, disjoint sets, and errors that point to them."""

from __future__ import annotations

from collections import Counter

import pytest

from hift_ds.evaluation.tasks import loading
from hift_ds.evaluation.tasks.catalog import find_task
from hift_ds.evaluation.tasks.loading import TaskData, load_task
from hift_ds.launch.data.scores import extract_number
from hift_ds.launch.errors import UserError

NAMES = ("arithmetic", "yes-no")
SIZES = {"train_examples": 40, "dev_examples": 20, "test_examples": 30}


def load(name: str, seed: int = 0, **options: int) -> TaskData:
    return load_task(find_task(name), seed=seed, **{**SIZES, **options})


@pytest.mark.parametrize("name", NAMES)
def test_sets_have_their_sizes_and_share_nothing(name: str) -> None:
    seen: dict[str, set[str]] = {"train": set(), "dev": set(), "test": set()}
    for seed in (0, 1, 2):
        data = load(name, seed)
        assert [len(data.train), len(data.dev), len(data.test)] == [40, 20, 30] and data.report["notes"] == []
        assert not {one.passage for one in data.train} & {one.passage for one in data.dev}
        for part, found in seen.items():
            found.update(one.fingerprint for one in getattr(data, part))
    assert not seen["test"] & (seen["train"] | seen["dev"])  # whatever the seeds
    assert all(len(found) > 80 for found in seen.values() if found is not seen["dev"])


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_examples(name: str) -> None:
    hashes = [[load(name, seed).report[part]["sha256"] for part in ("train", "dev", "test")] for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] and not set(hashes[0]) & set(hashes[2])


def test_written_answers() -> None:
    task, data = find_task("arithmetic"), load("arithmetic")
    for one in data.test:
        assert one.prompt.startswith("Question: ") and one.prompt.endswith("\nAnswer:") and not one.candidates
        assert one.references == (one.completion,) and extract_number(one.completion) is not None
    answers = [one.completion for one in data.test]
    assert task.score(answers, data.test) == {"exact_match": 1.0}
    assert task.score([answers[-1], *answers[:-1]], data.test)["exact_match"] < 0.5
    assert max(len(one.completion.encode()) for one in data.test) <= task.max_new_tokens  # even with a token a byte


def test_choices() -> None:
    task, data = find_task("yes-no"), load("yes-no")
    assert task.labels == ("no", "yes")
    for one in data.test:
        assert one.prompt.endswith("? Yes or No?") and one.candidates == ("No", "Yes")
        assert one.completion == one.candidates[one.label] and one.target == one.label
        assert one.text_pair is not None and one.prompt == f"{one.text} {one.text_pair} Yes or No?"
    assert Counter(one.label for one in data.test) == {0: 15, 1: 15}
    assert Counter(one.label for one in [*data.train, *data.dev]) == {0: 30, 1: 30}
    assert task.score([one.label for one in data.test], data.test) == {"accuracy": 1.0}


def test_k_shot() -> None:
    data = load("yes-no", k_shot=7)
    for part in (data.train, data.dev):
        assert Counter(one.target for one in part) == {0: 7, 1: 7}
    with pytest.raises(UserError, match="k_shot"):
        load("arithmetic", k_shot=7)


def test_what_has_no_meaning_is_refused() -> None:
    for options in ({"path": "somewhere"}, {"test_split": "somewhere"}, {"revision": "somewhere"}):
        with pytest.raises(UserError, match="'somewhere' is not used, because this task is built in; remove it"):
            load_task(find_task("arithmetic"), seed=0, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected at most 200000"):
        load("yes-no", train_examples=200_000)


def test_errors_point_to_the_tasks_that_need_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "arithmetic and yes-no are built in and need no data"
    with pytest.raises(UserError, match=remedy):
        find_task("gsm9k")

    def unreachable(*_: object) -> None:
        raise UserError("the Hub cannot be reached")

    monkeypatch.setattr(loading, "open_hub", unreachable)
    with pytest.raises(UserError, match=f"the Hub cannot be reached; {remedy}"):
        load_task(find_task("sst2"), seed=0)
