"""A chat or a plain completion as OpenAI's clients ask for it -> requests of the engine.

Harmony is inside: `ossia.harmony` reads the messages and renders them, old thinking left out as the format wants it.
| field                | becomes                                                                                       |
|----------------------|-----------------------------------------------------------------------------------------------|
| system, developer    | instructions of the developer message                                                         |
| tools                | the developer message's functions; with tool_choice none they are left out of the prompt      |
| reasoning_effort     | the system message's                                                                          |
| n, seed              | one request a choice; choice 0 of a seed is what n = 1 gives                                  |
| stop                 | looked for in the visible text by `turn.py`, so thinking is never cut                         |
| no max_tokens        | what is left of the context                                                                   |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ossia.engine import Constraint, Request, Sampling, harmony_stops
from ossia.engine.grammar import GrammarCompiler
from ossia.errors import HarmonyError, TokenizerError
from ossia.harmony import Conversation, Effort, Renderer, Vocabulary, conversation_from_messages
from ossia.web.protocol.bodies import ChatBody, CompletionBody, SamplingFields
from ossia.web.protocol.errors import ApiError
from ossia.web.protocol.formats import Format, constraint_of, read_format, read_tool_choice

TRAINING_KEYS = ("train", "weight")


@dataclass(frozen=True, slots=True)
class Served:
    """The model that is served, and what a request may ask of it.

    name, adapters  names of the model and of its adapters, as /v1/models lists them
    aliases         other names of the model: what was given for it on the command line
    vocab_size      the model's ids are below
    max_length      tokens of a prompt and its answer together
    created         when the server started, in seconds since 1970
    grammar         what holds answers to schemas; None: such requests are refused
    """

    name: str
    vocab: Vocabulary
    renderer: Renderer
    vocab_size: int
    max_length: int
    created: int
    dtype: str
    grammar: GrammarCompiler | None = None
    adapters: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def adapter(self, model: str) -> str | None:
        """The adapter that a model's name stands for, None for the model itself. Raises ApiError for another name."""
        if model in self.adapters:
            return model
        if model != self.name and model not in self.aliases:
            raise unknown_model(model, (self.name, *self.adapters))
        return None


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    """The error for a model that isn't served; `known` are."""
    message = f"model: there is no {name!r} here; allowed: {', '.join(known)}"
    return ApiError(message, status=404, param="model", code="model_not_found")


class Echo(NamedTuple):
    """Prompts are part of the answer.

    top    how many of the likeliest tokens to report beside each of a prompt's; None: its logprobs aren't wanted
    alone  nothing is sampled
    """

    top: int | None
    alone: bool


@dataclass(frozen=True, slots=True)
class Job:
    """What a body asks of the engine, and how its answer is to be read.

    requests   one a choice
    prompts    tokens of all its prompts, each counted once
    stops      texts that end the visible answer
    one_call   the turn ends with its first call
    only_json  the visible answer is JSON alone
    logprobs   the visible answer's are wanted
    echo       the answer begins with its prompt
    """

    requests: tuple[Request, ...]
    prompts: int
    stops: tuple[str, ...] = ()
    one_call: bool = False
    only_json: bool = False
    logprobs: bool = False
    echo: Echo | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat in the form that both chat routes come to.

    tool_choice  as `read_tool_choice` gives it
    wanted       what the answer has to be
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str
    effort: Effort | None
    wanted: Format
    instructions: str | None = None

    def conversation(self) -> Conversation:
        """As Harmony. Raises HarmonyError naming the field."""
        for index, row in enumerate(self.messages):
            for key in TRAINING_KEYS:
                if row.get(key) is not None:
                    raise HarmonyError("is for training rows; leave it out here", f"messages[{index}].{key}")
        tools = self.tools if self.tools and self.tool_choice != "none" else None
        conversation = conversation_from_messages(
            self.messages, tools=tools, developer=self.instructions, reasoning_effort=self.effort
        )
        if self.wanted.told is None:
            return conversation
        told = filter(None, (conversation.instructions, self.wanted.told))
        return replace(conversation, instructions="\n\n".join(told))


def chat_job(body: ChatBody, served: Served) -> Job:
    """The engine's work for a chat completion. Raises ApiError."""
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise ApiError("max_tokens and max_completion_tokens say different things; keep one", param="max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs: needs logprobs to be true", param="top_logprobs")
    tools = body.tools or []
    wanted = read_format(body.response_format, "response_format", inner="json_schema")
    chat = Chat(body.messages, tools, read_tool_choice(body.tool_choice, tools), body.reasoning_effort, wanted)
    max_tokens = body.max_completion_tokens or body.max_tokens
    one_call = body.parallel_tool_calls is False
    ids, constraint = prepare(chat, served, one_call=one_call)
    requests = sampled(
        body, served, [ids], max_tokens, num=body.n or 1, top_logprobs=body.top_logprobs or 0, constraint=constraint
    )
    only_json = wanted.schema is not None
    return Job(requests, len(ids), body.stop_texts, one_call, only_json, bool(body.logprobs))


def completion_job(body: CompletionBody, served: Served) -> Job:
    """The engine's work for plain completions: prompts one after another, the choices of each together."""
    prompts = _prompts(body.prompt)
    ids: list[list[int]] = []
    for prompt in prompts:
        try:
            ids.append(served.vocab.encode(prompt) if isinstance(prompt, str) else prompt)
        except TokenizerError as error:
            raise ApiError(f"prompt: {error}", param="prompt") from None
    for found in ids:
        wrong = [number for number in found if not 0 <= number < served.vocab_size]
        if wrong or not found:
            what = f"there is no token {wrong[0]}" if wrong else "an empty prompt"
            raise ApiError(f"prompt: {what}; allowed: one or more ids below {served.vocab_size}", param="prompt")
    max_tokens = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default for this route
    if not max_tokens and not body.echo:
        raise ApiError("max_tokens: found 0; allowed: a positive number, or with echo also 0", param="max_tokens")
    return Job(
        sampled(body, served, ids, max_tokens, num=body.n or 1, top_logprobs=body.logprobs or 0),
        sum(map(len, ids)),
        body.stop_texts,
        logprobs=body.logprobs is not None,
        echo=Echo(body.logprobs, alone=not max_tokens) if body.echo else None,
    )


def prepare(chat: Chat, served: Served, *, one_call: bool) -> tuple[list[int], Constraint | None]:
    """A chat's ids, and the grammar of its answer. Raises ApiError naming the field of what can't be done."""
    try:
        ids = served.renderer.completion(chat.conversation())
        constraint = constraint_of(served.grammar, chat.wanted, chat.tools, chat.tool_choice, parallel=not one_call)
    except (HarmonyError, TokenizerError) as error:
        raise ApiError.of(error) from None
    return ids, constraint


def sampled(
    body: SamplingFields,
    served: Served,
    prompts: Sequence[list[int]],
    max_tokens: int | None,
    *,
    num: int = 1,
    top_logprobs: int = 0,
    constraint: Constraint | None = None,
) -> tuple[Request, ...]:
    """`num` requests of each prompt. Raises ApiError for a model, a context or a token that isn't there."""
    adapter, stops = served.adapter(body.model), harmony_stops(served.vocab)
    bias = _bias(body.logit_bias or {}, served.vocab_size)
    if max_tokens is not None and max_tokens > served.max_length:
        raise ApiError(f"max tokens: found {max_tokens}; allowed: up to {served.max_length}", param="max_tokens")
    frequency, presence = body.penalties
    found = []
    for ids in prompts:
        room = served.max_length - len(ids)
        if room < (0 if max_tokens == 0 else 1):
            message = f"this model's context is {served.max_length} tokens, the answer's included; "
            message += f"the prompt has {len(ids)}. Shorten it"
            raise ApiError(message, param="messages", code="context_length_exceeded")
        for number in range(num):
            rules = Sampling(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                top_k=body.top_k or 0,
                min_p=body.min_p or 0.0,
                seed=None if body.seed is None else body.seed % 2**64 + number * 2**64,
                logit_bias=bias,
                frequency_penalty=frequency,
                presence_penalty=presence,
            )
            limit = room if max_tokens is None else min(room, max_tokens)
            found.append(
                Request(ids, rules, limit, stops, adapter=adapter, top_logprobs=top_logprobs, constraint=constraint)
            )
    return tuple(found)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    """One prompt or several -> several, each a text or ids."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise ApiError("prompt: found an empty list; allowed: a text, ids, or a list of either", param="prompt")
    return list(prompt)


def _bias(given: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    for name in given:
        if not (name.isascii() and name.isdigit()) or int(name) >= vocab_size:
            message = f"logit_bias: there is no token {name!r}; allowed: ids from 0 to {vocab_size - 1}"
            raise ApiError(message, param="logit_bias")
    return {int(name): value for name, value in given.items()}
