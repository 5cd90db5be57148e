"""Where a way to divide a run stops paying, in closed form; every rate an estimate.

Letters: T tokens of a rank in a step, F its products a second, f products of a token in a layer, S bytes that a layer
sends (gathered, or summed), B a link's bytes a second.
- A gather hides behind a layer's products from T = F S / (f B) tokens on. Forward S is the layer, behind it stand the
  products of one forward; backward it is gathered again and its gradients are summed, behind the products of a
  backward and of the forward that is computed again. The larger of both counts. A step takes all its tokens through a
  layer before the next (layer-major), so T is of the whole step and not of a micro-batch.
- Experts that stay put send rows instead of weights: from the tokens on that make these more bytes than a gather and a
  sum of the layer's experts, they cost more to send. (And gathers hide behind products, rows don't.)
- Context parallel: a token's queries, keys, values and results cross in a layer, 2 (q + k) d size bytes of which all
  but one rank's part are sent (q and k heads of queries and keys, d a head's numbers), whatever the sequence's length.
  Nothing hides them, so what they cost is a share of the step, which falls as attention over the sequence grows.
"""

from __future__ import annotations

from ossia.model.budget.many.division import Division
from ossia.model.budget.many.ranks import GRADIENT_SIZE, Whole
from ossia.model.budget.many.traffic import traffic
from ossia.model.budget.work import Work
from ossia.plan.many.times import Rates, layer_products
from ossia.plan.speed import layer_flops


def hiding_tokens(work: Work, division: Division, rates: Rates) -> float:
    """Tokens of a rank in a step from which on gathers and sums hide behind products: a mean layer's."""
    moved = traffic(work, division).layer
    gather, reduce = (division.seconds(spread, rates.inner, rates.outer) for spread in (moved.gather, moved.reduce))
    products = layer_products(work, rates)[:-1]  # the last isn't computed again
    tokens = work.pack * work.packs
    forward, backward = (sum(layer[i] for layer in products) / len(products) / tokens for i in range(2))
    return max(gather / forward, (gather + reduce) / backward)


def expert_parallel_tokens(work: Work, ranks: int) -> float:
    """Tokens of a rank in a step up to which rows to experts on `ranks` ranks are fewer bytes than the experts.

    Gathered experts: over as many ranks, twice a step, and where they are trained their gradients summed once.
    """
    whole, a = Whole.of(work), work.arch
    again = 1 if work.recompute else 0
    each = a.experts_per_token * a.hidden_size * work.size * 2 * (2 + again)
    weights = 2 * whole.layer_experts
    if work.ranks is None:
        weights += GRADIENT_SIZE * whole.trained_experts
    assert ranks > 1
    return weights / each  # both are (ranks - 1) / ranks of what they are


def context_parallel_share(work: Work, rates: Rates, bytes_s: float, ranks: int) -> float:
    """The share that exchanges have of a full layer's forward, where so many ranks share a sequence of `work.longest`
    tokens."""
    a = work.arch
    sent = 2 * (a.num_heads + a.num_kv_heads) * a.head_dim * work.size * (ranks - 1) / ranks / bytes_s
    products = sum(layer_flops(a, "full_attention", work.longest)) / rates.flops
    return sent / (sent + products)


def most_ranks(tokens_of_step: int, hiding: float) -> int:
    """Ranks that a step of so many tokens keeps busy."""
    return max(int(tokens_of_step // hiding), 1) if hiding else tokens_of_step
