// What can be set, as the texts that were typed, and what they mean to the server.

export const DEFAULTS = Object.freeze({
  effort: "medium",
  system: "",
  developer: "",
  tools: "",
  temperature: "",
  top_p: "",
  top_k: "",
  min_p: "",
  max_tokens: "",
  seed: "",
});

const NUMBERS = {
  temperature: { name: "Temperature", from: 0, to: 2 },
  top_p: { name: "Top p", from: 0, to: 1 },
  top_k: { name: "Top k", from: 0, to: 2 ** 31, whole: true },
  min_p: { name: "Min p", from: 0, to: 1 },
  max_tokens: { name: "Most tokens", from: 1, to: 2 ** 31, whole: true },
  seed: { name: "Seed", from: 0, to: Number.MAX_SAFE_INTEGER, whole: true },
};

export const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city right now.",
      parameters: {
        type: "object",
        properties: { city: { type: "string" }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } },
        required: ["city"],
      },
    },
  },
];

/** {values, problems}: numbers and tools as the server takes them, and by field why one can't be used. */
export function readSettings(settings) {
  const values = { tools: [] };
  const problems = {};
  for (const [field, rule] of Object.entries(NUMBERS)) {
    const text = settings[field].trim();
    if (!text) continue;
    const number = Number(text);
    const fits = Number.isFinite(number) && number >= rule.from && number <= rule.to;
    if (fits && (!rule.whole || Number.isInteger(number))) values[field] = number;
    else problems[field] = `${rule.name}: ${rangeText(rule)}, or nothing.`;
  }
  if (settings.tools.trim()) {
    const read = readTools(settings.tools);
    if (read.problem) problems.tools = read.problem;
    else values.tools = read.tools;
  }
  return { values, problems };
}

function rangeText({ from, to, whole }) {
  if (!whole) return `a number from ${from} to ${to}`;
  return `a whole number, at least ${from}${to === Number.MAX_SAFE_INTEGER ? ` and at most ${to}` : ""}`;
}

function readTools(text) {
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    return { problem: `Not JSON yet: ${error.message}` };
  }
  if (!Array.isArray(tools)) return { problem: "Expected a list of functions: [ { … } ]" };
  const names = new Set();
  for (const [index, tool] of tools.entries()) {
    const problem = toolProblem(tool, names);
    if (problem) return { problem: `Tool ${index + 1}: ${problem}` };
  }
  return { tools };
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function toolProblem(tool, names) {
  if (!isObject(tool)) return 'expected an object like {"type": "function", "function": {"name": …}}';
  const inner = tool.function ?? tool;
  if (!isObject(inner) || !/^[\w.-]+$/.test(inner.name ?? "")) {
    return "its function needs a name of letters, digits, _ . or -";
  }
  if (names.has(inner.name)) return `${inner.name} is listed twice`;
  names.add(inner.name);
  if (!isObject(inner.parameters ?? {})) return "parameters has to be a JSON Schema, an object";
  return "";
}
