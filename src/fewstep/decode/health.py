"""Health of decoded outputs: statistics that show whether a model repeats itself, or gives empty or uniform answers.

Pure functions of token ids. An n-gram is n neighbouring tokens of one output; n-grams never cross outputs.
"""

import math
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
