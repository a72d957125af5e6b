"""How close a text comes to the right one: exact, normalised, contained, and chrF. Axes: N = orders of n-grams."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

_SPELLINGS = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2212": "-"})
_MEANINGFUL = frozenset("%#&@")  # punctuation by Unicode's categories, but part of what is said: 5%, C#
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Characters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""

CHRF_ORDER = 6
CHRF_BETA = 2  # recall counts twice as much as precision


def normalise(text: str) -> str:
    """The words of a text in one form: NFKC, no capitals, plain quotes, one space between words.

    Punctuation at the ends of a word is dropped; a sign or a decimal point before a digit stays, as do % # & @.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_SPELLINGS)
    return " ".join(word for word in map(_without_punctuation, folded.split()) if word)


def _without_punctuation(word: str) -> str:
    start, end = 0, len(word)
    while start < end and _is_punctuation(word[start]) and not re.match(r"-?\.?\d", word[start:end]):
        start += 1
    while end > start and _is_punctuation(word[end - 1]):
        end -= 1
    return word[start:end]


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P") and character not in _MEANINGFUL


def is_exact(text: str, answer: str) -> bool:
    """Whether the two are the same, except for white space at their ends."""
    return text.strip() == answer.strip()


def is_same_normalised(text: str, answer: str) -> bool:
    """Whether the two are the same once normalised."""
    return normalise(text) == normalise(answer)


def contains(text: str, answer: str) -> bool:
    """Whether the normalised text has the normalised answer in it, as whole words where words have spaces between.

    An answer without a word is in no text.
    """
    found, wanted = normalise(text), normalise(answer)
    if not wanted:
        return False
    return wanted in found if _UNSPACED.search(wanted) else f" {wanted} " in f" {found} "


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of all texts together, 0 to 100: F-score of character n-grams up to CHRF_ORDER (Popovic, WMT 2015).

    White space does not count. Precision and recall are means over the orders that both sides have n-grams of, as
    sacrebleu computes them. ValueError for another number of references, or no text.
    """
    return chrf_of(chrf_counts(texts, references).sum(0))


def chrf_counts(texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What chrF adds up, [pairs, N, 3]: n-grams of each order in the text, in the reference, and in both.

    The text's are 0 where the reference is too short to have any. ValueError as `chrf`.
    """
    if len(texts) != len(references) or not texts:
        raise ValueError(f"chrF needs a reference for each text, got {len(texts)} and {len(references)}")
    return np.array([_pair_counts(text, reference) for text, reference in zip(texts, references, strict=True)])


def _pair_counts(text: str, reference: str) -> list[tuple[int, int, int]]:
    found = []
    for order in range(1, CHRF_ORDER + 1):
        mine, theirs = _ngrams(text, order), _ngrams(reference, order)
        in_text = mine.total() if theirs else 0  # a short reference judges no long n-gram
        found.append((in_text, theirs.total(), (mine & theirs).total()))
    return found


def chrf_of(counts_N3: np.ndarray) -> float:
    """chrF of the sums of `chrf_counts` over some pairs."""
    precisions, recalls = [], []
    for in_texts, in_references, shared in counts_N3.tolist():
        if in_texts and in_references:
            precisions.append(shared / in_texts)
            recalls.append(shared / in_references)
    if not any(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    weight = CHRF_BETA**2
    return 100 * (1 + weight) * precision * recall / (weight * precision + recall)


def _ngrams(text: str, order: int) -> Counter[str]:
    characters = "".join(text.split())
    return Counter(characters[i : i + order] for i in range(len(characters) - order + 1))
