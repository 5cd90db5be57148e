"""Where a run's bytes are at its fullest: parts on the device, and in the machine's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ossia.config import Recipe
from ossia.model.arch import Arch
from ossia.model.budget.gpu import around_gpu
from ossia.model.budget.layer import LayerBytes
from ossia.model.budget.step import StepBytes, step_bytes
from ossia.model.budget.weights import WeightBytes, pinned_bytes, trained_numbers
from ossia.model.budget.work import DTYPE_BYTES, Work
from ossia.sizes import FULL_BLOCK

MIB = 1 << 20
PROCESS = 232 * MIB  # Python, torch with what its optimizer loads, and this package, before a weight is read
LIBRARIES = 170 * MIB  # pages of their files
TOKENIZER = 90 * MIB  # of the released vocabulary; smaller ones take less
GPU_PROCESS = 1200 * MIB  # the same in the machine's memory where a CUDA context is there
_FAULT = 64 * 1024  # bytes of a file that come with a page of it
_PRODUCT = 850 * 1024  # bytes that oneDNN keeps for a bfloat16 product in a size that it hasn't met
_SIZES = 40  # that experts' rows come in: eight in every doubling, over five doublings
_MOST_PRODUCTS = 1024  # that it keeps
# Holes in the C library's heap, measured (docs/plan.md): a share of what lives in a step, and a layer's part so often
_HOLES, _HOLES_LAYER, _HOLES_LAYER_AGAIN = 0.1, 1.4, 2.4  # the last where layers are computed again


@dataclass(frozen=True, slots=True)
class Footprint:
    """Parts by name, in bytes.

    device    of a GPU
    host      of the machine's memory, pages of files excepted
    files     pages of files in the machine's memory, the checkpoint's and libraries'; the system takes them back when
              it needs them
    moment    when it is fullest
    """

    device: Mapping[str, int]
    host: Mapping[str, int]
    files: int
    moment: str

    @property
    def device_peak(self) -> int:
        return sum(self.device.values())

    @property
    def host_peak(self) -> int:
        """Without pages of files."""
        return sum(self.host.values())

    @property
    def resident_peak(self) -> int:
        """What the system counts for the process at its largest, where nothing presses on its memory."""
        return self.host_peak + self.files


def footprint(work: Work, *, cache_bytes: int = 0, process: int | None = None, tokenizer: bool = True) -> Footprint:
    """What a run with such steps takes.

    cache_bytes  of keys and values of what samples
    process      bytes of the process before it opens anything; None: as measured once
    tokenizer    whether the process has one
    """
    w = WeightBytes.of(work.arch, work.layout, work.dtype)
    step = step_bytes(work)
    numbers = trained_numbers(work)
    trained = {"trained, float32": 4 * numbers, "optimizer": 8 * numbers}
    living = {name: size for name, size in step.parts.items() if size}
    if cache_bytes:
        living = {"keys and values": cache_bytes, **living}
    words = tokenizer_bytes(work) if tokenizer else 0
    if work.device == "cuda":
        device = {"weights": weights_on_gpu(work), **trained, **living}
        device |= around_gpu(work, step.total)
        host = {"process": (process or GPU_PROCESS) + words}
        if work.placement == "stream":
            host["pinned experts"] = work.arch.num_layers * pinned_bytes(w.layer_tensors)
        if work.on_host:
            host["pinned embedding, head"] = len(work.on_host) * pinned_bytes((w.table,))
        if work.offload:
            x = work.pack * work.arch.hidden_size * work.residual_size
            host["layers' inputs"] = work.packs * work.arch.num_layers * (1 << (x - 1).bit_length())
        files = w.packed if work.placement == "mmap" else 0
        return Footprint(device, host, files + LIBRARIES, step.moment)
    held, files = _on_cpu(work, w)
    host = {"process": (process or PROCESS) + words, "weights": held, **trained, **living}
    host |= beside_on_cpu(work, step)
    return Footprint({}, {name: size for name, size in host.items() if size}, files + LIBRARIES, step.moment)


def tokenizer_bytes(work: Work) -> int:
    """Of a vocabulary of that size."""
    return min(TOKENIZER, TOKENIZER * work.arch.vocab_size // 201_088)


def beside_on_cpu(work: Work, step: StepBytes) -> dict[str, int]:
    """What libraries keep on a CPU, by part."""
    return {"products' code": _products(work), "allocator": _holes(work, step)}


def weights_on_gpu(work: Work) -> int:
    """Bytes of the weights that are on a GPU."""
    w = WeightBytes.of(work.arch, work.layout, work.dtype)
    away = len(work.on_host) * w.embedding
    match work.placement:
        case "resident":
            return w.packed - away
        case "bf16":
            return w.expanded + w.other * work.size // 2
        case "stream":
            return w.other - away + 2 * w.layer_experts
        case "mmap":
            return 0


def _on_cpu(work: Work, w: WeightBytes) -> tuple[int, int]:
    """Copies in memory, and pages of files."""
    read = min(1.0, work.pack * work.packs * _FAULT / w.embedding)  # of the embedding, whose rows are far apart
    unread = int((1 - read) * w.embedding)
    match work.placement:
        case "resident":
            return w.packed, 0
        case "stream":
            return w.other - w.embedding + 2 * w.layer_experts, w.experts + w.embedding - unread
        case "mmap":
            return 0, w.packed - unread
        case "bf16":
            if work.dtype == "bfloat16":  # what isn't expanded is the file's own
                return w.expanded, w.other - unread
            return w.expanded + w.other * work.size // 2, w.other


def _products(work: Work) -> int:
    """Of oneDNN's code and plans: experts have ever new numbers of rows."""
    if work.dtype != "bfloat16":
        return 0
    kinds = 4
    if work.adapts("gate_up_proj", "down_proj"):  # both factors forward and twice backward, of both matrices
        kinds += 12 if work.arch.hidden_size != work.arch.intermediate_size else 9
    return min(_SIZES * kinds + 20, _MOST_PRODUCTS) * _PRODUCT


def _holes(work: Work, step: StepBytes) -> int:
    """What freed blocks of many sizes leave between those that live: measured, see docs/plan.md."""
    layer = LayerBytes(work, work.arch.sliding_window, work.pack, work.pack)
    often = _HOLES_LAYER_AGAIN if work.recompute else _HOLES_LAYER
    return int(_HOLES * (step.total - step.parts.get("scratch", 0)) + often * layer.forward_with_graph)


def cache_bytes(recipe: Recipe, arch: Arch, dtype: str, limit: int) -> int:
    """Keys and values of a step's samples, where this process samples them; `limit` is what the engine allows itself.

    A sliding layer's sequence has one block of its window, a full one's as many blocks as its length takes.
    """
    if recipe.method != "grpo" or recipe.rl.rollout != "engine":
        return 0
    slot = 2 * arch.num_kv_heads * arch.head_dim * DTYPE_BYTES[dtype]
    sliding = sum(kind == "sliding_attention" for kind in arch.layer_types)
    full = arch.num_layers - sliding
    blocks = -(-recipe.max_length // FULL_BLOCK) * FULL_BLOCK
    each = slot * (sliding * arch.sliding_window + full * blocks)
    return min(each * recipe.rl.prompts * recipe.rl.group, limit)
