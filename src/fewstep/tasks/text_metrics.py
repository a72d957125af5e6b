"""How close a text comes to the right one: exact, normalised, contained, and chrF. Axes: N = orders of n-grams."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

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
    if len(texts) != len(references) or not texts:
        raise ValueError(f"chrF needs a reference for each text, got {len(texts)} and {len(references)}")
    precisions, recalls = [], []
    for order in range(1, CHRF_ORDER + 1):
        pairs = [(_ngrams(one, order), _ngrams(other, order)) for one, other in zip(texts, references, strict=True)]
        in_texts = sum(mine.total() for mine, theirs in pairs if theirs)  # a short reference judges no long n-gram
        in_references = sum(theirs.total() for _, theirs in pairs)
        if in_texts and in_references:
            shared = sum((mine & theirs).total() for mine, theirs in pairs)
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
