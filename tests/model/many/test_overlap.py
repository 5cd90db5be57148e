"""The simulated schedule against times that can be worked out by hand, and against what has to hold for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossia.model.budget.many.overlap import SLOTS, Span, Stage, Timeline, simulate, step_stages


def alike(layers: int, gather: float, forward: float, backward: float, reduce: float = 0.0) -> Timeline:
    return simulate(step_stages([gather] * layers, [forward] * layers, [backward] * layers, [reduce] * layers))


def test_without_anything_that_travels_a_step_is_its_products() -> None:
    done = alike(6, 0.0, 1.0, 3.0)
    assert done.total == done.computing == 24.0
    assert done.exposed == 0.0


def test_without_products_a_step_is_what_travels() -> None:
    done = alike(6, 1.0, 0.0, 0.0, reduce=2.0)
    assert done.total == done.travelling == 11 * 1.0 + 6 * 2.0


def test_what_is_shorter_than_the_products_is_hidden_but_for_the_first_gather() -> None:
    done = alike(6, 1.0, 2.0, 5.0)
    assert done.total == 1.0 + 6 * (2.0 + 5.0)


def test_where_gathers_are_longer_a_direction_takes_as_long_as_they_do() -> None:
    layers, gather, forward, backward = 6, 3.0, 1.0, 2.0
    done = alike(layers, gather, forward, backward)
    # 6 gathers and the last layer's both directions, during which the first gather back comes; then 5 back, less that
    # one's head start, and the last product
    head_start = forward + backward
    assert done.total == layers * gather + head_start + (layers - 1) * gather - head_start + backward


def test_at_the_crossing_point_both_descriptions_meet() -> None:
    layers = 8
    crossing = alike(layers, 1.0, 1.0, 1.0)
    assert crossing.total == 1.0 + 2 * layers
    slower, faster = alike(layers, 1.5, 1.0, 1.0), alike(layers, 0.5, 1.0, 1.0)
    assert faster.total == 0.5 + 2 * layers
    assert slower.total > crossing.total + 0.5 * (layers - 1)


def test_sums_go_behind_and_the_last_one_sticks_out() -> None:
    done = alike(6, 0.0, 1.0, 3.0, reduce=2.0)
    assert done.total == 6 * 4.0 + 2.0
    assert [span.begin for span in done.reduces] == [6 + 3.0 * (i + 1) for i in range(6)]


def test_a_layer_whose_gradients_find_no_room_waits() -> None:
    slow = alike(6, 0.0, 1.0, 1.0, reduce=5.0)
    # two layers' gradients lie there, then each has to wait for a sum
    assert slow.total == 6.0 + 1.0 + 6 * 5.0
    assert slow.computes[-1].begin == pytest.approx(6.0 + 1.0 + 4 * 5.0)


def test_the_second_slot_is_what_lets_a_gather_run_beside_the_products() -> None:
    stages = [Stage(f"{i}", 1.0, 1.0) for i in range(5)]
    assert simulate(stages, slots={"layer": 1, "table": 1}).total == 10.0
    assert simulate(stages).total == 6.0


def test_a_table_comes_while_the_last_layers_compute_and_its_slot_is_its_own() -> None:
    stages = step_stages([1.0] * 4, [2.0] * 4, [4.0] * 4, [0.0] * 4, table=1.5, head=3.0)
    assert simulate(stages).total == 1.5 + 1.0 + 4 * 2.0 + 3.0 + 4 * 4.0


def test_a_last_layer_is_not_gathered_again() -> None:
    done = alike(5, 1.0, 1.0, 1.0)
    assert len(done.gathers) == 1 + 5 + 1 + 4  # with embedding and head, which take no time here


TIMES = st.lists(st.tuples(*(st.integers(0, 9),) * 4), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(TIMES, st.integers(0, 9), st.integers(0, 9))
def test_nothing_is_lost_or_done_twice_or_before_its_time(rows: list[tuple[int, ...]], table: int, head: int) -> None:
    gather, forward, backward, reduce = ([float(row[i]) for row in rows] for i in range(4))
    stages = step_stages(gather, forward, backward, reduce, table=float(table), head=float(head), reduce_head=1.0)
    done = simulate(stages)
    assert done.computing == sum(stage.compute for stage in stages)
    assert done.travelling == sum(stage.gather + stage.reduce for stage in stages)
    assert max(done.computing, done.travelling) <= done.total <= done.computing + done.travelling
    assert [span.stage for span in done.computes] == list(range(len(stages)))
    link = sorted((*done.gathers, *done.reduces), key=lambda span: (span.begin, span.end))
    for spans in (done.computes, link):
        assert all(a.end <= b.begin for a, b in pairwise(spans))
    came = {span.stage: span.end for span in done.gathers}
    begun = {span.stage: span for span in done.computes}
    assert all(begun[stage].begin >= end for stage, end in came.items())
    assert all(span.begin >= begun[span.stage].end for span in done.reduces)
    assert most_slots(done.gathers, begun, stages) <= SLOTS["layer"]


def most_slots(gathers: Sequence[Span], begun: dict[int, Span], stages: Sequence[Stage]) -> int:
    """The most layers' weights that were there at once, on their way included; the last layer's for both directions."""
    held = []
    for span in gathers:
        if stages[span.stage].kind == "layer":
            until = next(i for i in range(span.stage, len(stages)) if stages[i].kind == "layer" and not stages[i].keeps)
            held.append((span.begin, begun[until].end))
    return max((sum(b <= begin < end for b, end in held) for begin, _ in held), default=0)
