"""Whether an exported model is the model that was meant: logits of both on the same texts, in float32.

Both are computed by Ossia from what is on disk, the one from base and adapter, the other from the exported folder read
back, so what remains is the rounding of the changed weights and whatever went wrong. All models go through a layer
before the next one is read, and one expert at a time is expanded, for all texts at once: the memory is that of an
expert and the texts' activations, and the time that of multiplying.
Letters: T tokens, N routed rows, V vocabulary, D in, O out, J gate and up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ossia.config import Recipe
from ossia.data.dataset import in_order, open_datasets
from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.export.merge import Changes, mapped_tensor
from ossia.harmony import Renderer, Vocabulary, conversation_from_messages
from ossia.model.checkpoint import Checkpoint
from ossia.model.trainable import Trainable
from ossia.model.transformer import Context, Transformer
from ossia.model.weights import EMBEDDING, EXPERT_WEIGHTS, Weights
from ossia.ops.linear import Linear, linear
from ossia.ops.moe import Expert, Route, clamped_swiglu_only, combine
from ossia.ops.mxfp4 import BLOCK, dequantize_mxfp4

TEXTS, TOKENS_EACH = 4, 256
TOKENS_BY_LAYER = 64  # of each text, where every layer is a comparison of its own
_VOCAB_BLOCK = 4096
_CHATS = (
    ("What is the capital of France?", "The user asks for a capital.", "Paris is the capital of France."),
    ("Add 17 and 25.", "17 + 25 = 42.", "17 + 25 is 42."),
    ("Write a line of Python that squares x.", "Simple.", "`y = x ** 2`"),
    ("Sort these words: pear, fig, apple.", "Alphabetical order: apple, fig, pear.", "apple, fig, pear"),
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far one model's next-token distributions are from another's.

    positions  compared
    max_abs    largest difference of two logits
    kl         mean KL divergence, nats, of the found distribution from the expected one
    median_kl  its median, which a few tokens that a router sent elsewhere don't move
    top1       share of positions with the same likeliest token
    """

    positions: int
    max_abs: float
    kl: float
    median_kl: float
    top1: float

    def __str__(self) -> str:
        return (
            f"max |logit difference| {self.max_abs:.2e}, KL {self.kl:.2e} nats (median {self.median_kl:.2e}), "
            f"same top-1 at {self.top1:.1%} of {self.positions:,} positions"
        )


class PassingWeights(Weights):
    """Weights in float32 that stay in their files; the pages of a tensor leave memory with it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, "mmap", torch.float32, torch.device("cpu"))
        self._buffers: dict[str, Tensor] = {}

    def raw(self, name: str) -> Tensor:
        """A tensor as the file holds it, on a mapping of its own."""
        return mapped_tensor(self.checkpoint, name)

    def some(self, name: str, rows: slice | Tensor) -> Tensor:
        """Some rows of a tensor, float32."""
        return self.raw(name)[rows].float()

    def buffer(self, projection: str, shape: Sequence[int]) -> Tensor:
        """Room for one expert's matrix, the same again each time: new pages would take longer than their numbers."""
        held = self._buffers.get(projection)
        if held is None or held.shape != tuple(shape):
            held = self._buffers[projection] = torch.empty(tuple(shape))
        return held

    def expert_matrix(self, layer: int, projection: str, expert: int) -> tuple[Tensor, bool]:
        """One expert's matrix and whether its outputs take turns, gate and up; (D, O) float32, good until the next."""
        name, one = f"model.layers.{layer}.mlp.experts.{projection}", slice(expert, expert + 1)
        paired = projection == "gate_up_proj"
        if self.checkpoint.layout == "bf16":
            matrix_DO = self.raw(name)[expert]
            return self.buffer(projection, matrix_DO.shape).copy_(matrix_DO), paired
        blocks, scales = (self.raw(f"{name}_{part}")[one] for part in ("blocks", "scales"))
        out_1OD = self.buffer(projection, (1, scales.shape[1], scales.shape[2] * BLOCK))
        return dequantize_mxfp4(blocks, scales, torch.float32, out_1OD)[0].t(), paired


def changed_model(weights: PassingWeights, changes: Changes | None = None) -> Transformer:
    """A model of weights that stay in their files, with what training changed."""
    model = Transformer(
        weights, lora=None if changes is None else changes.lora, qat=changes is not None and changes.qat
    )
    if changes is not None and changes.tensors:
        model.trainable = Trainable(changes.tensors)
    return model


@torch.no_grad()
def compare(expected: Transformer, others: Sequence[Transformer], packs: Sequence[Pack]) -> list[Agreement]:
    """Each of the others against the expected model, at every position of the packs.

    All of them have `PassingWeights`. Experts that two models share, the same weights under another adapter, are
    expanded once for both
    """
    models = (expected, *others)
    by_pack = [_tallied(models, _hidden(models, pack)) for pack in packs]
    found = []
    for results in zip(*by_pack, strict=True):
        kl, same = (torch.cat([result[part] for result in results]) for part in (0, 1))
        max_abs = max(float(result[2]) for result in results)
        found.append(Agreement(len(kl), max_abs, float(kl.mean()), float(kl.median()), float(same.float().mean())))
    return found


@torch.no_grad()
def cost_by_layer(expected: Transformer, found: Transformer, packs: Sequence[Pack]) -> list[float]:
    """What each layer of another model costs alone: the mean KL divergence, nats, from the expected model of one that
    has this layer of the other and is the expected one otherwise.

    Both have `PassingWeights`. With L layers it takes the time of L / 2 models
    """
    models = [expected] * (expected.arch.num_layers + 1)
    by_pack = [_tallied(models, _hidden_by_layer(expected, found, pack)) for pack in packs]
    return [float(torch.cat([kl for kl, _, _ in results]).mean()) for results in zip(*by_pack, strict=True)]


def _hidden_by_layer(expected: Transformer, found: Transformer, pack: Pack) -> list[Tensor]:
    """Final hidden states, (T, D): the expected model's, and those with each one of the other's layers in it."""
    context, states = expected.context(pack), [_embedded(expected, pack.ids)]
    for index in range(expected.arch.num_layers):
        states = _through_layer([*[expected] * len(states), found], index, [*states, states[0]], context)
    return [expected.final_norm(x_TD) for x_TD in states]


def _hidden(models: Sequence[Transformer], pack: Pack) -> list[Tensor]:
    """Each model's final hidden states, (T, D): all of them through a layer before the next, expert by expert."""
    context = models[0].context(pack)
    states = [_embedded(model, pack.ids) for model in models]
    for index in range(models[0].arch.num_layers):
        states = _through_layer(models, index, states, context)
    return [model.final_norm(x_TD) for model, x_TD in zip(models, states, strict=True)]


def _through_layer(
    models: Sequence[Transformer], index: int, states: Sequence[Tensor], context: Context
) -> list[Tensor]:
    waiting = list[_Waiting]()
    for model, x_TD in zip(models, states, strict=True):
        model.layer_forward(model.fetch(index), x_TD, context, mixture=partial(_wait, waiting))
    return _mixtures(models, index, waiting)


def _embedded(model: Transformer, ids_T: Tensor) -> Tensor:
    if EMBEDDING in model.trainable:
        return model.embed(ids_T)
    return _weights(model).some(EMBEDDING, ids_T)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What a layer's experts get: the arguments of `ops.moe.mixture`."""

    residual_TD: Tensor
    x_TD: Tensor
    routing: Route
    gate_up: Expert
    down: Expert
    limit: float
    alpha: float


def _wait(waiting: list[_Waiting], residual_TD: Tensor, *arguments: Any) -> Tensor:
    *rest, _ = arguments  # dropout, of which there is none
    waiting.append(_Waiting(residual_TD, *rest))
    return residual_TD


def _mixtures(models: Sequence[Transformer], index: int, waiting: Sequence[_Waiting]) -> list[Tensor]:
    """Each model's rows through a layer's experts, one expert at a time; (T, D) each."""
    gathered_ND = [each.x_TD[each.routing.token_N] for each in waiting]
    ends = [[0, *each.routing.ends_E.tolist()] for each in waiting]
    out_ND = [torch.empty_like(x_ND) for x_ND in gathered_ND]
    for expert in range(models[0].arch.num_experts):
        rows = [slice(*bounds[expert : expert + 2]) for bounds in ends]
        inner = [x_ND[mine] for x_ND, mine in zip(gathered_ND, rows, strict=True)]
        for projection in EXPERT_WEIGHTS:
            up = projection == "gate_up_proj"
            parts = [each.gate_up if up else each.down for each in waiting]
            inner = _projected(models, index, projection, expert, parts, inner)
            if up:
                inner = [
                    clamped_swiglu_only(h_NJ, each.limit, each.alpha) for h_NJ, each in zip(inner, waiting, strict=True)
                ]
        for out, mine, y in zip(out_ND, rows, inner, strict=True):
            out[mine] = y
    return [each.residual_TD + combine(y_ND, each.routing) for each, y_ND in zip(waiting, out_ND, strict=True)]


def _projected(
    models: Sequence[Transformer],
    index: int,
    projection: str,
    expert: int,
    parts: Sequence[Expert],
    inputs: Sequence[Tensor],
) -> list[Tensor]:
    """Rows of each model through one expert's projection, bias and adapter; gate rows before up rows."""
    name = f"model.layers.{index}.mlp.experts.{projection}"
    outputs: dict[int, Tensor] = {}
    for first, model in enumerate(models):
        if first in outputs:
            continue
        alike = [first]
        if model.rounds(name):
            packed = model.packed_experts(index, projection, slice(expert, expert + 1))
            matrix_DO = packed.expand(torch.float32)[0].t()
            paired = projection == "gate_up_proj" and name not in model.trainable
        elif name in model.trainable:
            matrix_DO, paired = model.trainable.tensors[name][expert].t(), False
        else:
            alike = [n for n, other in enumerate(models) if _reads(other, model.weights, name)]
            matrix_DO, paired = _weights(model).expert_matrix(index, projection, expert)
        y_NO = torch.cat([inputs[n] for n in alike]) @ matrix_DO
        if paired:
            y_NO = torch.cat((y_NO[:, 0::2], y_NO[:, 1::2]), dim=1)
        outputs |= zip(alike, y_NO.split([len(inputs[n]) for n in alike]), strict=True)
    found = []
    for number, (x_ND, part) in enumerate(zip(inputs, parts, strict=True)):
        y_NO = outputs[number] + part.bias[expert]
        if part.lora_a is not None and part.lora_b is not None:
            y_NO = torch.addmm(y_NO, x_ND @ part.lora_a[expert].t(), part.lora_b[expert].t())
        found.append(y_NO)
    return found


def _reads(model: Transformer, weights: Weights, name: str) -> bool:
    """Whether a model's experts are those of some weights as they are."""
    return model.weights is weights and name not in model.trainable and not model.rounds(name)


def _weights(model: Transformer) -> PassingWeights:
    assert isinstance(model.weights, PassingWeights)
    return model.weights


class _Sums:
    """A distribution over the vocabulary as it grows block by block: the sum of its exponentials, and its largest."""

    def __init__(self, rows: int) -> None:
        self.largest_T = torch.full((rows,), -torch.inf)
        self.top_T = torch.full((rows,), -1)
        self.sum_T = torch.zeros(rows, dtype=torch.float64)

    def add(self, start: int, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
        """Logits from id `start` on. Returns their exponentials over the largest so far's (T, V), and by what those
        of the blocks before have to be multiplied for that (T,)."""
        largest_T, top_T = logits_TV.max(-1)
        self.top_T = torch.where(largest_T > self.largest_T, start + top_T, self.top_T)
        before_T, self.largest_T = self.largest_T, torch.maximum(self.largest_T, largest_T)
        fading_T = (before_T - self.largest_T).exp()
        shares_TV = (logits_TV - self.largest_T[:, None]).exp_()
        self.sum_T = self.sum_T * fading_T + shares_TV.sum(-1, dtype=torch.float64)
        return shares_TV, fading_T

    @property
    def log_sum_T(self) -> Tensor:
        return self.largest_T + self.sum_T.log()


class _Tally:
    """One comparison as it grows, block by block of the vocabulary: KL = sum p (l - m) - log sum l + log sum m."""

    def __init__(self, rows: int) -> None:
        self.sums = _Sums(rows)
        self.gap_T = torch.zeros(rows, dtype=torch.float64)
        self.max_abs = torch.zeros(())

    def add(self, start: int, want_TV: Tensor, have_TV: Tensor, shares_TV: Tensor, fading_T: Tensor) -> None:
        """A block of both; the last two as `_Sums.add` gave them for the expected one."""
        self.sums.add(start, have_TV)
        apart_TV = want_TV - have_TV
        self.max_abs = torch.maximum(self.max_abs, apart_TV.abs().max())
        self.gap_T = self.gap_T * fading_T + (apart_TV.mul_(shares_TV)).sum(-1, dtype=torch.float64)

    def result(self, want: _Sums) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's KL and whether its likeliest token is the same, and the largest difference."""
        kl_T = self.gap_T / want.sum_T - want.log_sum_T + self.sums.log_sum_T
        return kl_T.clamp_min(0), self.sums.top_T == want.top_T, self.max_abs


def _tallied(models: Sequence[Transformer], states: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Every model but the first against the first: over blocks of the vocabulary, each expanded once."""
    num_rows, vocab_size = len(states[0]), models[0].arch.vocab_size
    want, tallies = _Sums(num_rows), [_Tally(num_rows) for _ in models[1:]]
    for start in range(0, vocab_size, _VOCAB_BLOCK):
        rows = slice(start, min(start + _VOCAB_BLOCK, vocab_size))
        want_TV, *have_TV = _logits(models, states, rows)
        shares_TV, fading_T = want.add(start, want_TV)
        for tally, logits_TV in zip(tallies, have_TV, strict=True):
            tally.add(start, want_TV, logits_TV, shares_TV, fading_T)
    return [tally.result(want) for tally in tallies]


def _logits(models: Sequence[Transformer], states: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """Each model's logits of some ids, (T, V) float32."""
    name, held = "lm_head.weight", dict[int, Tensor]()
    found = []
    for model, x_TD in zip(models, states, strict=True):
        if name in model.trainable:
            head_VD = model.trainable.tensors[name][rows].float()
        else:
            if id(model.weights) not in held:
                held[id(model.weights)] = _weights(model).some(name, rows)
            head_VD = held[id(model.weights)]
        a_rD, b_Vr = (None, None) if model.lora is None else model.lora.pair("lm_head", torch.float32)
        found.append(linear(x_TD, Linear(head_VD, None, a_rD, None if b_Vr is None else b_Vr[rows])))
    return found


def held_out_texts(recipe: Recipe, vocab: Vocabulary, tokens_each: int = TOKENS_EACH) -> list[Pack]:
    """The first held-out samples of a run, each cut to some tokens; [] where it holds none out.

    Raises  DataError, MissingExtraError where its data isn't here any more, or can't be read
    """
    if not recipe.has_eval:
        return []
    return _packs(in_order(open_datasets(recipe, vocab).held_out), tokens_each)


def fixed_texts(vocab: Vocabulary, tokens_each: int = TOKENS_EACH) -> list[Pack]:
    """Four short conversations, each cut to some tokens."""
    return _packs(_rendered(vocab), tokens_each)


def _rendered(vocab: Vocabulary) -> Iterator[Sample]:
    renderer = Renderer(vocab)
    for number, (question, thinking, answer) in enumerate(_CHATS):
        chat = [{"role": "user", "content": question}, {"role": "assistant", "thinking": thinking, "content": answer}]
        for rendered in renderer.samples(conversation_from_messages(chat)):
            yield Sample.from_rendered(rendered, f"fixed text {number + 1}")


def _packs(samples: Iterable[Sample], tokens_each: int) -> list[Pack]:
    """All of them in one pack, so that a layer is read once for all; [] of none."""
    texts = [sample.truncated(tokens_each) for sample in islice(samples, TEXTS)]
    return [Pack.from_samples(texts)] if texts else []
