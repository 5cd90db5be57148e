"""Layers' inputs in the machine's memory until their backward, where a GPU has no room for those of a long step.

Copies go on a stream of their own, both ways: a layer's input leaves while the layer computes, and comes back while the
layer after it is differentiated, so a step waits for them only where a copy takes longer than a layer. On a CPU they
are plain copies: the same path, for tests.
Letters: T tokens of a pack, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class _Away:
    """A tensor of the device in the machine's memory; `back` is there, or on its way, once it was asked for."""

    host: Tensor
    back: Tensor | None = None
    arrived: torch.cuda.Event | None = None


Away = list[_Away]
"""The inputs of one layer, one a pack."""


class Offload:
    """Sends tensors of a device to the machine's memory and back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, xs_TD: list[Tensor]) -> Away:
        """Copies of these, once what computes them is done. The device's memory is free for others after that."""
        return [self._send(x) for x in xs_TD]

    def call_back(self, away: Away) -> None:
        """Have them on their way back, while something else computes."""
        for one in away:
            self._call(one)

    def take(self, away: Away) -> list[Tensor]:
        """They themselves, on the device, ready for what is launched next. `away` is empty afterwards."""
        self.call_back(away)
        found = []
        for one in away:
            assert one.back is not None
            if one.arrived is not None:
                torch.cuda.current_stream(self._device).wait_event(one.arrived)
            found.append(one.back)
        away.clear()
        return found

    def _send(self, x_TD: Tensor) -> _Away:
        if self._copies is None:
            return _Away(x_TD.detach().clone())
        host = torch.empty(x_TD.shape, dtype=x_TD.dtype, pin_memory=True)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            host.copy_(x_TD.detach(), non_blocking=True)
        x_TD.record_stream(self._copies)  # whoever is given its memory next waits for the copy
        return _Away(host)

    def _call(self, one: _Away) -> None:
        if one.back is not None:
            return
        if self._copies is None:
            one.back = one.host.clone()
            return
        one.back = torch.empty(one.host.shape, dtype=one.host.dtype, device=self._device)
        one.arrived = torch.cuda.Event()
        # the memory may have been another's, whose last use has been launched; the copy out went before on this stream
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            one.back.copy_(one.host, non_blocking=True)
            one.arrived.record()
