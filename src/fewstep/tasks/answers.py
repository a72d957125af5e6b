"""The number that an answer gives, and whether it is the right one.

**Where.** In the last final line of any style (`#### 18`, `The answer is $18. She has 3 left.`, `**Answer:** 18`,
`Final answer = 18`, `\\boxed{18}`), and without any in the last number of the text.

**What.** Of a final line the first number, or what stands behind the equals sign of a computation. Signs (also the
Unicode minus), currencies before or behind the sign, thousands separators, decimals without a leading zero, exponents,
fractions and mixed numbers are read as they are meant; a percentage counts as the number before the sign. A range is
read as its end. A final line that leaves the choice between numbers (`18 or 20`) gives none.

LaTeX beyond fractions is read by math-verify (extra `eval`); without it such an answer counts as none, with a warning.
"""

import re
import warnings
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from math import isfinite
from typing import Any

from fewstep.tasks.worked_arithmetic import NotWorkableError, evaluate

_MINUS = dict.fromkeys(map(ord, "−﹣－"), "-")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8", "⅙": "1/6"}
_VULGAR_FRACTION = re.compile(rf"(?<=\d) ?([{''.join(_VULGAR)}])|([{''.join(_VULGAR)}])")

_GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,3}(?:['’\u00a0\u202f\u2009_]\d{3})+(?!\d)(?:[.,]\d+)?"
_INDIAN = r"\d{1,2}(?:,\d{2})+,\d{3}(?!\d)(?:\.\d+)?"
_CONTINENTAL = r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}(?!\d)"
_COMMA_DECIMAL = r"\d+,\d{1,2}(?![\d,]|\.\d)"
_PLAIN = r"\d+(?:\.\d+)?|\.\d+"
_DIGITS = rf"(?:{_CONTINENTAL}|{_INDIAN}|{_GROUPED}|{_COMMA_DECIMAL}|{_PLAIN})"
_CURRENCY = r"(?:(?:US|A|C)?\$|[£€¥₹]|USD|EUR|GBP)"
_NUMBER = re.compile(
    rf"(?:(?P<sign>(?<![\w)\]}}.%$])[-+]))?(?:{_CURRENCY} ?(?P<inner>-)?)?"
    rf"(?P<digits>(?<![\d.]){_DIGITS})(?P<exponent>[eE][-+]?\d{{1,3}}(?![\w.])|(?: ?[x×*] ?10\^\{{?-?\d{{1,3}}\}}?))?"
    r"(?:(?P<mixed> \d+)?/(?P<bottom>\d+)(?!\d|[/.]\d))?"
)
_MARKER = re.compile(
    r"####|\\boxed\s*\{|\\boxed (?=\d)|\banswers?\b[*_]*(?:\s+to\b[^.\n]{0,80}?)?(?:\s+is\b|\s*[:=])[:*_]*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|[*_\"')\]]*\s|$)|,\s+(?=[A-Za-z])|;|(?<=\d) ?\((?!\d)|\n")
_EQUATION = re.compile(r"^[^=]*[=≈]\s*(?P<right>[^=]*)$", re.DOTALL)
_CHOICE = re.compile(r"\s*(?:or\b|and\b|,)\s*")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_CHAIN = re.compile(r"[-+*/×÷=]\s*$")
_LATEX = re.compile(r"\\[A-Za-z]+|\^|_\{")
_MOST_LATEX = 200  # characters that math-verify is asked to parse


def extract_answer(text: str) -> float | None:
    """The number that the text gives as its answer, or None; see the module."""
    number = _answer(text)
    return None if number is None else float(number)


def is_correct(text: str, answer: str | float) -> bool:
    """Whether the answer of `text` equals `answer` as a number: integers exactly, others to a millionth part."""
    given = _answer(text)
    wanted = Fraction(answer.replace(",", "").strip()) if isinstance(answer, str) else Fraction(answer)
    if given is None:
        return False
    if given.denominator == wanted.denominator == 1:
        return given == wanted
    return abs(given - wanted) <= Fraction(1, 10**6) * max(Fraction(1), abs(wanted))


def _answer(text: str) -> Fraction | None:
    text = _plain(text)
    for marker in reversed(list(_MARKER.finditer(text))):
        is_boxed = marker[0].startswith("\\boxed")
        line = _braced(text, marker.end()) if is_boxed and marker[0].endswith("{") else text[marker.end() :].lstrip()
        if not is_boxed and _MARKER.match(line):
            continue
        found = _of_final_line(line, is_boxed=is_boxed)
        if found:
            return found[0]
    for match in reversed(list(_NUMBER.finditer(text))):
        before, after = text[max(0, match.start() - 3) : match.start()], text[match.end() : match.end() + 1]
        if match["bottom"] is not None and (_CHAIN.search(before) or after == "="):
            return Fraction(int(match["bottom"]))  # not a fraction, but the end of a computation that was cut
        if (number := _value(match)) is not None:
            return number
    return None


def _plain(text: str) -> str:
    """Without what only sets type; LaTeX commands that write numbers as plain text writes them."""
    text = text.translate(_MINUS).replace("\u2044", "/")
    text = _VULGAR_FRACTION.sub(lambda match: " " + _VULGAR[match[1]] if match[1] else _VULGAR[match[2]], text)
    text = re.sub(r"(?<!\d)–(?=[\d$£€.])", "-", text)
    if "\\" in text or "{,}" in text:
        text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
        text = re.sub(r"(?<=\d)\\[,;!: ](?=\d{3})", ",", text)
        text = re.sub(r"\\(?:left|right|displaystyle|[,;!:()\[\]])(?![A-Za-z])", "", text)
        text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r" \1 ", text)
        text = re.sub(r"(?<=\d)\\[dt]?frac", r" \\frac", text)
        text = _FRACTION.sub(r"\g<1>\g<2>/\g<3>\g<4>", text)
        text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "*", text)
    return re.sub(r"\*\*|__|`", "", text)


def _braced(text: str, start: int) -> str:
    """What stands between a brace before `start` and the one that closes it."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return text[start:]


def _of_final_line(line: str, *, is_boxed: bool) -> list[Fraction | None]:
    """The number of a final line in a list, [None] if the line leaves a choice, [] if it holds none."""
    if not is_boxed and line.startswith("("):
        line = line[1:]
    if not is_boxed:
        line = _SENTENCE_END.split(line, maxsplit=1)[0]
    if is_boxed and _LATEX.search(line):
        return [_read_latex(line)]
    line = line.strip(" *_$:") if is_boxed else line.strip(" *_:")
    line = re.sub(r"^([-+]) (?=\S)", r"\1", line)
    computed = _EQUATION.match(line)
    if computed and _NUMBER.search(computed["right"]):
        line = computed["right"].strip()
    else:
        value = _computed(line)
        if value is not None:
            return [value]
    matches = [match for match in _NUMBER.finditer(line) if _value(match) is not None]
    if not matches:
        return []
    first, *others = matches
    if others and _range(line, first, others[0]):
        return [_value(others[0])]
    if others and _leaves_choice(line, matches):
        return [None]
    return [_value(first)]


def _computed(line: str) -> Fraction | None:
    """The value of a line that is a computation with spaces about its signs, such as `6 * 3`."""
    chain = re.sub(r"[×·]", "*", line.rstrip(" .")).replace("÷", "/").replace("$", "").replace(",", "")
    if not re.fullmatch(r"\d+(?:\.\d+)?(?: [-+*/] \d+(?:\.\d+)?)+", chain):
        return None
    try:
        return Fraction(evaluate(chain))
    except (NotWorkableError, ZeroDivisionError, ValueError):
        return None


def _range(line: str, first: re.Match[str], second: re.Match[str]) -> bool:
    between = line[first.end() : second.start("digits")]
    return re.fullmatch(r"\s*(?:-|–|to)\s*" + f"{_CURRENCY}?", between) is not None


def _leaves_choice(line: str, matches: list[re.Match[str]]) -> bool:
    """Whether the numbers stand side by side with nothing but `or`, `and` or commas between, to the end of the line."""
    between = [line[one.end() : two.start()] for one, two in pairwise(matches)]
    if re.fullmatch(r"\s*or\s*", between[0]):
        return True
    return all(_CHOICE.fullmatch(gap) for gap in between) and not re.search(r"\w", line[matches[-1].end() :])


def _value(match: re.Match[str]) -> Fraction | None:
    """None for a fraction that has none."""
    digits, bottom = match["digits"], match["bottom"]
    mantissa = _decimal(digits)
    if bottom is not None:
        if int(bottom) == 0:
            return None
        mixed = match["mixed"]
        mantissa = mantissa / int(bottom) if mixed is None else mantissa + Fraction(int(mixed), int(bottom))
    if match["exponent"]:
        mantissa *= Fraction(10) ** int(re.findall(r"-?\d+", match["exponent"])[-1])
    return -mantissa if (match["sign"] == "-") != (match["inner"] == "-") else mantissa


def _decimal(digits: str) -> Fraction:
    digits = re.sub(r"['’_\s]", "", digits)
    if re.fullmatch(_CONTINENTAL, digits):
        digits = digits.replace(".", "").replace(",", ".")
    elif re.fullmatch(_COMMA_DECIMAL, digits):
        digits = digits.replace(",", ".")
    return Fraction(digits.replace(",", ""))


def _read_latex(content: str) -> Fraction | None:
    """The number that a LaTeX expression is, read by math-verify; None if it is none, or too large to be worked out."""
    if len(content) > _MOST_LATEX or content.count("^") > 1 or "!" in content:
        return None
    try:
        from math_verify import LatexExtractionConfig, parse
    except ImportError:
        warnings.warn(
            "an answer is written in LaTeX, which only math-verify reads, so it counts as no answer; install it with: "
            "pip install 'fewstep[eval]'",
            stacklevel=2,
        )
        return None
    for parsed in _expressions(parse, content, LatexExtractionConfig()):
        if getattr(parsed, "is_number", False) and getattr(parsed, "is_real", False):
            number = float(parsed.evalf())
            return Fraction(number).limit_denominator(10**12) if isfinite(number) else None
    return None


def _expressions(parse: Any, content: str, config: Any) -> Iterator[Any]:
    # Its time limit is a signal, which only the main thread can have; the limits above bound the work.
    yield from parse(
        f"\\boxed{{{content}}}", extraction_config=[config], fallback_mode="no_fallback", parsing_timeout=None
    )
