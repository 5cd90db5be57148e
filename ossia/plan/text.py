"""A plan for a reader, in the manner of `ossia doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ossia.model.arch import Arch
from ossia.model.budget.work import Work
from ossia.plan.memory import Footprint
from ossia.plan.predict import Plan

_GIB = 1024**3


def as_text(plan: Plan) -> str:
    """The plan as a table of two columns, and what to change where it doesn't fit."""
    rows = [*_what(plan), *_memory(plan), *_time(plan)]
    if plan.fits:
        rows.append(("fits", f"yes: {gib(plan.needed)} of {gib(plan.room)}"))
    else:
        rows.append(("fits", f"no: {_short(plan)}"))
        for number, change in enumerate(plan.changes):
            words = f"{change.keys}: saves {gib(change.saves_bytes)}{', and it fits' if change.fits else ''}"
            rows.append(("to change" if number == 0 else "", words))
        if not plan.changes:
            rows.append(("to change", "nothing that a recipe has saves enough; a smaller model, or a larger machine"))
    return "\n".join(f"{label:<13}{words}" for label, words in rows)


def as_line(work: Work, used: Footprint) -> str:
    """The prediction in a line, as a run begins with it."""
    if used.device:
        where = f"{gib(used.device_peak)} of the GPU's memory"
    else:
        where = f"{gib(used.host_peak)} of memory, and {gib(used.files)} of files' pages"
    return f"plan: up to {where}, with {work.pack * work.packs:,} tokens a step; `ossia plan` says for what"


def _what(plan: Plan) -> Iterator[tuple[str, str]]:
    work, arch = plan.work, plan.work.arch
    yield "machine", plan.machine.name
    yield "model", f"{plan.recipe.model}: {shape_in_words(arch)}"
    yield "weights", f"{plan.choice.placement}: {plan.choice.why}"
    what = "all weights" if work.ranks is None else "adapter"
    yield "trained", f"{what}, {plan.num_trained:,} numbers"
    packs = f"{work.packs} packs of {work.pack:,}" if work.packs > 1 else "one pack"
    kept = "each layer computed again for its backward" if work.recompute else "activations kept"
    kept += ", its input waiting in the machine's memory" if work.offload else ""
    kept += ", but for attention over long documents" if work.keep_attention else ""
    yield "step", f"{work.pack * work.packs:,} tokens, {packs}; {kept}"


def shape_in_words(arch: Arch) -> str:
    """Layers, experts and weights."""
    return f"{arch.num_layers} layers of {arch.num_experts} experts, {arch.num_parameters() / 1e9:.2f} billion weights"


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    used = plan.footprint
    if used.device:
        yield "GPU", f"{gib(used.device_peak)} at its fullest ({used.moment}): {parts_in_words(used.device)}"
    when = "" if used.device else f" at its fullest ({used.moment})"
    yield "memory", f"{gib(used.host_peak)}{when}: {parts_in_words(used.host)}"
    if used.files:
        yield "", f"and {gib(used.files)} of the checkpoint's file, which the system takes back when it needs it"
    longest = f"{plan.longest:,} tokens" if plan.longest else "none"
    yield "longest", f"{longest}: a document that fits as a step of its own"


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    speed = plan.speed
    if speed.tokens_per_s is None:
        yield "speed", "not known: this GPU isn't in the table"
        return
    parts = [f"products {speed.compute:.2g} s"]
    if speed.expand:
        parts.append(f"expanding experts {speed.expand:.2g} s")
    if speed.transfer:
        hidden = "hidden behind them" if speed.hidden else "longer than them: more tokens a step would hide it"
        parts.append(f"copies to the GPU {speed.transfer:.2g} s, {hidden}")
    yield "speed", f"about {speed.tokens_per_s:,.0f} tokens/s, an estimate: {', '.join(parts)} a step"
    yield "", f"from {plan.machine.source}"


def _short(plan: Plan) -> str:
    if plan.needed > plan.room:
        return f"{gib(plan.needed)} are needed, {gib(plan.room)} are there"
    assert plan.host_room is not None
    return f"{gib(plan.footprint.host_peak)} of the machine's memory are needed, {gib(plan.host_room)} are there"


def parts_in_words(parts: Mapping[str, int]) -> str:
    """The largest first; what is under half a percent is left out."""
    ordered = sorted(parts.items(), key=lambda part: part[1], reverse=True)
    shown = [f"{name} {gib(size)}" for name, size in ordered if size >= sum(parts.values()) // 200]
    return ", ".join(shown)


def gib(num_bytes: float) -> str:
    """Bytes for a reader."""
    return f"{num_bytes / _GIB:.2f} GiB"
