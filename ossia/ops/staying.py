"""Experts that are divided over processes and stay where they are: each token's row goes to them and comes back.

Routing, adapters' inputs and the weighted sum are the token's own process's; in between every process computes its
experts with the rows of all, by the mixture that one process alone would use. What the adapters' dropout draws is drawn
where the expert is. Letters as in `ops.moe`; N own routed rows, M rows that came, E' own experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ossia.ops.attention.divided import Members, exchanged
from ossia.ops.fused import Adapt, Mixture
from ossia.ops.moe import Expert, Route, Sort, combine


def with_rows_sent(mixture: Mixture, sort: Sort, members: Members) -> Mixture:
    """A mixture whose two projections are of this process's E' experts alone: those of its number, all alike many.

    mixture, sort  those of one process. All members call it as often, also without a token
    """

    def over_members(
        residual_TD: Tensor,
        x_TD: Tensor,
        routing: Route,
        gate_up: Expert,
        down: Expert,
        limit: float,
        alpha: float,
        adapt: Adapt,
    ) -> Tensor:
        own = gate_up.bias.shape[0]
        given, counts_SE = _counts(routing.ends_E, own, members)
        taken = counts_SE.sum(1).tolist()
        rows_MD = exchanged(x_TD[routing.token_N], members, given, taken)
        local = _route(counts_SE, sort, rows_MD)
        nothing_MD = residual_TD.new_zeros(len(rows_MD), residual_TD.shape[1])
        y_MD = mixture(nothing_MD, rows_MD, local, gate_up, down, limit, alpha, adapt)
        y_ND = exchanged(y_MD, members, taken, given)
        return residual_TD + combine(y_ND, routing)

    return over_members


def _counts(ends_E: Tensor, own: int, members: Members) -> tuple[list[int], Tensor]:
    """How many rows go to each member, and (size, E') int64: how many come from each, for each of the own experts."""
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).to(torch.int64)
    each: Sequence[int] = [own] * members.size
    found = members.exchange(counts_E, each, each)
    return counts_E.view(members.size, own).sum(1).tolist(), found.view(members.size, own).cpu()


def _route(counts_SE: Tensor, sort: Sort, rows_MD: Tensor) -> Route:
    """The rows that came, by member and of each sorted by expert, as tokens that have chosen one expert each."""
    own = counts_SE.shape[1]
    expert_M = torch.arange(own).repeat(len(counts_SE)).repeat_interleave(counts_SE.flatten()).to(rows_MD.device)
    experts_M1 = expert_M[:, None]
    order_M, row_M, ends_E = sort(experts_M1, own)
    weights_M1 = torch.ones(len(expert_M), 1, dtype=rows_MD.dtype, device=rows_MD.device)
    return Route(weights_M1, experts_M1, order_M, order_M, row_M[:, None], ends_E)
