"""Short everyday conversations with thinking, tool calls, several turns and developer instructions.

Every kind is one function of a random generator; what can be right or wrong in it (sums, times, days, tool results) is
computed. Rows are in OpenAI's messages form with `thinking`, `tools` and `reasoning_effort`. Effort shows: low answers
without thinking, high checks itself. Pure Python: no torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from ossia.demo.rows import tools
from ossia.demo.rows.sorting import Row

Message = dict[str, Any]

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBER_WORDS = ("two", "three", "four", "five", "six")
NAMES = ("Mara", "Jonas", "Aiko", "Samuel", "Leila", "Peter", "Nina", "Omar")
GOODS = ("bread", "milk", "rice", "apples", "tea", "salt", "butter", "eggs")
WORDS = ("garden", "river", "violin", "candle", "window", "orange", "planet", "silver", "bridge", "forest")
UNKNOWN_TERMS = ("guitar", "ticket", "castle", "lemon")
CITIES = tuple(tools.UTC_OFFSET_H)
SKY = {"clear": "the sky is clear", "cloudy": "it is cloudy", "rain": "it is raining", "snow": "it is snowing"}


def user(text: str) -> Message:
    """What a person says."""
    return {"role": "user", "content": text}


def assistant(text: str, thinking: str | None = None) -> Message:
    """A final answer, with its thinking where there is any."""
    return {"role": "assistant", "content": text} | ({"thinking": thinking} if thinking else {})


def tool_turn(calls: list[tuple[str, str]], thinking: str | None, first_id: int = 1) -> list[Message]:
    """The assistant's calls (tool name, argument) in one message, then each tool's computed result."""
    ids = [f"call_{first_id + i}" for i in range(len(calls))]
    made = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": tools.arguments(name, argument)}}
        for call_id, (name, argument) in zip(ids, calls, strict=True)
    ]
    results = [
        {"role": "tool", "tool_call_id": call_id, "content": tools.run_tool(name, argument)}
        for call_id, (name, argument) in zip(ids, calls, strict=True)
    ]
    ask = {"role": "assistant", "content": "", "tool_calls": made} | ({"thinking": thinking} if thinking else {})
    return [ask, *results]


def _effort(rng: random.Random) -> str:
    return rng.choice(("low", "medium", "medium", "high"))


def _think(effort: str, thought: str, check: str) -> str | None:
    """Thinking that fits the effort: none, the thought, or the thought and a check."""
    return {"low": None, "medium": thought, "high": f"{thought} {check}"}[effort]


def _row(messages: list[Message], effort: str, *, tool_names: tuple[str, ...] = ()) -> Row:
    row: Row = {"messages": messages, "reasoning_effort": effort}
    return row | ({"tools": [tools.schema(name) for name in tool_names]} if tool_names else {})


def calculate(rng: random.Random) -> Row:
    """A sum that goes through the calculator."""
    a, b = rng.randrange(11, 60), rng.randrange(3, 15)
    operator, words = rng.choice((("+", "plus"), ("-", "minus"), ("*", "times")))
    expression, effort = f"{a} {operator} {b}", _effort(rng)
    ask = rng.choice(("What is {a} {words} {b}?", "Please work out {a} {words} {b}.", "How much is {a} {words} {b}?"))
    result = tools.calculator(expression)["result"]
    calls = tool_turn([("calculator", expression)], _think(effort, "The calculator will be exact.", "I use it once."))
    messages = [user(ask.format(a=a, words=words, b=b)), *calls, assistant(f"{a} {words} {b} is {result}.")]
    return _row(messages, effort, tool_names=("calculator",))


def clock(rng: random.Random) -> Row:
    """The time in one city, and often in a second one a turn later."""
    first, second = rng.sample(CITIES, 2)
    effort = _effort(rng)
    ask = rng.choice(("What time is it in {city}?", "Can you tell me the time in {city}?", "How late is it in {city}?"))
    messages = [user(ask.format(city=first))]
    for number, city in enumerate((first, second) if rng.random() < 0.5 else (first,), start=1):
        if number > 1:
            messages.append(user(f"And in {city}?"))
        thinking = _think(effort, f"I need the time in {city}.", "The clock tool has it.")
        messages += tool_turn([("get_time", city)], thinking, number)
        messages.append(assistant(f"It is {tools.get_time(city)['time']} in {city}."))
    return _row(messages, effort, tool_names=("get_time",))


def weather(rng: random.Random) -> Row:
    """The weather in a city, then whether to take an umbrella, which needs no second call."""
    city, effort = rng.choice(CITIES), _effort(rng)
    celsius, sky = tools.WEATHER[city]
    wet = sky in ("rain", "snow")
    ask = rng.choice(("How is the weather in {city}?", "What is it like outside in {city}?"))
    thinking = _think(effort, f"I need the weather in {city}.", "The weather tool has it.")
    messages = [
        user(ask.format(city=city)),
        *tool_turn([("get_weather", city)], thinking),
        assistant(f"It is {celsius} degrees in {city} and {SKY[sky]}."),
    ]
    if rng.random() < 0.5:
        advice = "Yes, take one with you." if wet else "No, you can leave it at home."
        doubt = _think(effort, f"In {city} {SKY[sky]}.", "So that is " + ("wet." if wet else "dry."))
        messages += [user("Do I need an umbrella?"), assistant(advice, doubt)]
    return _row(messages, effort, tool_names=("get_weather",))


def warmer(rng: random.Random) -> Row:
    """Two cities compared through two calls made at once."""
    first, second = rng.sample(CITIES, 2)
    effort = _effort(rng)
    degrees = {city: tools.WEATHER[city][0] for city in (first, second)}
    best = max(degrees, key=lambda city: degrees[city])
    thinking = _think(effort, "I need the weather in both cities.", "Two calls will do.")
    messages = [
        user(rng.choice(("Where is it warmer, {a} or {b}?", "Is {a} or {b} warmer?")).format(a=first, b=second)),
        *tool_turn([("get_weather", first), ("get_weather", second)], thinking),
        assistant(f"It is warmer in {best}, with {degrees[best]} degrees."),
    ]
    return _row(messages, effort, tool_names=("get_weather", "get_time"))


def glossary(rng: random.Random) -> Row:
    """A musical term looked up; a term that is not there is said to be missing, not made up."""
    term = rng.choice((*tools.GLOSSARY, *UNKNOWN_TERMS))
    effort = _effort(rng)
    ask = rng.choice(
        ("What does {term} mean in music?", "Explain the term {term}, please.", "What is meant by {term}?")
    )
    found = tools.lookup(term)
    answer = f"{term} means {found['meaning']}." if "meaning" in found else f"The glossary has no entry for {term}."
    thinking = _think(effort, f"I look up {term}.", "I say so if it is missing.")
    messages = [user(ask.format(term=term)), *tool_turn([("lookup", term)], thinking), assistant(answer)]
    return _row(messages, effort, tool_names=("lookup",))


def weekday(rng: random.Random) -> Row:
    """Counting days forward from a weekday."""
    start, word = rng.choice(DAYS), rng.choice(NUMBER_WORDS)
    steps, effort = NUMBER_WORDS.index(word) + 2, _effort(rng)
    passed = [DAYS[(DAYS.index(start) + i) % 7] for i in range(1, steps + 1)]
    ask = rng.choice(("Which day comes {n} days after {day}?", "It is {day}. What day is it in {n} days?"))
    thinking = _think(effort, f"After {start}: {', '.join(passed)}.", f"That is {word} days.")
    return _row([user(ask.format(n=word, day=start)), assistant(f"It is {passed[-1]}.", thinking)], effort)


def minutes(rng: random.Random) -> Row:
    """Hours into minutes, with the multiplication shown."""
    hours, effort = rng.randrange(2, 13), _effort(rng)
    ask = rng.choice(("How many minutes are in {n} hours?", "A trip takes {n} hours. How many minutes is that?"))
    thinking = _think(effort, f"{hours} times 60 is {hours * 60}.", "An hour has 60 minutes.")
    return _row([user(ask.format(n=hours)), assistant(f"{hours} hours are {hours * 60} minutes.", thinking)], effort)


def spelling(rng: random.Random) -> Row:
    """A word spelled out, then backwards."""
    word, effort = rng.choice(WORDS), _effort(rng)
    letters = " ".join(word)
    messages = [user(rng.choice(("Spell {w}.", "How do you spell {w}?")).format(w=word)), assistant(letters)]
    if rng.random() < 0.7:
        back = " ".join(reversed(word))
        thinking = _think(effort, f"Letters: {letters}. Backwards: {back}.", f"There are {len(word)} letters.")
        messages += [user("And backwards?"), assistant(back, thinking)]
    return _row(messages, effort)


def acquaintance(rng: random.Random) -> Row:
    """Three turns in which a name has to be remembered."""
    name, effort = rng.choice(NAMES), _effort(rng)
    day = rng.choice(DAYS)
    messages = [
        user(rng.choice(("Hello, I am {n}.", "Hi! My name is {n}.")).format(n=name)),
        assistant(f"Hello {name}, what can I do for you?"),
        user(f"I have a lesson on {day}."),
        assistant(f"Good, I will keep {day} in mind."),
    ]
    if rng.random() < 0.5:
        thinking = _think(effort, f"The name was {name}.", "It was in the first message.")
        return _row([*messages, user("What is my name?"), assistant(f"Your name is {name}.", thinking)], effort)
    thinking = _think(effort, f"The lesson is on {day}.", "It was in the message before.")
    return _row([*messages, user("When is my lesson?"), assistant(f"Your lesson is on {day}.", thinking)], effort)


def shopping(rng: random.Random) -> Row:
    """A list that grows by one thing."""
    first, second, third = rng.sample(GOODS, 3)
    effort = _effort(rng)
    thinking = _think(effort, f"The list was {first} and {second}.", f"Now also {third}.")
    messages = [
        user(f"My shopping list: {first} and {second}."),
        assistant(f"Noted: {first} and {second}."),
        user(rng.choice(("Please add {x}.", "I also need {x}.")).format(x=third)),
        assistant(f"Your list is now {first}, {second} and {third}.", thinking),
    ]
    return _row(messages, effort)


def instructed(rng: random.Random) -> Row:
    """A plain question under developer instructions that change the form of the answer."""
    row = rng.choice((weekday, minutes))(rng)
    rules: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("Answer in one word.", lambda text: text.rstrip(".").split(" ")[-1 if text.startswith("It is") else 3]),
        ("Begin every answer with: Certainly.", lambda text: f"Certainly. {text}"),
        ("You speak to a child. End every answer with: Well asked!", lambda text: f"{text} Well asked!"),
    )
    instruction, form = rng.choice(rules)
    question, answer = row["messages"]
    role = rng.choice(("developer", "system"))
    messages = [{"role": role, "content": instruction}, question, answer | {"content": form(answer["content"])}]
    return row | {"messages": messages}


KINDS: tuple[Callable[[random.Random], Row], ...] = (
    calculate,
    clock,
    weather,
    warmer,
    glossary,
    weekday,
    minutes,
    spelling,
    acquaintance,
    shopping,
    instructed,
)


def chat_rows(count: int, rng: random.Random) -> list[Row]:
    """`count` different conversations, all kinds in turn; no two rows are equal."""
    rows: list[Row] = []
    seen: set[str] = set()
    draws = 0
    while len(rows) < count:
        row = KINDS[draws % len(KINDS)](rng)
        draws += 1
        assert draws < 100 * count, f"{len(rows)} different conversations found, {count} wanted"
        key = json.dumps(row, sort_keys=True)
        if key not in seen:
            seen.add(key)
            rows.append(row)
    return rows
