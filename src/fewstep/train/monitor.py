"""Stops a run whose model has collapsed: its loss is not a number or grows without end, or its outputs repeat or are
empty.

Consistency losses have a trivial solution, the model that always gives the same answer. The loss falls even then, so
the outputs are watched: their health must stay near that of a baseline (the references, or the first evaluation).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from fewstep.decode.health import Diversity, Health
from fewstep.errors import FewstepError
from fewstep.values import MOST_INTEGER, check_fields

Rise = Annotated[float, Gt(0), Lt(1)]
Factor = Annotated[float, Gt(1), Le(1e30)]
Steps = Annotated[int, Ge(0), Le(MOST_INTEGER)]


class CollapseError(FewstepError):
    """The run is stopped; the message names the statistic, its value and the limit."""


@dataclass(frozen=True, kw_only=True)
class CollapseLimits:
    """How far from the baseline the answers count as collapsed. None switches a check off."""

    repetition_rise: Annotated[Rise | None, "The share of repeated 4-grams may rise by at most this."] = 0.25
    empty_rise: Annotated[Rise | None, "The share of empty answers may rise by at most this."] = 0.25
    longest_run_factor: Annotated[
        Factor | None, "A run of one token may be at most this many times the baseline's longest."
    ] = 4.0
    longest_run_free: Annotated[Steps, "A run of up to this many tokens is always allowed."] = 16
    entropy_share: Annotated[
        Rise | None, "The entropy of the tokens may fall to this share of the baseline's, not below."
    ] = 0.5
    distinct_share: Annotated[
        Rise | None,
        "The share of distinct pairs of tokens (distinct-2) may fall to this share of the baseline's, not below.",
    ] = 0.25
    loss_factor: Annotated[
        Factor | None, "The average loss may be at most this many times the lowest average so far."
    ] = 3.0
    loss_memory: Annotated[
        Steps, Ge(1), "The average is over about this many logged losses, and is not judged before there are as many."
    ] = 50
    grace_steps: Annotated[
        Steps, "Answers are not judged before this step (a model from scratch begins unhealthy)."
    ] = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class DiversityLimits:
    """How much alike answers of several seeds may become. None switches a check off."""

    answers_share: Annotated[
        Rise | None,
        "The share of distinct answers to one prompt by several seeds may fall to this share of the baseline's.",
    ] = 0.5
    self_bleu_rise: Annotated[
        Rise | None, "The likeness of answers to one prompt by several seeds (self-BLEU) may rise by at most this."
    ] = 0.25

    def __post_init__(self) -> None:
        check_fields(self)


def check_health(baseline: Health, current: Health, limits: CollapseLimits) -> None:
    """CollapseError naming the first statistic of `current` that left its limits around `baseline`."""
    ceilings = {
        "empty": None if limits.empty_rise is None else baseline.empty + limits.empty_rise,
        "repetition": None if limits.repetition_rise is None else baseline.repetition + limits.repetition_rise,
        "longest_run": None
        if limits.longest_run_factor is None
        else max(limits.longest_run_free, baseline.longest_run * limits.longest_run_factor),
    }
    floors = {
        "entropy": None if limits.entropy_share is None else baseline.entropy * limits.entropy_share,
        "distinct_2": None if limits.distinct_share is None else baseline.distinct_2 * limits.distinct_share,
    }
    for bounds, side, sign in ((ceilings, "above", 1), (floors, "below", -1)):
        for name, limit in bounds.items():
            value = getattr(current, name)
            if limit is not None and sign * value > sign * limit:
                raise CollapseError(
                    f"the outputs have collapsed: {name} is {value:.4g}, {side} the limit {limit:.4g} "
                    f"(baseline {getattr(baseline, name):.4g})"
                )


def check_diversity(baseline: Diversity, current: Diversity, limits: DiversityLimits) -> None:
    """CollapseError if the answers of several seeds have become too much alike."""
    floor = None if limits.answers_share is None else baseline.distinct_answers * limits.answers_share
    if floor is not None and current.distinct_answers < floor:
        raise CollapseError(
            f"the answers of different seeds have collapsed: distinct_answers is {current.distinct_answers:.4g}, below "
            f"the limit {floor:.4g} (baseline {baseline.distinct_answers:.4g})"
        )
    ceiling = None if limits.self_bleu_rise is None else baseline.self_bleu + limits.self_bleu_rise
    if ceiling is not None and current.self_bleu > ceiling:
        raise CollapseError(
            f"the answers of different seeds have collapsed: self_bleu is {current.self_bleu:.4g}, above the limit "
            f"{ceiling:.4g} (baseline {baseline.self_bleu:.4g})"
        )


class CollapseMonitor:
    """Watches one run. What it remembers goes through `state_dict`, so that a resumed run judges the same."""

    def __init__(
        self,
        limits: CollapseLimits | None = None,
        *,
        baseline: Health | None = None,
        seeds: DiversityLimits | None = None,
    ) -> None:
        """`baseline`: health of the references; None takes the first evaluation's. `seeds`: limits for the answers of
        several seeds, of which the first evaluation is always the baseline.
        """
        self.limits = limits or CollapseLimits()
        self.seeds = seeds or DiversityLimits()
        self.baseline = baseline
        self.diversity: Diversity | None = None
        """The first that was observed."""
        self._num_losses = 0
        self._average = 0.0
        self._lowest: float | None = None

    def observe_loss(self, loss: float, *, step: int) -> None:
        """CollapseError if the loss is not finite, or its average is far above the lowest average so far."""
        if not math.isfinite(loss):
            raise CollapseError(f"the loss is {loss} at step {step}; lower the learning rate or look at the last batch")
        self._num_losses += 1
        weight = max(1 / self._num_losses, 1 / self.limits.loss_memory)  # a plain mean until the memory is full
        self._average += weight * (loss - self._average)
        if self.limits.loss_factor is None or self._num_losses < self.limits.loss_memory:
            return
        self._lowest = self._average if self._lowest is None else min(self._lowest, self._average)
        if self._average > self.limits.loss_factor * abs(self._lowest):
            raise CollapseError(
                f"the loss has run away at step {step}: its average is {self._average:.4g}, more than "
                f"{self.limits.loss_factor:g} times the lowest average {self._lowest:.4g}"
            )

    def observe_health(self, health: Health, *, step: int) -> None:
        """CollapseError if the outputs left the limits around the baseline."""
        if step < self.limits.grace_steps:
            return
        if self.baseline is None:
            self.baseline = health
            return
        try:
            check_health(self.baseline, health, self.limits)
        except CollapseError as error:
            raise CollapseError(f"at step {step} {error}") from None

    def observe_diversity(self, diversity: Diversity, *, step: int) -> None:
        """CollapseError if the answers of several seeds left the limits around the first evaluation's."""
        if step < self.limits.grace_steps:
            return
        if self.diversity is None:
            self.diversity = diversity
            return
        try:
            check_diversity(self.diversity, diversity, self.seeds)
        except CollapseError as error:
            raise CollapseError(f"at step {step} {error}") from None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "baseline": None if self.baseline is None else self.baseline.to_json(),
            "diversity": None if self.diversity is None else self.diversity.to_json(),
            "num_losses": self._num_losses,
            "average": self._average,
            "lowest": self._lowest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.baseline = None if state["baseline"] is None else Health(**state["baseline"])
        of_seeds = state.get("diversity")  # checkpoints that were saved before it was watched have none
        self.diversity = None if of_seeds is None else Diversity(**of_seeds)
        self._num_losses = state["num_losses"]
        self._average = state["average"]
        self._lowest = state["lowest"]
