"""langchain-openai: invoke, stream, batch, stop texts, log-probabilities, errors, abort."""

import sys

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

URL = sys.argv[1]
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does he have?"
HERE = {"base_url": f"{URL}/v1", "api_key": "none", "model": "gsm-student", "max_retries": 0, "temperature": 0}

model = ChatOpenAI(**HERE, max_tokens=32)
whole = model.invoke(QUESTION)
assert whole.content, "invoke"
assert whole.usage_metadata["output_tokens"] > 0, "usage"
print("invoke, usage: ok")

assert "".join(chunk.content for chunk in model.stream(QUESTION)) == whole.content, "stream"
print("stream: ok")

assert [one.content for one in model.batch([QUESTION, QUESTION])] == [whole.content] * 2, "batch"
print("batch: ok")

stop = whole.content[5:9]
assert model.invoke(QUESTION, stop=[stop]).content == whole.content[: whole.content.index(stop)], "stop"
print("stop: ok")

told = ChatOpenAI(**HERE, max_tokens=8, logprobs=True, top_logprobs=2).invoke(QUESTION)
assert len(told.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2, "logprobs"
print("logprobs: ok")

several = ChatOpenAI(**{**HERE, "temperature": 0.9}, max_tokens=8, n=2).generate([[HumanMessage(QUESTION)]])
assert len(several.generations[0]) == 2, "n"
print("n: ok")

assert ChatOpenAI(**HERE, max_tokens=32, extra_body={"threshold": 0.5}).invoke(QUESTION).content
print("few-step settings: ok")

assert ChatOpenAI(**HERE, max_tokens=32, use_responses_api=True).invoke(QUESTION).text == whole.content, "responses"
print("responses: ok")

refused = None
try:
    model.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke(QUESTION)
except openai.BadRequestError as error:
    refused = error.param
assert refused == "tools", refused
print("errors: ok")

stream = model.stream(QUESTION)
next(stream)
stream.close()
print("abort: ok")

assert OpenAI(**HERE, max_tokens=8).invoke("Tom has 3"), "completion"
print("completion: ok")
