"""How well sentences are restored, and how a table tells it."""

import pytest

from fewstep.measure.contenders import markdown_table, with_interval
from fewstep.measure.restoration import restoration
from fewstep.tasks.problems import Problem

PROBLEMS = [Problem("1", "teh snow", "the snow"), Problem("2", "a house", "a house"), Problem("3", "a rivr", "a river")]


def test_sentences_with_errors_and_those_without_are_told_apart() -> None:
    left = restoration([problem.last_turn for problem in PROBLEMS], PROBLEMS)
    assert (left["n"], left["percent_of_wrong"], left["percent_of_right"], left["difference"]) == (3, 0, 100, None)
    found = restoration(["the  snow", "a mouse", "a river"], PROBLEMS, left["right"])
    assert found["right"] == [True, False, True]
    assert (found["percent_of_wrong"], found["percent_of_right"]) == (100, 0)
    assert found["difference"][0] == pytest.approx(1 / 3)
    assert restoration(["a house"], PROBLEMS[1:2])["percent_of_wrong"] is None


def test_a_cell_has_an_estimate_and_its_interval_or_is_empty() -> None:
    rows = [{"share": [0.5, 0.25, 0.75]}, {"share": None}]
    assert markdown_table(rows, {"%": with_interval("+.1f", "share", 100)}).splitlines()[2:] == [
        "| +50.0 (+25.0 to +75.0) |",
        "|  |",
    ]
