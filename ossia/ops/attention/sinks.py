"""How a kernel that knows no sinks gets them exactly, forward and backward.

With the stock output O and log-sum-exp l, the sink-inclusive ones are O' = O * sigmoid(l - s) and l' = logaddexp(l, s),
and the stock backward fed with (O', l') is exact, as it only ever uses exp(scores - l') and the row sum of dO * O'.
(Scaling O outside and dropping the gradient through l, as is commonly done, is not: tests hold that it differs.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def include_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(O', l') from the stock (O, l); `sinks` broadcasts against lse (float32)."""
    return (out.float() * (lse - sinks).sigmoid().unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, sinks)


def sink_gradient(sinks_H: Tensor, lse: Tensor, slope: Tensor) -> Tensor:
    """The gradient in the sinks, (H,): minus the sum of each sink's share times dO * O'.

    lse, slope  (H, ...) float32: l', and the sum of dO * O' of each row
    """
    share = (sinks_H.float().view(-1, *[1] * (lse.ndim - 1)) - lse).exp()
    return -(share * slope).flatten(1).sum(1).to(sinks_H.dtype)
