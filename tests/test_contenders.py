"""Contenders answer the same problems, once each, and their tables say what is known."""

from pathlib import Path
from typing import Any

import pytest

from fewstep.errors import FewstepError
from fewstep.measure.compare import compare_shared
from fewstep.measure.contenders import (
    Contender,
    answer_problems,
    figure,
    load_contenders,
    markdown_table,
    time_contenders,
)
from fewstep.measure.evaluate import Report, evaluate
from fewstep.models.load import save_network
from fewstep.models.tiny import tiny_network
from fewstep.tasks.problems import Problem
from fewstep.tasks.registry import task_named

TASK = task_named("gsm-symbolic")
PROBLEMS = [Problem(str(i), f"{i} + 2 =", str(i + 2)) for i in range(5)]
SHORT = {"max_new_tokens": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the model `causal`."""
    save_network(tiny_network("autoregressive", head_scale=20.0, max_positions=256), tmp_path / "causal")
    return tmp_path


def everyone(folder: Path, **settings: Any) -> list[Contender]:
    model, own = str(folder / "causal"), {**SHORT, **settings}
    return [
        Contender(name="one token", model=model, settings=own),
        Contender(name="jacobi", model=model, settings={**own, "decoder": "jacobi"}, limit=3),
    ]


def reports(folder: Path, contenders: list[Contender], problems: Any = PROBLEMS, **options: Any) -> dict[str, Report]:
    given = {"task": TASK, "batch_size": 2, "shard": 2, **options}
    found = answer_problems(contenders, load_contenders(contenders), {"all": problems}, folder / "answers", **given)
    assert found is not None
    return found["all"]


def test_answers_in_shards_are_those_of_one_evaluation_and_are_given_once(folder: Path) -> None:
    contenders = everyone(folder)
    first = reports(folder, contenders)
    assert {name: (report.n, report.num_kept) for name, report in first.items()} == {
        "one token": (5, 0),
        "jacobi": (3, 0),
    }
    whole = evaluate(load_contenders(contenders)["one token"], PROBLEMS, batch_size=2, **SHORT)
    assert [(r.id, r.num_tokens, r.num_forwards) for r in first["one token"].records] == [
        (r.id, r.num_tokens, r.num_forwards) for r in whole.records
    ]
    assert all(record.text == "" for record in first["jacobi"].records)
    made = {path: path.stat().st_mtime_ns for path in (folder / "answers").glob("*.json")}
    again = reports(folder, contenders)
    assert {name: report.num_kept for name, report in again.items()} == {"one token": 5, "jacobi": 3}
    assert again["jacobi"].records == first["jacobi"].records
    assert made == {path: path.stat().st_mtime_ns for path in (folder / "answers").glob("*.json")}


def test_kept_answers_of_other_weights_settings_or_problems_are_refused(folder: Path) -> None:
    reports(folder, everyone(folder))
    sentence = r"one token--000000\.json keeps a result of other weights or settings \({}"
    with pytest.raises(FewstepError, match=sentence.format("max_new_tokens is 8 there and 9 here")):
        reports(folder, everyone(folder, max_new_tokens=9))
    with pytest.raises(FewstepError, match=sentence.format("batch_size is 2 there and 3 here")):
        reports(folder, everyone(folder), batch_size=3)
    other_answers = [Problem(one.id, one.question, "7") for one in PROBLEMS]
    with pytest.raises(FewstepError, match=sentence.format(r"answers is \w+ there")):
        reports(folder, everyone(folder), other_answers)
    tiny_network("autoregressive", max_positions=256, seed=1).module.save_pretrained(folder / "causal")
    with pytest.raises(FewstepError, match=sentence.format(r".*weights is \w+ there")):
        reports(folder, everyone(folder))


def test_what_cannot_be_is_told_before_anything_long(folder: Path) -> None:
    model = str(folder / "causal")
    for name in ("", "a/b", ".hidden"):
        with pytest.raises(FewstepError, match="cannot name a contender"):
            Contender(name=name, model=model)
    with pytest.raises(FewstepError, match="a name of its own, got a, a"):
        load_contenders([Contender(name="a", model=model)] * 2)
    with pytest.raises(FewstepError, match="takes no draft"):
        load_contenders([Contender(name="a", model=model, settings={"decoder": "jacobi", "draft": "x"})])
    with pytest.raises(FewstepError, match="nothing to answer in all"):
        reports(folder, everyone(folder), [])
    models = load_contenders(everyone(folder))
    assert models["one token"] is models["jacobi"]


def test_all_contenders_are_timed_on_every_prompt(folder: Path) -> None:
    contenders = everyone(folder)
    timings = time_contenders(contenders, load_contenders(contenders), ["1 + 1", "2 + 2"])
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"one token": 2, "jacobi": 2}


def test_two_reports_are_compared_on_the_problems_that_both_answered(folder: Path) -> None:
    found = reports(folder, everyone(folder))
    comparison = compare_shared(found["one token"], found["jacobi"])
    assert comparison is not None
    assert (comparison.first.n, comparison.second.n) == (3, 3)


def test_a_table_has_a_line_for_each_row_and_empty_cells_for_what_is_not_there() -> None:
    columns = {"name": lambda row: row["name"], "ms": figure(".1f", "alone", "ms"), "share": figure(".0%", "share")}
    rows = [{"name": "a", "alone": {"ms": 1.25}, "share": 0.5}, {"name": "b", "alone": None}]
    assert markdown_table(rows, columns) == "| name | ms | share |\n| --- | --- | --- |\n| a | 1.2 | 50% |\n| b |  |  |"
