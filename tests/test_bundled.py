"""The models that ship with the package: complete, and as good as a sample of development problems can tell."""

import json
from functools import cache
from typing import Any

import pytest

import fewstep
from fewstep.decode.requests import Output
from fewstep.engine.language_model import LanguageModel
from fewstep.models.load import load_network
from fewstep.models.names import BUNDLED, bundled_names
from fewstep.models.text import encode_prompt
from fewstep.tasks.answers import is_correct
from fewstep.tasks.gsm_symbolic import problems

MODELS = ("gsm-ar", "gsm-cllm", "gsm-draft", "gsm-student", "gsm-teacher")
SAMPLE = problems("dev", 12)


def test_these_models_are_bundled_with_their_cards() -> None:
    assert tuple(bundled_names()) == MODELS
    for name in MODELS:
        assert (BUNDLED / name / "README.md").stat().st_size > 1000


@pytest.mark.parametrize("name", MODELS)
def test_a_question_becomes_a_prompt_alike_for_all_models(name: str) -> None:
    tokenizer = load_network(name).tokenizer
    ids = encode_prompt(tokenizer, "What is 12 + 7?")
    assert tokenizer.decode(ids) == "<bos>What is 12 + 7?<answer>"
    assert tokenizer.mask_token_id == 2
    assert tokenizer.eos_token_id == 1


def test_their_tokenizers_are_one_and_hold_no_white_space_between_values() -> None:
    texts = {name: (BUNDLED / name / "tokenizer.json").read_text("utf-8") for name in (*MODELS, "gsm-tokenizer")}
    (text,) = set(texts.values())
    assert text == json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


@cache
def answers(name: str) -> list[Output]:
    return fewstep.load(name, dtype="float32").generate([item.question for item in SAMPLE], batch_size=len(SAMPLE))


def tokens_per_forward(outputs: list[Output]) -> float:
    return sum(one.num_tokens for one in outputs) / sum(one.num_forwards for one in outputs)


@pytest.mark.parametrize(
    ("name", "right", "least"), [("gsm-ar", 10, 1.0), ("gsm-cllm", 10, 2.4), ("gsm-student", 9, 7.0)]
)
def test_they_solve_most_of_a_sample_in_few_passes(name: str, right: int, least: float) -> None:
    outputs = answers(name)
    assert sum(is_correct(output.text, item.answer) for output, item in zip(outputs, SAMPLE, strict=True)) >= right
    assert tokens_per_forward(outputs) >= least


def test_the_students_cache_changes_nothing() -> None:
    lm = LanguageModel(load_network("gsm-student"))
    questions = [item.question for item in problems("dev", 3)]
    rule: dict[str, Any] = {"threshold": 0.9, "gaps": 2}
    cached = lm.generate(questions, max_new_tokens=64, **rule)
    uncached = lm.generate(questions, max_new_tokens=64, decoder="diffusion", **rule)
    for one, other in zip(cached, uncached, strict=True):
        assert one.token_ids == other.token_ids


def test_jacobi_is_the_default_of_the_model_trained_for_it_and_changes_nothing() -> None:
    lm = fewstep.load("gsm-cllm")
    questions = [item.question for item in problems("dev", 3)]
    fast, plain = (lm.generate(questions, max_new_tokens=48, **one) for one in ({}, {"decoder": "autoregressive"}))
    assert [one.token_ids for one in fast] == [one.token_ids for one in plain]
    assert sum(one.num_forwards for one in fast) < 0.6 * sum(one.num_forwards for one in plain)


def test_the_drafter_writes_what_its_base_writes_in_few_passes() -> None:
    assert [one.token_ids for one in answers("gsm-draft")] == [one.token_ids for one in answers("gsm-ar")]
    assert tokens_per_forward(answers("gsm-draft")) >= 6


def test_the_teacher_answers_one_token_a_pass() -> None:
    output = fewstep.load("gsm-teacher").generate(problems("dev", 3)[2].question, max_new_tokens=32)
    assert output.num_forwards >= output.num_tokens
    assert output.text
