"""Text metrics on hand-written pairs."""

import pytest

from fewstep.tasks.text_metrics import chrf, contains, is_exact, is_same_normalised, normalise


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("  The  Cat.\n", "the cat"),
        ("“Paris!”", "paris"),
        ("**Don’t**", "don't"),
        ("(5)", "5"),
        ("\u22125.", "-5"),  # the Unicode minus
        ("-.5)", "-.5"),
        ("3.5, 1,000", "3.5 1,000"),
        ("$5,", "$5"),
        ("5% C#", "5% c#"),
        ("well-known", "well-known"),
        ("Ａ\u00a0Ｂ", "a b"),  # full-width letters, a no-break space
        ("STRASSE straße", "strasse strasse"),
        ("?! ...", ""),
    ],
)
def test_normalised(text: str, normalised: str) -> None:
    assert normalise(text) == normalised
    assert normalise(normalised) == normalised


def test_exact_forgives_white_space_at_the_ends_alone() -> None:
    assert is_exact(" Paris\n", "Paris")
    assert not is_exact("paris", "Paris")
    assert not is_exact("Paris.", "Paris")


def test_normalised_forgives_case_and_punctuation_and_no_number() -> None:
    assert is_same_normalised("PARIS.", "Paris")
    assert not is_same_normalised("Paris, France", "Paris")
    assert not is_same_normalised("-5", "5")
    assert not is_same_normalised("3.5", "35")


@pytest.mark.parametrize(
    ("text", "answer", "verdict"),
    [
        ("The capital is Paris.", "paris", True),
        ("It is New York, I think.", "New York", True),
        ("New Jersey and York", "New York", False),
        ("a category", "cat", False),
        ("15", "5", False),
        ("-5", "5", False),
        ("it is (5).", "5", True),
        ("答案是北京。", "北京", True),
        ("anything", "", False),
        ("", "Paris", False),
    ],
)
def test_contains_whole_words(text: str, answer: str, verdict: bool) -> None:
    assert contains(text, answer) is verdict


def test_chrf_by_hand() -> None:
    # Orders 1 to 4 of "abcd" against "abce": 3 of 4, 2 of 3, 1 of 2 and 0 of 1, for precision and recall alike.
    assert chrf(["abcd"], ["abce"]) == pytest.approx(100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)
    # Precision of "ab" is 1 in orders 1 and 2, recall 2 of 4 and 1 of 3; the longer orders have no n-gram of "ab".
    recall = (2 / 4 + 1 / 3) / 2
    assert chrf(["ab"], ["abcd"]) == pytest.approx(100 * 5 * recall / (4 + recall))
    assert chrf(["the cat"], ["thecat"]) == pytest.approx(100)
    assert chrf(["xyz"], ["abc"]) == 0
    assert chrf([""], ["abc"]) == 0


def test_chrf_of_a_corpus_adds_up_counts_and_leaves_out_what_a_short_reference_cannot_judge() -> None:
    # Order 1: all 3 characters match. Order 2: 0 of 1.
    assert chrf(["ab", "c"], ["ba", "c"]) == pytest.approx(100 * (3 / 3 + 0 / 1) / 2)
    # Order 1: precision 3 of 4, recall 3 of 3. Order 2 counts the first pair alone, as "c" has no bigram: 1 of 1.
    assert chrf(["ab", "cd"], ["ab", "c"]) == pytest.approx(100 * 5 * (0.875 * 1) / (4 * 0.875 + 1))


def test_chrf_needs_as_many_references_as_texts() -> None:
    for texts, references in (([], []), (["a"], [])):
        with pytest.raises(ValueError, match="a reference for each"):
            chrf(texts, references)
