"""Policies: which masked positions of a block to finalise in a step.

Axes: R = requests, B = positions of a block, V = vocabulary, N = numbers of a policy.

A policy is a pure function of tensors: `policy(certainty_RB, masked_RB, numbers_RN) -> chosen_RB`. It chooses masked
positions only, at least one for every request that has any (`Origin` and `DreamSchedule` may choose none), and exactly
one when nothing is certain enough, also on ties. Its numbers are checked when it is built and handed over as a tensor
at call time, one row a request, so that one step serves requests of different numbers (`order` and `temperature` are a
part of the step). `numbers_RN=None` uses the policy's own. It is given what its arguments name: see `own_policies`,
which also makes a policy of a plain function.

The policy's `order` says what "certain" means: see `certainty`. At a `temperature` above 0 the positions are drawn: see
`perturbed`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fewstep.decode.declarations import Details
from fewstep.decode.resources import Resources
from fewstep.decode.sampling import gumbel
from fewstep.errors import FewstepError
from fewstep.models.roles import Gaps
from fewstep.values import Count, Temperature, check_fields

Order = Literal["low_confidence", "random", "margin", "entropy", "origin"]
"""LLaDA's `low_confidence` (the lowest are masked again) and `random`; Dream's `margin`, `entropy` and `origin`, which
is a policy of its own.
"""

_AnyOrder = Annotated[
    Order,
    "Which masked positions come first: low_confidence (those with the most probable tokens; the others stay masked), "
    "random, margin (difference of the two highest probabilities), entropy (the lowest first) or origin (each position "
    "at random).",
    Details(aliases=("remasking",)),
]
_Steps = Annotated[
    Count | None,
    "Passes in total over the canvas.",
    Details(aliases=("num_inference_steps",), default="one per token"),
]


class Policy(Protocol):
    """`numbers` are handed to `__call__`, the N of each request; a `paced` policy gets the steps left in the block.

    `temperature`: see `perturbed`; 0 draws no positions.
    """

    @property
    def order(self) -> Order: ...
    @property
    def paced(self) -> bool: ...
    @property
    def temperature(self) -> float: ...
    @property
    def numbers(self) -> tuple[float, ...]: ...

    # Or others of what `own_policies.PassFacts` holds, by name.
    @property
    def __call__(self) -> Callable[..., Tensor]: ...


def certainty(order: Order, logits_RBV: Tensor, confidence_RB: Tensor, noise_RB: Callable[[], Tensor]) -> Tensor:
    """How ready each position is to be finalised, higher first, [R, B].

    low_confidence: the probability of the drawn token. margin: top probability minus the second. entropy: minus the
    entropy in nats. random: uniform noise in (0, 1), made only if asked for.
    """
    match order:
        case "low_confidence":
            return confidence_RB
        case "random" | "origin":
            return noise_RB().float()
        case "margin":
            first_and_second = logits_RBV.softmax(-1).topk(2, dim=-1).values
            return first_and_second[..., 0] - first_and_second[..., 1]
        case "entropy":
            entropy_RB: Tensor = torch.special.entr(logits_RBV.softmax(-1)).sum(-1)
            return -entropy_RB


def perturbed(certainty_RB: Tensor, temperature: float, noise_RB: Callable[[], Tensor]) -> Tensor:
    """`certainty_RB` changed so that its n highest of any positions are n of them drawn one after the other.

    The draw is from softmax(certainty / temperature), without replacement: Gumbel-top-k, Kool et al. 2019,
    arXiv 1903.06059, times the temperature, so that a small one overflows nothing. Noise is uniform in (0, 1), float64,
    and made only if asked for: at temperature 0 certainty stays as it is.
    """
    if temperature == 0:
        return certainty_RB
    return certainty_RB + temperature * gumbel(noise_RB())


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Every position whose token has at least this probability. Fast-dLLM, arXiv 2505.22618.

    With `gaps`, a position is finalised only if at most `gaps` masked positions of a lower probability precede it in
    its block. Positions further right wait: their confidence rests on a reading of the text that the uncertain
    positions before them may turn out to contradict.
    """

    at_least: Annotated[
        float,
        "Finalise every token whose probability is at least this.",
        Details(name="threshold", default="the checkpoint's, or 0.9"),
    ] = 0.9
    gaps: Annotated[
        Gaps | None,
        "Accept a confident token only if at most N masked, less confident positions precede it in its block.",
        Details(default="the checkpoint's, or any number"),
    ] = None
    order: ClassVar[Order] = "low_confidence"
    paced: ClassVar[bool] = False
    temperature: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.at_least <= 1:
            raise FewstepError(f"the threshold is a probability in (0, 1], got {self.at_least}; try 0.9")

    @classmethod
    def build(cls, resources: Resources, **given: Any) -> "Threshold":
        """With what was given, the rest as the network's role says."""
        role = resources.role
        return cls(**{"at_least": role.threshold, "gaps": role.gaps, **given})

    @property
    def numbers(self) -> tuple[float, ...]:
        """The threshold and the gaps."""
        return self.at_least, math.inf if self.gaps is None else self.gaps

    def __call__(self, certainty_RB: Tensor, masked_RB: Tensor, numbers_RN: Tensor | None = None) -> Tensor:
        at_least, gaps = self.numbers if numbers_RN is None else numbers_RN.split(1, -1)
        enough_RB = certainty_RB >= at_least
        uncertain_RB = (masked_RB & ~enough_RB).int()
        masked_RB = masked_RB & (uncertain_RB.cumsum(-1) - uncertain_RB <= gaps)
        return or_best(enough_RB, certainty_RB, masked_RB)


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Every position whose top probability exceeds the second by at least this."""

    at_least: Annotated[
        float,
        "Finalise every token whose probability exceeds that of the second best by at least this.",
        Details(name="margin"),
    ] = 0.8
    order: ClassVar[Order] = "margin"
    paced: ClassVar[bool] = False
    temperature: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.at_least <= 1:
            raise FewstepError(f"the margin is a difference of probabilities in (0, 1], got {self.at_least}; try 0.8")

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.at_least,)

    def __call__(self, certainty_RB: Tensor, masked_RB: Tensor, numbers_RN: Tensor | None = None) -> Tensor:
        return or_best(certainty_RB >= _number(self, numbers_RN), certainty_RB, masked_RB)


@dataclass(frozen=True, kw_only=True)
class EntropyBelow:
    """Every position whose distribution has at most this entropy."""

    nats: Annotated[
        float, "Finalise every position whose entropy, in nats, is at most this.", Details(name="entropy")
    ] = 0.3
    order: ClassVar[Order] = "entropy"
    paced: ClassVar[bool] = False
    temperature: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.nats > 0:
            raise FewstepError(f"the entropy bound is in nats and above 0, got {self.nats}; try 0.3")

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.nats,)

    def __call__(self, certainty_RB: Tensor, masked_RB: Tensor, numbers_RN: Tensor | None = None) -> Tensor:
        return or_best(-certainty_RB <= _number(self, numbers_RN), certainty_RB, masked_RB)


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The n most confident, for the largest n with (n + 1)(1 - n-th confidence) < factor. arXiv 2505.22618."""

    factor: Annotated[
        float, "Finalise the n most probable tokens, for the largest n with (n + 1)(1 - the n-th probability) below it."
    ] = 1.0
    order: ClassVar[Order] = "low_confidence"
    paced: ClassVar[bool] = False
    temperature: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.factor > 0:
            raise FewstepError(f"the factor must be above 0, got {self.factor}; try 1.0")

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.factor,)

    def __call__(self, certainty_RB: Tensor, masked_RB: Tensor, numbers_RN: Tensor | None = None) -> Tensor:
        descending_RB = certainty_RB.masked_fill(~masked_RB, float("-inf")).sort(-1, descending=True).values
        n_B = torch.arange(1, masked_RB.shape[-1] + 1, device=masked_RB.device)
        # The left side grows with n, so counting the positions that pass finds the largest n.
        count_R1 = ((n_B + 1) * (1 - descending_RB) < _number(self, numbers_RN)).sum(-1, keepdim=True)
        return _best(count_R1.clamp(min=1), certainty_RB, masked_RB)


@dataclass(frozen=True, kw_only=True)
class FixedCount:
    """This many positions a step, or as many as are left."""

    num_tokens: Annotated[Count, "Tokens to finalise in each pass.", Details(name="tokens_per_pass")] = 1
    order: _AnyOrder = "low_confidence"
    paced: ClassVar[bool] = False
    temperature: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        _check_no_origin(self.order)

    @classmethod
    def build(cls, resources: Resources, **given: Any) -> "FixedCount | Origin":
        """The order origin is a policy of its own, which at one step per token finalises one on average."""
        return Origin() if given.get("order") == "origin" else cls(**given)

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.num_tokens,)

    def __call__(self, certainty_RB: Tensor, masked_RB: Tensor, numbers_RN: Tensor | None = None) -> Tensor:
        return _best(_number(self, numbers_RN), certainty_RB, masked_RB)


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """Of a block with n masks left the `counts[n - 1]` most certain: for measurements, as fast as a known model goes.

    Blocks have at most as many positions as there are counts. See `scheduled`.
    """

    counts: tuple[Count, ...]
    order: ClassVar[Order] = "low_confidence"
    paced: ClassVar[bool] = False
    temperature: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def numbers(self) -> tuple[float, ...]:
        return self.counts

    def __call__(self, certainty_RB: Tensor, masked_RB: Tensor, numbers_RN: Tensor | None = None) -> Tensor:
        if numbers_RN is None:
            numbers_RN = torch.tensor([self.counts], device=masked_RB.device).expand(len(masked_RB), -1)
        left_R1 = masked_RB.sum(-1, keepdim=True)
        return _best(numbers_RN.gather(1, (left_R1 - 1).clamp(min=0)), certainty_RB, masked_RB)


def scheduled(tokens_of_passes: Sequence[int]) -> Scheduled:
    """The policy that finalises as many tokens in each pass of a block as are given, which are all of the block's.

    A block that begins with fewer masks joins the schedule at the next number of masks left that occurs in it.
    """
    return Scheduled(counts=tuple(count for most in reversed(tokens_of_passes) for count in range(1, most + 1)))


def evenly(block_size: int, most: int) -> list[int]:
    """As few passes of at most `most` tokens as finalise a block, split evenly, the remainder to the first."""
    num_passes = -(-block_size // most)
    return [block_size // num_passes + (index < block_size % num_passes) for index in range(num_passes)]


@dataclass(frozen=True, kw_only=True)
class EvenSplit:
    """A block's masks are split evenly over its steps; the first steps take the remainder. LLaDA, arXiv 2502.09992.

    Its number is that of the steps left in the block, this one included.
    """

    order: _AnyOrder = "low_confidence"
    paced: ClassVar[bool] = True
    temperature: ClassVar[float] = 0.0
    numbers: ClassVar[tuple[float, ...]] = (1.0,)

    def __post_init__(self) -> None:
        check_fields(self)
        _check_no_origin(self.order)

    @classmethod
    def build(
        cls, resources: Resources, *, steps: _Steps = None, order: Order = "low_confidence"
    ) -> "EvenSplit | Origin":
        """The decoder paces it by the steps."""
        return Origin() if order == "origin" else cls(order=order)

    def __call__(self, certainty_RB: Tensor, masked_RB: Tensor, numbers_RN: Tensor | None = None) -> Tensor:
        # Rounding up what is left at every step gives the first steps the remainder.
        count_R1 = (masked_RB.sum(-1, keepdim=True) / _number(self, numbers_RN)).ceil()
        return _best(count_R1.clamp(min=1), certainty_RB, masked_RB)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Each masked position independently with probability 1 - s/t, for a step from time t to s. Dream, arXiv
    2508.15487.

    Times are evenly spaced from 1 to 0 over the block's steps, so with n steps left that is 1/n and the last step
    takes all. A step may choose nothing, as published. Its number is that of the steps left in the block, this one
    included.
    """

    order: ClassVar[Order] = "origin"
    paced: ClassVar[bool] = True
    temperature: ClassVar[float] = 0.0
    numbers: ClassVar[tuple[float, ...]] = (1.0,)

    @classmethod
    def build(cls, resources: Resources, *, steps: _Steps = None) -> "Origin":
        """The decoder paces it by the steps."""
        return cls()

    def __call__(self, certainty_RB: Tensor, masked_RB: Tensor, numbers_RN: Tensor | None = None) -> Tensor:
        return masked_RB & ((1 - certainty_RB) * _number(self, numbers_RN) < 1)


DreamAlg = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]
"""Dream's names for the order in which masks become tokens."""

_DREAM_ORDERS: dict[DreamAlg, Order] = {
    "origin": "origin",
    "maskgit_plus": "low_confidence",
    "topk_margin": "margin",
    "entropy": "entropy",
}


@dataclass(frozen=True, kw_only=True)
class DreamSchedule:
    """Dream's own sampler, over a single block of `num_steps` steps. arXiv 2508.15487.

    Times are evenly spaced from 1 to `eps`, and a step from time t to s finalises the share 1 - s/t of the masks: the
    best ones, rounded down, or with `origin` each masked position independently with that probability; the last step
    takes all. With `alg_temp` above 0 as many are drawn at random instead of taking the best, without replacement, from
    softmax(certainty / alg_temp) over the masks. A step may choose nothing, as published. Its number is that of the
    steps left, this one included.
    """

    alg: Annotated[
        DreamAlg,
        "Dream's own sampler, with masks finalised in this order: origin, maskgit_plus, topk_margin or entropy.",
    ] = "origin"
    num_steps: Count
    eps: Annotated[float, "Time of the last step of Dream's sampler."] = 1e-3
    alg_temp: Annotated[
        Temperature | None,
        "Temperature at which Dream's sampler draws positions.",
        Details(default="0, the most certain"),
    ] = None
    paced: ClassVar[bool] = True
    numbers: ClassVar[tuple[float, ...]] = (1.0,)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.eps < 1:
            raise FewstepError(f"eps is the time of the last step, from 0 up to below 1, got {self.eps}; try 1e-3")
        if self.alg_temp and self.alg == "origin":
            raise FewstepError("alg origin unmasks positions at random and takes no alg_temp; leave one of the two out")

    @classmethod
    def build(cls, resources: Resources, *, steps: _Steps = None, **given: Any) -> "DreamSchedule":
        """For the canvas as a single block."""
        return cls(num_steps=steps or resources.canvas_length, **given)

    @property
    def order(self) -> Order:
        return _DREAM_ORDERS[self.alg]

    @property
    def temperature(self) -> float:
        return self.alg_temp or 0.0

    def __call__(self, certainty_RB: Tensor, masked_RB: Tensor, numbers_RN: Tensor | None = None) -> Tensor:
        # With n of N steps left t = eps + (1 - eps) n / N and s = eps + (1 - eps) (n - 1) / N.
        left_R1 = torch.as_tensor(_number(self, numbers_RN), device=certainty_RB.device)
        share_R1 = 1 / (left_R1 + self.num_steps * self.eps / (1 - self.eps))
        share_R1 = torch.where(left_R1 <= 1, 1.0, share_R1)
        if self.alg == "origin":
            return masked_RB & (certainty_RB > 1 - share_R1)
        return _best((masked_RB.sum(-1, keepdim=True) * share_R1).floor(), certainty_RB, masked_RB)


def _number(policy: Policy, numbers_RN: Tensor | None) -> Tensor | float:
    return policy.numbers[0] if numbers_RN is None else numbers_RN[:, :1]


def _check_no_origin(order: Order) -> None:
    if order == "origin":
        raise FewstepError("origin finalises each mask by chance and orders none; use the policy Origin()")


def or_best(enough_RB: Tensor, certainty_RB: Tensor, masked_RB: Tensor) -> Tensor:
    """The masked positions that are certain enough; where there is none, the first most certain one alone."""
    chosen_RB = enough_RB & masked_RB
    best_R1 = certainty_RB.masked_fill(~masked_RB, float("-inf")).argmax(-1, keepdim=True)
    best_RB = torch.zeros_like(masked_RB).scatter(-1, best_R1, True) & masked_RB
    return chosen_RB | (best_RB & ~chosen_RB.any(-1, keepdim=True))


def _best(count_R1: Tensor | float, certainty_RB: Tensor, masked_RB: Tensor) -> Tensor:
    """The `count_R1` most certain masked positions; of equals the earlier ones."""
    ranked_RB = certainty_RB.masked_fill(~masked_RB, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return masked_RB & (ranked_RB.argsort(-1) < count_R1)


BUILT_IN = frozenset({Threshold, Margin, EntropyBelow, Factor, FixedCount, EvenSplit, Origin, DreamSchedule, Scheduled})
"""The policies above, which check themselves when they are built, and all are given the same of a pass."""

CONFIDENT = Threshold()
ONE_PER_STEP = FixedCount()
