"""Every layout says the same conversation as OpenAI messages would; what isn't clear is refused with its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ossia.config import Recipe
from ossia.data.dataset import in_order, open_datasets
from ossia.data.preview import runs, token_texts
from ossia.data.sample import Sample
from ossia.errors import DataError, RecipeError
from ossia.harmony.messages import Conversation, Message, System, Tool
from ossia.harmony.render import Renderer, TrainOn
from ossia.harmony.vocab import Vocabulary
from tests.data.conftest import Read

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": None}}
CALL = {"id": "1", "function": {"name": "weather", "arguments": "{}"}}
DATE = {"type": "function", "function": {"name": "date", "description": "today", "parameters": None}}


def same(one: list[Sample], two: list[Sample]) -> bool:
    def plain(samples: list[Sample]) -> list[dict[str, object]]:
        return [{**sample.to_json(), "source": ""} for sample in samples]

    return plain(one) == plain(two)


def messages(*rows: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(rows), **fields}


def test_messages_are_rendered_as_the_conversation_they_say(read: Read, vocab: Vocabulary) -> None:
    row = messages(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Bern?"}]},
        {
            "role": "assistant",
            "thinking": "Ask.",
            "content": "Let me see.",
            "tool_calls": [
                {"id": "1", "function": {"name": "weather", "arguments": '{"city":  "Bern"}'}},
                {"id": "2", "function": {"name": "date", "arguments": {"zone": "CET"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "2", "content": "Monday"},
        {"role": "tool", "tool_call_id": "1", "content": "19C"},
        {"role": "assistant", "content": "19C.", "weight": 0.5},
        tools=[WEATHER, DATE],
        reasoning_effort="high",
        current_date="2026-01-02",
        identity="You are Ossia.",
        knowledge_cutoff="2025-01",
    )
    json_type = "<|constrain|>json"
    expected = Conversation(
        (
            Message("user", "Weather in Bern?"),
            Message("assistant", "Ask.", "analysis"),
            Message("assistant", "Let me see.", "commentary"),
            Message("assistant", '{"city":  "Bern"}', "commentary", "functions.weather", content_type=json_type),
            Message("assistant", '{"zone":"CET"}', "commentary", "functions.date", content_type=json_type),
            Message("tool", "Monday", "commentary", "assistant", "functions.date"),
            Message("tool", "19C", "commentary", "assistant", "functions.weather"),
            Message("assistant", "19C.", "final", weight=0.5),
        ),
        System("You are Ossia.", "2025-01", "2026-01-02", "high"),
        "Be brief.",
        (Tool("weather", "of a city"), Tool("date", "today")),
    )
    rendered = Renderer(vocab).samples(expected, TrainOn())
    found = read(row)
    assert [sample.ids.tolist() for sample in found] == [one.ids for one in rendered]
    assert [sample.weights.tolist() for sample in found] == [one.weights for one in rendered]
    assert [sample.spans for sample in found] == [tuple(one.spans) for one in rendered]
    assert all(sample.source.endswith("rows0.jsonl:1") for sample in found)


@pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content"])
def test_thinking_may_have_any_of_its_three_names(read: Read, name: str) -> None:
    expected = read(messages(USER, {**ANSWER, "thinking": "Sum."}))
    assert same(read(messages(USER, {**ANSWER, name: "Sum."})), expected)
    assert same(read({"prompt": "2 + 2?", "completion": "4", name: "Sum."}), expected)
    assert same(read({"instruction": "2 + 2?", "output": "4", name: "Sum."}), expected)


def test_sharegpt_alpaca_and_prompt_rows_say_what_messages_say(read: Read) -> None:
    system = {"role": "system", "content": "Be brief."}
    expected = read(messages(system, USER, ANSWER))
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    assert same(read({"conversations": [{"from": "system", "value": "Be brief."}, *turns]}), expected)
    assert same(read({"conversations": turns, "system": "Be brief."}), expected)
    assert same(read({"conversations": [system, USER, ANSWER]}), expected)
    assert same(read({"instruction": "2 + 2?", "input": "", "output": "4", "system": "Be brief."}), expected)
    assert same(read({"prompt": "2 + 2?", "completion": "4", "developer": "Be brief."}), expected)
    assert same(read({"prompt": [system, USER], "completion": [ANSWER]}), expected)
    with_input = messages({"role": "user", "content": "Add.\n\n2 and 2"}, ANSWER)
    assert same(read({"instruction": "Add.", "input": "2 and 2", "output": "4"}), read(with_input))


def test_sharegpt_calls_and_results_become_tool_messages(read: Read) -> None:
    calls = [{"name": "weather", "arguments": {"city": "Bern"}}, {"name": "date", "arguments": "{}"}]
    given = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": json.dumps(calls)},
            {"from": "observation", "value": "19C"},
            {"from": "observation", "value": "Monday"},
            {"from": "gpt", "value": "19C.", "weight": 2},
        ],
        "tools": json.dumps([WEATHER, DATE]),
    }
    called = [{"id": call["name"], "function": call} for call in calls]
    expected = messages(
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": called},
        {"role": "tool", "tool_call_id": "weather", "content": "19C"},
        {"role": "tool", "tool_call_id": "date", "content": "Monday"},
        {"role": "assistant", "content": "19C.", "weight": 2},
        tools=[WEATHER, DATE],
    )
    assert same(read(given), read(expected))


def test_only_the_completion_of_a_prompt_row_is_trained(read: Read, vocab: Vocabulary) -> None:
    (sample,) = read({"prompt": [USER, ANSWER, {"role": "user", "content": "+ 1?"}], "completion": "5"})
    trained = vocab.decode(sample.ids[sample.weights > 0].tolist())
    assert trained == "<|channel|>final<|message|>5<|return|>"


def test_what_a_row_says_comes_before_the_source_and_the_source_before_the_recipe(read: Read) -> None:
    plain = messages(USER, ANSWER)
    source = {"reasoning_effort": "low", "developer": "Be brief.", "tools": [WEATHER]}
    harmony = {"reasoning_effort": "high", "current_date": "2026-01-02"}
    from_recipe = read(messages(USER, ANSWER, reasoning_effort="high", current_date="2026-01-02"))
    assert same(read(plain, harmony=harmony), from_recipe)
    from_source = read(messages(USER, ANSWER, reasoning_effort="low", developer="Be brief.", tools=[WEATHER]))
    assert same(read(plain, **source), from_source)
    own = {"reasoning_effort": "medium", "developer": "Be long.", "tools": [DATE]}
    assert same(read(messages(USER, ANSWER, **own), **source), read(messages(USER, ANSWER, **own)))
    assert not same(from_recipe, from_source)


def test_a_source_may_say_what_is_trained(read: Read, vocab: Vocabulary) -> None:
    row = messages(USER, {**ANSWER, "thinking": "Sum."})
    (sample,) = read(row, train={"channels": ["final"]})
    assert vocab.decode(sample.ids[sample.weights > 0].tolist()).endswith("<|channel|>final<|message|>4<|return|>")
    assert "Sum." not in vocab.decode(sample.ids[sample.weights > 0].tolist())
    (everything,) = read(row)
    assert "Sum." in vocab.decode(everything.ids[everything.weights > 0].tolist())


def test_plain_text_is_trained_from_its_second_token_to_the_end_of_the_document(read: Read, vocab: Vocabulary) -> None:
    (sample,) = read({"text": "a <|end|>"})
    assert vocab.decode(sample.ids.tolist()) == "a <|end|><|endoftext|>"
    assert len(sample) == len("a <|end|>") + 1  # text that spells a special token stays text
    assert sample.weights.tolist() == [0] + [1] * 9


def test_ids_are_used_as_they_are(read: Read) -> None:
    (sample,) = read({"ids": [5, 6, 7], "weights": [0, 0.5, 1], "targets": [5, 6, 8]})
    assert sample.ids.tolist() == [5, 6, 7]
    assert sample.weights.tolist() == [0, 0.5, 1]
    assert sample.targets is not None
    assert sample.targets.tolist() == [5, 6, 8]
    (strange,) = read({"ids": [5, 6], "weights": [0, 1], "roles": [1, 2], "channels": ["final", "final"]})
    assert [run.label for run in runs(strange)] == ["tokens", "tokens"]  # roles that are no words are not shown


def test_what_the_preview_writes_reads_back_as_the_same_samples(read: Read) -> None:
    thinking = messages(USER, {**ANSWER, "thinking": "Sum."}, USER, {**ANSWER, "thinking": "Again.", "weight": 2})
    samples = read(thinking, messages(USER, ANSWER, USER, ANSWER))
    assert len(samples) == 3
    assert any(sample.targets is not None for sample in samples)
    again = read(*[sample.to_json() for sample in samples])
    assert same(again, samples)


def test_columns_may_have_other_names(read: Read) -> None:
    row = {"chat": [USER, ANSWER], "functions": [WEATHER], "messages": "something else"}
    columns = {"messages": "chat", "tools": "functions"}
    assert same(read(row, columns=columns), read(messages(USER, ANSWER, tools=[WEATHER])))
    with pytest.raises(RecipeError, match=r"data.columns.messages: .* has no column `talk`\n  found: chat, functions"):
        read(row, columns={"messages": "talk"})
    with pytest.raises(RecipeError, match=r"data.columns: unknown field `mesages`\n  allowed: .*messages"):
        read(row, columns={"mesages": "chat"})


def test_null_is_the_same_as_absent(read: Read) -> None:
    row = messages(USER, {**ANSWER, "thinking": None, "tool_calls": None}, tools=None, developer=None)
    assert same(read(row), read(messages(USER, ANSWER)))
    source = {"developer": "Be brief.", "reasoning_effort": "low"}
    null = messages(USER, ANSWER, developer=None, reasoning_effort=None)
    assert same(read(null, **source), read(messages(USER, ANSWER), **source))


def test_the_format_is_said_with_what_told_it(
    write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary
) -> None:
    def note(row: dict[str, Any], **source: Any) -> str:
        path = write_rows([row], "rows.jsonl")
        return open_datasets(make_recipe({"path": path, **source}), vocab).notes[0].partition(": ")[2]

    turns = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    assert note(messages(USER, ANSWER)) == "1 rows, format messages (recognised by messages)"
    assert note({"conversations": [USER, ANSWER]}).endswith(
        "format messages (recognised by conversations with role and content)"
    )
    assert note(turns).endswith("format sharegpt (recognised by conversations)")
    assert note({"instruction": "?", "output": "!"}).endswith("format alpaca (recognised by instruction, output)")
    assert note({"prompt": "?", "completion": "!"}).endswith("format prompt (recognised by prompt, completion)")
    assert note({"text": "?!"}).endswith("format text (recognised by text)")
    assert note({"ids": [1, 2], "weights": [0, 1]}).endswith("format tokens (recognised by ids, weights)")
    both = {"instruction": "?", "output": "!", "text": "?!"}
    assert note(both, format="alpaca").endswith("format alpaca (named in the recipe)")


def test_rows_that_fit_two_formats_or_none_or_mix_them_are_refused(read: Read) -> None:
    with pytest.raises(
        DataError, match=r"rows0.jsonl:1: the row fits the formats alpaca and text\n  next: .*format: al"
    ):
        read({"instruction": "?", "output": "!", "text": "?!"})
    with pytest.raises(DataError, match=r"rows1.jsonl:1: the format isn't known from the columns answer, question\n"):
        read({"question": "?", "answer": "!"})
    mixed = [{"text": "a"}] * 500 + [messages(USER, ANSWER)]
    with pytest.raises(DataError, match=r"different formats: text at .*rows2.jsonl:1, messages at .*rows2.jsonl:501"):
        read(*mixed)
    hidden = [{"text": "a"}] * 500  # one strange row that no probe meets is a bad row when it is read
    hidden[70] = messages(USER, ANSWER)
    with pytest.raises(
        DataError, match=r"rows3.jsonl:71: text: missing; rows of the format text have it. Found: messa"
    ):
        read(*hidden)


def turns(*pairs: tuple[object, object]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in pairs]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (messages(USER, {"role": "robot", "content": "!"}), r"messages\[1\].role: found 'robot'; allowed: system, "),
        (messages(USER, {"role": "assistant", "content": 4}), r"messages\[1\].content: expected text .* found 4"),
        (messages(USER, {**ANSWER, "thoughts": "x"}), r"messages\[1\].thoughts: unknown key"),
        (messages(USER, {**ANSWER, "train": "yes"}), r"messages\[1\].train: expected true or false"),
        (messages(USER, {**ANSWER, "weight": -1}), r"messages\[1\].weight: "),
        (messages(USER, "hi"), r"messages\[1\]: expected an object, found text"),
        ({"messages": "hi"}, r"messages: expected a list of messages, found text"),
        (messages(), r"messages: expected a list with at least one message"),
        (messages(USER, ANSWER, reasoning_effort="max"), r"reasoning_effort: is 'max'; allowed: low, medium, high"),
        (messages(USER, ANSWER, developer=3), r"developer: expected text, found a number"),
        (messages(USER, ANSWER, tools={"name": "x"}), r"tools: expected a list of tools, found an object"),
        (messages(USER, ANSWER, tools="[{]"), r"tools: text that isn't JSON: .* at column 3"),
        (messages(USER, ANSWER, tools=[{"function": {}}]), r"tools\[0\].function.name: expected a name"),
        (messages(USER, ANSWER, builtin_tools=["bash"]), r"builtin_tools: expected a list of browser and python"),
        (messages(USER, {"role": "assistant", "content": "\ud83d"}), r"messages\[1\].content: .*lone surrogate"),
        (turns(("human", "?"), ("bot", "!")), r"conversations\[1\].from: unknown speaker 'bot'; allowed: human, "),
        (turns(("human", "?"), ("gpt", None)), r"conversations\[1\].value: expected text, found null"),
        (turns(("human", "?"), ("gpt", "")), r"conversations\[1\]: an assistant message needs content"),
        (turns(("human", "?"), ("observation", "!")), r"conversations\[1\]: a tool result without a call"),
        (turns(("human", "?"), ("function_call", "f()")), r"conversations\[1\].value: a function_call has to be JSON"),
        (turns(("human", "?"), ("function_call", '{"f": 1}')), r'conversations\[1\].value: expected {"name"'),
        ({"instruction": "?", "output": ""}, r"output: an assistant message needs content"),
        ({"instruction": "?", "output": "!", "thinking": 4}, r"thinking: expected text"),
        ({"instruction": ["?"], "output": "!"}, r"instruction: expected text, found a list"),
        ({"prompt": {}, "completion": "!"}, r"prompt: expected text or a list of messages, found an object"),
        ({"prompt": "?", "completion": [{"role": "assistant"}]}, r"completion\[0\]: an assistant message needs"),
        ({"prompt": "?", "completion": [ANSWER], "thinking": "x"}, r"thinking: expected inside the messages of"),
        ({"text": ["a"]}, r"text: expected text, found a list"),
        ({"ids": [1, 2], "weights": [0]}, r"weights: 1 entries for 2 ids"),
        ({"ids": [1, 2], "weights": [0, 1], "targets": [1]}, r"targets: 1 entries for 2 ids"),
        ({"ids": [1, 999], "weights": [0, 1]}, r"ids\[1\]: 999 is not in the vocabulary of 265 tokens"),
        ({"ids": [1, -1], "weights": [0, 1]}, r"ids\[1\]: -1 is not in the vocabulary"),
        ({"ids": [1, 2.5], "weights": [0, 1]}, r"ids\[1\]: expected a list of whole numbers, found 2.5"),
        ({"ids": [1, True], "weights": [0, 1]}, r"ids\[1\]: expected a list of whole numbers, found True"),
        ({"ids": [1, 2], "weights": [0, -1]}, r"weights\[1\]: found -1; a weight is 0 "),
        ({"ids": [1, 2], "weights": [0, float("inf")]}, r"weights\[1\]: found inf; a weight is 0 "),
        ({"ids": [1, 2], "weights": [0, 10**400]}, r"weights\[1\]: found 1000.*\(401 digits\); a weight is 0 "),
        ({"ids": [1, 2], "weights": "01"}, r"weights: expected a list of numbers"),
        ({"ids": [], "weights": []}, r"ids: the list is empty"),
    ],
)
def test_a_row_that_is_wrong_is_an_error_with_place_field_and_what_was_expected(
    read: Read, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=r"rows0.jsonl:1: (.*)" + message):
        read(row)


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 300), st.floats(), st.text(max_size=5), st.just("\ud83d")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "function", "name", "train", "weight", "x"]), inner
        ),
    ),
    max_leaves=6,
)
WHOLE_ROWS = [
    messages(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
        {"role": "assistant", "thinking": "Ask.", "tool_calls": [CALL], "train": True, "weight": 0.5},
        {"role": "tool", "tool_call_id": "1", "content": "19C"},
        {"role": "assistant", "content": "19C."},
        tools=[
            {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
        ],
        reasoning_effort="low",
        builtin_tools=["python"],
    ),
    turns(("human", "?"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "1"), ("gpt", "!")),
    {"instruction": "?", "input": "a", "output": "!", "thinking": "hm"},
    {"prompt": [USER], "completion": [ANSWER], "developer": "Be brief."},
    {"text": "hi"},
    {"ids": [1, 2], "weights": [0, 1], "targets": [1, 2], "roles": ["a", "b"], "channels": [None, "c"]},
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


@st.composite
def spoilt_rows(draw: st.DrawFn) -> dict[str, Any]:
    """A good row of some layout with one value in it, at any depth, replaced by junk."""
    row: dict[str, Any] = json.loads(json.dumps(draw(st.sampled_from(WHOLE_ROWS))))
    *way, last = draw(st.sampled_from(list(_places(row))))
    inner: Any = row
    for key in way:
        inner = inner[key]
    inner[last] = draw(JUNK)
    return row


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(row=spoilt_rows())
def test_whatever_a_row_holds_it_gives_samples_or_a_data_error(
    tmp_path: Path, make_recipe: Callable[..., Recipe], vocab: Vocabulary, row: dict[str, Any]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    try:
        found = list(in_order(open_datasets(make_recipe(str(file)), vocab).whole))
    except DataError:
        return
    for sample in found:
        assert sample.num_trained > 0
        assert len(list(token_texts(sample, vocab, 0, len(sample)))) == len(sample)
        assert sum(run.end - run.start for run in runs(sample)) == len(sample)
        json.dumps(sample.to_json())


@pytest.mark.parametrize("day", ["yesterday", "2024-13-45", "20240105", "2024-W01-1", ""])
def test_a_rows_date_has_to_be_a_day_of_the_calendar(read: Read, day: str) -> None:
    with pytest.raises(DataError, match=r"current_date: expected a day as YYYY-MM-DD, found "):
        read(messages(USER, ANSWER, current_date=day))
    assert read(messages(USER, ANSWER, current_date="2024-02-29"))
