"""Bytes of one rank at its fullest moment, by part.

What lies divided: packed or expanded weights, what is trained (float32), its optimizer's state and its gradients.
What a rank has beside its part: two layers as they were gathered, one at work and one on its way, and a table
(embedding or head); where all weights are trained also its part of a layer as that is sent, and a layer's whole
gradients twice, as they were added up and as they are summed over ranks. A frozen embedding that is divided stays in
its file. gloo, which joins ranks on CPUs, gathers into memory of its own and sums a copy: measured, with torch 2.13 a
gather of 64 MiB took 64 MiB more, a reduce-scatter 66, an all-to-all nothing.
The rest is a step of one GPU (`model.budget.step`) over the tokens that this rank has.
Not modelled: tokens that choose some experts more often than others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ossia.model.budget.many.division import Division
from ossia.model.budget.step import Moment, step_moments
from ossia.model.budget.weights import WeightBytes, trained_by_place
from ossia.model.budget.work import Work

EXPERT_TARGETS = ("gate_up_proj", "down_proj")
GRADIENT_SIZE = 4  # gradients are summed in float32
SAVED = 12  # bytes of a number in a checkpoint: itself and both of AdamW's moments
_GLOO_SUMS_IN = 2 << 20


@dataclass(frozen=True, slots=True)
class Whole:
    """What there is before it is divided: weights in bytes as they travel, and numbers that are trained.

    layer_dense     of a layer, all but the experts' matrices; layer_experts those
    table           of the embedding, or of the head
    trained_...     numbers; trained_tables in embedding and head together
    """

    layers: int
    layer_dense: int
    layer_experts: int
    table: int
    trained_dense: int
    trained_experts: int
    trained_tables: int

    @classmethod
    def of(cls, work: Work) -> Whole:
        """Of a step's model. Frozen weights are as `work.placement` has them, trained ones in the activations' type."""
        expanded = work.ranks is None or work.placement == "bf16"
        w = WeightBytes.of(work.arch, work.layout, work.dtype)
        size = work.size if expanded else 2
        layers = work.arch.num_layers
        layer, head, embedding = trained_by_place(work)
        experts = trained_experts_of_layer(work)
        return cls(
            layers,
            (w.other - 2 * w.embedding) // layers * size // 2,
            w.layer_expanded if expanded else w.layer_experts,
            w.embedding * size // 2,
            layer - experts,
            experts,
            head + embedding,
        )

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return self.layers * (self.trained_dense + self.trained_experts) + self.trained_tables


def trained_experts_of_layer(work: Work) -> int:
    """Numbers that are trained in a layer's experts' matrices, or beside them."""
    if work.ranks is None:
        return 3 * work.arch.num_experts * work.arch.hidden_size * work.arch.intermediate_size
    ranks = {target: rank for target, rank in work.ranks.items() if target in EXPERT_TARGETS}
    return trained_by_place(replace(work, ranks=ranks))[0]


@dataclass(frozen=True, slots=True)
class RankBytes:
    """Of one rank, in bytes, at `moment`.

    device  on its GPU; living is what of it a step makes and lets go
    host    in the machine's memory, for this rank
    """

    moment: Moment
    device: Mapping[str, int]
    host: Mapping[str, int]
    living: int

    @property
    def device_peak(self) -> int:
        return sum(self.device.values())

    @property
    def host_peak(self) -> int:
        return sum(self.host.values())


def rank_bytes(work: Work, division: Division, *, saves_beside: bool = False) -> RankBytes:
    """The fullest moment of a rank.

    work          the step of this rank: its own packs, of a context parallel one its part of the tokens
    saves_beside  while it goes on, a copy of its part of what is trained is being saved, in the machine's memory
    """
    whole = Whole.of(work)
    state = trained_state(whole, division)
    fixed, host, frozen = dict[str, int](), dict[str, int](), work.ranks is not None
    (host if division.offload and frozen and division.shards > 1 else fixed).update(_weights(work, whole, division))
    (host if division.offload and not frozen else fixed).update(state)
    fixed |= _buffers(work, whole, division)
    if saves_beside and work.ranks is None and division.trained_shards > 1:
        copied = SAVED * state["trained, float32"] // 4
        (host if work.device == "cuda" else fixed)["copy that is saved"] = copied
    if work.offload:
        host["layers' inputs"] = work.packs * work.arch.num_layers * _pinned_input(work)
    found = []
    for moment in step_moments(work):
        parts = {name: size for name, size in moment.parts.items() if name != "gradients"}
        if work.ranks is None:
            parts.pop("adapter copies", None)  # they are the layers that were gathered
        if "scratch" in parts:
            parts["scratch"] //= division.experts
        found.append(RankBytes(moment.moment, {**fixed, **parts}, host, sum(parts.values())))
    fullest = max(found, key=lambda one: one.device_peak)
    return replace(fullest, device={name: size for name, size in fullest.device.items() if size})


def _pinned_input(work: Work) -> int:
    """A pack's input of a layer in pinned memory, which comes in powers of two."""
    return 1 << (work.pack * work.arch.hidden_size * work.residual_size - 1).bit_length()


def trained_state(whole: Whole, division: Division) -> dict[str, int]:
    """Masters, optimizer's state and gradients of a rank; gradients all at once, as after the last layer's backward."""
    rest = whole.layers * whole.trained_dense + whole.trained_tables
    held = max(division.trained_shards, division.experts)
    numbers = rest // division.trained_shards + whole.layers * whole.trained_experts // held
    return {"trained, float32": 4 * numbers, "optimizer": 8 * numbers, "gradients": GRADIENT_SIZE * numbers}


def _weights(work: Work, whole: Whole, division: Division) -> dict[str, int]:
    """Frozen ones: trained ones are among what is trained."""
    if work.ranks is None:
        return {}
    dense = whole.layers * whole.layer_dense + (1 if division.shards > 1 else 2) * whole.table
    held = max(division.shards, division.experts)
    return {"weights": dense // division.shards + whole.layers * whole.layer_experts // held}


def _buffers(work: Work, whole: Whole, division: Division) -> dict[str, int]:
    layer = 0
    if division.shards > 1 or work.ranks is None:
        layer += whole.layer_dense
    if division.shards > division.experts or work.ranks is None:
        layer += whole.layer_experts // division.experts
    found = {"gathered layers": 2 * layer, "gathered table": whole.table if layer else 0}
    if work.ranks is None:
        found["part that is sent"] = layer // division.trained_shards
    if work.ranks is None and division.trained_shards > 1:
        mine = whole.trained_dense + whole.trained_experts // division.experts
        found["layers' gradients"] = 2 * GRADIENT_SIZE * max(mine, whole.trained_tables // 2)
    if work.device == "cpu":
        found |= _gloo(work, whole, division)
    if division.context > 1:
        a = work.arch
        rows = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim * work.pack
        found["heads on their way"] = 2 * rows * work.size  # as they are sent, and as they come
    return found


def _gloo(work: Work, whole: Whole, division: Division) -> dict[str, int]:
    """What gloo has beside what it was given: all of what is gathered, and a copy of what is summed."""
    gathered = whole.layer_dense + (whole.layer_experts if division.experts == 1 else 0)
    found = {"gloo, gathering": max(gathered, whole.table) if division.shards > 1 else 0}
    if work.ranks is None and division.trained_shards > 1:
        summed = whole.trained_dense + (whole.trained_experts if division.experts == 1 else 0)
        found["gloo, summing"] = GRADIENT_SIZE * max(summed, whole.trained_tables // 2) + _GLOO_SUMS_IN
    return found
