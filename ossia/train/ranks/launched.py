"""Which of how many processes this is, as `torchrun` tells it. Imports no torch: commands ask before all else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

_GIVEN: Mapping[str, str] = os.environ  # the one way in which a launcher tells a process what it is


@dataclass(frozen=True, slots=True)
class Launched:
    """A process among several.

    rank, size              its number and how many there are, on all hosts
    local_rank, local_size  on this host
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def launched() -> Launched | None:
    """What PyTorch's launcher, or another that sets the same variables, says of this process; None: it's alone."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= _GIVEN.keys():
        return None
    rank, size = int(_GIVEN["RANK"]), int(_GIVEN["WORLD_SIZE"])
    local_rank, local_size = int(_GIVEN.get("LOCAL_RANK", rank)), int(_GIVEN.get("LOCAL_WORLD_SIZE", size))
    return Launched(rank, size, local_rank, local_size)
