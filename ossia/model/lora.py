"""Low-rank adapters on attention, experts, router and head: which tensors there are, and how they start.

Own code because experts, the bulk of the model, need adapters per expert that every path reads: training, decoding and
export. Shapes: A (r, in), B (out, r); of experts A (E, r, in), B (E, out, r), gate rows of B before its up rows.
Source: LoRA, arXiv:2106.09685; rank-stabilised scaling, arXiv:2312.03732.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ossia.config.schema import AdapterConfig
from ossia.errors import AdapterError
from ossia.model.arch import Arch
from ossia.model.packed import Factors
from ossia.model.trainable import Trainable

MODULE_OF = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "router": "mlp.router",
    "gate_up_proj": "mlp.experts.gate_up_proj",
    "down_proj": "mlp.experts.down_proj",
}
TARGETS = (*MODULE_OF, "lm_head")


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What gets an adapter: target -> (rank, alpha); scaling alpha / rank, or alpha / sqrt(rank) with rslora."""

    targets: Mapping[str, tuple[int, float]]
    dropout: float = 0.0
    rslora: bool = False

    @classmethod
    def of(cls, config: AdapterConfig) -> LoraSpec:
        """What a recipe's `adapter` section asks for."""
        targets = {name: (shape.rank, shape.alpha) for name, shape in config.by_target().items()}
        return cls(targets, config.dropout, config.rslora)

    def scale(self, target: str) -> float:
        """What the product of a target's factors is multiplied with."""
        rank, alpha = self.targets[target]
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


@dataclass(frozen=True, slots=True)
class Site:
    """One adapted matrix: its module's name in the checkpoint, its target, and the sizes of its factors."""

    module: str
    target: str
    num_experts: int | None
    fan_in: int
    fan_out: int


def sites(arch: Arch, spec: LoraSpec) -> list[Site]:
    """Every adapted matrix, in the order of the forward pass.

    Raises  AdapterError for a target that the model doesn't have
    """
    if unknown := [target for target in spec.targets if target not in TARGETS]:
        raise AdapterError(
            f"adapter.targets: {unknown} match nothing in a gpt-oss model; allowed: {', '.join(TARGETS)}"
        )
    q_size, kv_size = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes = {
        "q_proj": (None, arch.hidden_size, q_size),
        "k_proj": (None, arch.hidden_size, kv_size),
        "v_proj": (None, arch.hidden_size, kv_size),
        "o_proj": (None, q_size, arch.hidden_size),
        "router": (None, arch.hidden_size, arch.num_experts),
        "gate_up_proj": (arch.num_experts, arch.hidden_size, 2 * arch.intermediate_size),
        "down_proj": (arch.num_experts, arch.intermediate_size, arch.hidden_size),
    }
    found = [
        Site(f"model.layers.{layer}.{MODULE_OF[target]}", target, *shapes[target])
        for layer in range(arch.num_layers)
        for target in MODULE_OF
        if target in spec.targets
    ]
    if "lm_head" in spec.targets:
        found.append(Site("lm_head", "lm_head", None, arch.hidden_size, arch.vocab_size))
    return found


class Lora:
    """An adapter's tensors, float32, and where they go."""

    def __init__(self, arch: Arch, spec: LoraSpec, tensors: dict[str, Tensor]) -> None:
        self._arch, self.spec, self.trainable = arch, spec, Trainable(tensors)
        self.sites = {site.module: site for site in sites(arch, spec)}
        expected = {f"{module}.lora_{side}" for module in self.sites for side in "AB"}
        assert set(tensors) == expected, set(tensors) ^ expected

    @classmethod
    def fresh(cls, arch: Arch, spec: LoraSpec, *, seed: int, device: torch.device) -> Lora:
        """A is uniform within 1/sqrt(in) and B is zero, so the model starts as it was (as in PEFT).

        The numbers depend on seed and name alone, not on what else is adapted.
        """
        tensors: dict[str, Tensor] = {}
        for site in sites(arch, spec):
            rank, _ = spec.targets[site.target]
            lead = () if site.num_experts is None else (site.num_experts,)
            # torch's CPU generator reads the lower 32 bits of a seed and no others
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {site.module}".encode()))
            a = (torch.rand((*lead, rank, site.fan_in), generator=generator) * 2 - 1) / math.sqrt(site.fan_in)
            tensors[f"{site.module}.lora_A"] = a.to(device)
            tensors[f"{site.module}.lora_B"] = torch.zeros((*lead, site.fan_out, rank), device=device)
        return cls(arch, spec, tensors)

    def with_spec(self, spec: LoraSpec) -> Lora:
        """The same tensors under a recipe's spec, to train them on; they keep their meaning, only dropout may differ.

        Raises  AdapterError naming each target whose rank, alpha or scaling is another
        """
        mine, wanted = ({**s.targets, "rslora": s.rslora} for s in (self.spec, spec))
        if differing := [name for name in {**mine, **wanted} if mine.get(name) != wanted.get(name)]:
            lines = [f"{name}: {mine.get(name, 'none')} there, {wanted.get(name, 'none')} here" for name in differing]
            raise AdapterError(
                "\n  ".join(["adapter.init_from: that adapter isn't what the recipe asks for (rank, alpha)", *lines])
                + "\n  next: give `adapter` the targets, ranks and alphas of the one to start from"
            )
        return Lora(self._arch, spec, self.trainable.tensors)

    def to(self, device: torch.device) -> Lora:
        """The same adapter on a device; tensors that are there already are shared."""
        return Lora(self._arch, self.spec, {name: x.to(device) for name, x in self.trainable.tensors.items()})

    def pair(self, module: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """A and the scaled B of a module in `dtype`; (None, None) where it has no adapter."""
        site = self.sites.get(module)
        if site is None:
            return None, None
        a = self.trainable.use(f"{module}.lora_A", dtype)
        return a, self.trainable.use(f"{module}.lora_B", dtype, self.spec.scale(site.target))

    def factors(self, module: str, experts: slice = slice(None)) -> Factors | None:
        """The delta of a module's experts as it is merged: float32, no gradient; None where it has no adapter."""
        site = self.sites.get(module)
        if site is None:
            return None
        a, b = (self.trainable.tensors[f"{module}.lora_{side}"].detach()[experts] for side in "AB")
        return Factors(a, b, self.spec.scale(site.target))

    def add_grad(self, module: str, grad_EOD: Tensor) -> None:
        """Pass a gradient of experts' merged weights on to the factors: dA = s B^T dW, dB = s dW A^T, in float32."""
        delta = self.factors(module)
        assert delta is not None
        grads = torch.empty_like(delta.a), torch.empty_like(delta.b)
        for expert, grad_OD in enumerate(grad_EOD.unbind()):
            grad_OD = grad_OD.float() * delta.scale
            torch.mm(delta.b[expert].t(), grad_OD, out=grads[0][expert])
            torch.mm(grad_OD, delta.a[expert].t(), out=grads[1][expert])
        for side, grad in zip("AB", grads, strict=True):
            self.trainable.add_grad(f"{module}.lora_{side}", grad)

    def table(self) -> list[tuple[str, int, int, int]]:
        """(target, rank, matrices, parameters) of each target, for the user to see before step 1."""
        rows = []
        for target, (rank, _) in self.spec.targets.items():
            mine = [site for site in self.sites.values() if site.target == target]
            matrices = sum(site.num_experts or 1 for site in mine)
            parameters = sum((site.num_experts or 1) * rank * (site.fan_in + site.fan_out) for site in mine)
            rows.append((target, rank, matrices, parameters))
        return rows
