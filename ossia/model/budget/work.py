"""What a step is: the model, where it is, what is trained of it, and over how many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ossia.model.arch import Arch, Layout

Placement = Literal["mmap", "resident", "stream", "bf16"]
DeviceKind = Literal["cpu", "cuda"]
KernelKind = Literal["torch", "triton", "c"]
DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float32": 4, "float16": 2}


@dataclass(frozen=True, slots=True)
class Work:
    """A training step, as far as its memory depends on it.

    ranks     of each adapted target, `model.lora.TARGETS`; None: all weights are trained
    packs     micro-batches of the step, of `pack` tokens each
    longest   tokens of the longest document
    counted   rows of a pack whose prediction counts
    recompute activations are computed again in backward
    """

    arch: Arch
    layout: Layout
    placement: Placement
    device: DeviceKind
    kernels: KernelKind
    dtype: str
    ranks: Mapping[str, int] | None
    pack: int
    packs: int = 1
    longest: int = 1 << 30
    counted: int | None = None
    dropout: bool = False
    recompute: bool = True

    @property
    def size(self) -> int:
        """Bytes of a number of the activations."""
        return DTYPE_BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """Rows of a pack whose prediction counts: all, if it isn't said."""
        return self.pack if self.counted is None else self.counted

    def adapts(self, *targets: str) -> bool:
        """Whether any of these is trained: by an adapter, or with all weights."""
        return self.ranks is None or any(target in self.ranks for target in targets)

    @property
    def expands(self) -> bool:
        """Whether experts are expanded when it is their layer's turn, and let go after it."""
        return self.ranks is not None and self.placement != "bf16"

    @property
    def prepares_layers(self) -> bool:
        """Whether a layer's weights take work to be ready; see `train.schedule.prepares_layers`."""
        return self.dtype != "float32" if self.ranks is None else self.placement != "bf16"

    @property
    def together(self) -> int:
        """Packs that go through a layer before the next layer's turn."""
        return self.packs if self.prepares_layers else 1

    @property
    def attention(self) -> Literal["reference", "cpu", "cuda"]:
        """The backend of attention, as `ops.attention.pick_backend` picks it."""
        if self.device == "cpu":
            return "cpu" if self.dtype != "float16" else "reference"
        return "cuda" if self.dtype != "float32" else "reference"
