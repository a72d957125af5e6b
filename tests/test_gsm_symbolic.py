"""The task: splits that never meet, bundled files that the generator reproduces, true and complete solutions."""

from itertools import islice
from random import Random

import pytest

from fewstep.errors import FewstepError
from fewstep.tasks import gsm_symbolic as task
from fewstep.tasks.answers import is_correct
from fewstep.tasks.gsm_solutions import STYLES, Equation, read_solution, render
from fewstep.tasks.worked_arithmetic import evaluate, worked

# --- answers --------------------------------------------------------------------------------------


# --- problems -------------------------------------------------------------------------------------


def test_bundled_splits_are_whole_distinct_and_apart() -> None:
    splits = {split: task.problems(split) for split in ("dev", "test", "heldout")}
    assert [len(found) for found in splits.values()] == [1000, 1000, 500]
    for found in splits.values():
        assert len({problem.question for problem in found}) == len(found)
        assert len({problem.id for problem in found}) == len(found)
    signatures = {
        split: {task.signature(problem.template or 0, problem.question) for problem in found}
        for split, found in splits.items()
    }
    assert not signatures["dev"] & signatures["test"]
    assert {problem.template for problem in splits["heldout"]} == task.HELD_OUT_TEMPLATES
    assert all(problem.template not in task.HELD_OUT_TEMPLATES for problem in splits["dev"] + splits["test"])


def test_names_do_not_change_a_signature_but_numbers_do() -> None:
    assert task.signature(3, "Ann has 12 cats.") == task.signature(3, "Bob has 12 dogs." + task.INSTRUCTION)
    assert task.signature(3, "Ann has 12 cats.") != task.signature(3, "Ann has 13 cats.")
    assert task.signature(3, "Ann has 12 cats.") != task.signature(4, "Ann has 12 cats.")


def test_asking_for_too_many_bundled_problems_is_an_error() -> None:
    with pytest.raises(FewstepError, match="bundled"):
        task.problems("dev", 1001)


# --- what needs the generator ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")


@pytest.mark.usefixtures("reasoning_gym")
def test_bundled_problems_are_the_beginning_of_what_is_made() -> None:
    for split in ("dev", "test", "heldout"):
        assert task.make_problems(split, 40) == task.problems(split, 40)


@pytest.mark.usefixtures("reasoning_gym")
def test_held_out_templates_come_from_the_stated_seed() -> None:
    every = sorted(task.generators())
    assert frozenset(Random(task.HELD_OUT_SEED).sample(every, 10)) == task.HELD_OUT_TEMPLATES
    assert len(task.training_templates()) == len(every) - 10


@pytest.mark.usefixtures("reasoning_gym")
def test_training_rows_are_a_function_of_the_seed() -> None:
    first = list(task.training_rows(5, 50))
    assert first == list(islice(task.training_rows(5), 50))
    assert first != list(task.training_rows(6, 50))


@pytest.mark.usefixtures("reasoning_gym")
def test_training_rows_avoid_every_test_question_and_obey_the_filter() -> None:
    tested = {problem.question for split in ("dev", "test", "heldout") for problem in task.problems(split)}
    rows = list(task.training_rows(7, 3000, fits=lambda prompt, completion: len(completion) < 500))
    assert not {row["prompt"] for row in rows} & tested
    assert max(len(row["completion"]) for row in rows) < 500
    kinds = [row["kind"] for row in rows]
    assert 0.1 < kinds.count("drill") / len(kinds) < 0.25
    solved = [row["prompt"].endswith(task.INSTRUCTION) for row in rows if row["kind"] == "cot"]
    assert 0.85 < sum(solved) / len(solved) < 0.95


@pytest.mark.usefixtures("reasoning_gym")
def test_drills_are_right() -> None:
    for row in task.training_rows(8, 400, drill_fraction=0.9):
        if row["kind"] == "drill":
            asked = row["prompt"].removeprefix("Compute ").removesuffix(".")
            asked = asked.replace("×", "*").replace("x", "*").replace("÷", "/")
            assert is_correct(row["completion"], str(float(evaluate(asked))))


@pytest.mark.usefixtures("reasoning_gym")
def test_every_template_renders_true_equations_and_its_answer_in_every_style() -> None:
    dropped_fractions = 0
    num_equations = 0
    for template, generate in task.generators().items():
        rng = Random(template)
        for _ in range(20):
            example = generate(rng, 1.0)
            metadata = example["metadata"]
            lines = read_solution(template, metadata["answer_cot"], metadata["variables"])
            for equation in (part for line in lines for part in line if isinstance(part, Equation)):
                chain = worked(equation.expression, equation.result)
                assert chain is not None
                values = [evaluate(side) for side in chain.split(" = ")]
                num_equations += 1
                dropped_fractions += len(set(values)) > 1
                assert all(abs(value - values[-1]) < 1 for value in values), chain
            for style in STYLES:
                text = render(lines, task.plain_number(example["answer"]), style, rng)
                assert is_correct(text, example["answer"]), text
    assert num_equations > 4000
    assert dropped_fractions < 0.01 * num_equations  # these are in the templates themselves


def test_rendering_swaps_operands_and_independent_lines_only() -> None:
    chain = "Ann buys 3 * 12 = 36 pens.\nBob buys 5 * 4 = 20 pens.\nIn all there are 36 + 20 = 56 pens.\n#### 56"
    lines = read_solution(0, chain, {})
    texts = {render(lines, "56", STYLES[0], Random(seed)) for seed in range(200)}
    assert len(texts) == 16  # three equations swapped or not, two lines exchanged or not
    assert all(text.splitlines()[2].startswith("In all") for text in texts)


def test_units_signs_and_brackets_are_read() -> None:
    chain = "It costs $1,200.00 x 5/100 = $60.00.\nThe walls are 2(60+14) = 148 m.\n12 clam / 3 clam/minute = 4 minutes"
    equations = [part for line in read_solution(0, chain, {}) for part in line if isinstance(part, Equation)]
    assert equations == [
        Equation("1200 * 5 / 100", "60"),
        Equation("2 * (60 + 14)", "148"),
        Equation("12 / 3", "4"),
    ]
