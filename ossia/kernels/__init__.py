"""Code for the machine itself: C for the CPU, compiled on first use, and Triton for a GPU (`gpu/`)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kernels = Literal["torch", "triton"]
"""How what stands between the matrix products of a layer is computed: the reference, or fused."""


def pick_kernels(device: torch.device) -> Kernels:
    """Triton on a CUDA device where it is installed; it comes with torch there."""
    return "triton" if device.type == "cuda" and find_spec("triton") is not None else "torch"
