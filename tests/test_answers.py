"""What number an answer gives, in the styles of our data and in those that models write."""

import sys
import warnings

import pytest

from fewstep.tasks.answers import extract_answer, is_correct


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7\n#### 7", 7),
        ("The answer is 1,250.", 1250),
        ("Answer: 4.5", 4.5),
        ("#### 3\nFinal answer = 9", 9),
        ("so it takes 12 minutes", 12),
        ("The answer is -3.", -3),
        ("no number at all", None),
        ("", None),
        # signs, currencies, markup
        ("#### $18", 18),
        ("#### -$5", -5),
        ("#### $-18 (that is 18 less than 0)", -18),
        ("#### - 7", -7),
        ("#### \u22127", -7),
        ("#### \u20137", -7),
        ("#### 18\u20ac", 18),
        ("#### US$ 1,200", 1200),
        ("The answer is **18**. That is 3 times 6.", 18),
        ("**Answer:** 18\n\nThat took 3 steps.", 18),
        ("**Final Answer**: **18 apples**", 18),
        ("The answer is:\n\n18", 18),
        # one sentence
        ("The answer is $18. She has 3 left over.", 18),
        ("the answer is 18. She has 3.", 18),
        ("The answer is: 18 (found in 2 ways)", 18),
        ("The answer is 18, since 3 are left.", 18),
        ("The answer to problem 2 is 18.", 18),
        ("The answer is 18.", 18),
        ("#### 18.00", 18),
        ("#### 18 km/h", 18),
        ("The answer is 3. The answer is 4.", 4),
        # notations
        ("#### .5", 0.5),
        ("#### -.5", -0.5),
        ("#### 5%", 5),
        ("#### 1/2", 0.5),
        ("#### -1/2", -0.5),
        ("#### 2 1/2", 2.5),
        ("#### 2\u00bd", 2.5),
        ("#### 1/0", None),
        ("#### 3e2", 300),
        ("#### 1.5E-3", 0.0015),
        ("#### 3 \u00d7 10^2", 300),
        ("#### 1,000.50", 1000.5),
        ("#### 1.234.567", 1234567),
        ("#### 1.234,5", 1234.5),
        ("#### 1'234", 1234),
        ("#### 1\u202f234", 1234),
        ("#### 12,34,567", 1234567),
        ("#### 3,5", 3.5),
        # computations, ranges, choices
        ("The answer is 10 - 4 = 6", 6),
        ("#### 6 * 3 = 18", 18),
        ("#### 6 * 3", 18),
        ("#### x = 18", 18),
        ("It takes 5-10 days", 10),
        ("#### 5-10", 10),
        ("The answer is 18 or 20.", None),
        ("#### 3, 4", None),
        ("#### 3 apples and 4 pears", 3),
        # LaTeX
        (r"So \boxed{9{,}500}", 9500),
        (r"So \boxed{9\,500}", 9500),
        (r"\boxed{18} after 3 days", 18),
        (r"The answer is \boxed{18} after 3 days", 18),
        (r"\boxed{\$18.50}", 18.5),
        (r"\boxed{\frac{1}{2}}", 0.5),
        (r"\boxed{-\dfrac12}", -0.5),
        (r"\boxed{2\frac{1}{2}}", 2.5),
        (r"\boxed{x = 18}", 18),
        (r"\boxed{18\text{ apples}}", 18),
        (r"The answer is \(18\).", 18),
        (r"The answer is $\frac{3}{4}$.", 0.75),
        (r"\boxed{9^{9^{9^9}}}", None),
        (r"\boxed{" + "{" * 3000, None),
    ],
)
def test_extract_answer(text: str, number: float | None) -> None:
    assert extract_answer(text) == number


def test_answers_are_compared_as_numbers() -> None:
    assert is_correct("#### 36", "36.0")
    assert is_correct("#### 36.0", 36)
    assert is_correct("#### 1,200", "1200")
    assert not is_correct("#### 36", "37")
    assert not is_correct("nothing", "0")
    assert not is_correct("#### 1/2", "1")
    assert not is_correct("#### 1234568", "1234567")  # integers exactly, however large
    assert is_correct("#### 0.3333333", str(1 / 3))
    assert is_correct("#### 12345678901234567891", "12,345,678,901,234,567,891")
    assert not is_correct("The answer is 18 or 20.", "18")


@pytest.mark.parametrize(
    ("latex", "number"), [(r"\sqrt{16}", 4), ("2^{10}", 1024), (r"\frac{3+1}{2}", 2), (r"\sqrt{x}", None)]
)
def test_other_latex_is_read_by_math_verify(latex: str, number: float | None) -> None:
    pytest.importorskip("math_verify")
    assert extract_answer(rf"So \boxed{{{latex}}} it is, in 3 steps") == number


def test_without_math_verify_other_latex_counts_as_no_answer_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.warns(UserWarning, match="only math-verify reads, so it counts as no answer; install it with"):
        assert extract_answer(r"So \boxed{\sqrt{16}}") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extract_answer(r"So \boxed{\frac{1}{2}}") == 0.5


def test_long_texts_are_read_in_no_time() -> None:
    for part in ("1,", "- ", "1 ", "####", "\\boxed{", "\\frac{1}", "answer to ", "1/", "9'", ".5,"):
        extract_answer(part * 5000)
