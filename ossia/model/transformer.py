"""gpt-oss, layer by layer: embedding, attention with sinks, mixture of experts, final norm; nothing else.

Functions on tensors rather than a module tree, because the step goes layer-major: `fetch` makes one layer's weights
ready (expanded, cast, adapters beside them), `layer_forward` takes every micro-batch through it, then it is dropped.
The same function serves training, evaluation and decoding, which brings its own attention over a cache.
Oracle: transformers' `GptOssForCausalLM`. Letters: T packed tokens, D hidden, H query heads, K key-value heads, d head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ossia.kernels import Kernels, pick_kernels
from ossia.kernels.cpu.pages import Room
from ossia.model.arch import Arch
from ossia.model.budget.work import experts_at_once
from ossia.model.cut.home import Home
from ossia.model.cut.ranks import Ranks, experts_of, part_of
from ossia.model.cut.trained import TrainedParts
from ossia.model.lora import Lora
from ossia.model.packed import Packed, packed_experts
from ossia.model.trainable import Trainable, passing_on
from ossia.model.weights import HEAD, Weights, expert_module, interleave_gate_up, is_expert_weight
from ossia.ops.attention import Backend, Kept, Place, Segments, check_backend, pick_backend, sink_attention
from ossia.ops.attention.divided import Attend, Members, divided, tokens_of
from ossia.ops.attention.probe import Probed
from ossia.ops.fused import Mixture, parts_for
from ossia.ops.linear import Dropout, Linear, linear, wide_linear
from ossia.ops.memory import leave_to_the_file
from ossia.ops.moe import Expanding, Expert, in_chunks, route
from ossia.ops.rope import Yarn, rope_tables
from ossia.ops.staying import with_rows_sent


def router_logits(normed_TD: Tensor, router: Linear, lora_x_TD: Tensor | None = None) -> Tensor:
    """(T, E), as the released model computes them in the activations' dtype; in float32 under float16."""
    if normed_TD.dtype != torch.float16:
        return linear(normed_TD, router, lora_x_TD)
    parts = (router.weight, router.bias, router.lora_a, router.lora_b)
    wide = Linear(*(None if part is None else part.float() for part in parts))
    return linear(normed_TD.float(), wide, None if lora_x_TD is None else lora_x_TD.float())


_MASKS_APART = 1 << 20  # between the names of two chunks' dropout masks: more than a model has


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights, ready to compute with."""

    index: int
    window: int | None
    input_norm_D: Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    sinks_H: Tensor
    post_norm_D: Tensor
    router: Linear
    gate_up: Expert
    down: Expert

    @property
    def trained_after_attention(self) -> bool:
        """Whether anything between the attention's output and the layer's takes a gradient."""
        parts = (self.router, self.gate_up, self.down)
        found = [x for part in parts for x in (part.weight, part.bias, part.lora_a, part.lora_b)]
        return any(isinstance(x, Tensor) and x.requires_grad for x in (self.post_norm_D, *found))

    def let_go(self) -> None:
        """Forget experts that were expanded for this layer; they will be expanded again if they are needed again."""
        for expert in (self.gate_up, self.down):
            if isinstance(expert.weight, Expanding):
                expert.weight.let_go()


class PackedTokens(Protocol):
    """What a forward pass needs of a pack: ids (T,) int64, and `starts` and `unfold` as `ops.attention.Segments`."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def starts(self) -> Tensor: ...
    @property
    def unfold(self) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class Context:
    """What every layer needs of a pack beside its activations."""

    segments: Segments
    cos_TF: Tensor
    sin_TF: Tensor
    members: Members | None = None  # that share its tokens; the tables are of this one's


class Transformer:
    """A model whose weights are in `weights`, with either an adapter (`lora`), or all of its tensors in `trainable`.

    trainable  what an optimizer may change: the adapter's tensors, or every weight of the model; empty where the model
               is only used
    backend    of attention; None: the fastest that is exact here
    kernels    of what stands between the matrix products; None: the fastest that is there
    experts_over  the processes that each have some of its experts for good, this one those of `own_experts`
    qat        experts are computed as an MXFP4 export would hold them, what training changed merged in; gradients pass
               through the rounding as if it weren't there
    probed     what trying the attention on the device found, where somebody has
    """

    def __init__(
        self,
        weights: Weights,
        *,
        lora: Lora | None = None,
        backend: Backend | None = None,
        kernels: Kernels | None = None,
        qat: bool = False,
        experts_over: Members | None = None,
    ) -> None:
        self.weights, self.lora, self.qat = weights, lora, qat
        self.trainable = lora.trainable if lora is not None else Trainable()
        self.experts_over = experts_over
        self.backend: Backend = pick_backend(self.place) if backend is None else check_backend(backend, self.place)
        self.kernels: Kernels = kernels or pick_kernels(weights.device, weights.dtype)
        self.probed: Probed | None = None
        self._parts = parts_for(self.kernels, weights.dtype)
        if experts_over is not None:
            sent = with_rows_sent(self._parts.mixture, self._parts.sort, experts_over)
            self._parts = replace(self._parts, mixture=sent)

    @property
    def arch(self) -> Arch:
        return self.weights.arch

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def residual_dtype(self) -> torch.dtype:
        """Of what goes from layer to layer: float32 under float16, whose range a few tokens' activations are beyond."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    @property
    def place(self) -> Place:
        """Where its attention runs."""
        return Place.of(self.device, self.dtype, self.arch.head_dim)

    @cached_property
    def yarn(self) -> Yarn:
        a = self.arch
        return Yarn(
            a.head_dim,
            a.rope_theta,
            a.rope_factor,
            a.rope_beta_fast,
            a.rope_beta_slow,
            a.rope_original,
            a.rope_truncate,
        )

    @property
    def own_experts(self) -> slice:
        """The experts that this process computes with."""
        if self.experts_over is None:
            return slice(0, self.arch.num_experts)
        return experts_of(self.arch.num_experts, self.experts_over)

    @property
    def keeps_experts(self) -> bool:
        """Whether experts are in memory expanded anyway: placement `bf16`, or all weights trainable."""
        return self.weights.placement == "bf16" or "model.layers.0.mlp.experts.down_proj" in self.trainable

    @property
    def cut(self) -> bool:
        """Whether its weights are cut over the ranks of a run: whoever goes through the layers takes all along."""
        return self.weights.parts is not None or self.trainable.cut

    def with_adapter(self, lora: Lora | None) -> Transformer:
        """The same weights, computed in the same way, with another adapter, or with none."""
        how = {"backend": self.backend, "kernels": self.kernels, "qat": self.qat, "experts_over": self.experts_over}
        return Transformer(self.weights, lora=lora, **how)

    def whole(self) -> Transformer:
        """The same model for one process alone: where weights are cut over ranks, another that reads them from the
        file as it needs them."""
        if not self.cut:
            return self
        weights = Weights(self.weights.checkpoint, "mmap", self.dtype, self.device)
        return Transformer(weights, lora=self.lora, backend=self.backend, kernels=self.kernels, qat=self.qat)

    def use_adapter(self, lora: Lora) -> None:
        """Put an adapter on the model; only its tensors are trainable then."""
        self.lora, self.trainable = lora, lora.trainable

    def train_all_weights(self, ranks: Ranks | None = None, *, offload: bool = False) -> None:
        """Make every tensor trainable, as a float32 copy: 16 bytes a weight with its gradient and Adam's moments.

        ranks    over which the copies are cut; the weights themselves are best left in their file then
        offload  a rank's parts wait in the machine's memory, and are updated there
        """
        assert self.lora is None
        staying = self.experts_over is not None
        specs = self.arch.tensor_specs("bf16")
        if ranks is None:
            for name in specs:
                self.trainable.tensors[name] = self._master(name).to(torch.float32, copy=True)
            return
        # experts are computed with as (E, out, in)
        shapes = {n: (s.shape[0], *s.shape[:0:-1]) if is_expert_weight(n) else s.shape for n, s in specs.items()}
        home = Home(self.device, offload=offload)
        parts = {name: self._part_of_master(name, shape, ranks).to(home.place) for name, shape in shapes.items()}
        for name in self.weights:
            leave_to_the_file(self.weights.checkpoint.tensor(name))
        self.trainable = TrainedParts(parts, shapes, ranks, self.dtype, home, staying=staying)

    def _part_of_master(self, name: str, shape: tuple[int, ...], ranks: Ranks) -> Tensor:
        """A rank's part of a flat master; of what is large nothing else is read."""
        own = part_of(math.prod(shape), ranks.rank, ranks.size)
        if is_expert_weight(name):
            each = math.prod(shape[1:])
            experts = slice(own.start // each, -(-own.stop // each))
            layer, projection = int(name.split(".")[2]), name.rpartition(".")[2]
            some = self.weights.expert_weight(layer, projection, experts)
            start = own.start - experts.start * each
            part = some.flatten()[start : start + own.stop - own.start]
        elif len(shape) == 1 or name.endswith("_bias"):
            part = self._master(name).flatten()[own]
        else:
            part = self.weights.raw(name).view(-1)[own].to(device=self.device, dtype=self.dtype)
        return part.to(torch.float32, copy=True)

    def _master(self, name: str) -> Tensor:
        if ".mlp.experts." not in name:
            return self.weights.get(name)
        layer, leaf = int(name.split(".")[2]), name.rpartition(".")[2]
        if leaf.endswith("_bias"):
            return self.weights.expert_bias(layer, leaf.removesuffix("_bias"))
        return self.weights.expert_weight(layer, leaf)

    def tensor(self, name: str) -> Tensor:
        """A weight in the computation's dtype, trainable or frozen; experts excepted."""
        return self.trainable.use(name, self.dtype) if name in self.trainable else self.weights.get(name)

    def embed(self, ids_T: Tensor) -> Tensor:
        """Rows of the embedding. Returns (T, D) of `residual_dtype`."""
        table_VD = self.weights.raw("model.embed_tokens.weight")
        if "model.embed_tokens.weight" in self.trainable:
            return F.embedding(ids_T, self.tensor("model.embed_tokens.weight")).to(self.residual_dtype)
        return F.embedding(ids_T.to(table_VD.device), table_VD).to(device=self.device, dtype=self.residual_dtype)

    def context(self, pack: PackedTokens, members: Members | None = None) -> Context:
        """Positions, document boundaries and rotary tables of a pack, of which `members` share the tokens."""
        segments = Segments(pack.starts.cpu(), self.device, None if pack.unfold is None else pack.unfold.cpu())
        positions = segments.positions_T
        if members is not None:
            assert segments.shared is None, "documents that share rows aren't divided"
            positions = positions[tokens_of(len(positions), members.rank, members.size)]
        return Context(segments, *rope_tables(self.yarn, positions, self.dtype), members)

    def fetch(self, index: int, *, experts_at_once: int | None = None) -> Layer:
        """Layer `index` ready to compute with; gradients on its trainable parts where they are on.

        experts_at_once  of packed experts, how many are expanded together; None: all, when they are first multiplied
        """
        name = f"model.layers.{index}"
        sliding = self.arch.layer_types[index] == "sliding_attention"

        def part(module: str) -> Linear:
            weight, bias = (self.tensor(f"{name}.{module}.{leaf}") for leaf in ("weight", "bias"))
            return Linear(weight, bias, *self._adapter(f"{name}.{module}"))

        return Layer(
            index=index,
            window=self.arch.sliding_window if sliding else None,
            input_norm_D=self.tensor(f"{name}.input_layernorm.weight"),
            q=part("self_attn.q_proj"),
            k=part("self_attn.k_proj"),
            v=part("self_attn.v_proj"),
            o=part("self_attn.o_proj"),
            sinks_H=self.tensor(f"{name}.self_attn.sinks"),
            post_norm_D=self.tensor(f"{name}.post_attention_layernorm.weight"),
            router=part("mlp.router"),
            gate_up=self._expert(index, "gate_up_proj", experts_at_once),
            down=self._expert(index, "down_proj", experts_at_once),
        )

    def _adapter(self, module: str) -> tuple[Tensor, Tensor] | tuple[None, None]:
        return (None, None) if self.lora is None else self.lora.pair(module, self.dtype)

    def _expert(self, index: int, projection: str, at_once: int | None) -> Expert:
        module = expert_module(index, projection)
        if module in self.trainable:
            bias = self.tensor(f"{module}_bias")
        else:
            bias = self.weights.expert_bias(index, projection)
        weight: Tensor | Expanding
        # rounded ones pass their gradient on, so autograd has to know them
        if self.keeps_experts or (self.rounds(module) and torch.is_grad_enabled()):
            weight = self.expert_weight(index, projection)
        else:
            own = self.own_experts
            weight = Expanding(partial(self._expand, index, projection), own.stop - own.start, at_once)
        if self.qat:
            return Expert(weight, bias)
        a, b = self._adapter(module)
        if self.experts_over is not None and a is not None and b is not None:
            a, b = a[self.own_experts], b[self.own_experts]
        return Expert(weight, bias, a, b)

    def rounds(self, module: str) -> bool:
        """Whether these experts are computed as an export rounds them; else `qat` is off, or they are in MXFP4."""
        changed = module in self.trainable or (self.lora is not None and module in self.lora.sites)
        return self.qat and (changed or self.weights.checkpoint.layout == "bf16")

    def expert_weight(self, index: int, projection: str) -> Tensor:
        """A projection's experts as they are computed with, (E, O, D); gradients on them where they are on."""
        module = expert_module(index, projection)
        if not self.rounds(module):
            return self.tensor(module) if module in self.trainable else self.weights.expert_weight(index, projection)
        weight_EOD = self._expand(index, projection, slice(None))
        if module in self.trainable:
            return passing_on(weight_EOD, lambda grad: self.trainable.add_grad(module, grad.float()))
        if self.lora is None or module not in self.lora.sites:
            return weight_EOD
        return passing_on(weight_EOD, partial(self.lora.add_grad, module))

    def _expand(self, index: int, projection: str, experts: slice, room: Room | None = None) -> Tensor:
        """Some experts or all, expanded or rounded on the spot, without gradients."""
        module = expert_module(index, projection)
        if not self.rounds(module):
            return self.weights.expert_weight(index, projection, None if experts == slice(None) else experts, room)
        in_turn = projection == "gate_up_proj" and module not in self.trainable
        return self.packed_experts(index, projection, experts).expand(self.dtype, split=in_turn)

    def experts_at_once(self, tokens: int) -> int:
        """The default for a step of `tokens` tokens, see `experts_at_once`."""
        return experts_at_once(self.arch, tokens)

    def packed_experts(self, index: int, projection: str, experts: slice = slice(None)) -> Packed:
        """A projection's experts in MXFP4, what training changed merged in; gate and up rows in turn, as a checkpoint
        has them, unless the weights themselves are trained."""
        module = expert_module(index, projection)
        if module in self.trainable:
            return packed_experts(self.trainable.tensors[module].detach()[experts], None)
        delta = None if self.lora is None else self.lora.factors(module, experts)
        if delta is not None and projection == "gate_up_proj":
            delta = delta._replace(b=interleave_gate_up(delta.b))
        packed = packed_experts(self.weights.expert_base(index, projection, experts), delta)
        if experts == slice(None):
            self.weights.note_read(index)
        return packed

    def layer_forward(
        self,
        layer: Layer,
        x_TD: Tensor,
        context: Context,
        *,
        rows: Tensor | None = None,
        attend: Attend | None = None,
        dropout: Dropout | None = None,
        note_experts: Callable[[Tensor], None] | None = None,
        replay: Tensor | None = None,
        mixture: Mixture | None = None,
        tokens_at_once: int | None = None,
        values: bool = True,
    ) -> Tensor:
        """One layer over one pack.

        x_TD     (T, D)
        rows     (R,) int64: the only rows of the result that are wanted (the others still serve as keys and values)
        attend   attention to use instead of that over the pack itself (decoding, over a cache)
        dropout  of the adapters' inputs
        note_experts  is told which experts were chosen, (T, k) int64, or (R, k) with `rows`
        replay   (T, k) int64, or (R, k) with `rows`: experts to use instead, see `ops.moe.route`
        mixture  of experts, to use instead of the one over expanded weights
        tokens_at_once  that go through the experts together, see `ops.moe.in_chunks`; None: all. Not with note_experts
        values   False: only the gradient is wanted of the result, whose numbers may mean nothing
        Returns  (T, D), or (R, D) with `rows`
        """
        num_tokens = len(x_TD)
        a = self.arch

        def adapted(x: Tensor, slot: int) -> Tensor | None:
            return None if dropout is None else dropout(x, layer.index * 8 + slot)

        normed = self._parts.rms_norm(x_TD, layer.input_norm_D, a.rms_eps)
        q = linear(normed, layer.q, adapted(normed, 0)).view(num_tokens, a.num_heads, a.head_dim)
        k = linear(normed, layer.k, adapted(normed, 1)).view(num_tokens, a.num_kv_heads, a.head_dim)
        v = linear(normed, layer.v, adapted(normed, 2)).view(num_tokens, a.num_kv_heads, a.head_dim)
        q, k = (self._parts.apply_rope(x, context.cos_TF, context.sin_TF) for x in (q, k))
        attended = (attend or self.attention(context))(q, k, v, layer.sinks_H, layer.window).flatten(1)
        if rows is not None:
            attended, x_TD = attended[rows], x_TD[rows]
        x_TD = x_TD + wide_linear(attended, layer.o, adapted(attended, 3))

        def through_experts(x_TD: Tensor, which: slice, chunk: int) -> Tensor:
            def adapted(x: Tensor, slot: int) -> Tensor | None:
                # no chunk has another's mask
                return None if dropout is None else dropout(x, layer.index * 8 + slot + chunk * _MASKS_APART)

            normed = self._parts.rms_norm(x_TD, layer.post_norm_D, a.rms_eps)
            logits = router_logits(normed, layer.router, adapted(normed, 4))
            routing = route(logits, a.experts_per_token, None if replay is None else replay[which], self._parts.sort)
            if note_experts is not None:
                note_experts(routing.experts_TK)
            return (mixture or self._parts.mixture)(
                x_TD, normed, routing, layer.gate_up, layer.down, a.swiglu_limit, a.swiglu_alpha, adapted
            )

        if tokens_at_once is None or len(x_TD) <= tokens_at_once:
            return through_experts(x_TD, slice(None), 0)
        assert note_experts is None
        return in_chunks(x_TD, through_experts, tokens_at_once, values=values, trained=layer.trained_after_attention)

    def attention(self, context: Context, kept: Kept | None = None) -> Attend:
        """Attention over a pack itself; `kept` is told the results of layers without a window, or has them."""
        scale = self.arch.head_dim**-0.5

        def attend(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, window: int | None) -> Tensor:
            return sink_attention(
                q, k, v, sinks_H, context.segments, window=window, scale=scale, backend=self.backend,
                kept=kept if window is None else None,
            )  # fmt: skip

        if context.members is None:
            return attend
        return divided(attend, context.members, context.segments.num_tokens)

    def head(self, *, where_it_is: bool = False) -> Linear:
        """The output projection: (V, D), no bias, with its adapter where it has one.

        where_it_is  a frozen head without an adapter stays where the weights have it, for who walks it in blocks
        """
        frozen = HEAD not in self.trainable and (self.lora is None or "lm_head" not in self.lora.sites)
        if where_it_is and frozen and self.weights.raw(HEAD).device.type != self.device.type:
            return Linear(self.weights.raw(HEAD))
        return Linear(self.tensor(HEAD), None, *self._adapter("lm_head"))

    def final_norm(self, x_TD: Tensor) -> Tensor:
        """The hidden states that the head reads."""
        return self._parts.rms_norm(x_TD, self.tensor("model.norm.weight"), self.arch.rms_eps)

    @torch.no_grad()
    def hidden(self, pack: PackedTokens) -> Tensor:
        """Final hidden states of a pack, without gradients: (T, D), normalised."""
        context, x_TD = self.context(pack), self.embed(pack.ids)
        for index in range(self.arch.num_layers):
            x_TD = self.layer_forward(self.fetch(index), x_TD, context)
        return self.final_norm(x_TD)

    @torch.no_grad()
    def logits(self, pack: PackedTokens) -> Tensor:
        """(T, V) of the activations' dtype: for tests and single positions; training never makes them."""
        return linear(self.hidden(pack), self.head())
