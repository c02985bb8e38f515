"""What an answer is worth: 0 to 1 for a prediction and its references, as the field's own scorers define it.

Every metric takes the prediction and a non-empty sequence of references; more references never lower a score but for
`string_match_all`, which asks for all of them. Parity with the sources is held by cases in tests/eval/test_metrics.py.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

Metric = Callable[[str, Sequence[str]], float]

_CONTROL = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ABSTENTIONS = (
    "not in documents",
    "not in document",
    "not in passages",
    "not in text",
    "not mentioned",
    "not stated",
    "not specified",
    "not provide",
    "not contain",
    "not say",
    "no information",
    "no answer",
    "cannot be answered",
    "cannot be determined",
    "cannot answer",
    "unanswerable",
    "unknown",
    "dont know",
    "do not know",
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the prediction, whatever the case (RULER, Hsieh et al. 2024)."""
    text = _plain(prediction)
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any reference occurs in the prediction, whatever the case (RULER's metric for question answering)."""
    text = _plain(prediction)
    return float(any(reference.lower() in text for reference in references))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if prediction and a reference are the same after SQuAD's normalisation (Rajpurkar et al. 2016)."""
    given = normalized(prediction)
    return float(any(given == normalized(reference) for reference in references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """The harmonic mean of precision and recall in normalised words, at the best reference (SQuAD).

    Where one side has no words, 1 if neither has (SQuAD 2.0, Rajpurkar et al. 2018).
    """
    return max(_f1(normalized(prediction).split(), normalized(reference).split()) for reference in references)


def substring_exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if a normalised reference occurs in the normalised prediction (HELMET's SubEM, Yen et al. 2024)."""
    given = normalized(prediction)
    return float(any(normalized(reference) in given for reference in references))


def words_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the words of a normalised reference stand in the normalised prediction, one after another: 13 not in 213."""
    given = f" {normalized(prediction)} "
    return float(any(f" {normalized(reference)} " in given for reference in references))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L's F-measure with stemming, at the best reference (Lin 2004; the rouge-score package)."""
    return _rouge(prediction, references, "rougeL")


def rouge_1(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-1's F-measure with stemming, at the best reference."""
    return _rouge(prediction, references, "rouge1")


def rouge_2(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-2's F-measure with stemming, at the best reference."""
    return _rouge(prediction, references, "rouge2")


def coverage(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-1's recall with stemming, at the best reference: how much of it is said, whatever else is."""
    return max(float(_rouge_scores(prediction, reference)["rouge1"].recall) for reference in references)


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (
        string_match_all,
        string_match_part,
        exact_match,
        token_f1,
        substring_exact_match,
        words_match,
        rouge_l,
        rouge_1,
        rouge_2,
        coverage,
    )
}


def abstains(prediction: str) -> bool:
    """Whether an answer says that it has none (by its phrases, in SQuAD's normalisation); an empty one says nothing."""
    given = normalized(prediction)
    return any(phrase in given for phrase in _ABSTENTIONS)


def ndcg(ranking: Sequence[str], relevant: Collection[str], depth: int) -> float:
    """nDCG at `depth` with binary grades (Järvelin and Kekäläinen 2002): gain over log2(rank + 1), over the best order.

    Raises ValueError where nothing is relevant.
    """
    if not relevant:
        raise ValueError("nDCG of a query without a relevant document is not defined")
    gained = sum(1 / math.log2(rank + 1) for rank, d in enumerate(ranking[:depth], start=1) if d in relevant)
    return gained / sum(1 / math.log2(rank + 1) for rank in range(1, min(depth, len(relevant)) + 1))


def normalized(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation (ASCII), no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _plain(prediction: str) -> str:
    """As RULER reads predictions: control characters are line breaks, nothing at the ends, lower case."""
    return _CONTROL.sub("\n", prediction.strip()).strip().lower()


def _f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def _rouge(prediction: str, references: Sequence[str], kind: str) -> float:
    return max(float(_rouge_scores(prediction, reference)[kind].fmeasure) for reference in references)


def _rouge_scores(prediction: str, reference: str) -> dict[str, Any]:
    scores: dict[str, Any] = _rouge_scorer().score(reference, prediction)
    return scores


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
