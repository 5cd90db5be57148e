"""What `weights: auto` and `train.recompute: auto` stand for, and why: decided here for a run and for its plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ossia.model.arch import Arch, Layout
from ossia.model.budget.step import graph_bytes_per_token
from ossia.model.budget.weights import WeightBytes
from ossia.model.budget.work import DeviceKind, Placement, Work

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
          and adapters need the rest); resident where the packed ones fit beside an expanded layer and 2 GB; stream
          where the packed experts take less than nine tenths of the machine's free memory; else mmap
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
    if w.packed + w.layer_expanded + WORKING_BYTES < free:
        return Choice("resident", f"packed weights, {gib(w.packed)}, fit beside a layer expanded and 2 GiB to work in")
    if w.packed < 0.9 * memory.machine_free or not memory.machine_free:
        free_here = gib(memory.machine_free) if memory.machine_free else "if that is larger"
        why = f"packed weights, {gib(w.packed)}, don't fit on the GPU, but into the machine's free memory"
        return Choice("stream", f"{why}, {free_here}")
    return Choice("mmap", f"packed weights, {gib(w.packed)}, fit neither on the GPU nor into the free memory")


def keeps_activations(work: Work, memory: Memory) -> bool:
    """Whether a step keeps every layer's graph instead of computing each layer twice, where a recipe says `auto`.

    It does where they stay under half of the GPU's free memory; on a CPU under a fifth of the machine's, and only where
    experts are expanded in memory anyway. Either way the numbers are the same.
    """
    needed = work.together * work.pack * graph_bytes_per_token(replace(work, recompute=False))
    if work.device == "cuda":
        return needed < memory.gpu_free // 2
    return work.placement == "bf16" and needed < memory.machine // 5


def gib(num_bytes: float) -> str:
    """Bytes for a reader."""
    return f"{num_bytes / 2**30:.2f} GiB"
