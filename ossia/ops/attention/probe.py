"""Two questions that a backend of attention answers on the device itself, within a second, before a run begins.

Documents apart: does anything of one document, its keys or what is asked of its rows, change another's output or
gradients? Sinks: are the output and all gradients, the sinks' own included, those of the definition in float32? Both
with and without a window, over a pack of two documents whose border lies within a block.
Letters: T packed tokens, H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ossia.ops.attention.backends import BACKENDS, AttentionBackend
from ossia.ops.attention.segments import Segments

LENGTHS = (70, 90)
WINDOWS = (None, 32)
# of a gradient whose sinks weigh about as much as its keys: leaving out the gradient through the log-sum-exp is off by
# 0.1 and more
ALLOWED = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class Probed:
    """What was found, over all windows.

    leak      largest change in one document by what is in the other; 0 where documents are apart
    error     largest relative error of the output, of the gradients in q, k, v or in the sinks
    allowed   the largest error that rounding explains
    """

    leak: float
    error: float
    allowed: float

    @property
    def problem(self) -> str | None:
        """What is wrong; None: nothing."""
        if self.leak != 0:
            return f"documents of a pack see each other: changing one moves the other's numbers by {self.leak:.2g}"
        if not self.error <= self.allowed:
            why = f"off by {self.error:.2g}, where rounding explains {self.allowed:g}"
            return f"attention with sinks, or its gradient, is {why}"
        return None


def probe(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, *, heads: int, kv_heads: int, size: int
) -> Probed:
    """Try a backend on the device: the heads of one key-value head or two, and heads of the model's size."""
    group, kv_heads = heads // kv_heads, min(kv_heads, 2)
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    shapes = ((tokens, group * kv_heads, size), (tokens, kv_heads, size), (tokens, kv_heads, size), (group * kv_heads,))
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    given[3] += 2  # so that the sink takes a share that counts
    grad = torch.randn(shapes[0], generator=generator)
    *given, grad = (x.to(device, dtype) for x in (*given, grad))
    segments = Segments(torch.tensor([0, LENGTHS[0], tokens]), device)
    documents = slice(0, LENGTHS[0]), slice(LENGTHS[0], tokens)
    leak = error = 0.0
    for window in WINDOWS:
        found = _run(backend, given, grad, segments, window)
        for changed, other in (documents, documents[::-1]):
            *moved, moved_grad = (x.clone() for x in (*given[:3], grad))
            for x in (*moved, moved_grad):
                x[changed] = x[changed].flip(0) + 1
            again = _run(backend, [*moved, given[3]], moved_grad, segments, window)
            for before, after in zip(found[:4], again[:4], strict=True):
                leak = _worse(leak, (before[other].float() - after[other].float()).abs().max())
        exact = _run(_DEFINITION, [x.float() for x in given], grad.float(), segments, window)
        for mine, theirs in zip(found, exact, strict=True):
            error = _worse(error, (mine.float() - theirs).norm() / theirs.norm())
    return Probed(leak, error, ALLOWED[dtype])


_DEFINITION = BACKENDS["reference"]


def _run(
    backend: AttentionBackend, given: list[Tensor], grad: Tensor, segments: Segments, window: int | None
) -> list[Tensor]:
    """The output and the gradients in q, k, v and the sinks."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    with torch.enable_grad():
        out = backend.attend(*leaves, segments, window, given[0].shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _worse(so_far: float, found: Tensor) -> float:
    """The larger of the two; what isn't a number is worse than everything."""
    number = float(found)
    return math.inf if math.isnan(number) else max(so_far, number)
