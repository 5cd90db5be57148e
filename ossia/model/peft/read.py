"""Adapters read, strict both ways: in PEFT's format whoever wrote it, or as a run's checkpoint has them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ossia.config import RECIPE_IN_RUN, load_recipe
from ossia.errors import AdapterError, first_few
from ossia.model.arch import Arch
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import Lora, LoraSpec, Site, sites
from ossia.model.peft.config import CONFIG, PeftConfig
from ossia.model.peft.layout import PREFIX, Found, Layout, LayoutName, Stored, find_layout, form_of, stored
from ossia.model.peft.places import RUN_TENSORS, TENSORS

_HEAD_COPY = f"{PREFIX}lm_head.base_layer.weight"  # PEFT saves the base's head beside an adapter on it


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def load_adapter(
    path: Path,
    arch: Arch,
    device: torch.device,
    *,
    base: Checkpoint | None = None,
    layout: LayoutName | None = None,
    say: Callable[[str], None] = _to_stderr,
) -> Lora:
    """Read an adapter for a model of this shape; strict both ways.

    path    a folder that `find_adapter` gave
    base    the model's checkpoint, to hold the copy of its head against that PEFT saves beside an adapter on the head
    layout  how its experts are stored, for a file that can be read in two ways; None: what the file itself tells
    say     is told of a layout that isn't today's
    Raises  AdapterError naming file and tensor or key: missing, left over, misshapen, of a type that isn't float32,
            bfloat16 or float16; a kind of adapter that Ossia doesn't have; one on some layers only; experts that can be
            read in two ways
    """
    path = Path(path)
    in_peft = (path / CONFIG).is_file()
    config = PeftConfig.open(path / CONFIG) if in_peft else None
    file = path / (TENSORS if in_peft else RUN_TENSORS)
    with _open(file) as handle:
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        if config is not None:
            spec = config.spec(arch, form_of(list(shapes)))
            found = find_layout(Found(str(file), shapes, config), arch, spec, layout)
            if found != Layout():
                say(f"{path}: its experts are stored {found}; read as such")
            places = [stored(site, spec, found) for site in sites(arch, spec)]
        else:
            spec = _spec_of_run(path)
            if layout is not None:
                raise AdapterError(f"{file}: Ossia wrote it, so its layout is known; leave --adapter-layout out")
            places = [_in_run(site, spec) for site in sites(arch, spec)]
        if _HEAD_COPY in shapes:
            _check_head(handle.get_tensor(_HEAD_COPY), arch, base, file)
        _compare(handle, {name: shape for place in places for name, shape in place.shapes.items()}, shapes, file)
        tensors: dict[str, Tensor] = {}
        for place in places:
            held = [handle.get_tensor(name).to(dtype=torch.float32, copy=True) for name in place.shapes]
            for side, tensor in zip("AB", place.convert(held), strict=True):
                tensors[f"{place.site.module}.lora_{side}"] = tensor.to(device)
    return Lora(arch, spec, tensors)


def _in_run(site: Site, spec: LoraSpec) -> Stored:
    """A site in a run's checkpoint: our names, our shapes."""
    lead = () if site.num_experts is None else (site.num_experts,)
    rank = spec.targets[site.target][0]
    shapes = {"A": (*lead, rank, site.fan_in), "B": (*lead, site.fan_out, rank)}
    return Stored(site, {f"{site.module}.lora_{side}": shape for side, shape in shapes.items()}, tuple)


def _spec_of_run(path: Path) -> LoraSpec:
    """What the recipe of the run says, to which a checkpoint folder belongs."""
    recipe = path.parent.parent / RECIPE_IN_RUN
    if not recipe.is_file():
        raise AdapterError(f"{path}: neither {CONFIG} in it nor {recipe}; name an adapter's folder or a run folder")
    adapter = load_recipe(recipe).adapter
    if adapter is None:
        raise AdapterError(
            f"{recipe}: this run trained all weights, so it has no adapter\n"
            "  next: make its weights a model with `ossia export`, and name that model"
        )
    return LoraSpec.of(adapter)


def _open(file: Path) -> safe_open:
    if not file.is_file():
        pickled = file.with_suffix(".bin")
        why = f"; {pickled.name} may run code when it is read: save it again as safetensors" if pickled.exists() else ""
        raise AdapterError(f"{file} is missing{why or '; an adapter needs it: copy the folder again'}")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise AdapterError(f"{file} is cut short or no safetensors file ({error}); copy it again") from error


def _compare(
    handle: safe_open, wanted: Mapping[str, tuple[int, ...]], present: Mapping[str, tuple[int, ...]], file: Path
) -> None:
    """Raise AdapterError with everything in which the file's tensors differ from these names and shapes."""
    problems = [f"`{name}` {list(shape)} is missing" for name, shape in wanted.items() if name not in present]
    problems += [f"`{name}` would stay unread" for name in sorted(present.keys() - wanted.keys() - {_HEAD_COPY})]
    for name in wanted.keys() & present.keys():
        if present[name] != wanted[name]:
            found, must = list(present[name]), list(wanted[name])
            problems.append(f"`{name}` is {found}; for this model and rank it must be {must}")
        elif (dtype := handle.get_slice(name).get_dtype()) not in ("F32", "BF16", "F16"):
            problems.append(f"`{name}` is {dtype}; allowed: F32, BF16, F16")
    if problems:
        lines = [f"{file}: the tensors are not those of this adapter on this model", *first_few(problems)]
        raise AdapterError("\n  ".join([*lines, "next: name the model that it was trained on, or copy it again"]))


def _check_head(copy_VD: Tensor, arch: Arch, base: Checkpoint | None, file: Path) -> None:
    """The head beside the adapter has to be the model's own, or the adapter was trained on another model."""
    same = tuple(copy_VD.shape) == (arch.vocab_size, arch.hidden_size)
    if same and base is not None:
        same = torch.equal(copy_VD, base.tensor("lm_head.weight").to(copy_VD.dtype))
    if not same:
        raise AdapterError(
            f"{file}: `{_HEAD_COPY}` is not the head of this model; the adapter was trained on another one, name that"
        )
