"""Which tokens are trained, and with what weight; the oracle tests hold the ids themselves."""

from __future__ import annotations

import pytest

from ossia.errors import HarmonyError
from ossia.harmony import Conversation, Message, Rendered, Renderer, Span, System, Tool, TrainOn
from tests.harmony.support import o200k, renderer, trained_runs

USER = Message("user", "Q")
THINK = Message("assistant", "T", "analysis")
CALL = Message("assistant", "{}", "commentary", "functions.f", None, "<|constrain|>json")
RESULT = Message("tool", "R", "commentary", "assistant", "functions.f")
ANSWER = Message("assistant", "A", "final")


def samples(*messages: Message, on: TrainOn | None = None) -> list[Rendered]:
    return renderer().samples(Conversation(messages), on)


def trained_texts(*messages: Message, on: TrainOn | None = None) -> list[list[str]]:
    """Per sample, the text of each trained stretch."""
    return [[o200k().decode(run) for _, run in trained_runs(sample)] for sample in samples(*messages, on=on)]


def test_a_question_alone_gives_no_sample() -> None:
    assert samples(USER) == []


def test_spans_cover_the_sample_message_by_message() -> None:
    (sample,) = samples(USER, THINK, CALL, RESULT, ANSWER)
    assert [(span.role, span.channel) for span in sample.spans] == [
        ("system", None),
        ("user", None),
        ("assistant", "analysis"),
        ("assistant", "commentary"),
        ("tool", "commentary"),
        ("assistant", "final"),
    ]
    assert sample.spans[0].start == 0
    assert [span.end for span in sample.spans[:-1]] == [span.start for span in sample.spans[1:]]
    assert sample.spans[-1].end == len(sample.ids) == len(sample.weights)
    assert isinstance(sample.spans[0], Span)
    assert all(sample.ids[span.start] == o200k().special["<|start|>"] for span in sample.spans)


def test_only_what_is_sampled_is_trained() -> None:
    assert trained_texts(USER, THINK, CALL, RESULT, ANSWER) == [
        [
            "<|channel|>analysis<|message|>T<|end|><|start|>assistant to=functions.f<|channel|>commentary "
            "<|constrain|>json<|message|>{}<|call|>",
            "<|channel|>final<|message|>A<|return|>",
        ]
    ]


def test_an_answer_inside_a_sample_has_return_as_target_and_end_as_id() -> None:
    (sample,) = samples(USER, ANSWER, USER, ANSWER)
    first, last = sample.spans[2].end - 1, sample.spans[4].end - 1
    assert sample.targets is not None
    assert (sample.ids[first], sample.targets[first]) == (200007, 200002)
    assert (sample.ids[last], sample.targets[last]) == (200002, 200002)
    assert sample.weights[first] == sample.weights[last] == 1


def test_one_turn_needs_no_targets() -> None:
    (sample,) = samples(USER, ANSWER)
    assert sample.targets is None
    assert sample.ids == renderer().training_ids(Conversation((USER, ANSWER)))


def test_the_thinking_of_an_answer_is_trained_though_the_library_drops_it_for_training() -> None:
    conversation = Conversation((USER, THINK, ANSWER))
    assert renderer().training_ids(conversation) == renderer().training_ids(Conversation((USER, ANSWER)))
    assert trained_texts(USER, THINK, ANSWER) == [
        ["<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>final<|message|>A<|return|>"]
    ]


def test_untrained_answers_keep_end_as_their_target() -> None:
    (sample,) = samples(USER, Message("assistant", "A", "final", train=False), USER, ANSWER)
    assert sample.targets is None


def test_a_message_without_weight_costs_no_sample() -> None:
    first = Message("assistant", "T", "analysis", train=False), Message("assistant", "A", "final", weight=0)
    assert trained_texts(USER, *first, USER, ANSWER) == [["<|channel|>final<|message|>A<|return|>"]]
    assert samples(USER, Message("assistant", "A", "final", weight=0)) == []


def test_weights_are_per_message_and_train_true_beats_the_recipe() -> None:
    on = TrainOn(channels=("final",))
    wanted = Message("assistant", "T", "analysis", train=True, weight=0.25)
    (sample,) = samples(USER, wanted, ANSWER, on=on)
    thinking, answer = sample.spans[2], sample.spans[3]
    assert sample.weights[thinking.start : thinking.start + 2] == [0, 0]
    assert set(sample.weights[thinking.start + 2 : thinking.end]) == {0.25}
    assert set(sample.weights[answer.start : answer.end]) == {1}


def test_the_last_turn_is_what_follows_the_last_answered_question() -> None:
    on = TrainOn("last")
    expected = ["<|channel|>final<|message|>A<|return|>"]
    assert trained_texts(USER, THINK, ANSWER, USER, ANSWER, USER, on=on) == [expected]
    assert trained_texts(ANSWER, on=on) == [expected]
    assert len(trained_texts(USER, ANSWER, USER, CALL, RESULT, ANSWER, on=on)[0]) == 2


def test_channels_choose_messages() -> None:
    assert trained_texts(USER, THINK, ANSWER, on=TrainOn(channels=("analysis",))) == [
        ["<|channel|>analysis<|message|>T<|end|>"]
    ]
    assert samples(USER, ANSWER, on=TrainOn(channels=("commentary",))) == []


@pytest.mark.parametrize(
    ("turns", "channels", "field"), [("first", ("final",), "turns"), ("all", ("thoughts",), "channels")]
)
def test_unknown_choices_are_refused(turns: str, channels: tuple[str, ...], field: str) -> None:
    with pytest.raises(HarmonyError, match="allowed") as caught:
        TrainOn(turns, channels)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_training_nothing_at_all_is_refused() -> None:
    with pytest.raises(HarmonyError, match="one or more"):
        TrainOn(channels=())


def test_rendering_is_the_same_with_and_without_the_ids_remembered() -> None:
    conversation = Conversation((USER, CALL, RESULT, ANSWER), instructions="Be brief.", tools=(Tool("f", "F"),))
    used = Renderer(o200k())
    first = used.samples(conversation)
    assert used.samples(conversation) == first == Renderer(o200k()).samples(conversation)
    assert first[0].ids is not used.samples(conversation)[0].ids


@pytest.mark.parametrize(
    ("conversation", "field"),
    [
        (Conversation((USER, Message("assistant", "a\ud800", "final"))), "messages[1].content"),
        (Conversation((USER,), instructions="\udfff"), "developer"),
        (Conversation((USER,), System(identity="\udfff")), "system"),
    ],
)
def test_text_that_no_encoding_can_hold_names_its_field(conversation: Conversation, field: str) -> None:
    with pytest.raises(HarmonyError, match="lone surrogate") as caught:
        renderer().completion(conversation)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"role": "robot"}, "role"),
        ({"role": "tool"}, "name"),
        ({"role": "user", "train": True}, "train"),
        ({"role": "assistant", "weight": -1.0}, "weight"),
        ({"role": "assistant", "weight": float("nan")}, "weight"),
    ],
)
def test_impossible_messages_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(HarmonyError) as caught:
        Message(content="x", **settings)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_what_follows_a_sampled_turn_is_what_the_whole_conversation_would_hold() -> None:
    whole = renderer().completion(Conversation((USER, THINK, CALL, RESULT)))
    (sample,) = samples(USER, THINK, CALL)
    assert whole == sample.ids + renderer().continuation([RESULT])
