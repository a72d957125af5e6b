"""The bundled tokenizer, and the recipe that makes it."""

import importlib.util
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fewstep.tasks.gsm_symbolic import INSTRUCTION, problems, training_rows


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).parents[1] / "recipes" / "gsm_tokenizer.py"
    spec = importlib.util.spec_from_file_location("gsm_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    with resources.as_file(resources.files("fewstep") / "bundled" / "gsm-tokenizer") as folder:
        return AutoTokenizer.from_pretrained(folder)


def test_special_tokens_have_fixed_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    names = ["<pad>", "<eos>", "<mask>", "<bos>", "<answer>"]
    assert tokenizer.convert_ids_to_tokens(range(5)) == names
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.bos_token_id)
    assert ids == (0, 1, 2, 3)
    assert len(tokenizer) == 2048


def test_the_chat_template_frames_question_and_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "  How many? \n"}, {"role": "assistant", "content": "#### 3"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<bos>How many?<answer>#### 3<eos>"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False) == "<bos>How many?<answer>"


@pytest.mark.parametrize(
    "text", ["57 * 23 = 1311\n- 5*7=35", "ｗide 日本 ¢ 🎈 \t x", "a  b\r\n  c", "£4.50 × 3 ÷ 2", ""]
)
def test_every_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_operators_and_line_breaks_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = [tokenizer.decode([one]) for one in tokenizer("57 * 230 = 1\n57*23").input_ids]
    assert pieces == ["5", "7", " * ", "2", "3", "0", " = ", "1", "\n", "5", "7", "*", "2", "3"]
    vocabulary = [tokenizer.decode([one]) for one in range(5, len(tokenizer))]
    assert all(len(piece) == 1 for piece in vocabulary if any(character.isdigit() for character in piece))


def test_the_instruction_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer(INSTRUCTION).input_ids) == 1


def test_bundled_problems_fit_the_prompt(tokenizer: PreTrainedTokenizerFast, recipe: ModuleType) -> None:
    for split in ("dev", "test", "heldout"):
        lengths = [len(ids) + 2 for ids in tokenizer([problem.question for problem in problems(split)]).input_ids]
        assert max(lengths) <= recipe.MAX_PROMPT_TOKENS


def test_few_training_rows_are_too_long(tokenizer: PreTrainedTokenizerFast, recipe: ModuleType) -> None:
    pytest.importorskip("reasoning_gym")
    rows = list(training_rows(1, 1000))
    lengths = [[len(ids) for ids in tokenizer([row["prompt"], row["completion"]]).input_ids] for row in rows]
    # With <bos> and <answer>, and with <eos>.
    fit = [p + 2 <= recipe.MAX_PROMPT_TOKENS and a + 1 <= recipe.MAX_ANSWER_TOKENS for p, a in lengths]
    assert fit.count(False) < 15


def test_building_is_deterministic(recipe: ModuleType) -> None:
    texts = ["Ann has 12 pens and 3 * 4 = 12 caps.", "Bob has 7 caps and no pens."] * 10
    first, second = (recipe.build_tokenizer(texts, 280) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 280
