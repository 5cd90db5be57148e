"""A recipe and a machine -> a plan: what goes where, whether it fits, and which keys would save how much.

The choices that a run leaves to `auto` are made by the code that makes them in the run (`model.budget.choose`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ossia.config import Recipe, is_hub_name
from ossia.config.load import recipe_with
from ossia.errors import CheckpointError, RecipeError
from ossia.model.arch import SHAPES, Arch, Layout
from ossia.model.budget.choose import (
    Choice,
    Fits,
    Memory,
    choose_placement,
    keeps_activations,
    keeps_attention,
    offloads,
    waits_on_host,
)
from ossia.model.budget.gpu import GPU_CONTEXT, ON_A_GPU
from ossia.model.budget.weights import trained_numbers
from ossia.model.budget.work import Work, tokens_at_once
from ossia.plan.machine import Machine
from ossia.plan.memory import Footprint, cache_bytes, footprint, weights_on_gpu
from ossia.plan.speed import Speed, speed

_RELEASED = {
    "openai/gpt-oss-20b": "20b",
    "openai/gpt-oss-120b": "120b",
    "openai/gpt-oss-safeguard-20b": "20b",
    "openai/gpt-oss-safeguard-120b": "120b",
}


@dataclass(frozen=True, slots=True)
class Change:
    """Keys to set, the bytes that it saves where they are short, and whether the recipe fits then."""

    keys: str
    saves_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe will take on a machine.

    tokens         of a step; packs of `work.pack` tokens
    room           bytes that the run may take: of the GPU, or of a CPU's memory; host_room of the machine's memory
                   beside a GPU, None: not known
    longest        tokens of the longest document that fits, recomputing; 0: none
    """

    recipe: Recipe
    machine: Machine
    work: Work
    choice: Choice
    footprint: Footprint
    speed: Speed
    room: int
    host_room: int | None
    longest: int
    changes: tuple[Change, ...]

    @property
    def needed(self) -> int:
        """Bytes where they are short first: on the GPU, or in a CPU's memory."""
        return self.footprint.device_peak if self.machine.kind == "cuda" else self.footprint.host_peak

    @property
    def fits(self) -> bool:
        return self.needed <= self.room and (self.host_room is None or self.footprint.host_peak <= self.host_room)

    @property
    def num_trained(self) -> int:
        return trained_numbers(self.work)


def read_shape(model: str) -> tuple[Arch, Layout]:
    """A model's shape and how it stores its experts, from its config.json alone, or from a name of a known shape.

    model   a folder, a shape (20b, 120b, B1, ...), or a model on the hub
    Raises  CheckpointError
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _read_config(folder / "config.json")
    if (name := _RELEASED.get(model, model)) in SHAPES:
        return SHAPES[name], "mxfp4"
    if not is_hub_name(model):
        raise CheckpointError(
            f"{model}: no such folder, and no shape either\n"
            f"  allowed: a checkpoint's folder, owner/name on the hub, or one of {', '.join(SHAPES)}"
        )
    return _read_config(_config_from_hub(model))


def _config_from_hub(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise CheckpointError(
            f"{name}: its config.json is on the Hugging Face hub: pip install 'ossia[hub]', or plan with a shape: "
            f"model={' or '.join(_RELEASED.values())}"
        ) from None
    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{name}: its config.json can't be had: {str(error).splitlines()[0]}") from error


def _read_config(file: Path) -> tuple[Arch, Layout]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: can't be read: {error}\n  a checkpoint is a folder with a config.json"
        ) from None
    return Arch.from_config(config, str(file)), "mxfp4" if "quantization_config" in config else "bf16"


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """The plan of a recipe on a machine. Raises CheckpointError where the model's shape isn't known."""
    arch, layout = read_shape(recipe.model)
    plan = _plan(recipe, machine, arch, layout)
    longest = _longest(plan, arch, layout)
    changes = () if plan.fits else _changes(plan, arch, layout)
    return replace(plan, longest=longest, changes=changes)


def _plan(recipe: Recipe, machine: Machine, arch: Arch, layout: Layout) -> Plan:
    memory, kind = machine.memory, machine.kind
    if recipe.weights == "auto":
        choice = choose_placement(arch, layout, recipe.dtype, kind, memory)
    else:
        choice = Choice(recipe.weights, "as the recipe says")
    work = _work(recipe, machine, arch, layout, choice)
    limit = memory.gpu_free // 2 if kind == "cuda" else memory.machine // 4
    used = footprint(work, cache_bytes=cache_bytes(recipe, arch, recipe.dtype, limit))
    room = int(memory.gpu_free * ON_A_GPU) if kind == "cuda" else memory.machine_free
    host_room = memory.machine_free or None if kind == "cuda" else None
    return Plan(recipe, machine, work, choice, used, speed(work, machine), room, host_room, 0, ())


def _work(recipe: Recipe, machine: Machine, arch: Arch, layout: Layout, choice: Choice) -> Work:
    train, adapter = recipe.train, recipe.adapter
    tokens = recipe.tokens_of_step
    pack = min(train.tokens_per_pack, tokens)
    work = Work(
        arch,
        layout,
        choice.placement,
        machine.kind,
        machine.kernels,
        recipe.dtype,
        None if adapter is None else {name: shape.rank for name, shape in adapter.by_target().items()},
        pack=pack,
        packs=max(tokens // pack, 1),
        longest=min(recipe.max_length, pack),
        dropout=adapter is not None and adapter.dropout > 0,
        recompute=True,
        qat=recipe.qat is not None,
        on_host=waits_on_host(arch, layout, choice.placement, machine.kind, machine.memory),
    )
    return _decided(work, recipe, machine.memory)


def _decided(work: Work, recipe: Recipe, memory: Memory) -> Work:
    """With what is left to `train.recompute`, as a run decides it once its weights are where they belong."""
    taken = weights_on_gpu(work) + 12 * trained_numbers(work) + GPU_CONTEXT if work.device == "cuda" else 0
    return decide(work, recipe, replace(memory, gpu_free=max(memory.gpu_free - taken, 0)))


def decide(work: Work, recipe: Recipe, left: Memory, fits: Fits | None = None) -> Work:
    """What `train.recompute` comes to with the memory that is `left` once everything that stays is there.

    fits  as of `budget.choose.offloads`
    """
    choice = recipe.train.recompute
    if choice == "never" or (choice == "auto" and keeps_activations(work, left)):
        return replace(work, recompute=False)
    chunk = tokens_at_once(work.arch, work.size, left.gpu_free) if work.device == "cuda" else None
    work = replace(work, chunk=chunk)
    work = replace(work, offload=choice == "offload" or (choice == "auto" and offloads(work, left, fits)))
    return replace(work, keep_attention=keeps_attention(work, left, fits))


def _longest(plan: Plan, arch: Arch, layout: Layout) -> int:
    """Tokens of the longest document that fits as a step of its own, each layer computed again for its backward."""
    low, high = 0, arch.max_positions
    while low < high:
        middle = (low + high + 1) // 2
        work = replace(plan.work, pack=middle, packs=1, longest=middle, counted=None, recompute=True, chunk=None)
        used = footprint(_decided(work, plan.recipe, plan.machine.memory))
        needed = used.device_peak if work.device == "cuda" else used.host_peak
        low, high = (middle, high) if needed <= plan.room else (low, middle - 1)
    return low


def _changes(plan: Plan, arch: Arch, layout: Layout) -> tuple[Change, ...]:
    """What a recipe's keys could save, the largest saving first; the last one is all of them together."""
    found, together = [], list[str]()
    for keys in _candidates(plan):
        changed = _changed(plan, keys, arch, layout)
        if changed is None:
            continue
        saved = plan.needed - changed.needed
        if saved > plan.needed // 100:
            found.append(Change(" ".join(keys), saved, changed.fits))
            together += [key for key in keys if key.partition("=")[0] not in {k.partition("=")[0] for k in together}]
    found.sort(key=lambda change: change.saves_bytes, reverse=True)
    everything = _changed(plan, together, arch, layout) if len(found) > 1 else None
    if everything is not None and not any(change.fits for change in found):
        found.append(Change(" ".join(together), plan.needed - everything.needed, everything.fits))
    return tuple(found)


def _candidates(plan: Plan) -> list[list[str]]:
    recipe, train = plan.recipe, plan.recipe.train
    found = [[f"weights={placement}"] for placement in ("resident", "stream", "mmap")]
    if plan.machine.kind == "cpu":
        found.remove(["weights=stream"])
    found += [["train.recompute=always"], *([["train.recompute=offload"]] if plan.machine.kind == "cuda" else [])]
    if (pack := max(recipe.max_length, 1024)) < train.tokens_per_pack:
        found.append([f"train.tokens_per_pack={pack}"])
    if (step := max(recipe.max_length, train.tokens_per_step // 4)) < train.tokens_per_step and recipe.method == "sft":
        found.append([f"train.tokens_per_step={step}", f"train.tokens_per_pack={min(step, train.tokens_per_pack)}"])
    if recipe.adapter is None:
        found.append(["adapter.rank=16"])
    elif plan.work.adapts("gate_up_proj", "down_proj"):
        found += [["adapter.targets=[attention]"], ["adapter.rank=8"]]
    return found


def _changed(plan: Plan, keys: Sequence[str], arch: Arch, layout: Layout) -> Plan | None:
    """The plan with some keys set; None where the recipe doesn't allow them."""
    try:
        recipe = recipe_with(plan.recipe, keys)
    except RecipeError:
        return None
    return _plan(recipe, plan.machine, arch, layout)


def as_json(plan: Plan) -> dict[str, Any]:
    """The form of `ossia plan --json`: bytes, seconds, tokens."""
    work, used = plan.work, plan.footprint
    return {
        "fits": plan.fits,
        "machine": {
            "name": plan.machine.name,
            "device": plan.machine.kind,
            "room_bytes": plan.room,
            "host_room_bytes": plan.host_room,
        },
        "device": {"peak_bytes": used.device_peak, "parts": dict(used.device)} if used.device else None,
        "host": {"peak_bytes": used.host_peak, "parts": dict(used.host), "file_pages_bytes": used.files},
        "fullest": used.moment,
        "weights": {"placement": plan.choice.placement, "why": plan.choice.why},
        "recompute": work.recompute,
        "offload": work.offload,
        "trained_parameters": plan.num_trained,
        "tokens_per_step": work.pack * work.packs,
        "tokens_per_pack": work.pack,
        "packs": work.packs,
        "longest_document": plan.longest,
        "estimate": {
            "tokens_per_s": plan.speed.tokens_per_s,
            "compute_s": plan.speed.compute,
            "expand_s": plan.speed.expand,
            "transfer_s": plan.speed.transfer,
            "transfer_hidden": plan.speed.hidden,
            "from": plan.machine.source,
        },
        "changes": [{"set": c.keys, "saves_bytes": c.saves_bytes, "fits": c.fits} for c in plan.changes],
    }
