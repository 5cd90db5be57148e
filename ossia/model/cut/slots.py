"""Two slots in which a model's layers come and go: one at work, one on its way."""

from __future__ import annotations

from abc import ABC, abstractmethod


class TwoSlots(ABC):
    """Which layer is in which of two slots.

    Whoever goes through the layers up or down finds the next one there or on its way: asking for a layer sends for the
    one after it, in the direction of travel, while the device computes. Turning round costs nothing, since the layer
    before is still there.

    sent   layers that were sent for so far
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers, self.sent = num_layers, 0
        self._holds: list[int | None] = [None, None]
        self._at: int | None = None

    def slot_of(self, index: int) -> int:
        """The slot of a layer, which is ready for what is launched next; until two others are asked for."""
        if index not in self._holds:
            self._fill(index, 0 if self._at is None else self._holds.index(self._at) ^ 1)
        slot = self._holds.index(index)
        self._wait(slot)
        if index != self._at:
            down = self._at is not None and index < self._at
            self._at = index
            following = index - 1 if down or index == self._num_layers - 1 else index + 1
            following = following if following >= 0 else 1
            if following not in self._holds and following < self._num_layers:
                self._fill(following, slot ^ 1)
        return slot

    def _fill(self, index: int, slot: int) -> None:
        self.sent += 1
        self._holds[slot] = index
        self._send(index, slot)

    @abstractmethod
    def _send(self, index: int, slot: int) -> None:
        """Have a layer on its way into a slot, whose content nobody asks for any more."""

    @abstractmethod
    def _wait(self, slot: int) -> None:
        """Have what is launched next find the slot's layer there."""
