"""OpenAI chat messages to conversations and back, and what is said of rows that can't be read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossia.errors import HarmonyError
from ossia.harmony import Message, System, conversation_from_messages, messages_to_openai
from tests.golden.write_harmony import WEATHER, assistant, call, result, user
from tests.harmony.support import TEXTS

JSON = "<|constrain|>json"


def test_system_and_developer_rows_become_instructions_in_order() -> None:
    rows = [{"role": "system", "content": "One."}, {"role": "developer", "content": "Two."}, user("Q")]
    assert conversation_from_messages(rows).instructions == "One.\n\nTwo."
    assert conversation_from_messages(rows, developer="Zero.").instructions == "Zero.\n\nOne.\n\nTwo."
    assert conversation_from_messages([user("Q")]).instructions is None


def test_a_later_system_row_stays_in_its_place() -> None:
    rows = [user("Q"), {"role": "system", "content": "New rules."}, assistant("A")]
    made = conversation_from_messages(rows)
    assert made.instructions is None
    assert made.messages[1] == Message("developer", "# Instructions\n\nNew rules.")
    assert messages_to_openai(made.messages)[1] == {"role": "developer", "content": "New rules."}


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content"])
def test_thinking_under_any_key_becomes_analysis(key: str) -> None:
    made = conversation_from_messages([user("Q"), assistant("A", **{key: "T"})])
    assert made.messages[1:] == (Message("assistant", "T", "analysis"), Message("assistant", "A", "final"))


def test_empty_and_null_values_say_nothing() -> None:
    row = assistant("A", thinking="", reasoning=None, tool_calls=[], name=None, refusal=None, audio=None, id="m1")
    assert conversation_from_messages([user("Q", tool_calls=None), row]).messages[1:] == (
        Message("assistant", "A", "final"),
    )


def test_arguments_that_came_as_text_are_kept_to_the_letter_and_objects_become_json() -> None:
    text = '{ "city":"Zürich" , "n": 1.0 }'
    calls = [call("a", text), call("b", {"city": "Zürich", "n": 1.0}), call("c", None)]
    made = conversation_from_messages([user("Q"), assistant("Look:", tool_calls=calls)])
    assert made.messages[1:] == (
        Message("assistant", "Look:", "commentary"),
        Message("assistant", text, "commentary", "functions.get_weather", None, JSON),
        Message("assistant", '{"city":"Zürich","n":1.0}', "commentary", "functions.get_weather", None, JSON),
        Message("assistant", "{}", "commentary", "functions.get_weather", None, JSON),
    )


def test_results_find_their_call_by_id_by_name_or_alone() -> None:
    calls = [call("a", "{}"), call("b", "{}", "book")]
    asked = [user("Q"), assistant(tool_calls=calls)]
    by_id = [*asked, result("b", "B"), result("a", "A")]
    by_name = [
        *asked,
        {"role": "tool", "name": "book", "content": "B"},
        {"role": "tool", "name": "functions.get_weather", "content": "A"},
    ]
    for rows in (by_id, by_name):
        assert conversation_from_messages(rows).messages[3:] == (
            Message("tool", "B", "commentary", "assistant", "functions.book"),
            Message("tool", "A", "commentary", "assistant", "functions.get_weather"),
        )
    alone = [user("Q"), assistant(tool_calls=calls[1:]), {"role": "tool", "content": "B"}]
    assert conversation_from_messages(alone).messages[-1].name == "functions.book"


def test_the_builtin_tools_are_called_in_analysis_and_a_function_of_that_name_is_not() -> None:
    rows = [user("Q"), assistant(tool_calls=[call("p", "1+1", "python")]), result("p", "2")]
    made = conversation_from_messages(rows, system=System(builtin_tools=("python",)))
    assert made.messages[1] == Message("assistant", "1+1", "analysis", "python", None, "code")
    assert made.messages[2] == Message("tool", "2", "analysis", "assistant", "python")
    assert conversation_from_messages(rows).messages[1].recipient == "functions.python"


def test_train_and_weight_hold_for_all_messages_of_a_row() -> None:
    made = conversation_from_messages([user("Q"), assistant("A", thinking="T", train=False, weight=2)])
    assert [(message.train, message.weight) for message in made.messages] == [(None, 1), (False, 2), (False, 2)]


def test_effort_tools_and_system_are_taken_over() -> None:
    made = conversation_from_messages([user("Q")], tools=[WEATHER], reasoning_effort="high", system=System("I."))
    assert made.system == System("I.", reasoning_effort="high")
    assert made.tools[0].name == "get_weather"
    assert made.tools[0].parameters == WEATHER["function"]["parameters"]


def test_a_user_may_have_a_name() -> None:
    assert conversation_from_messages([user("Q", name="Ann")]).messages[0] == Message("user", "Q", name="Ann")
    assert conversation_from_messages([user("Q", name="")]).messages[0].name is None


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    assert conversation_from_messages([user(parts)]).messages[0].content == "abc"  # type: ignore[arg-type]


TOOL_ROWS = [user("Q"), assistant(tool_calls=[call("a", "{}")])]
BROKEN: list[tuple[Any, str, str]] = [
    ([], "messages", "at least one message"),
    ("hello", "messages", "expected a list"),
    ([["user", "Q"]], "messages[0]", "expected an object"),
    ([{"role": "usr", "content": "Q"}], "messages[0].role", "did you mean user"),
    ([{"content": "Q"}], "messages[0].role", "found None"),
    ([user("Q", contnet="x")], "messages[0].contnet", "did you mean content"),
    ([user("Q", thinking="x")], "messages[0].thinking", "role user has no thinking"),
    ([user("Q", name=False)], "messages[0].name", "found False"),
    ([user("Q"), assistant(tool_calls=[call(0, "{}")])], "messages[1].tool_calls[0].id", "expected text, found 0"),  # type: ignore[arg-type]
    ([*TOOL_ROWS, result([], "R")], "messages[2].tool_call_id", "expected text, found list []"),  # type: ignore[arg-type]
    ([user("Q", name="Ann Lee")], "messages[0].name", "without spaces"),
    ([{"role": "system", "content": "S", "train": True}], "messages[0].train", "only assistant"),
    ([user("Q", train=True)], "messages[0].train", "only assistant"),
    ([user("Q"), assistant("A", train="yes")], "messages[1].train", "true or false"),
    ([user("Q"), assistant("A", weight=-1)], "messages[1].weight", "0 (not trained) or from 1e-09"),
    ([user("Q"), assistant("A", weight=True)], "messages[1].weight", "expected a number"),
    ([{"role": "user", "content": None}], "messages[0].content", "expected text"),
    ([{"role": "user", "content": 3}], "messages[0].content", "found 3"),
    ([user([{"type": "image_url", "image_url": {}}])], "messages[0].content[0]", "reads text only"),  # type: ignore[arg-type]
    ([user("Q"), assistant()], "messages[1]", "all are empty"),
    ([user("Q"), assistant("")], "messages[1]", "all are empty"),
    ([user("Q"), assistant("A", thinking="x", reasoning="y")], "messages[1]", "say different things"),
    ([user("Q"), assistant("A", refusal="no")], "messages[1].refusal", "not both"),
    ([user("Q"), assistant(tool_calls="f()")], "messages[1].tool_calls", "expected a list"),
    ([user("Q"), assistant(tool_calls=["f()"])], "messages[1].tool_calls[0]", "expected an object"),
    ([user("Q"), assistant(tool_calls=[{"type": "custom"}])], "messages[1].tool_calls[0].type", "allowed: function"),
    ([user("Q"), assistant(tool_calls=[{"function": {}}])], "messages[1].tool_calls[0].function.name", "found None"),
    (
        [user("Q"), assistant(tool_calls=[call("a", "{}", "get weather")])],
        "messages[1].tool_calls[0].function.name",
        "letters",
    ),
    ([user("Q"), assistant(tool_calls=[{"name": 1}])], "messages[1].tool_calls[0].name", "found 1"),
    (
        [user("Q"), assistant(tool_calls=[call("a", [1])])],
        "messages[1].tool_calls[0].function.arguments",
        "JSON object",
    ),
    (
        [user("Q"), assistant(tool_calls=[call("a", {"x": {1}})])],
        "messages[1].tool_calls[0].function.arguments.x",
        "as JSON",
    ),
    (
        [user("Q"), assistant(tool_calls=[call("a", {"x": float("nan")})])],
        "messages[1].tool_calls[0].function.arguments",
        "JSON",
    ),
    ([*TOOL_ROWS, user("Next")], "messages[1].tool_calls[0]", "no result"),
    ([*TOOL_ROWS, result("b", "R")], "messages[2].tool_call_id", "open: a (functions.get_weather)"),
    ([*TOOL_ROWS, {"role": "tool", "name": "book", "content": "R"}], "messages[2].name", "answers no open call"),
    ([*TOOL_ROWS, result("a", "R"), result("a", "R")], "messages[3]", "without a call"),
    (
        [user("Q"), assistant(tool_calls=[call("a", "{}"), call("b", "{}")]), {"role": "tool", "content": "R"}],
        "messages[2]",
        "which",
    ),
    ([user("Q"), assistant("A", channel="thoughts")], "messages[1].channel", "allowed: analysis"),
    ([user("Q"), assistant("A", channel="final", recipient="a b")], "messages[1].recipient", "expected a name"),
]


@pytest.mark.parametrize(("rows", "field", "said"), BROKEN, ids=[f"{field} {said}" for _, field, said in BROKEN])
def test_a_row_that_cannot_be_read_is_named_by_its_field(rows: Any, field: str, said: str) -> None:
    with pytest.raises(HarmonyError) as caught:
        conversation_from_messages(rows)
    assert caught.value.field == field
    assert said in str(caught.value)
    assert str(caught.value).count(field) == 1 or field == "messages"


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ("get_weather", "tools"),
        ([WEATHER, {"type": "function"}], "tools[1].name"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([{"type": "function", "function": {"name": "f", "description": 3}}], "tools[0].function.description"),
        ([{"name": "f", "parameters": "none"}], "tools[0].parameters"),
        ([WEATHER, WEATHER], "tools[1].function.name"),
    ],
)
def test_a_tool_that_cannot_be_read_is_named_by_its_field(tools: Any, field: str) -> None:
    with pytest.raises(HarmonyError) as caught:
        conversation_from_messages([user("Q")], tools=tools)
    assert caught.value.field == field


def test_a_call_of_an_unknown_tool_names_the_nearest() -> None:
    rows = [user("Q"), assistant(tool_calls=[call("a", "{}", "get_wether")])]
    with pytest.raises(HarmonyError, match="did you mean get_weather") as caught:
        conversation_from_messages(rows, tools=[WEATHER])
    assert caught.value.field == "messages[1].tool_calls[0].function.name"


def test_a_wrong_effort_is_refused() -> None:
    with pytest.raises(HarmonyError, match="reasoning_effort: is 'max'"):
        conversation_from_messages([user("Q")], reasoning_effort="max")  # type: ignore[arg-type]


def test_reasoning_preamble_and_calls_share_a_row_on_the_way_back() -> None:
    calls = [call("x", "{}"), call("y", '{"a":1}', "book")]
    rows = [user("Q"), assistant("Look:", thinking="T", tool_calls=calls), result("y", "B"), result("x", "A")]
    rows.append(assistant("Done.", thinking="U"))
    made = messages_to_openai(conversation_from_messages(rows).messages, "reasoning")
    assert made[1:] == [
        {
            "role": "assistant",
            "content": "Look:",
            "reasoning": "T",
            "tool_calls": [call("call_1", "{}"), call("call_2", '{"a":1}', "book")],
        },
        {"role": "tool", "tool_call_id": "call_2", "name": "book", "content": "B"},
        {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "A"},
        {"role": "assistant", "content": "Done.", "reasoning": "U"},
    ]


def test_reasoning_and_a_call_without_a_preamble_share_a_row_on_the_way_back() -> None:
    rows = [user("Q"), assistant(thinking="T", tool_calls=[call("call_1", "{}")])]
    made = messages_to_openai(conversation_from_messages(rows).messages, "thinking")
    assert made == rows


def test_messages_that_one_row_cannot_say_read_back_from_several() -> None:
    messages = (
        Message("user", "Q"),
        Message("assistant", "T", "analysis", train=False),
        Message("assistant", "Look:", "commentary", train=False),
        Message("assistant", "{}", "commentary", "functions.f", None, JSON),
        Message("tool", "R", "commentary", "assistant", "functions.f"),
        Message("assistant", "A note.", "commentary"),
        Message("assistant", "T1", "analysis"),
        Message("assistant", "T2", "analysis"),
        Message("assistant", "A1", "final"),
        Message("assistant", "A2", "final", weight=0.5),
    )
    assert conversation_from_messages(messages_to_openai(messages)).messages == messages


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Conversations as data sets hold them: turns of thinking, calls with their results, and answers."""
    settings_of_row = st.sampled_from([{}, {}, {"train": False}, {"weight": 0.5}])
    made: list[dict[str, Any]] = []
    for turn in range(draw(st.integers(1, 3))):
        made.append(user(draw(TEXTS)))
        for step in range(draw(st.integers(0, 2))):
            numbers = [f"{turn}-{step}-{index}" for index in range(draw(st.integers(1, 2)))]
            calls = [call(number, draw(TEXTS), draw(st.sampled_from(["f", "g"]))) for number in numbers]
            thinking = {"thinking": draw(TEXTS)} if draw(st.booleans()) else {}
            made.append(assistant(draw(st.none() | TEXTS), tool_calls=calls, **thinking, **draw(settings_of_row)))
            made += [result(number, draw(TEXTS)) for number in draw(st.permutations(numbers))]
        made.append(assistant(draw(TEXTS.filter(bool)), thinking=draw(st.none() | TEXTS), **draw(settings_of_row)))
    return made


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(rows(), st.sampled_from(["thinking", "reasoning", "reasoning_content"]))
def test_generated_conversations_survive_the_way_to_openai_messages_and_back(
    made: list[dict[str, Any]], key: str
) -> None:
    messages = conversation_from_messages(made).messages
    assert conversation_from_messages(messages_to_openai(messages, key)).messages == messages
