"""Code for the machine itself, against torch's passes: C for a CPU (`cpu/`) and Triton for a GPU (`gpu/`)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from ossia.errors import UserError
from ossia.kernels.cpu.build import Unavailable

if TYPE_CHECKING:
    import torch

Kernels = Literal["torch", "triton", "c"]
"""How what stands between the matrix products of a layer is computed: the reference, or fused."""


def pick_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Triton on a CUDA device where it is installed, as it is with torch; C on a CPU that has a compiler."""
    if device.type == "cuda":
        return "triton" if find_spec("triton") is not None else "torch"
    if device.type != "cpu":
        return "torch"
    from ossia.kernels.cpu.passes import DTYPES, load_passes

    return "torch" if dtype not in DTYPES or isinstance(load_passes(), Unavailable) else "c"


def passes_for(kernels: Literal["triton", "c"]) -> Any:
    """The fused kernels, see `ops.fused.Passes`. Raises UserError where C can't be compiled."""
    if kernels == "triton":
        from ossia.kernels.gpu import passes

        return passes
    from ossia.kernels.cpu.passes import load_passes

    found = load_passes()
    if isinstance(found, Unavailable):
        raise UserError(f"kernels: c can't be used here: {found.reason}\n  next: use torch, which needs nothing")
    return found
