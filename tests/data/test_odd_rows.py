"""Rows that nearly say something: each is refused with its place and field, or counted and told; none is misread."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ossia.config import Recipe
from ossia.data.dataset import open_datasets, scan
from ossia.data.sample import Sample
from ossia.errors import DataError, RecipeError
from ossia.harmony.vocab import Vocabulary
from tests.data.conftest import Read
from tests.data.test_formats import ANSWER, CALL, USER, messages, same, turns

RESULT = {"role": "tool", "tool_call_id": "1", "content": "19C"}
AN_EMPTY_ANSWER = {"role": "assistant", "thinking": "Long.", "content": ""}


def calls(*found: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(found), **keys}


def calling(arguments: Any, name: str = "weather") -> dict[str, Any]:
    return calls({"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}})


def deep(levels: int) -> Any:
    """A value inside so many objects."""
    return json.loads('{"a":' * levels + "1" + "}" * levels)


def native(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "channel": "commentary", "content": content, **keys}


def part(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": "4", **keys}]}


ARGUMENTS = r"messages\[1\].tool_calls\[0\].function.arguments: arguments of a call, "
WAY_OUT = r"; mend it, or keep the message as context that isn't trained with train: false"
RANGE = r"a weight is 0 \(not trained\) or from 1e-09 to 1e\+09"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        # weights that float32, or a sum of them, doesn't hold
        (messages(USER, {**ANSWER, "weight": 1e39}), rf"messages\[1\].weight: is 1e\+39; {RANGE}"),
        (messages(USER, {**ANSWER, "weight": 3e38}), rf"messages\[1\].weight: is 3e\+38; {RANGE}"),
        (messages(USER, {**ANSWER, "weight": 1e-50}), rf"messages\[1\].weight: is 1e-50; {RANGE}"),
        (
            messages(USER, {**ANSWER, "weight": 10**400}),
            rf"\[1\].weight: found a number of 401 digits; {RANGE}",
        ),
        (messages(USER, {**ANSWER, "weight": float("nan")}), rf"messages\[1\].weight: is nan; {RANGE}"),
        (messages(USER, {**ANSWER, "weight": "1"}), r"messages\[1\].weight: expected a number >= 0, found '1'"),
        (messages({**USER, "weight": 2}, ANSWER), r"messages\[0\].weight: found 2, but only assistant messages"),
        (messages(USER, {**ANSWER, "train": True, "weight": 0}), r"messages\[1\].weight: is 0, .* but train is true"),
        ({"ids": [1, 2], "weights": [0, 1e39]}, rf"weights\[1\]: found 1e\+39; {RANGE}"),
        ({"ids": [1, 2], "weights": [0, 1e-50]}, rf"weights\[1\]: found 1e-50; {RANGE}"),
        ({"ids": [1, 2], "weights": [0, float("nan")]}, rf"weights\[1\]: found nan; {RANGE}"),
        ({"ids": [1, 2], "weights": [False, True]}, r"weights\[0\]: expected a list of numbers, found False"),
        ({"ids": [1, 2], "weights": ["0", "1"]}, r"weights\[0\]: expected a list of numbers, found text"),
        ({"ids": [1, 10**30], "weights": [0, 1]}, r"ids\[1\]: 10{30} is not in the vocabulary"),
        # calls that must not be taught
        (messages(USER, calling('{"city": ')), ARGUMENTS + r"not valid JSON: Expecting value at column 10" + WAY_OUT),
        (messages(USER, calling("")), ARGUMENTS + r"not valid JSON: Expecting value at column 1" + WAY_OUT),
        (messages(USER, calling("[1]")), ARGUMENTS + r"found a list, but they have to be a JSON object" + WAY_OUT),
        (messages(USER, calling("3")), ARGUMENTS + r"found a number, but they have to be a JSON object" + WAY_OUT),
        (messages(USER, calling('{"x": NaN}')), ARGUMENTS + r"not valid JSON: NaN is no number of JSON" + WAY_OUT),
        (
            messages(USER, calling('{"x": 1, "x": 2}')),
            ARGUMENTS + r"not valid JSON: the key 'x' stands twice",
        ),
        (messages(USER, calling({"x": float("nan")})), r"function.arguments: can't be written as JSON: Out of range"),
        (
            turns(("human", "?"), ("function_call", '{"name": "f", "arguments": "{"}')),
            r"conversations\[1\].value: argum",
        ),
        (
            messages(USER, native("f()", recipient="functions.f", content_type="<|constrain|>json")),
            r"messages\[1\].content: arguments of a call, not valid JSON" + ".*" + WAY_OUT,
        ),
        (
            messages(USER, native("f()", content_type="<|constrain|>json")),
            r"messages\[1\].content: text that is marked as JSON, not valid JSON",
        ),
        (messages(USER, AN_EMPTY_ANSWER), r"messages\[1\].content: an empty answer would be trained"),
        # typos
        (
            messages(USER, calls({"function": {"name": "f", "argumets": '{"x": 1}'}})),
            r"messages\[1\].tool_calls\[0\].function.argumets: unknown key; .* did you mean arguments\?",
        ),
        (
            messages(USER, calls({"name": "f", "argumets": {}})),
            r"\[0\].argumets: .* did you mean arguments\?",
        ),
        (messages(USER, calls({**CALL, "fuction": 1})), r"tool_calls\[0\].fuction: .* did you mean function\?"),
        (messages(USER, calls({**CALL, "arguments": "{}"})), r"\[0\].arguments: stands beside `function`; it belongs"),
        (turns(("human", "?"), ("function_call", '{"name": "f", "arguments": {}, "idd": 1}')), r"value.idd: unknown"),
        (
            turns(("Human", "?"), ("gpt", "!")),
            r"conversations\[0\].from: unknown .* did you mean human\?",
        ),
        (messages({**USER, "role": "User"}, ANSWER), r"messages\[0\].role: found 'User'; .* did you mean user\?"),
        (
            messages(USER, native("!", channel="Final")),
            r"messages\[1\].channel: found .* did you mean final\?",
        ),
        # settings that would say nothing
        (messages(USER, part(train=False)), r"messages\[1\].content\[0\].train: is for a whole message"),
        (
            messages(USER, part(wieght=1)),
            r"messages\[1\].content\[0\].wieght: unknown key; allowed: type, text, ref",
        ),
        (messages(USER, {**ANSWER, "content_type": "json"}), r"messages\[1\].content_type: needs a channel beside it"),
        (messages(USER, {**ANSWER, "tool_calls": 0}), r"messages\[1\].tool_calls: expected a list of calls, found 0"),
        (messages(USER, native("!", content_type="a b")), r"messages\[1\].content_type: expected a word like json"),
        (messages(USER, native("!", channel="final", recipient="functions.f")), r"messages\[1\].recipient: an answer"),
        (messages(USER, native("{}", recipient="functions.g"), tools=[]), r"recipient: g is not among the row's tools"),
        (messages(USER, calling("{}", "functions.")), r"function.name: expected a name of letters, .* 'functions.'"),
        (
            {"conversations": [{"from": "human", "value": "a", "content": "b"}]},
            r"conversations\[0\].content: stands beside from and value",
        ),
        # results that could be of either call
        (messages(USER, calls(CALL, CALL), RESULT), r"tool_calls\[1\].id: '1' is the id of an earlier call too"),
        (
            messages(USER, calls({"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}), RESULT),
            r"messages\[2\]: tool_call_id or name must say which call this answers; open: no id \(functions.a\), no id",
        ),
        (messages(USER, calls(CALL), {**RESULT, "tool_call_id": 1}), r"tool_call_id: expected text, found 1"),
        # nothing in it
        ({"conversations": []}, r"conversations: expected a list with at least one message"),
        ({"prompt": "?", "completion": []}, r"completion: expected an assistant message, found none of its 0"),
        ({"prompt": "?", "completion": [USER]}, r"completion: expected an assistant message, found none of its 1"),
        (turns(("human", "?"), ("function_call", "[]")), r"conversations\[1\].value: a function_call without a call"),
        (
            turns(("human", "?"), ("function_call", '{"name": "f", "arguments": null}')),
            r'conversations\[1\].value: expected {"name"',
        ),
        # too deep, too large
        (messages(USER, ANSWER, tools="[" * 100_000), r"tools: text that isn't JSON: nested too deeply"),
        (messages(USER, ANSWER, tools='[{"name": ' + "9" * 5000 + "}]"), r"tools: text that isn't JSON: .*digits"),
        (turns(("human", "?"), ("function_call", "[" * 100_000)), r"conversations\[1\].value: .*nested too deeply"),
        (turns(("human", "?"), ("function_call", "9" * 5000)), r"conversations\[1\].value: .*digits"),
        (messages(USER, ANSWER, tools='[{"name": "f", "name": "g"}]'), r"tools: .*the key 'name' stands twice"),
        (messages(USER, calling(deep(64))), r"arguments(\.a){64}: a value inside 64 others; make it flatter"),
        (messages(USER, calling(deep(450))), r"a value inside 64 others"),
        (messages(USER, calling(json.dumps(deep(64)))), r"arguments of a call, .*a value inside 64 others"),
        (messages(USER, ANSWER, tools=json.dumps([deep(64)])), r"tools: .*a value inside 64 others"),
    ],
)
def test_a_row_that_nearly_says_something_is_refused_by_its_place_and_field(
    read: Read, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=r"rows0.jsonl:1: (.*)" + message):
        read(row)


def test_arguments_may_be_nested_up_to_the_limit_whichever_python_reads_them(read: Read) -> None:
    for arguments in (deep(63), json.dumps(deep(63))):
        read(messages(USER, calling(arguments), RESULT, ANSWER))


def test_a_column_that_is_null_or_misspelt_is_told_as_such(read: Read) -> None:
    with pytest.raises(DataError, match=r"rows0.jsonl:1: messages: is null; rows of the format messages have"):
        read({"messages": None}, format="messages")
    with pytest.raises(DataError, match=r"rows1.jsonl:1: completion: missing; .*; did you mean completon\?"):
        read({"prompt": "?", "completon": "!"}, format="prompt")


def test_a_malformed_call_may_be_context(read: Read, vocab: Vocabulary) -> None:
    bad = calling('{"city": ')
    rest = [RESULT | {"content": "not JSON"}, calling("{}"), RESULT, ANSWER]
    (sample,) = read(messages(USER, {**bad, "train": False}, *rest))
    assert '{"city": <|call|>' in vocab.decode(sample.ids.tolist())
    assert '{"city": ' not in vocab.decode(sample.ids[sample.weights > 0].tolist())
    (again,) = read({"prompt": [USER, bad, rest[0]], "completion": rest[1:]})
    assert same([sample], [again])
    read(messages(USER, bad, *rest), train={"channels": ["final"]})  # calls aren't trained at all
    read(messages(USER, calling("1 + 1", "python"), builtin_tools=["python"]))  # code, not JSON
    read(messages(USER, {**AN_EMPTY_ANSWER, "train": False}, USER, ANSWER))


def test_what_openai_sends_beside_a_call_may_stay(read: Read) -> None:
    plain = messages(USER, calls(CALL), RESULT, ANSWER)
    sent = {"id": "1", "type": "function", "index": 0, "function": {**CALL["function"], "parsed_arguments": {}}}
    text = [{"type": "output_text", "text": "4", "annotations": [], "logprobs": []}]
    assert same(read(messages(USER, calls(sent), RESULT, {**ANSWER, "content": text})), read(plain))
    refused = [{"type": "refusal", "refusal": "4"}]
    assert same(read(messages(USER, {**ANSWER, "content": refused})), read(messages(USER, ANSWER)))


def test_sharegpt_results_find_their_calls_by_the_rows_own_ids(read: Read) -> None:
    both = [{"name": name, "arguments": {}, "id": name} for name in "ab"]
    asked = turns(("human", "?"), ("function_call", json.dumps(both)))
    results = [{"from": "observation", "value": name.upper(), "tool_call_id": name} for name in "ba"]
    found = read({"conversations": [*asked["conversations"], *results, {"from": "gpt", "value": "!"}]})
    called = [{"id": name, "function": {"name": name, "arguments": {}}} for name in "ab"]
    answered = [{"role": "tool", "tool_call_id": name, "content": name.upper()} for name in "ba"]
    said = [{"role": "user", "content": "?"}, calls(*called), *answered, {"role": "assistant", "content": "!"}]
    assert same(found, read(messages(*said)))


def test_the_system_column_of_messages_is_used_and_not_called_unused(
    write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary
) -> None:
    (dataset,), *_ = open_datasets(make_recipe(write_rows([messages(USER, ANSWER, system="Be brief.")])), vocab)
    assert "Be brief." in vocab.decode(dataset.samples(0)[0].ids.tolist())
    assert scan([dataset]).warnings() == []


def test_an_instruction_or_an_input_alone_is_the_whole_question(read: Read) -> None:
    expected = read({"instruction": "x", "output": "y"})
    assert same(read({"instruction": "", "input": "x", "output": "y"}), expected)


def test_an_assistant_message_of_the_prompt_is_trained_if_it_says_so_itself(read: Read) -> None:
    def trained(samples: list[Sample]) -> int:
        return sum(sample.num_trained for sample in samples)

    earlier = [USER, {**ANSWER, "train": True}, USER]
    assert trained(read({"prompt": earlier, "completion": "5"})) == trained(read(messages(*earlier, ANSWER)))


@pytest.mark.parametrize(
    ("row", "warning"),
    [
        (messages(USER, ANSWER, USER), "text after the last answer or call, which nothing is trained on"),
        (
            messages(USER, {"role": "assistant", "thinking": "Hm."}),
            "thinking or a preamble that no answer or call follows, in which the model learns no end of its turn",
        ),
        ({"instruction": "", "input": "", "output": "!"}, "a user message without text"),
        (
            {"ids": [1, 2], "weights": [1, 1]},
            "a weight on their first token, which isn't trained: nothing is before it to predict it from",
        ),
        (
            messages(USER, ANSWER, reasoning_efort="high"),
            "the column `reasoning_efort`, which is not used: 2; did you mean reasoning_effort?",
        ),
        ({"text": "abc", "\ud83d\x1b[31m": 1}, r"the column `\ud83d\x1b[31m`, which is not used"),
    ],
)
def test_what_is_legal_but_may_not_be_meant_is_counted_and_told(
    write_rows: Callable[..., str],
    make_recipe: Callable[..., Recipe],
    vocab: Vocabulary,
    row: dict[str, Any],
    warning: str,
) -> None:
    (dataset,), *_ = open_datasets(make_recipe(write_rows([row, row])), vocab)
    (found,) = scan([dataset]).warnings()
    assert found.startswith(f"rows with {warning}")
    assert ": 2" in found


def test_a_column_can_be_only_one_field_and_the_recipes_tools_are_the_recipes_fault(read: Read) -> None:
    with pytest.raises(RecipeError, match=r"data.columns.prompt: the column `q` is completion already"):
        read({"q": "a"}, columns={"prompt": "q", "completion": "q"})
    with pytest.raises(RecipeError, match=r"data.tools\[0\].nme: unknown key; .*\n  next: mend the tools that the rec"):
        read(messages(USER, ANSWER), tools=[{"nme": "f"}])
    with pytest.raises(DataError, match=r"rows2.jsonl:1: functions\[0\].nme: unknown key"):
        read(messages(USER, ANSWER, functions=[{"nme": "f"}]), columns={"tools": "functions"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"text": "a", "text": "b"}\n', r"r.jsonl:1: not valid JSON: the key 'text' stands twice"),
        ("r.json", b'[{"text": "a"},\n {"text": "a", "text": "b"}]', r"r.json:2: not valid JSON: the key 'text'"),
        ("r.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"r.jsonl: UTF-16 text, expected UTF-8\n  next: iconv"),
        ("r.jsonl", b'{"text": "a\xed\xa0\xbd"}\n', r"r.jsonl:1: not UTF-8 text at byte 12 of the row"),
        ("r.jsonl", b'[\n{"text": "a"}\n]', r"r.jsonl:1: not valid JSON: .*; an array of rows goes into a .json"),
        ("r.json", b'{\n"data": [{"text": "a"}]}', r"r.json:1: not valid JSON: .*\n  expected: .* an array of them"),
        (
            "r.jsonl",
            b'{"text": "a"}\r{"text": "b"}\r',
            r"r.jsonl:1: not valid JSON: Extra data.*\n  expected: one",
        ),
        ("r.jsonl", b"", r"r.jsonl: the file holds no rows\n  expected: at least one"),
        ("r.jsonl.gz", b'{"text": "a"}\n', r"r.jsonl.gz: not a whole gzip file: .*\n  next: pack it again"),
    ],
)
def test_a_file_of_another_form_is_told_with_what_was_expected(
    tmp_path: Path, make_recipe: Callable[..., Recipe], vocab: Vocabulary, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        scan(open_datasets(make_recipe(str(tmp_path / name)), vocab).train)


def test_a_byte_order_mark_at_any_row_is_no_part_of_it(
    read: Read, tmp_path: Path, make_recipe: Any, vocab: Any
) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\r\n\xef\xbb\xbf{"text": "abc"}\r\n')
    counts = scan(open_datasets(make_recipe(str(tmp_path / "r.jsonl")), vocab).train)
    assert (counts.samples, counts.tokens) == (2, 8)
