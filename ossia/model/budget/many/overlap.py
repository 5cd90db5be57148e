"""The layer-major schedule on a clock: what computes, what travels, and who waits for whom.

A step is a row of stages, each with weights to gather, products to compute and gradients to sum, any of which may take
no time. There is one device, which computes stage after stage, and one link, which does one thing at a time. A stage's
weights are gathered into a slot as soon as one of its kind is free and the link is, in the stages' order, and before
sums that wait as well; it is computed when they are there; its sum starts behind it. A slot is free again once its
stage is computed (`keeps`: once the next stage of its kind that gathers nothing is). The whole gradients of a stage are
kept until they are summed, and a stage whose gradients find no room waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["layer", "table"]
SLOTS: Mapping[Kind, int] = {"layer": 2, "table": 1}
GRADIENT_SLOTS = 2


@dataclass(frozen=True, slots=True)
class Stage:
    """One layer in one direction, or a table; times in seconds.

    kind   of the slot that its weights lie in
    gathers  whether its weights have to come; not where the stage before has left them (`keeps`)
    keeps  its weights stay in their slot, for the next stage of its kind that doesn't gather
    """

    name: str
    gather: float
    compute: float
    reduce: float = 0.0
    kind: Kind = "layer"
    gathers: bool = True
    keeps: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """From when to when something was busy with a stage, in seconds from the step's begin."""

    stage: int
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened, in order."""

    gathers: tuple[Span, ...]
    computes: tuple[Span, ...]
    reduces: tuple[Span, ...]

    @property
    def total(self) -> float:
        """Until the last of it is done."""
        return max((span.end for span in (*self.gathers, *self.computes, *self.reduces)), default=0.0)

    @property
    def computing(self) -> float:
        return sum(span.end - span.begin for span in self.computes)

    @property
    def travelling(self) -> float:
        return sum(span.end - span.begin for span in (*self.gathers, *self.reduces))

    @property
    def exposed(self) -> float:
        """Seconds in which nothing is computed."""
        return self.total - self.computing


@dataclass(slots=True)
class _Clock:
    now: float = 0.0
    gathering: Span | None = None
    computing: Span | None = None
    reducing: Span | None = None
    ready: set[int] = field(default_factory=set)
    waiting: list[int] = field(default_factory=list)  # stages whose gradients wait for the link
    free: dict[Kind, int] = field(default_factory=dict)
    free_gradients: int = 0
    next_gather: int = 0
    next_compute: int = 0


def simulate(
    stages: Sequence[Stage], *, slots: Mapping[Kind, int] = SLOTS, gradient_slots: int = GRADIENT_SLOTS
) -> Timeline:
    """The times of all stages. Pure: the same stages give the same times."""
    clock = _Clock(free=dict(slots), free_gradients=gradient_slots)
    gathers, computes, reduces = list[Span](), list[Span](), list[Span]()
    while clock.next_compute < len(stages) or clock.computing or clock.reducing or clock.waiting:
        _start(clock, stages)
        running = [span for span in (clock.gathering, clock.computing, clock.reducing) if span is not None]
        assert running, "stages wait for each other: a slot is kept and never let go"
        clock.now = min(span.end for span in running)
        if clock.computing is not None and clock.computing.end <= clock.now:
            computes.append(clock.computing)
            _computed(clock, stages, clock.computing.stage)
            clock.computing = None
        if clock.gathering is not None and clock.gathering.end <= clock.now:
            gathers.append(clock.gathering)
            clock.ready.add(clock.gathering.stage)
            clock.gathering = None
        if clock.reducing is not None and clock.reducing.end <= clock.now:
            reduces.append(clock.reducing)
            clock.free_gradients += 1
            clock.reducing = None
    return Timeline(tuple(gathers), tuple(computes), tuple(reduces))


def _start(clock: _Clock, stages: Sequence[Stage]) -> None:
    """Everything that can start now."""
    if clock.gathering is None and clock.reducing is None:
        while clock.next_gather < len(stages) and not stages[clock.next_gather].gathers:
            clock.next_gather += 1
        if clock.next_gather < len(stages) and clock.free[stages[clock.next_gather].kind]:
            index = clock.next_gather
            clock.free[stages[index].kind] -= 1
            clock.gathering = Span(index, clock.now, clock.now + stages[index].gather)
            clock.next_gather += 1
        elif clock.waiting:
            index = clock.waiting.pop(0)
            clock.reducing = Span(index, clock.now, clock.now + stages[index].reduce)
    index = clock.next_compute
    if clock.computing is None and index < len(stages):
        stage = stages[index]
        if (index in clock.ready or not stage.gathers) and (not stage.reduce or clock.free_gradients):
            clock.free_gradients -= bool(stage.reduce)
            clock.computing = Span(index, clock.now, clock.now + stage.compute)
            clock.next_compute += 1


def _computed(clock: _Clock, stages: Sequence[Stage], index: int) -> None:
    stage = stages[index]
    if not stage.keeps:
        clock.free[stage.kind] += 1
    if stage.reduce:
        clock.waiting.append(index)


def step_stages(
    gather: Sequence[float],
    forward: Sequence[float],
    backward: Sequence[float],
    reduce: Sequence[float],
    *,
    gather_again: Sequence[float] | None = None,
    table: float = 0.0,
    embedding: float | None = None,
    head: float = 0.0,
    reduce_head: float = 0.0,
    reduce_embedding: float = 0.0,
) -> list[Stage]:
    """A step: embedding, layers, head with its loss, layers back, embedding. The last layer stays for its backward.

    gather, forward, backward, reduce  of each layer, in seconds; backward with what is computed again
    gather_again                       of each layer for its backward; None: as before its forward
    table, head                        a table's gather, and the head's products with those of its gradient
    embedding                          the embedding's gather, where that isn't as of `table`
    """
    again = gather if gather_again is None else gather_again
    layers = range(len(gather))
    last = layers[-1]
    found = [Stage("embedding", table if embedding is None else embedding, 0.0, kind="table")]
    found += [Stage(f"layer {i} forward", gather[i], forward[i], keeps=i == last) for i in layers]
    found.append(Stage("head", table, head, reduce_head, kind="table"))
    for i in reversed(layers):
        away = 0.0 if i == last else again[i]
        found.append(Stage(f"layer {i} backward", away, backward[i], reduce[i], gathers=i != last))
    if reduce_embedding:
        found.append(Stage("embedding backward", 0.0, 0.0, reduce_embedding, kind="table"))
    return found
