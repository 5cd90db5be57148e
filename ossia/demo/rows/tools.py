"""The demo's four tools and what they know: a calculator, world clocks, weather and a glossary of musical terms.

Each tool is a JSON Schema (what the model is shown) and a function (what its result message holds), so a tool result
in the data is computed, never typed in. The clock stands at one fixed moment and the weather is a table: rows must
not depend on the day they are made. Pure Python: no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

MOMENT_UTC = 15  # the fixed moment of every clock: 15:00 UTC on a day in January
UTC_OFFSET_H = {
    "Lisbon": 0,
    "Oslo": 1,
    "Cairo": 2,
    "Nairobi": 3,
    "Dubai": 4,
    "Hanoi": 7,
    "Tokyo": 9,
    "Sydney": 11,
    "Lima": -5,
    "Denver": -7,
}
WEATHER = {
    "Lisbon": (15, "cloudy"),
    "Oslo": (2, "snow"),
    "Cairo": (19, "clear"),
    "Nairobi": (24, "clear"),
    "Dubai": (23, "clear"),
    "Hanoi": (18, "rain"),
    "Tokyo": (9, "clear"),
    "Sydney": (26, "rain"),
    "Lima": (25, "cloudy"),
    "Denver": (4, "snow"),
}
GLOSSARY = {
    "adagio": "slow",
    "allegro": "fast",
    "andante": "at a walking pace",
    "coda": "the closing part",
    "crescendo": "growing louder",
    "diminuendo": "growing softer",
    "forte": "loud",
    "legato": "smooth, with notes joined",
    "ossia": "another way to play a passage",
    "piano": "soft",
    "presto": "very fast",
    "staccato": "short, with notes apart",
}


def calculator(expression: str) -> dict[str, Any]:
    """`"12 * 7"` -> `{"result": 84}`; one operator of + - * between two whole numbers, spaces around it."""
    left, operator, right = expression.split(" ")
    a, b = int(left), int(right)
    return {"result": {"+": a + b, "-": a - b, "*": a * b}[operator]}


def get_time(city: str) -> dict[str, Any]:
    """`{"time": "16:00"}`, the 24-hour local time at the fixed moment."""
    return {"time": f"{(MOMENT_UTC + UTC_OFFSET_H[city]) % 24:02d}:00"}


def get_weather(city: str) -> dict[str, Any]:
    """`{"celsius": 15, "sky": "cloudy"}`."""
    celsius, sky = WEATHER[city]
    return {"celsius": celsius, "sky": sky}


def lookup(term: str) -> dict[str, Any]:
    """`{"meaning": "slow"}`, or `{"error": "no entry"}` where the glossary lacks the term."""
    return {"meaning": GLOSSARY[term]} if term in GLOSSARY else {"error": "no entry"}


def _schema(name: str, description: str, argument: str, meaning: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string", "description": meaning}},
        "required": [argument],
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: dict[str, tuple[dict[str, Any], Callable[[str], dict[str, Any]]]] = {
    "calculator": (_schema("calculator", "Works out a sum.", "expression", "Such as 3 * 4"), calculator),
    "get_time": (_schema("get_time", "The local time in a city.", "city", "Name of the city"), get_time),
    "get_weather": (_schema("get_weather", "The weather in a city.", "city", "Name of the city"), get_weather),
    "lookup": (_schema("lookup", "Looks up a musical term.", "term", "The term"), lookup),
}


def schema(name: str) -> dict[str, Any]:
    """The tool as an entry of OpenAI's `tools` list."""
    return TOOLS[name][0]


def run_tool(name: str, argument: str) -> str:
    """What the tool answers, as the JSON text of its result message."""
    return json.dumps(TOOLS[name][1](argument))


def arguments(name: str, argument: str) -> str:
    """The JSON text of a call's arguments; every tool here takes one string."""
    (key,) = schema(name)["function"]["parameters"]["properties"]
    return json.dumps({key: argument})
