"""Packs: aligned to predictions, full, each sample once an epoch, the same after a stop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ossia.config import Recipe
from ossia.data.dataset import Dataset, Datasets, Lengths, in_order, measure, open_datasets
from ossia.data.pack import Pack, PackedStream, Window, pack_samples
from ossia.data.sample import Sample
from ossia.errors import DataError, RecipeError, RunError
from ossia.harmony.vocab import Vocabulary

Open = Callable[..., tuple[Dataset, ...]]


@pytest.fixture
def open_lengths(write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary) -> Open:
    """Opens a source of token rows of given lengths; a row's first id is its number modulo 256."""

    def open_(lengths: list[int], weight: float = 1.0, name: str = "rows.jsonl", **keys: Any) -> tuple[Dataset, ...]:
        rows = [
            {"ids": [n % 256, *[7] * (size - 1)], "weights": [0, *[1] * (size - 1)]} for n, size in enumerate(lengths)
        ]
        keys = {"max_length": 4096, **keys}
        return open_datasets(make_recipe({"path": write_rows(rows, name), "weight": weight}, **keys), vocab).train

    return open_


def lognormal_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(6.0, 1.0, count)
    return np.clip(drawn.astype(int), 2, longest).tolist()


def steps_of(stream: PackedStream) -> list[list[Pack]]:
    steps = []
    while step := stream.next_step():
        steps.append(step)
    return steps


def contents(packs: list[Pack]) -> list[tuple[object, ...]]:
    return [(p.sources, *(t.tolist() for t in (p.ids, p.targets, p.weights, p.starts))) for p in packs]


def sources(steps: list[list[Pack]]) -> list[str]:
    return [source for step in steps for pack in step for source in pack.sources]


def sample(ids: list[int], weights: list[float], targets: list[int] | None = None, source: str = "a:1") -> Sample:
    aligned = None if targets is None else np.array(targets, np.int32)
    return Sample(np.array(ids, np.int32), np.array(weights, np.float32), aligned, source)


def test_a_position_predicts_the_next_token_of_its_own_document_and_the_last_one_nothing() -> None:
    one = sample([10, 11, 12], [0, 0.5, 1])
    two = sample([20, 21, 22, 23], [0, 1, 1, 1], [20, 99, 22, 98], "a:2")
    (pack,) = pack_samples([one, two], 8)
    assert pack.ids.tolist() == [10, 11, 12, 20, 21, 22, 23]
    assert pack.weights.tolist() == [0.5, 1, 0, 1, 1, 1, 0]
    assert pack.targets.tolist() == [11, 12, 12, 99, 22, 98, 23]
    assert pack.starts.tolist() == [0, 3, 7]
    assert pack.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert (pack.num_tokens, pack.num_trained, pack.sources) == (7, 5, ("a:1", "a:2"))
    assert [t.dtype for t in (pack.ids, pack.targets, pack.weights, pack.starts)] == [
        torch.int64,
        torch.int64,
        torch.float32,
        torch.int64,
    ]


def test_samples_for_evaluation_are_packed_once_each_in_order() -> None:
    samples = [sample([1] * size, [0, *[1] * (size - 1)], None, f"a:{size}") for size in (5, 4, 3, 9, 1)]
    packs = pack_samples(samples, 9)
    assert [pack.sources for pack in packs] == [("a:5", "a:4"), ("a:3",), ("a:9",), ("a:1",)]
    with pytest.raises(RecipeError, match=r"a:9: a sample of 9 tokens doesn't fit into a pack of 8"):
        pack_samples(samples, 8)


def test_a_lognormal_mix_fills_packs_of_4096_to_more_than_99_percent(open_lengths: Open) -> None:
    lengths = lognormal_lengths(2000, 4096)
    stream = PackedStream(open_lengths(lengths), tokens_per_step=4096, tokens_per_pack=4096, seed=0, epochs=1)
    sizes = [pack.num_tokens for step in steps_of(stream) for pack in step]
    assert sum(sizes) == sum(lengths)
    assert max(sizes) <= 4096
    assert sum(sizes) / (4096 * len(sizes)) > 0.99


def test_the_window_is_all_that_is_held(open_lengths: Open) -> None:
    stream = PackedStream(open_lengths([8] * 3000), tokens_per_step=64, tokens_per_pack=64, seed=0, epochs=1)
    held = []
    while stream.next_step():
        held.append(len(stream.state()["window"]))
    assert max(held) <= 512
    long = PackedStream(open_lengths([64] * 300), tokens_per_step=64, tokens_per_pack=64, seed=0, epochs=1)
    long.next_step()
    assert len(long.state()["window"]) <= 64


def test_a_pack_begins_with_the_oldest_sample_and_goes_on_with_the_longest_that_fits() -> None:
    window = Window()
    for name, length in zip("abcdef", (3, 9, 5, 5, 2, 4), strict=True):
        window.add(length, name)
    assert window.take_pack(10) == ["a", "c", "e"]  # 3, then 5 of the two 5s the older, then 2
    assert window.take_pack(10) == ["b"]
    assert window.take_pack(10) == ["d", "f"]
    assert window.take_pack(10) == []
    assert window.num_tokens == 0


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_sample_comes_exactly_once_an_epoch(open_lengths: Open, epochs: int) -> None:
    datasets = open_lengths(lognormal_lengths(700, 900))
    stream = PackedStream(datasets, tokens_per_step=4096, tokens_per_pack=1024, seed=3, epochs=epochs)
    seen = sources(steps_of(stream))
    assert Counter(seen) == {found.source: epochs for found in in_order(datasets)}
    parts = [seen[start : start + 700] for start in range(0, len(seen), 700)]
    assert all(len(set(part)) == 700 for part in parts)  # a pack never mixes epochs, so they come one after the other
    assert stream.finished
    assert stream.epoch == epochs


def test_the_epoch_counts_rows_that_are_done(open_lengths: Open) -> None:
    stream = PackedStream(open_lengths([16] * 64), tokens_per_step=256, tokens_per_pack=128, seed=0)
    progress = [stream.epoch]
    for _ in range(6):
        stream.next_step()
        progress.append(stream.epoch)
    assert progress == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]


def test_a_finished_stream_gives_empty_steps(open_lengths: Open) -> None:
    stream = PackedStream(open_lengths([16] * 4), tokens_per_step=256, tokens_per_pack=128, seed=0, epochs=1)
    assert len(steps_of(stream)) == 1
    assert stream.next_step() == []


def test_half_an_epoch_reads_half_of_the_rows(open_lengths: Open) -> None:
    stream = PackedStream(open_lengths([10] * 100), tokens_per_step=64, tokens_per_pack=64, seed=0, epochs=1.5)
    assert len(sources(steps_of(stream))) == 150


def test_the_order_is_the_seeds_and_differs_from_epoch_to_epoch(open_lengths: Open) -> None:
    datasets = open_lengths(lognormal_lengths(200, 400))

    def order(seed: int) -> list[str]:
        stream = PackedStream(datasets, tokens_per_step=1024, tokens_per_pack=512, seed=seed, epochs=2)
        return sources(steps_of(stream))

    first = order(0)
    assert first == order(0)
    assert first != order(1)
    assert first[:200] != first[200:]
    in_file = [int(source.rpartition(":")[2]) for source in first[:200]]
    assert in_file != sorted(in_file)


def test_a_stream_resumes_at_the_same_sample_from_every_step(
    write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary
) -> None:
    def turns(number: int) -> list[dict[str, str]]:
        question = {"role": "user", "content": f"{number}" * (number % 40)}
        return [question, {"role": "assistant", "thinking": "hm", "content": f"{number}"}] * 2  # makes two samples

    rows = [{"messages": turns(number)} for number in range(60)]
    path = write_rows([*rows, {"messages": "bad"}])
    recipe = make_recipe(path, max_length=512, on_bad_row="skip")

    def stream() -> PackedStream:
        datasets = open_datasets(recipe, vocab).train
        return PackedStream(datasets, tokens_per_step=2048, tokens_per_pack=1024, seed=5, epochs=2.5)

    whole, states = stream(), []
    expected = []
    while not whole.finished:
        states.append(json.dumps(whole.state()))
        expected.append(contents(whole.next_step()))
    assert len(expected) > 20
    for number, state in enumerate(states):
        resumed = stream()
        resumed.load_state(json.loads(state))
        assert json.dumps(resumed.state()) == state
        rest = expected[number : number + 2] if number % 7 else expected[number:]
        assert [contents(resumed.next_step()) for _ in rest] == rest
        if number % 7 == 0:
            assert resumed.finished
            assert resumed.statistics == whole.statistics


def test_a_state_of_other_data_or_sizes_is_refused(open_lengths: Open) -> None:
    def stream(datasets: tuple[Dataset, ...], tokens_per_pack: int = 128, seed: int = 0) -> PackedStream:
        return PackedStream(datasets, tokens_per_step=256, tokens_per_pack=tokens_per_pack, seed=seed)

    datasets = open_lengths([10] * 30)
    state = stream(datasets).state()
    stream(open_lengths([10] * 30, name="same.jsonl")).load_state(state)
    with pytest.raises(RunError, match="can't be resumed: its seed was 0, now it is 1"):
        stream(datasets, seed=1).load_state(state)
    with pytest.raises(RunError, match="its tokens_per_pack was 128, now it is 256"):
        stream(datasets, tokens_per_pack=256).load_state(state)
    with pytest.raises(RunError, match=r"its data was .*30 rows.*now it is .*31 rows"):
        stream(open_lengths([10] * 31, name="more.jsonl")).load_state(state)
    with pytest.raises(RunError, match="its data was"):
        stream(open_lengths([10] * 29 + [11], name="other.jsonl")).load_state(state)
    with pytest.raises(RunError, match="its data was"):
        stream(open_lengths([10] * 30, weight=2, name="twice.jsonl")).load_state(state)


def lengths_of(datasets: tuple[Dataset, ...]) -> Lengths:
    return measure(Datasets(datasets, (), datasets, []), None)[2]


@pytest.mark.parametrize("epochs", [0.3, 1, 2])
def test_the_number_of_steps_is_known_before_the_first_and_still_in_the_middle(
    open_lengths: Open, epochs: float
) -> None:
    datasets = (*open_lengths(lognormal_lengths(300, 400)), *open_lengths([90, 20] * 30, weight=1.5, name="b.jsonl"))
    lengths = lengths_of(datasets)
    sizes = {"tokens_per_step": 2048, "tokens_per_pack": 512}
    stream = PackedStream(datasets, **sizes, seed=3, epochs=epochs)
    before = stream.count_steps(lengths)
    stream.next_step()
    assert stream.count_steps(lengths) == before
    assert before == 1 + len(steps_of(stream))


def test_rows_of_two_samples_and_of_none_are_counted_as_they_are_packed(
    write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary
) -> None:
    def turn(number: int, **more: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!" * number, **more}]

    rows = [{"messages": turn(n, thinking="hm") + turn(2 * n, thinking="so")} for n in range(1, 40)]
    rows += [{"messages": turn(n, train=False)} for n in range(1, 10)]
    datasets = open_datasets(make_recipe(write_rows(rows), max_length=512), vocab).train
    stream = PackedStream(datasets, tokens_per_step=1024, tokens_per_pack=512, seed=0, epochs=2)
    lengths = lengths_of(datasets)
    assert [(row > 0).sum() for row in lengths[datasets[0]]] == [2] * 39 + [0] * 9
    assert stream.count_steps(lengths) == len(steps_of(stream)) > 10


def test_a_stream_without_an_end_goes_on_and_has_no_number_of_steps(open_lengths: Open) -> None:
    stream = PackedStream(open_lengths([10] * 8), tokens_per_step=64, tokens_per_pack=64, seed=0)
    seen = Counter(source for _ in range(20) for pack in stream.next_step() for source in pack.sources)
    assert set(seen.values()) == {10}
    assert not stream.finished
    with pytest.raises(RunError, match="without an end"):
        stream.count_steps({})


def test_a_stream_in_which_nothing_is_left_to_train_on_ends_in_an_error(open_lengths: Open) -> None:
    datasets = open_lengths([5] * 3)
    too_long = tuple(
        Dataset(d.rows, d.layout, d.encoder, d.limits.__class__(4, on_long="drop"), d.weight) for d in datasets
    )
    stream = PackedStream(too_long, tokens_per_step=64, tokens_per_pack=64, seed=0)
    with pytest.raises(
        DataError, match=r"a whole epoch of 3 rows gave no sample.*\n  samples dropped, longer than max_length: 3"
    ):
        stream.next_step()


def test_sizes_that_do_not_fit_each_other_are_refused(open_lengths: Open) -> None:
    datasets = open_lengths([10] * 8)
    with pytest.raises(RecipeError, match=r"tokens_per_step: 63 is less than one pack of 64"):
        PackedStream(datasets, tokens_per_step=63, tokens_per_pack=64, seed=0)
    with pytest.raises(RecipeError, match=r"rows.jsonl:\d: a sample of 10 tokens doesn't fit into a pack of 9"):
        PackedStream(datasets, tokens_per_step=9, tokens_per_pack=9, seed=0).next_step()


def test_a_step_is_never_over_its_tokens(open_lengths: Open) -> None:
    stream = PackedStream(open_lengths([10] * 500), tokens_per_step=200, tokens_per_pack=64, seed=0, epochs=1)
    steps = steps_of(stream)
    assert {len(step) for step in steps[:-1]} == {3}
    assert all(sum(pack.num_tokens for pack in step) <= 200 for step in steps)
