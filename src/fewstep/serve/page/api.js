// Requests to the server that this page comes from. Paths are relative, so that a proxy may put the server below a path.

const KEY = "fewstep-api-key";

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

// sessionStorage: the key is forgotten when the tab is closed.
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

export async function getJson(path) {
  return (await request(path)).json();
}

export async function getBlob(path) {
  return (await request(path)).blob();
}

export async function postJson(path, body) {
  return (await request(path, { body })).json();
}

// The chunks of a stream of server-sent events, up to [DONE]. ApiError for an error on the way.
export async function* streamed(path, body, signal) {
  const response = await request(path, { body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new ApiError("the connection ended before the answer did; ask again");
    text += value.replaceAll("\r", "");
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event
        .split("\n")
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart())
        .join("\n");
      if (data === "[DONE]") return;
      if (!data) continue; // a comment, which keeps the connection open
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorOf(chunk.error, 200);
      yield chunk;
    }
  }
}

async function request(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server cannot be reached; is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) document.dispatchEvent(new Event("key-needed"));
  const answer = await response.json().catch(() => ({}));
  throw errorOf(answer.error ?? { message: `the server answered with status ${response.status}` }, response.status);
}

function errorOf({ message, code = null, param = null }, status) {
  return new ApiError(message, { status, code, param });
}
