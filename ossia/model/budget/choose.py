"""What `weights: auto` and `train.recompute: auto` stand for, and why: decided here for a run and for its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ossia.model.arch import Arch, Layout
from ossia.model.budget.gpu import fits_beside
from ossia.model.budget.step import attention_bytes, graph_bytes_per_token
from ossia.model.budget.weights import EMBEDDING, HEAD, WeightBytes
from ossia.model.budget.work import DeviceKind, Placement, Work

Fits = Callable[[Work], bool]
WORKING_BYTES = 2 << 30  # a step of a few thousand tokens, and what a CUDA context takes


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a machine: all of its memory and what is free of it, and of its GPU. 0: not known, taken as enough."""

    machine: int
    machine_free: int
    gpu: int = 0
    gpu_free: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """A placement, and why it is this one."""

    placement: Placement
    why: str


def choose_placement(arch: Arch, layout: Layout, dtype: str, device: DeviceKind, memory: Memory) -> Choice:
    """What `weights: auto` stands for.

    CPU   bf16 where the expanded experts take less than a quarter of the machine's memory, else mmap
    CUDA  bf16 where all weights, experts expanded, fit into half of the device's free memory (activations, gradients
          and adapters need the rest); resident where the packed ones but the embedding fit beside 2 GB; stream where
          the packed experts take less than nine tenths of the machine's free memory; else mmap
    """
    w = WeightBytes.of(arch, layout, dtype)
    if device == "cpu":
        share, quarter = gib(w.expanded), gib(memory.machine // 4)
        if w.expanded < memory.machine / 4:
            return Choice("bf16", f"expanded experts, {share}, are less than a quarter of the memory, {quarter}")
        return Choice("mmap", f"expanded experts would take {share}, a quarter of the memory is {quarter}")
    free = memory.gpu_free
    expanded = w.expanded + w.other
    if expanded < free / 2:
        return Choice("bf16", f"all weights, experts expanded, {gib(expanded)}, fit into half of the free {gib(free)}")
    if w.packed - w.embedding + WORKING_BYTES < free:
        return Choice("resident", f"packed weights, {gib(w.packed)}, fit beside 2 GiB to work in")
    if w.packed < 0.9 * memory.machine_free or not memory.machine_free:
        free_here = gib(memory.machine_free) if memory.machine_free else "if that is larger"
        why = f"packed weights, {gib(w.packed)}, don't fit on the GPU, but into the machine's free memory"
        return Choice("stream", f"{why}, {free_here}")
    return Choice("mmap", f"packed weights, {gib(w.packed)}, fit neither on the GPU nor into the free memory")


def waits_on_host(
    arch: Arch, layout: Layout, placement: Placement, device: DeviceKind, memory: Memory
) -> frozenset[str]:
    """Which of embedding and head a GPU leaves in the machine's memory, by name; see `on_host_where_full`."""
    if device != "cuda" or placement not in ("resident", "stream"):
        return frozenset()
    w = WeightBytes.of(arch, layout, "bfloat16")
    placed = w.packed if placement == "resident" else w.other + 2 * w.layer_experts
    found = on_host_where_full(memory.gpu_free, placed, w.embedding)
    return found | {EMBEDDING} if placement == "stream" else found


def on_host_where_full(free: int, placed: int, table: int) -> frozenset[str]:
    """Which of embedding and head wait in the machine's memory: first the one whose rows are only looked up, then both.

    free    bytes of the device; placed  bytes of the weights that would be on it; table  of either of the two
    """
    names = (EMBEDDING, HEAD)
    lacking = sum(placed - count * table + WORKING_BYTES >= free for count in range(len(names)))
    return frozenset(names[:lacking])


def keeps_activations(work: Work, memory: Memory) -> bool:
    """Whether a step keeps every layer's graph instead of computing each layer twice, where a recipe says `auto`.

    It does where they stay under half of the GPU's free memory; on a CPU under a fifth of the machine's, and only where
    experts are expanded in memory anyway. Either way the numbers are the same.
    memory  what is there once the weights are where they belong
    """
    kept = replace(work, recompute=False, offload=False, chunk=None)
    needed = work.together * work.pack * graph_bytes_per_token(kept)
    if work.device == "cuda":
        return needed < memory.gpu_free // 2
    return work.placement == "bf16" and needed < memory.machine // 5


def offloads(work: Work, memory: Memory, fits: Fits | None = None) -> bool:
    """Whether layers' inputs wait in the machine's memory, where a recipe says `auto` and layers are computed again.

    They do where a step doesn't fit on the GPU with them.
    memory  what is there once weights, what is trained and the optimizer's state are where they belong
    fits    whether a step does; None: as one process's, which has all of the weights
    """
    fits = fits or _fits_alone(memory)
    return work.device == "cuda" and not fits(replace(work, offload=False, keep_attention=False))


def keeps_attention(work: Work, memory: Memory, fits: Fits | None = None) -> bool:
    """Whether full attention over long documents is computed once where layers are computed again.

    It is where what it finds takes at most a quarter of the GPU's free memory and the step fits with it, `memory` and
    `fits` as of `offloads`; on a CPU at most a tenth of the machine's.
    """
    if work.offload or not work.recompute or work.attention == "reference":
        return False
    needed = attention_bytes(work, work.arch.num_layers - 1)
    if work.device == "cpu":
        return 0 < needed <= memory.machine // 10
    fits = fits or _fits_alone(memory)
    return 0 < needed <= memory.gpu_free // 4 and fits(replace(work, keep_attention=True))


def _fits_alone(memory: Memory) -> Fits:
    """Whether a step of one process fits."""
    return lambda step: fits_beside(step, memory.gpu, memory.gpu_free)


def gib(num_bytes: float) -> str:
    """Bytes for a reader."""
    return f"{num_bytes / 2**30:.2f} GiB"
