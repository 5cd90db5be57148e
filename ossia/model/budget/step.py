"""The fullest moment of a training step, and what takes how many bytes then.

A step has few moments that can be the fullest: the last layer's forward, the loss, the last layer's backward, where
layers are computed again the backward of the one before it, and the update. Each is added up; the largest counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ossia.model.budget.layer import ATTENTION, LayerBytes
from ossia.model.budget.weights import HEAD, WeightBytes, trained_by_place, trained_numbers
from ossia.model.budget.work import Work
from ossia.sizes import ATTENTION_KEPT_FROM, GPU_ROW_BLOCK, GPU_VOCAB_BLOCK, ROW_BLOCK, VOCAB_BLOCK

Part = Literal["scratch", "adapter copies", "gradients", "activations", "one layer", "loss", "pack"]
Moment = Literal["forward", "loss", "backward", "recomputed layer", "update"]


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What a step needs beside weights, what is trained and its optimizer's state, at its fullest moment.

    scratch         a layer's experts, expanded; weights cast to the activations' type
    adapter copies  what is trained, in the activations' type
    gradients       float32
    activations     every layer's input, or its graph
    one layer       what a layer needs while it is computed or differentiated
    loss            a chunk of logits, and what is summed over them
    pack            token ids, positions, masks
    """

    moment: Moment
    parts: Mapping[Part, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def step_bytes(work: Work) -> StepBytes:
    """The fullest moment of a step."""
    return max(step_moments(work), key=lambda moment: moment.total)


def step_moments(work: Work) -> list[StepBytes]:
    """The moments of a step that can be the fullest."""
    last = work.arch.num_layers - 1
    moments = [_forward(work), _loss(work), _update(work)]
    # what is kept gets less from layer to layer, gradients get more: one end or the other is the fullest
    moments += [_backward(work, index) for index in ({last} if work.recompute else {0, last})]
    moments += [_recomputed(work, index) for index in ({0, last - 1} if work.recompute and last else ())]
    return moments


def graph_bytes_per_token(work: Work) -> int:
    """What autograd keeps for a token over all layers, their inputs included."""
    layers = (LayerBytes(work, window, work.pack, work.pack) for window in _windows(work))
    return sum(layer.kept for layer in layers) // work.pack + work.arch.num_layers * _x(work)


def _windows(work: Work) -> list[int | None]:
    a = work.arch
    return [a.sliding_window if kind == "sliding_attention" else None for kind in a.layer_types]


def _x(work: Work) -> int:
    """Bytes of a token's activations between layers."""
    return work.arch.hidden_size * work.residual_size


def _layer(work: Work, index: int) -> LayerBytes:
    last = index == work.arch.num_layers - 1
    return LayerBytes(work, _windows(work)[index], work.pack, work.rows if last else work.pack)


def _behind(work: Work, upto: int) -> int:
    """Bytes that layers before `upto` leave for backward, over all packs: inputs, or inputs and graphs.

    Of inputs that wait in the machine's memory one is on its way.
    """
    attention = attention_bytes(work, upto) if work.keep_attention else 0
    each = (min(upto, 1) if work.offload else upto) * work.pack * _x(work)
    if not work.recompute:
        each += sum(_layer(work, index).kept for index in range(upto))
        if upto and work.ranks is not None and not work.adapts(*ATTENTION):  # nothing before it wants a gradient
            each -= _layer(work, 0).kept_attention
    return each * work.together + attention


def attention_bytes(work: Work, layers: int) -> int:
    """What full attention of the first `layers` layers finds, over the packs that go through them together."""
    if work.longest < ATTENTION_KEPT_FROM:
        return 0
    a = work.arch
    token = a.num_heads * (a.head_dim * work.size + 4)
    return _windows(work)[:layers].count(None) * work.pack * token * work.together


def _copies(work: Work, *, all_layers: bool) -> int:
    """Of what is trained, in the activations' type: of a layer, or of all whose graph is there."""
    if work.ranks is None and work.size == 4:
        return 0
    layer, head, embedding = trained_by_place(work)
    return work.size * (layer * (work.arch.num_layers if all_layers else 1) + head + embedding)


def _scratch(work: Work) -> int:
    """A layer's experts expanded, and its other weights where they have to be cast or fetched."""
    if work.ranks is None and not work.qat:
        return 0
    w = WeightBytes.of(work.arch, work.layout, work.dtype)
    found = w.layer_expanded if work.expands else 0
    if found and work.experts_at_once < work.arch.num_experts and not work.qat:
        # gate_up's, the larger one; on a CPU both projections have a room of their own
        rooms = 3 if work.device == "cpu" and work.layout == "mxfp4" else 2
        found = w.layer_expanded * rooms // 3 * work.experts_at_once // work.arch.num_experts
    if _casts(work):  # but for norms, biases and the router, which are small
        found += (w.other - 2 * w.embedding) * work.size // 2 // work.arch.num_layers
    return found


def _casts(work: Work) -> bool:
    """Whether weights other than the experts' are copied each time they are used."""
    if work.placement == "bf16":
        return False
    return work.dtype != "bfloat16" or (work.device == "cuda" and work.placement == "mmap")


def _pack_bytes(work: Work) -> int:
    """Ids, targets, weights, positions, documents, rows, rotary tables, masks of the blocks."""
    layers = {LayerBytes(work, window, work.pack, work.pack).block for window in _windows(work)} - {None}
    masks = sum(2 * block for block in layers if block)
    return work.pack * (6 * 8 + 4 + work.arch.head_dim * work.size + masks) * work.together


def _parts(
    work: Work, moment: Moment, *, activations: int, one_layer: int = 0, loss: int = 0, gradients: int, scratch: int
) -> StepBytes:
    copies = _copies(work, all_layers=not work.recompute)
    parts: dict[Part, int] = {
        "scratch": scratch,
        "adapter copies": copies,
        "gradients": gradients,
        "activations": activations,
        "one layer": one_layer,
        "loss": loss,
        "pack": _pack_bytes(work),
    }
    return StepBytes(moment, parts)


def _gradients(work: Work, index: int) -> int:
    """Float32, half-way through the backward of layer `index`: of its own matrices a third is there, down_proj's.

    Of packs that have gone all the way before this one there are all.
    """
    layer, head, _ = trained_by_place(work)
    mine = head + layer * (work.arch.num_layers - 1 - index) + layer // 3
    return max(4 * mine, _earlier_gradients(work))


def _earlier_gradients(work: Work) -> int:
    return 4 * trained_numbers(work) if work.together < work.packs else 0


def _forward(work: Work) -> StepBytes:
    """The last layer's forward, which has a graph; the last pack through it finds the others' graphs and results."""
    last = work.arch.num_layers - 1
    layer, others = _layer(work, last), work.together - 1
    done = others * (layer.kept + work.rows * _x(work))
    activations = _behind(work, last) + work.together * work.pack * _x(work)
    return _parts(
        work,
        "forward",
        activations=activations + done,
        one_layer=layer.forward_with_graph,
        gradients=_earlier_gradients(work),
        scratch=_scratch(work),
    )


def _after_last_layer(work: Work) -> int:
    last = work.arch.num_layers - 1
    each = work.pack * _x(work) + _layer(work, last).kept + work.rows * _x(work)
    return _behind(work, last) + work.together * each


def _loss(work: Work) -> StepBytes:
    gradients = _earlier_gradients(work)
    if work.ranks is None:
        gradients = max(gradients, 4 * work.arch.vocab_size * work.arch.hidden_size)
    return _parts(
        work,
        "loss",
        activations=_after_last_layer(work),
        loss=loss_bytes(work) + (work.together - 1) * work.rows * _x(work),
        gradients=gradients,
        scratch=_scratch(work) if work.experts_at_once == work.arch.num_experts else 0,
    )


def loss_bytes(work: Work) -> int:
    """What the loss of a pack takes: see `ops.loss`."""
    a, size = work.arch, work.size
    block_rows, block_vocab = (ROW_BLOCK, VOCAB_BLOCK) if work.device == "cpu" else (GPU_ROW_BLOCK, GPU_VOCAB_BLOCK)
    block = min(block_rows, work.rows)
    width = a.hidden_size + (work.ranks or {}).get("lm_head", 0)
    matrix = a.vocab_size * width
    blocks = min(block_vocab, a.vocab_size) + (a.vocab_size % block_vocab if a.vocab_size > block_vocab else 0)
    walk = block * blocks * (4 if work.dtype == "float16" else size)  # the last, smaller block has its own buffer
    sums = block * width * (4 + 4 + size)
    found = work.rows * (2 * width * size + 4 * 4) + walk + sums
    found += work.rows * 4  # 1 / root mean square of the final norm
    if work.adapts("lm_head"):
        copied = work.ranks is not None or size != 4
        found += matrix * size * copied  # with the adapter beside it, or in the activations' type
        gradient = matrix * 4 * (work.ranks is not None)  # of all weights it is among the gradients
        products = block * min(block_vocab, a.vocab_size) * (4 + size * (size != 4))
        found = max(found, found - walk - sums + gradient + max(products, matrix * size * (size != 4)))
    elif HEAD in work.on_host:  # a block is computed with while the next one arrives
        found += 2 * min(block_vocab, a.vocab_size) * width * size
    elif _casts(work):
        found += matrix * size
    return found


def _backward(work: Work, index: int) -> StepBytes:
    """A layer's backward from its graph: of the first pack, when the others' graphs are still there."""
    layer, x = _layer(work, index), work.pack * _x(work)
    others = (work.together - 1) * (layer.kept + 2 * layer.rows * _x(work))
    return _parts(
        work,
        "backward",
        activations=_behind(work, index) + work.together * x + others,
        one_layer=layer.backward,
        gradients=_gradients(work, index),
        scratch=_scratch(work),
    )


def _recomputed(work: Work, index: int) -> StepBytes:
    """A layer computed again for its backward."""
    layer, x = _layer(work, index), work.pack * _x(work)
    return _parts(
        work,
        "recomputed layer",
        activations=_behind(work, index) + 2 * work.together * x,  # its inputs, and the gradients of its results
        one_layer=max(layer.forward_with_graph, layer.backward - x),
        gradients=_gradients(work, index),
        scratch=_scratch(work),
    )


def _update(work: Work) -> StepBytes:
    """All gradients are there, and nothing else."""
    parts: dict[Part, int] = {"gradients": 4 * trained_numbers(work), "pack": _pack_bytes(work)}
    return StepBytes("update", parts)
