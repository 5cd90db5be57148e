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


def experts_at_once(arch: Arch, tokens: int) -> int:
    """How many packed experts a step of `tokens` tokens expands together, by default.

    As many as take no more bytes than the rows that are multiplied with them: so the scratch never more than doubles
    what a layer needs beside its weights, and it is all experts, one product and nothing to wait for, from the number
    of tokens on where that no longer counts. A part is expanded once more for its layer's backward.
    """
    row = 2 * arch.hidden_size + 3 * arch.intermediate_size  # gathered, gate and up, hidden, the output
    fitting = tokens * arch.experts_per_token * row // (2 * arch.intermediate_size * arch.hidden_size)
    return max(1, min(fitting, arch.num_experts))


def tokens_at_once(arch: Arch, itemsize: int, free: int) -> int:
    """How many tokens go through a layer's experts together, where a GPU has `free` bytes beside what lies on it.

    What lies between, forward and backward, may take a quarter of them. A multiple of 1,024: at least 1,024 rows keep a
    GPU busy, and each expert's matrix is read once for all of them.
    """
    rows = arch.experts_per_token * (2 * arch.hidden_size + 3 * arch.intermediate_size)
    return max(1, free // 4 // (2 * rows * itemsize) // 1024) * 1024


@dataclass(frozen=True, slots=True)
class Work:
    """A training step, as far as its memory depends on it.

    ranks     of each adapted target, `model.lora.TARGETS`; None: all weights are trained
    packs     micro-batches of the step, of `pack` tokens each
    longest   tokens of the longest document
    counted   rows of a pack whose prediction counts
    recompute activations are computed again in backward
    at_once   packed experts that are expanded together; None: `experts_at_once`
    chunk     tokens that go through a layer's experts together, where activations are computed again; None: all
    offload   layers' inputs wait in the machine's memory
    keep_attention  what full attention over long documents found isn't computed again
    on_host   of embedding and head, those that wait there too, by name
    qat       experts are computed as an MXFP4 export rounds them
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
    at_once: int | None = None
    chunk: int | None = None
    offload: bool = False
    keep_attention: bool = False
    on_host: frozenset[str] = frozenset()
    qat: bool = False

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
        return self.qat or (self.ranks is not None and self.placement != "bf16")

    @property
    def experts_at_once(self) -> int:
        """Packed experts that are expanded together."""
        tokens = self.pack * self.packs
        return self.at_once or experts_at_once(self.arch, min(tokens, self.chunk or tokens))

    @property
    def prepares_layers(self) -> bool:
        """Whether a layer's weights take work to be ready; see `train.schedule.prepares_layers`."""
        if self.qat:
            return True
        return self.dtype != "float32" if self.ranks is None else self.placement != "bf16"

    @property
    def together(self) -> int:
        """Packs that go through a layer before the next layer's turn."""
        return self.packs if self.prepares_layers else 1

    @property
    def attention(self) -> Literal["reference", "cpu", "flash", "triton"]:
        """The backend of attention, as `ops.attention.backends` picks it on a GPU from the year 2020 on."""
        if self.device == "cpu":
            return "cpu" if self.dtype != "float16" else "reference"
        if self.dtype != "float32":
            return "flash"
        return "triton" if self.kernels == "triton" else "reference"

    @property
    def residual_size(self) -> int:
        """Bytes of a number of what goes from layer to layer; see `Transformer.residual_dtype`."""
        return 4 if self.dtype == "float16" else self.size
