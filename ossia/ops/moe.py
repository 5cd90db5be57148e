"""Mixture of experts: route each token to its top k experts, sort by expert, one grouped matmul per projection.

Only routed tokens are computed; nothing loops over experts. Own code because the router's softmax over the chosen, the
clamped SwiGLU with (up + 1) and the per-expert adapters are gpt-oss's own. The grouped matmul is `F.grouped_mm`,
and for bfloat16 on a CPU one in fewer sizes.
Letters: T tokens, E experts, K experts per token, N = T * K routed rows sorted by expert, D hidden, I width, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ossia.kernels.cpu.grouped import Product, goes_in_few_sizes, grouped_mm, multiply_each, plain_grouped_mm
from ossia.kernels.cpu.pages import Room
from ossia.ops.linear import NARROW
from ossia.sizes import RANK_BYTES


@dataclass(frozen=True, slots=True)
class Route:
    """Which rows go to which expert.

    weights_TK  (T, K) share of each chosen expert, rows sum to 1, differentiable
    experts_TK  (T, K) int64 chosen experts
    order_N     (N,) int64 place of each row among the choices in the tokens' order; rows sorted by expert (stable)
    token_N     (N,) int64 token of each row
    row_TK      (T, K) int64 row of each choice: the inverse of the sort
    ends_E      (E,) int32 end of each expert's rows
    """

    weights_TK: Tensor
    experts_TK: Tensor
    order_N: Tensor
    token_N: Tensor
    row_TK: Tensor
    ends_E: Tensor


Sort = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
"""See `sort_by_expert`."""


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order of the choices by expert (stable), its inverse, (N,) int64, and the experts' ends, (E,) int32."""
    flat_N = experts_TK.flatten()
    order_N = flat_N.argsort(stable=True)
    row_N = torch.empty_like(order_N)
    row_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    # counted by a scatter, whose shape is known beforehand: a GPU waits for bincount's
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_N.device)
    ends_E = counts_E.scatter_add_(0, flat_N, torch.ones_like(flat_N)).cumsum(0).to(torch.int32)
    return order_N, row_N, ends_E


def route(logits_TE: Tensor, top_k: int, replay_TK: Tensor | None = None, sort: Sort = sort_by_expert) -> Route:
    """Softmax over the k largest logits, and the sort that groups rows by expert.

    logits_TE  (T, E) in the activations' dtype, as the released model computes it
    replay_TK  (T, K) int64 experts to use instead of the top k (recorded while sampling); -1: none was recorded
    """
    chosen_TK, experts_TK = logits_TE.topk(top_k, dim=-1)
    if replay_TK is not None:
        experts_TK = torch.where(replay_TK < 0, experts_TK, replay_TK)
        chosen_TK = logits_TE.gather(-1, experts_TK)
    order_N, row_N, ends_E = sort(experts_TK, logits_TE.shape[-1])
    row_TK = row_N.view_as(experts_TK)
    return Route(chosen_TK.softmax(-1), experts_TK, order_N, order_N // top_k, row_TK, ends_E)


class Expanding:
    """One projection's frozen experts, packed: some of them are expanded at a time, multiplied with and let go.

    Autograd holds none of them: backward, which needs them for the input's gradient alone, expands them again.

    expand       a range of experts, and the room that those before lay in and these may lie in -> (its length, out, in)
    num_experts  E
    at_once      experts expanded together. From `num_experts` on, the first use expands all and keeps them for the
                 next ones, until `let_go`
    """

    def __init__(self, expand: Callable[[slice, Room], Tensor], num_experts: int, at_once: int | None = None) -> None:
        assert at_once is None or at_once > 0, at_once
        self._expand, self.num_experts = expand, num_experts
        self.at_once = num_experts if at_once is None else min(at_once, num_experts)
        self._all: Tensor | None = None
        self._room = Room()

    def ends_here(self, ends_E: Tensor) -> list[int] | None:
        """The experts' ends as `parts` needs them, for which a GPU is waited for; None where it needs none."""
        return None if self.at_once == self.num_experts else ends_E.tolist()

    def parts(self, ends_E: Tensor, ends: list[int] | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, weight (E', out, in) and the experts' ends among these rows; a part without rows isn't expanded, and a
        weight is there until the next one is asked for."""
        if ends is None:
            if self._all is None:
                self._all = self._expand(slice(None), self._room)
            yield slice(None), self._all, ends_E
            return
        start = 0
        for first in range(0, self.num_experts, self.at_once):
            experts = self._part_of(first)
            end = ends[experts.stop - 1]
            if end > start:
                yield slice(start, end), self._expand(experts, self._room), ends_E[experts] - start
            start = end

    def in_turn(self) -> Callable[[int], Tensor]:
        """Gives (out, in) of an expert, asked for in the experts' order; it is there until another one is asked for."""
        there, part = slice(0), None

        def one(expert: int) -> Tensor:
            nonlocal there, part
            if part is None or expert >= there.stop:
                there, part = self._part_of(expert), None
                part = self._expand(there, self._room)
            return part[expert - there.start]

        return one

    def _part_of(self, expert: int) -> slice:
        """The experts that are expanded together with this one."""
        first = expert - expert % self.at_once
        return slice(first, min(first + self.at_once, self.num_experts))

    def let_go(self) -> None:
        """Forget what is expanded."""
        self._all, self._room = None, Room()


@dataclass(frozen=True, slots=True)
class Expert:
    """One projection of all experts, with its adapter where there is one.

    weight  (E, out, in); bias (E, out); lora_a (E, r, in); lora_b (E, out, r), already scaled
    """

    weight: Tensor | Expanding
    bias: Tensor
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None


def base_part(x_ND: Tensor, expert: Expert, ends_E: Tensor, product: Product = grouped_mm) -> Tensor:
    """What the weights alone make of each row, (N, out). Arguments as of `project`."""
    if isinstance(expert.weight, Expanding):
        return _InParts.apply(x_ND, expert.weight, expert.bias.shape[-1], ends_E, product)
    return product(x_ND, expert.weight.transpose(1, 2), ends_E)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight, fan_out, ends_E, product):
        ctx.weight, ctx.fan_in, ctx.product, ctx.ends = weight, x_ND.shape[1], product, weight.ends_here(ends_E)
        ctx.save_for_backward(ends_E)

        return _multiply_in_parts(x_ND, weight, fan_out, ends_E, ctx.ends, product, turned=True)

    @staticmethod
    def backward(ctx, grad_NO):
        (ends_E,) = ctx.saved_tensors
        dx_ND = _multiply_in_parts(grad_NO, ctx.weight, ctx.fan_in, ends_E, ctx.ends, ctx.product, turned=False)
        return dx_ND, None, None, None, None


def _multiply_in_parts(
    x_ND: Tensor,
    weight: Expanding,
    width: int,
    ends_E: Tensor,
    ends: list[int] | None,
    product: Product,
    *,
    turned: bool,
) -> Tensor:
    """(N, width): each row times its expert's weight, or the transposed one. ends  see `Expanding.ends_here`"""
    if ends is not None and product is grouped_mm and goes_in_few_sizes(x_ND):
        one = weight.in_turn()
        return multiply_each(x_ND, (lambda expert: one(expert).t()) if turned else one, width, ends)
    out_NW = None
    for rows, weight_EOD, ends_of_part in weight.parts(ends_E, ends):
        part = product(x_ND[rows], weight_EOD.transpose(1, 2) if turned else weight_EOD, ends_of_part)
        if len(part) == len(x_ND):
            return part
        out_NW = part.new_empty(len(x_ND), width) if out_NW is None else out_NW
        out_NW[rows] = part
    return x_ND.new_empty(len(x_ND), width) if out_NW is None else out_NW


def project(
    x_ND: Tensor,
    expert: Expert,
    ends_E: Tensor,
    lora_x_ND: Tensor | None = None,
    product: Product = plain_grouped_mm,
) -> Tensor:
    """Each row through its expert's projection, bias and adapter.

    x_ND       (N, in) rows sorted by expert
    lora_x_ND  the adapter's input where it differs from x (dropout)
    Returns    (N, out)
    """
    y = base_part(x_ND, expert, ends_E, product)
    if (extra := adapter_part(x_ND, expert, ends_E, lora_x_ND, product)) is not None:
        y = y + extra
    return y + _of_rows(expert.bias, ends_E, len(x_ND))


def adapter_part(
    x_ND: Tensor, expert: Expert, ends_E: Tensor, lora_x_ND: Tensor | None, product: Product = grouped_mm
) -> Tensor | None:
    """What the adapter adds to each row, (N, out); None where there is none. Arguments as of `project`."""
    if expert.lora_a is None or expert.lora_b is None:
        return None
    a_ErD, b_EOr = _align_rank(expert.lora_a, expert.lora_b)
    a_x = product(x_ND if lora_x_ND is None else lora_x_ND, a_ErD.transpose(1, 2), ends_E)
    return product(a_x, b_EOr.transpose(1, 2), ends_E)


def _align_rank(a_ErD: Tensor, b_EOr: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with zeros appended to their rank, up to the rows of whole 16 bytes that the grouped matmul takes."""
    lacking = -a_ErD.shape[1] % (RANK_BYTES // a_ErD.itemsize)
    return (F.pad(a_ErD, (0, 0, 0, lacking)), F.pad(b_EOr, (0, lacking))) if lacking else (a_ErD, b_EOr)


class _ClampedSwiglu(torch.autograd.Function):
    """Keeps its input alone and recomputes the rest in backward: two thirds less memory than autograd's own."""

    @staticmethod
    def forward(ctx, h_NI, limit, alpha):
        ctx.save_for_backward(h_NI)
        ctx.limit, ctx.alpha = limit, alpha
        return clamped_swiglu_only(h_NI, limit, alpha)

    @staticmethod
    def backward(ctx, grad):
        (h_NI,) = ctx.saved_tensors
        gate_raw, up_raw = h_NI.chunk(2, dim=-1)
        gate, up = gate_raw.clamp(_lowest(h_NI), ctx.limit), up_raw.clamp(-ctx.limit, ctx.limit)
        share = (gate * ctx.alpha).sigmoid_()
        glu = gate * share
        dh = torch.empty_like(h_NI)
        dgate, dup = dh.chunk(2, dim=-1)
        torch.mul(grad, glu, out=dup).mul_(up == up_raw)
        slope = share.addcmul_(glu * ctx.alpha, 1 - share)
        torch.mul(grad, up.add_(1), out=dgate).mul_(slope).mul_(gate == gate_raw)
        return dh, None, None


class _InChunks(torch.autograd.Function):
    """`in_chunks`: keeps its input alone, and computes each chunk again for its backward."""

    @staticmethod
    def forward(ctx, x_TD, compute, at_once, values, anchor):
        ctx.compute, ctx.at_once = compute, at_once
        ctx.save_for_backward(x_TD)
        return _each_chunk(x_TD, compute, at_once) if values else torch.empty_like(x_TD)

    @staticmethod
    def backward(ctx, grad_TD):
        (x_TD,) = ctx.saved_tensors
        dx_TD = torch.empty_like(x_TD)
        for number, rows in enumerate(_chunks(len(x_TD), ctx.at_once)):
            leaf = x_TD[rows].detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.compute(leaf, rows, number)
            torch.autograd.backward(out, grad_TD[rows])
            dx_TD[rows] = leaf.grad
        return dx_TD, None, None, None, None


def in_chunks(
    x_TD: Tensor,
    compute: Callable[[Tensor, slice, int], Tensor],
    at_once: int,
    *,
    values: bool,
    trained: bool,
) -> Tensor:
    """What `compute` makes of each token, a number of tokens at a time, so that what lies between stays small.

    compute  (tokens, which, number of the chunk) -> as many rows of the same width; called again in backward, where
             leaves that it uses get their gradients
    values   False: nobody reads the result, it is there for its gradient; its numbers mean nothing
    trained  whether it uses any, which ask for a backward even where x doesn't
    Returns  (T, D)
    """
    if not torch.is_grad_enabled():
        return _each_chunk(x_TD, compute, at_once)
    return _InChunks.apply(x_TD, compute, at_once, values, torch.empty(0, requires_grad=trained))


def _chunks(num_tokens: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, num_tokens)) for start in range(0, num_tokens, at_once)]


def _each_chunk(x_TD: Tensor, compute: Callable[[Tensor, slice, int], Tensor], at_once: int) -> Tensor:
    out_TD = torch.empty_like(x_TD)
    for number, rows in enumerate(_chunks(len(x_TD), at_once)):
        out_TD[rows] = compute(x_TD[rows], rows, number)
    return out_TD


def clamped_swiglu(h_NI: Tensor, limit: float, alpha: float) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), gate clamped above and up on both sides.

    h_NI     (N, 2I): the gate half, then the up half (the checkpoint interleaves them; loading sorts them apart)
    Returns  (N, I); the gradient is zero where a clamp holds
    Source   gpt-oss model card; constants from config.json
    """
    return _ClampedSwiglu.apply(h_NI, limit, alpha)


def _lowest(h_NI: Tensor) -> float:
    """Below which a gate is minus infinity, whose product with its sigmoid, 0, is no number: float16 gets there."""
    return torch.finfo(h_NI.dtype).min


def clamped_swiglu_only(h_NI: Tensor, limit: float, alpha: float) -> Tensor:
    """`clamped_swiglu` without a gradient: the call of an autograd function costs a decode step more than the maths."""
    gate, up = h_NI.chunk(2, dim=-1)
    gate = gate.clamp(_lowest(h_NI), limit)
    return (gate * alpha).sigmoid_().mul_(gate).mul_(up.clamp(-limit, limit).add_(1))


def project_wide(
    x_ND: Tensor,
    expert: Expert,
    ends_E: Tensor,
    lora_x_ND: Tensor | None = None,
    product: Product = plain_grouped_mm,
) -> Tensor:
    """`project` onto the residual stream, see `ops.linear.wide_linear`; float32 where x is float16."""
    if x_ND.dtype != torch.float16:
        return project(x_ND, expert, ends_E, lora_x_ND, product)
    x_ND, lora_x_ND = x_ND * NARROW, None if lora_x_ND is None else lora_x_ND * NARROW
    y = base_part(x_ND, expert, ends_E, product)
    if (extra := adapter_part(x_ND, expert, ends_E, lora_x_ND, product)) is not None:
        y = y + extra
    return y.float() / NARROW + _of_rows(expert.bias, ends_E, len(x_ND)).float()


def _of_rows(bias_EO: Tensor, ends_E: Tensor, num_rows: int) -> Tensor:
    """(N, O): the bias of each row's expert."""
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).to(torch.int64)
    return bias_EO.repeat_interleave(counts_E, dim=0, output_size=num_rows)


def combine(y_ND: Tensor, routing: Route) -> Tensor:
    """Weighted sum of each token's expert outputs, in the order of its choices (deterministic). Returns (T, D)."""
    y_TKD = y_ND[routing.row_TK.flatten()].view(*routing.row_TK.shape, y_ND.shape[-1])
    return torch.einsum("tkd,tk->td", y_TKD, routing.weights_TK.to(y_TKD.dtype))


def mixture(
    residual_TD: Tensor,
    x_TD: Tensor,
    routing: Route,
    gate_up: Expert,
    down: Expert,
    limit: float,
    alpha: float,
    adapt: Callable[[Tensor, int], Tensor | None],
) -> Tensor:
    """Each token through its experts, and their weighted sum on top of the residual. Returns (T, D).

    x_TD   normed
    adapt  what an adapter gets instead of its input (dropout), or None; called with the input and 5 or 6
    """
    gathered_ND = x_TD[routing.token_N]
    hidden_NI = project(gathered_ND, gate_up, routing.ends_E, adapt(gathered_ND, 5), grouped_mm)
    hidden_NI = clamped_swiglu(hidden_NI, limit, alpha)
    y_ND = project_wide(hidden_NI, down, routing.ends_E, adapt(hidden_NI, 6), grouped_mm)
    return residual_TD + combine(y_ND, routing)
