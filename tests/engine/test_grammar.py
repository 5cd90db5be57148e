"""Random ids under a constraint always make a turn that parses, and JSON that its schema accepts."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import openai_harmony as library
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ossia.engine import Engine, Request, Sampling, harmony_stops
from ossia.engine.grammar import ANY_OBJECT, Constraint, GrammarCompiler
from ossia.errors import MissingExtraError, UserError
from ossia.harmony import (
    HARMONY_SPECIALS,
    MODEL_ROWS,
    Conversation,
    Message,
    StreamParser,
    Tool,
    Vocabulary,
    parse_completion,
)
from tests.conftest import MakeTiny
from tests.harmony.support import library_message, o200k, oracle, renderer, trained_runs
from tests.oracle.model_pairs import load
from tests.shapes import SMALL

WEATHER = Tool(
    "get_weather",
    "Now.",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
CLOCK = Tool("get_weather_at", "Then.", {"type": "object", "properties": {"hour": {"type": "integer"}}})
STOP = Tool("stop", "Takes nothing.")
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 99}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}


class Kit:
    """A compiler with its vocabulary, and what tests do with constraints over it."""

    def __init__(self, vocab: Vocabulary, num_rows: int) -> None:
        self.vocab, self.num_rows = vocab, num_rows
        self.compiler = GrammarCompiler(vocab, num_rows)
        self.answer = self.compiler.answer
        self.plain = set(range(vocab.size)) - set(vocab.special.values())

    def ids(self, text: str) -> list[int]:
        """Text in which special tokens are spelled by their names."""
        parts = re.split(f"({'|'.join(map(re.escape, HARMONY_SPECIALS))})", text)
        special = self.vocab.special
        return [n for part in parts for n in ([special[part]] if part in special else self.vocab.encode(part))]

    def allowed(self, constraint: Constraint) -> list[int]:
        mask_V = constraint.mask()
        assert mask_V.shape == (self.num_rows,)
        assert mask_V.dtype == torch.bool
        return mask_V.nonzero().flatten().tolist()

    def fits(self, constraint: Constraint, text: str) -> bool:
        """Whether a copy of the constraint allows the ids of `text`, one after another."""
        constraint = constraint.copy()
        for number in self.ids(text):
            if constraint.finished or not constraint.mask()[number]:
                return False
            constraint.push(number)
        return True

    def after(self, constraint: Constraint, text: str) -> Constraint:
        """A copy that has taken the ids of `text`."""
        assert self.fits(constraint, text), text
        constraint = constraint.copy()
        for number in self.ids(text):
            constraint.push(number)
        return constraint

    def sample(self, constraint: Constraint, seed: int, *, patience: int = 40) -> list[int]:
        """Ids drawn evenly from what is allowed, to the end of the turn.

        After `patience` tokens of a message: its end where it is allowed, or else what closes JSON.
        """
        generator = torch.Generator().manual_seed(seed)
        ends = [self.vocab.special[name] for name in ("<|end|>", "<|return|>", "<|call|>")]
        closing = [number for mark in '"]}' for number in self.vocab.encode(mark)]
        ids: list[int] = []
        age = 0
        while not constraint.finished:
            assert len(ids) < 4000, self.vocab.decode(ids)
            mask_V = constraint.mask()
            wanted = [number for number in ends if mask_V[number]] or [n for n in closing if mask_V[n]]
            choices = torch.tensor(wanted) if age > patience and wanted else mask_V.nonzero().flatten()
            number = int(choices[int(torch.randint(len(choices), (1,), generator=generator))])
            age = 0 if self.vocab.is_special(number) else age + 1
            constraint.push(number)
            ids.append(number)
        return ids

    def parse(self, ids: list[int]) -> list[Message]:
        parser = StreamParser(self.vocab)
        for number in ids:
            parser.push(number)
        parser.finish()
        assert parser.problems == []
        return parser.messages


@pytest.fixture(scope="module")
def small(small_tokenizer: Path) -> Kit:
    """A few hundred tokens, and rows of the head that are no token."""
    vocab = Vocabulary.from_file(small_tokenizer)
    return Kit(vocab, vocab.size + 45)


@pytest.fixture(scope="module")
def full() -> Kit:
    """The released vocabulary."""
    return Kit(o200k(), MODEL_ROWS)


def settled(examples: int) -> settings:
    checks = list(HealthCheck)
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


FINAL = "<|channel|>final<|message|>"
THINK = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"

NAMES = st.one_of(
    st.sampled_from(["city", "größe", "a b", 'quo"te', "back\\slash", "tab\t", "🎻"]), st.text(min_size=1, max_size=3)
)
STRINGS = st.one_of(st.text(max_size=6), st.sampled_from(["é 你好 🎻", '"\\/\b\f\n\r\t', "<|end|>", "\u2028\x7f\x00"]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**6), 10**6), STRINGS),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def schemas(draw: st.DrawFn, depth: int = 3) -> dict[str, Any]:
    """JSON Schemas of what people write, with a recursive definition `#/$defs/tree` to refer to."""
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const", "types"]
    kinds += ["object", "object", "object", "array", "array", "anyOf", "$ref", "allOf"] if depth else []
    kind = draw(st.sampled_from(kinds))
    inner = schemas(depth - 1)
    if kind == "string":
        least = draw(st.integers(0, 3))
        return {"type": "string", "minLength": least, "maxLength": least + draw(st.integers(0, 4))}
    if kind == "pattern":
        pattern = draw(st.sampled_from(["^[A-Z]{2}-[0-9]{1,4}$", "^(é|你)+$", "^[^a-z]*$"]))
        return {"type": "string", "pattern": pattern, "maxLength": 12}
    if kind in ("integer", "number"):
        least = draw(st.integers(-50, 50))
        most = least + draw(st.integers(2, 500))
        least_key, most_key = draw(st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")]))
        return {"type": kind, least_key: least, most_key: most}
    if kind == "enum":
        return {"enum": draw(st.lists(VALUES, min_size=1, max_size=3))}
    if kind == "const":
        return {"const": draw(VALUES)}
    if kind == "types":
        return {
            "type": draw(st.lists(st.sampled_from(["string", "integer", "null", "boolean"]), min_size=1, unique=True))
        }
    if kind == "array":
        least = draw(st.integers(0, 2))
        return {"type": "array", "items": draw(inner), "minItems": least, "maxItems": least + draw(st.integers(0, 2))}
    if kind == "anyOf":
        return {"anyOf": draw(st.lists(inner, min_size=1, max_size=3))}
    if kind == "allOf":
        return {"allOf": [{"type": "object", "properties": {"a": draw(inner)}, "required": ["a"]}]}
    if kind == "$ref":
        return {"$ref": "#/$defs/tree"}
    return draw(objects(inner))


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    names = draw(st.lists(NAMES, max_size=3, unique=True))
    made: dict[str, Any] = {"type": "object", "properties": {name: draw(inner) for name in names}}
    if names:
        made["required"] = draw(st.lists(st.sampled_from(names), unique=True))
    others = draw(st.sampled_from([False, False, True, None, {"type": "integer"}]))
    return made if others is None else {**made, "additionalProperties": others}


TREE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
    "required": ["value"],
    "additionalProperties": False,
}


@settled(150)
@given(schema=schemas(), seed=st.integers(0, 2**31))
def test_random_tokens_make_json_that_the_schema_accepts(small: Kit, schema: dict[str, Any], seed: int) -> None:
    schema = {**schema, "$defs": {"tree": TREE}}
    constraint = small.after(small.answer(schema), FINAL)
    ids = small.sample(constraint, seed, patience=15)
    (answer,) = small.parse(small.ids(FINAL) + ids)
    assert answer.channel == "final"
    assert small.vocab.token(ids[-1]) == "<|return|>"
    jsonschema.Draft202012Validator(schema).validate(json.loads(answer.content))


@settled(60)
@given(
    tool_choice=st.sampled_from(["auto", "none", "required", "get_weather"]),
    parallel=st.booleans(),
    structured=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_turns_parse_and_end_as_the_choice_of_tools_says(
    small: Kit, tool_choice: str, parallel: bool, structured: bool, seed: int
) -> None:
    tools = {tool.name: tool for tool in (WEATHER, CLOCK, STOP)}
    constraint = small.answer(
        POINT if structured else None, tools=[*tools.values()], tool_choice=tool_choice, parallel=parallel
    )
    ids = small.sample(constraint, seed)
    messages = small.parse(ids)
    calls = [message for message in messages if message.recipient is not None]
    last = messages[-1]
    if last.channel == "final":
        assert tool_choice in ("auto", "none")
        assert calls == []
        if structured:
            jsonschema.validate(json.loads(last.content), POINT)
    else:
        assert last is calls[-1]
        assert tool_choice != "none"
    assert len(calls) < 2 or parallel
    assert small.vocab.token(ids[-1]) == ("<|call|>" if calls else "<|return|>")
    for call in calls:
        name = call.recipient.removeprefix("functions.")
        assert name in ({"get_weather"} if tool_choice == "get_weather" else tools)
        jsonschema.validate(json.loads(call.content), tools[name].parameters or {"maxProperties": 0})
        assert call.channel == "commentary"
        assert call.content_type in (None, "<|constrain|>json")
    others = messages[: -1 if last.channel == "final" else None]
    assert all(message.channel in ("analysis", "commentary") for message in others)


def test_thinking_is_left_free_but_for_the_tokens_that_structure_a_turn(small: Kit) -> None:
    end, over = small.vocab.special["<|end|>"], small.vocab.special["<|return|>"]
    for channel in ("analysis", "commentary"):
        constraint = small.answer(POINT, tools=[WEATHER], tool_choice="required")
        constraint = small.after(constraint, f"<|channel|>{channel}<|message|>")
        assert set(small.allowed(constraint)) == small.plain | {end}
        for number in small.vocab.encode("{<|call|> is only text here"):
            constraint.push(number)
        assert set(small.allowed(constraint)) == small.plain | {end}
    assert set(small.allowed(small.after(small.answer(), FINAL))) == small.plain | {over}


@pytest.mark.parametrize(
    ("tool_choice", "final", "weather", "clock"),
    [
        ("auto", True, True, True),
        ("none", True, False, False),
        ("required", False, True, True),
        ("get_weather", False, True, False),
    ],
)
def test_a_turn_may_answer_or_call_what_tool_choice_says(
    small: Kit, tool_choice: str, final: bool, weather: bool, clock: bool
) -> None:
    constraint = small.answer(tools=[WEATHER, CLOCK], tool_choice=tool_choice)
    for start in ("", THINK, THINK + THINK):
        for name, wanted in (("get_weather", weather), ("get_weather_at", clock), ("get", False)):
            recipient, channel = f" to=functions.{name}", "<|channel|>commentary"
            for header in (recipient + channel, channel + recipient):
                assert small.fits(constraint, f"{start}{header} <|constrain|>json<|message|>") == wanted
                assert small.fits(constraint, f"{start}{header}<|message|>{{") == wanted
        assert small.fits(constraint, start + FINAL + "Hello<|return|>") == final


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        ("", ["<|return|>", "<|call|>", "<|end|>", "<|message|>", "<|start|>", "<|constrain|>", "Hello"]),
        ("<|channel|>", ["other", " ", "<|message|>", "<|channel|>"]),
        ("<|channel|>analysis", [" to=functions.get_weather", "<|constrain|>", "<|return|>"]),
        ("<|channel|>final", [" to=functions.get_weather", " ", "<|constrain|>"]),
        ("<|channel|>analysis<|message|>Hm.", ["<|return|>", "<|call|>", "<|start|>", "<|endoftext|>"]),
        (FINAL + "Hello", ["<|end|>", "<|call|>", "<|channel|>"]),
        (THINK.removesuffix("<|start|>assistant"), ["<|channel|>", "<|return|>", "Hello"]),
        (THINK.removesuffix("assistant"), ["user", "<|channel|>"]),
        (THINK, ["<|return|>", " ", "<|start|>"]),
        (" to=functions.get_weather", [" to=functions.get_weather", "<|message|>"]),
        (CALL, ["<|call|>", "<|end|>", " {", "["]),
        (CALL + "{", ["<|call|>", "}"]),
        (CALL + '{"', ["town"]),
        (CALL + '{"city": ', ["3", "}"]),
        (CALL + '{"city": "', ["<|end|>", "<|call|>"]),
        (CALL + '{"city": "Paris"}', ["<|return|>", "<|end|>", " ", "{"]),
    ],
)
def test_what_no_turn_holds_is_not_allowed(small: Kit, before: str, wrong: list[str]) -> None:
    constraint = small.after(small.answer(tools=[WEATHER]), before)
    assert [text for text in wrong if small.fits(constraint, text)] == []


def test_several_calls_are_made_in_one_turn_only_where_they_may_be(small: Kit) -> None:
    one, more = CALL + '{"city": "Paris"}<|call|>', CALL + '{"city": "Paris"}<|end|><|start|>assistant'
    for tool_choice in ("auto", "required", "get_weather"):
        constraint = small.answer(tools=[WEATHER], tool_choice=tool_choice, parallel=True)
        assert small.after(constraint, one).finished
        assert small.after(constraint, more + THINK + more + one).finished
        assert not small.fits(constraint, more + FINAL)  # after a call comes a call
        assert [message.recipient for message in small.parse(small.ids(more + one))] == ["functions.get_weather"] * 2
    assert not small.fits(small.answer(tools=[WEATHER]), more)


def test_a_tool_without_parameters_takes_an_empty_object(small: Kit) -> None:
    constraint = small.after(small.answer(tools=[STOP]), CALL.replace("get_weather", "stop"))
    assert small.fits(constraint, "{}<|call|>")
    assert not small.fits(constraint, '{"')


def test_json_mode_takes_any_object_and_nothing_else(small: Kit) -> None:
    constraint = small.after(small.answer(ANY_OBJECT), FINAL)
    assert small.fits(constraint, '{"é 你好": [1, {"x": "\\n🎻"}], "y": null}<|return|>')
    assert [text for text in ("[", '"', "1", " {", "Sure", "<|return|>") if small.fits(constraint, text)] == []
    for seed in range(5):
        (answer,) = small.parse(small.ids(FINAL) + small.sample(constraint.copy(), seed))
        assert isinstance(json.loads(answer.content), dict)


def test_white_space_between_symbols_has_an_end_and_strings_hold_whole_characters_only(small: Kit) -> None:
    constraint = small.after(small.answer(ANY_OBJECT), FINAL + "{")
    assert small.fits(constraint, "\n" + " " * 63 + "}")
    assert not small.fits(constraint, " " * 65)
    constraint = small.after(constraint, '"')
    assert not small.fits(constraint, "\\ud83d")
    bytes_of = {number: small.vocab.decode_bytes([number]) for number in small.plain}
    constraint.push(next(number for number, data in bytes_of.items() if data == b"\xed"))
    following = {bytes_of[number][:1] for number in small.allowed(constraint)}
    assert min(following) == b"\x80"
    assert max(following) == b"\x9f"  # ED A0 would begin half of a surrogate pair


def test_a_copy_goes_its_own_way(small: Kit) -> None:
    constraint = small.answer(POINT, tools=[WEATHER])
    inside = small.after(constraint, CALL + '{"city": "Par')
    first, second = inside.copy(), inside.copy()
    for number in small.ids('is"}<|call|>'):
        first.push(number)
    assert first.finished
    assert not second.finished
    assert small.allowed(second) == small.allowed(inside)
    assert small.fits(second, 'is", "unit": "celsius"}<|call|>')
    assert small.fits(constraint, FINAL + '{"x": 1, "on": true}<|return|>')


def test_a_token_that_was_not_allowed_is_our_own_mistake(small: Kit) -> None:
    for before, wrong in [("", "Hello"), (FINAL, "7"), (FINAL + '{"x": ', "<|return|>")]:
        constraint = small.after(small.answer(POINT), before)
        constraint.mask()
        with pytest.raises(AssertionError, match="not allowed"):
            constraint.push(small.ids(wrong)[-1])
    with pytest.raises(AssertionError, match="not allowed"):
        small.after(small.answer(), FINAL).push(small.vocab.size)


def chain(length: int) -> dict[str, Any]:
    """Definitions that each refer to the next."""
    links = {
        f"link{i}": {"type": "object", "properties": {"next": {"$ref": f"#/$defs/link{i + 1}"}}, "required": ["next"]}
        for i in range(length)
    }
    return {"$defs": {**links, f"link{length}": {"type": "integer"}}, "$ref": "#/$defs/link0"}


UNSUPPORTED = [
    ("uniqueItems", {"type": "array", "uniqueItems": True}),
    ("not", {"not": {"type": "string"}}),
    ("if", {"if": {"type": "string"}, "then": {"minLength": 3}}),
    ("contains", {"type": "array", "contains": {"type": "integer"}}),
    ("propertyNames", {"type": "object", "propertyNames": {"maxLength": 3}}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("unevaluatedProperties", {"type": "object", "unevaluatedProperties": False}),
]
REFUSED = [
    ("oneOf", {"oneOf": [{"type": "integer"}, {"minimum": 2}]}),
    ("format: color", {"type": "string", "format": "color"}),
    ("minProperties", {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2}),
    ("look-around", {"type": "string", "pattern": "(?=a)b"}),
    ("Invalid type: text", {"type": "text"}),
    (r"/\$defs/missing", {"$ref": "#/$defs/missing"}),
    ("greater than maximum", {"type": "integer", "minimum": 3, "maximum": 2}),
    ("lead back to itself", {"$ref": "#"}),
    ("not JSON compliant", {"const": float("nan")}),
    ("nested 301 deep; allowed: 100", json.loads('{"items":' * 300 + "{}" + "}" * 300)),
    ("341 references lead 1,[0-9]+ levels deep", chain(340)),
    ("uniqueItems", {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}),
]


@pytest.mark.parametrize(("keyword", "schema"), UNSUPPORTED, ids=[keyword for keyword, _ in UNSUPPORTED])
def test_a_keyword_that_cannot_be_enforced_is_named_before_anything_is_sampled(
    small: Kit, keyword: str, schema: dict[str, Any]
) -> None:
    inside = {"type": "object", "properties": {keyword: {"type": "string"}, "tags": schema}}
    place = rf"properties\.tags\.{keyword}: the keyword {keyword} "
    with pytest.raises(UserError, match=rf"^response_format\.json_schema\.schema\.{place}"):
        small.answer(inside)
    tools = [WEATHER, Tool("search", "", inside)]
    with pytest.raises(UserError, match=rf"^tools\.search\.parameters\.{place}"):
        small.answer(tools=tools)
    small.answer(tools=tools, tool_choice="get_weather")
    small.answer(tools=tools, tool_choice="none")


@pytest.mark.parametrize(("words", "schema"), REFUSED, ids=[words for words, _ in REFUSED])
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_reason(
    small: Kit, words: str, schema: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=rf"^response_format\.json_schema\.schema[:.] ?.*{words}"):
        small.answer(schema)


def test_a_long_chain_of_references_is_followed_to_its_end(small: Kit) -> None:
    depth = 150
    constraint = small.after(small.answer(chain(depth)), FINAL)
    assert small.fits(constraint, '{"next":' * depth + "7" + "}" * depth + "<|return|>")


def test_a_schema_that_fails_while_sampling_is_the_users_mistake(small: Kit) -> None:
    words = r"can't go on under this request's JSON Schema: .*\n  next: simplify"
    endless = {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}
    constraint = small.after(small.answer(endless), FINAL + '{"a":')
    with pytest.raises(UserError, match=words):
        constraint.mask()
    ways = [{"type": "array", "items": {"type": "integer", "minimum": least}} for least in range(1000)]
    constraint = small.after(small.answer({"anyOf": ways}), FINAL)
    (number,) = small.ids("[")
    assert constraint.mask()[number]
    with pytest.raises(UserError, match=words):
        constraint.push(number)


@pytest.mark.parametrize("tool_choice", ["dance", "get_weather", "required"])
def test_a_tool_that_is_not_there_cannot_be_chosen(small: Kit, tool_choice: str) -> None:
    tools = [] if tool_choice == "required" else [CLOCK]
    with pytest.raises(UserError, match=f"tool_choice: is '{tool_choice}'; allowed: auto, none, required, or a tool"):
        small.answer(tools=tools, tool_choice=tool_choice)


def test_without_the_library_the_extra_is_named(small: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ossia\[grammar\]'"):
        GrammarCompiler(small.vocab, small.vocab.size)


def test_what_the_renderer_writes_is_allowed_token_by_token(full: Kit) -> None:
    thought, called = Message("assistant", "Look it up.", "analysis"), '{"city":"São Paulo 🎻"}'
    preamble = Message("assistant", "One moment.", "commentary")
    call = Message("assistant", called, "commentary", "functions.get_weather", None, "<|constrain|>json")
    answers = [(thought, preamble, call), (call,), (thought, Message("assistant", '{"x": 3, "on": true}', "final"))]
    for answer in answers:
        conversation = Conversation((Message("user", "Hi"), *answer), tools=(WEATHER, CLOCK))
        (sample,) = renderer().samples(conversation)
        ((_, sampled),) = trained_runs(sample)
        constraint = full.answer(POINT, tools=[WEATHER, CLOCK])
        for number in sampled:
            assert constraint.mask()[number], (full.vocab.decode(sampled), full.vocab.token(number))
            constraint.push(number)
        assert constraint.finished


@settled(20)
@given(tool_choice=st.sampled_from(["auto", "required"]), parallel=st.booleans(), seed=st.integers(0, 2**31))
def test_random_turns_of_the_released_vocabulary_read_the_same_in_openai_harmony(
    full: Kit, tool_choice: str, parallel: bool, seed: int
) -> None:
    tools = [WEATHER, CLOCK, STOP]
    ids = full.sample(full.answer(POINT, tools=tools, tool_choice=tool_choice, parallel=parallel), seed, patience=12)
    found = oracle().parse_messages_from_completion_tokens(ids, library.Role.ASSISTANT, strict=False)
    assert found == [library_message(message) for message in full.parse(ids)]


def test_a_model_samples_under_its_constraint_and_its_batch_mates_are_free(tiny: MakeTiny) -> None:
    folder = tiny(SMALL)
    vocab, model = Vocabulary.from_file(folder), load(folder)
    answer = GrammarCompiler(vocab, model.arch.vocab_size).answer
    brief = {vocab.special["<|end|>"]: 9.0}
    prompt = [vocab.special["<|start|>"], *vocab.encode("assistant")]

    def request(seed: int, max_tokens: int, constraint: Constraint | None = None) -> Request:
        sampling = Sampling(seed=seed, logit_bias=brief)
        return Request(prompt, sampling, max_tokens, harmony_stops(vocab), constraint=constraint)

    pointed, called = answer(POINT), answer(tools=[Tool("move", "", POINT), STOP], tool_choice="required")
    held = [request(seed, 600, constraint) for seed in range(3) for constraint in (pointed, called)]
    free = [request(seed, 20) for seed in range(2)]
    completions = Engine(model).generate([*held, *free])
    assert [one.ids for one in completions[6:]] == [one.ids for one in Engine(model).generate(free)]
    for number, completion in enumerate(completions[:6]):
        assert completion.finish == "stop", vocab.decode(completion.ids)
        *_, last = parse_completion(vocab, completion.ids)
        if number % 2 == 0:
            assert last.channel == "final"
        else:
            assert last.recipient in ("functions.move", "functions.stop")
        empty = last.recipient == "functions.stop"
        jsonschema.validate(json.loads(last.content), {"maxProperties": 0} if empty else POINT)
