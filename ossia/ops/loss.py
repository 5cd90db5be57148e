"""Log-probability of given tokens from hidden states, and its gradient, without the logits ever existing.

The vocabulary is walked in blocks with a running maximum, as flash attention walks its keys: a block of logits lives in
cache, its exponentials are summed in float32, and the expected head row E = sum_v p_v W_v is gathered on the way. Then
d logp / d hidden = W[target] - E, so the backward of a frozen head is one multiplication. Sums leave the target out: if
it is all but sure, what counts is the mass of the others, and 1 - p of rounded logits is mostly rounding.
`F.cross_entropy` needs the (T, V) logits and two more passes over them; `F.linear_cross_entropy` (torch 2.13) is slower
on CPU by several times. Losses are pure functions of the log-probabilities; each is a sum over one denominator that the
whole step shares. Letters: N rows, D hidden, V vocabulary, B tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ossia.kernels import passes_for, pick_kernels
from ossia.sizes import GPU_ROW_BLOCK, GPU_VOCAB_BLOCK, ROW_BLOCK, VOCAB_BLOCK


def _blocks(device: torch.device) -> tuple[int, int]:
    """Rows and tokens of the vocabulary that are walked at once."""
    return (ROW_BLOCK, VOCAB_BLOCK) if device.type == "cpu" else (GPU_ROW_BLOCK, GPU_VOCAB_BLOCK)


def linear_logprob(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """ln p(target) of every row under softmax(h @ head.T).

    h_ND       (N, D) hidden states after the final norm, any floating dtype
    head_VD    (V, D) of h's dtype; gets a gradient if it asks for one. One that is frozen may be in the machine's
               memory while h is on a GPU, and of another dtype: its blocks are sent as they are needed
    targets_N  (N,) int64 in [0, V)
    Returns    (N,) float32, natural log; differentiable in h and head
    """
    return _LinearLogprob.apply(h_ND, head_VD, targets_N)


def weighted_nll(logp_N: Tensor, weights_N: Tensor, denominator: float) -> Tensor:
    """-sum(weight * logp) / denominator: a micro-batch's part of the step's loss.

    denominator  the sum of weights over the whole step (all micro-batches, all ranks), > 0
    Returns      () float32, nats per unit of weight
    """
    return -(weights_N * logp_N).sum() / denominator


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_ND, head_VD, targets_N):
        logp_N = torch.empty(len(h_ND), dtype=torch.float32, device=h_ND.device)
        lse_N = torch.empty_like(logp_N)
        slope_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        row_block, _ = _blocks(h_ND.device)
        for start in range(0, len(h_ND), row_block):
            rows = slice(start, start + row_block)
            h, target_rows = h_ND[rows], _rows_of(head_VD, targets_N[rows], h_ND.device)
            others_N, expected = _scan_others(h, head_VD, targets_N[rows], want_expected=slope_ND is not None)
            target_N = (h.float() * target_rows).sum(-1)
            logp_N[rows], lse_N[rows] = F.logsigmoid(target_N - others_N), torch.logaddexp(target_N, others_N)
            if expected is not None:
                slope_ND[rows] = ((target_rows - expected) * (others_N - target_N).sigmoid()[:, None]).to(h.dtype)
        ctx.save_for_backward(slope_ND, *((h_ND, head_VD, targets_N, lse_N, logp_N) if ctx.needs_input_grad[1] else ()))
        return logp_N

    @staticmethod
    def backward(ctx, grad_N):
        slope_ND, *rest = ctx.saved_tensors
        dh = None if slope_ND is None else (slope_ND.float() * grad_N[:, None]).to(slope_ND.dtype)
        return dh, _head_gradient(*rest, grad_N) if rest else None, None


def _scan_others(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, want_expected: bool) -> tuple[Tensor, Tensor | None]:
    """Over all tokens but each row's target: log-sum-exp of the logits (N,), expected head row (N, D); both float32."""
    num_rows, num_vocab = len(h_ND), len(head_VD)
    h_ND = h_ND if h_ND.dtype != torch.float16 else h_ND.float()
    kernels = pick_kernels(h_ND.device, h_ND.dtype)
    take = _take_in_torch if kernels == "torch" else passes_for(kernels).exponentials_
    _, vocab_block = _blocks(h_ND.device)
    top_N = torch.full((num_rows,), -torch.inf, dtype=torch.float32, device=h_ND.device)
    total_N = torch.zeros(num_rows, dtype=torch.float32, device=h_ND.device)
    expected_ND = torch.zeros(h_ND.shape, dtype=torch.float32, device=h_ND.device) if want_expected else None
    buffer = torch.empty(num_rows, min(vocab_block, num_vocab), dtype=h_ND.dtype, device=h_ND.device)
    for start, block_BD in walk_blocks(head_VD, vocab_block, h_ND.device, h_ND.dtype):
        logits_NB = buffer if len(block_BD) == buffer.shape[1] else torch.empty_like(buffer[:, : len(block_BD)])
        torch.mm(h_ND, block_BD.t(), out=logits_NB)
        shrink_N = take(logits_NB, targets_N - start, top_N, total_N)
        if expected_ND is not None:
            expected_ND.mul_(shrink_N[:, None]).add_(logits_NB @ block_BD)
    lse_N = total_N.log() + top_N
    return lse_N, None if expected_ND is None else expected_ND.div_(total_N[:, None])


def _rows_of(head_VD: Tensor, ids_N: Tensor, device: torch.device) -> Tensor:
    return head_VD[ids_N.to(head_VD.device)].to(device).float()


def walk_blocks(head_VD: Tensor, size: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows, each with its first row's number, on a device and in a dtype; the next one is on its way there.

    On a GPU a head in pinned memory takes two blocks of the device's: one is computed with while the other arrives.
    """
    starts = range(0, len(head_VD), size)
    if head_VD.device.type == device.type or device.type != "cuda":
        for start in starts:
            yield start, head_VD[start : start + size].to(device=device, dtype=dtype)
        return
    slots = [torch.empty(size, head_VD.shape[1], dtype=head_VD.dtype, device=device) for _ in range(2)]
    arrived, copies = [torch.cuda.Event() for _ in range(2)], torch.cuda.Stream(device)

    def send(number: int) -> Tensor:
        block_BD = head_VD[starts[number] : starts[number] + size]
        there = slots[number % 2][: len(block_BD)]
        copies.wait_stream(torch.cuda.current_stream(device))  # what has been launched may still read this slot
        with torch.cuda.stream(copies):
            there.copy_(block_BD, non_blocking=True)
            arrived[number % 2].record()
        return there

    coming = send(0)
    for number, start in enumerate(starts):
        block_BD = coming
        if number + 1 < len(starts):
            coming = send(number + 1)
        torch.cuda.current_stream(device).wait_event(arrived[number % 2])
        yield start, block_BD.to(dtype)


def _take_in_torch(logits_NB: Tensor, column_N: Tensor, top_N: Tensor, total_N: Tensor) -> Tensor:
    """A block of logits becomes its exponentials below the largest logit so far, which is `top`; `total` is their sum.

    column_N  (N,) the target's column in this block, or one outside it; the target counts as nothing
    Returns   (N,) float32: what sums made so far shrink by, since `top` has grown
    """
    _put_at_targets(logits_NB, column_N, torch.full_like(total_N, -torch.inf))
    # the largest of rounded logits is one of them: subtracting it in their own dtype loses nothing that float32 keeps
    largest_N1 = torch.maximum(top_N[:, None].to(logits_NB.dtype), logits_NB.amax(1, keepdim=True))
    shrink_N = (top_N - largest_N1[:, 0].float()).exp()
    top_N.copy_(largest_N1[:, 0])
    logits_NB.sub_(largest_N1).exp_()
    total_N.mul_(shrink_N).add_(logits_NB.sum(1, dtype=torch.float32))
    return shrink_N


def _put_at_targets(block_NB: Tensor, column_N: Tensor, values_N: Tensor) -> None:
    """Set each row's element in its target's column, where the block has that column."""
    inside_N = (column_N >= 0) & (column_N < block_NB.shape[1])
    # every row is indexed, whether it is inside or not: a GPU would have to wait for how many are
    at_N = torch.arange(len(block_NB), device=block_NB.device), column_N.clamp(0, block_NB.shape[1] - 1)
    block_NB[at_N] = torch.where(inside_N, values_N.to(block_NB.dtype), block_NB[at_N])


def _head_gradient(
    h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, lse_N: Tensor, logp_N: Tensor, grad_N: Tensor
) -> Tensor:
    """sum_n grad_n (onehot(target_n) - p_n) h_n: the logits once more, block by block, accumulated in float32."""
    dhead_VD = torch.zeros(head_VD.shape, dtype=torch.float32, device=head_VD.device)
    weighted_ND = (h_ND.float() * grad_N[:, None]).to(h_ND.dtype)
    at_target_N = torch.expm1(logp_N)
    row_block, vocab_block = _blocks(h_ND.device)
    for start in range(0, len(head_VD), vocab_block):
        block_BD = head_VD[start : start + vocab_block]
        for first in range(0, len(h_ND), row_block):
            rows = slice(first, first + row_block)
            p_NB = (h_ND[rows] @ block_BD.t()).float().sub_(lse_N[rows, None]).exp_()
            _put_at_targets(p_NB, targets_N[rows] - start, at_target_N[rows])
            dhead_VD[start : start + vocab_block] -= p_NB.to(h_ND.dtype).t() @ weighted_ND[rows]
    return dhead_VD.to(head_VD.dtype)
