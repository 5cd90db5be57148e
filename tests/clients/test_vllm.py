"""By what rule vLLM takes answers apart, as the check beside its server (`python -m benchmarks.clients`) has it.

Asked of vLLM 0.32's own parser once, over ids that a trained model sampled; here it is held without vLLM.
"""

from __future__ import annotations

from benchmarks.clients.chats import Said
from benchmarks.clients.vllm import as_vllm_tells
from ossia.api import Reply
from ossia.engine import Completion
from ossia.engine.request import Finish
from tests.harmony.support import o200k

MESSAGE, END, OTHER = "<|message|>", "<|end|>", ("<|start|>", "assistant")
CALL = (" to=functions.f", "<|channel|>", "commentary ", "<|constrain|>", "json", MESSAGE)


def sampled(*pieces: str, finish: Finish = "stop") -> Completion:
    special = o200k().special
    ids = [number for piece in pieces for number in ([special[piece]] if piece in special else o200k().encode(piece))]
    return Completion(ids, [0.0] * len(ids), finish)


def said_in(channel: str, text: str) -> tuple[str, ...]:
    return "<|channel|>", channel, MESSAGE, text


def test_messages_of_a_channel_are_joined_by_one_newline() -> None:
    answer = sampled(
        *(*said_in("analysis", "Look."), END, *OTHER, *said_in("analysis", "And think."), END, *OTHER),
        *(*said_in("final", "One."), END, *OTHER, *said_in("final", "Two."), "<|return|>"),
    )
    assert as_vllm_tells(o200k(), answer, tools=False) == Said("One.\nTwo.", "Look.\nAnd think.", (), "stop")
    assert Reply.of(o200k(), answer).content == "One.\n\nTwo."


def test_commentary_is_content_beside_a_final_and_beside_a_call() -> None:
    preamble = (*said_in("commentary", "I'll look."), END, *OTHER)
    final = sampled(*preamble, *said_in("final", "Done."), "<|return|>")
    assert as_vllm_tells(o200k(), final, tools=True) == Said("I'll look.\nDone.", "", (), "stop")
    call = sampled(*preamble, *CALL, '{"a":1}', "<|call|>")
    assert as_vllm_tells(o200k(), call, tools=True) == Said("I'll look.", "", (("f", '{"a": 1}'),), "tool_calls")


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    call = sampled(*CALL, '{"a":', "<|call|>")
    assert as_vllm_tells(o200k(), call, tools=True) == Said("", "", (("f", '{"a":'),), "tool_calls")


def test_calls_are_left_out_where_no_tools_were_offered() -> None:
    call = sampled(*said_in("analysis", "Look."), END, *OTHER, *CALL, "{}", finish="length")
    assert as_vllm_tells(o200k(), call, tools=False) == Said("", "Look.", (), "length")
