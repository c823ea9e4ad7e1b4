"""The official metrics of the tasks, as pure functions of predictions and references.

All values are 0 to 1 (correlations -1 to 1; NIST and CIDEr have no such bound); higher is better.

Accuracy, F1 of labels and correlations are scikit-learn's and scipy's. Comparing texts, as the scripts of SQuAD, ReCoRD
and DROP do it, has no package that is kept up and needs no download, so it is written here.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import shutil
import string
from collections.abc import Hashable, Iterator, Sequence

from scipy import stats
from sklearn import metrics

from hift_ds.launch.errors import UserError

E2E = ("bleu", "nist", "meteor", "rouge_l", "cider")
# Why, where one is not given.
MISSING = {"meteor": "there is no `java` on the PATH, in which pycocoevalcap's METEOR runs, or not with its 2 GiB"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


# Labels ----------------------------------------------------------------------------------------------


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """`accuracy`: the share of predictions that are right."""
    return {"accuracy": float(metrics.accuracy_score(labels, predictions))}


def accuracy_and_macro_f1(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """`accuracy`, and `f1_macro`: the mean of the classes' F1, as CommitmentBank is scored in SuperGLUE."""
    f1 = metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    return {**accuracy(predictions, labels), "f1_macro": float(f1)}


def accuracy_and_f1(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """`accuracy`, and `f1` of class 1, as GLUE scores MRPC and QQP."""
    f1 = metrics.f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0)
    return {**accuracy(predictions, labels), "f1": float(f1)}


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """`matthews`: Matthews' correlation, GLUE's metric of CoLA."""
    return {"matthews": float(metrics.matthews_corrcoef(labels, predictions))}


def spearman(predictions: Sequence[float], targets: Sequence[float]) -> dict[str, float]:
    """`spearman`: rank correlation; not a number where one side is constant."""
    return {"spearman": float(stats.spearmanr(predictions, targets).statistic)}


def correlations(predictions: Sequence[float], targets: Sequence[float]) -> dict[str, float]:
    """`spearman`, and `pearson`, the linear correlation; GLUE's metrics of STS-B."""
    return {**spearman(predictions, targets), "pearson": float(stats.pearsonr(predictions, targets).statistic)}


def multirc(predictions: Sequence[int], labels: Sequence[int], questions: Sequence[Hashable]) -> dict[str, float]:
    """Of MultiRC, whose answers are each right (1) or wrong (0).

    Args:
        questions: which question each answer belongs to.

    Returns:
        `f1a`: F1 of the right answers over all answers. `exact_match`: the share of questions all of whose answers
        are judged right. `accuracy`: over answers.
    """
    right: dict[Hashable, bool] = {}
    for prediction, label, question in zip(predictions, labels, questions, strict=True):
        right[question] = right.get(question, True) and prediction == label
    f1a = float(metrics.f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0))
    return {"f1a": f1a, "exact_match": sum(right.values()) / len(right), **accuracy(predictions, labels)}


# Texts -----------------------------------------------------------------------------------------------


def normalized(text: str) -> str:
    """As SQuAD compares answers: lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words two answers share, counted as often as they occur in both."""
    ours, truth = normalized(prediction).split(), normalized(reference).split()
    if not ours or not truth:  # one without words agrees only with another
        return float(ours == truth)
    shared = (collections.Counter(ours) & collections.Counter(truth)).total()
    return 2 * shared / (len(ours) + len(truth))


def answers_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`f1` and `exact_match` of SQuAD and ReCoRD: for each prediction the best over its references."""
    f1 = exact = 0.0
    for prediction, accepted in zip(predictions, references, strict=True):
        f1 += max(token_f1(prediction, one) for one in accepted)
        exact += any(normalized(prediction) == normalized(one) for one in accepted)
    return {"f1": f1 / len(predictions), "exact_match": exact / len(predictions)}


def drop(predictions: Sequence[str], references: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """`f1` and `exact_match` of DROP (Dua et al. 2019) for answers of one span, the best over the references.

    Args:
        references: for each prediction its accepted answers, each of one span or several. Against several spans one
            predicted span can match at most one, so its F1 is shared out over all.
    """
    f1 = exact = 0.0
    for prediction, accepted in zip(predictions, references, strict=True):
        scores = [_drop_pair(prediction, spans) for spans in accepted]
        exact += max(score[0] for score in scores)
        f1 += max(score[1] for score in scores)
    return {"f1": f1 / len(predictions), "exact_match": exact / len(predictions)}


def _drop_pair(prediction: str, spans: Sequence[str]) -> tuple[float, float]:
    """Exact match, and F1 to two places as DROP's script has it."""
    ours = _drop_words(prediction)
    truths = [_drop_words(span) for span in spans]
    bag = set(ours)
    best = 0.0
    for truth in map(set, truths):
        numbers = {word for word in truth if _number(word) is not None}
        if numbers and not numbers & bag:  # with another number it is another answer
            continue
        shared = len(bag & truth)
        precision = shared / len(bag) if bag else 1.0
        recall = shared / len(truth) if truth else 1.0
        if precision + recall:
            best = max(best, 2 * precision * recall / (precision + recall))
    return float(truths == [ours]), round(best / len(truths), 2)


def _drop_words(text: str) -> list[str]:
    """Words as DROP compares them: parted also at hyphens, numbers by value, others as in SQuAD."""
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
    """`bleu`: sacrebleu's, without letter case, over whole sets, of texts with one reference or more each."""
    with _e2e_packages():
        from sacrebleu.metrics import BLEU

    found = [_ngrams(text, tuple(some)) for text, some in zip(predictions, references, strict=True)]
    correct, total, lengths = ([sum(column) for column in zip(*part, strict=True)] for part in zip(*found, strict=True))
    written, nearest = lengths
    return {"bleu": BLEU.compute_bleu(correct, total, written, nearest, smooth_method="exp").score / 100}


@functools.lru_cache(maxsize=2**14)  # resamples ask for the same texts again and again
def _ngrams(prediction: str, references: tuple[str, ...]) -> tuple[list[int], list[int], tuple[int, int]]:
    """Of a text: its n-grams that a reference has, all of them, and how long it and the nearest reference are."""
    from sacrebleu.metrics import BLEU

    found = BLEU(lowercase=True, force=True, effective_order=True).sentence_score(prediction, references)
    return found.counts, found.totals, (found.sys_len, found.ref_len)


def e2e(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The metrics of E2E (Novikova et al. 2017); letter case does not count.

    As with the publisher's script, words are parted as in mteval-v13a. Its BLEU is ours; the others come close: NLTK's
    NIST takes the best reference for each text, the script counts n-grams over all; METEOR, ROUGE-L and CIDEr are the
    script's own, but it parts their words in Java, where "isn't" is two words and a bracket is one.

    Args:
        references: for each prediction one text or more.

    Returns:
        `bleu` (sacrebleu). `nist` (NLTK), 0 where no prediction has 5 words. `meteor` (1.5, of pycocoevalcap), where
        Java runs. `rouge_l` (pycocoevalcap): the mean F of the best precision and the best recall over the references,
        recall weighed by 1.2 squared. `cider` (pycocoevalcap): 0 to 10; 0 where all references belong to one
        prediction. The last three without punctuation.

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
    """None where Java fails."""
    with _e2e_packages():
        from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        return float(meteor.compute_score(accepted, given)[0])
    except (OSError, ValueError):  # the process has died: what is read is no number
        with contextlib.suppress(OSError):
            meteor.meteor_p.stdin.close()
        return None
    finally:
        if meteor.lock.locked():  # after a failure, and its end would wait for it
            meteor.lock.release()


@contextlib.contextmanager
def _e2e_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"E2E's metrics: {error}; install them: pip install 'hift_ds[e2e]'") from error
