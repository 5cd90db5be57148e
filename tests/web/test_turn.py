"""Tokens to parts, without a server: every way a model can speak, and text held back that may become a stop text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ossia.engine import Token
from ossia.engine.request import Finish
from ossia.harmony import Vocabulary
from ossia.web.protocol.chat import ChatAnswer, Head, Usage
from ossia.web.protocol.turn import Begin, Done, Held, More, Piece, PlainTurn, Turn


@pytest.fixture(scope="module")
def vocab(small_tokenizer: Path) -> Vocabulary:
    return Vocabulary.from_file(small_tokenizer)


def ids_of(vocab: Vocabulary, text: str) -> list[int]:
    """Ids of Harmony written as text, special tokens by their names."""
    import re

    found: list[int] = []
    for piece in re.split(r"(<\|\w+\|>)", text):
        found += [vocab.special[piece]] if piece in vocab.special else vocab.encode(piece)
    return found


def run(
    vocab: Vocabulary, text: str, finish: Finish = "stop", cut: int | None = None, **options: object
) -> tuple[Turn, list[Piece]]:
    """The pieces of a whole turn, or of its first `cut` tokens."""
    turn, pieces = Turn(vocab, **options), []  # type: ignore[arg-type]
    ids = ids_of(vocab, text)[:cut]
    for place, number in enumerate(ids):
        last = place == len(ids) - 1
        pieces += turn.push(Token(0, number, -0.5, finish if last else None))
        if turn.end is not None:
            break
    return turn, pieces


def said(pieces: list[Piece]) -> list[str]:
    """Each part as `kind name: text`."""
    parts: list[str] = []
    for piece in pieces:
        if isinstance(piece, Begin):
            parts.append(f"{piece.kind} {piece.name}: ")
        elif isinstance(piece, More):
            parts[-1] += piece.text
    return parts


CALLS = (
    "<|channel|>analysis<|message|>Both.<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>A moment.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.a <|constrain|>json<|message|>{}<|end|>"
    '<|start|>assistant to=functions.b<|channel|>commentary json<|message|>{"x":1}<|call|>'
)


def test_several_calls_of_a_turn_are_told_apart_and_one_ends_it_where_only_one_is_wanted(vocab: Vocabulary) -> None:
    turn, pieces = run(vocab, CALLS)
    assert said(pieces) == ["reasoning : Both.", "text : A moment.", "call a: {}", 'call b: {"x":1}']
    assert [piece.preamble for piece in pieces if isinstance(piece, Begin)] == [False, True, False, False]
    assert turn.end == "tool_calls"
    assert turn.num_tokens == len(ids_of(vocab, CALLS))
    single, pieces = run(vocab, CALLS, one_call=True)
    assert said(pieces)[-1] == "call a: {}"
    assert single.end == "tool_calls"
    assert single.num_tokens < turn.num_tokens


def test_where_json_is_wanted_what_comes_before_the_answer_is_reasoning(vocab: Vocabulary) -> None:
    text = "<|channel|>commentary<|message|>Well.<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"
    assert said(run(vocab, text)[1]) == ["text : Well.", "text : {}"]
    assert said(run(vocab, text, only_final=True)[1]) == ["reasoning : Well.", "text : {}"]


def test_several_visible_messages_of_a_turn_become_one_content_with_an_empty_line_between(vocab: Vocabulary) -> None:
    text = (
        "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>commentary<|message|>B<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>C<|end|><|start|>assistant<|channel|>final<|message|>D<|return|>"
    )
    turn, pieces = run(vocab, text)
    answer = ChatAnswer(Head("id", 0, "m"), vocab, 1, logprobs=False, says_usage=False)
    chunks = [answer.take(0, [piece], None) for piece in pieces]
    message = answer.whole(Usage(1, 2, 3))["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("B\n\nD", "A\n\nC")
    deltas = [chunk["choices"][0]["delta"] for more in chunks for chunk in more]
    for key in ("content", "reasoning"):
        assert "".join(delta.get(key, "") for delta in deltas) == message[key]
    assert turn.end == "stop"


def test_wherever_a_turn_is_cut_off_no_header_becomes_text(vocab: Vocabulary) -> None:
    whole = ["reasoning : Both.", "text : A moment.", "call a: {}", 'call b: {"x":1}']
    for cut in range(1, len(ids_of(vocab, CALLS))):
        turn, pieces = run(vocab, CALLS, "length", cut)
        parts = said(pieces)
        assert turn.end == "length"
        assert all(full.startswith(part) for full, part in zip(whole, parts, strict=False)), parts
        begun = sum(isinstance(piece, Begin) for piece in pieces)
        assert begun == sum(isinstance(piece, Done) for piece in pieces)


def test_text_without_any_harmony_is_shown(vocab: Vocabulary) -> None:
    _, pieces = run(vocab, "just words", "length")
    assert said(pieces) == ["text : just words"]


def test_the_turn_ends_where_the_model_speaks_for_somebody_else(vocab: Vocabulary) -> None:
    text = "<|channel|>final<|message|>Yes.<|end|><|start|>user<|message|>No?<|end|>"
    turn, pieces = run(vocab, text)
    assert said(pieces) == ["text : Yes."]
    assert turn.end == "stop"


def test_the_end_of_all_text_is_no_text(vocab: Vocabulary) -> None:
    turn, pieces = run(vocab, "<|channel|>final<|message|>Yes.<|endoftext|>")
    assert said(pieces) == ["text : Yes."]
    assert turn.end == "stop"


def test_a_turn_that_ends_inside_a_part_says_so(vocab: Vocabulary) -> None:
    turn, pieces = run(vocab, "<|channel|>final<|message|>Ye", "length")
    assert pieces[-1] == Done(False)
    assert turn.end == "length"


def test_held_text_goes_out_as_soon_as_it_cannot_become_a_stop_text_any_more() -> None:
    held = Held(("STOP", "TOMB"))
    assert held.push("a S") == ("a ", (), False)
    assert held.push("TO") == ("", (), False)
    assert held.push("M") == ("S", (), False)
    assert held.push("x") == ("TOMx", (), False)
    assert held.push("STO") == ("", (), False)
    assert held.rest() == ("STO", ())


def test_text_in_any_pieces_ends_before_the_first_stop_text_and_loses_nothing() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 14)))
        stops = tuple("".join(rng.choice("ab") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(3)))
        held, out, stopped, tokens, rest = Held(stops), "", False, [], text
        number = 0
        while rest and not stopped:
            size = rng.randrange(0, 4)
            held.expect(Token(0, number, 0.0, None))
            number += 1
            more, placed, stopped = held.push(rest[:size])
            out, rest = out + more, rest[size:]
            tokens += placed
        if not stopped:
            more, placed = held.rest()
            out, tokens = out + more, [*tokens, *placed]
        # a stop text that is complete earlier ends the text, even if one that began before it was still growing
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        if stopped:
            assert ends
            assert any(text.startswith(out + stop) for stop in stops)
            assert not any(stop in out for stop in stops)
        else:
            assert not ends
            assert out == text
        assert [one.token.id for one in tokens] == sorted(one.token.id for one in tokens)
        assert all(one.place < max(len(out), 1) for one in tokens)


def test_a_plain_turn_shows_all_but_the_stop_and_keeps_characters_whole(vocab: Vocabulary) -> None:
    stop = vocab.special["<|return|>"]
    turn, text = PlainTurn(vocab, (), frozenset({stop})), ""
    ids = [*vocab.encode("a 🎉"), vocab.special["<|start|>"], stop]
    for number in ids:
        for piece in turn.push(Token(0, number, -0.1, "stop" if number == stop else None)):
            assert isinstance(piece, More)
            assert "\ufffd" not in piece.text
            text += piece.text
    assert text == "a 🎉<|start|>"
    assert (turn.end, turn.num_tokens) == ("stop", len(ids))
