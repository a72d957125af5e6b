"""Tasks by name: their problems, what a right answer is, and what is refused in one sentence."""

from pathlib import Path
from typing import Any

import pytest
from helpers.files import write_lines

from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.measure.evaluate import evaluate, sweep
from fewstep.measure.reports import merge_reports, report_columns
from fewstep.models.tiny import tiny_network
from fewstep.tasks.answers import extract_answer, is_correct
from fewstep.tasks.gsm_symbolic import problems
from fewstep.tasks.problems import Problem, read_problems, write_problem_file
from fewstep.tasks.registry import TASKS, task_named
from fewstep.tasks.scoring import METRICS

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    for split, first in (("train", 1000), ("test", 2000)):
        write_lines(
            tmp_path / f"{split}.jsonl",
            *(
                {"question": f"{i} + 1?", "answer": f"<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1:,}"}
                for i in range(first, first + 3)
            ),
        )
    return tmp_path


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_task_bears_the_name_that_it_is_found_by(name: str) -> None:
    task = task_named(name)
    assert task.name == name
    assert task.about
    assert task.metric.name in task.metrics
    assert set(task.metrics) <= set(METRICS)


def test_the_docs_list_every_task_and_metric() -> None:
    text = (REPOSITORY / "docs" / "tasks.md").read_text(encoding="utf-8")
    for task in map(task_named, TASKS):
        splits = ", ".join(f"`{split}`" for split in task.splits) or "-"
        assert f"| `{task.name}` | {task.about} | {task.reads or '-'} | {splits} |" in text
    for metric in METRICS.values():
        assert f"| `{metric.name}` | {metric.about} |" in text


def test_a_new_task_is_one_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sums_task.py").write_text(
        "from fewstep.tasks.problems import Problem\n"
        "from fewstep.tasks.task import Task\n"
        "class Sums(Task):\n"
        "    name, about = 'sums', 'sums of two numbers'\n"
        "    def read(self, split, n, data):\n"
        "        return [Problem(str(i), f'{i} + 1 =', str(i + 1)) for i in range(n or 9)]\n"
        "TASK = Sums()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(TASKS, "sums", "sums_task")
    task = task_named("sums")
    assert task.problems(n=2) == [Problem("0", "0 + 1 =", "1"), Problem("1", "1 + 1 =", "2")]
    assert task.is_correct("so it is 1.0", "1")
    assert task.extract("#### 1,200") == 1200


def test_an_unknown_task_split_or_metric_is_told_with_what_there_is() -> None:
    with pytest.raises(FewstepError, match="'gsm8l'; did you mean 'gsm8k'"):
        task_named("gsm8l")
    with pytest.raises(FewstepError, match="'tset'; did you mean 'test'"):
        task_named("gsm-symbolic").problems("tset")
    with pytest.raises(FewstepError, match="'exakt' is no metric; did you mean 'exact'"):
        task_named("jsonl").judged_by("exakt")
    with pytest.raises(FewstepError, match="metric must be number"):
        task_named("gsm8k").judged_by("exact")


# --- gsm-symbolic ---------------------------------------------------------------------------------


def test_gsm_symbolic_by_name_is_the_bundled_problems() -> None:
    task = task_named("gsm-symbolic")
    assert task.problems(n=5) == problems("test", 5)
    assert task.problems("heldout") == problems("heldout")
    assert (task.metric.is_correct, task.metric.extract) == (is_correct, extract_answer)
    with pytest.raises(FewstepError, match="ship with the package"):
        task.problems(data=Path("own.jsonl"))


# --- gsm8k ----------------------------------------------------------------------------------------


def test_gsm8k_reads_a_split_of_its_folder_or_one_file(gsm8k: Path) -> None:
    task = task_named("gsm8k")
    assert task.problems(data=gsm8k) == [
        Problem(f"gsm8k-test-000{i}", f"{2000 + i} + 1?", str(2001 + i)) for i in range(3)
    ]
    assert task.problems("train", 1, data=gsm8k) == [Problem("gsm8k-train-0000", "1000 + 1?", "1001")]
    assert task.problems(n=1, data=gsm8k / "train.jsonl") == task.problems("train", 1, data=gsm8k)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "1 + 1?", "answer": "it is two"}, "'gsm8k-test-0000'.*'it is two'; give a number"),
        ({"question": "1 + 1?", "answer": 2}, "'gsm8k-test-0000': the answer must be text"),
        ({"question": None, "answer": "#### 2"}, "'gsm8k-test-0000': the question must be text"),
        ({"question": "1 + 1?"}, "no field 'answer'"),
    ],
)
def test_a_row_that_is_none_of_gsm8k_is_named(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", row)
    with pytest.raises(FewstepError, match=told):
        task_named("gsm8k").problems(data=tmp_path)


def test_gsm8k_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="data must be given for the task gsm8k: the folder"):
        task_named("gsm8k").problems()
    with pytest.raises(FewstepError, match=r"could not read .*train\.jsonl"):
        task_named("gsm8k").problems("train", data=tmp_path)
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(FewstepError, match="holds no problems"):
        task_named("gsm8k").problems(data=tmp_path)
    with pytest.raises(FewstepError, match="split must be left out"):
        task_named("gsm8k").problems("test", data=tmp_path / "test.jsonl")


# --- jsonl ----------------------------------------------------------------------------------------


def test_a_problem_file_with_an_answer_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"id": "a", "question": "How many?", "answer": "many"}\n')
    with pytest.raises(FewstepError, match="'many'"):
        read_problems(path)
    path.write_text("")
    with pytest.raises(FewstepError, match="no problems"):
        read_problems(path)
    path.write_text('{"id": 1, "question": "How many?", "answer": 1200.5}\n')
    assert read_problems(path) == [Problem("1", "How many?", "1200.5")]


def test_problems_of_ones_own_keep_texts_conversations_and_ids(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The capital of France?"}]
    path = write_lines(
        tmp_path / "own.jsonl",
        {"messages": turns, "answer": "Paris"},
        {"id": "two", "question": "1 + 1?", "answer": 2},
    )
    task = task_named("jsonl").judged_by("contains")
    found = task.problems(data=path)
    assert [(problem.id, problem.last_turn, problem.answer) for problem in found] == [
        ("1", "The capital of France?", "Paris"),
        ("two", "1 + 1?", "2"),
    ]
    assert found[0].question == turns
    assert task.problems(n=1, data=path) == found[:1]
    with pytest.raises(FewstepError, match="data must be given"):
        task.problems()
    with pytest.raises(FewstepError, match="split must be left out"):
        task.problems("dev", data=path)


@pytest.mark.parametrize("answer", ["", " ?! ", True, ["Paris"]])
def test_an_answer_without_a_word_is_refused(answer: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "own.jsonl", {"question": "The capital of France?", "answer": answer})
    with pytest.raises(FewstepError, match="line 1: the answer"):
        task_named("jsonl").judged_by("exact").problems(data=path)


def test_a_written_problem_file_reads_the_same(tmp_path: Path) -> None:
    made = problems("dev", 3)
    write_problem_file(tmp_path / "dev.jsonl", made)
    assert read_problems(tmp_path / "dev.jsonl", split="dev") == made


# --- reports --------------------------------------------------------------------------------------


def test_a_report_of_texts_says_by_what_metric_and_chrf() -> None:
    lm = LanguageModel(tiny_network("block_causal"))
    questions = [f"what is {i}?" for i in range(3)]
    texts = [output.text for output in lm.generate(questions, max_new_tokens=8)]
    asked = [Problem(str(i), question, text) for i, (question, text) in enumerate(zip(questions, texts, strict=True))]
    options: dict[str, Any] = {"task": "own", "max_new_tokens": 8, "warm_up": False}
    report = evaluate(lm, asked, metric=METRICS["exact"], **options)
    assert report.accuracy == 1.0
    told = report.to_json()
    assert (told["task"], told["metric"], told["chrf"]) == ("own", "exact", pytest.approx(100))
    merged = merge_reports([report_columns(report)], {problem.id: problem for problem in asked}).to_json()
    assert {**merged, "seconds_median": told["seconds_median"]} == told
    (swept,) = sweep(lm, asked, thresholds=[0.9], metric=METRICS["exact"], task="own", max_new_tokens=8)
    assert swept.accuracy == 1.0


# --- correction -----------------------------------------------------------------------------------


def test_a_sentence_is_restored_if_every_word_and_mark_is_right(tmp_path: Path) -> None:
    write_lines(tmp_path / "c.jsonl", {"id": "1", "question": "Teh cat sat .", "answer": "The cat sat."})
    task = task_named("correction")
    (problem,) = task.problems(data=tmp_path / "c.jsonl")
    assert (problem.question, problem.answer) == ("Teh cat sat .", "The cat sat.")
    assert task.is_correct(" The  cat sat.\n", problem.answer)
    for text in ("The cat sat", "the cat sat.", "The cat sat .", "Thecat sat.", ""):
        assert not task.is_correct(text, problem.answer)


def test_the_task_correction_has_problems_of_its_own_and_refuses_an_empty_file(tmp_path: Path) -> None:
    task = task_named("correction")
    found = task.problems()
    assert len(found) == 300 == len({problem.answer for problem in found})
    assert {problem.id.split("-")[0] for problem in found} == {"sqlite", "persuasion"}
    assert 0.55 < sum(problem.question != problem.answer for problem in found) / len(found) < 0.85
    assert task.problems("test", 5) == found[:5]
    with pytest.raises(FewstepError, match="301 problems were asked for, 300 are bundled"):
        task.problems(n=301)
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(FewstepError, match="holds no problems"):
        task.problems(data=tmp_path / "none.jsonl")
