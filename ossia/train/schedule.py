"""Forward and backward of a whole step, layer by layer: every micro-batch through layer l before any through l + 1.

A layer's weights are fetched (expanded from MXFP4, cast, later streamed or gathered) once a direction and step, however
many micro-batches there are, and only one layer is ready at a time. Where there is nothing to make ready, one
micro-batch goes through all layers and back before the next, so that only its activations are kept. Autograd works
inside a layer; between layers go plain tensors. Kept are each layer's inputs (`recompute`) or its graph, from which
expanded experts are left out: they are expanded again for the layer's backward. The inputs may wait in the machine's
memory (`offload`); beside them what attention over long documents found may be kept (`keep_attention`). The gradient
equals that of plain autograd.
Letters: T tokens of a pack, D hidden, R rows whose prediction counts, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ossia.data.pack import Pack
from ossia.model.transformer import Context, Layer, Transformer
from ossia.model.weights import EMBEDDING, HEAD, expert_module
from ossia.ops.attention import Kept as KeptAttention
from ossia.ops.attention.divided import Members, tokens_of
from ossia.ops.linear import Dropout, Linear, linear
from ossia.ops.loss import linear_logprob
from ossia.ops.memory import return_freed_memory
from ossia.sizes import ATTENTION_KEPT_FROM
from ossia.train.offload import Away, Offload

LossOfLogprobs = Callable[[Tensor, int, Tensor], Tensor]
"""(logp_R float32, micro-batch, rows_R of its pack) -> its part of the step's loss, ()."""


@dataclass(frozen=True, slots=True)
class Micro:
    """A pack on its way through the layers, or the part of it that this process computes.

    ids, targets  of its tokens
    routes        of its tokens, or None, see `Pack.routes`
    rows_R        of its tokens, those whose prediction counts
    first         the pack's token that is its first
    """

    ids: Tensor
    targets: Tensor
    routes: Tensor | None
    rows_R: Tensor
    first: int
    context: Context

    @classmethod
    def none(cls, model: Transformer) -> Micro:
        """No token, for who takes part where others have a pack."""
        nothing = torch.empty(0, dtype=torch.int64, device=model.device)
        pack = Pack(nothing, nothing, nothing.float(), torch.zeros(1, dtype=torch.int64), ())
        return cls.of(model, pack)

    @classmethod
    def of(cls, model: Transformer, pack: Pack, members: Members | None = None) -> Micro:
        """members  who share the pack's tokens; None: all are this process's"""
        pack = pack.to(model.device)
        own = slice(0, pack.num_tokens)
        if members is not None:
            own = tokens_of(pack.num_tokens, members.rank, members.size)
        routes, rows = None if pack.routes is None else pack.routes[own], pack.weights[own].nonzero()[:, 0]
        return cls(pack.ids[own], pack.targets[own], routes, rows, own.start, model.context(pack, members))

    def in_layer(self, index: int, last: int) -> dict[str, Tensor | None]:
        """What layer `index` needs to know of the pack beside its activations; of the last layer only rows count."""
        rows = self.rows_R if index == last else None
        replay = None if self.routes is None else self.routes[:, index].to(torch.int64)
        return {"rows": rows, "replay": replay if rows is None or replay is None else replay[rows]}


def logprobs(model: Transformer, micro: Micro, x_RD: Tensor, head: Linear, dropout: Dropout | None = None) -> Tensor:
    """ln p of each counted target from the last layer's output. Returns (R,) float32."""
    hidden_RD = model.final_norm(x_RD)
    targets_R = micro.targets[micro.rows_R]
    if head.lora_a is None or head.lora_b is None:
        return linear_logprob(hidden_RD, head.weight, targets_R)
    # the adapter widens the inner dimension, so head and adapter are one matrix and nothing is merged
    adapted_RD = hidden_RD if dropout is None else dropout(hidden_RD, model.arch.num_layers * 8)
    wide_RD = torch.cat((hidden_RD, linear(adapted_RD, Linear(head.lora_a))), dim=-1)
    return linear_logprob(wide_RD, torch.cat((head.weight, head.lora_b), dim=-1), targets_R)


def forward_backward(
    model: Transformer,
    packs: Sequence[Pack],
    loss_of: LossOfLogprobs,
    *,
    recompute: bool,
    offload: bool = False,
    dropout_seed: int | None = None,
    experts_at_once: int | None = None,
    tokens_at_once: int | None = None,
    keep_attention: bool = False,
    loss_scale: float = 1.0,
    numbers: Sequence[int] | None = None,
    members: Members | None = None,
    at_least: int = 0,
) -> float:
    """Add the gradient of the step's loss to `model.trainable`; returns the loss.

    loss_of    called once a micro-batch that has counted rows; the parts add up to the step's loss
    recompute  keep only each layer's input and compute the layer again in backward
    offload    and have these inputs wait in the machine's memory; only with `recompute`
    dropout_seed  of this step, where the adapter has dropout
    experts_at_once  packed experts that are expanded together; None: `Transformer.experts_at_once`
    loss_scale       gradients on their way are that much larger, for a dtype in which they would be rounded to nothing;
                     those that are added to `model.trainable` are not
    tokens_at_once   of a pack, that go through a layer's experts together; None: all. Only with `recompute`
    keep_attention   and don't compute full attention over long documents again; only with `recompute`
    numbers          the packs' numbers in the step, for `loss_of` and dropout, where others are another process's
    members          who share these packs' tokens; then loss and gradients are this one's part. None: nobody
    at_least         as many micro-batches as the process with the most of them has, where experts are others' too
    """
    numbered = list(zip(range(len(packs)) if numbers is None else numbers, packs, strict=True))
    drops = {number: _dropout(model, dropout_seed, number, members) for number, _ in numbered}
    together = [numbered] if prepares_layers(model) else [[one] for one in numbered]
    if experts_at_once is None:
        tokens = sum(pack.num_tokens for pack in packs)
        experts_at_once = model.experts_at_once(tokens if tokens_at_once is None else min(tokens, tokens_at_once))
    assert recompute or not (offload or tokens_at_once or keep_attention)
    away = Offload(model.device) if offload else None
    empty = max(at_least - len(packs), 0) if model.experts_over is not None else 0
    plan = _Plan(recompute, away, experts_at_once, tokens_at_once, keep_attention, members, empty)
    if loss_scale == 1.0:
        return sum(_layer_major(model, some, loss_of, plan, drops) for some in together)
    loss = sum(_layer_major(model, some, lambda *given: loss_of(*given) * loss_scale, plan, drops) for some in together)
    for tensor in model.trainable.tensors.values():
        if tensor.grad is not None:
            tensor.grad.div_(loss_scale)
    return loss / loss_scale


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a step is to be computed, see `forward_backward`."""

    recompute: bool
    offload: Offload | None
    experts_at_once: int | None
    tokens_at_once: int | None
    keep_attention: bool
    members: Members | None
    empty: int

    def attention_of(self, layer: Layer, micro: Micro) -> KeptAttention | None:
        """Where the layer's attention leaves what it found, if that is to be kept."""
        segments = micro.context.segments
        long = segments.longest >= ATTENTION_KEPT_FROM and segments.shared is None
        return KeptAttention() if self.keep_attention and layer.window is None and long else None


def prepares_layers(model: Transformer) -> bool:
    """Whether a layer's weights take work to be ready: to be gathered, experts to be expanded or to be rounded to
    MXFP4, or trained float32 to be rounded."""
    if model.qat or model.cut:
        return True
    trains_all = bool(model.trainable.tensors) and model.lora is None
    return model.dtype != torch.float32 if trains_all else model.weights.placement != "bf16"


def _layer_major(
    model: Transformer,
    packs: Sequence[tuple[int, Pack]],
    loss_of: LossOfLogprobs,
    plan: _Plan,
    drops_of: Mapping[int, Dropout | None],
) -> float:
    """`forward_backward` of some of the micro-batches, each with its number."""
    numbers = [number for number, _ in packs]
    micros = [Micro.of(model, pack, plan.members) for _, pack in packs]
    drops = [drops_of[number] for number in numbers]
    micros += [Micro.none(model) for _ in range(plan.empty)]
    drops += [None] * plan.empty
    last = model.arch.num_layers - 1
    embedded = _Embedding(model, micros)
    xs, kept = embedded.outputs, []
    layer = None
    for index in range(model.arch.num_layers):
        # the last layer's backward comes at once, so its graph costs nothing to keep
        graph = not plan.recompute or index == last
        del layer  # before the next is there
        layer = model.fetch(index, experts_at_once=plan.experts_at_once)
        apart = nullcontext() if index == last else _RoundedApart(model, layer).left_out()
        with torch.set_grad_enabled(graph), apart:
            inputs = [x.detach().requires_grad_(graph and (index > 0 or embedded.trained)) for x in xs]
            attended = [None if graph else plan.attention_of(layer, micro) for micro in micros]
            outputs = [
                model.layer_forward(
                    layer,
                    x,
                    micro.context,
                    attend=model.attention(micro.context, found),
                    dropout=drop,
                    tokens_at_once=plan.tokens_at_once,
                    **micro.in_layer(index, last),
                )
                for x, micro, drop, found in zip(inputs, micros, drops, attended, strict=True)
            ]
        if index != last:
            layer.let_go()  # what the graph refers to expands its experts again
        away = None if graph or plan.offload is None else plan.offload.send(inputs)
        kept.append(_Kept(inputs if away is None else [], outputs if graph else None, away, attended))
        xs = outputs
    if prepares_layers(model):
        return_freed_memory(model.device)  # what the layers needed on the way; their kept activations stand between
    loss, grads = _head_backward(model, micros, xs, lambda logp, m, rows: loss_of(logp, numbers[m], rows), drops)
    model.trainable.sum_up(HEAD)
    del xs, inputs, outputs, layer
    for index in range(last, -1, -1):
        one = kept.pop()
        inputs, outputs = one.inputs, one.outputs
        if plan.offload is not None:
            inputs = plan.offload.take(one.away) if one.away is not None else inputs
            if kept and kept[-1].away is not None:
                plan.offload.call_back(kept[-1].away)  # while this layer is differentiated
        layer = None  # before the next is there
        layer = model.fetch(index, experts_at_once=plan.experts_at_once) if outputs is None else None
        for m, (x, micro) in enumerate(zip(inputs, micros, strict=True)):
            if outputs is None:
                x.requires_grad_(index > 0 or embedded.trained)
                if (found := one.attended[m]) is not None:
                    found.again = True
                y = model.layer_forward(
                    layer,
                    x,
                    micro.context,
                    attend=model.attention(micro.context, found),
                    dropout=drops[m],
                    tokens_at_once=plan.tokens_at_once,
                    values=False,
                    **micro.in_layer(index, last),
                )
            else:
                y, outputs[m] = outputs[m], None
            if y.requires_grad:
                torch.autograd.backward(y, grads[m])
            grads[m], x.grad = x.grad, None
            del y  # it holds on to the layer's input
        layer = None
        model.trainable.sum_up(f"model.layers.{index}.input_layernorm.weight")
    embedded.backward(grads)
    return loss


class _RoundedApart:
    """Keeps a layer's rounded experts out of its graph, where they were rounded for this layer alone.

    Autograd would hold them until the layer's backward, a copy for every layer. It gets a note of what it wanted
    instead; the first note that is cashed in backward rounds the matrix again, and it goes when the graph goes.
    """

    def __init__(self, model: Transformer, layer: Layer) -> None:
        self._model, self._layer = model, layer.index
        experts = {"gate_up_proj": layer.gate_up, "down_proj": layer.down}
        rounded = {name: one.weight for name, one in experts.items() if model.rounds(expert_module(layer.index, name))}
        self._of_address = {weight.data_ptr(): name for name, weight in rounded.items() if isinstance(weight, Tensor)}
        self._again: dict[str, Tensor] = {}

    def left_out(self) -> AbstractContextManager[object]:
        """The context in which the layer's forward runs."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, self._cash)

    def _note(self, tensor: Tensor) -> Tensor | tuple[str, tuple[int, ...], tuple[int, ...]]:
        name = self._of_address.get(tensor.data_ptr()) if tensor.ndim == 3 else None
        return tensor if name is None else (name, tuple(tensor.shape), tensor.stride())

    def _cash(self, note: Tensor | tuple[str, tuple[int, ...], tuple[int, ...]]) -> Tensor:
        if isinstance(note, Tensor):
            return note
        name, shape, strides = note
        if name not in self._again:
            self._again[name] = self._model.expert_weight(self._layer, name).detach()
        return self._again[name].as_strided(shape, strides)


@dataclass(slots=True)
class _Kept:
    """What a layer left for its backward: its inputs, here or away, its outputs where they have a graph, and what
    attention found where that is kept."""

    inputs: list[Tensor]
    outputs: list[Tensor | None] | None
    away: Away | None
    attended: list[KeptAttention | None]


@torch.no_grad()
def forward_logprobs(
    model: Transformer, packs: Sequence[Pack], members: Members | None = None, at_least: int = 0
) -> list[Tensor]:
    """ln p of every counted target, no gradient, layer-major too: M times (R,) float32, in the packs' order.

    members, at_least  as of `forward_backward`; each member gets what it finds of its own tokens
    """
    micros = [Micro.of(model, pack, members) for pack in packs]
    if model.experts_over is not None:
        micros += [Micro.none(model) for _ in range(at_least - len(packs))]
    xs = _embed(model, micros)
    last = model.arch.num_layers - 1
    experts_at_once = model.experts_at_once(sum(pack.num_tokens for pack in packs))
    for index in range(model.arch.num_layers):
        layer = model.fetch(index, experts_at_once=experts_at_once)
        for m, micro in enumerate(micros):
            xs[m] = model.layer_forward(layer, xs[m], micro.context, **micro.in_layer(index, last))
    head = model.head(where_it_is=True)
    return [logprobs(model, micro, x, head) for micro, x, _ in zip(micros, xs, packs, strict=False)]


@torch.no_grad()
def _embed(model: Transformer, micros: Sequence[Micro]) -> list[Tensor]:
    if not micros and EMBEDDING in model.trainable:
        model.tensor(EMBEDDING)  # other ranks have something to look up, and this one a part of it
    return [model.embed(micro.ids) for micro in micros]


class _Embedding:
    """The embedding's outputs, and its gradient where it is trained. No graph stands between, which would keep a copy
    of the whole table in memory all the way down and back."""

    def __init__(self, model: Transformer, micros: Sequence[Micro]) -> None:
        self._model, self._micros = model, micros
        self.trained = EMBEDDING in model.trainable
        self.outputs = _embed(model, micros)

    def backward(self, grads: Sequence[Tensor | None]) -> None:
        if not self.trained:
            return
        model, rows = self._model, self._model.arch.vocab_size
        for micro, grad in zip(self._micros, grads, strict=True):
            assert grad is not None
            found = torch.ops.aten.embedding_dense_backward(grad.to(model.dtype), micro.ids, rows, -1, False)
            model.trainable.add_grad(EMBEDDING, found.float())
        model.trainable.sum_up(EMBEDDING)


def _dropout(model: Transformer, seed: int | None, micro: int, members: Members | None) -> Dropout | None:
    share = 0.0 if model.lora is None else model.lora.spec.dropout
    if not share or seed is None:
        return None
    part = 0 if members is None else members.rank * 7_919  # no member's mask is another's
    return Dropout(share, (seed * 65_537 + micro) + (part << 20))


def _head_backward(
    model: Transformer,
    micros: Sequence[Micro],
    xs: Sequence[Tensor],
    loss_of: LossOfLogprobs,
    drops: Sequence[Dropout | None],
) -> tuple[float, list[Tensor]]:
    """The loss, and its gradient in the last layer's outputs."""
    head = model.head(where_it_is=True)
    loss, grads = 0.0, []
    for m, (micro, x) in enumerate(zip(micros, xs, strict=True)):
        leaf = x.detach().requires_grad_()
        if len(micro.rows_R):
            part = loss_of(logprobs(model, micro, leaf, head, drops[m]), m, micro.rows_R + micro.first)
            part.backward()
            loss += float(part.detach())
        grads.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    return loss, grads
