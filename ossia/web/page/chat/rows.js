// Nodes of a branch as messages: those that the server is asked with, and the row that `ossia train` learns from.

export function isEmpty(node) {
  return node.role === "assistant" && !node.content && !node.reasoning && !node.calls.length;
}

function messagesOf(settings, nodes, thinking) {
  const messages = [];
  if (settings.system.trim()) messages.push({ role: "system", content: settings.system });
  if (settings.developer.trim()) messages.push({ role: "developer", content: settings.developer });
  for (const node of nodes) {
    if (node.role === "user") {
      messages.push({ role: "user", content: node.text });
    } else if (node.role === "tool") {
      for (const { id, text } of node.results) messages.push({ role: "tool", tool_call_id: id, content: text });
    } else if (!isEmpty(node)) {
      messages.push(assistantMessage(node, thinking));
    }
  }
  return messages;
}

function assistantMessage(node, thinking) {
  const message = { role: "assistant" };
  if (node.reasoning) message[thinking] = node.reasoning;
  if (node.content) message.content = node.content;
  if (node.calls.length) {
    message.tool_calls = node.calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
  }
  return message;
}

/** The body of a chat completion that goes on after `nodes`. `settings` and `values` as chat/settings.js has them. */
export function requestBody(model, settings, values, nodes) {
  const { tools, max_tokens: most, ...sampling } = values;
  const body = {
    model,
    messages: messagesOf(settings, nodes, "reasoning"),
    stream: true,
    stream_options: { include_usage: true },
    reasoning_effort: settings.effort,
    ...sampling,
  };
  if (most !== undefined) body.max_completion_tokens = most;
  if (tools.length) body.tools = tools;
  return body;
}

/** {row, remarks}: one row in the messages form, and what whoever trains on it should know. Null without an answer. */
export function trainingRow(settings, values, nodes) {
  const last = nodes.findLastIndex((node) => node.role === "assistant" && !isEmpty(node));
  if (last < 0) return null;
  const kept = nodes.slice(0, last + 1);
  const row = { messages: messagesOf(settings, kept, "thinking"), reasoning_effort: settings.effort };
  if (values.tools.length) row.tools = values.tools;
  return { row, remarks: remarksOn(nodes, kept, values.tools) };
}

function remarksOn(nodes, kept, tools) {
  const remarks = [];
  if (nodes.length > kept.length) remarks.push("What comes after the last answer is left out.");
  if (kept.some(isEmpty)) remarks.push("An empty answer is left out.");
  const cut = kept.filter((node) => node.role === "assistant" && !isEmpty(node) && isCutOff(node)).length;
  if (cut) {
    const whose = cut === 1 ? "An answer breaks off" : `${cut} answers break off`;
    remarks.push(`${whose} in the middle: edit before training, or the model learns to end there.`);
  }
  const known = new Set(tools.map((tool) => (tool.function ?? tool).name));
  const unknown = new Set(
    kept
      .flatMap((node) => node.calls ?? [])
      .map((call) => call.name)
      .filter((n) => !known.has(n)),
  );
  if (known.size && unknown.size) {
    remarks.push(
      `Called, but not among the tools in the settings: ${[...unknown].join(", ")}. The row would be refused.`,
    );
  }
  return remarks;
}

export function isCutOff(node) {
  return node.state !== "done" || node.finish === "length";
}
