"""One new token for each running sequence through all layers, in plain torch: the reference, and the way on a GPU.

A decode step of a small model is many tiny operations, so their number is its time: RoPE turns queries and keys
together in three operations, and experts are taken one by one as they are chosen instead of sorting for a grouped
matmul (which visits every expert, chosen or not). Its own reference is `Transformer.layer_forward`; `engine/native.py`
does the same in C. Adapters stay beside the weights, as in training: merging would round them.
Letters: B sequences, L layers, D hidden, H query heads, K key-value heads, d head size, E experts, k experts a token,
N = B * k rows sorted by expert, I expert width, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ossia.engine.cache import Lane, attend_cached
from ossia.engine.head import Draw, Drawn, draw_plainly, step_norm
from ossia.model.lora import Lora
from ossia.model.packed import Packed
from ossia.model.transformer import Layer, Transformer, router_logits
from ossia.model.weights import expert_module
from ossia.ops.fused import parts_for
from ossia.ops.linear import NARROW, Linear, linear, wide_linear
from ossia.ops.moe import Expert, Route, clamped_swiglu_only, combine, project, project_wide, route
from ossia.ops.rope import rope_tables

if TYPE_CHECKING:
    from ossia.engine.prefill import Prompt

_FIRST_POSITIONS = 1024  # of the rotary tables, which double when a sequence outgrows them


class Decoder(Protocol):
    """What a session decodes with.

    reads_prompts  whether `read` can be called; else prompts go through the training forward
    """

    reads_prompts: bool

    def refresh(self) -> None:
        """Weights or adapters have changed, as an optimizer changes them: read them again."""

    def use(self, adapters: Sequence[Lora | None]) -> None:
        """Other adapters from now on, by their places; the first is the model's own. Refreshes."""

    def forward(
        self, x_BD: Tensor, position_B: Tensor, adapter_B: Sequence[int], routes_LBk: Tensor | None = None
    ) -> Tensor:
        """One token for each of rows 0 .. B - 1 of the cache's tables, which have room for it.

        x_BD        embeddings, (B, D) of the model's `residual_dtype`
        position_B  (B,) int64: each token's position
        adapter_B   which adapter each row uses
        routes_LBk  int16, filled with the experts chosen in every layer
        Returns     (B, D): the last layer's output, before the final norm. Keys and values are in the cache.
        """

    def read(self, x_TD: Tensor, parts: Sequence[tuple[Prompt, int]], routes_LTk: Tensor | None = None) -> Tensor:
        """The next so many tokens of each prompt, which has blocks for them, into the cache.

        x_TD        their embeddings, one prompt after the other
        routes_LTk  int16, filled with the experts chosen; in the last layer of each prompt's last token alone
        Returns     (S, D): the last layer's output of each prompt's last token, before the final norm
        """

    def draw(self, h_BD: Tensor, head_VD: Tensor, draw: Draw) -> Drawn:
        """Tokens from normed hidden states (B, D) under a head (V, D); logits are rounded to h's dtype on the way."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What every layer needs of a step.

    row_B             rows of the lanes' tables
    longest           of each lane: tokens of the longest row, as far as its slots are read
    cos_B1d, sin_B1d  rotary tables of each sequence's position; sin's first half negated, see `_rotate`
    slots             each lane's slots for this step's keys and values
    masks             each lane's additive mask; fused layers need none
    position_B, cos_BF, sin_BF  for fused layers: positions, and the rotary tables as `ops.rope` makes them
    """

    row_B: Tensor
    cos_B1d: Tensor
    sin_B1d: Tensor
    longest: dict[Lane, int]
    slots: dict[Lane, Tensor]
    masks: dict[Lane, Tensor]
    position_B: Tensor
    cos_BF: Tensor
    sin_BF: Tensor


class TorchDecoder:
    """Any device and dtype, and on a GPU with Triton's kernels where they can (`fuses`).

    Rows of one adapter go together; several adapters are several turns through the layers.

    lanes     each layer's lane
    adapters  the first is the model's own; None: the model without one
    grouped   experts in one grouped matmul instead of one by one as they are chosen; None: on a GPU, where waiting for
              the list of the chosen would cost more. Packed experts are always taken one by one.
    """

    reads_prompts = False

    def __init__(
        self,
        model: Transformer,
        lanes: Sequence[Lane],
        adapters: Sequence[Lora | None],
        *,
        grouped: bool | None = None,
    ) -> None:
        self._fused = fuses(model, lanes)
        self._grouped = model.keeps_experts and (model.device.type == "cuda" if grouped is None else grouped)
        self._models, self._lanes = [model], list(lanes)
        self._layers: list[list[DecodeLayer | FusedLayer]] = []
        self._tables = (torch.empty(0), torch.empty(0))
        self.use(adapters)

    def use(self, adapters: Sequence[Lora | None]) -> None:
        """See `Decoder.use`."""
        model = self._models[0]
        self._models = [model, *(model.with_adapter(lora) for lora in adapters[1:])]
        self.refresh()

    def refresh(self) -> None:
        """Arrange the layers anew, when they are needed next."""
        self._layers = [[] for _ in self._models]

    def forward(
        self, x_BD: Tensor, position_B: Tensor, adapter_B: Sequence[int], routes_LBk: Tensor | None = None
    ) -> Tensor:
        """See `Decoder.forward`."""
        if len(set(adapter_B)) == 1:
            row_B = torch.arange(len(x_BD), device=x_BD.device)
            return self.forward_rows(adapter_B[0], x_BD, row_B, position_B, routes_LBk)
        out_BD = torch.empty_like(x_BD)
        for adapter in sorted(set(adapter_B)):
            row_B = torch.tensor([row for row, mine in enumerate(adapter_B) if mine == adapter], device=x_BD.device)
            routes = None if routes_LBk is None else routes_LBk[:, row_B]
            out_BD[row_B] = self.forward_rows(adapter, x_BD[row_B], row_B, position_B[row_B], routes)
            if routes_LBk is not None and routes is not None:
                routes_LBk[:, row_B] = routes
        return out_BD

    def read(self, x_TD: Tensor, parts: Sequence[tuple[Prompt, int]], routes_LTk: Tensor | None = None) -> Tensor:
        """Never called."""
        raise AssertionError("prompts go through the training forward")

    def draw(self, h_BD: Tensor, head_VD: Tensor, draw: Draw) -> Drawn:
        """See `Decoder.draw`."""
        return draw_plainly(h_BD, head_VD, draw)

    def forward_rows(
        self,
        adapter: int,
        x_BD: Tensor,
        row_B: Tensor,
        position_B: Tensor,
        routes_LBk: Tensor | None,
        *,
        static: bool = False,
    ) -> Tensor:
        """`forward` for some rows of one adapter.

        static  read as many slots as the tables have, whatever the lengths are: shapes depend on nothing that is on the
                device, which is never waited for, so that a CUDA graph can hold the step
        """
        model, lanes = self._models[adapter], dict.fromkeys(self._lanes)
        length_B = position_B + 1
        longest = dict.fromkeys(lanes, 0 if static else int(length_B.max()))
        if static:
            longest = {lane: lane.reach for lane in lanes}
        cos_B1d, sin_B1d = (table.index_select(0, position_B) for table in self._rotary(max(longest.values())))
        half = model.arch.head_dim // 2
        step = StepContext(
            row_B,
            cos_B1d,
            sin_B1d,
            longest,
            {lane: lane.row_slots(row_B, position_B) for lane in lanes},
            {} if self._fused else {lane: lane.mask(length_B, longest[lane], model.dtype) for lane in lanes},
            position_B,
            cos_B1d[:, 0, :half].contiguous(),
            sin_B1d[:, 0, half:].contiguous(),
        )
        layers = self._layers[adapter]
        for index, lane in enumerate(self._lanes):
            if index == len(layers):
                layer = model.fetch(index)
                if self._fused:
                    layers.append(FusedLayer(model, layer, lane))
                else:
                    layers.append(DecodeLayer(model, layer, lane, one_by_one=not self._grouped))
            x_BD, experts_Bk = layers[index].forward(x_BD, step)
            if routes_LBk is not None:
                routes_LBk[index] = experts_Bk
        return x_BD

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary tables of at least `length` positions."""
        size, model = len(self._tables[0]), self._models[0]
        if size < length:
            positions_T = torch.arange(max(length, 2 * size, _FIRST_POSITIONS), device=model.device)
            self._tables = rotary_rows(*rope_tables(model.yarn, positions_T, model.dtype))
        return self._tables


class DecodeLayer:
    """A fetched layer, arranged for decoding.

    Where experts are packed (placements `mmap` and `resident`), the layer's expanded copy is not kept: each step
    expands the experts that its tokens chose, one at a time, so it needs the memory of one expert and no more.
    """

    def __init__(self, model: Transformer, layer: Layer, lane: Lane, *, one_by_one: bool) -> None:
        self.index, self.lane, self._model = layer.index, lane, model
        self._input_norm_D, self._post_norm_D = layer.input_norm_D, layer.post_norm_D
        self._sinks_H, self._o, self._router = layer.sinks_H, layer.o, layer.router
        self._qkv = (layer.q, layer.k, layer.v)
        self._gate_up: _ExpertViews | Expert = layer.gate_up
        self._down: _ExpertViews | Expert = layer.down
        if one_by_one:
            self._gate_up = _ExpertViews(layer.gate_up, _expand_one(model, layer.index, "gate_up_proj"))
            expand_down, wide = _expand_one(model, layer.index, "down_proj"), model.dtype == torch.float16
            self._down = _ExpertViews(layer.down, expand_down, wide=wide)

    def forward(self, x_BD: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        """The layer's output (B, D) and the chosen experts (B, k); the new keys and values are in the cache then."""
        a, lane = self._model.arch, self.lane
        num_rows = x_BD.shape[0]
        normed = step_norm(x_BD, self._input_norm_D, a.rms_eps)
        qkv = torch.cat([linear(normed, part) for part in self._qkv], dim=-1).view(num_rows, -1, a.head_dim)
        _rotate(qkv[:, : a.num_heads + a.num_kv_heads], step.cos_B1d, step.sin_B1d)
        lane.write(self.index, step.slots[lane], qkv[:, a.num_heads :])
        keys, values = lane.read(self.index, step.row_B, step.longest[lane])
        attended = attend_cached(
            qkv[:, : a.num_heads], keys, values, self._sinks_H, step.masks[lane], self._model.backend
        )
        x_BD = x_BD + wide_linear(attended.view(num_rows, -1), self._o)
        normed = step_norm(x_BD, self._post_norm_D, a.rms_eps)
        mixed_BD, experts_Bk = self._experts(normed, router_logits(normed, self._router))
        return x_BD + mixed_BD, experts_Bk

    def _experts(self, x_BD: Tensor, logits_BE: Tensor) -> tuple[Tensor, Tensor]:
        a, num_rows = self._model.arch, x_BD.shape[0]
        if isinstance(self._gate_up, Expert):
            assert isinstance(self._down, Expert)
            routing = route(logits_BE, a.experts_per_token)
            hidden = project(x_BD[routing.token_N], self._gate_up, routing.ends_E)
            hidden = clamped_swiglu_only(hidden, a.swiglu_limit, a.swiglu_alpha)
            return combine(project_wide(hidden, self._down, routing.ends_E), routing), routing.experts_TK
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
            return shares_Bk.to(y_ND.dtype) @ y_ND, experts_Bk
        y_BkD = torch.empty_like(y_ND).index_copy_(0, order_N, y_ND).view(*experts_Bk.shape, -1)
        return torch.bmm(shares_Bk.to(y_BkD.dtype).unsqueeze(1), y_BkD).squeeze(1), experts_Bk


def fuses(model: Transformer, lanes: Sequence[Lane]) -> bool:
    """Whether layers can be `FusedLayer`: experts on the device, a cache that isn't of 8 bits, not in float16."""
    there = model.weights.placement == "resident" and model.weights.checkpoint.layout == "mxfp4" and not model.qat
    fitting = model.dtype != torch.float16 and not any(lane.int8 for lane in lanes)
    return model.kernels == "triton" and (there or model.keeps_experts) and fitting


class FusedLayer:
    """`DecodeLayer` by Triton's kernels: the cache is read where it is, packed experts are computed as they are."""

    def __init__(self, model: Transformer, layer: Layer, lane: Lane) -> None:
        from ossia.kernels.gpu import decode, decode_dense, decode_experts, rows

        self.index, self.lane, self._model, self._layer = layer.index, lane, model, layer
        self._decode, self._dense, self._experts, self._rows = decode, decode_dense, decode_experts, rows
        self._qkv = decode_dense.Qkv.of(*(_dense(part) for part in (layer.q, layer.k, layer.v)))
        self._mixture = parts_for("triton").mixture
        prefix = f"model.layers.{layer.index}.mlp.experts"
        self._packed = None
        if not model.keeps_experts:
            self._packed = tuple(
                (*(model.weights.raw(f"{prefix}.{name}_{part}") for part in ("blocks", "scales")), *adapted)
                for name, expert in (("gate_up_proj", layer.gate_up), ("down_proj", layer.down))
                for adapted in [(expert.bias, expert.lora_a, expert.lora_b)]
            )
            self._wide = any(int(scales.max()) > decode_experts.LARGEST_SCALE for _, scales, *_ in self._packed)

    def forward(self, x_BD: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        """As `DecodeLayer.forward`."""
        a, lane, layer, num_rows = self._model.arch, self.lane, self._layer, x_BD.shape[0]
        attended = self._decode.attend(
            self._queries(x_BD, step), lane.pool(self.index), lane.table_RM, step.row_B, step.position_B,
            layer.sinks_H, block=lane.block, window=lane.window, scale=a.head_dim**-0.5,
        )  # fmt: skip
        attended = attended.view(num_rows, -1)
        few = num_rows <= self._experts.ALONE
        x_BD = self._dense.add_product(x_BD, attended, _dense(layer.o)) if few else x_BD + linear(attended, layer.o)
        if self._packed is not None:
            return self._packed_experts(x_BD, few=few)
        normed, _ = self._rows.rms_norm(x_BD, layer.post_norm_D, a.rms_eps)
        logits_BE = linear(normed, layer.router)
        experts_Bk, shares_Bk, order_N, row_Bk, ends_E = self._decode.choose(logits_BE, a.experts_per_token)
        routing = Route(shares_Bk, experts_Bk, order_N, order_N // a.experts_per_token, row_Bk, ends_E)
        whole = self._mixture(
            x_BD, normed, routing, layer.gate_up, layer.down, a.swiglu_limit, a.swiglu_alpha, lambda *_: None
        )
        return whole, experts_Bk

    def _packed_experts(self, x_BD: Tensor, *, few: bool) -> tuple[Tensor, Tensor]:
        """Norm, router and experts on top of x."""
        a, layer = self._model.arch, self._layer
        assert self._packed is not None
        if few and layer.router.lora_a is None:
            x, norm = x_BD, (layer.post_norm_D, a.rms_eps)
            logits_BE = self._dense.logits(x_BD, *norm, _dense(layer.router))
        else:
            (x, _), norm = self._rows.rms_norm(x_BD, layer.post_norm_D, a.rms_eps), None
            logits_BE = linear(x, layer.router)
        return self._experts.mixture(
            x_BD, x, logits_BE, a.experts_per_token, *self._packed, a.swiglu_limit, a.swiglu_alpha, norm=norm,
            wide=self._wide,
        )  # fmt: skip

    def _queries(self, x_BD: Tensor, step: StepContext) -> Tensor:
        """Turned, (B, H, d); keys and values are in the cache then."""
        a, lane, layer = self._model.arch, self.lane, self._layer
        if len(x_BD) <= self._experts.ALONE:
            return self._dense.qkv(
                x_BD, layer.input_norm_D, a.rms_eps, self._qkv, step.cos_BF, step.sin_BF, step.slots[lane],
                lane.pool(self.index),
            )  # fmt: skip
        normed, _ = self._rows.rms_norm(x_BD, layer.input_norm_D, a.rms_eps)
        qkv = torch.cat([linear(normed, part) for part in (layer.q, layer.k, layer.v)], dim=-1)
        qkv = qkv.view(len(x_BD), -1, a.head_dim)
        turned = qkv[:, : a.num_heads + a.num_kv_heads]
        self._rows.rotate(turned, step.cos_BF, step.sin_BF, back=False, out=turned)
        lane.write(self.index, step.slots[lane], qkv[:, a.num_heads :])
        return qkv[:, : a.num_heads]


def _dense(layer: Linear) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    assert layer.bias is not None
    return layer.weight, layer.bias, layer.lora_a, layer.lora_b


def _expand_one(model: Transformer, layer: int, name: str) -> Callable[[int], Tensor] | None:
    """What expands one expert, (O, D), when it is asked for; None where all of them are expanded anyway."""
    if model.keeps_experts:
        return None
    if not model.rounds(expert_module(layer, name)):
        return partial(model.weights.expert_weight, layer, name)
    packed = model.packed_experts(layer, name)

    def expand(expert: int) -> Tensor:
        one = Packed(*(part[expert : expert + 1] for part in packed))
        return one.expand(model.dtype, split=name == "gate_up_proj")[0]

    return expand


class _ExpertViews:
    """One projection's experts, each on its own: views of the expanded weights, or expanded when they are asked for."""

    def __init__(self, expert: Expert, expand: Callable[[int], Tensor] | None, *, wide: bool = False) -> None:
        """wide  the result is float32, computed as `ops.linear.wide_linear` does"""
        self._wide, self._expand, self._weights = wide, expand, None
        if expand is None:
            assert isinstance(expert.weight, Tensor)
            self._weights = [weight_OI.t() for weight_OI in expert.weight.unbind()]
        bias_EO = expert.bias * NARROW if wide else expert.bias
        self._biases, self._fan_out = bias_EO.unbind(), bias_EO.shape[1]
        self._adapters = None
        if expert.lora_a is not None and expert.lora_b is not None:
            turned = (factor.transpose(1, 2).unbind() for factor in (expert.lora_a, expert.lora_b))
            self._adapters = list(zip(*turned, strict=True))

    def project(self, x_ND: Tensor, chosen: list[int], counts: list[int]) -> Tensor:
        """Rows, counts[i] of them in a row for expert chosen[i], through weight, bias and adapter. Returns (N, out)."""
        if self._wide:
            x_ND = x_ND * NARROW
        y_NO = x_ND.new_empty(x_ND.shape[0], self._fan_out)
        rows = torch.split_with_sizes(x_ND, counts), torch.split_with_sizes(y_NO, counts)
        for expert, x, y in zip(chosen, *rows, strict=True):
            if self._weights is not None:
                weight_IO = self._weights[expert]
            else:
                assert self._expand is not None
                weight_IO = self._expand(expert).t()
            torch.addmm(self._biases[expert], x, weight_IO, out=y)
            if self._adapters is not None:
                a_Ir, b_rO = self._adapters[expert]
                y.addmm_(torch.mm(x, a_Ir), b_rO)
        return y_NO.float() / NARROW if self._wide else y_NO


def _rotate(x_BXd: Tensor, cos_B1d: Tensor, sin_B1d: Tensor) -> None:
    """`apply_rope`, in place: swapping the halves of a head brings each element's partner into its place."""
    partner = x_BXd.roll(x_BXd.shape[-1] // 2, dims=-1)
    x_BXd.mul_(cos_B1d).addcmul_(partner, sin_B1d)


def rotary_rows(cos_TF: Tensor, sin_TF: Tensor) -> tuple[Tensor, Tensor]:
    """`rope_tables` as `StepContext` wants them: (T, 1, d) each."""
    return torch.cat((cos_TF, cos_TF), -1).unsqueeze(1), torch.cat((-sin_TF, sin_TF), -1).unsqueeze(1)
