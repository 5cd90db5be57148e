"""What servers that sample for a run have to be sent after a step: the adapter, or else merged weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ossia.model.arch import Arch, Layout
from ossia.model.budget.many.ranks import GRADIENT_SIZE
from ossia.model.budget.weights import WeightBytes, trained_numbers
from ossia.model.budget.work import Work


def adapter_bytes(work: Work, size: int = GRADIENT_SIZE) -> int:
    """Of an adapter's file, tensors alone; float32 as `model.peft.save_adapter` writes it, or `size` bytes a number."""
    assert work.ranks is not None
    return size * trained_numbers(work)


def merged_bytes(arch: Arch, layout: Layout) -> int:
    """Of all weights of a merged model: "bf16", or "mxfp4" with the experts rounded again."""
    return WeightBytes.of(arch, layout, "bfloat16").packed


@dataclass(frozen=True, slots=True)
class Sync:
    """What one server has to be sent, and in how many seconds at a link's rate."""

    num_bytes: int
    link_bytes_s: float

    @property
    def seconds(self) -> float:
        return self.num_bytes / self.link_bytes_s


def needed_bytes_s(num_bytes: int, servers: int, step_s: float, share: float) -> float:
    """Bytes a second that must leave the trainer, so that sending to all `servers` takes that share of a step.

    A tree of servers that pass it on needs the same at each server and 1/servers of it at the trainer.
    """
    return num_bytes * servers / (step_s * share)


def with_ranks(work: Work, targets: tuple[str, ...], rank: int) -> Work:
    """The same step with another adapter."""
    return replace(work, ranks=dict.fromkeys(targets, rank))
