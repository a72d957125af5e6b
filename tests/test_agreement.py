"""Hand-worked agreement of answers."""

from dataclasses import replace

import pytest
from helpers.networks import lively

from fewstep.decode.requests import Record
from fewstep.engine.language_model import LanguageModel
from fewstep.measure.agreement import common_prefix, margins, measure_agreement, similarity


@pytest.mark.parametrize(
    ("answer", "reference", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.5),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([1, 2, 3, 4], [1, 2], 1.0),
        ([9, 2], [1, 2], 0.0),
        ([], [1], 0.0),
        ([1], [], 1.0),
    ],
)
def test_the_common_prefix_is_a_share_of_the_reference(answer: list[int], reference: list[int], share: float) -> None:
    assert common_prefix(answer, reference) == share


@pytest.mark.parametrize(
    ("answer", "reference", "ratio"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3], [4, 5, 6], 0.0),
        ([1, 2, 3, 4], [2, 3, 4, 5], 0.75),  # 2 3 4, moved by one
        ([1, 2], [1, 2, 3, 4], 2 / 3),
        ([], [], 1.0),
    ],
)
def test_similarity_forgives_what_is_moved(answer: list[int], reference: list[int], ratio: float) -> None:
    assert similarity(answer, reference) == pytest.approx(ratio)


def test_no_token_is_too_frequent_to_count() -> None:
    """difflib's own habit is to leave out what is frequent in 200 items and more."""
    assert similarity([7] * 300, [7] * 300) == 1.0


def test_agreement_is_a_mean_over_answers_of_any_sequence_type() -> None:
    found = measure_agreement([(1, 2, 3), (1, 2, 3, 4)], [[1, 2, 3], [2, 3, 4, 5]])
    assert found.to_json() == {
        "n": 2,
        "identical": 0.5,
        "identical_ci95": [found.identical.low, found.identical.high],
        "common_prefix": 0.5,
        "similarity": 0.875,
    }
    assert 0 < found.identical.low < 0.5 < found.identical.high < 1


def test_every_answer_needs_a_reference() -> None:
    for answers, references in (([], []), ([[1]], [])):
        with pytest.raises(ValueError, match="a reference for each answer"):
            measure_agreement(answers, references)


def test_margins_are_differences_of_log_probability_where_texts_part() -> None:
    lm = LanguageModel(lively("autoregressive"))
    prompts = ["ab", "cd", "ef"]
    expected = lm.generate(prompts, max_new_tokens=5, record=Record(top_k=4), early_stop=False)
    top = expected[0].top_k
    assert top is not None
    ids = expected[0].token_ids
    second = int(top.ids_GK[3, 1])
    other = [
        replace(expected[0], token_ids=[*ids[:3], second, ids[4]]),
        expected[1],
        replace(expected[2], token_ids=expected[2].token_ids[:2]),
    ]
    (found,) = margins(lm, prompts, other, expected)
    assert found == pytest.approx(float(top.log_probs_GK[3, 0] - top.log_probs_GK[3, 1]), abs=1e-4)
