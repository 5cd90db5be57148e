"""Whether a run's weights are cut over its ranks: decided once for all of them, and said."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ossia.config import Recipe
from ossia.kernels import pick_kernels
from ossia.model.checkpoint import Checkpoint
from ossia.model.open import DTYPES, memory_of, model_folder
from ossia.plan.many.shard import choose_shard

if TYPE_CHECKING:
    from ossia.train.ranks.world import World


def ranks_to_cut_over(recipe: Recipe, world: World | None, say: Callable[[str], None]) -> World | None:
    """The ranks that each hold a part of every weight; None: each has everything. Rank 0 decides, by its own memory.

    Raises  what opening the checkpoint raises
    """
    if world is None:
        if unused := _for_several(recipe):
            say(f"{', '.join(unused)}: this is one process, which has everything")
        return None
    decided = None
    if world.leads:
        checkpoint, device = Checkpoint.open(model_folder(recipe.model)), world.device
        found = choose_shard(
            recipe,
            checkpoint.arch,
            checkpoint.layout,
            memory_of(device),
            "cuda" if device.type == "cuda" else "cpu",
            pick_kernels(torch.device(device), DTYPES[recipe.dtype]),
            ranks=world.size,
            per_machine=world.local_size,
        )
        decided = found.cut
        how = f"cut over {world.size} ranks" if found.cut else "whole on every rank"
        say(f"weights: {how} (parallel.shard: {recipe.parallel.shard}): {found.why}")
        if recipe.parallel.offload and not found.cut:
            say("parallel.offload: true: is of parts, and no weights are cut; with parallel.shard: all they would be")
    return world if world.from_first(decided) else None


def _for_several(recipe: Recipe) -> list[str]:
    """What a recipe asks of ranks that each have a part, in its words."""
    asked = recipe.parallel
    return [
        *(["parallel.shard: all"] if asked.shard == "all" else []),
        *(["parallel.experts: stay"] if asked.experts == "stay" else []),
        *(["parallel.offload: true"] if asked.offload else []),
    ]
