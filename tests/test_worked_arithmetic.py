"""Chains of worked arithmetic: hand-worked ones, and the promise that all sides are equal."""

from fractions import Fraction
from random import Random

import pytest

from fewstep.tasks.worked_arithmetic import NotWorkableError, evaluate, format_number, worked


@pytest.mark.parametrize(
    ("expression", "result", "chain"),
    [
        ("3 * 4", "12", "3 * 4 = 12"),
        ("57 * 23", "1311", "57 * 23 = 57 * 20 + 57 * 3 = 1140 + 171 = 1311"),
        ("324 * 5", "1620", "324 * 5 = 300 * 5 + 24 * 5 = 1500 + 120 = 1620"),
        ("16 + 8 + 14", "38", "16 + 8 + 14 = 24 + 14 = 38"),
        ("30 - 3 - 6", "21", "30 - 3 - 6 = 27 - 6 = 21"),
        ("252 / 18", "14", "252 / 18 = 180 / 18 + 72 / 18 = 10 + 4 = 14"),
        ("724.5 / 0.9", "805", "724.5 / 0.9 = 7245 / 9 = 7200 / 9 + 45 / 9 = 800 + 5 = 805"),
        ("360000 * 5 / 100", "18000", "360000 * 5 / 100 = 360000 / 100 * 5 = 3600 * 5 = 18000"),
        (
            "0.5 * 272 + 22",
            "158",
            "0.5 * 272 + 22 = 272 / 2 + 22 = 200 / 2 + 72 / 2 + 22 = 100 + 36 + 22 = 136 + 22 = 158",
        ),
        ("2 * (60 + 14)", "148", "2 * (60 + 14) = 2 * 74 = 148"),
        ("48 * 0.3333333333333333", "16", "48 * 0.3333333333333333 = 48 / 3 = 16"),
        ("22 * 8.5", "187", "22 * 8.5 = 22 * 8 + 22 / 2 = 176 + 11 = 187"),
        ("76 / 154 * 1078", "532", "76 / 154 * 1078 = 1078 / 154 * 76 = 7 * 76 = 532"),
    ],
)
def test_known_chains(expression: str, result: str, chain: str) -> None:
    assert worked(expression, result) == chain


def test_a_dropped_fraction_is_kept_as_the_source_has_it() -> None:
    assert worked("80 * 0.52", "41") == "80 * 0.52 = 8 * 52 / 10 = 416 / 10 = 41"


def test_a_wrong_result_is_refused() -> None:
    assert worked("57 * 23", "1310") is None
    assert worked("5 / 0", "1") is None


@pytest.mark.parametrize("malformed", ["", "3 +", "(3 + 4", "3 4", "3 ** 4", "x"])
def test_malformed_expressions_are_refused(malformed: str) -> None:
    with pytest.raises(ValueError, match=r"not an expression|is missing|not closed"):
        evaluate(malformed)


def test_numbers_that_need_many_decimals_are_not_workable() -> None:
    with pytest.raises(NotWorkableError):
        format_number(Fraction(1, 3))
    assert format_number(Fraction(1, 8)) == "0.125"


def test_all_sides_of_random_chains_are_equal() -> None:
    rng = Random(0)
    operators = ("+", "-", "*", "/")
    for _ in range(3000):
        a, b, c = (
            rng.choice((rng.randrange(1, 12), rng.randrange(1, 400), 10 * rng.randrange(1, 90))) for _ in range(3)
        )
        expression = rng.choice(
            (f"{a} {rng.choice(operators)} {b}", f"{a} * {b} / {c}", f"{a * b} / {b} + {c}", f"{a} * ({b} + {c})")
        )
        try:
            result = format_number(evaluate(expression))
        except NotWorkableError:
            continue
        chain = worked(expression, result)
        assert chain is not None
        assert len({evaluate(side) for side in chain.split(" = ")}) == 1, chain
