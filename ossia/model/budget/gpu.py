"""A GPU's memory beside what is asked for, and whether a step fits into what is left of it."""

from __future__ import annotations

from ossia.model.budget.step import step_bytes
from ossia.model.budget.work import Work

GPU_CONTEXT = 520 << 20  # on the device, outside of what torch counts
ON_A_GPU = 0.97  # of its memory that a run may take: a driver keeps some
# Measured with an H200 (docs/plan.md): what libraries keep for themselves, the same in every case; and torch's holes,
# fitted to seventeen steps: some of any size, and more where a pack's activations are large
_LIBRARIES = 240_000_000
_HOLES, _HOLES_FIXED, _HOLES_ACTIVATIONS = 0.03, 300_000_000, 5


def around_gpu(work: Work, living: int) -> dict[str, int]:
    """What a GPU holds beside the bytes that are asked for, of which a step makes and lets go `living`."""
    activations = work.pack * work.arch.hidden_size * work.residual_size
    return {
        "libraries' own": _LIBRARIES,
        "allocator": int(_HOLES * living) + _HOLES_FIXED + _HOLES_ACTIVATIONS * activations,
        "CUDA context": GPU_CONTEXT,
    }


def fits_beside(work: Work, total: int, free: int) -> bool:
    """Whether a step fits into what is free on a GPU once context, weights and all of what is trained are there.

    total  bytes of the whole device; free  of them, then
    """
    living = step_bytes(work).total
    around = sum(around_gpu(work, living).values()) - GPU_CONTEXT
    return living + around <= free - (1 - ON_A_GPU) * total
