"""Where a rank's parts wait: on its device, or in the machine's memory, from which they are sent for each gather.

Copies go on a stream of their own, behind what has been launched, so a part travels while a layer computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ossia.model.cut.ranks import Ranks


class Home:
    """The place of parts.

    device   where layers are gathered and computed
    offload  the parts wait in the machine's memory instead; on a CPU that is the same
    """

    def __init__(self, device: torch.device, *, offload: bool = False) -> None:
        self.device = device
        self.place = torch.device("cpu") if offload else device
        self._copies = torch.cuda.Stream(device) if self.apart and device.type == "cuda" else None

    @property
    def apart(self) -> bool:
        """Whether parts are elsewhere than layers."""
        return self.place.type != self.device.type

    def keep(self, part: Tensor) -> Tensor:
        """A part where it waits, so that the device can fetch it by itself."""
        part = part.to(self.place)
        return part.pin_memory() if self._copies is not None else part

    def room(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros in which a part is made ready to be sent."""
        return torch.zeros(numel, dtype=dtype, device=self.place, pin_memory=self._copies is not None)

    def begin_gather(self, ranks: Ranks, whole: Tensor, part: Tensor) -> Callable[[], None]:
        """`Ranks.begin_gather` of a part that waits here."""
        if self._copies is None:
            return ranks.begin_gather(whole, part.to(self.device))
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            there = part.to(self.device, non_blocking=True)
            wait = ranks.begin_gather(whole, there)

        def arrived() -> None:
            wait()
            there.record_stream(torch.cuda.current_stream(self.device))  # it is read until here

        return arrived
