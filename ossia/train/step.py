"""One optimizer step, and held-out loss: the loss is a weighted sum over one denominator.

Letters: R rows whose prediction counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from ossia.data.pack import Pack
from ossia.model.budget import choose as budget
from ossia.model.budget.work import Work, tokens_at_once
from ossia.model.cut.trained import TrainedParts
from ossia.model.open import DTYPE_NAMES, memory_of
from ossia.model.transformer import Transformer
from ossia.ops.loss import weighted_nll
from ossia.ops.memory import return_freed_memory
from ossia.train.optim import AdamW
from ossia.train.ranks.gradients import agree_on_parts, share, sum_gradients
from ossia.train.schedule import LossOfLogprobs, forward_backward, forward_logprobs, prepares_layers

if TYPE_CHECKING:
    from ossia.train.ranks.world import World

_STEPS_TO_TRIM = 16  # that a process may grow for; what a step gives back, the next one takes again page by page
Recompute = Literal["auto", "always", "never", "offload"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did.

    loss       before the update: nats per unit of weight, or what `loss_of` gives
    weight     sum of the weights, the loss's denominator
    tokens     all tokens that went through the model; there is no padding
    trained    those whose prediction counted
    grad_norm  global L2 norm before clipping
    """

    loss: float
    weight: float
    tokens: int
    trained: int
    grad_norm: float


@dataclass(frozen=True, slots=True)
class EvalLoss:
    """Held-out loss in nats per unit of weight, and the counts behind it."""

    loss: float
    weight: float
    tokens: int
    trained: int


def train_step(
    model: Transformer,
    optimizer: AdamW,
    packs: Sequence[Pack],
    *,
    lr: float,
    clip: float | None,
    recompute: bool,
    offload: bool = False,
    tokens_at_once: int | None = None,
    keep_attention: bool = False,
    dropout_seed: int | None = None,
    loss_of: LossOfLogprobs | None = None,
    world: World | None = None,
) -> StepResult:
    """Forward, backward and update over any number of micro-batches.

    loss_of  each micro-batch's part of the loss; None: of supervised fine-tuning, -ln p weighted by the packs' weights
    world    the ranks that take the step together, each with its share of these packs; None: this process alone
    Raises  RunError before anything is changed if the loss or a gradient is missing or not finite
    """
    weight = float(sum(pack.weights.double().sum() for pack in packs))
    numbers = list(range(len(packs))) if world is None else share(packs, world.size)[world.rank]

    def weighted(logp_R: Tensor, micro: int, rows_R: Tensor) -> Tensor:
        weights_R = packs[micro].weights.to(logp_R.device)[rows_R]
        return weighted_nll(logp_R, weights_R, weight)

    def gradients(loss_scale: float) -> float:
        model.trainable.zero_grad()
        if not numbers and not model.cut:
            return 0.0
        return forward_backward(
            model,
            [packs[number] for number in numbers],
            loss_of or weighted,
            recompute=recompute,
            offload=offload,
            tokens_at_once=tokens_at_once,
            keep_attention=keep_attention,
            dropout_seed=dropout_seed,
            loss_scale=loss_scale,
            numbers=numbers,
        )

    if world is not None and model.cut:
        world.gather(None)  # who isn't here yet may be busy, and is waited for as long as that takes
    if model.dtype == torch.float16:
        loss = _without_overflow(model, packs, gradients, world if model.cut else None)
    else:
        loss = gradients(1.0)
    if isinstance(model.trainable, TrainedParts):
        assert world is not None
        loss = agree_on_parts(world, model.trainable, loss, step=optimizer.num_updates + 1)
    elif world is not None:
        loss = sum_gradients(world, model.trainable.tensors, loss, step=optimizer.num_updates + 1)
    grad_norm = optimizer.update(loss=loss, lr=lr, clip=clip)
    # packs that went one after the other through the same memory will do so again
    if len(numbers) <= 1 or prepares_layers(model) or optimizer.num_updates % _STEPS_TO_TRIM == 0:
        return_freed_memory(model.device)
    tokens, trained = (sum(counts) for counts in zip(*((p.num_tokens, p.num_trained) for p in packs), strict=True))
    return StepResult(loss, weight, tokens, trained, grad_norm)


_MOST_HALVINGS = 24


def _without_overflow(
    model: Transformer, packs: Sequence[Pack], gradients: Callable[[float], float], world: World | None
) -> float:
    """Gradients in float16, which holds numbers from 6e-8 to 65,504: with a loss scaled up, and less if one overflows.

    The scale begins at the number of predictions, which makes each of them count as much as it would alone; while a
    gradient isn't finite, the step is computed again with half of it. It doesn't depend on the steps before. Where no
    scale helps, the gradients are left as they are, for the optimizer to refuse.
    gradients  (scale) -> loss; puts gradients that are free of the scale on what is trained
    world      ranks that gather weights from each other, so that what one computes again all do
    """
    scale = 2.0 ** math.ceil(math.log2(max(1, sum(pack.num_trained for pack in packs))))
    for _ in range(_MOST_HALVINGS):
        loss = gradients(scale)
        grads = [tensor.grad for tensor in model.trainable.tensors.values() if tensor.grad is not None]
        done = not math.isfinite(loss) or all(bool(grad.isfinite().all()) for grad in grads)
        if done if world is None else all(world.gather(done)):
            break
        scale /= 2
    return loss


def evaluate_loss(model: Transformer, packs: Sequence[Pack], world: World | None = None) -> EvalLoss:
    """The loss that `train_step` would see, without gradients and without dropout; of ranks, each computes a share."""
    total = 0.0
    own = packs if world is None else [packs[number] for number in share(packs, world.size)[world.rank]]
    if world is not None and model.cut:
        world.gather(None)
    for logp_R, pack in zip(forward_logprobs(model, own) if own or model.cut else (), own, strict=True):
        weights_R = pack.weights[pack.weights > 0].to(logp_R.device)
        total -= float((weights_R.double() * logp_R.double()).sum())
    if world is not None:
        total = math.fsum(world.gather(total))
    weight = float(sum(pack.weights.double().sum() for pack in packs))
    tokens, trained = (sum(counts) for counts in zip(*((p.num_tokens, p.num_trained) for p in packs), strict=True))
    return EvalLoss(total / weight, weight, tokens, trained)


class How(NamedTuple):
    """How a step goes, by the names that `train_step` has for it."""

    recompute: bool
    offload: bool
    tokens_at_once: int | None
    keep_attention: bool


def how_to_step(model: Transformer, recompute: Recompute, tokens: int, tokens_per_pack: int, longest: int) -> How:
    """What a run decides before its first step, of steps of `tokens` tokens and documents of up to `longest`."""
    if keeps_activations(model, recompute, tokens, tokens_per_pack):
        return How(recompute=False, offload=False, tokens_at_once=None, keep_attention=False)
    offload = offloads(model, recompute, tokens)
    keep_attention = not offload and keeps_attention(model, tokens, tokens_per_pack, longest)
    return How(True, offload, chunk_of_tokens(model), keep_attention)


def keeps_activations(model: Transformer, recompute: Recompute, tokens: int, tokens_per_pack: int) -> bool:
    """Whether a step of `tokens` tokens keeps every layer's graph instead of computing each layer twice.

    `auto` decides by what the graphs take, see `budget.choose.keeps_activations`. Of cut weights a graph would keep
    every gathered layer, so their layers are always computed again.
    """
    if model.cut:
        return False
    if recompute != "auto":
        return recompute == "never"
    packs = max(tokens // tokens_per_pack, 1)
    work = work_of(model, pack=min(tokens, tokens_per_pack), packs=packs, recompute=False)
    return budget.keeps_activations(work, memory_of(model.device))


def offloads(model: Transformer, recompute: Recompute, tokens: int) -> bool:
    """Whether layers' inputs wait in the machine's memory; asked where `keeps_activations` says no.

    `auto` decides by what they take, see `budget.choose.offloads`. The numbers are the same.
    """
    if recompute != "auto":
        return recompute == "offload"
    return budget.offloads(work_of(model, pack=tokens, packs=1, recompute=True), memory_of(model.device))


def keeps_attention(model: Transformer, tokens: int, tokens_per_pack: int, longest: int) -> bool:
    """Whether full attention over documents of up to `longest` tokens is computed once; asked where layers are computed
    again and their inputs stay. `budget.choose.keeps_attention` decides; the numbers are the same."""
    work = work_of(model, pack=min(tokens, tokens_per_pack), packs=max(tokens // tokens_per_pack, 1), recompute=True)
    return budget.keeps_attention(replace(work, longest=min(longest, work.pack)), memory_of(model.device))


def chunk_of_tokens(model: Transformer) -> int | None:
    """How many tokens go through a layer's experts together where activations are computed again; None: all, on a CPU.

    On a GPU what `tokens_at_once` makes of what is free there, so that a long pack needs no more than a short one.
    """
    if model.device.type != "cuda":
        return None
    return tokens_at_once(model.arch, model.dtype.itemsize, memory_of(model.device).gpu_free)


def work_of(model: Transformer, *, pack: int, packs: int, recompute: bool) -> Work:
    """A step with a model, as the budget knows it: so many packs of so many tokens, all of them counted."""
    return Work(
        model.arch,
        model.weights.checkpoint.layout,
        model.weights.placement,
        "cuda" if model.device.type == "cuda" else "cpu",
        model.kernels,
        DTYPE_NAMES[model.dtype],
        None if model.lora is None else {target: rank for target, (rank, _) in model.lora.spec.targets.items()},
        pack=pack,
        packs=packs,
        dropout=model.lora is not None and model.lora.spec.dropout > 0,
        recompute=recompute,
        on_host=model.weights.on_host,
        qat=model.qat,
    )
