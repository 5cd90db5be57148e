"""Which ranks see the same run folder. Nothing is assumed about it: hosts may share a disk or have one each."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from ossia.errors import RunError

if TYPE_CHECKING:
    from ossia.train.ranks.world import World


def keepers(world: World, run: Path) -> list[int]:
    """Of each rank the first whose run folder is its own too: that one keeps the folder, as rank 0 does for its host.

    All ranks call this together. It makes the run folder where there is none.
    Raises  RunError if it can't be written
    """
    mark = run / f".rank-{world.rank}-{uuid.uuid4().hex}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise RunError(f"{run}: can't be written here ({error.strerror}); every host keeps its ranks' files") from error
    try:
        marks = world.gather_beside(mark.name)
        mine = next(rank for rank, name in enumerate(marks) if (run / name).exists())
        return world.gather_beside(mine)  # all have looked when all have told
    finally:
        mark.unlink(missing_ok=True)
