"""Stop texts: where an answer ends, what its counts are, and what is shown of it before it is complete."""

from itertools import pairwise
from typing import Any

import pytest
from helpers.networks import lively

from fewstep.cli.main import main
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.models.text import AnswerText, decode_text, num_ids_to_stop
from fewstep.models.tiny import tiny_tokenizer

ROLES = ["autoregressive", "bidirectional", "block_causal"]
PROMPTS = ["ab", "what is 2+2?", "no"]


def cut_by_hand(lm: LanguageModel, prompt: str, stop: list[str]) -> tuple[str, int, int]:
    """Text, tokens and passes of the shortest part of the whole answer that has a stop text."""
    free = lm.generate(prompt, max_new_tokens=24)
    tokenizer = lm.network.tokenizer
    for count in range(1, free.num_tokens + 1):
        text = decode_text(tokenizer, free.token_ids[:count])
        if any(one in text for one in stop):
            first = min(text.index(one) for one in stop if one in text)
            return text[:first], count, int(free.step_G[:count].max())
    return free.text, free.num_tokens, free.num_forwards


@pytest.mark.parametrize("role", ROLES)
def test_an_answer_ends_with_the_step_that_completed_a_stop_text(role: Any) -> None:
    lm = LanguageModel(lively(role))
    wholes = [lm.generate(prompt, max_new_tokens=24).text for prompt in PROMPTS]
    stop = [wholes[0][5:7], wholes[1][9:12], "not there"]
    outputs = lm.generate(PROMPTS, max_new_tokens=24, stop=stop)
    for prompt, whole, output in zip(PROMPTS, wholes, outputs, strict=True):
        expected = cut_by_hand(lm, prompt, stop)
        assert (output.text, output.num_tokens, output.num_forwards) == expected
        assert len(output.token_ids) == output.num_tokens
        assert whole.startswith(output.text)
        streamed = lm.stream(prompt, max_new_tokens=24, stop=stop)
        shown = [streamed.answer_text() for _ in streamed]
        assert all(later.startswith(earlier) for earlier, later in pairwise([*shown, output.text]))
        assert streamed.output is not None
        assert streamed.answer_text() == streamed.output.text == output.text
        assert (streamed.output.num_tokens, streamed.output.num_forwards) == expected[1:]
    assert outputs[0].finish_reason == "stop"
    assert outputs[0].num_tokens < 24, "or the test shows little"
    assert [output.text for output in lm.generate(PROMPTS, max_new_tokens=24)] == wholes


def test_what_a_stop_text_may_begin_with_is_held_back() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("a, ab.c, abc", add_special_tokens=False)
    answer, shown = AnswerText(tokenizer, stop=["abc", ", abd"]), []
    for position, token_id in enumerate(ids):
        answer.add(position, token_id)
        shown.append(answer.text)
    assert shown == ["", *["a"] * 4, "a, ab.", *["a, ab.c"] * 5, "a, ab.c, "]
    assert answer.stopped
    assert num_ids_to_stop(tokenizer, ids, ["abc"]) == len(ids)
    assert num_ids_to_stop(tokenizer, ids, ["b.", "ab"]) == 5
    assert num_ids_to_stop(tokenizer, ids, ["x"]) is None


def test_of_stop_texts_within_each_other_the_one_completed_first_ends_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("xabcd", add_special_tokens=False)
    answer = AnswerText(tokenizer, stop=["abcd", "bc"])
    for position in (1, 2, 3, 4, 0):  # all of them appear at once
        answer.add(position, ids[position])
    assert answer.text == "xa"
    assert num_ids_to_stop(tokenizer, ids, ["abcd", "bc"]) == 4


def test_tokens_that_are_final_in_any_order_are_shown_from_the_left() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("abcd", add_special_tokens=False)
    answer, shown = AnswerText(tokenizer, ends=[1]), []
    for position in (3, 1, 0, 2):
        answer.add(position, ids[position])
        shown.append(answer.text)
    assert shown == ["", "", "ab", "abcd"]


def test_one_stop_text_may_be_given_as_it_is_and_none_may_be_empty() -> None:
    assert GenerationSettings.of(stop="ab").stop == GenerationSettings.of(stop=["ab"]).stop == ("ab",)
    with pytest.raises(FewstepError, match="a stop text must not be empty"):
        GenerationSettings.of(stop=["a", ""])
    with pytest.raises(FewstepError, match="stop"):
        GenerationSettings.of(stop=[1])
    with pytest.raises(FewstepError, match="infilling takes no stop"):
        LanguageModel(lively("bidirectional")).infill("a", "b", num_tokens=2, stop="c")


def test_the_command_line_takes_stop_texts(capsys: pytest.CaptureFixture[str]) -> None:
    question = "A box has 3 red and 4 blue balls. How many balls are in it?"

    def answer(*options: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["generate", question, "--max-new-tokens", "24", "--device", "cpu", *options])
        assert ended.value.code == 0
        return capsys.readouterr().out.strip()

    whole = answer()
    assert answer("--stop", whole[6:9], "--stop", "not there") == whole[: whole.index(whole[6:9])].strip()
