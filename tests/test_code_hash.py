"""The guard of kept results tells policies of one's own apart by what they do, and finds the same ones again."""

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from golden_tokens import tiny

from fewstep.decode.own_policies import OwnPolicy
from fewstep.decode.policies import Threshold
from fewstep.engine.code_hash import code_hash
from fewstep.engine.made_by import answers_made_by
from fewstep.errors import FewstepError
from fewstep.kept import kept_path, kept_results

BOUND = 0.3
TABLE = torch.arange(4.0)


def above(bound: float) -> Callable[..., Any]:
    return lambda confidence: confidence > bound


def with_default(bound: float) -> Callable[..., Any]:
    def rule(confidence: Any, *, at_least: float = bound) -> Any:
        return confidence > at_least

    return rule


def of_global(confidence: Any) -> Any:
    return confidence > BOUND


def of_helper(confidence: Any) -> Any:
    return of_global(confidence)


def of_table(confidence: Any) -> Any:
    return confidence > TABLE[0]


def recursive(confidence: Any) -> Any:
    return recursive(confidence) if confidence is None else confidence > BOUND


def with_attribute(paced: bool) -> Callable[..., Any]:
    rule = above(0.5)
    rule.paced = paced  # type: ignore[attr-defined]
    return rule


class Above:
    def __init__(self, bound: float) -> None:
        self.bound = bound

    def __call__(self, confidence: Any) -> Any:
        return confidence > self.bound

    @functools.cached_property
    def half(self) -> float:
        return self.bound / 2

    def below(self, confidence: Any) -> Any:
        return confidence < self.bound


class AboveAgain(Above):
    def __call__(self, confidence: Any) -> Any:
        return confidence >= self.bound


class Array(np.ndarray[Any, Any]):
    pass


class Level(Enum):
    LOW = 0.3
    HIGH = 0.9


@dataclass(frozen=True)
class Slotted:
    __slots__ = ("bounds",)
    bounds: tuple[Any, ...]

    def __call__(self, confidence: Any) -> Any:
        return confidence > self.bounds[0]


@dataclass(frozen=True)
class Whole:
    """All that a policy has, not one of this package."""

    bound: float
    order: ClassVar[str] = "low_confidence"
    paced: ClassVar[bool] = False
    temperature: ClassVar[float] = 0.0
    numbers: ClassVar[tuple[float, ...]] = ()

    def __call__(self, masked: Any, confidence: Any) -> Any:
        return masked & (confidence > self.bound)


MAKERS: list[Callable[[float], Any]] = [
    above,
    with_default,
    Above,
    AboveAgain,
    Whole,
    lambda bound: Above(bound).below,
    lambda bound: functools.partial(with_default(0.0), at_least=bound),
    lambda bound: torch.no_grad()(above(bound)),
    lambda bound: functools.cache(above(bound)),
    lambda bound: Slotted((torch.tensor([bound]),)),
    lambda bound: with_attribute(bound > 0.5),
    lambda bound: Above(np.array([bound]).view(Array)),  # type: ignore[arg-type]
    lambda bound: Above(Level.HIGH if bound > 0.5 else Level.LOW),  # type: ignore[arg-type]
    lambda bound: OwnPolicy(rule=with_default(0.0), settings={"at_least": torch.tensor(bound)}),
]


@pytest.mark.parametrize("make", MAKERS)
def test_policies_that_differ_in_a_value_are_told_apart_and_equal_ones_are_not(make: Callable[[float], Any]) -> None:
    assert code_hash(make(0.3)) == code_hash(make(0.3)) != code_hash(make(0.9))


def test_policies_are_told_apart_by_their_code() -> None:
    rules: list[Any] = [lambda confidence: confidence > 0.9, lambda confidence: confidence > 0.3]
    rules += [lambda confidence: confidence < 0.3, lambda confidence: confidence.neg() > 0.3, lambda masked: masked]
    rules += [make(0.3) for make in MAKERS]
    assert len({code_hash(rule) for rule in rules}) == len(rules)


@pytest.mark.parametrize("rule", [of_global, of_helper, recursive])
def test_a_global_that_a_policy_names_is_a_part_of_it(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, table = code_hash(rule), code_hash(of_table)
    monkeypatch.setitem(rule.__globals__, "BOUND", 0.9)
    assert code_hash(rule) != before
    assert code_hash(of_table) == table
    monkeypatch.setitem(rule.__globals__, "TABLE", TABLE + 1)
    assert code_hash(of_table) != table


def test_another_process_gives_the_same_hash(tmp_path: Path) -> None:
    text = "\n".join(
        (
            "from fewstep.engine.code_hash import code_hash",
            "words = {'a', 'bc', 'def', 'ghi'}",
            "print(code_hash(lambda masked: (len(words), 'x' in {'x', 'y', 'z'}, print)))",
        )
    )
    hashes = {subprocess.run([sys.executable, "-c", text], check=True, capture_output=True).stdout for _ in range(2)}
    assert len(hashes) == 1


def test_what_cannot_be_told_apart_is_refused_in_one_sentence() -> None:
    waiting = (number for number in range(3))
    with pytest.raises(FewstepError, match=r"^no results can be kept for a policy that holds a generator, since"):
        code_hash(lambda masked: next(waiting))


def test_answers_of_one_policy_are_not_reused_for_another(tmp_path: Path) -> None:
    lm = tiny("block_causal")

    def made_by(rule: Any) -> dict[str, Any]:
        return answers_made_by(lm, ["a"], policy=rule)

    with kept_results(tmp_path / "out", lambda: made_by(above(0.9))) as kept:
        kept.add("0", "an answer")
        unfinished = kept_path(tmp_path / "out").read_bytes()
    kept_path(tmp_path / "out").write_bytes(unfinished)
    with (
        pytest.raises(FewstepError, match=r"keeps answers of a run with other settings \(policy_code is .*, which was"),
        kept_results(tmp_path / "out", lambda: made_by(above(0.3))),
    ):
        pass
    with kept_results(tmp_path / "out", lambda: made_by(above(0.9))) as kept:
        assert kept.get("0") == "an answer"
    assert "policy_code" not in answers_made_by(lm, ["a"])
    assert "policy_code" not in made_by(Threshold(at_least=0.5))
    assert "0x" not in made_by(Above(0.3))["policy"]
