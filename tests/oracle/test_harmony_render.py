"""Our renderer against openai-harmony 0.0.8, on generated conversations."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import HealthCheck, given, seed, settings

from ossia.harmony import Conversation, Message
from tests.harmony.support import (
    CONVERSATIONS,
    library_completion,
    library_messages,
    library_training,
    o200k,
    oracle,
    renderer,
    trained_runs,
)

PARTS = 4  # of the 2,000 conversations, so that no single test runs for long
FIXED = settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def reference_generations(messages: tuple[Message, ...]) -> list[tuple[int, int]]:
    """The rule of `ossia.harmony.render` said another way: cut before every message that isn't sampled in one go with
    the one before it, and keep the pieces of the assistant."""
    cuts = [0]
    for index in range(1, len(messages)):
        before, here = messages[index - 1], messages[index]
        ended = before.channel == "final" or before.recipient is not None
        if ended or before.role != "assistant" or here.role != "assistant":
            cuts.append(index)
    cuts.append(len(messages))
    return [(start, stop) for start, stop in pairwise(cuts) if messages[start].role == "assistant"]


def expected_generations(conversation: Conversation) -> list[tuple[list[int], list[int], list[int]]]:
    """(context, history, sampled) of each generation, from the library: sampled is what the model says after the
    context, history is context and sampled as later contexts show them."""
    special = o200k().special
    messages = library_messages(conversation)
    offset = len(messages) - len(conversation.messages)
    expected = []
    for start, stop in reference_generations(conversation.messages):
        context = library_completion(messages[: offset + start])
        said = [number for message in messages[offset + start : offset + stop] for number in oracle().render(message)]
        prompt = context[-2:]
        assert said[:2] == prompt
        sampled = said[2:]
        if conversation.messages[stop - 1].channel == "final":
            sampled[-1] = special["<|return|>"]
        expected.append((context, context + said[2:], sampled))
    return expected


def fewest_samples(expected: list[tuple[list[int], list[int], list[int]]]) -> int:
    """By Dilworth's theorem: the most generations of which none can follow another in one sample."""
    follows = [[context[: len(history)] == history for context, _, _ in expected] for _, history, _ in expected]
    for size in range(len(expected), 0, -1):
        for chosen in combinations(range(len(expected)), size):
            if not any(follows[first][second] for first in chosen for second in chosen):
                return size
    return 0


@pytest.mark.parametrize("part", range(PARTS))
def test_generated_conversations_render_like_the_library_and_train_what_it_would_have_sampled(part: int) -> None:
    seed(part)(FIXED(given(CONVERSATIONS)(check)))()


def check(conversation: Conversation) -> None:
    messages = library_messages(conversation)
    assert renderer().completion(conversation) == library_completion(messages)
    assert renderer().training_ids(conversation) == library_training(messages)

    samples = renderer().samples(conversation)
    expected = expected_generations(conversation)
    runs = [run for sample in samples for run in trained_runs(sample)]
    assert sorted(runs) == sorted((context, sampled) for context, _, sampled in expected)
    assert len(samples) == fewest_samples(expected)
    for sample in samples:
        assert len(sample.ids) == len(sample.weights) == sample.spans[-1].end
        if sample.targets is not None:
            changed = [pair for pair in zip(sample.ids, sample.targets, strict=True) if pair[0] != pair[1]]
            assert changed
            assert set(changed) == {(o200k().special["<|end|>"], o200k().special["<|return|>"])}
