"""What a policy is given of a pass, and how a plain function becomes one.

Axes: R = requests, B = positions of a block, V = vocabulary, N = numbers of a policy, L = positions of a request.

A policy's arguments name what it is given, with or without the axes behind: `masked` or `masked_RB`. What none of its
arguments names is not computed. A function needs no more than a return value: positions that are not masked are left
out, and where it chooses none of a request's masked positions, the most certain one is finalised. Its other arguments
are settings and need defaults; numbers among them come as tensors [R, 1], each request's own.

    def at_least(confidence, masked, *, threshold: Annotated[float, "Smallest probability."] = 0.9):
        return confidence >= threshold

`order`, `paced` and `temperature` may be set as attributes of it. All of it only computes with tensors, so that a pass
can be captured as a graph: a policy must not read a value of them.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cache, cached_property
from typing import Any, cast, get_args

import torch
from torch import Tensor

from fewstep.decode.policies import BUILT_IN, Order, Policy, certainty, or_best, perturbed
from fewstep.decode.sampling import confidence
from fewstep.decode.state import NEVER, Previous
from fewstep.errors import FewstepError, suggestion
from fewstep.values import shown


@dataclass(frozen=True)
class PreviousPass:
    """What the pass before this one drew at the same positions, [R, B]: tokens, and their untempered probability.

    Where it scored none, as in a request's first pass and in a new block, the token is NEVER and its probability 0.
    """

    tokens: Tensor
    confidence: Tensor

    @classmethod
    def at(cls, positions_RB: Tensor, previous: Previous) -> "PreviousPass":
        """Of what the state keeps, these positions."""
        return cls(previous.last_tokens_RL.gather(1, positions_RB), previous.last_confidence_RL.gather(1, positions_RB))


@dataclass(frozen=True, kw_only=True)
class PassFacts:
    """What a policy may name: of the B positions from the front on, after the tokens were drawn.

    `masked`: those that may be chosen. `tokens`, `confidence`: drawn there, and their untempered probability. `logits`:
    what they were drawn from, [R, B, V], float32. `numbers`: of each request's policy, [R, N]. `previous`: see
    `PreviousPass`; the state keeps it only for a policy that names it. `certainty`: see `policies.certainty`.
    """

    masked: Tensor
    tokens: Tensor
    confidence: Tensor
    logits: Tensor
    numbers: Tensor
    previous: PreviousPass | None
    policy: Policy
    settled: Tensor | None
    noise: Callable[[], Tensor]

    @cached_property
    def certainty(self) -> Tensor:
        certainty_RB = certainty(self.policy.order, self.logits, self.confidence, self.noise)
        if self.policy.temperature:
            certainty_RB = perturbed(certainty_RB, self.policy.temperature, self.noise)
        if self.settled is not None:
            # Waiting cannot change these, and their neighbours are better drawn knowing them.
            certainty_RB = certainty_RB.masked_fill(self.settled, torch.inf)
        return certainty_RB

    @property
    def chosen(self) -> Tensor:
        """What the policy chooses, [R, B].

        FewstepError for anything but such a boolean tensor. Of a policy from elsewhere only masked positions count, and
        the most certain one is taken where it chooses none, if it is paced in the last step: else a request never ends.
        """
        is_ours = type(self.policy) in BUILT_IN
        # What final positions would be given now depends on which rows are beside them in the pass.
        facts = self if is_ours else replace(self, confidence=self.confidence.masked_fill(~self.masked, 0.0))
        chosen = self.policy(**{name: getattr(facts, fact) for name, fact in reads(self.policy).items()})
        if is_ours:
            return chosen
        _check_chosen(self.policy, chosen, self.masked)
        if self.settled is not None:  # no later pass has the row that scores them
            chosen = chosen | (self.settled & self.masked)
        if isinstance(self.policy, OwnPolicy):
            return chosen
        some = or_best(chosen, self.certainty, self.masked)
        return torch.where(self.numbers[:, :1] <= 1, some, chosen & self.masked) if self.policy.paced else some


FACTS = ("certainty", "masked", "tokens", "confidence", "logits", "numbers", "previous")
_BUILT_IN_READ = {"certainty_RB": "certainty", "masked_RB": "masked", "numbers_RN": "numbers"}


def reads(policy: Policy) -> Mapping[str, str]:
    """Argument of the policy -> what it is given, of FACTS. FewstepError if an argument names nothing there is."""
    if isinstance(policy, OwnPolicy):
        return policy.reads
    return _BUILT_IN_READ if type(policy) in BUILT_IN else _reads(type(policy))


@cache
def _reads(rule: Callable[..., Any]) -> Mapping[str, str]:
    """Of a function, or of all objects of a class."""
    found = {}
    function = rule.__call__ if isinstance(rule, type) else rule
    parameters = list(_parameters(function).items())
    if isinstance(rule, type) and not isinstance(inspect.getattr_static(rule, "__call__"), staticmethod | classmethod):
        del parameters[:1]  # the object itself, whatever it is named
    for name, parameter in parameters:
        fact = re.sub(r"_[A-Z0-9]+$", "", name)
        if fact in FACTS:
            found[name] = fact
        elif parameter.default is inspect.Parameter.empty:
            raise FewstepError(
                f"the policy {_name_of(function)} wants {name!r}, which no pass has; it may name {', '.join(FACTS)}, "
                "or give the argument a default"
            )
    return found


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:  # such as a built-in one, or a partial with an argument that is not there
        raise FewstepError(
            f"the arguments of the policy {_name_of(function)} cannot be read ({error}); write a function with named "
            "arguments that calls it"
        ) from None


def _check_chosen(policy: Policy, chosen: Any, masked: Tensor) -> None:
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != masked.shape:
        got = f"{chosen.dtype} {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else shown(chosen)
        raise FewstepError(
            f"the policy {policy!r} must return what it chooses as a boolean tensor of the shape of masked, "
            f"{tuple(masked.shape)}; got {got}"
        )


def _check_attributes(policy: Policy) -> None:
    """FewstepError unless its order, temperature and numbers are such."""
    rule: Any = policy.rule if isinstance(policy, OwnPolicy) else policy
    if policy.order not in get_args(Order):
        raise FewstepError(
            f"the policy {policy!r} has the order {shown(policy.order)}; choose one of {', '.join(get_args(Order))}"
        )
    temperature = getattr(rule, "temperature", 0.0)
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise FewstepError(
            f"the policy {policy!r} has the temperature {shown(temperature)}; it must be a number of at least 0"
        )
    if not all(_is_number(number) for number in policy.numbers):
        raise FewstepError(f"the numbers of the policy {policy!r} must be numbers, got {shown(policy.numbers)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True, repr=False)
class OwnPolicy:
    """A function, or an object that is called, as a policy; `settings`: values of its other arguments."""

    rule: Callable[..., Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.settings:
            if name in self._own_reads:
                raise FewstepError(f"{name!r} is what the policy {self!r} is given, and no setting of it")
            if name not in (known := [one for one in _parameters(self.rule) if one not in self._own_reads]):
                hint = suggestion(name, known) if known else "it has none"
                raise FewstepError(f"{name!r} is no setting of the policy {_name_of(self.rule)}; {hint}")
        self.reads  # noqa: B018  (checked when built)

    def __repr__(self) -> str:
        """Without an address, since answers are kept under it."""
        name = repr(self.rule) if is_dataclass(self.rule) else _name_of(self.rule)
        told = ", ".join(f"{name}={value!r}" for name, value in self._values.items())
        return f"{name}({told})" if told else name

    @property
    def order(self) -> Order:
        return getattr(self.rule, "order", "low_confidence")

    @property
    def paced(self) -> bool:
        return bool(getattr(self.rule, "paced", False))

    @property
    def temperature(self) -> float:
        return float(getattr(self.rule, "temperature", 0.0))

    @property
    def numbers(self) -> tuple[float, ...]:
        return tuple(self._values[name] for name in self._numbered)

    @property
    def setting_names(self) -> tuple[str, ...]:
        return tuple(self._values)

    @property
    def kind(self) -> object:
        """Equal for policies that one step serves."""
        return self.rule, {name: value for name, value in self._values.items() if name not in self._numbered}

    @cached_property
    def reads(self) -> Mapping[str, str]:
        return {"masked": "masked", "certainty": "certainty", "numbers": "numbers"} | {
            fact: fact for fact in self._own_reads.values()
        }

    @cached_property
    def _own_reads(self) -> Mapping[str, str]:
        owner: Any = self.rule if is_function(self.rule) else type(self.rule)
        return _reads(owner)

    @cached_property
    def _values(self) -> dict[str, Any]:
        """Setting -> its value, for all that the function has."""
        parameters = _parameters(self.rule).items()
        defaults = {name: one.default for name, one in parameters if name not in self._own_reads}
        return {**defaults, **self.settings}

    @cached_property
    def _numbered(self) -> tuple[str, ...]:
        return tuple(name for name, value in self._values.items() if _is_number(value))

    def __call__(self, masked: Tensor, certainty: Tensor, numbers: Tensor, **facts: Any) -> Tensor:
        facts |= {"masked": masked, "certainty": certainty, "numbers": numbers}
        given = {name: facts[fact] for name, fact in self._own_reads.items()}
        given |= self._values
        if not self.paced:  # else the numbers are the steps left
            given |= {name: numbers[:, i : i + 1] for i, name in enumerate(self._numbered)}
        chosen = self.rule(**given)
        _check_chosen(self, chosen, masked)
        return or_best(chosen, certainty, masked)


def as_policy(rule: Any, settings: Mapping[str, Any] | None = None) -> Policy:
    """A policy as it is; a function or an object that is called as an `OwnPolicy`. FewstepError for anything else."""
    if type(rule) in BUILT_IN:
        return cast(Policy, rule)
    if isinstance(rule, type) or not callable(rule):
        hint = f"build it: {rule.__name__}(...)" if isinstance(rule, type) else "it must be one, or a function"
        raise FewstepError(f"{shown(rule)} is no policy; {hint}")
    whole = not is_function(rule) and all(hasattr(rule, name) for name in ("order", "paced", "temperature", "numbers"))
    policy: Policy = rule if whole else OwnPolicy(rule=rule, settings=settings or {})
    reads(policy)
    _check_attributes(policy)
    return policy


def check_runs(policy: Policy, block_size: int, vocab_size: int, device: torch.device) -> None:
    """FewstepError if a policy from elsewhere fails on an invented block of two requests with its settings.

    Many requests share a pass, and one whose policy fails there would fail all of them. The block is on the CPU, so
    that a position that is not there ends nothing but this; a policy with tensors on the device is not tried.
    """
    if type(policy) in BUILT_IN:
        return
    masked_RB = torch.ones((2, block_size), dtype=torch.bool)
    logits_RBV = torch.arange(vocab_size).sin().expand(2, block_size, -1)
    tokens_RB = logits_RBV.argmax(-1)
    nothing = PreviousPass(torch.full_like(tokens_RB, NEVER), torch.zeros(masked_RB.shape))
    facts = PassFacts(
        policy=policy,
        masked=masked_RB,
        tokens=tokens_RB,
        confidence=confidence(logits_RBV, tokens_RB),
        logits=logits_RBV,
        # A paced policy is given the steps left: one.
        numbers=torch.ones((2, 1), dtype=torch.long) if policy.paced else torch.tensor([policy.numbers] * 2).float(),
        previous=nothing,
        settled=None,
        noise=lambda: torch.full(masked_RB.shape, 0.5),
    )
    try:
        facts.chosen  # noqa: B018  (computed when asked for)
    except FewstepError:
        raise
    except Exception as error:  # whatever a program of the user's may raise
        if device.type != "cpu" and "device" in str(error):
            return
        told = str(error).splitlines()[0] if str(error) else "no message"
        raise FewstepError(
            f"the policy {policy!r} fails with these settings ({type(error).__name__}: {told})"
        ) from error


def same_kind(one: Policy, other: Policy) -> bool:
    """Whether one step serves both: they differ in their numbers only."""

    def kind(policy: Policy) -> object:
        if isinstance(policy, OwnPolicy):
            return policy.kind
        return policy if policy.paced else (type(policy), policy.order, policy.temperature)

    return kind(one) == kind(other)


def is_function(rule: Any) -> bool:
    return inspect.isroutine(rule) or hasattr(rule, "func")  # or a functools.partial of one


def _name_of(rule: Any) -> str:
    named = getattr(rule, "func", rule)
    return str(getattr(named, "__qualname__", type(named).__qualname__))
