"""A plan of many GPUs for a reader, in the manner of `ossia plan` for one."""

from __future__ import annotations

from collections.abc import Iterator

from ossia.plan.many.predict import ManyPlan
from ossia.plan.text import gib, parts_in_words, shape_in_words


def as_text(plan: ManyPlan) -> str:
    """A table of two columns. Everything in it is an estimate."""
    rows = [*_what(plan), *_memory(plan), *_travel(plan), *_time(plan), *_verdict(plan)]
    return "\n".join(f"{label:<13}{words}" for label, words in rows)


def _what(plan: ManyPlan) -> Iterator[tuple[str, str]]:
    d, work, rates = plan.division, plan.work, plan.rates
    machines = f"{d.machines} machines of {d.per_machine}" if d.machines > 1 else "one machine"
    links = [] if d.gpus == 1 else [f"{rates.inner.name} at {rates.inner.gb_s:g} GB/s"]
    if d.machines > 1:
        links.append(f"{rates.outer.name} at {rates.outer.gb_s:g} GB/s a {'machine' if rates.outer.shared else 'GPU'}")
    gpus = f"{d.gpus:,} x {plan.machine.name} in {machines}" if d.gpus > 1 else plan.machine.name
    yield "estimate", "; ".join([gpus, *links])
    yield "model", f"{plan.recipe.model}: {shape_in_words(work.arch)}"
    what = "all weights" if work.ranks is None else "adapter"
    over = f"over {d.shards}" if d.shards > 1 else "not"
    also = [f"experts over {d.experts}"] if d.experts > 1 else []
    also += [f"sequences over {d.context}"] if d.context > 1 else []
    waits = "trained state" if work.ranks is None else "parts"
    also += [f"{waits} in the machine's memory"] if d.offload and (d.shards > 1 or work.ranks is None) else []
    yield "divided", f"{what} trained; weights {over}, trained state over {d.trained_shards}{_also(also)}: {plan.why}"
    if plan.on_paper:
        yield "", "on paper: `ossia train` cuts over all ranks or none; parallel.shard=all, or =none, for what it does"
    packs = f"{work.packs} packs of {work.pack:,}" if work.packs > 1 else f"one pack of {work.pack:,}"
    kept = "each layer computed again for its backward" if work.recompute else "activations kept"
    yield "step", f"{plan.tokens:,} tokens; a rank has {packs}; {kept}"
    if plan.idle:
        pack = plan.recipe.train.tokens_per_pack
        number = plan.division.gpus // plan.division.context
        yield "", f"{plan.idle} ranks have no pack: {number} packs are train.tokens_per_step={number * pack}"


def _also(words: list[str]) -> str:
    return f", {', '.join(words)}" if words else ""


def _memory(plan: ManyPlan) -> Iterator[tuple[str, str]]:
    rank = plan.rank
    yield "GPU", f"{gib(rank.device_peak)} at its fullest ({rank.moment}): {parts_in_words(rank.device)}"
    if rank.host:
        yield "memory", f"{gib(plan.host_needed)} of each machine's: {parts_in_words(rank.host)} a rank"


def _travel(plan: ManyPlan) -> Iterator[tuple[str, str]]:
    for number, (name, spread) in enumerate(plan.received.items()):
        ways = [(spread.inner, "inside the machine"), (spread.outer, "from other machines")]
        said = ", ".join(f"{gib(size)} {where}" for size, where in ways if size)
        yield "a GPU gets" if number == 0 else "", f"{name}: {said} a step"


def _time(plan: ManyPlan) -> Iterator[tuple[str, str]]:
    if (time := plan.time) is None:
        yield "speed", "not known: this GPU isn't in the table"
        return
    parts = [f"products {time.products:.2g} s"]
    if time.exchanged > 0.001 * time.total:
        parts.append(f"tokens, keys and values on their way {time.exchanged:.2g} s")
    parts.append(f"waiting for weights and gradients {max(time.exposed, 0.0):.2g} s")
    yield "speed", f"about {plan.tokens / time.total:,.0f} tokens/s: {', '.join(parts)} a step"
    yield "", f"from {plan.machine.source}; links at their data sheets' rates, which nothing reaches"
    if plan.division.offload and plan.work.ranks is None:
        yield "", "without the optimizer's pass over the machine's memory, which isn't estimated"


def _verdict(plan: ManyPlan) -> Iterator[tuple[str, str]]:
    if plan.fits:
        yield "fits", f"yes: {gib(plan.rank.device_peak)} of {gib(plan.room)}"
        return
    if plan.rank.device_peak > plan.room:
        yield "fits", f"no: {gib(plan.rank.device_peak)} are needed on each GPU, {gib(plan.room)} are there"
    else:
        assert plan.host_room is not None
        yield "fits", f"no: {gib(plan.host_needed)} of a machine's memory are needed, {gib(plan.host_room)} are there"
        if saved := plan.rank.host.get("copy that is saved", 0) * plan.division.local:
            yield "to change", f"parallel.async_save=false: saves {gib(saved)} of it, and training waits for saves"
            return
    yield "to change", "more GPUs, a smaller train.tokens_per_pack, fewer or smaller adapters"
