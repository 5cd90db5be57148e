"""Ranks that share each pack's tokens, and the groups that divide the packs of a step (context parallelism)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from ossia.config import Recipe
from ossia.errors import RecipeError
from ossia.model.checkpoint import Checkpoint
from ossia.model.open import model_folder

if TYPE_CHECKING:
    from ossia.train.ranks.world import World


class Group:
    """The ranks that this one shares packs with: neighbours, so that those of a machine are together.

    rank, size         this one's number in its group, and how many the group has
    number, num_groups of its group, and how many groups divide a step's packs
    """

    def __init__(self, world: World, size: int) -> None:
        """All ranks make their groups at the same time. Raises RecipeError if the groups don't divide the ranks."""
        if world.size % size:
            raise RecipeError(
                f"parallel.context: {size} ranks are to share each pack, but there are {world.size} ranks\n"
                f"  allowed: a divisor of {world.size}; or start another number of ranks"
            )
        self.size, self.num_groups = size, world.size // size
        self.number, self.rank = divmod(world.rank, size)
        self._world, self._ranks = world, None
        for first in range(0, world.size if size > 1 else 0, size):
            made = dist.new_group(range(first, first + size))
            if first == self.number * size:
                self._ranks = made

    def exchange(self, rows: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """See `ops.attention.divided.Members`."""
        result = rows.new_empty(sum(taken), *rows.shape[1:])
        self._world.exchange(rows, given, result, taken, self._ranks)
        return result


def group_of(world: World | None, size: int) -> Group | None:
    """The group of this rank; None where each rank has packs of its own.

    size    `parallel.context` of the recipe
    Raises  RecipeError where groups of that size don't divide the ranks
    """
    if size == 1:
        return None
    if world is None:
        raise RecipeError(
            f"parallel.context: {size} ranks are to share each pack, but this process is alone\n"
            f"  next: start it with --nproc {size}, or a multiple"
        )
    return Group(world, size)


def experts_over(world: World | None, recipe: Recipe) -> Group | None:
    """All ranks, if each is to have some experts for good (`parallel.experts`); None: experts are gathered.

    Raises  RecipeError where the ranks don't divide the experts
    """
    if recipe.parallel.experts != "stay" or world is None:
        return None
    num_experts = Checkpoint.open(model_folder(recipe.model)).arch.num_experts
    if num_experts % world.size:
        allowed = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
        raise RecipeError(
            f"parallel.experts: stay: {world.size} ranks don't divide this model's {num_experts} experts\n"
            f"  allowed: {allowed} ranks; or parallel.experts=gather"
        )
    return Group(world, world.size)


def check_heads(group: Group, num_kv_heads: int) -> None:
    """Refuses a group that a model's attention can't be divided over. Raises RecipeError."""
    if num_kv_heads % group.size:
        allowed = ", ".join(str(n) for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0)
        raise RecipeError(
            f"parallel.context: {group.size} ranks divide a pack by attention's heads, of which this model has "
            f"{num_kv_heads} for keys and values\n  allowed: {allowed}"
        )
