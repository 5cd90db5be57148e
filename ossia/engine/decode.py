"""One layer for one new token a sequence: `Transformer.layer_forward` with as few operations as that allows.

A decode step of a small model is many tiny operations, so their number is its time: the q, k and v projections are one
matrix, RoPE turns queries and keys together in three operations, and experts are taken one by one as they are chosen
instead of sorting for a grouped matmul (which visits every expert, chosen or not). The reference is `layer_forward`,
and tests/engine holds the two together. Adapters stay beside the weights, as in training: merging would round them.
Letters: B sequences, D hidden, H query heads, K key-value heads, d head size, E experts, k experts a token,
N = B * k rows sorted by expert, I expert width, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ossia.engine.cache import Lane, attend_cached
from ossia.model.transformer import Layer, Transformer
from ossia.model.weights import Weights
from ossia.ops.linear import Linear, linear
from ossia.ops.moe import Expert, clamped_swiglu_only, combine, project, route


@dataclass(frozen=True, slots=True)
class StepContext:
    """What every layer needs of a step.

    cos_B1d, sin_B1d  rotary tables of each sequence's position; sin's first half negated, see `_rotate`
    slots             each lane's slots for this step's keys and values
    masks             each lane's additive mask, or None
    """

    cos_B1d: Tensor
    sin_B1d: Tensor
    longest: int
    slots: dict[Lane, Tensor]
    masks: dict[Lane, Tensor | None]


class DecodeLayer:
    """A fetched layer, arranged for decoding.

    Where experts are packed (placements `mmap` and `resident`), the layer's expanded copy is not kept: each step
    expands the experts that its tokens chose, one at a time, so it needs the memory of one expert and no more.
    """

    def __init__(self, model: Transformer, layer: Layer, lane: Lane) -> None:
        self.index, self.lane, self._model = layer.index, lane, model
        self._input_norm_D, self._post_norm_D = layer.input_norm_D, layer.post_norm_D
        self._sinks_H, self._o, self._router = layer.sinks_H, layer.o, layer.router
        self._qkv = (layer.q, layer.k, layer.v)
        expanded = keeps_experts(model)
        if expanded:  # a copy of 5% of a released model's weights; where experts are packed, memory comes first
            self._qkv = (_side_by_side(self._qkv),)
        self._gate_up: _ExpertViews | Expert = layer.gate_up
        self._down: _ExpertViews | Expert = layer.down
        if model.device.type == "cpu" or not expanded:  # a GPU would wait for the list of chosen experts
            weights = None if expanded else model.weights
            self._gate_up = _ExpertViews(layer.gate_up, weights, layer.index, "gate_up_proj")
            self._down = _ExpertViews(layer.down, weights, layer.index, "down_proj")

    def forward(self, x_BD: Tensor, step: StepContext) -> Tensor:
        """The layer's output (B, D); the new tokens' keys and values are in the cache afterwards."""
        a, lane = self._model.arch, self.lane
        num_rows = x_BD.shape[0]
        normed = step_norm(x_BD, self._input_norm_D, a.rms_eps)
        parts = [linear(normed, part) for part in self._qkv]
        qkv = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).view(num_rows, -1, a.head_dim)
        _rotate(qkv[:, : a.num_heads + a.num_kv_heads], step.cos_B1d, step.sin_B1d)
        lane.write(self.index, step.slots[lane], qkv[:, a.num_heads :])
        keys, values = lane.read(self.index, num_rows, step.longest)
        attended = attend_cached(
            qkv[:, : a.num_heads], keys, values, self._sinks_H, step.masks[lane], self._model.backend
        )
        x_BD = x_BD + linear(attended.view(num_rows, -1), self._o)
        normed = step_norm(x_BD, self._post_norm_D, a.rms_eps)
        return x_BD + self._experts(normed, linear(normed, self._router))

    def _experts(self, x_BD: Tensor, logits_BE: Tensor) -> Tensor:
        a, num_rows = self._model.arch, x_BD.shape[0]
        if isinstance(self._gate_up, Expert):
            assert isinstance(self._down, Expert)
            routing = route(logits_BE, a.experts_per_token)
            hidden = project(x_BD[routing.token_N], self._gate_up, routing.ends_E)
            hidden = clamped_swiglu_only(hidden, a.swiglu_limit, a.swiglu_alpha)
            return combine(project(hidden, self._down, routing.ends_E), routing)
        assert isinstance(self._down, _ExpertViews)
        chosen_Bk, experts_Bk = logits_BE.topk(a.experts_per_token, dim=-1)
        shares_Bk = chosen_Bk.softmax(-1)
        if num_rows == 1:
            chosen, counts = experts_Bk[0].tolist(), [1] * a.experts_per_token
            x_ND = x_BD.expand(a.experts_per_token, -1)
        else:
            experts_N, order_N = experts_Bk.view(-1).sort(stable=True)
            runs = [(expert, len(list(run))) for expert, run in groupby(experts_N.tolist())]
            chosen, counts = (list(column) for column in zip(*runs, strict=True))
            x_ND = x_BD.index_select(0, order_N // a.experts_per_token)
        hidden_NI = clamped_swiglu_only(self._gate_up.project(x_ND, chosen, counts), a.swiglu_limit, a.swiglu_alpha)
        y_ND = self._down.project(hidden_NI, chosen, counts)
        if num_rows == 1:
            return shares_Bk @ y_ND
        y_BkD = torch.empty_like(y_ND).index_copy_(0, order_N, y_ND).view(*experts_Bk.shape, -1)
        return torch.bmm(shares_Bk.unsqueeze(1), y_BkD).squeeze(1)


def keeps_experts(model: Transformer) -> bool:
    """Whether the model's experts are in memory expanded anyway: placement `bf16`, or all weights trainable."""
    return model.weights.placement == "bf16" or "model.layers.0.mlp.experts.down_proj" in model.trainable


class _ExpertViews:
    """One projection's experts, each on its own: views of the expanded weights, or expanded when they are asked for."""

    def __init__(self, expert: Expert, packed: Weights | None, layer: int, name: str) -> None:
        self._packed, self._layer, self._name = packed, layer, name
        self._weights = None if packed is not None else [weight_OI.t() for weight_OI in expert.weight.unbind()]
        self._biases, self._fan_out = expert.bias.unbind(), expert.bias.shape[1]
        self._adapters = None
        if expert.lora_a is not None and expert.lora_b is not None:
            turned = (factor.transpose(1, 2).unbind() for factor in (expert.lora_a, expert.lora_b))
            self._adapters = list(zip(*turned, strict=True))

    def project(self, x_ND: Tensor, chosen: list[int], counts: list[int]) -> Tensor:
        """Rows, counts[i] of them in a row for expert chosen[i], through weight, bias and adapter. Returns (N, out)."""
        y_NO = x_ND.new_empty(x_ND.shape[0], self._fan_out)
        rows = torch.split_with_sizes(x_ND, counts), torch.split_with_sizes(y_NO, counts)
        for expert, x, y in zip(chosen, *rows, strict=True):
            if self._weights is not None:
                weight_IO = self._weights[expert]
            else:
                assert self._packed is not None
                weight_IO = self._packed.expert_weight(self._layer, self._name, expert).t()
            torch.addmm(self._biases[expert], x, weight_IO, out=y)
            if self._adapters is not None:
                a_Ir, b_rO = self._adapters[expert]
                y.addmm_(torch.mm(x, a_Ir), b_rO)
        return y_NO


def _rotate(x_BXd: Tensor, cos_B1d: Tensor, sin_B1d: Tensor) -> None:
    """`apply_rope`, in place: swapping the halves of a head brings each element's partner into its place."""
    partner = x_BXd.roll(x_BXd.shape[-1] // 2, dims=-1)
    x_BXd.mul_(cos_B1d).addcmul_(partner, sin_B1d)


def rotary_rows(cos_TF: Tensor, sin_TF: Tensor) -> tuple[Tensor, Tensor]:
    """`rope_tables` as `StepContext` wants them: (T, 1, d) each."""
    return torch.cat((cos_TF, cos_TF), -1).unsqueeze(1), torch.cat((-sin_TF, sin_TF), -1).unsqueeze(1)


def step_norm(x_BD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`ops.linear.rms_norm` without its gradient, in one operation."""
    if x_BD.dtype == torch.float32:
        return F.rms_norm(x_BD, weight_D.shape, weight_D, eps)
    return F.rms_norm(x_BD.float(), weight_D.shape, weight_D.float(), eps).to(x_BD.dtype)


def _side_by_side(parts: tuple[Linear, ...]) -> Linear:
    """Projections of one input as a single one, their outputs one after the other, adapters too."""
    weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    adapted = [part for part in parts if part.lora_a is not None]
    if not adapted:
        return Linear(weight, bias)
    lora_b = weight.new_zeros(len(weight), sum(len(part.lora_a) for part in adapted))
    row = column = 0
    for part in parts:
        if part.lora_a is not None:
            rank = len(part.lora_a)
            lora_b[row : row + len(part.weight), column : column + rank] = part.lora_b
            column += rank
        row += len(part.weight)
    return Linear(weight, bias, torch.cat([part.lora_a for part in adapted]), lora_b)
