"""Worked solutions of GSM-Symbolic problems in several consistent styles.

`read_solution` takes a template's chain of thought apart into lines of words and equations, and `render` writes it
again in one `Style`. All styles show the same intermediate arithmetic (`worked_arithmetic`), each in its own notation,
so what a model can solve does not depend on the style that it happens to pick. Two more choices are made at random for
each answer: the order of operands in ``a + b`` and ``a * b``, and the order of neighbouring lines that do not depend on
each other.

Inside a solution numbers are bare (no currency signs, thousands commas or ``36.0``), and unit words inside an equation
are left out: ``120 clam / 5 clam/minute = 24 minutes`` becomes ``120 / 5 = 24 minutes``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from random import Random
from typing import Any

from fewstep.tasks.worked_arithmetic import NUMBER, agrees, worked


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one author writes: signs, spacing, what a line begins with, the word for "so", and the last line."""

    name: str
    times: str
    divide: str
    spaced: bool
    prefix: str  # may hold {step}, the line's number from 1
    therefore: str
    final: str  # holds {answer}

    def write_words(self, words: str) -> str:
        """Words with a product among them (one that is no equation, as ``50% * 50%``) in this style's notation."""
        if "*" not in words and "×" not in words:
            return words
        return _LOOSE_TIMES.sub(f" {self.times} " if self.spaced else self.times, words)

    def write_chain(self, chain: str) -> str:
        """A canonical chain in this style's notation."""
        if self.spaced:
            return chain.replace("*", self.times).replace("/", self.divide)
        return chain.replace(" ", "").replace("*", self.times).replace("/", self.divide)


STYLES = (
    Style(name="plain", times="*", divide="/", spaced=True, prefix="", therefore="So", final="#### {answer}"),
    Style(
        name="steps",
        times="×",
        divide="÷",
        spaced=True,
        prefix="Step {step}: ",
        therefore="Therefore",
        final="The answer is {answer}.",
    ),
    Style(name="bullets", times="*", divide="/", spaced=False, prefix="- ", therefore="Thus", final="Answer: {answer}"),
    Style(
        name="numbered",
        times="x",
        divide="/",
        spaced=True,
        prefix="{step}. ",
        therefore="Hence",
        final="Final answer = {answer}",
    ),
)


@dataclass(frozen=True)
class Equation:
    """``expression = result`` in canonical notation, and its sign for percent if the source shows one."""

    expression: str
    result: str
    percent: bool = False


Line = list[str | Equation]


# --- reading --------------------------------------------------------------------------------------

_PERCENT_NUMBER = rf"{NUMBER}%?"
_OPERATOR = r"(?: *[-+*×÷/] *| x |(?=\())"
_UNIT = r"(?: ?(?!x )[A-Za-z][A-Za-z'\-]*+){0,6}+(?:/[a-z]++(?: (?!x )[a-z]++)?)?"
_TERM = rf"\(*{_PERCENT_NUMBER}{_UNIT}\)*"
_EQUATION = re.compile(
    rf"(?<![\d./(]){_TERM}(?:{_OPERATOR}{_TERM})+ *= *(?P<result>{_PERCENT_NUMBER})(?!\d| *[-+*×÷/=] *\d| x \d)"
)
_ARITHMETIC = re.compile(rf"{_PERCENT_NUMBER}|[-+*×÷/()=]|(?<![A-Za-z])x(?![A-Za-z])")
_LOOSE_TIMES = re.compile(r"(?<=[\d%]) ?[*×] ?(?=\d)")
_LONE_BRACKETS = re.compile(rf"\( ({NUMBER}) \)")
_CURRENCY = re.compile(r"[$£€](?=\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_EMPTY_DECIMALS = re.compile(r"(?<=\d)\.0+(?!\d)")
_TRAILING_ZEROS = re.compile(r"(\.\d*?[1-9])0+(?!\d)")
_REPEATING = re.compile(r"\d+\.\d{10,}")
_HEADING = re.compile(r"\d+\. .*:$")
_BECAUSE = re.compile(r"(.+?) because (\d[^=]*= *[\d.]*\d)\.?$")
_LINE_THEREFORE = re.compile(r"(?:So|Thus|Therefore|Hence)\b")


def read_solution(template: int, chain_of_thought: str, variables: Mapping[str, Any]) -> list[Line]:
    """The lines of a reasoning-gym chain of thought without its final line, equations taken out of the words."""
    text = chain_of_thought.partition("####")[0]
    if template in _REWRITES:
        text = _REWRITES[template](text, variables)
    text = _CURRENCY.sub("", text)
    text = _THOUSANDS.sub("", text)
    text = _EMPTY_DECIMALS.sub("", text)
    if "." in text:
        text = _REPEATING.sub(lambda match: str(Fraction(match[0]).limit_denominator(12)), text)
        text = _TRAILING_ZEROS.sub(r"\1", text)
    lines = []
    for raw in text.split("\n"):
        line = raw.strip().removeprefix("•").removeprefix("- ").strip()
        if line and not _HEADING.match(line) and line != "Let's solve this step by step:":
            lines.append(_read_line(line))
    return lines


def _read_line(line: str) -> Line:
    if " because " in line and (match := _BECAUSE.match(line)):
        claim = match[1]
        if claim.split(" ", 1)[0] in ("On", "The", "Each", "She", "He"):
            claim = claim[0].lower() + claim[1:]
        line = f"{match[2]}, so {claim}"
    parts: Line = []
    end = 0
    for match in _EQUATION.finditer(line):
        equation = _read_equation(match[0], match["result"])
        if equation is None:
            continue
        parts += [line[end : match.start()], equation]
        end = match.end()
    parts.append(line[end:])
    return parts


@lru_cache(maxsize=1 << 16)
def _read_equation(text: str, result: str) -> Equation | None:
    """The equation in canonical notation; None unless its two sides are equal."""
    tokens = _ARITHMETIC.findall(_without_units(text[: text.rindex("=")]))
    tokens = [{"x": "*", "×": "*", "÷": "/"}.get(token, token) for token in tokens]
    spelt: list[str] = []
    for token in tokens:
        if token == "(" and spelt and spelt[-1][-1].isdigit():
            spelt.append("*")
        spelt.append(token)
    percent_result = result.endswith("%")
    number = result.rstrip("%")
    for meaning in _percent_meanings(spelt, percent_result):
        expression = _LONE_BRACKETS.sub(r"\1", " ".join(meaning)).replace("( ", "(").replace(" )", ")")
        try:
            agreement = agrees(expression, number)
        except ValueError:
            return None
        if agreement is not None:
            return Equation(expression, number, percent_result)
    return None


def _without_units(text: str) -> str:
    """Unit words out of an expression: a word (or a /word) that is not the sign x."""
    return re.sub(r"/(?=[A-Za-z])|(?!x )[A-Za-z][A-Za-z'\-]*|(?<=[A-Za-z])-", "", text)


def _percent_meanings(tokens: list[str], percent_result: bool) -> list[list[str]]:
    """What the expression may mean in numbers, the likeliest first."""
    if not any(token.endswith("%") for token in tokens):
        return [[*tokens, "*", "100"], tokens] if percent_result else [tokens]
    bare = [token.rstrip("%") for token in tokens]
    if percent_result:
        return [bare]
    shares: list[str] = []
    for token in tokens:
        shares += [token[:-1], "/", "100"] if token.endswith("%") else [token]
    return [shares]


# --- templates whose own solution hides a step ----------------------------------------------------


def _spell_partial_sum(text: str, variables: Mapping[str, Any]) -> str:
    """Template 1: three numbers are added at once beside an unknown."""
    blocks, animals, rings = (variables[name] for name in ("building_blocks", "stuffed_animals", "stacking_rings"))
    return text.replace(f"{rings} + T = ", f"{rings} + T = {blocks + animals} + {rings} + T = ", 1)


def _spell_complexes(text: str, variables: Mapping[str, Any]) -> str:
    """Template 27: the first line gives a product without its factors."""
    count, each = variables["first_complexes"], variables["apartments_per_complex"]
    return text.replace(f"have {count * each} ", f"have {count} * {each} = {count * each} ", 1)


def _spell_half(text: str, _: Mapping[str, Any]) -> str:
    """Template 55 multiplies by a word."""
    return text.replace("half * ", "1/2 * ")


def _spell_division_by_fraction(text: str, variables: Mapping[str, Any]) -> str:
    """Template 60 divides by a fraction."""
    return re.sub(r"(\d+)÷(\d+)/(\d+)=", r"\1 * \3 / \2 = ", text)


def _spell_minutes(_: str, variables: Mapping[str, Any]) -> str:
    """Template 66 computes in hours with fifteen decimals; the same steps in whole minutes."""
    days = variables["weekdays"]
    first, second, third = variables["hour1"], variables["hour2"], variables["hour3"]
    episode, extra, episodes = variables["min1"], variables["min2"], variables["num_wed_episodes"]
    total = 120 * first + 60 * second + extra + 120 * third + episodes * episode
    hours, minutes = divmod(total, 60)
    after_first = total - 120 * first
    after_second = after_first - 60 * second - extra
    left = after_second - 120 * third
    unknown = days[2][0]
    return (
        f"Let {unknown} be the number of episodes he watched on {days[2]}.\n"
        f"In all he watched {hours} * 60 + {minutes} = {total} minutes of TV.\n"
        f"On {days[0]} and {days[1]} he watched 2 * {first} * 60 = {120 * first} minutes.\n"
        f"That leaves {total} - {120 * first} = {after_first} minutes.\n"
        f"On {days[3]} he watched {second} * 60 + {extra} = {60 * second + extra} minutes.\n"
        f"That leaves {after_first} - {60 * second + extra} = {after_second} minutes.\n"
        f"On {days[4]} he watched 2 * {third} * 60 = {120 * third} minutes.\n"
        f"That leaves {after_second} - {120 * third} = {left} minutes.\n"
        f"Thus, {unknown} = {left} / {episode} = {episodes} episodes."
    )


def _spell_share(text: str, variables: Mapping[str, Any]) -> str:
    """Template 82 writes "54=54"."""
    part = variables["no_response"]
    share = f"{variables['num_emails']} * {variables['no_response_percent']}/100"
    return text.replace(f"{part}={part} ", f"{share} = {part} ", 1)


def _spell_algebra(text: str, variables: Mapping[str, Any]) -> str:
    """Template 83 solves 2x + d = t without writing t - d and its half."""
    total, difference, amount = variables["total_fence"], variables["difference"], variables["amount1"]
    text = text.replace(f"get 2x={2 * amount}", f"get 2x = {total} - {difference} = {2 * amount}")
    text = text.replace(f"leaving x={amount}.", f"leaving x = {2 * amount} / 2 = {amount}.")
    return text.replace(f"2x+{difference}={total}", f"2x + {difference} = {total}")


_REWRITES: dict[int, Callable[[str, Mapping[str, Any]], str]] = {
    1: _spell_partial_sum,
    27: _spell_complexes,
    55: _spell_half,
    60: _spell_division_by_fraction,
    66: _spell_minutes,
    82: _spell_share,
    83: _spell_algebra,
}

# --- writing --------------------------------------------------------------------------------------

_SIMPLE_COMMUTATIVE = re.compile(rf"({NUMBER}) ([+*]) ({NUMBER})$")
_NUMBERS = re.compile(NUMBER)
# A line that opens with one of these, or names "he" and the like first, leans on the line before it.
_DEPENDENT_OPENING = re.compile(
    r"(?:So|Thus|Therefore|Hence|Then|Next|Now|Finally|First|Since|After|Afterwards|Also|This|That|These|Those|Which|Writing"
    r"|All|Altogether|Together|Combined|Combining|Total|Overall|And|But|He|She|They|It|His|Her|Their|Each|Add|Minus|Divide"
    r"|Out|Let|Substituting|Subtracting|We|If|Right|Tomorrow|In total|The (?:total|third|difference|sum|average))\b"
)
_DEPENDENT_WORDS = re.compile(r"\b(?:also|then|left|remain\w*|therefore|thus|total|those|these|again|In total)\b")


def render(lines: list[Line], answer: str, style: Style, rng: Random) -> str:
    """The solution in `style`, its free choices drawn from `rng`, ending in the style's final line."""
    written = []
    for step, line in enumerate(_reorder(lines, rng), start=1):
        text = "".join(
            style.write_words(part) if isinstance(part, str) else _write_equation(part, style, rng) for part in line
        )
        text = _LINE_THEREFORE.sub(style.therefore, text, count=1) if text[0] in "STH" else text
        written.append(style.prefix.format(step=step) + text)
    written.append(style.final.format(answer=answer))
    return "\n".join(written)


def _write_equation(equation: Equation, style: Style, rng: Random) -> str:
    expression = equation.expression
    match = _SIMPLE_COMMUTATIVE.match(expression)
    if match and rng.random() < 0.5:
        expression = f"{match[3]} {match[2]} {match[1]}"
    return write_worked(expression, equation.result, equation.percent, style)


@lru_cache(maxsize=1 << 17)
def write_worked(expression: str, result: str, percent: bool, style: Style) -> str:
    """The worked chain of one equation in `style`; the result as given, with its percent sign."""
    chain = worked(expression, result)
    assert chain is not None, f"{expression} is not {result}"
    return style.write_chain(chain) + ("%" if percent else "")


def _reorder(lines: list[Line], rng: Random) -> list[Line]:
    """The lines with some neighbours exchanged that do not use each other's numbers."""
    ordered = list(lines)
    index = 0
    while index + 1 < len(ordered):
        if _are_independent(ordered[index], ordered[index + 1]):
            if rng.random() < 0.5:
                ordered[index], ordered[index + 1] = ordered[index + 1], ordered[index]
            index += 1
        index += 1
    return ordered


def _are_independent(first: Line, second: Line) -> bool:
    for line in (first, second):
        opening = line[0]
        if not isinstance(opening, str) or not opening or _DEPENDENT_OPENING.match(opening):
            return False
        if any(isinstance(part, str) and _DEPENDENT_WORDS.search(part) for part in line):
            return False
    return not (_results(first) & _used(second) or _results(second) & _used(first))


def _results(line: Line) -> set[str]:
    """What the line establishes: the results of its equations, or all its numbers if it has none."""
    results = {part.result for part in line if isinstance(part, Equation)}
    return results or _used(line)


def _used(line: Line) -> set[str]:
    used: set[str] = set()
    for part in line:
        used.update(_NUMBERS.findall(part if isinstance(part, str) else part.expression))
    return used
