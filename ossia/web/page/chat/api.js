// The server: what it serves, and answers as they stream in. Addresses are relative, so a proxy may put us anywhere.

/** An answer that is an error: the server's words as a sentence, and what to do next. */
export class ApiFailure extends Error {
  constructor(words, { status = 0, code = null, param = null, wait = 0 } = {}) {
    super(/[.!?]$/.test(words) ? words : `${words}.`);
    this.status = status;
    this.code = code;
    this.param = param;
    this.wait = wait;
  }

  get next() {
    if (this.code === "broken_stream") return "What came so far is kept. Try again.";
    if (this.status === 0) return "Is ossia serve still running? Start it again, then try again.";
    if (this.status === 401) return "Type the key that the server was started with into the settings, then try again.";
    if (this.status === 429) return `Try again${this.wait ? ` in ${this.wait} s` : " in a moment"}.`;
    if (this.code === "context_length_exceeded") {
      return "Edit an earlier message to shorten the conversation, or start a new one.";
    }
    if (this.code === "model_not_found") return "Choose another model above, then try again.";
    if (this.status === 503) return "Start the server again, then try again.";
    if (this.status >= 500) return "Try again. If it comes back, the server's log says more.";
    if (this.param) return `Change ${this.param} in the settings or in the messages, then try again.`;
    return "Change what the message names, then try again.";
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(new URL(`v1/${path}`, document.baseURI), options);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    throw new ApiFailure("The server doesn't answer.");
  }
  if (response.ok) return response;
  const text = await response.text();
  const shaped = (response.headers.get("content-type") ?? "").startsWith("application/json");
  const found = shaped ? JSON.parse(text).error : null;
  throw failureOf(found ?? { message: `The server answered ${response.status} ${response.statusText}.` }, {
    status: response.status,
    wait: Number(response.headers.get("retry-after")) || 0,
  });
}

function failureOf(error, about) {
  return new ApiFailure(error.message, { code: error.code, param: error.param, ...about });
}

/**
 * {models: [{id, adapter, parent, length, step, problem}], about}. Raises ApiFailure.
 * step: of the run that an adapter follows, null before the first; problem: why it isn't the newest one's.
 */
export async function listModels(key) {
  const response = await ask("ossia/info", { headers: headers(key), cache: "no-store" });
  const about = await response.json();
  return { models: about.models.map((model) => ({ ...model, length: model.context_length })), about };
}

/** The chunks of a streamed chat completion. Raises ApiFailure, or an AbortError when `signal` says so. */
export async function* streamChat(body, key, signal) {
  const response = await ask("chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of serverEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw failureOf(chunk.error, { status: 500 });
    yield chunk;
  }
  throw brokenStream();
}

function brokenStream() {
  return new ApiFailure("The connection broke off before the answer was complete.", { code: "broken_stream" });
}

async function* serverEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      throw brokenStream();
    }
    if (read.done) return;
    text += decoder.decode(read.value, { stream: true });
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const lines = event.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
