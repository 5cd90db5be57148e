"""Chat from Python with tools: the model calls a function, hears its result, and goes on until it answers.

Run: python examples/tools.py MODEL [--adapter RUN] "What is 12 times 7?"
"""

import argparse
import json

import ossia

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
MULTIPLY = {"name": "multiply", "description": "Multiplies two whole numbers.", "parameters": PARAMETERS}


def multiply(call: dict) -> str:
    """The text that the model hears back, whatever it wrote: a model may name another tool or write broken JSON."""
    if call["name"] != "multiply":
        return json.dumps({"error": f"no tool {call['name']}; there is multiply"})
    try:
        numbers = json.loads(call["arguments"])
        return json.dumps({"result": int(numbers["a"]) * int(numbers["b"])})
    except (ValueError, KeyError, TypeError) as error:
        return json.dumps({"error": repr(error)})


options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("model", help="a gpt-oss checkpoint's folder, or owner/name on the hub")
options.add_argument("question")
options.add_argument("--adapter", help="a run folder")
options.add_argument("--temperature", type=float, default=1.0)
given = options.parse_args()

model = ossia.load(given.model, adapter=given.adapter)
messages = [{"role": "user", "content": given.question}]
for _ in range(4):  # a model may go on calling for ever
    reply = model.chat(
        messages,
        tools=[{"type": "function", "function": MULTIPLY}],
        developer="Multiply with the tool, never in your head.",
        reasoning_effort="low",
        temperature=given.temperature,
        max_tokens=512,
    )
    if reply.thinking:
        print(f"thinking  {reply.thinking}")
    messages.append(reply.message)  # thinking and calls included: Harmony keeps them until the answer
    if not reply.tool_calls:
        break
    for call in reply.tool_calls:
        result = multiply(call["function"])
        print(f"call      {call['function']['name']}({call['function']['arguments']}) -> {result}")
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
print(f"answer    {reply.content}")
