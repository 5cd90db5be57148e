"""How long a step should take, from its products and what has to cross to the device: an estimate, and from what.

Counted are products alone, two operations a number: of projections, router and chosen experts, of attention over the
keys that a query sees, and of the head. A frozen weight's backward is one product, not two.
"""

from __future__ import annotations

from dataclasses import dataclass

from ossia.model.arch import Arch, LayerType
from ossia.model.budget.weights import WeightBytes
from ossia.model.budget.work import Work
from ossia.plan.machine import Machine


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a step, in seconds; tokens_per_s is None where the machine's rate isn't known.

    compute   products
    expand    experts expanded, on a CPU
    transfer  copies to the device of a step, of which what `compute` is longer than is hidden
    """

    tokens_per_s: float | None
    compute: float
    expand: float
    transfer: float

    @property
    def hidden(self) -> bool:
        """Whether the device computes for longer than copies take."""
        return self.transfer <= self.compute


def flops_per_token(arch: Arch, length: int) -> tuple[float, float, float]:
    """Of a token of a document of `length` tokens, forward: matrices of the layers, attention, head."""
    layers = [layer_flops(arch, kind, length) for kind in arch.layer_types]
    matrices, attention = (sum(layer[i] for layer in layers) for i in range(2))
    return matrices, attention, 2 * arch.vocab_size * arch.hidden_size


def layer_flops(arch: Arch, kind: LayerType, length: int) -> tuple[float, float]:
    """Of a token in a layer of a kind, as in `flops_per_token`: matrices, attention."""
    queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    attention = arch.hidden_size * (2 * queries + 2 * keys + arch.num_experts)
    experts = arch.experts_per_token * 3 * arch.hidden_size * arch.intermediate_size
    mean = (length + 1) / 2
    pairs = mean if kind == "full_attention" else min(arch.sliding_window, mean)
    return 2 * (attention + experts), 4 * queries * pairs


def step_flops(work: Work) -> float:
    """Of a step: forward, backward, and forward again where layers are computed again."""
    matrices, attention, head = flops_per_token(work.arch, min(work.longest, work.pack))
    times = 2.0 if work.ranks is not None else 3.0
    again = 1.0 if work.recompute else 0.0
    each = matrices * (times + again) + attention * (3.5 + again)
    # a frozen head's gradient comes with the walk over its logits: twice the products of a forward
    return work.packs * (work.pack * each + work.rows * head * times)


def speed(work: Work, machine: Machine) -> Speed:
    """The estimate for a machine."""
    w = WeightBytes.of(work.arch, work.layout, work.dtype)
    layers = work.arch.num_layers
    sweeps = (2 * layers - 1) / layers if work.expands else 0.0  # the last layer's stay for its backward
    compute = step_flops(work) / machine.flops if machine.flops else 0.0
    expand = sweeps * w.expanded / machine.expand_bytes_s if machine.expand_bytes_s else 0.0
    transfer = 0.0
    if work.device == "cuda" and work.placement in ("stream", "mmap") and machine.host_bytes_s:
        crossing = w.experts if work.placement == "stream" else w.packed - w.embedding
        transfer = sweeps * crossing / machine.host_bytes_s
    taken = max(compute + expand, transfer)
    tokens = work.pack * work.packs
    return Speed(tokens / taken if machine.flops else None, compute, expand, transfer)
