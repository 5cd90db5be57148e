"""One optimizer step, and held-out loss: the loss is a weighted sum over one denominator.

Letters: R rows whose prediction counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ossia.data.pack import Pack
from ossia.model.arch import Arch
from ossia.model.transformer import Transformer, tokens_at_once
from ossia.ops.loss import weighted_nll
from ossia.ops.memory import machine_memory, return_freed_memory
from ossia.train.optim import AdamW
from ossia.train.schedule import LossOfLogprobs, forward_backward, forward_logprobs, prepares_layers

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
    dropout_seed: int | None = None,
    loss_of: LossOfLogprobs | None = None,
) -> StepResult:
    """Forward, backward and update over any number of micro-batches.

    loss_of  each micro-batch's part of the loss; None: of supervised fine-tuning, -ln p weighted by the packs' weights
    Raises  RunError before anything is changed if the loss or a gradient is missing or not finite
    """
    weight = float(sum(pack.weights.double().sum() for pack in packs))

    def weighted(logp_R: Tensor, micro: int, rows_R: Tensor) -> Tensor:
        weights_R = packs[micro].weights.to(logp_R.device)[rows_R]
        return weighted_nll(logp_R, weights_R, weight)

    def gradients(loss_scale: float) -> float:
        model.trainable.zero_grad()
        return forward_backward(
            model,
            packs,
            loss_of or weighted,
            recompute=recompute,
            offload=offload,
            tokens_at_once=tokens_at_once,
            dropout_seed=dropout_seed,
            loss_scale=loss_scale,
        )

    loss = gradients(1.0) if model.dtype != torch.float16 else _without_overflow(model, packs, gradients)
    grad_norm = optimizer.update(loss=loss, lr=lr, clip=clip)
    # packs that went one after the other through the same memory will do so again
    if len(packs) == 1 or prepares_layers(model) or optimizer.num_updates % _STEPS_TO_TRIM == 0:
        return_freed_memory(model.device)
    tokens, trained = (sum(counts) for counts in zip(*((p.num_tokens, p.num_trained) for p in packs), strict=True))
    return StepResult(loss, weight, tokens, trained, grad_norm)


_MOST_HALVINGS = 24


def _without_overflow(model: Transformer, packs: Sequence[Pack], gradients: Callable[[float], float]) -> float:
    """Gradients in float16, which holds numbers from 6e-8 to 65,504: with a loss scaled up, and less if one overflows.

    The scale begins at the number of predictions, which makes each of them count as much as it would alone; while a
    gradient isn't finite, the step is computed again with half of it. It doesn't depend on the steps before. Where no
    scale helps, the gradients are left as they are, for the optimizer to refuse.
    gradients  (scale) -> loss; puts gradients that are free of the scale on what is trained
    """
    scale = 2.0 ** math.ceil(math.log2(max(1, sum(pack.num_trained for pack in packs))))
    for _ in range(_MOST_HALVINGS):
        loss = gradients(scale)
        grads = [tensor.grad for tensor in model.trainable.tensors.values() if tensor.grad is not None]
        if not math.isfinite(loss) or all(bool(grad.isfinite().all()) for grad in grads):
            break
        scale /= 2
    return loss


def evaluate_loss(model: Transformer, packs: Sequence[Pack]) -> EvalLoss:
    """The loss that `train_step` would see, without gradients and without dropout."""
    total = 0.0
    for logp_R, pack in zip(forward_logprobs(model, packs), packs, strict=True):
        weights_R = pack.weights[pack.weights > 0].to(logp_R.device)
        total -= float((weights_R.double() * logp_R.double()).sum())
    weight = float(sum(pack.weights.double().sum() for pack in packs))
    tokens, trained = (sum(counts) for counts in zip(*((p.num_tokens, p.num_trained) for p in packs), strict=True))
    return EvalLoss(total / weight, weight, tokens, trained)


def keeps_activations(model: Transformer, recompute: Recompute, tokens: int, tokens_per_pack: int) -> bool:
    """Whether a step of `tokens` tokens keeps every layer's graph instead of computing each layer twice.

    `auto` keeps them where the estimate below stays under half of the GPU's free memory; on a CPU under a fifth of the
    machine's, and only where experts are expanded in memory anyway. Either way the numbers are the same.
    """
    if recompute != "auto":
        return recompute == "never"
    kept_at_once = tokens if prepares_layers(model) else min(tokens, tokens_per_pack)
    needed = kept_at_once * graph_bytes_per_token(model)
    if model.device.type == "cuda":
        return needed < torch.cuda.mem_get_info(model.device)[0] // 2
    return model.weights.placement == "bf16" and needed < machine_memory()[0] // 5


def offloads(model: Transformer, recompute: Recompute, tokens: int) -> bool:
    """Whether layers' inputs wait in the machine's memory; asked where `keeps_activations` says no.

    `auto` sends them there where those of a step of `tokens` tokens take more than half of a GPU's free memory. The
    numbers are the same.
    """
    if recompute != "auto":
        return recompute == "offload"
    if model.device.type != "cuda":
        return False
    needed = tokens * input_bytes_per_token(model.arch, model.dtype.itemsize)
    return needed > torch.cuda.mem_get_info(model.device)[0] // 2


def chunk_of_tokens(model: Transformer) -> int | None:
    """How many tokens go through a layer's experts together where activations are computed again; None: all, on a CPU.

    On a GPU what `tokens_at_once` makes of what is free there, so that a long pack needs no more than a short one.
    """
    if model.device.type != "cuda":
        return None
    return tokens_at_once(model.arch, model.dtype.itemsize, torch.cuda.mem_get_info(model.device)[0])


def input_bytes_per_token(arch: Arch, itemsize: int) -> int:
    """Of all layers' inputs."""
    return arch.num_layers * arch.hidden_size * itemsize


def graph_bytes_per_token(model: Transformer) -> int:
    """Estimate of what autograd keeps for a token over all layers."""
    a, size = model.arch, model.dtype.itemsize
    attention = 6 * a.hidden_size + 3 * (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    experts = a.experts_per_token * (3 * a.hidden_size + 4 * a.intermediate_size)
    return a.num_layers * (attention + experts) * size
