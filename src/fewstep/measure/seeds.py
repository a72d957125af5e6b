"""Accuracy over tokens per forward where every setting was run with several seeds. Axes: S = seeds, I = problems."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fewstep.measure.metrics import Interval, crossed_interval


@dataclass(frozen=True)
class Setting:
    """One variant at one threshold or number of steps: tokens per forward [S], and right or wrong [S, I]."""

    tokens_per_forward_S: np.ndarray
    tokens_per_forward_correct_S: np.ndarray
    correct_SI: np.ndarray


def settings_of(rows: Sequence[Mapping[str, Any]], variant: str) -> dict[float, Setting]:
    """The variant's settings by threshold (or steps), over the seeds in order."""
    grouped: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["seed"] or 0):
        grouped[row["threshold"] if row["steps"] is None else row["steps"]].append(row)
    return {
        value: Setting(
            np.array([row["tokens_per_forward"] for row in group]),
            np.array([row["tokens_per_forward_correct"] or math.nan for row in group]),
            np.array([[int(mark) for mark in row["correct"]] for row in group]),
        )
        for value, group in sorted(grouped.items())
    }


def at_speed(settings: Mapping[float, Setting], tokens_per_forward: float) -> np.ndarray | None:
    """Right or wrong [S, I] at this number of tokens per forward, each seed interpolated linearly between two of its
    settings.

    None if a seed does not get there with the settings measured.
    """
    if not settings:
        return None
    every = list(settings.values())
    rows = []
    for seed in range(len(every[0].correct_SI)):
        points = sorted(
            (one.tokens_per_forward_S[seed], i) for i, one in enumerate(every) if seed < len(one.correct_SI)
        )
        for (low, i), (high, j) in pairwise(points):
            if low <= tokens_per_forward <= high:
                share = (tokens_per_forward - low) / (high - low) if high > low else 0.0
                rows.append((1 - share) * every[i].correct_SI[seed] + share * every[j].correct_SI[seed])
                break
        else:
            return None
    return np.stack(rows)


def difference(first_SI: np.ndarray, second_SI: np.ndarray, clusters: Sequence[int]) -> Interval:
    """First less second, paired by problem and seed; one without seeds meets each of the other's."""
    if len(first_SI) != len(second_SI) and min(len(first_SI), len(second_SI)) > 1:
        shared = min(len(first_SI), len(second_SI))
        first_SI, second_SI = first_SI[:shared], second_SI[:shared]
    return crossed_interval(first_SI - second_SI, clusters)
