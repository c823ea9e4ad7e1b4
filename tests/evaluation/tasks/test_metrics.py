"""Metrics of tasks: cases worked out by hand, and independent implementations where they are installed."""

from __future__ import annotations

import importlib
import math
import random
import shutil
from types import ModuleType

import pytest

from hift_ds.evaluation.tasks import metrics

WORDS = (
    "the",
    "a",
    "An",
    "red",
    "red,",
    "cat-like",
    "3",
    "3.0",
    "U.S.",
    "New",
    "york",
    "(two)",
    "0.5",
    "-7",
    "",
    "12%",
)


def texts(seed: int, n: int = 400) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(0, 5))) for _ in range(n)]


def optional(name: str) -> ModuleType:
    """A module of a package that the project does not need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed ({error})")


# Labels ----------------------------------------------------------------------------------------------


def test_labels_by_hand() -> None:
    assert metrics.accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == {"accuracy": 0.75}
    # Class 0: F1 1; class 1: precision 1/2, recall 1, F1 2/3; class 2: precision 1, recall 1/2, F1 2/3.
    cb = metrics.accuracy_and_macro_f1([0, 1, 1, 2], [0, 1, 2, 2])
    assert cb == {"accuracy": 0.75, "f1_macro": pytest.approx((1 + 2 / 3 + 2 / 3) / 3)}
    # True positives 2, true negatives 1, one false positive, one false negative.
    assert metrics.matthews([1, 1, 0, 1, 0], [1, 1, 0, 0, 1])["matthews"] == pytest.approx((2 * 1 - 1) / 6)
    assert metrics.spearman([1, 2, 3], [10, 30, 20])["spearman"] == pytest.approx(0.5)
    # Class 1: two found, one of them wrongly, one missed: precision 1/2, recall 1/2.
    mrpc = metrics.accuracy_and_f1([1, 1, 0, 0, 0], [1, 0, 1, 0, 0])
    assert mrpc == {"accuracy": 0.6, "f1": pytest.approx(0.5)}
    assert metrics.accuracy_and_f1([0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    # Deviations (-1, 0, 1) and (-3, 1, 2): 5 / sqrt(2 * 14).
    stsb = metrics.correlations([1, 2, 3], [0, 4, 5])
    assert stsb == {"spearman": pytest.approx(1.0), "pearson": pytest.approx(5 / 28**0.5)}
    with pytest.warns(RuntimeWarning, match="constant"):
        assert math.isnan(metrics.spearman([1, 1, 1], [10, 30, 20])["spearman"])


def test_multirc_by_hand() -> None:
    predictions, labels = [1, 0, 1, 1, 0, 0], [1, 0, 1, 0, 0, 1]
    score = metrics.multirc(predictions, labels, ["a", "a", "b", "b", "c", "d"])
    # Two right answers found, one found wrongly, one missed. Questions a and c are right as a whole.
    assert score == {"f1a": pytest.approx(2 / 3), "exact_match": 0.5, "accuracy": pytest.approx(4 / 6)}
    # Answers need not stand together.
    assert metrics.multirc([1, 1, 0], [1, 1, 1], ["a", "b", "a"])["exact_match"] == 0.5
    assert metrics.multirc([0, 1, 1], [1, 1, 1], ["a", "b", "a"])["exact_match"] == 0.5
    assert metrics.multirc([0, 0], [0, 0], ["a", "b"]) == {"f1a": 0.0, "exact_match": 1.0, "accuracy": 1.0}


def test_labels_against_torchmetrics() -> None:
    import torch
    from torchmetrics.functional import classification, spearman_corrcoef

    draw = random.Random(5)
    for classes in (2, 3):
        ours, truth = ([draw.randrange(classes) for _ in range(200)] for _ in range(2))
        a, b = torch.tensor(ours), torch.tensor(truth)
        macro = classification.multiclass_f1_score(a, b, num_classes=classes, average="macro")
        assert metrics.accuracy_and_macro_f1(ours, truth)["f1_macro"] == pytest.approx(macro.item(), abs=1e-6)
        correlation = classification.multiclass_matthews_corrcoef(a, b, num_classes=classes)
        assert metrics.matthews(ours, truth)["matthews"] == pytest.approx(correlation.item(), abs=1e-6)
    f1a = classification.binary_f1_score(a.clamp(max=1), b.clamp(max=1)).item()
    clamped = a.clamp(max=1).tolist(), b.clamp(max=1).tolist()
    assert metrics.multirc(*clamped, list(range(200)))["f1a"] == pytest.approx(f1a, abs=1e-6)
    x, y = ([draw.randrange(20) / 4 for _ in range(100)] for _ in range(2))  # with ties
    expected = spearman_corrcoef(torch.tensor(x), torch.tensor(y)).item()
    assert metrics.spearman(x, y)["spearman"] == pytest.approx(expected, abs=1e-5)


def test_labels_against_scipy_and_sklearn() -> None:
    from scipy import stats
    from sklearn.metrics import precision_score, recall_score

    draw = random.Random(6)
    ours, truth = ([draw.randrange(2) for _ in range(300)] for _ in range(2))
    precision, recall = precision_score(truth, ours), recall_score(truth, ours)
    expected = 2 * precision * recall / (precision + recall)
    assert metrics.accuracy_and_f1(ours, truth)["f1"] == pytest.approx(expected, abs=1e-12)
    x, y = ([draw.randrange(20) / 4 for _ in range(100)] for _ in range(2))  # with ties
    found = metrics.correlations(x, y)
    assert found["pearson"] == pytest.approx(stats.linregress(x, y).rvalue, abs=1e-12)
    ranks = stats.linregress(stats.rankdata(x), stats.rankdata(y)).rvalue
    assert found["spearman"] == pytest.approx(ranks, abs=1e-12)


# Texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("The  Eiffel-Tower!", "eiffeltower", 1.0),  # articles, case, punctuation, whitespace
        ("in Paris, France", "Paris", 0.5),  # 1 of 3 words, 1 of 1
        ("red red blue", "red green", 0.4),  # the second red has no partner
        ("athlete Roman", "thlete Rom", 0.0),  # articles are whole words
        ("yes", "no", 0.0),
        ("", "no", 0.0),
        ("the", "a", 1.0),  # no word is left of either
    ],
)
def test_token_f1(prediction: str, reference: str, f1: float) -> None:
    assert metrics.token_f1(prediction, reference) == pytest.approx(f1)
    assert metrics.token_f1(reference, prediction) == pytest.approx(f1)


def test_the_best_reference_counts() -> None:
    score = metrics.answers_match(["in Paris", "the Moon", "x"], [["London", "Paris"], ["moon", "Mars"], ["y"]])
    assert score == {"f1": pytest.approx((2 / 3 + 1 + 0) / 3), "exact_match": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("prediction", "accepted", "exact", "f1"),
    [
        ("12", [("12.0",)], 1, 1.0),  # numbers by value
        ("3 yards", [("4 yards",)], 0, 0.0),  # another number is another answer
        ("3 yards", [("3",)], 0, 0.67),
        ("about 3", [("5",), ("3",)], 0, 0.67),
        ("the twenty-two", [("twenty two",)], 1, 1.0),  # hyphens part words, articles go
        ("Tom Brady", [("Tom Brady", "Eli Manning")], 0, 0.5),  # one of two spans
        ("Tom Tom Brady", [("Tom Brady",)], 0, 1.0),  # bags are sets
        ("28 yards.", [("28 yards",)], 1, 1.0),
        ("", [("x",)], 0, 0.0),
    ],
)
def test_drop(prediction: str, accepted: list[tuple[str, ...]], exact: int, f1: float) -> None:
    assert metrics.drop([prediction], [accepted]) == {"f1": f1, "exact_match": exact}


def test_squad_and_record_against_torchmetrics() -> None:
    from torchmetrics.functional.text import squad

    ours, truths = texts(1), [[a, b] for a, b in zip(texts(2), texts(3), strict=True)]
    # Where no word is left of an answer, SQuAD's scripts disagree with each other (1.1 says 0, 2.0 says 1).
    rows = [(a, b) for a, b in zip(ours, truths, strict=True) if all(map(metrics.normalized, [a, *b]))]
    assert len(rows) > 150
    for prediction, accepted in rows:
        expected = squad(
            [{"prediction_text": prediction, "id": "0"}],
            [{"answers": {"answer_start": [0] * len(accepted), "text": accepted}, "id": "0"}],
        )
        score = metrics.answers_match([prediction], [accepted])
        assert score["f1"] == pytest.approx(expected["f1"].item() / 100, abs=1e-6), (prediction, accepted)
        assert score["exact_match"] == expected["exact_match"].item() / 100, (prediction, accepted)


def test_drop_against_lm_eval() -> None:
    reference = optional("lm_eval.tasks.drop.utils")
    ours, truths = texts(4, 1500), list(zip(texts(5, 1500), texts(6, 1500), strict=True))
    seen = set()
    for prediction, (a, b) in zip(ours, truths, strict=True):
        accepted = [(a,), (a, b)]
        pairs = [reference.get_metrics([prediction], one) for one in accepted]
        score = metrics.drop([prediction], [accepted])
        assert score["exact_match"] == max(pair[0] for pair in pairs), (prediction, accepted)
        assert score["f1"] == pytest.approx(max(pair[1] for pair in pairs)), (prediction, accepted)
        seen.add(score["f1"])
    assert len(seen) > 8


# Generated texts -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_meteor")
def test_rouge_l_by_hand() -> None:
    """As the E2E tool has it: best precision and best recall, each of any reference, and recall by 1.2 squared."""
    optional("pycocoevalcap.rouge.rouge")

    def f(precision: float, recall: float) -> float:
        return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)

    # All 5 words in order, of 6 that are wanted; punctuation and letter case do not count.
    score = metrics.e2e(["The cat sat on mat."], [["the cat, sat on the mat"]])
    assert score["rouge_l"] == pytest.approx(f(1, 5 / 6))
    # The first reference has the best precision, 2 of 2 words, the second the best recall, 1 of 1.
    assert metrics.e2e(["cheap food"], [["cheap food for all", "food"]])["rouge_l"] == pytest.approx(f(1, 1))
    # Over texts it is the mean.
    assert metrics.e2e(["a nice pub", "x", ""], [["a nice pub"], ["y"], ["z"]])["rouge_l"] == pytest.approx(1 / 3)


@pytest.mark.usefixtures("no_meteor")
def test_rouge_l_against_the_package() -> None:
    """One text at a time, and words parted in Python; Java parts these alike."""
    rouge = optional("pycocoevalcap.rouge.rouge").Rouge()
    predictions = ["The Eagle is a cheap pub, near Café Adriatic.", "Try Cotto! It is family-friendly, 5 out of 5."]
    references = [
        ["The Eagle is a pub.", "Near Café Adriatic, The Eagle is cheap."],
        ["Cotto: a family-friendly place, rated 5 out of 5.", "Cotto is rated 5 out of 5; families are welcome."],
    ]
    given = ["the eagle is a cheap pub near café adriatic", "try cotto it is family-friendly 5 out of 5"]
    accepted = [
        ["the eagle is a pub", "near café adriatic the eagle is cheap"],
        ["cotto a family-friendly place rated 5 out of 5", "cotto is rated 5 out of 5 families are welcome"],
    ]
    found = [rouge.calc_score([one], some) for one, some in zip(given, accepted, strict=True)]
    assert metrics.e2e(predictions, references)["rouge_l"] == pytest.approx(sum(found) / 2, abs=1e-12)
    if shutil.which("java") is None:
        pytest.skip("Java is not installed, so that the E2E tool's tokenizer cannot be compared")
    tokenizer = importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    captions = {i: [{"caption": text} for text in (predictions[i], *references[i])] for i in range(2)}
    assert tokenizer.tokenize(captions) == {i: [given[i], *accepted[i]] for i in range(2)}
