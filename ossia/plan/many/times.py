"""How long a step of one rank takes: the layer-major schedule, with products at a GPU's rate and links at theirs."""

from __future__ import annotations

from dataclasses import dataclass

from ossia.model.budget.many.division import Division, Spread
from ossia.model.budget.many.links import Link
from ossia.model.budget.many.overlap import Stage, Timeline, simulate, step_stages
from ossia.model.budget.many.ranks import GRADIENT_SIZE, Whole
from ossia.model.budget.many.traffic import LayerTraffic, Traffic, traffic
from ossia.model.budget.work import Work
from ossia.plan.speed import flops_per_token, layer_flops


@dataclass(frozen=True, slots=True)
class Rates:
    """What a step is divided by.

    flops         products a second of one GPU
    inner, outer  between GPUs of a machine, and between machines
    host_bytes_s  between a GPU and its machine's memory
    """

    flops: float
    inner: Link
    outer: Link
    host_bytes_s: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Of a step, in seconds.

    products  of one rank; exchanged is what stands in their way: tokens to experts, keys and values
    exposed   the rest of the step, in which a GPU waits
    """

    timeline: Timeline
    products: float
    exchanged: float

    @property
    def total(self) -> float:
        return self.timeline.total

    @property
    def exposed(self) -> float:
        return self.total - self.products - self.exchanged

    @property
    def waiting(self) -> float:
        """The share of the step in which a GPU computes nothing."""
        return 1 - self.products / self.total


def step_time(work: Work, division: Division, rates: Rates) -> StepTime:
    """The estimate. The optimizer's own pass isn't in it: on a GPU it is short, in a machine's memory it may not be."""
    moved = traffic(work, division)
    products, stages = _stages(work, division, rates, moved)
    timeline = simulate(stages)
    return StepTime(timeline, products, timeline.computing - products)


def layer_products(work: Work, rates: Rates) -> list[tuple[float, float]]:
    """Seconds of each layer's products, forward and backward; the last layer isn't computed again."""
    tokens, back = work.pack * work.packs, 1.0 if work.ranks is not None else 2.0
    found = []
    for index, kind in enumerate(work.arch.layer_types):
        matrices, attention = layer_flops(work.arch, kind, work.longest)
        again = matrices + attention if work.recompute and index < work.arch.num_layers - 1 else 0.0
        backward = back * matrices + 2.5 * attention + again
        found.append((tokens * (matrices + attention) / rates.flops, tokens * backward / rates.flops))
    return found


def _stages(work: Work, division: Division, rates: Rates, moved: Traffic) -> tuple[float, list[Stage]]:
    """Seconds of products alone, and the step for the simulation, whose layers have their exchanges in them."""

    def seconds(spread: Spread) -> float:
        return division.seconds(spread, rates.inner, rates.outer)

    products = layer_products(work, rates)
    last = work.arch.num_layers - 1
    forward, backward = [], []
    for index, (there, back) in enumerate(products):
        layer: LayerTraffic = moved.full if work.arch.layer_types[index] == "full_attention" else moved.sliding
        again = seconds(layer.forward) if work.recompute and index != last else 0.0
        forward.append(there + seconds(layer.forward))
        backward.append(back + seconds(layer.backward) + again)
    fetch, give = _host_seconds(work, division, rates)
    join = sum if rates.inner.is_pcie else max  # one way for both, or two at once
    gather, reduce = join((seconds(moved.full.gather), fetch)), join((seconds(moved.full.reduce), give))
    head_flops = work.packs * work.rows * flops_per_token(work.arch, work.longest)[2]
    head = head_flops * (2.0 if work.ranks is not None else 3.0) / rates.flops
    tables = seconds(moved.reduce_tables) / 2
    frozen = work.ranks is not None
    # of frozen layers two are still there where the step before turned round, and where this one does
    forth = [0.0 if frozen and index < 2 else gather for index in range(last + 1)]
    stages = step_stages(
        forth,
        forward,
        backward,
        [reduce] * (last + 1),
        gather_again=[0.0 if frozen and index == last - 1 else gather for index in range(last + 1)],
        table=seconds(moved.gather_table),
        embedding=0.0 if frozen else None,
        head=head,
        reduce_head=tables,
        reduce_embedding=tables,
    )
    return sum(there + back for there, back in products) + head, stages


def _host_seconds(work: Work, division: Division, rates: Rates) -> tuple[float, float]:
    """Of a layer's part between a GPU and the machine's memory, where it waits there: in, and out."""
    if not division.offload:
        return 0.0, 0.0
    whole = Whole.of(work)
    if work.ranks is not None:
        return (whole.layer_dense + whole.layer_experts) / division.shards / rates.host_bytes_s, 0.0
    held = max(division.trained_shards, division.experts)
    numbers = whole.trained_dense / division.trained_shards + whole.trained_experts / held
    return numbers * work.size / rates.host_bytes_s, numbers * GRADIENT_SIZE / rates.host_bytes_s
