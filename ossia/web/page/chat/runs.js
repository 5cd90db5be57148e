// Answers under way. A run belongs to a node, not to what is shown: it goes on while another conversation is open.

import { ApiFailure, streamChat } from "./api.js";

export function newAnswer(model) {
  return {
    role: "assistant",
    model,
    reasoning: "",
    content: "",
    calls: [],
    state: "streaming",
    finish: null,
    usage: null,
    pieces: 0,
    firstSeconds: null,
    thinkingSeconds: null,
    seconds: 0,
    error: null,
    version: null,
  };
}

export class Runs {
  constructor() {
    this.controllers = new Map();
  }

  has(node) {
    return this.controllers.has(node);
  }

  stop(node) {
    this.controllers.get(node)?.abort();
  }

  stopAll() {
    for (const controller of this.controllers.values()) controller.abort();
  }

  /** Fills `node` with the answer to `body`, and calls `changed()` after every piece and at the end. */
  async run(node, body, key, changed) {
    const controller = new AbortController();
    this.controllers.set(node, controller);
    const begun = performance.now();
    try {
      for await (const chunk of streamChat(body, key, controller.signal)) {
        take(node, chunk, (performance.now() - begun) / 1000);
        changed();
      }
      node.state = "done";
    } catch (error) {
      node.state = error.name === "AbortError" ? "stopped" : "failed";
      if (error instanceof ApiFailure) {
        node.error = { message: error.message, next: error.next, status: error.status, param: error.param };
      } else if (node.state === "failed") {
        node.error = { message: `This page failed: ${error.message}`, next: "Reload it.", status: 0, param: null };
        throw error;
      }
    } finally {
      this.controllers.delete(node);
      changed();
    }
  }
}

function take(node, chunk, seconds) {
  if (chunk.usage) node.usage = { prompt: chunk.usage.prompt_tokens, completion: chunk.usage.completion_tokens };
  if (chunk.usage?.completion_tokens_details)
    node.usage.reasoning = chunk.usage.completion_tokens_details.reasoning_tokens;
  if (chunk.system_fingerprint) node.version = chunk.system_fingerprint.replace("-", " ");
  const choice = chunk.choices[0];
  if (!choice) return;
  if (choice.finish_reason) {
    node.finish = choice.finish_reason;
    node.seconds = seconds;
  }
  const { content, reasoning, reasoning_content: other, tool_calls: calls } = choice.delta;
  const thought = reasoning ?? other;
  if (!content && !thought && !calls) return;
  node.firstSeconds ??= seconds;
  node.seconds = seconds;
  node.pieces += 1;
  if (thought) node.reasoning += thought;
  if (node.reasoning && !thought) node.thinkingSeconds ??= seconds - node.firstSeconds;
  if (content) node.content += content;
  for (const { index, id, function: part } of calls ?? []) {
    node.calls[index] ??= { id, name: part.name, arguments: "" };
    node.calls[index].arguments += part.arguments ?? "";
  }
}

/** Tokens a second after the first one, or null where that can't be said. */
export function tokensPerSecond(node) {
  const tokens = node.usage?.completion ?? 0;
  const streamed = node.seconds - (node.firstSeconds ?? 0);
  // what came at once was not made at once: then the whole time is the truer measure
  if (streamed < 0.25) return tokens && node.seconds ? tokens / node.seconds : null;
  return (tokens - 1) / streamed;
}
