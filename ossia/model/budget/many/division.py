"""How a run is divided over GPUs, and what a collective over some of them sends where.

Ranks are numbered machine by machine. Nested, from the nearest neighbours out: context parallel and expert parallel
ranks, then the ranks that a layer is sharded over, then replicas of all that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ossia.errors import UserError
from ossia.model.budget.many.links import Link


class Spread(NamedTuple):
    """Bytes that a GPU receives: from its own machine, and from others."""

    inner: float
    outer: float

    def times(self, number: float) -> Spread:
        """So many of them."""
        return Spread(self.inner * number, self.outer * number)

    def plus(self, other: Spread) -> Spread:
        """Both, one after the other."""
        return Spread(self.inner + other.inner, self.outer + other.outer)

    @property
    def total(self) -> float:
        return self.inner + self.outer


NOTHING = Spread(0.0, 0.0)


def _uneven(name: str, found: int, allowed: str) -> UserError:
    return UserError(f"{name.replace('_', ' ')}: {found}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class Division:
    """A run on `gpus` GPUs, `per_machine` of them in a machine.

    shards          ranks over which a layer's weights lie; 1: each has them all
    trained_shards  ranks over which what is trained lies, with its optimizer's state and its gradients
    experts         ranks over which a layer's experts lie for good: tokens travel to them
    context         ranks that share one sequence
    offload         the parts are in the machine's memory: of all weights with the optimizer's state and gradients, or
                    of a frozen base
    """

    gpus: int
    per_machine: int = 8
    shards: int = 1
    trained_shards: int = 1
    experts: int = 1
    context: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for a division that doesn't come out even."""
        if self.gpus > self.per_machine and self.gpus % self.per_machine:
            raise _uneven("gpus", self.gpus, f"a multiple of the GPUs of a machine, {self.per_machine}, or fewer")
        shards = {"shards": self.shards, "trained_shards": self.trained_shards}
        for name, found in (shards | {"experts": self.experts, "context": self.context}).items():
            if found < 1 or self.gpus % found:
                raise _uneven(name, found, f"a divisor of the GPUs, {self.gpus}")
        for name, found in shards.items():
            if found > 1 and found % self.experts and self.experts % found:
                raise _uneven(name, found, f"a divisor or a multiple of the expert parallel ranks, {self.experts}")

    @property
    def machines(self) -> int:
        return -(-self.gpus // self.per_machine)

    @property
    def local(self) -> int:
        """GPUs of a machine that take part."""
        return min(self.gpus, self.per_machine)

    def _members(self, number: int, stride: int) -> int:
        """Ranks of a group of `number`, `stride` apart, that are in one machine."""
        return max(1, min(number, self.local // stride))

    def gathered(self, size: float, number: int, stride: int = 1) -> Spread:
        """Of an all-gather of `size` bytes, or a reduce-scatter of as many, over `number` ranks `stride` apart.

        What other machines have crosses the network once a machine, divided over the members' own ports, and goes on
        to the machine's other members inside it.
        """
        members = self._members(number, stride)
        received = size * (number - 1) / number
        outer = size * (1 - members / number) / members
        return Spread(received - outer, outer)

    def summed(self, size: float, number: int, stride: int = 1) -> Spread:
        """Of an all-reduce: a reduce-scatter and an all-gather."""
        return self.gathered(size, number, stride).times(2)

    def exchanged(self, size: float, number: int, stride: int = 1) -> Spread:
        """Of an all-to-all in which each of the ranks has `size` bytes for all of them together, itself included."""
        members = self._members(number, stride)
        return Spread(size * (members - 1) / number, size * (number - members) / number)

    def seconds(self, spread: Spread, inner: Link, outer: Link) -> float:
        """On the links, both at once."""
        return max(spread.inner / inner.bytes_s(self.local), spread.outer / outer.bytes_s(self.local))
