"""litellm: chats, streams, stop texts, errors, completions, infill in the shape of Inception's."""

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

URL = sys.argv[1]
MESSAGES = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples does he have?"}]
HERE = {"api_base": f"{URL}/v1", "api_key": "none", "max_tokens": 32, "num_retries": 0}


def chat(**fields: object) -> object:
    return litellm.completion(messages=MESSAGES, **{"model": "openai/gsm-student", **HERE, **fields})


whole = chat().choices[0].message.content
assert whole, "create"
print("create: ok")

chunks = list(chat(stream=True, stream_options={"include_usage": True}))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole, "stream"
assert any(getattr(chunk, "usage", None) for chunk in chunks), "usage"
print("stream, usage: ok")

answer = chat(n=2, temperature=0.9, seed=3)
assert len(answer.choices) == 2
print("n, seed: ok")

assert chat(stop=[whole[5:9]]).choices[0].message.content == whole[: whole.index(whole[5:9])], "stop"
print("stop: ok")

answer = chat(logprobs=True, top_logprobs=2)
assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2, "logprobs"
print("logprobs: ok")

assert chat(extra_body={"threshold": 0.5}).choices[0].message.content
print("few-step settings: ok")


def refusal_of(**fields: object) -> Exception | None:
    try:
        chat(**fields)
    except Exception as error:  # which one it is is what is tested
        return error
    return None


assert isinstance(refusal_of(extra_body={"logit_bias": {"1": 5}}), litellm.BadRequestError)
assert isinstance(refusal_of(max_tokens=100_000), litellm.BadRequestError)
assert isinstance(refusal_of(model="openai/no-model"), litellm.NotFoundError)
print("errors: ok")

stream = chat(stream=True)
next(iter(stream))
stream.completion_stream.close()
print("abort: ok")

text = litellm.text_completion(model="text-completion-openai/gsm-student", prompt="Tom has 3", **HERE)
assert text.choices[0].text
print("text completion: ok")

filled = litellm.text_completion(
    model="text-completion-inception/gsm-teacher", prompt="Tom has 3+4=", suffix=" apples.", **{**HERE, "max_tokens": 6}
)
assert filled.choices[0].text, "suffix"
print("infill (text-completion-inception): ok")
