"""The server as clients meet it: a real one on a free port, with tiny models."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
import torch
from helpers.networks import network
from helpers.serving import Running, running, slow, until
from huggingface_hub import InferenceClient

from fewstep.cli.serve import _served
from fewstep.decode.registry import setting_names
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.serve import infill
from fewstep.serve.answering import Asked
from fewstep.serve.catalogue import Entry
from fewstep.serve.fields import MOST_TOP, ChatBody, schema_of
from fewstep.serve.infill import SEAM

QUESTION = "what is 2+2?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
LIMIT = 24


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    return {
        "block": LanguageModel(network("block_causal")),
        "causal": LanguageModel(network("autoregressive")),
        "full": LanguageModel(network("bidirectional")),
        "slow": slow(network("block_causal")),
    }


@pytest.fixture(scope="module")
def served(models: dict[str, LanguageModel]) -> Iterator[Running]:
    with running(models, max_concurrent=4, max_queued=8, read_time=1.0, max_body_mb=0.1) as made:
        yield made


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def refused(response: Any, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error of a response, in OpenAI's shape."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param, error
    assert code is None or error["code"] == code, error
    return error


# What a client of OpenAI's sees


@pytest.mark.parametrize("name", ["block", "causal", "full"])
def test_an_answer_is_that_of_generate(client: openai.OpenAI, models: dict[str, LanguageModel], name: str) -> None:
    expected = models[name].generate(QUESTION, max_new_tokens=LIMIT)
    answer = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=LIMIT)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(models[name].encode(QUESTION))
    assert answer.usage.completion_tokens == expected.num_tokens
    extra: Any = answer.usage.model_extra
    assert extra["fewstep"]["num_forwards"] == expected.num_forwards
    assert extra["fewstep"]["tokens_per_forward"] == pytest.approx(expected.tokens_per_forward, abs=1e-3)


@pytest.mark.parametrize("name", ["block", "causal", "full"])
def test_a_stream_has_the_order_of_openai_and_the_same_text(
    served: Running, models: dict[str, LanguageModel], name: str
) -> None:
    body = {"model": name, "messages": MESSAGES, "max_tokens": LIMIT, "stream_options": {"include_usage": True}}
    first, *middle, last, usage, done = served.streamed("/v1/chat/completions", body)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(one["choices"][0]["delta"]) == {"content"} for one in middle)
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    assert (usage["choices"], done) == ([], "[DONE]")
    expected = models[name].generate(QUESTION, max_new_tokens=LIMIT)
    assert "".join(one["choices"][0]["delta"]["content"] for one in middle) == expected.text
    assert usage["usage"]["completion_tokens"] == expected.num_tokens
    several = [first, *middle, last, usage]
    assert len({(one["id"], one["created"], one["model"], one["object"]) for one in several}) == 1
    assert all(one["usage"] is None for one in several[:-1])


def test_the_client_streams_and_its_helper_too(client: openai.OpenAI, models: dict[str, LanguageModel]) -> None:
    expected = models["block"].generate(QUESTION, max_new_tokens=LIMIT).text
    chunks = client.chat.completions.create(model="block", messages=MESSAGES, max_tokens=LIMIT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    with client.chat.completions.stream(model="block", messages=MESSAGES, max_tokens=LIMIT) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(deltas) == expected


def test_a_diffusing_stream_holds_the_whole_text_in_each_chunk(served: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": LIMIT, "threshold": 0.3, "diffusing": True}
    texts = [one["choices"][0]["delta"].get("content") for one in served.streamed("/v1/chat/completions", body)[1:-2]]
    assert len(texts) > 2
    assert (
        texts[-1] == served.chat(QUESTION, max_tokens=LIMIT, threshold=0.3).json()["choices"][0]["message"]["content"]
    )
    assert any("\N{LIGHT SHADE}" in text for text in texts[:-1])
    assert "\N{LIGHT SHADE}" not in texts[-1]


def test_the_canvas_tells_of_each_token_the_step_that_fixed_it(served: Running, models: dict[str, Any]) -> None:
    body = {"messages": MESSAGES, "max_tokens": LIMIT, "threshold": 0.3, "fewstep": {"canvas": True}}
    canvases = [one["fewstep"] for one in served.streamed("/v1/chat/completions", body)[1:-2]]
    expected = models["block"].generate(QUESTION, max_new_tokens=LIMIT, threshold=0.3)
    last = canvases[-1]
    assert [token["step"] for token in last["tokens"]] == expected.step_G[: expected.num_tokens].tolist()
    assert (last["num_forwards"], last["num_tokens"]) == (expected.num_forwards, expected.num_tokens)
    assert not any(token["provisional"] for token in last["tokens"])
    assert "".join(token["text"] for token in last["tokens"]) == expected.text
    for canvas in canvases[:-1]:
        assert all((token["step"] is None) == token["provisional"] for token in canvas["tokens"])
        assert max(token["step"] or 0 for token in canvas["tokens"]) <= canvas["step"] == canvas["num_forwards"]


def test_several_choices_have_seeds_of_their_own(client: openai.OpenAI, models: dict[str, LanguageModel]) -> None:
    settings: dict[str, Any] = {"temperature": 1.5, "seed": 5, "max_tokens": 12}
    answer = client.chat.completions.create(model="causal", messages=MESSAGES, n=3, **settings)
    expected = [
        models["causal"].generate(QUESTION, max_new_tokens=12, temperature=1.5, seed=seed).text for seed in (5, 6, 7)
    ]
    assert [choice.message.content for choice in answer.choices] == expected
    assert len(set(expected)) > 1
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(model="causal", messages=MESSAGES, n=3, stream=True, **settings):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == expected


def test_without_a_seed_drawn_answers_differ(served: Running) -> None:
    answers = {served.chat(temperature=2.0, max_tokens=20).json()["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(answers) > 1


@pytest.mark.parametrize("name", ["block", "causal"])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_an_answer_across_tokens(
    client: openai.OpenAI, models: dict[str, LanguageModel], name: str, stream: bool
) -> None:
    whole = models[name].generate(QUESTION, max_new_tokens=LIMIT).text
    stop = [whole[4:7], "never there"]
    answer: Any = client.chat.completions.create(
        model=name, messages=MESSAGES, max_tokens=LIMIT, stop=stop, stream=stream
    )
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == whole[: whole.index(stop[0])]
    assert reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_top", [0, 3])
def test_log_probabilities_are_those_of_the_final_tokens(
    client: openai.OpenAI, models: dict[str, LanguageModel], stream: bool, num_top: int
) -> None:
    expected = models["block"].generate(QUESTION, max_new_tokens=LIMIT, engine="off")
    answer: Any = client.chat.completions.create(
        model="block", messages=MESSAGES, max_tokens=LIMIT, logprobs=True, top_logprobs=num_top, stream=stream
    )
    parts = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    tokens = [token for part in parts if part is not None for token in part.content]
    ends = models["block"].network.stop_token_ids
    kept = [i for i, token_id in enumerate(expected.token_ids) if token_id not in ends]
    assert [token.logprob for token in tokens] == pytest.approx(expected.confidence_G[kept].log().tolist(), abs=1e-3)
    assert "".join(token.token for token in tokens) == expected.text
    assert all(len(token.top_logprobs) == num_top for token in tokens)
    if num_top:
        best = [token.top_logprobs[0] for token in tokens]
        assert [one.token for one in best] == [token.token for token in tokens]
        assert [one.logprob for one in best] == pytest.approx([token.logprob for token in tokens], abs=1e-3)


def test_completions_take_texts_lists_and_token_ids(client: openai.OpenAI, models: dict[str, LanguageModel]) -> None:
    lm = models["causal"]
    ids = [lm.encode(text, raw=True) for text in ("ab", "x=1")]
    expected = [lm.generate(text, raw=True, max_new_tokens=8).text for text in ("ab", "x=1")]
    prompts: list[Any] = ["ab", ["ab", "x=1"], ids[0], ids]
    for prompt, wanted in zip(prompts, (expected[:1], expected, expected[:1], expected), strict=True):
        answer = client.completions.create(model="causal", prompt=prompt, max_tokens=8)
        assert [choice.text for choice in answer.choices] == wanted
    answer = client.completions.create(model="causal", prompt=["ab", "x=1"], max_tokens=8, n=2, logprobs=2)
    assert [choice.text for choice in answer.choices] == [one for one in expected for _ in range(2)]
    told: Any = answer.choices[0].logprobs
    assert "".join(told.tokens) == expected[0]
    assert told.text_offset[:2] == [0, len(told.tokens[0])]
    assert all(len(one) == 2 for one in told.top_logprobs)


def test_responses_have_the_documented_order(client: openai.OpenAI, models: dict[str, LanguageModel]) -> None:
    expected = models["block"].generate(QUESTION, max_new_tokens=LIMIT)
    answer = client.responses.create(model="block", input=QUESTION, max_output_tokens=LIMIT)
    assert answer.output_text == expected.text
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    events = list(client.responses.create(model="block", input=items, max_output_tokens=LIMIT, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    ends = "incomplete" if expected.finish_reason == "length" else "completed"
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", ends]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert last.response.output_text == expected.text
    assert last.response.usage.output_tokens == expected.num_tokens


def test_a_model_that_corrects_is_told_as_such() -> None:
    assert _served("gsm-student,task=correction,threshold=0.5").corrects
    assert not _served("gsm-student").corrects
    with pytest.raises(FewstepError, match="must be correction"):
        _served("gsm-student,task=chess")
    entry = Entry(name="c", lm=LanguageModel(network("bidirectional")), settings={}, created=0, corrects=True)
    assert entry.card()["fewstep"]["abilities"] == ["correct"]


def test_the_client_of_transformers_chat_is_answered(served: Running, models: dict[str, LanguageModel]) -> None:
    assert served.events("/load_model", {"model": "block"}) == [{"status": "ready", "model": "block", "cached": True}]
    refused(served.post("/load_model", {"model": "other"}), 404, code="model_not_found")
    config = {"do_sample": False, "max_new_tokens": LIMIT, "transformers_version": "5.23.0"}
    client = InferenceClient(base_url=served.url)
    chunks = client.chat_completion(
        MESSAGES, stream=True, model="block", extra_body={"generation_config": json.dumps(config), "model": "block"}
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == models["block"].generate(QUESTION, max_new_tokens=LIMIT).text
    refused(served.chat(generation_config='{"num_beams": 4}'), 400, param="num_beams")
    refused(served.chat(generation_config="{"), 400, param="generation_config")


def test_models_are_listed_and_told_one_by_one(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["block", "causal", "full", "slow"]
    card: Any = client.models.retrieve("full").model_extra
    assert card["fewstep"]["abilities"] == ["chat", "infill"]
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("ful")
    assert refusal.value.code == "model_not_found"
    assert "did you mean 'full'" in str(refusal.value)


def test_the_client_tells_its_errors_with_code_and_param(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="block", messages=MESSAGES, temperature=-1)
    assert (refusal.value.param, refusal.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)


# A gap of unknown length


def test_a_suffix_is_filled_at_the_length_of_the_best_mean_probability(
    served: Running, models: dict[str, LanguageModel]
) -> None:
    """Of its tokens, and of the four tokens behind it, which are masked and scored once more."""
    lm, prefix, suffix = models["full"], "x=1, y=", " and so on"
    means, texts = {}, {}
    for length in range(1, 9):
        output = lm.infill(prefix, suffix, num_tokens=length)
        gap, behind = output.token_ids[:length], lm.encode_part(suffix)
        logs = output.confidence_G[:length].log().tolist()
        ids = torch.tensor([[*lm.encode_part(prefix), *gap, *[lm.role.mask_token_id] * SEAM, *behind[SEAM:]]])
        place = len(lm.encode_part(prefix)) + length
        with torch.no_grad():
            mask = torch.ones((1, 1, ids.shape[1], ids.shape[1]), dtype=torch.bool)
            logits_LV = lm.network.module(ids, attention_mask=mask).logits[0]
        logits_LV[:, lm.role.mask_token_id] = float("-inf")
        best_LK = logits_LV.log_softmax(-1).topk(MOST_TOP)
        for index, token_id in enumerate(behind[:SEAM], start=place):
            log_probs = dict(zip(best_LK.indices[index].tolist(), best_LK.values[index].tolist(), strict=True))
            logs.append(log_probs.get(token_id, min(log_probs.values())))
        means[length] = sum(logs) / len(logs)
        texts[length] = output.text.removeprefix(prefix).removesuffix(suffix)
    body = {"model": "full", "prompt": prefix, "suffix": suffix, "max_tokens": 8}
    answer = served.post("/v1/completions", body).json()
    told = {one["gap"]: one["mean_logprob"] for one in answer["usage"]["fewstep"]["candidates"]}
    assert set(told) == set(range(1, 9))
    for length, mean in told.items():
        assert mean == pytest.approx(means[length], abs=1e-3)
    best = max(told, key=lambda length: told[length])
    assert answer["choices"][0]["text"] == texts[best]
    assert answer["usage"]["completion_tokens"] == answer["usage"]["fewstep"]["gap"] == best
    for path in ("/v1/completions", "/v1/fim/completions"):
        events = served.streamed(path, body)
        assert "".join(one["choices"][0]["text"] for one in events[:-1]) == texts[best]


def test_a_gap_has_the_most_probable_tokens_that_were_asked_for(served: Running) -> None:
    body = {"model": "full", "prompt": "ab", "suffix": "cd", "logprobs": 2, "max_tokens": 3}
    for fields in ({"fewstep": {"gap": 3}}, {}):
        told = served.post("/v1/completions", body | fields).json()["choices"][0]["logprobs"]
        assert [len(one) for one in told["top_logprobs"]] == [2] * len(told["tokens"])


def test_a_gap_of_a_given_length_forms_in_a_stream(served: Running, models: dict[str, LanguageModel]) -> None:
    expected = models["full"].infill("ab", "cd", num_tokens=6)
    body = {"model": "full", "prompt": "ab", "suffix": "cd", "fewstep": {"gap": 6, "canvas": True}}
    events = served.streamed("/v1/completions", body)
    assert "".join(one["choices"][0]["text"] for one in events[:-1]) == expected.text[2:-2]
    canvas = events[-3]["fewstep"]
    assert [token["step"] for token in canvas["tokens"]] == expected.step_G[:6].tolist()
    assert len([one for one in events[:-1] if "fewstep" in one]) >= 2
    whole = served.post("/v1/completions", body).json()
    assert whole["choices"][0]["text"] == expected.text[2:-2]


@pytest.mark.parametrize("name", ["block", "causal"])
def test_a_model_that_does_not_see_behind_a_gap_takes_no_suffix(served: Running, name: str) -> None:
    for path in ("/v1/completions", "/v1/fim/completions"):
        response = served.post(path, {"model": name, "prompt": "a", "suffix": "b"})
        assert "ask full" in refused(response, 400, param="suffix")["message"]
    whole = served.post("/v1/fim/completions", {"model": name, "prompt": "a", "max_tokens": 4}).json()
    assert whole["object"] == "text_completion"


def test_an_edit_is_one_message_with_tags(served: Running) -> None:
    text = (
        "<|current_file_content|>\ncurrent_file_path: a.py\nx = 1\n<|code_to_edit|>\ny = <|cursor|>2\n"
        "<|/code_to_edit|>\nz = 3\n<|/current_file_content|>"
    )
    for name in ("full", "block"):
        body = {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": 6}
        answer = served.post("/v1/edit/completions", body).json()
        assert answer["object"] == "edit.completion"
        content = answer["choices"][0]["message"]["content"]
        assert name == "block" or content.startswith("y = ")
    response = served.post("/v1/edit/completions", {"messages": [{"role": "user", "content": "x"}]})
    refused(response, 400, param="messages")


# What is refused


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"frequency_penalty": 0.5}, "frequency_penalty"),
        ("chat/completions", {"logit_bias": {"5": 1}}, "logit_bias"),
        ("chat/completions", {"store": True}, "store"),
        ("chat/completions", {"tresholt": 0.5}, "tresholt"),
        ("chat/completions", {"threshold": "0.5"}, "threshold"),
        ("chat/completions", {"threshold": 2}, "threshold"),
        ("chat/completions", {"decoder": "blok"}, "decoder"),
        ("chat/completions", {"draft": "causal", "decoder": "speculative"}, "draft"),
        ("chat/completions", {"engine": "off"}, "engine"),
        ("chat/completions", {"temperature": True}, "temperature"),
        ("chat/completions", {"top_p": 0}, "top_p"),
        ("chat/completions", {"seed": 1 << 70}, "seed"),
        ("chat/completions", {"n": 0}, "n"),
        ("chat/completions", {"n": 129}, "n"),
        ("chat/completions", {"stop": ["a"] * 5}, "stop"),
        ("chat/completions", {"stop": ""}, "stop"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat/completions", {"max_tokens": 0}, "max_tokens"),
        ("chat/completions", {"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ("chat/completions", {"max_tokens": 1000}, "max_tokens"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("chat/completions", {"model": 3}, "model"),
        ("completions", {"prompt": None}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": [1 << 40]}, None),
        ("completions", {"prompt": "a", "echo": True}, "echo"),
        ("completions", {"prompt": "a", "best_of": 2}, "best_of"),
        ("responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ("responses", {"input": None}, "input"),
        ("chat/completions", {"fewstep": {"gap": 3}}, "fewstep.gap"),
        ("edit/completions", {"fewstep": {"gap": 3}}, "fewstep.gap"),
        ("edit/completions", {"fewstep": {"canvas": True}}, "fewstep.canvas"),
        ("responses", {"fewstep": {"gap": 3}}, "fewstep.gap"),
        ("responses", {"fewstep": {"canvas": True}}, "fewstep.canvas"),
        ("completions", {"prompt": "a", "fewstep": {"gap": 3}}, "fewstep.gap"),
        ("completions", {"prompt": "a", "suffix": "b", "fewstep": {"gap": 3}, "max_tokens": 2}, "fewstep.gap"),
        ("fim/completions", {"prompt": "a", "fewstep": {"gap": 3}}, "fewstep.gap"),
        ("fim/completions", {"prompt": "a", "fewstep": {"gab": 3}}, "fewstep.gab"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_what_cannot_be_done_is_refused_by_name(
    served: Running, path: str, fields: dict[str, Any], param: str | None
) -> None:
    needed: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": MESSAGES},
        "edit/completions": {"messages": MESSAGES},
        "responses": {"input": QUESTION},
        "completions": {"model": "full"} if "suffix" in fields else {},
    }
    error = refused(served.post(f"/v1/{path}", {**needed.get(path, {}), **fields}), 400)
    assert error["param"] == param, error
    assert "\n" not in error["message"]


def test_values_that_ask_for_nothing_are_taken(served: Running) -> None:
    harmless = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "frequency_penalty": 0,
        "presence_penalty": 0.0, "logit_bias": {}, "n": None, "stop": None, "user": "me", "metadata": {"a": "b"},
        "store": False, "seed": None, "temperature": None, "fewstep": {"gap": None, "canvas": False},
    }  # fmt: skip
    assert served.chat(max_tokens=4, **harmless).status_code == 200
    skipped = {"input": "a", "tools": [{"type": "something_new"}], "max_output_tokens": 4, "fewstep": {"canvas": False}}
    assert served.post("/v1/responses", skipped).status_code == 200


def test_settings_are_those_that_are_declared(served: Running) -> None:
    properties = schema_of(ChatBody)["properties"]
    assert {*setting_names(), "decoder", "temperature"} - {"draft", "heads"} <= set(properties)
    assert not {"draft", "heads", "engine"} & set(properties)
    document = served.get("/openapi.json").json()
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["threshold"]["description"].startswith("Finalise every token")
    assert "$ref" not in json.dumps(schema)


def test_few_step_settings_come_through_under_each_of_their_names(served: Running, models: dict[str, Any]) -> None:
    expected = models["full"].generate(QUESTION, max_new_tokens=8, steps=3, order="entropy")
    for fields in ({"num_inference_steps": 3, "remasking": "entropy"}, {"steps": 3, "order": "entropy"}):
        answer = served.chat(QUESTION, model="full", max_tokens=8, **fields).json()
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert answer["usage"]["fewstep"]["num_forwards"] == 3
    refused(served.chat(steps=3, num_inference_steps=3), 400, param="num_inference_steps")


def test_a_mask_token_that_a_user_types_stays_text(served: Running, models: dict[str, LanguageModel]) -> None:
    lm = models["full"]
    literal = lm.encode(f"<mask>{QUESTION}", literal=[lm.role.mask_token_id])
    assert lm.role.mask_token_id not in literal
    answer = served.chat(f"<mask>{QUESTION}", model="full", max_tokens=4).json()
    assert answer["usage"]["prompt_tokens"] == len(literal)
    gap = served.post("/v1/completions", {"model": "full", "prompt": "a<mask>b", "suffix": "<mask>", "max_tokens": 2})
    assert gap.json()["usage"]["prompt_tokens"] == len("a<mask>b<mask>")
    assert refused(served.post("/v1/completions", {"model": "full", "prompt": [5, 2]}), 400)["param"] == "prompt"


# Bodies, connections, limits

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b'{"messages": NaN}', 400),
        (b'{"seed": 1e999, "messages": []}', 400),
        (b'{"messages": "\\ud800"}', 400),
        (b'{"a":' * 30_000, 413),
        (b'{"a":' * 10_000, 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400),
        (b" " * 200_000, 413),
    ],
    ids=lambda one: str(one)[:30],
)
def test_broken_bodies_are_refused_in_openais_shape(served: Running, body: bytes, status: int) -> None:
    answer = served.raw(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("sent", [b"\x00\x01\x02\r\n\r\n", HEAD + b"Content-Length: -1\r\n\r\n", b"A" * 100_000])
def test_what_is_no_http_is_refused(served: Running, sent: bytes) -> None:
    assert served.raw(sent)[:12] in (b"HTTP/1.1 400", b"")


def test_a_body_of_ten_megabytes_is_refused_once_it_is_there(served: Running) -> None:
    response = served.post("/v1/chat/completions", {"messages": "x" * 10_000_000})
    assert "0.1 MB" in refused(response, 413, code="request_too_large")["message"]


def test_a_body_of_another_type_is_refused(served: Running) -> None:
    body = json.dumps({"messages": MESSAGES}).encode()
    answer = served.raw(
        HEAD.replace(b"application/json", b"text/plain") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    assert answer.startswith(b"HTTP/1.1 415 ")


def test_who_sends_too_slowly_is_not_waited_for(served: Running) -> None:
    assert served.until_closed(HEAD + b'Content-Length: 100\r\n\r\n{"a"').startswith(b"HTTP/1.1 408 ")
    assert served.until_closed(b"POST /v1/chat/comp") == b""
    with served.connected(timeout_s=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /hea")
        while connection.recv(10_000):
            pass


def test_who_does_not_read_is_not_waited_for(served: Running) -> None:
    body = json.dumps({"messages": MESSAGES, "max_tokens": 4, "stream": True}).encode()
    before = served.server.service.statistics().requests.get("submitted", 0)
    with served.connected() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: served.server.service.statistics().requests.get("submitted", 0) > before)
        served.wait_until_idle()


def cut(served: Running, body: dict[str, Any], *, half: bool = False) -> None:
    """A client that closes the connection, or its half of it, once its request is running."""
    sent = json.dumps(body).encode()
    with served.connected() as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(sent) + sent)
        until(lambda: served.server.service.statistics().running >= 2)
        if half:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_request(served: Running, stream: bool, half: bool) -> None:
    served.wait_until_idle()
    before = served.server.service.statistics().requests.get("cancelled", 0)
    body = {"model": "slow", "messages": MESSAGES, "max_tokens": 200, "threshold": 1.0, "n": 2, "stream": stream}
    cut(served, body | {"early_stop": False}, half=half)
    served.wait_until_idle()
    assert served.server.service.statistics().requests["cancelled"] == before + 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_response_is_counted_once(models: dict[str, LanguageModel], stream: bool) -> None:
    path = "/v1/chat/completions"
    with running({"slow": models["slow"]}) as made:
        cut(made, {"messages": MESSAGES, "max_tokens": 200, "threshold": 1.0, "n": 2, "stream": stream})
        until(lambda: sum(count for (at, _), count in list(made.server.counts.responses.items()) if at == path) == 1)
        assert made.counted("fewstep_cut_responses_total") == 1


def test_a_client_that_aborts_its_stream_frees_the_slot(served: Running, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="slow", messages=MESSAGES, max_tokens=200, stream=True, extra_body={"early_stop": False, "threshold": 1.0}
    )
    next(iter(stream))
    before = served.server.service.statistics().requests.get("cancelled", 0)
    stream.close()
    served.wait_until_idle()
    assert served.server.service.statistics().requests["cancelled"] == before + 1


def test_too_many_requests_are_told_when_to_come_back(served: Running) -> None:
    body = {"model": "slow", "messages": MESSAGES, "max_tokens": 100, "threshold": 1.0, "early_stop": False}
    with served.connected() as one:
        sent = json.dumps({**body, "n": 12, "stream": True}).encode()  # four slots and eight places
        one.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(sent) + sent)
        assert one.recv(1000).startswith(b"HTTP/1.1 200 ")
        response = served.post("/v1/chat/completions", body)
        refused(response, 429, code="queue_full")
        assert int(response.headers["retry-after"]) >= 1
    served.wait_until_idle()


def test_requests_of_all_kinds_at_once_get_what_they_get_alone(served: Running, models: dict[str, Any]) -> None:
    several = [
        {"model": name, "max_tokens": 5 + 3 * index, "temperature": (0.0, 0.8)[index % 2], "seed": index}
        for index in range(4)
        for name in ("block", "causal")
    ]
    answers: dict[int, str] = {}

    def ask(index: int) -> None:
        answers[index] = served.chat(QUESTION, **several[index]).json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(several))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, one in enumerate(several):
        settings = {**one, "max_new_tokens": one["max_tokens"]}
        lm = models[settings.pop("model")]
        del settings["max_tokens"]
        assert answers[index] == lm.generate(QUESTION, **settings).text


# The rest of the server


def test_health_metrics_and_paths(served: Running) -> None:
    assert served.get("/health").json() == {"status": "ok"}
    assert served.get("/ready").json() == {"status": "ok"}
    served.chat(max_tokens=4)
    text = served.get("/metrics").text
    assert "fewstep_running 0.0" in text
    assert 'fewstep_requests_total{outcome="completed"}' in text
    assert 'fewstep_request_seconds_bucket{le="+Inf"}' in text
    assert 'fewstep_http_responses_total{path="/v1/chat/completions",status="200"}' in text
    refused(served.get("/v1/nothing"), 404)
    refused(served.get("/v1/chat/completions"), 405, code="method_not_allowed")


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/metrics", "/compare/votes.csv"])
def test_head_is_answered_as_get_is_without_a_body(served: Running, path: str) -> None:
    whole, head = served.get(path), httpx2.head(served.url + path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert httpx2.head(served.url + "/v1/chat/completions").status_code == 405


def test_messages_that_the_template_refuses_are_named_as_the_field(
    served: Running, models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no model of it') }}{% endif %}"
    monkeypatch.setattr(models["block"].network.tokenizer, "chat_template", template + "{{ m.content }}{% endfor %}")
    system: Any = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    refused(served.post("/v1/chat/completions", {"messages": system}), 400, param="messages", code="invalid_value")
    asked = {"input": QUESTION, "instructions": "Be brief."}
    refused(served.post("/v1/responses", asked), 400, param="input", code="invalid_value")
    refused(served.post("/v1/responses", {"input": ""}), 400, param="input", code="invalid_value")


def test_gaps_of_a_request_of_which_one_is_refused_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most = set[int](), 0

    async def fill(_: Any, __: Any, asked: Asked, ___: Any) -> None:
        nonlocal most
        seed = asked.settings["seed"]
        under_way.add(seed)
        most = max(most, len(under_way))
        try:
            await asyncio.sleep(0.01 if seed < 3 else 60)
            if seed == 2:
                raise FewstepError("no place")
        finally:
            under_way.remove(seed)

    async def run() -> None:
        nothing: Any = None
        before = asyncio.all_tasks()
        asked = Asked(entry=nothing, prompt_ids=[1], settings={})
        with pytest.raises(FewstepError, match="no place"):
            await infill.fill_all(nothing, nothing, asked, [], range(20))
        assert not under_way
        assert asyncio.all_tasks() == before

    monkeypatch.setattr(infill, "fill", fill)
    asyncio.run(asyncio.wait_for(run(), 20))
    assert most == infill.MOST_FILLED_AT_ONCE


@pytest.mark.parametrize("name", ["draft", "heads", "engine"])
def test_a_setting_of_the_operator_is_called_so(served: Running, name: str) -> None:
    assert "operator" in refused(served.chat(**{name: "x"}), 400, param=name, code="unsupported_parameter")["message"]


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    served: Running, models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("was encoded")

    monkeypatch.setattr(models["full"], "encode", encode)
    monkeypatch.setattr(models["full"], "encode_part", encode)
    long = "a" * (1 + Entry(name="full", lm=models["full"], settings={}, created=0).most_characters)
    code = "context_length_exceeded"
    refused(served.chat(long, model="full"), 400, param="messages", code=code)
    refused(served.post("/v1/completions", {"model": "full", "prompt": long}), 400, param="prompt", code=code)


def test_a_block_beyond_the_positions_is_refused_before_a_pass(served: Running, models: dict[str, Any]) -> None:
    for name in ("block", "full"):
        size = models[name].network.max_positions + 1
        error = refused(served.chat(model=name, max_tokens=4, block_size=size), 400, param="block_size")
        assert "positions" in error["message"]


def test_the_page_has_a_strict_policy_and_no_way_out(served: Running, tmp_path: Any, monkeypatch: Any) -> None:
    from fewstep.serve import page

    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<h1>here</h1>")
    (tmp_path / "page" / "app.js").write_text("1")
    (tmp_path / "secret.html").write_text("no")
    monkeypatch.setattr(page, "FOLDER", tmp_path / "page")
    response = served.get("/")
    assert (response.text, response.headers["content-type"]) == ("<h1>here</h1>", "text/html; charset=utf-8")
    assert response.headers["content-security-policy"].startswith("default-src 'self'")
    assert served.get("/page/app.js").headers["content-type"].startswith("text/javascript")
    for way in (
        "../secret.html",
        "..%2fsecret.html",
        "%2e%2e/secret.html",
        "..%5csecret.html",
        "page/../../secret.html",
    ):
        answer = served.raw(f"GET /page/{way} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 404 "), way


def test_votes_are_counted_kept_and_exported(tmp_path: Any, models: dict[str, LanguageModel]) -> None:
    file = tmp_path / "votes.jsonl"
    with running({"block": models["block"]}, votes=file) as made:
        for a, b, winner in (("x", "y", "a"), ("y", "x", "b"), ("x", "y", "tie"), ("x", "y", "b")):
            response = made.post("/compare/votes", {"a": a, "b": b, "winner": winner, "prompt": '=1+"<b>'})
            assert response.status_code == 200
        refused(made.post("/compare/votes", {"a": "x", "b": "y", "winner": "c"}), 400, param="winner")
    with running({"block": models["block"]}, votes=file) as made:
        told = made.get("/compare/votes").json()
        assert told["n"] == 4
        expected = {"a": "x", "b": "y", "wins_a": 2, "wins_b": 1, "ties": 1, "n": 4, "share_a": 2 / 3}
        assert told["pairs"] == [{**expected, "share_a_ci95": [0.0, 1.0]}]
        exported = made.get("/compare/votes.csv")
        assert exported.headers["content-type"] == "text/csv; charset=utf-8"
        assert exported.text.splitlines()[1].endswith(',x,y,a,"\'=1+""<b>"')


def test_a_key_is_asked_for_and_never_logged(
    models: dict[str, LanguageModel], caplog: pytest.LogCaptureFixture
) -> None:
    from fewstep.serve.logs import JsonLines

    key = "secret-key"
    with caplog.at_level("INFO"), running({"block": models["block"]}, api_key=key) as made:
        for given in (None, "Bearer wrong", "Basic secret-key", f"Bearer {key}x", "Bearer", key):
            headers = {} if given is None else {"Authorization": given}
            for path in ("/v1/models", "/metrics", "/compare/votes", "/openapi.json"):
                response = made.get(path, headers=headers)
                refused(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
        headers = {"Authorization": f"Bearer {key}"}
        body = {"messages": [{"role": "user", "content": "private words"}], "max_tokens": 4}
        assert made.post("/v1/chat/completions", body, headers=headers).status_code == 200
        assert made.post("/v1/chat/completions", {**body, "stop": 5}, headers=headers).status_code == 400
        assert made.get(f"/v1/models?api_key={key}", headers=headers).status_code == 200
        assert made.get("/health").status_code == 200
    own = [record for record in caplog.records if record.name.startswith(("fewstep", "uvicorn"))]
    lines = [JsonLines().format(record) for record in own]
    told = "\n".join(lines)
    assert key not in told
    assert "private" not in told
    requests = [json.loads(line) for line in lines if json.loads(line)["event"] == "request"]
    assert {"id", "method", "path", "status", "seconds", "model", "completion_tokens", "passes"} <= set(requests[-4])


def test_no_page_of_another_site_may_call_unless_it_is_named(models: dict[str, LanguageModel]) -> None:
    with running({"block": models["block"]}) as made:
        response = made.get("/v1/models", headers={"Origin": "https://example.org"})
        assert "access-control-allow-origin" not in response.headers
    with running({"block": models["block"]}, cors=("https://example.org",), api_key="k") as made:
        for origin, allowed in (("https://example.org", True), ("https://example.com", False)):
            response = made.get("/v1/models", headers={"Origin": origin, "Authorization": "Bearer k"})
            assert ("access-control-allow-origin" in response.headers) == allowed
