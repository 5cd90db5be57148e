"""Chats and tool calls over OpenAI's interface, beside what Ossia makes of the same messages.

Compared is what a program gets: the text, the thinking, the calls with their arguments, why it ended.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from openai import OpenAI

from ossia.api import Reply
from ossia.demo.vocabulary import conversation_of
from ossia.engine import Engine, Request, Sampling, harmony_stops
from ossia.harmony import Renderer, Vocabulary, parse_completion
from ossia.model.transformer import Transformer

Row = dict[str, Any]


class Said(NamedTuple):
    """One answer taken apart; calls as (name, arguments)."""

    content: str
    thinking: str
    calls: tuple[tuple[str, Any], ...]
    finish: str


def openings(rows: Sequence[Row], *, each: int) -> list[Row]:
    """The first user turns of conversations, some without tools and as many with them."""
    found = [row | {"messages": row["messages"][:1]} for row in rows if row["messages"][0]["role"] == "user"]
    return [row for having in (False, True) for row in [one for one in found if ("tools" in one) == having][:each]]


def clients_chats(url: str, rows: Sequence[Row], *, max_tokens: int, thinking: str) -> list[Said]:
    """What a server at `url` answers greedily; `thinking` is what it calls the text of the analysis."""
    said = []
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        model = client.models.list().data[0].id
        for row in rows:
            asked = {"tools": row["tools"]} if "tools" in row else {}
            answer = client.chat.completions.create(
                model=model,
                messages=row["messages"],
                temperature=0,
                max_tokens=max_tokens,
                extra_body={"reasoning_effort": row.get("reasoning_effort", "medium")},
                **asked,
            ).choices[0]
            told, calls = answer.message, answer.message.tool_calls or ()
            made = tuple((call.function.name, json.loads(call.function.arguments)) for call in calls)
            extra = told.model_extra or {}
            said.append(Said(told.content or "", extra.get(thinking) or "", made, answer.finish_reason))
    return said


def well_formed(
    transformer: Transformer, vocab: Vocabulary, rows: Sequence[Row], *, max_tokens: int
) -> list[tuple[Row, Said]]:
    """Rows with Ossia's greedy answers: those in Harmony, one final message or calls that fit the row's tools.

    llama.cpp makes sure of both by a grammar, so that beside it nothing else can be compared.
    """
    renderer, stops = Renderer(vocab), harmony_stops(vocab)
    asked = [renderer.completion(conversation_of(row)) for row in rows]
    requests = [Request(ids, Sampling(0), max_tokens, stops) for ids in asked]
    found = []
    for row, completion in zip(rows, Engine(transformer).generate(requests), strict=True):
        try:
            said = taken_apart(Reply.of(vocab, completion))
        except json.JSONDecodeError:
            continue
        offered = {one["function"]["name"]: one["function"]["parameters"] for one in row.get("tools", ())}
        fit = all(name in offered and _fits(arguments, offered[name]) for name, arguments in said.calls)
        finals = sum(one.channel == "final" for one in parse_completion(vocab, completion.ids))
        if said.finish != "length" and finals + bool(said.calls) == 1 and fit:
            found.append((row, said))
    return found


def taken_apart(reply: Reply) -> Said:
    """As servers tell it. Raises json.JSONDecodeError for a call whose arguments are no JSON."""
    made = tuple((call["function"]["name"], json.loads(call["function"]["arguments"])) for call in reply.tool_calls)
    return Said("" if made else reply.content, reply.thinking, made, "tool_calls" if made else reply.finish)


def _fits(arguments: Any, schema: Row) -> bool:
    return isinstance(arguments, dict) and set(arguments) == set(schema["required"])
