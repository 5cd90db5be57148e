"""The stream parser, case by case: events as they come, and output that breaks the format."""

from __future__ import annotations

from ossia.harmony import Closed, Delta, Message, Opened, StreamParser, parse_completion
from tests.harmony.support import o200k


def ids_of(*pieces: str) -> list[int]:
    """Ids of special tokens and pieces of text, each piece encoded by itself."""
    special = o200k().special
    return [number for piece in pieces for number in ([special[piece]] if piece in special else o200k().encode(piece))]


def parse(*pieces: str) -> StreamParser:
    parser = StreamParser(o200k())
    for number in ids_of(*pieces):
        parser.push(number)
    parser.finish()
    return parser


def what(parser: StreamParser) -> list[tuple[str, str]]:
    return [(problem.what, problem.text) for problem in parser.problems]


def test_a_message_opens_grows_and_closes() -> None:
    parser = StreamParser(o200k())
    events = [
        event for number in ids_of("<|channel|>", "final", "<|message|>", "Hi you") for event in parser.push(number)
    ]
    assert events == [Opened(Message("assistant", "", "final")), Delta("Hi"), Delta(" you")]
    assert parser.current == Message("assistant", "Hi you", "final")
    assert parser.messages == []
    assert parser.push(o200k().special["<|return|>"]) == [Closed(Message("assistant", "Hi you", "final"))]
    assert parser.stop == "<|return|>"
    assert parser.current is None
    assert parser.finish() == []
    assert parser.problems == []


def test_analysis_call_and_headers_are_read() -> None:
    parser = parse(
        *("<|channel|>", "analysis", "<|message|>", "Look.", "<|end|>", "<|start|>", "assistant", " to=functions.f"),
        *("<|channel|>", "commentary", " ", "<|constrain|>", "json", "<|message|>", '{"a": 1}', "<|call|>"),
    )
    call = Message("assistant", '{"a": 1}', "commentary", "functions.f", None, "<|constrain|>json")
    assert parser.messages == [Message("assistant", "Look.", "analysis"), call]
    assert parser.problems == []


def test_a_recipient_after_the_channel_is_read_too_as_the_released_models_write_it() -> None:
    parsed = parse_completion(
        o200k(),
        ids_of(
            "<|channel|>", "commentary", " to=functions.f ", "<|constrain|>", "json", "<|message|>", "{}", "<|call|>"
        ),
    )
    assert parsed == [Message("assistant", "{}", "commentary", "functions.f", None, "<|constrain|>json")]


def test_a_second_channel_is_a_problem_and_never_a_recipient() -> None:
    parser = parse("<|channel|>", "analysis", "<|channel|>", "final", "<|message|>", "Hi", "<|return|>")
    assert parser.messages == [Message("assistant", "Hi", "analysis")]
    assert what(parser) == [("a header with more than one <|channel|>", "analysis<|channel|>final")]
    call = (" to=functions.f", *("<|channel|>", "commentary") * 2, " ", "<|constrain|>", "json", "<|message|>", "{}")
    parser = parse(*call, "<|call|>")
    assert parser.messages == [Message("assistant", "{}", "commentary", "functions.f", None, "<|constrain|>json")]


def test_a_lone_content_type_is_not_taken_for_a_recipient() -> None:
    (message,) = parse("<|channel|>", "final", " ", "<|constrain|>", "json", "<|message|>", "[]", "<|return|>").messages
    assert message == Message("assistant", "[]", "final", content_type="<|constrain|>json")


def test_a_character_in_pieces_comes_out_whole() -> None:
    parser = StreamParser(o200k())
    pieces = o200k().encode("a🎻🌧b")
    events = [e for number in [*ids_of("<|channel|>", "final", "<|message|>"), *pieces] for e in parser.push(number)]
    assert [event.text for event in events if isinstance(event, Delta)] == ["a", "🎻", "🌧", "b"]


def test_half_a_character_at_the_end_is_marked_not_lost() -> None:
    parser = StreamParser(o200k())
    for number in [*ids_of("<|channel|>", "final", "<|message|>", "ok "), o200k().encode("🌧")[0]]:
        parser.push(number)
    assert parser.finish() == [Delta("\ufffd"), Closed(Message("assistant", "ok \ufffd", "final"))]


def test_ids_that_end_inside_a_message_give_what_there_is() -> None:
    parser = parse("<|channel|>", "analysis", "<|message|>", "Thinking ab")
    assert parser.messages == [Message("assistant", "Thinking ab", "analysis")]
    assert what(parser) == [("the ids end inside a message", "")]
    assert parser.stop is None


def test_ids_that_end_inside_a_header_keep_its_text() -> None:
    parser = parse("<|channel|>", "analysis")
    assert parser.messages == [Message("assistant", "", "analysis")]
    assert what(parser) == [("the ids end inside a header", "<|channel|>analysis")]


def test_plain_text_without_any_format_becomes_a_message() -> None:
    parser = parse("The answer is 4.")
    assert parser.messages == [Message("assistant", "The answer is 4.")]
    assert what(parser) == [("the ids end inside a header", "The answer is 4.")]


def test_text_before_a_stop_without_a_message_token_becomes_content() -> None:
    parser = parse("<|channel|>", "final", " four", "<|return|>")
    assert parser.messages == [Message("assistant", "four", "final")]
    assert what(parser) == [("a header ended by <|return|> before its <|message|>", "<|channel|>final four")]
    assert parser.stop == "<|return|>"


def test_special_tokens_inside_content_stay_as_text() -> None:
    parser = parse("<|channel|>", "final", "<|message|>", "a", "<|channel|>", "b", "<|start|>", "c", "<|return|>")
    assert parser.messages == [Message("assistant", "a<|channel|>b<|start|>c", "final")]
    assert what(parser) == [
        ("a special token inside a message", "<|channel|>"),
        ("a special token inside a message", "<|start|>"),
    ]
    assert [problem.position for problem in parser.problems] == [4, 6]


def test_text_between_messages_is_reported() -> None:
    parser = parse(
        *("<|channel|>", "final", "<|message|>", "a", "<|end|>", " stray text"),
        *("<|start|>", "assistant", "<|channel|>", "final", "<|message|>", "b", "<|return|>", "after"),
    )
    assert [message.content for message in parser.messages] == ["a", "b"]
    assert what(parser) == [("text between messages", " stray text"), ("text between messages", "after")]


def test_a_header_that_says_too_much_keeps_its_words() -> None:
    parser = parse("<|channel|>", "commentary", " one two to=functions.f json", "<|message|>", "{}", "<|call|>")
    assert parser.messages == [Message("assistant", "{}", "commentary", "functions.f", None, "json")]
    assert what(parser) == [("a header with words that mean nothing", "one two")]


def test_a_channel_without_a_name_is_reported() -> None:
    parser = parse("<|channel|>", "<|message|>", "x", "<|end|>")
    assert parser.messages == [Message("assistant", "x")]
    assert what(parser) == [("<|channel|> without a channel's name", "")]


def test_other_authors_are_read_with_their_names() -> None:
    parsed = parse_completion(
        o200k(),
        ids_of(
            *("<|start|>", "user", ":Ann", "<|message|>", "Hi", "<|end|>", "<|start|>", "functions.f", " to=assistant"),
            *("<|channel|>", "commentary", "<|message|>", "ok", "<|end|>"),
        ),
        role=None,
    )
    assert parsed == [
        Message("user", "Hi", name="Ann"),
        Message("tool", "ok", "commentary", "assistant", "functions.f"),
    ]


def test_an_empty_completion_has_a_problem_and_no_message() -> None:
    parser = parse()
    assert parser.messages == []
    assert what(parser) == [("the ids end inside a header", "")]
