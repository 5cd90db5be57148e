"""What `parallel.shard: auto` stands for in a run, and what a rank then takes, by what `ossia plan --gpus` uses."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ossia.config import Recipe
from ossia.model.arch import Arch, Layout
from ossia.model.budget.choose import Memory, choose_placement, gib
from ossia.model.budget.many.division import Division
from ossia.model.budget.many.links import INFINIBAND
from ossia.model.budget.many.ranks import rank_bytes
from ossia.model.budget.step import step_bytes
from ossia.model.budget.work import DeviceKind, KernelKind, Work
from ossia.plan.machine import Machine
from ossia.plan.many.predict import Wanted, plan_of, rank_work
from ossia.plan.memory import (
    GPU_PROCESS,
    LIBRARIES,
    PROCESS,
    Footprint,
    around_gpu,
    beside_on_cpu,
    footprint,
    tokenizer_bytes,
)

_OF_A_MACHINE = 0.9  # of its free memory, for all of its ranks
_WORTH = 0.9  # who takes no less with parts lacks room for activations, not for weights


@dataclass(frozen=True, slots=True)
class Shard:
    """Whether weights are cut over the ranks, and why."""

    cut: bool
    why: str


def choose_shard(
    recipe: Recipe,
    arch: Arch,
    layout: Layout,
    memory: Memory,
    kind: DeviceKind,
    kernels: KernelKind,
    *,
    ranks: int,
    per_machine: int,
) -> Shard:
    """What a recipe's `parallel.shard` stands for with so many ranks.

    memory  of the machine and its GPU, before a weight is there
    """
    if recipe.parallel.experts == "stay":
        return Shard(True, "parallel.experts: stay")
    if recipe.parallel.shard != "auto":
        return Shard(recipe.parallel.shard == "all", "as the recipe says")
    if (key := recipe.keeps_weights_whole) is not None:
        return Shard(False, f"`{key}` goes with whole weights")
    if recipe.weights == "stream":
        return Shard(False, "`weights: stream` has them in the machine's memory, with parallel.shard: all in parts")
    if recipe.adapter is None:
        return Shard(True, "all weights are trained")
    division = Division(ranks, per_machine if ranks % per_machine == 0 else ranks)
    divided = replace(division, shards=ranks, offload=recipe.offloads_parts)
    machine = Machine("GPU", kind, kernels, memory, 0.0, "", host_bytes_s=1e9)
    if kind == "cuda":
        wanted = Wanted(ranks, INFINIBAND)
        whole, cut = (plan_of(recipe, machine, arch, layout, wanted, one, "") for one in (division, divided))
        needed, with_parts, room = whole.rank.device_peak, cut.rank.device_peak, whole.room
    else:
        work, _ = rank_work(recipe, machine, arch, layout, division)
        placement = choose_placement(arch, layout, recipe.dtype, "cpu", memory).placement
        work = replace(work, device="cpu", placement=placement if recipe.weights == "auto" else recipe.weights)
        beside = recipe.parallel.async_save
        cut = cut_footprint(work, ranks, saves_beside=beside)
        needed, with_parts = (f.host_peak * per_machine for f in (footprint(work), cut))
        room = int(_OF_A_MACHINE * memory.machine_free)
    if needed <= room:
        return Shard(False, f"everything on each rank takes {gib(needed)}, and fits into {gib(room)}")
    said = f"everything on each rank would take {gib(needed)}, a part {gib(with_parts)}; {gib(room)} are there"
    return Shard(with_parts < _WORTH * needed, said)


def cut_footprint(work: Work, ranks: int, *, offload: bool = False, saves_beside: bool = False) -> Footprint:
    """What one of so many ranks takes whose weights are cut over all of them.

    offload       its parts wait in the machine's memory
    saves_beside  its part of a checkpoint is saved while it goes on
    """
    work = replace(work, placement="bf16" if work.ranks is None else "resident", on_host=frozenset())
    trained = ranks if work.ranks is None else 1
    division = Division(ranks, ranks, ranks, trained, offload=offload and work.device == "cuda")
    rank = rank_bytes(work, division, saves_beside=saves_beside)
    if work.device == "cuda":
        device, host = {**rank.device, **around_gpu(work, rank.living)}, {"process": GPU_PROCESS, **rank.host}
        return Footprint(device, host, LIBRARIES, rank.moment)
    beside = beside_on_cpu(work, step_bytes(work))
    host = {"process": PROCESS + tokenizer_bytes(work), **rank.device, **beside}
    return Footprint({}, {name: size for name, size in host.items() if size}, LIBRARIES, rank.moment)
