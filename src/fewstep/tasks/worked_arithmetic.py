"""Worked arithmetic: an expression turned into a chain of equal expressions, each one small step from the last.

A small network cannot multiply 57 by 23 in one pass, but it can write
``57 * 23 = 57 * 20 + 57 * 3 = 1140 + 171 = 1311``.
The chains are canonical text: decimal numbers, ``+ - * / ( )`` and ``=`` with one space on both sides of each operator.
Every part of a chain is exactly equal to every other, with one exception that the caller has to ask for by naming the
result: a source that drops the fraction (``0.52 * 80 = 41``) keeps its own last number.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal

NUMBER = r"\d+(?:\.\d+)?"
MAX_CHAIN_CHARACTERS = 160  # longer chains cost more tokens than the step they explain

_TOKEN = re.compile(rf"{NUMBER}|[-+*/()]")
_INNERMOST = re.compile(r"\(([^()]*)\)")
_IS_NUMBER = re.compile(rf"{NUMBER}$")
_EASY_FRACTIONS = {Fraction(1, 2): (1, 2), Fraction(1, 4): (1, 4), Fraction(3, 4): (3, 4)}
_MAX_DECIMALS = 4
_ROUNDING = Fraction(1, 10**9)
_REPEATING_DECIMALS = 10  # 0.3333333333333333 stands for a third

Number = int | Fraction
Factor = tuple[str, str]  # ("*" or "/", number)
Term = tuple[str, list[Factor]]  # ("+" or "-", factors)


class NotWorkableError(Exception):
    """The expression has a step that cannot be written exactly in a few decimals, or falls below zero."""


@lru_cache(maxsize=1 << 17)
def worked(expression: str, result: str) -> str | None:
    """The chain ``expression = ... = result``, or None if `result` is not the value of `expression`.

    `result` may also be the value without its fraction. The plain ``expression = result`` comes back if no helpful step
    is known or if the chain would be longer than MAX_CHAIN_CHARACTERS.
    """
    agreement = agrees(expression, result)
    if agreement is None:
        return None
    plain = f"{expression} = {result}"
    try:
        sides = _sides(expression)[:-1]
    except NotWorkableError:
        sides = [expression]
    if agreement == "truncated" and len(sides) == 1:
        sides += _whole_quotient_sides(expression)
    chain = " = ".join([*dict.fromkeys(sides), result])
    return chain if len(chain) <= MAX_CHAIN_CHARACTERS else plain


def agrees(expression: str, result: str) -> Literal["exact", "truncated"] | None:
    """Whether `result` is the value of `expression`, or that value without its fraction, or neither (None)."""
    try:
        value = evaluate(expression)
    except ZeroDivisionError:
        return None
    wanted = number(result)
    if value == wanted or abs(Fraction(value) - wanted) < _ROUNDING:
        return "exact"
    return "truncated" if math.floor(value) == wanted else None


def evaluate(expression: str) -> Number:
    """The exact value of a canonical expression; ZeroDivisionError as in arithmetic, ValueError if it is malformed."""
    tokens = _TOKEN.findall(expression)
    value, rest = _evaluate_sum(tokens, 0)
    if rest != len(tokens) or "".join(tokens) != expression.replace(" ", ""):
        raise ValueError(f"not an expression: {expression!r}")
    return value


def _evaluate_sum(tokens: list[str], at: int) -> tuple[Number, int]:
    value, at = _evaluate_product(tokens, at)
    while at < len(tokens) and tokens[at] in "+-":
        operand, after = _evaluate_product(tokens, at + 1)
        value = value + operand if tokens[at] == "+" else value - operand
        at = after
    return value, at


def _evaluate_product(tokens: list[str], at: int) -> tuple[Number, int]:
    value, at = _evaluate_atom(tokens, at)
    while at < len(tokens) and tokens[at] in "*/":
        operand, after = _evaluate_atom(tokens, at + 1)
        value = value * operand if tokens[at] == "*" else _divide(value, operand)
        at = after
    return value, at


def _divide(value: Number, by: Number) -> Number:
    quotient = Fraction(value, by)
    return quotient.numerator if quotient.denominator == 1 else quotient


def _evaluate_atom(tokens: list[str], at: int) -> tuple[Number, int]:
    if at == len(tokens) or tokens[at] in "+-*/)":
        raise ValueError(f"a number is missing in {' '.join(tokens)!r}")
    if tokens[at] != "(":
        return number(tokens[at]), at + 1
    value, at = _evaluate_sum(tokens, at + 1)
    if at == len(tokens) or tokens[at] != ")":
        raise ValueError(f"a bracket is not closed in {' '.join(tokens)!r}")
    return value, at + 1


def number(text: str) -> Number:
    """The value of a decimal number; a long repeating decimal is the simple fraction that it stands for."""
    if "." not in text:
        return int(text)
    value = Fraction(text)
    if len(text.partition(".")[2]) >= _REPEATING_DECIMALS:
        return value.limit_denominator(12)
    return value


def format_number(value: Number) -> str:
    """Shortest exact decimal text; NotWorkableError if `value` is negative or needs more than four decimals."""
    if value < 0:
        raise NotWorkableError
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10**_MAX_DECIMALS
    if scaled.denominator != 1:
        raise NotWorkableError
    whole, decimals = divmod(scaled.numerator, 10**_MAX_DECIMALS)
    return f"{whole}.{decimals:0{_MAX_DECIMALS}d}".rstrip("0")


def _sides(expression: str) -> list[str]:
    """All sides of the chain; the last is the number."""
    sides = [expression]

    def add(side: str) -> None:
        if side != sides[-1]:
            sides.append(side)

    while group := _INNERMOST.search(expression):
        before, after = expression[: group.start()], expression[group.end() :]
        for side in _flat_sides(group[1]):
            inside = side if _IS_NUMBER.match(side) else f"({side})"
            add(f"{before}{inside}{after}")
        expression = sides[-1]
    for side in _flat_sides(expression):
        add(side)
    return sides


def _flat_sides(expression: str) -> list[str]:
    """Sides of an expression without brackets: products first, from the left, then the sum two terms at a time."""
    terms = _read_terms(expression)
    sides = [expression]
    for index, (sign, factors) in enumerate(terms):
        if len(factors) == 1:
            continue
        steps = _product_steps(factors)
        for step in steps:
            shown = f"({step})" if sign == "-" and " + " in step else step
            sides.append(_write_terms(terms[:index], f"{sign} {shown}", terms[index + 1 :]))
        terms[index] = (sign, [("*", steps[-1])])
    numbers = [(sign, factors[0][1]) for sign, factors in terms]
    while len(numbers) > 1:
        (_, first), (sign, second), *rest = numbers
        total = number(first) + number(second) * (1 if sign == "+" else -1)
        numbers = [("+", format_number(total)), *rest]
        sides.append(" ".join(f"{sign} {text}" for sign, text in numbers)[2:])
    return sides


def _read_terms(expression: str) -> list[Term]:
    terms: list[Term] = []
    operator = "+"
    for token in _TOKEN.findall(expression):
        if token in "+-*/":
            operator = token
        elif operator in "+-":
            terms.append((operator, [("*", token)]))
        else:
            terms[-1][1].append((operator, token))
    return terms


def _write_terms(before: list[Term], middle: str, after: list[Term]) -> str:
    def write(term: Term) -> str:
        sign, factors = term
        return f"{sign} " + " ".join(f"{operator} {text}" for operator, text in factors)[2:]

    return " ".join([*map(write, before), middle, *map(write, after)])[2:]


def _product_steps(factors: list[Factor]) -> list[str]:
    """Steps that turn one product (with divisions) into its value, the last of them; the product itself is left out."""
    if len(factors) == 2 and ("*", "1") in factors and factors[1][0] == "*":
        return [format_number(number(factors[0][1]) * number(factors[1][1]))]
    mixed = _mixed_steps(factors)
    if mixed is not None:
        return mixed
    top, bottom = _whole_factors(factors)
    if len(bottom) == 1 and len(top) == 1:
        return [f"{top[0]} / {bottom[0]}", *_division_steps(top[0], bottom[0])]
    if len(bottom) == 1 and len(top) == 2:
        return _share_steps(top[0], top[1], bottom[0])
    if not bottom:
        steps: list[str] = []
        value = top[0]
        for index, factor in enumerate(top[1:], start=1):
            rest = "".join(f" * {later}" for later in top[index + 1 :])
            steps += _within(_multiplication_steps(value, factor), rest)
            value *= factor
        return steps
    quotient: Number = 1
    for operator, text in factors:
        quotient = quotient * number(text) if operator == "*" else _divide(quotient, number(text))
    return [format_number(quotient)]


def _whole_factors(factors: list[Factor]) -> tuple[list[int], list[int]]:
    """The product as whole numbers above and below the line; a share such as 0.35 or 35 / 100 comes last above it."""
    values = [(operator, number(text)) for operator, text in factors]
    top = [value for operator, value in values if operator == "*"]
    bottom = [value for operator, value in values if operator == "/"]
    whole = [value for value in top if value.denominator == 1]
    decimals = [value for value in top if value.denominator > 1]
    if not decimals and all(value.denominator == 1 for value in bottom):
        if len(top) == 2 and len(bottom) == 1 and factors[1][0] == "/" and _significant(top[1].numerator) != "1":
            whole = [top[1], top[0]]  # 3 / 4 * 52 is a share of 52
        return [value.numerator for value in whole], [value.numerator for value in bottom]
    if len(top) == 1 and len(bottom) == 1:
        scale = max(_decimal_scale(top[0]), _decimal_scale(bottom[0]))
        return [(top[0] * scale).numerator], [(bottom[0] * scale).numerator]
    if len(decimals) == 1 and len(whole) == 1 and not bottom:
        scale = _decimal_scale(decimals[0])
        return [whole[0].numerator, (decimals[0] * scale).numerator], [scale]
    raise NotWorkableError


def _mixed_steps(factors: list[Factor]) -> list[str] | None:
    """Steps for a whole number times a mixed one such as 19.25, whole part and fraction apart; None for others."""
    if [operator for operator, _ in factors] != ["*", "*"]:
        return None
    part, factor = sorted((number(text) for _, text in factors), key=lambda value: value.denominator, reverse=True)
    fraction = Fraction(part % 1)
    if factor.denominator > 1 or part < 1 or fraction not in _EASY_FRACTIONS:
        return None
    share, of = _EASY_FRACTIONS[fraction]
    products = _split_product(factor.numerator, math.floor(part))
    shown = [f"{left} * {right}" for left, right in products]
    shown.append(f"{factor} / {of}" if share == 1 else f"{factor} * {share} / {of}")
    values: list[Number] = [left * right for left, right in products]
    values.append(Fraction(factor) * fraction)
    return [" + ".join(shown), *_sum_steps(values)]


def _decimal_scale(value: Number) -> int:
    """The least power of ten that makes `value` whole; its own denominator where there is none (a third)."""
    for exponent in range(_MAX_DECIMALS + 1):
        if (value * 10**exponent).denominator == 1:
            return int(10**exponent)
    return value.denominator


def _share_steps(base: int, share: int, of: int) -> list[str]:
    """Steps for ``base * share / of``: the easy division first where it leaves no remainder."""
    if of in (10, 100, 1000, 10000):
        share, of = _EASY_FRACTIONS.get(Fraction(share, of), (share, of))
        while share % 10 == 0 and of % 10 == 0:
            share, of = share // 10, of // 10
        while base % 10 == 0 and of % 10 == 0 and base % of:
            base, of = base // 10, of // 10
    if of == 1:
        return [f"{base} * {share}", *_multiplication_steps(base, share)]
    if share == 1:
        return [f"{base} / {of}", *_division_steps(base, of)]
    if base % of == 0:
        quotient = base // of
        steps = [f"{base} / {of} * {share}", *_within(_division_steps(base, of), f" * {share}")]
        return steps + _multiplication_steps(quotient, share)
    steps = [f"{base} * {share} / {of}", *_within(_multiplication_steps(base, share), f" / {of}")]
    return steps + _division_steps(base * share, of)


def _within(steps: list[str], rest: str) -> list[str]:
    """The same steps with `rest` (a multiplication or division) behind them."""
    if not rest:
        return steps
    return [f"({step}){rest}" if " " in step else f"{step}{rest}" for step in steps]


def _significant(value: int) -> str:
    return str(value).rstrip("0")


def _multiplication_steps(a: int, b: int) -> list[str]:
    """Split by digits until each product is one digit times at most two; then add two terms at a time."""
    products = _split_product(a, b)
    if len(products) == 1:
        return [str(a * b)]
    steps = [" + ".join(f"{left} * {right}" for left, right in products)]
    return steps + _sum_steps([left * right for left, right in products])


def _sum_steps(values: Sequence[Number]) -> list[str]:
    steps = [" + ".join(map(format_number, values))]
    while len(values) > 1:
        values = [values[0] + values[1], *values[2:]]
        steps.append(" + ".join(map(format_number, values)))
    return steps


def _split_product(a: int, b: int) -> list[tuple[int, int]]:
    long, short = (a, b) if len(_significant(a)) >= len(_significant(b)) else (b, a)
    if len(_significant(short)) <= 1 and (len(_significant(long)) <= 2 or _significant(short) in ("", "1")):
        return [(long, short)]
    if len(_significant(long)) >= 3:
        leading = _leading_part(long)
        return _split_product(leading, short) + _split_product(long - leading, short)
    leading = _leading_part(short)
    return [(long, leading), (long, short - leading)]


def _leading_part(value: int) -> int:
    """The first digit and its zeros: 345 -> 300."""
    power = int(10 ** (len(str(value)) - 1))
    return value // power * power


def _division_steps(a: int, b: int) -> list[str]:
    """Partial quotients, one digit at a time, where the quotient is whole and has several digits."""
    quotient = Fraction(a, b)
    if quotient.denominator > 1 or _is_easy_division(a, b):
        return [format_number(quotient)]
    return _long_division_steps(a, b)


def _long_division_steps(a: int, b: int) -> list[str]:
    """Digit by digit: ``80500 / 115 + 9315 / 115``, ``700 + 9200 / 115 + 115 / 115`` ...; a remainder is dropped."""
    parts: list[int] = []  # of the quotient
    remaining = a
    while remaining >= b:
        parts.append(_leading_part(remaining // b))
        remaining -= parts[-1] * b
        if remaining >= b and remaining % b == 0 and _is_easy_division(remaining, b):
            parts.append(remaining // b)
            break
    if len(parts) == 1:
        return [str(a // b)]
    steps: list[str] = []
    if b < 10:  # the remainders are easily seen, so all parts come at once
        steps.append(" + ".join(f"{part * b} / {b}" for part in parts))
    else:
        for known in range(len(parts) - 1):
            rest = a - sum(parts[: known + 1]) * b
            steps.append(" + ".join([*map(str, parts[:known]), f"{parts[known] * b} / {b}", f"{rest} / {b}"]))
    return [*steps, " + ".join(map(str, parts)), str(a // b)]


def _whole_quotient_sides(expression: str) -> list[str]:
    """Sides on the way to the whole part of a single quotient; none for any other expression."""
    terms = _read_terms(expression) if "(" not in expression else []
    if len(terms) != 1 or [operator for operator, _ in terms[0][1]] != ["*", "/"]:
        return []
    (top,), (bottom,) = _whole_factors(terms[0][1])
    return [f"{top} / {bottom}", *_long_division_steps(top, bottom)[:-1]]


def _is_easy_division(a: int, b: int) -> bool:
    one_digit_quotient = len(_significant(a // b)) <= 1
    in_the_tables = len(_significant(a)) <= 2 and b < 10
    return one_digit_quotient or in_the_tables or _significant(b) == "1"
