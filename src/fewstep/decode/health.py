"""Health of decoded outputs: statistics that show whether a model repeats itself, or gives empty or uniform answers.

Pure functions of token ids. An n-gram is n neighbouring tokens of one output; n-grams never cross outputs.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

REPEATED_NGRAM = 4
"""Length of the n-grams whose repetition counts as a symptom: shorter ones recur in sound text too."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """Statistics of one set of outputs.

    `repetition`: mean over outputs of the share of their 4-grams that occurred in the same output before.
    `longest_run`: the most neighbouring positions of one output that hold the same token. `distinct_1`, `distinct_2`:
    different n-grams over all n-grams, all outputs together (Li et al., arXiv 1510.03055); they fall as the set
    grows, so compare sets of one size. `entropy`: of the distribution of tokens over all outputs together, in nats.
    `empty`: share of outputs without a token. All are 0 where there is nothing to count.
    """

    num_outputs: int
    mean_length: float
    empty: float
    repetition: float
    longest_run: int
    distinct_1: float
    distinct_2: float
    entropy: float

    def to_json(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)


def measure_health(outputs: Iterable[Sequence[int] | Tensor], *, ignored_ids: Iterable[int] = ()) -> Health:
    """The health of `outputs`, lists or vectors of token ids, without the tokens in `ignored_ids` (end-of-text, say).

    ValueError if there are no outputs.
    """
    ignored = np.fromiter(ignored_ids, dtype=np.int64)
    tokens = [_tokens(output, ignored) for output in outputs]
    if not tokens:
        raise ValueError("health needs at least one output")
    lengths = [len(output) for output in tokens]
    return Health(
        num_outputs=len(tokens),
        mean_length=sum(lengths) / len(tokens),
        empty=lengths.count(0) / len(tokens),
        repetition=float(np.mean([repetition(output, REPEATED_NGRAM) for output in tokens])),
        longest_run=max(longest_run(output) for output in tokens),
        distinct_1=distinct(tokens, 1),
        distinct_2=distinct(tokens, 2),
        entropy=entropy(tokens),
    )


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How much answers to the same prompts differ by their seeds.

    `distinct_answers`: mean over prompts of the different answers over all of them. `self_bleu`: mean BLEU of an answer
    with the others of its prompt as references (Zhu et al., arXiv 1802.01886), 1 if all are the same.
    """

    distinct_answers: float
    self_bleu: float

    def to_json(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)


def measure_diversity(answers: Iterable[Sequence[Sequence[int]]], *, ignored_ids: Iterable[int] = ()) -> Diversity:
    """Of the answers of each prompt, at least two for each, without the tokens in `ignored_ids`.

    ValueError if a prompt has fewer.
    """
    ignored = set(ignored_ids)
    groups = [[[one for one in answer if one not in ignored] for answer in group] for group in answers]
    if not groups or min(map(len, groups)) < 2:
        raise ValueError("diversity needs at least two answers of each prompt")
    return Diversity(
        distinct_answers=float(np.mean([len(set(map(tuple, group))) / len(group) for group in groups])),
        self_bleu=float(
            np.mean([bleu(one, [*group[:i], *group[i + 1 :]]) for group in groups for i, one in enumerate(group)])
        ),
    )


def bleu(answer: Sequence[int], references: Sequence[Sequence[int]]) -> float:
    """BLEU-4 of an answer (Papineni et al., 2002); counts of pairs and longer are smoothed by one, since answers are
    short (Lin and Och, 2004). Of an empty answer 1 if a reference is empty too, else 0.
    """
    if not answer:
        return float(any(not reference for reference in references))
    logs = []
    for n in range(1, REPEATED_NGRAM + 1):
        counts = _counted(answer, n)
        most: Counter[tuple[int, ...]] = Counter()
        for reference in references:
            most |= _counted(reference, n)
        smooth = int(n > 1)
        found = sum(min(count, most[gram]) for gram, count in counts.items()) + smooth
        if not found:
            return 0.0
        logs.append(math.log(found / (counts.total() + smooth)))
    nearest = min((len(reference) for reference in references), key=lambda length: (abs(length - len(answer)), length))
    return math.exp(min(0.0, 1 - nearest / len(answer)) + sum(logs) / len(logs))


def _counted(tokens: Sequence[int], n: int) -> "Counter[tuple[int, ...]]":
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def repetition(tokens: np.ndarray, n: int) -> float:
    """Share of the n-grams of `tokens` [N] that occurred before; 0 if it is shorter than n + 1."""
    grams = _ngrams(tokens, n)
    return 1 - _count_distinct(grams) / len(grams) if len(grams) else 0.0


def longest_run(tokens: np.ndarray) -> int:
    """Length of the longest stretch of one token in `tokens` [N]."""
    if not len(tokens):
        return 0
    changes = np.flatnonzero(np.diff(tokens)) + 1
    return int(np.diff(changes, prepend=0, append=len(tokens)).max())


def distinct(outputs: Sequence[np.ndarray], n: int) -> float:
    """Different n-grams over all n-grams of all outputs; 0 if there are none."""
    grams = np.concatenate([_ngrams(tokens, n) for tokens in outputs])
    return _count_distinct(grams) / len(grams) if len(grams) else 0.0


def entropy(outputs: Sequence[np.ndarray]) -> float:
    """Entropy in nats of the tokens of all outputs together; 0 if there are none."""
    tokens = np.concatenate(outputs)
    if not len(tokens):
        return 0.0
    _, counts = np.unique(tokens, return_counts=True)
    return math.log(len(tokens)) - float((counts * np.log(counts)).sum()) / len(tokens)


def _tokens(output: Sequence[int] | Tensor, ignored: np.ndarray) -> np.ndarray:
    values = output.detach().cpu().numpy() if isinstance(output, Tensor) else output
    tokens = np.asarray(values, dtype=np.int64)
    return tokens[~np.isin(tokens, ignored)]


def _ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """All n-grams, [max(N - n + 1, 0), n]."""
    if len(tokens) < n:
        return np.empty((0, n), dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(tokens, n)


def _count_distinct(grams: np.ndarray) -> int:
    return len(np.unique(grams, axis=0))
