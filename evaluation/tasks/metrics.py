"""The tasks' official metrics, as pure functions of predictions and references.

Values are from 0 to 1 (correlations from -1 to 1; NIST and CIDEr have no upper bound); higher is better.

F1 of labels and correlations come from scikit-learn and scipy. The text comparisons of SQuAD, ReCoRD and DROP
are implemented here, because no maintained package offers them without a download.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import shutil
import string
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from scipy import stats
from sklearn import metrics

from hift_ds.launch.errors import UserError

E2E = ("bleu", "nist", "meteor", "rouge_l", "cider")
# Why a metric can be missing.
MISSING = {"meteor": "pycocoevalcap's METEOR needs `java` on the PATH and 2 GiB of memory"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


# Labels ----------------------------------------------------------------------------------------------


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Return `accuracy`, the share of right predictions."""
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    return {"accuracy": float(np.mean(np.equal(labels, predictions)))}  # scikit-learn's takes milliseconds


def accuracy_and_macro_f1(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Return `accuracy` and `f1_macro`, the mean F1 of the classes: SuperGLUE's metrics for CommitmentBank."""
    f1 = metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    return {**accuracy(predictions, labels), "f1_macro": float(f1)}


def accuracy_and_f1(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Return `accuracy` and `f1` of class 1: GLUE's metrics for MRPC and QQP."""
    f1 = metrics.f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0)
    return {**accuracy(predictions, labels), "f1": float(f1)}


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Return `matthews`, the Matthews correlation: GLUE's metric for CoLA."""
    return {"matthews": float(metrics.matthews_corrcoef(labels, predictions))}


def spearman(predictions: Sequence[float], targets: Sequence[float]) -> dict[str, float]:
    """Return `spearman`, the rank correlation; NaN if one side is constant."""
    return {"spearman": float(stats.spearmanr(predictions, targets).statistic)}


def correlations(predictions: Sequence[float], targets: Sequence[float]) -> dict[str, float]:
    """Return `spearman` and `pearson`, the linear correlation: GLUE's metrics for STS-B."""
    return {**spearman(predictions, targets), "pearson": float(stats.pearsonr(predictions, targets).statistic)}


def multirc(predictions: Sequence[int], labels: Sequence[int], questions: Sequence[Hashable]) -> dict[str, float]:
    """Return the metrics of MultiRC, in which each answer is right (1) or wrong (0).

    Args:
        questions: the question that each answer belongs to.

    Returns:
        `f1a`: F1 of class 1 over all answers. `exact_match`: the share of questions with every answer predicted
        correctly. `accuracy`: over answers.
    """
    right: dict[Hashable, bool] = {}
    for prediction, label, question in zip(predictions, labels, questions, strict=True):
        right[question] = right.get(question, True) and prediction == label
    f1a = float(metrics.f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0))
    return {"f1a": f1a, "exact_match": sum(right.values()) / len(right), **accuracy(predictions, labels)}


# Texts -----------------------------------------------------------------------------------------------


def normalized(text: str) -> str:
    """Normalize a text as SQuAD does: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """Return the F1 of the words that two answers share, counted with repetition."""
    ours, truth = normalized(prediction).split(), normalized(reference).split()
    if not ours or not truth:  # an empty answer matches only another empty one
        return float(ours == truth)
    shared = (collections.Counter(ours) & collections.Counter(truth)).total()
    return 2 * shared / (len(ours) + len(truth))


def answers_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return `f1` and `exact_match` of SQuAD and ReCoRD: each prediction counts with its best reference."""
    f1 = exact = 0.0
    for prediction, accepted in zip(predictions, references, strict=True):
        f1 += max(token_f1(prediction, one) for one in accepted)
        exact += any(normalized(prediction) == normalized(one) for one in accepted)
    return {"f1": f1 / len(predictions), "exact_match": exact / len(predictions)}


def drop(predictions: Sequence[str], references: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """Return `f1` and `exact_match` of DROP (Dua et al. 2019) for predictions of one span and the best reference.

    Args:
        references: for each prediction its accepted answers, each of one or more spans. A predicted span can match only
            one of several spans, so its F1 is divided by their number.
    """
    f1 = exact = 0.0
    for prediction, accepted in zip(predictions, references, strict=True):
        scores = [_drop_pair(prediction, spans) for spans in accepted]
        exact += max(score[0] for score in scores)
        f1 += max(score[1] for score in scores)
    return {"f1": f1 / len(predictions), "exact_match": exact / len(predictions)}


def _drop_pair(prediction: str, spans: Sequence[str]) -> tuple[float, float]:
    """Return exact match, and F1 rounded to two places as in DROP's script."""
    ours = _drop_words(prediction)
    truths = [_drop_words(span) for span in spans]
    bag = set(ours)
    best = 0.0
    for truth in map(set, truths):
        numbers = {word for word in truth if _number(word) is not None}
        if numbers and not numbers & bag:  # a different number is a different answer
            continue
        shared = len(bag & truth)
        precision = shared / len(bag) if bag else 1.0
        recall = shared / len(truth) if truth else 1.0
        if precision + recall:
            best = max(best, 2 * precision * recall / (precision + recall))
    return float(truths == [ours]), round(best / len(truths), 2)


def _drop_words(text: str) -> list[str]:
    """Split a text into words as DROP does: also at hyphens; numbers by value, other words as in SQuAD."""
    words = []
    for word in re.split(r"[ -]", text):
        word = word.lower()
        if _number(word) is None:
            word = word.translate(_PUNCTUATION)
        value = _number(word)
        word = word if value is None else str(value)
        words += _ARTICLES.sub(" ", word).split()
    return words


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


# Generated texts -------------------------------------------------------------------------------------


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return `bleu`, sacrebleu's case-insensitive corpus BLEU with one or more references per text."""
    with _e2e_packages():
        from sacrebleu.metrics import BLEU

    found = [_ngrams(text, tuple(some)) for text, some in zip(predictions, references, strict=True)]
    correct, total, lengths = ([sum(column) for column in zip(*part, strict=True)] for part in zip(*found, strict=True))
    written, nearest = lengths
    return {"bleu": BLEU.compute_bleu(correct, total, written, nearest, smooth_method="exp").score / 100}


@functools.lru_cache(maxsize=2**14)  # resamples repeat the same texts
def _ngrams(prediction: str, references: tuple[str, ...]) -> tuple[list[int], list[int], tuple[int, int]]:
    """Return a text's matched n-grams, all its n-grams, and the lengths of the text and the closest reference."""
    from sacrebleu.metrics import BLEU

    found = BLEU(lowercase=True, force=True, effective_order=True).sentence_score(prediction, references)
    return found.counts, found.totals, (found.sys_len, found.ref_len)


def e2e(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the metrics of E2E (Novikova et al. 2017), ignoring letter case.

    Texts are tokenized as in mteval-v13a, like in the publisher's script. BLEU equals the script's. The others are
    close to it: NLTK's NIST uses the best reference for each text, while the script counts n-grams over all references;
    METEOR, ROUGE-L and CIDEr use the script's implementations, but the script tokenizes in Java, where "isn't" is two
    tokens and a bracket is one.

    Args:
        references: for each prediction one or more texts.

    Returns:
        `bleu` (sacrebleu). `nist` (NLTK), 0 if no prediction has 5 words. `meteor` (1.5, from pycocoevalcap), only if
        Java runs. `rouge_l` (pycocoevalcap): the mean F of the best precision and the best recall over the references,
        with recall weighted by 1.2 squared. `cider` (pycocoevalcap): 0 to 10; 0 if all references belong to one
        prediction. The last three ignore punctuation.

    Raises:
        UserError: a package is missing.
    """
    with _e2e_packages():
        from nltk.translate.nist_score import corpus_nist
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    part = Tokenizer13a()
    ours = [part(text.lower()).split() for text in predictions]
    truths = [[part(text.lower()).split() for text in accepted] for accepted in references]
    nist = corpus_nist(truths, ours, n=5) if max(map(len, ours)) >= 5 else 0.0

    def spoken(words: Sequence[str]) -> str:
        return " ".join(word for word in words if word.translate(_PUNCTUATION))

    accepted = {i: [spoken(words) for words in some] for i, some in enumerate(truths)}
    given = {i: [spoken(words)] for i, words in enumerate(ours)}
    rouge, _ = Rouge().compute_score(accepted, given)
    cider, _ = Cider().compute_score(accepted, given)
    found = bleu(predictions, references) | {"nist": float(nist), "rouge_l": float(rouge), "cider": float(cider)}
    meteor = _meteor(accepted, given) if shutil.which("java") else None
    return found if meteor is None else found | {"meteor": meteor}


def _meteor(accepted: dict[int, list[str]], given: dict[int, list[str]]) -> float | None:
    """Return METEOR, or None if Java fails."""
    with _e2e_packages():
        from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        return float(meteor.compute_score(accepted, given)[0])
    except (OSError, ValueError):  # the Java process has died
        with contextlib.suppress(OSError):
            meteor.meteor_p.stdin.close()
        return None
    finally:
        if meteor.lock.locked():  # otherwise METEOR's destructor waits for it
            meteor.lock.release()


@contextlib.contextmanager
def _e2e_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"E2E's metrics: {error}; install them: pip install 'hift_ds[e2e]'") from error
