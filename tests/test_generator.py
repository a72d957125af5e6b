"""A model answers with whatever generates: here a table, that has no decoder, no cache and no forward."""

from typing import Any
from unittest import mock

import pytest
from helpers.generators import OPEN, Table, Tables

from fewstep.decode.generator import Generator, answer, rounds
from fewstep.decode.loop import Loop
from fewstep.decode.requests import Request
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network

NETWORK = tiny_network("bidirectional")  # for its tokenizer
TEXTS = {"a": "one two three", "b": "four", "what is 2+2?": "2+2 is 4, done"}


def ids(text: str) -> list[int]:
    return list(NETWORK.tokenizer.encode(text, add_special_tokens=False))


def prompt_ids(prompt: str) -> list[int]:
    return LanguageModel(NETWORK).encode(prompt)


@pytest.fixture
def tables() -> Tables:
    end = NETWORK.eos_token_id
    return Tables({tuple(prompt_ids(prompt)): [*ids(text), end] for prompt, text in TEXTS.items()}, ends=(end,))


@pytest.fixture
def lm(tables: Tables) -> Any:
    no_loop = mock.Mock(side_effect=AssertionError("a line of the loop"))
    with mock.patch.object(Loop, "__init__", no_loop), mock.patch.object(Network, "hidden", no_loop):
        yield LanguageModel(NETWORK, tables)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_table_answers_prompts_in_their_order(lm: LanguageModel, batch_size: int) -> None:
    completed: dict[int, str] = {}
    outputs = lm.generate(
        list(TEXTS), batch_size=batch_size, on_output=lambda index, output: completed.update({index: output.text})
    )
    assert [output.text for output in outputs] == list(TEXTS.values())
    assert [output.num_forwards for output in outputs] == [2, 2, 2]
    assert {output.finish_reason for output in outputs} == {"stop"}
    assert completed == dict(enumerate(TEXTS.values()))


def test_its_events_are_streamed_and_its_text_only_grows(lm: LanguageModel) -> None:
    stream = lm.stream("a")
    seen = [(event.position, event.step, stream.answer_text()) for event in stream]
    assert [position for position, _, _ in seen] == [*range(0, 14, 2), *range(1, 14, 2)]
    assert [step for _, step, _ in seen] == [1] * 7 + [2] * 7
    assert seen[6][2] == "o"
    assert seen[-1][2] == "one two three"
    assert stream.output is not None
    assert stream.output.text == stream.answer_text() == "one two three"


@pytest.mark.parametrize("stop", ["t", "ee", ("never", "wo")])
def test_stop_texts_end_an_answer_and_cancel_its_request(lm: LanguageModel, tables: Tables, stop: Any) -> None:
    tables.options["pass_of"] = lambda position, length: 1 + position // 4
    first = next(one for one in ([stop] if isinstance(stop, str) else stop) if one in TEXTS["a"])
    expected = TEXTS["a"][: TEXTS["a"].index(first)]
    whole, stopped = lm.generate("a", batch_size=2), lm.generate(["a", "b"], batch_size=2, stop=stop)[0]
    stream = lm.stream("a", stop=stop)
    list(stream)
    assert stream.output is not None
    for output in (stopped, stream.output):
        assert (output.text, output.finish_reason) == (expected, "stop")
        assert output.num_forwards == 1 + (output.num_tokens - 1) // 4 <= whole.num_forwards
        assert "".join(NETWORK.tokenizer.decode([one]) for one in output.token_ids).endswith(first)
    assert all(not table.busy for table in tables.made)


def test_its_memory_is_kept_between_calls(lm: LanguageModel, tables: Tables) -> None:
    for prompt in TEXTS:
        lm.generate(prompt, batch_size=1)
        list(lm.stream(prompt))
    assert len(tables.made) == 1
    next(iter(lm.stream("a")))  # left half-way, with its request
    assert lm.generate("b", batch_size=1).text == TEXTS["b"]
    assert len(tables.made) == 2


def test_a_request_is_cancelled_before_and_after_it_is_begun(tables: Tables) -> None:
    table: Generator = Table(tables.answers)
    numbers = [table.submit(Request(prompt_ids=prompt_ids(prompt))) for prompt in ("a", "b")]
    table.step()
    assert table.cancel(numbers[1]) is None
    partial = table.cancel(numbers[0])
    assert partial is not None
    assert partial.num_forwards == 1
    assert partial.canvas_ids_G[:4].tolist() == [*ids("o"), OPEN, *ids("e"), OPEN]
    assert (partial.token_ids, partial.num_tokens, partial.finish_reason) == (ids("o"), 1, "cancelled")
    assert not table.busy
    assert [output.token_ids for output in answer(table, [Request(prompt_ids=prompt_ids("b"))])] == [
        tables.answers[*prompt_ids("b"),]
    ]


def test_rounds_bring_outputs_as_they_are_completed(tables: Tables) -> None:
    requests = [Request(prompt_ids=prompt_ids(prompt), max_new_tokens=limit) for prompt, limit in [("b", 1), ("a", 9)]]
    told = [
        [(index, len(output.token_ids)) for index, output in completed]
        for completed in rounds(Table(tables.answers, num_slots=2), requests)
    ]
    assert told == [[(0, 1)], [(1, 9)]]


def test_what_a_generator_refuses_is_told_and_a_model_without_a_decoder_says_so(lm: LanguageModel) -> None:
    with pytest.raises(FewstepError, match="a table has no threshold"):
        lm.generate("a", threshold=0.9)
    with pytest.raises(FewstepError, match="no answer to this prompt"):
        lm.generate("c")
    with pytest.raises(FewstepError, match="answers without a decoder"):
        lm.decoder()
    assert lm.generate("b").text == TEXTS["b"]
