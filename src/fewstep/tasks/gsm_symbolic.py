"""The task gsm-symbolic: chain-of-thought word problems made by reasoning-gym (GSM-Symbolic, arXiv 2410.05229).

**Splits.** A problem's *signature* is its template and all numbers in its question, in order; names and things do not
count. A hash of the signature sends it to development, test or training for good, so no test problem shares its
template and numbers with any training example, however many are drawn. Ten templates never occur in training; their
problems form the split `heldout`. Problem seeds also lie apart: development 800,000,000, test 900,000,000, held-out
templates 950,000,000. A shorter list of problems is always the beginning of a longer one.

Making problems and training rows needs the extra `gsm`; reading the bundled problems does not.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

from fewstep.errors import FewstepError
from fewstep.tasks.gsm_solutions import STYLES, Equation, Line, Style, read_solution, render
from fewstep.tasks.problems import Problem, read_problems, write_problem_file
from fewstep.tasks.task import Task
from fewstep.tasks.worked_arithmetic import NotWorkableError, evaluate, format_number

Split = Literal["dev", "test", "heldout"]
PROBLEM_SEEDS: dict[Split, int] = {"dev": 800_000_000, "test": 900_000_000, "heldout": 950_000_000}
BUNDLED_COUNTS: dict[Split, int] = {"dev": 1000, "test": 1000, "heldout": 500}

HELD_OUT_SEED = 2410_05229  # the paper's number; the templates below are Random(seed).sample(all templates, 10), sorted
HELD_OUT_TEMPLATES: frozenset[int] = frozenset((14, 15, 18, 28, 36, 51, 75, 85, 88, 93))

INSTRUCTION = " Give the result as your final answer. Do not include units."
PROMPTS_WITH_INSTRUCTION = 0.9
DRILL_FRACTION = 0.15

_NUM_BUCKETS = 16
_BUCKET_OF: dict[Split, int] = {"dev": 0, "test": 1}
_MAX_TRIES = 400  # draws from one template before another is chosen: small templates run out of new questions
_QUESTION_NUMBER = re.compile(r"\d+(?:[.,/]\d+)*")

Generator = Callable[[Random, float], dict[str, Any]]
Fits = Callable[[str, str], bool]


# --- problems -------------------------------------------------------------------------------------


def problems(split: Split, n: int | None = None) -> list[Problem]:
    """The first `n` bundled problems of a split, all of them by default. FewstepError if there are fewer."""
    name = f"bundled/gsm-symbolic/{split}.jsonl"
    with resources.as_file(resources.files("fewstep").joinpath(name)) as path:
        found = read_problems(path, split=split)
    if n is not None and n > len(found):
        raise FewstepError(
            f"{n} problems of {split!r} were asked for, {len(found)} are bundled; make more with make_problems."
        )
    return found[:n]


class GSMSymbolic(Task):
    """The bundled problems."""

    name = "gsm-symbolic"
    about = "word problems of GSM-Symbolic; they ship with the package"
    splits = ("test", "dev", "heldout")

    def read(self, split: str | None, n: int | None, data: Path | None) -> list[Problem]:
        """See `problems`."""
        return problems(cast(Split, split), n)


TASK = GSMSymbolic()


def write_problem_files(folder: Path) -> None:
    """Make the bundled problem files dev.jsonl, test.jsonl and heldout.jsonl in `folder`."""
    for split, count in BUNDLED_COUNTS.items():
        write_problem_file(folder / f"{split}.jsonl", make_problems(split, count))


def kept_problems(split: Split, n: int, folder: Path) -> list[Problem]:
    """The first `n` problems: the bundled ones or, if there are fewer, those of the file SPLIT.jsonl in `folder`, which
    is made if it holds too few.
    """
    if n <= BUNDLED_COUNTS[split]:
        return problems(split, n)
    path = folder / f"{split}.jsonl"
    if not path.exists() or len(read_problems(path)) < n:
        write_problem_file(path, make_problems(split, n))
    return read_problems(path, split=split)[:n]


def make_problems(split: Split, n: int) -> list[Problem]:
    """`n` distinct problems of a split, templates drawn evenly; the same first ones for any larger `n`.

    Attempt i draws from ``Random(seed + i)`` with the split's seed, as a reasoning-gym set does.
    """
    held_out = split == "heldout"
    templates = sorted(HELD_OUT_TEMPLATES) if held_out else training_templates()
    seed = PROBLEM_SEEDS[split]
    choose = Random(seed)
    made: list[Problem] = []
    seen: set[str] = set()
    attempt = 0
    while len(made) < n:
        template = choose.choice(templates)
        generate = generators()[template]
        for _ in range(_MAX_TRIES):
            example = generate(Random(seed + attempt), 1.0)
            attempt += 1
            question = example["question"]
            if question not in seen and (held_out or bucket(template, question) == _BUCKET_OF[split]):
                seen.add(question)
                answer = plain_number(example["answer"])
                made.append(Problem(f"{split}-{len(made):05d}", question + INSTRUCTION, answer, template, split))
                break
    return made


def signature(template: int, question: str) -> str:
    """The template and all numbers of the question in order."""
    return f"{template}:" + " ".join(_QUESTION_NUMBER.findall(question.removesuffix(INSTRUCTION)))


def bucket(template: int, question: str) -> int:
    """0 to 15 from a hash of the signature: 0 is development, 1 is test, the others are training."""
    return blake2b(signature(template, question).encode(), digest_size=1).digest()[0] % _NUM_BUCKETS


def plain_number(text: str) -> str:
    """The number as it is written in answers: "36.0" -> "36", "4.50" -> "4.5"."""
    value = float(text)
    return str(int(value)) if value == int(value) else str(value)


# --- templates ------------------------------------------------------------------------------------


@cache
def generators() -> dict[int, Generator]:
    """The generator of each template in use. FewstepError without reasoning-gym."""
    try:
        from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic
    except ImportError:
        raise FewstepError("Making GSM-Symbolic problems needs reasoning-gym: pip install 'fewstep[gsm]'.") from None
    config = gsm_symbolic.GSMSymbolicDatasetConfig(seed=0, size=1)
    every: dict[int, Generator] = gsm_symbolic.GSMSymbolicDataset(config).generators
    return {template: every[template] for template in gsm_symbolic.tasks_ok}


@cache
def training_templates() -> list[int]:
    """All templates but the held-out ones, in order."""
    return sorted(set(generators()) - HELD_OUT_TEMPLATES)


# --- training rows --------------------------------------------------------------------------------


def training_rows(
    seed: int, n: int | None = None, *, drill_fraction: float = DRILL_FRACTION, fits: Fits | None = None
) -> Iterator[dict[str, str]]:
    """`n` rows (endlessly many for None) ``{"prompt", "completion", "kind"}``, a function of `seed` alone.

    kind is "cot" (a problem and its solution) or "drill" (one computation as it stands in the solutions, with other
    numbers). No problem has the signature of a development or test problem. `fits(prompt, completion)` may refuse rows,
    for instance those that are too long. Different seeds, one for each worker, give independent streams.
    """
    rng = Random(f"gsm-symbolic training {seed}")
    pool: list[str] = []  # the latest expressions met in solutions, which drills vary
    made = 0
    while n is None or made < n:
        if pool and rng.random() < drill_fraction:
            row = _drill(rng, pool)
        else:
            row = _solved_problem(rng, pool)
        if fits is None or fits(row["prompt"], row["completion"]):
            made += 1
            yield row


def _solved_problem(rng: Random, pool: list[str]) -> dict[str, str]:
    question, answer, lines = _draw_training_example(rng)
    for line in lines:
        for part in line:
            if isinstance(part, Equation):
                if len(pool) < _POOL_SIZE:
                    pool.append(part.expression)
                else:
                    pool[int(rng.random() * _POOL_SIZE)] = part.expression
    if rng.random() < PROMPTS_WITH_INSTRUCTION:
        question += INSTRUCTION
    return {"prompt": question, "completion": render(lines, answer, _any_style(rng), rng), "kind": "cot"}


def _any_style(rng: Random) -> Style:
    return STYLES[int(rng.random() * len(STYLES))]


def _draw_training_example(rng: Random) -> tuple[str, str, list[Line]]:
    templates = training_templates()
    while True:
        template = templates[int(rng.random() * len(templates))]
        example = generators()[template](rng, 1.0)
        question = example["question"]
        if bucket(template, question) not in _BUCKET_OF.values():
            metadata = example["metadata"]
            lines = read_solution(template, metadata["answer_cot"], metadata["variables"])
            return question, plain_number(example["answer"]), lines


# --- drills ---------------------------------------------------------------------------------------

_POOL_SIZE = 1024
_SAME_NUMBERS = 0.1
_EASY_CHARACTERS = 10  # "12 * 3" and "36": most of what the solutions compute, and soon learnt
_SKIP_EASY = 0.6
_DRILL_TRIES = 8
_MAX_DRILL_DECIMALS = 2
_PLAIN_DIVISION = re.compile(r"(\d+) / (\d+)")
_SHARE_OF = re.compile(r"(\d+) / (\d+) \* (\d+)")
_VARIABLE_NUMBER = re.compile(r"(?<!/ )(?<![\d.])\d+(?:\.\d+)?(?![\d.])")  # a divisor stays: it is a 100 or a unit
_CONSTANTS = frozenset(("0.5", "0.25", "0.75", "7", "12", "60", "100"))  # common enough to be practised as they are


def _drill(rng: Random, pool: list[str]) -> dict[str, str]:
    source = pool[int(rng.random() * len(pool))]
    expression, result = source, _finite_result(source)
    if result is None or rng.random() >= _SAME_NUMBERS:
        for _ in range(_DRILL_TRIES):
            varied = _vary(source, rng)
            varied_result = _finite_result(varied)
            if varied_result is not None:
                expression, result = varied, varied_result
                break
    if result is None:  # a source that does not come out even, such as 899.25 / 1.15
        return _solved_problem(rng, pool)
    if len(result) + len(expression) < _EASY_CHARACTERS and rng.random() < _SKIP_EASY:
        return _drill(rng, pool)
    style = _any_style(rng)
    asked = _any_style(rng).write_chain(expression)
    return {
        "prompt": f"Compute {asked}.",
        "completion": render([["", Equation(expression, result)]], result, style, rng),
        "kind": "drill",
    }


def _finite_result(expression: str) -> str | None:
    """The value as a decimal number of at most two decimals; None if it is none."""
    try:
        result = format_number(evaluate(expression))
    except (ZeroDivisionError, NotWorkableError):
        return None
    return result if len(result.partition(".")[2]) <= _MAX_DRILL_DECIMALS else None


def _vary(expression: str, rng: Random) -> str:
    """The same expression with other numbers of as many digits; divisions that came out even still do."""
    if match := _PLAIN_DIVISION.fullmatch(expression):
        top, bottom = int(match[1]), int(match[2])
        if bottom and top % bottom == 0:
            divisor, quotient = int(_vary_number(match[2], rng)), int(_vary_number(str(top // bottom), rng))
            return f"{divisor * quotient} / {divisor}"
    if match := _SHARE_OF.fullmatch(expression):
        first, bottom, last = (int(text) for text in match.groups())
        if last == 100:  # how many per cent is one of the other
            whole = int(_vary_number(str(max(bottom // 20, 1)), rng)) * 20
            return f"{whole * rng.randrange(5, 100, 5) // 100} / {whole} * 100"
        if bottom and last % bottom == 0:
            divisor = int(_vary_number(match[2], rng))
            quotient = int(_vary_number(str(last // bottom), rng))
            return f"{_vary_number(match[1], rng)} / {divisor} * {divisor * quotient}"
        return f"{first} / {bottom} * {bottom * int(_vary_number(str(max(last // bottom, 1)), rng))}"
    return _VARIABLE_NUMBER.sub(lambda match: _vary_number(match[0], rng), expression)


def _vary_number(text: str, rng: Random) -> str:
    """A number with as many significant digits, zeros behind them and decimals as `text`."""
    if text in _CONSTANTS and rng.random() < 0.5:
        return text
    whole, point, decimals = text.partition(".")
    digits = whole + decimals
    significant = digits.strip("0")
    if not significant:
        return text
    lead = digits.index(significant)
    low = 10 ** (len(significant) - 1)
    varied = low + int(rng.random() * 9 * low)
    if varied % 10 == 0:
        varied += 1 + int(rng.random() * 9)
    digits = digits[:lead] + str(varied) + digits[lead + len(significant) :]
    return digits[: len(whole)] + point + digits[len(whole) :]
