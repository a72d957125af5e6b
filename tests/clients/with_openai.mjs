// OpenAI's client for JavaScript: create, stream, n, stop, log-probabilities, suffix, responses, errors, abort.
import assert from "node:assert";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const content = "Tom has 3 apples and buys 4 more. How many apples does he have?";
const asked = { model: "gsm-student", messages: [{ role: "user", content }], max_tokens: 32 };

const whole = (await client.chat.completions.create(asked)).choices[0].message.content;
assert(whole);
console.log("create: ok");

let text = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole);
const final = await client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } }).finalChatCompletion();
assert.equal(final.choices[0].message.content, whole);
console.log("stream, its helper: ok");

assert.equal((await client.chat.completions.create({ ...asked, n: 2, temperature: 0.9, seed: 1 })).choices.length, 2);
console.log("n, seed: ok");

const stop = whole.slice(5, 9);
const stopped = await client.chat.completions.create({ ...asked, stop: [stop] });
assert.equal(stopped.choices[0].message.content, whole.slice(0, whole.indexOf(stop)));
console.log("stop: ok");

const told = await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 2, threshold: 0.5 });
assert.equal(told.choices[0].logprobs.content[0].top_logprobs.length, 2);
console.log("logprobs, few-step settings: ok");

const filled = await client.completions.create({ model: "gsm-teacher", prompt: "Tom has 3+4=", suffix: " apples.", max_tokens: 6 });
assert(filled.choices[0].text);
console.log("suffix: ok");

const kinds = [];
for await (const event of await client.responses.create({ model: "gsm-student", input: content, max_output_tokens: 32, stream: true })) {
  kinds.push(event.type);
}
assert.equal(kinds[0], "response.created");
assert.equal((await client.responses.create({ model: "gsm-student", input: content, max_output_tokens: 32 })).output_text, whole);
console.log("responses: ok");

await assert.rejects(client.chat.completions.create({ ...asked, logit_bias: { 5: 1 } }), (error) => error.status === 400 && error.param === "logit_bias");
await assert.rejects(client.chat.completions.create({ ...asked, model: "none" }), (error) => error.code === "model_not_found");
console.log("errors: ok");

const stream = await client.chat.completions.create({ ...asked, stream: true });
for await (const _ of stream) {
  stream.controller.abort();
  break;
}
console.log("abort: ok");
const names = [];
for await (const model of client.models.list()) names.push(model.id);
assert(names.includes("gsm-student"));
console.log("models: ok");
