"""Bytes of the weights and of what is trained, by where they are."""

from __future__ import annotations

from dataclasses import dataclass

from ossia.model.arch import Arch, Layout, TensorSpec
from ossia.model.budget.work import DTYPE_BYTES, Work

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Of a checkpoint's tensors.

    experts   the experts' matrices as the checkpoint has them; layer_experts of one layer
    expanded  the same in the activations' type; layer_expanded of one layer
    other     everything else, embedding and head included; table of either of these
    """

    experts: int
    layer_experts: int
    expanded: int
    layer_expanded: int
    other: int
    table: TensorSpec
    layer_tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, arch: Arch, layout: Layout, dtype: str) -> WeightBytes:
        """Of a shape, in a layout, for activations of `dtype`."""
        specs = arch.tensor_specs(layout)
        mine = [spec for name, spec in specs.items() if name.startswith("model.layers.0.") and is_expert_weight(name)]
        layer = sum(spec.num_bytes for spec in mine)
        expanded = expanded_expert_bytes(arch, dtype)
        total = sum(spec.num_bytes for spec in specs.values())
        layers = arch.num_layers
        return cls(
            layer * layers,
            layer,
            expanded,
            expanded // layers,
            total - layer * layers,
            specs[EMBEDDING],
            tuple(mine),
        )

    @property
    def embedding(self) -> int:
        """Of the embedding, or of the head."""
        return self.table.num_bytes

    @property
    def packed(self) -> int:
        """All tensors as the checkpoint has them."""
        return self.experts + self.other


def is_of_experts(name: str) -> bool:
    """Whether a tensor's first axis is of experts: weights, scales, biases."""
    return ".mlp.experts." in name


def is_expert_weight(name: str) -> bool:
    """Whether a tensor is a part of the experts' matrices."""
    return ".mlp.experts." in name and not name.endswith("_bias")


def expanded_expert_bytes(arch: Arch, dtype: str) -> int:
    """Bytes of all expert matrices in `dtype`."""
    per_expert = 3 * arch.hidden_size * arch.intermediate_size
    return arch.num_layers * arch.num_experts * per_expert * DTYPE_BYTES[dtype]


def pinned_bytes(tensors: tuple[TensorSpec, ...]) -> int:
    """What tensors take in memory that a GPU fetches from by itself: torch rounds each up to a power of two."""
    return sum(1 << (spec.num_bytes - 1).bit_length() for spec in tensors)


def trained_numbers(work: Work) -> int:
    """Numbers that are trained."""
    layer, head, embedding = trained_by_place(work)
    return layer * work.arch.num_layers + head + embedding


def trained_by_place(work: Work) -> tuple[int, int, int]:
    """Numbers that are trained: in each layer, in the head and its norm, in the embedding."""
    a = work.arch
    table = a.vocab_size * a.hidden_size
    if work.ranks is None:
        return (a.num_parameters() - 2 * table - a.hidden_size) // a.num_layers, table + a.hidden_size, table
    layer = sum(rank * (fan_in + fan_out) * count for rank, fan_in, fan_out, count in _factors(work))
    return layer, work.ranks.get("lm_head", 0) * (a.hidden_size + a.vocab_size), 0


def _factors(work: Work) -> list[tuple[int, int, int, int]]:
    """Rank, fan-in, fan-out and number of the adapted matrices of a layer."""
    assert work.ranks is not None
    a, ranks = work.arch, work.ranks
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    shapes = {
        "q_proj": (a.hidden_size, q, 1),
        "k_proj": (a.hidden_size, kv, 1),
        "v_proj": (a.hidden_size, kv, 1),
        "o_proj": (q, a.hidden_size, 1),
        "router": (a.hidden_size, a.num_experts, 1),
        "gate_up_proj": (a.hidden_size, 2 * a.intermediate_size, a.num_experts),
        "down_proj": (a.intermediate_size, a.hidden_size, a.num_experts),
    }
    return [(ranks[name], *shape) for name, shape in shapes.items() if name in ranks]
