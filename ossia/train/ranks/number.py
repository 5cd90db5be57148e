"""How many processes `ossia train` is on a machine. Imports no torch: `ossia plan` asks too, for GPUs elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ossia.config import Recipe
from ossia.errors import UserError


@dataclass(frozen=True, slots=True)
class NumRanks:
    """How many processes, and why.

    idle      GPUs that have none, in words; packless: ranks that never have a pack. "": there are none such
    """

    number: int
    why: str
    idle: str = ""
    packless: str = ""

    @property
    def lines(self) -> list[str]:
        """For the person at the terminal."""
        return [f"ranks: {self.number} ({self.why})", *(note for note in (self.idle, self.packless) if note)]


def num_ranks(recipe: Recipe, nproc: int | None, gpus: Callable[[], int]) -> NumRanks:
    """Of the command, of the recipe, or the machine's: with `method: sft` a process for each GPU, else one.

    nproc   what `--nproc` says
    gpus    counts the GPUs that this process may use, `CUDA_VISIBLE_DEVICES` respected; asked only where it matters
    Raises  UserError if `nproc` doesn't go with the recipe
    """
    if nproc is not None and nproc > 1 and recipe.method != "sft":
        raise UserError(f"--nproc: {nproc}, but `method: {recipe.method}` is one process as yet; leave it out")
    found = _wanted(recipe, nproc, gpus)
    train, groups = recipe.train, found.number // recipe.parallel.context
    packs = train.tokens_per_step // train.tokens_per_pack
    if recipe.method != "sft" or groups <= packs:
        return found
    without, enough = (groups - packs) * recipe.parallel.context, groups * train.tokens_per_pack
    most = f"a step has at most {packs} of {train.tokens_per_pack:,} tokens"
    said = f"{without} of the {found.number} ranks never have a pack: {most}; train.tokens_per_step={enough} has enough"
    return replace(found, packless=said)


def _wanted(recipe: Recipe, nproc: int | None, gpus: Callable[[], int]) -> NumRanks:
    said = recipe.parallel.ranks
    if nproc is not None:
        return NumRanks(nproc, "--nproc")
    if said != "auto":
        return NumRanks(said, "as `parallel.ranks` says")
    if recipe.device == "cpu":
        return NumRanks(1, "parallel.ranks: auto; on a CPU it is one process")
    found, context = gpus(), recipe.parallel.context
    if recipe.method != "sft":
        why = f"parallel.ranks: auto; `method: {recipe.method}` is one process as yet"
        server = "; with `rl.rollout` a server can sample on them"
        return NumRanks(1, why, f"{_left(found - 1)}{server}" if found > 1 else "")
    if found < 2:
        return NumRanks(1, f"parallel.ranks: auto; {'one GPU is' if found else 'no GPU is'} visible here")
    number = found // context * context or found  # fewer than share a pack: the run says how many it needs
    of_them = f"all {found}" if number == found else f"{number} of the {found}"
    why = f"parallel.ranks: auto; {of_them} GPUs that are visible here"
    return NumRanks(number, why, f"{_left(found - number)}: {context} share a pack" if number < found else "")


def _left(number: int) -> str:
    return "1 GPU stays idle" if number == 1 else f"{number} GPUs stay idle"
