"""Accuracy over tokens per forward where every setting was run with several seeds. Axes: S = seeds, I = problems."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fewstep.measure.contenders import markdown_table
from fewstep.measure.metrics import Interval, crossed_interval


@dataclass(frozen=True)
class Setting:
    """One variant at one threshold or number of steps: tokens per forward [S], and right or wrong [S, I]."""

    tokens_per_forward_S: np.ndarray
    tokens_per_forward_correct_S: np.ndarray
    correct_SI: np.ndarray

    @property
    def tokens_per_forward_correct(self) -> float | None:
        """The mean over the seeds that solved a problem; None if no seed did."""
        known = self.tokens_per_forward_correct_S[~np.isnan(self.tokens_per_forward_correct_S)]
        return float(known.mean()) if len(known) else None

    def point(self, clusters: Sequence[int]) -> dict[str, Any]:
        """For a plot: means over the seeds, with the interval of the accuracy."""
        interval = crossed_interval(self.correct_SI, clusters)
        return {
            "tokens_per_forward": float(self.tokens_per_forward_S.mean()),
            "accuracy": interval.estimate,
            "accuracy_ci95": [max(0.0, interval.low), min(1.0, interval.high)],
        }


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


def sweep_table(by_variant: Mapping[str, Mapping[float, Setting]], name: str) -> str:
    """A line for each variant, a column for each of its settings, which `name` says what they are: the share solved in
    per cent, and tokens per forward.
    """
    values = sorted({value for settings in by_variant.values() for value in settings})

    def cell(value: float) -> Callable[[Mapping[str, Any]], str]:
        def text(row: Mapping[str, Any]) -> str:
            one: Setting | None = row["settings"].get(value)
            return f"{100 * one.correct_SI.mean():.1f} / {one.tokens_per_forward_S.mean():.2f}" if one else ""

        return text

    rows = [{"variant": variant, "settings": settings} for variant, settings in by_variant.items()]
    return markdown_table(rows, {name: lambda row: row["variant"], **{str(value): cell(value) for value in values}})


def difference(first_SI: np.ndarray, second_SI: np.ndarray, clusters: Sequence[int]) -> Interval:
    """First less second, paired by problem and seed; one without seeds meets each of the other's."""
    if len(first_SI) != len(second_SI) and min(len(first_SI), len(second_SI)) > 1:
        shared = min(len(first_SI), len(second_SI))
        first_SI, second_SI = first_SI[:shared], second_SI[:shared]
    return crossed_interval(first_SI - second_SI, clusters)
