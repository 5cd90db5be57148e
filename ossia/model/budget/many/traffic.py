"""Bytes that a rank receives in a step, by what they are for, and when.

`behind` a layer's products go gathers and sums; in their way go tokens to experts that stay put, and keys and values of
the other parts of a sequence, since the layer goes on with what arrives. (Some of that could be hidden too: not here.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ossia.model.budget.many.division import NOTHING, Division, Spread
from ossia.model.budget.many.ranks import GRADIENT_SIZE, Whole
from ossia.model.budget.work import Work


@dataclass(frozen=True, slots=True)
class LayerTraffic:
    """Of a layer in a step.

    gather    of its weights, in one direction
    reduce    sum of its gradients, behind its backward
    forward   of tokens, keys and values, in one forward; backward in one backward
    """

    gather: Spread
    reduce: Spread
    forward: Spread
    backward: Spread


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of a step of one rank.

    sliding, full  of a layer of each kind
    gather_table   of the head, and once more of the embedding where it is trained
    reduce_tables  sum of the gradients of both, or of the head's adapter
    """

    sliding: LayerTraffic
    full: LayerTraffic
    gather_table: Spread
    reduce_tables: Spread
    parts: Mapping[str, Spread]

    @property
    def total(self) -> Spread:
        found = NOTHING
        for part in self.parts.values():
            found = found.plus(part)
        return found


def gathers_of_a_step(layers: int, *, frozen: bool) -> int:
    """Of a layer's weights, all layers together: forward and backward, but the last layer stays for its backward.

    frozen  they don't change from step to step: where one turns round, two layers are still in their slots, at the top
            and at the bottom
    """
    return max(2 * layers - 4, 0) if frozen else 2 * layers - 1


def tables_of_a_step(*, frozen: bool) -> int:
    """How often a table is gathered: embedding and head, or the head alone. A frozen embedding's rows are looked up in
    the checkpoint's file."""
    return 1 if frozen else 2


def traffic(work: Work, division: Division) -> Traffic:
    """What a rank receives; `work` as of `ranks.rank_bytes`."""
    whole, d = Whole.of(work), division
    gather = d.gathered(whole.layer_dense, d.shards).plus(
        d.gathered(whole.layer_experts / d.experts, max(d.shards // d.experts, 1), d.experts)
    )
    if work.ranks is not None:  # adapters travel where they are divided, in the activations' type
        numbers = (whole.trained_dense, whole.trained_experts / d.experts)
        for one, stride in zip(numbers, (1, d.experts), strict=True):
            gather = gather.plus(d.gathered(one * work.size, max(d.trained_shards // stride, 1), stride))
    reduce = _summed(whole.trained_dense, whole.trained_experts, division)
    table = d.gathered(whole.table, d.shards)
    tables = _summed(whole.trained_tables, 0, division)
    tokens = _tokens(work, division)
    exchanges = [_sequence(work, division, full=full) for full in (False, True)]
    layers = [
        LayerTraffic(gather, reduce, tokens.times(2).plus(there), tokens.times(2).plus(back))
        for there, back in exchanges
    ]
    number, again = work.arch.num_layers, work.arch.num_layers - 1 if work.recompute else 0
    adapts = "gradients, summed" if work.ranks is None else "adapters' gradients, summed"
    parts = {
        "weights and divided adapters, gathered"
        if work.ranks is not None and d.trained_shards > 1
        else "weights, gathered": gather.times(gathers_of_a_step(number, frozen=work.ranks is not None)).plus(
            table.times(tables_of_a_step(frozen=work.ranks is not None))
        ),
        adapts: reduce.times(number).plus(tables),
        "tokens to experts and back": tokens.times(2 * (2 * number + again)),
        "keys and values": _all_sequences(work, exchanges),
    }
    return Traffic(*layers, table, tables, {name: spread for name, spread in parts.items() if spread.total})


def _summed(dense: float, experts: float, d: Division) -> Spread:
    """Of gradients: where what is trained is divided a reduce-scatter, then a sum over the replicas of each part."""
    found = NOTHING
    for numbers, stride in ((dense, 1), (experts / d.experts, d.experts)):
        size, ranks = GRADIENT_SIZE * numbers, d.gpus // stride
        shards = max(d.trained_shards // stride, 1)
        found = found.plus(d.gathered(size, shards, stride))
        found = found.plus(d.summed(size / shards, ranks // shards, shards * stride))
    return found


def _tokens(work: Work, d: Division) -> Spread:
    """One way: a row to each chosen expert. The rows of a rank are spread evenly over the experts."""
    rows = work.pack * work.packs * work.arch.experts_per_token
    return d.exchanged(rows * work.arch.hidden_size * work.size, d.experts)


def _sequence(work: Work, d: Division, *, full: bool) -> tuple[Spread, Spread]:
    """Keys and values that a rank needs for a forward, and their gradients that come back from the others.

    A sliding layer needs what its window reaches back into the part before.
    """
    if d.context == 1:
        return NOTHING, NOTHING
    a, tokens = work.arch, work.pack * work.packs
    slot = 2 * a.num_kv_heads * a.head_dim
    if full:
        all_of_it = slot * tokens * d.context
        return d.gathered(all_of_it * work.size, d.context), d.gathered(all_of_it * GRADIENT_SIZE, d.context)
    reach = slot * min(a.sliding_window - 1, tokens)
    return Spread(reach * work.size, 0.0), Spread(reach * GRADIENT_SIZE, 0.0)


def _all_sequences(work: Work, exchanges: list[tuple[Spread, Spread]]) -> Spread:
    found = NOTHING
    for index, kind in enumerate(work.arch.layer_types):
        there, back = exchanges[kind == "full_attention"]
        again = work.recompute and index < work.arch.num_layers - 1
        found = found.plus(there.times(2 if again else 1)).plus(back)
    return found
