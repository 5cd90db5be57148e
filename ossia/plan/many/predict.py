"""A recipe, a GPU and how many of them -> a plan of one rank, what travels, and how long a step takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ossia.config import Recipe
from ossia.errors import UserError
from ossia.model.arch import Arch, Layout
from ossia.model.budget.gpu import GPU_CONTEXT, ON_A_GPU, around_gpu
from ossia.model.budget.many.division import Division, Spread
from ossia.model.budget.many.links import Link, inner_link
from ossia.model.budget.many.ranks import RankBytes, Whole, rank_bytes, trained_state
from ossia.model.budget.many.traffic import traffic
from ossia.model.budget.work import Work
from ossia.plan.machine import Machine
from ossia.plan.many.times import Rates, StepTime, step_time
from ossia.plan.predict import decide, read_shape


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user says of the machines; None: what fits is taken.

    shards   ranks that a layer is divided over; offload  the parts wait in the machine's memory
    experts  ranks that experts are divided over for good; context  that share a sequence; None: as the recipe says
    """

    gpus: int
    outer: Link
    per_machine: int = 8
    shards: int | None = None
    experts: int | None = None
    context: int | None = None
    offload: bool | None = None


@dataclass(frozen=True, slots=True)
class ManyPlan:
    """What a recipe will take on many GPUs.

    work         the step of one rank; idle: ranks that have no pack of their own
    rank         its bytes, with the allocator's holes and the CUDA context
    room         bytes of a GPU; host_room of a machine's memory, None: not known
    received     bytes that a rank receives in a step, by what for
    """

    recipe: Recipe
    machine: Machine
    division: Division
    why: str
    work: Work
    idle: int
    rank: RankBytes
    room: int
    host_room: int | None
    rates: Rates
    received: Mapping[str, Spread]
    time: StepTime | None

    @property
    def host_needed(self) -> int:
        """Of a machine's memory, for all of its ranks: what waits there."""
        return self.rank.host_peak * self.division.local

    @property
    def on_paper(self) -> bool:
        """Whether `ossia train` has no such division: it cuts weights, and experts, over all ranks or over none."""
        d = self.division
        held = d.shards if self.work.ranks is None else 1
        return not {d.shards, d.experts} <= {1, d.gpus} or d.trained_shards != held

    @property
    def fits(self) -> bool:
        on_host = self.host_room is None or self.host_needed <= self.host_room
        return self.rank.device_peak <= self.room and on_host

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks that have some."""
        ranks = self.division.gpus // self.division.context - self.idle
        return self.work.pack * self.work.packs * self.division.context * ranks


def make_many_plan(recipe: Recipe, machine: Machine, wanted: Wanted) -> ManyPlan:
    """The plan. Raises UserError for a division that doesn't come out even, CheckpointError as `read_shape`."""
    if recipe.weights in ("stream", "mmap"):
        raise UserError(
            f"{wanted.gpus} GPUs: `weights` is {recipe.weights}; a plan of several GPUs knows auto, resident and bf16\n"
            f"  next: ossia plan RECIPE --gpus {wanted.gpus} weights=auto"
        )
    arch, layout = read_shape(recipe.model)
    context = _context(recipe, wanted)
    if arch.num_kv_heads % context:
        raise UserError(
            f"context: {context}; allowed: a divisor of the model's key-value heads, {arch.num_kv_heads}, which the "
            "ranks of a sequence divide among them"
        )
    plans = [
        plan_of(recipe, machine, arch, layout, wanted, division, why) for division, why in _divisions(recipe, wanted)
    ]
    return next((plan for plan in plans if plan.fits), plans[-1])


def _experts(recipe: Recipe, wanted: Wanted) -> int:
    return (wanted.gpus if recipe.parallel.experts == "stay" else 1) if wanted.experts is None else wanted.experts


def _context(recipe: Recipe, wanted: Wanted) -> int:
    return recipe.parallel.context if wanted.context is None else wanted.context


def _divisions(recipe: Recipe, wanted: Wanted) -> Iterator[tuple[Division, str]]:
    """Those to try, the one with the least to send first."""
    base = Division(wanted.gpus, wanted.per_machine, experts=_experts(recipe, wanted), context=_context(recipe, wanted))
    full = recipe.adapter is None
    offload = recipe.parallel.offload if wanted.offload is None else wanted.offload
    asked, said = wanted.shards, "as you say"
    if asked is None and recipe.parallel.experts == "stay":
        asked, said = wanted.gpus, "parallel.experts: stay"
    elif asked is None and recipe.parallel.shard != "auto":
        asked, said = {"none": 1, "all": wanted.gpus}[recipe.parallel.shard], f"parallel.shard: {recipe.parallel.shard}"
    for shards in (asked,) if asked is not None else _sizes(base, full):
        # a recipe that says so cuts a base, and its adapters never
        divided = shards > 1 and (wanted.shards is not None or asked is None)
        for held in (shards,) if full else (1, shards) if divided else (1,):
            why = said if asked is not None else _why(shards, base, adapters=not full and held > 1)
            yield replace(base, shards=shards, trained_shards=held, offload=offload), why
    if full and wanted.offload is None:
        shards = asked or wanted.gpus
        yield (
            replace(base, shards=shards, trained_shards=shards, offload=True),
            "nothing else fits: what is trained waits in the machine's memory",
        )


def _sizes(base: Division, full: bool) -> list[int]:
    found = [1] if not full or base.gpus == 1 else []
    size = base.local
    while size < base.gpus:
        found.append(size)
        size *= 2
    if base.gpus > 1:
        found.append(base.gpus)
    return [one for one in found if base.gpus % one == 0 and (one % base.experts == 0 or one == 1)] or [base.gpus]


def _why(shards: int, base: Division, *, adapters: bool) -> str:
    over = "the GPUs of a machine" if shards == base.local else "all GPUs" if shards == base.gpus else "machines"
    if shards == 1:
        return "each rank has all of it, which fits" if base.gpus > 1 else "one GPU"
    return f"divided over {over}, the fewest that it fits on{', adapters too' if adapters else ''}"


def _on_gpu(work: Work, division: Division, *, saves_beside: bool) -> RankBytes:
    """A rank's bytes, with what its GPU holds beside them."""
    rank = rank_bytes(work, division, saves_beside=saves_beside)
    return replace(rank, device=rank.device | around_gpu(work, rank.living))


def plan_of(
    recipe: Recipe, machine: Machine, arch: Arch, layout: Layout, wanted: Wanted, division: Division, why: str
) -> ManyPlan:
    """The plan with one division."""
    work, idle = rank_work(recipe, machine, arch, layout, division)
    whole = Whole.of(work)
    fixed = 0 if division.offload and work.ranks is None else sum(trained_state(whole, division).values())
    if work.ranks is not None and not (division.offload and division.shards > 1):
        held = max(division.shards, division.experts)
        fixed += whole.layers * whole.layer_experts // held + whole.layers * whole.layer_dense // division.shards
    left = max(machine.memory.gpu_free - fixed - GPU_CONTEXT, 0)
    room = int(machine.memory.gpu_free * ON_A_GPU)

    def taken(step: Work) -> RankBytes:
        return _on_gpu(step, division, saves_beside=recipe.parallel.async_save)

    work = decide(work, recipe, replace(machine.memory, gpu_free=left), lambda step: taken(step).device_peak <= room)
    assert machine.host_bytes_s is not None
    rates = Rates(
        machine.flops, inner_link(machine.name, machine.host_bytes_s / 1e9), wanted.outer, machine.host_bytes_s
    )
    return ManyPlan(
        recipe,
        machine,
        division,
        why,
        work,
        idle,
        taken(work),
        room,
        machine.memory.machine_free or None,
        rates,
        traffic(work, division).parts,
        step_time(work, division, rates) if machine.flops else None,
    )


def rank_work(recipe: Recipe, machine: Machine, arch: Arch, layout: Layout, division: Division) -> tuple[Work, int]:
    """A rank's step, and how many ranks find no pack for themselves in it. Raises UserError for experts that can't be
    divided so."""
    if arch.num_experts % division.experts:
        raise UserError(
            f"--expert-parallel {division.experts}: the model has {arch.num_experts} experts in a layer; "
            "allowed: what divides them evenly"
        )
    tokens, adapter = recipe.tokens_of_step, recipe.adapter
    pack = min(recipe.train.tokens_per_pack, tokens)
    packs, ranks = max(tokens // pack, 1), division.gpus // division.context
    work = Work(
        arch,
        layout,
        "bf16" if adapter is None or recipe.weights == "bf16" else "resident",
        "cuda",
        machine.kernels,
        recipe.dtype,
        None if adapter is None else {name: shape.rank for name, shape in adapter.by_target().items()},
        pack=-(-pack // division.context),
        packs=-(-packs // ranks),
        longest=min(recipe.max_length, pack),
        dropout=adapter is not None and adapter.dropout > 0,
        recompute=True,
        qat=recipe.qat is not None,
    )
    return work, max(ranks - packs, 0)


def as_json(plan: ManyPlan) -> dict[str, Any]:
    """The form of `ossia plan --gpus N --json`: bytes, seconds, tokens; everything an estimate."""
    d, time = plan.division, plan.time
    return {
        "fits": plan.fits,
        "estimate": True,
        "gpus": d.gpus,
        "gpus_per_machine": d.per_machine,
        "gpu": plan.machine.name,
        "room_bytes": plan.room,
        "host_room_bytes": plan.host_room,
        "division": {
            "shards": d.shards,
            "trained_shards": d.trained_shards,
            "expert_parallel": d.experts,
            "context_parallel": d.context,
            "offload": d.offload,
            "on_paper": plan.on_paper,
            "why": plan.why,
        },
        "rank": {
            "peak_bytes": plan.rank.device_peak,
            "parts": dict(plan.rank.device),
            "fullest": plan.rank.moment,
            "host_bytes": plan.rank.host_peak,
            "host_parts": dict(plan.rank.host),
        },
        "machine_host_bytes": plan.host_needed,
        "tokens_per_step": plan.tokens,
        "packs_per_rank": plan.work.packs,
        "tokens_per_pack": plan.work.pack,
        "idle_ranks": plan.idle,
        "recompute": plan.work.recompute,
        "received_bytes": {
            name: {"inside_machine": round(part.inner), "from_machines": round(part.outer)}
            for name, part in plan.received.items()
        },
        "links": {
            "inside_machine": {"name": plan.rates.inner.name, "gb_s": plan.rates.inner.gb_s},
            "between_machines": {
                "name": plan.rates.outer.name,
                "gb_s": plan.rates.outer.gb_s,
                "per": "machine" if plan.rates.outer.shared else "gpu",
            },
        },
        "step": None
        if time is None
        else {
            "step_s": time.total,
            "products_s": time.products,
            "exchanged_s": max(time.exchanged, 0.0),  # of a sum and its parts, which round apart
            "exposed_s": time.exposed,
            "tokens_per_s": plan.tokens / time.total,
            "from": plan.machine.source,
        },
    }
