"""Adapters on disk, in the format of PEFT 0.21: written so that `peft` loads them, and read whoever wrote them.

```text
adapter_config.json          what is adapted: linear modules by `target_modules`, bare parameters by `target_parameters`
adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, in) and .lora_B.weight (out, r)
```
Experts are parameters: all experts of a layer are stacked, A as (E r, in) expert after expert, B as (out, r E) with the
expert as the fastest index. PEFT wraps the module that owns a parameter, so tensors carry the module's name and not the
parameter's: `mlp.experts` for one adapted parameter; for both, `mlp.experts.base_layer` is gate_up and `mlp.experts`
down. The rows of gate_up's B alternate between gate and up, as in the checkpoint.
Own code because training neither needs nor should wait for `peft`; it is the oracle (tests/oracle/test_peft.py).
Letters: E experts, r rank, O out.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ossia.config import load_recipe
from ossia.disk import sync_to_disk
from ossia.errors import AdapterError, first_few
from ossia.model.arch import Arch
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import MODULE_OF, TARGETS, Lora, LoraSpec, Site, sites
from ossia.model.weights import interleave_gate_up, split_gate_up

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_IN_RUN = "adapter"
RUN_TENSORS = "trainable.safetensors"  # of a run's checkpoint: our names and layouts; the recipe says the rest
_RUN_RECIPE = "recipe.yaml"
_PARAMETERS = {  # targets that aren't linear modules in transformers, by PEFT's name of the parameter
    "gate_up_proj": MODULE_OF["gate_up_proj"],
    "down_proj": MODULE_OF["down_proj"],
    "router": f"{MODULE_OF['router']}.weight",
}
_PREFIX = "base_model.model."
_HEAD_COPY = f"{_PREFIX}lm_head.base_layer.weight"  # PEFT saves the base's head beside an adapter on it


def find_adapter(path: str | Path) -> Path:
    """The folder that holds an adapter, for `load_adapter`: a folder in PEFT's format as it is; of a run, its final
    adapter, or that of its newest checkpoint while it has none.

    Raises  AdapterError if there is neither
    """
    path = Path(path).expanduser()
    for folder in (path, path / ADAPTER_IN_RUN):
        if (folder / CONFIG).is_file():
            return folder
    if (path / RUN_TENSORS).is_file():
        return path
    saved = [found.parent for found in (path / "checkpoints").glob(f"step-*/{RUN_TENSORS}")]
    whole = [folder for folder in saved if re.fullmatch(r"step-\d+", folder.name)]
    if whole:
        return max(whole, key=lambda folder: int(folder.name.removeprefix("step-")))
    if not path.is_dir():
        found = f"no such folder (the current one is {Path.cwd()})"
    elif (path / _RUN_RECIPE).is_file():
        every = "; it saves one every `train.save_every` steps, and at its end"
        raise AdapterError(f"{path}: the run has saved no checkpoint yet{every}\n  next: wait for the first one")
    else:
        found = f"no {CONFIG} in it, nor in its folder {ADAPTER_IN_RUN}, nor checkpoints of a run"
    raise AdapterError(f"{path}: {found}\n  allowed: a run folder of `ossia train`, or a folder in PEFT's format")


def recorded_base(path: Path) -> str | None:
    """The model that an adapter says it was trained on, a folder or a hub name; None if it doesn't say.

    path  a folder that `find_adapter` gave
    """
    if (path / CONFIG).is_file():
        base = _PeftConfig.open(path / CONFIG).config.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None
    recipe = path.parent.parent / _RUN_RECIPE
    return load_recipe(recipe).model if recipe.is_file() else None


# --- writing ----------------------------------------------------------------------------------------------------------


def save_adapter(path: Path, lora: Lora, *, base_model: str) -> None:
    """Write an adapter as a PEFT folder, float32, bit for bit what `load_adapter` gives back; all of it or nothing.

    path        a new folder, or one that holds an adapter, which is replaced
    base_model  folder or hub name of the model it belongs to
    PEFT refuses dropout on bare parameters, so the file says 0 where any is adapted; the recipe keeps the real one.
    Raises      AdapterError if `path` holds something else, or can't be written; nothing is changed then
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and ((path / CONFIG).is_file() or not any(path.iterdir()))):
        raise AdapterError(f"{path} exists and is no adapter; name a new folder or remove it first")
    partial, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    tensors = {}
    for site in lora.sites.values():
        for side in "AB":
            place = _Place.of(site, side, lora.spec, in_peft=True)
            tensors[place.in_file] = _to_peft(site, side, lora.trainable.tensors[place.name].detach().cpu())
    try:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        config = json.dumps(_config_of(lora.spec, base_model), indent=2, sort_keys=True)
        (partial / CONFIG).write_text(config + "\n", encoding="utf-8")
        for place in (partial / TENSORS, partial / CONFIG, partial):
            sync_to_disk(place)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        sync_to_disk(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise AdapterError(
            f"{path}: could not save the adapter: {error}\n"
            f"  needed: {size / 1e6:.1f} MB; make room or name another folder, then save it again"
        ) from error


def _config_of(spec: LoraSpec, base_model: str) -> dict[str, Any]:
    """adapter_config.json. Its `r` and `lora_alpha` are the parameters' where there are any, the patterns the modules':
    PEFT 0.21.2 warns that a pattern for a parameter is ignored, and then follows it."""
    parameters = [target for target in TARGETS if target in spec.targets and target in _PARAMETERS]
    modules = [target for target in TARGETS if target in spec.targets and target not in _PARAMETERS]
    rank, alpha = Counter(spec.targets[target] for target in parameters or modules).most_common(1)[0][0]
    names = {target: _PARAMETERS.get(target, target) for target in (*modules, *parameters)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {names[t]: spec.targets[t][0] for t in names if spec.targets[t][0] != rank},
        "alpha_pattern": {names[t]: _number(spec.targets[t][1]) for t in names if spec.targets[t][1] != alpha},
        "use_rslora": spec.rslora,
        "lora_dropout": 0.0 if parameters else spec.dropout,
        # [] and not null, for which PEFT fills in modules of its own choice
        "target_modules": modules,
        "target_parameters": [names[target] for target in parameters] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


# --- names and layouts ------------------------------------------------------------------------------------------------


def _stem(site: Site, targets: Mapping[str, tuple[int, float]]) -> str:
    """The name of a site's tensors in the file, up to `.lora_A.weight`."""
    if site.num_experts is None:
        return _PREFIX + site.module
    owner = site.module.removesuffix(f".{site.target}")
    inner = site.target == "gate_up_proj" and "down_proj" in targets
    return f"{_PREFIX}{owner}.base_layer" if inner else _PREFIX + owner


def _to_peft(site: Site, side: str, x: Tensor) -> Tensor:
    """Our layout to the file's: (E, r, in) to (E r, in), (E, O, r) to (O, r E)."""
    if site.num_experts is None:
        return x.contiguous()
    if side == "A":
        return x.flatten(0, 1).contiguous()
    rows_EOr = interleave_gate_up(x) if site.target == "gate_up_proj" else x
    return rows_EOr.permute(1, 2, 0).flatten(1).contiguous()


def _from_peft(site: Site, side: str, x: Tensor) -> Tensor:
    """The inverse of `_to_peft`."""
    if site.num_experts is None:
        return x
    if side == "A":
        return x.unflatten(0, (site.num_experts, -1))
    rows_EOr = x.unflatten(1, (-1, site.num_experts)).permute(2, 0, 1)
    return (split_gate_up(rows_EOr) if site.target == "gate_up_proj" else rows_EOr).contiguous()


# --- reading ----------------------------------------------------------------------------------------------------------


def load_adapter(path: Path, arch: Arch, device: torch.device, *, base: Checkpoint | None = None) -> Lora:
    """Read an adapter for a model of this shape; strict both ways.

    path    a folder that `find_adapter` gave
    base    the model's checkpoint, to hold the copy of its head against that PEFT saves beside an adapter on the head
    Raises  AdapterError naming file and tensor or key: missing, left over, misshapen, of a type that isn't float32,
            bfloat16 or float16; a kind of adapter that Ossia doesn't have; one on some layers only
    """
    path = Path(path)
    in_peft = (path / CONFIG).is_file()
    spec = _PeftConfig.open(path / CONFIG).spec(arch) if in_peft else _spec_of_run(path)
    file = path / (TENSORS if in_peft else RUN_TENSORS)
    places = [_Place.of(site, side, spec, in_peft) for site in sites(arch, spec) for side in "AB"]
    with _open(file) as handle:
        present = set(handle.keys())
        if _HEAD_COPY in present:
            _check_head(handle.get_tensor(_HEAD_COPY), arch, base, file)
        _compare(handle, {place.in_file: place.shape for place in places}, present - {_HEAD_COPY}, file)
        tensors = {}
        for place in places:
            tensor = handle.get_tensor(place.in_file).to(device=device, dtype=torch.float32, copy=True)
            tensors[place.name] = _from_peft(place.site, place.side, tensor) if in_peft else tensor
    return Lora(arch, spec, tensors)


class _Place(NamedTuple):
    """A tensor of ours, and its name and shape in the file."""

    site: Site
    side: str
    name: str
    in_file: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, site: Site, side: str, spec: LoraSpec, in_peft: bool) -> _Place:
        name, rank, num_experts = f"{site.module}.lora_{side}", spec.targets[site.target][0], site.num_experts
        if in_peft:
            ranks = rank * (num_experts or 1)
            shape = (ranks, site.fan_in) if side == "A" else (site.fan_out, ranks)
            return cls(site, side, name, f"{_stem(site, spec.targets)}.lora_{side}.weight", shape)
        lead = () if num_experts is None else (num_experts,)
        shape = (*lead, rank, site.fan_in) if side == "A" else (*lead, site.fan_out, rank)
        return cls(site, side, name, name, shape)


def _spec_of_run(path: Path) -> LoraSpec:
    """What the recipe of the run says, to which a checkpoint folder belongs."""
    recipe = path.parent.parent / _RUN_RECIPE
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


def _compare(handle: safe_open, shapes: Mapping[str, tuple[int, ...]], present: set[str], file: Path) -> None:
    """Raise AdapterError with everything in which the file's tensors differ from these names and shapes."""
    problems = [f"`{name}` {list(shape)} is missing" for name, shape in shapes.items() if name not in present]
    problems += [f"`{name}` would stay unread" for name in sorted(present - shapes.keys())]
    for name in shapes.keys() & present:
        part = handle.get_slice(name)
        if (shape := tuple(part.get_shape())) != shapes[name]:
            problems.append(f"`{name}` is {list(shape)}; for this model and rank it must be {list(shapes[name])}")
        elif part.get_dtype() not in ("F32", "BF16", "F16"):
            problems.append(f"`{name}` is {part.get_dtype()}; allowed: F32, BF16, F16")
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


class _Target(NamedTuple):
    """One adapted matrix as PEFT addresses it."""

    target: str
    layer: int | None
    key: str

    @classmethod
    def all(cls, arch: Arch) -> list[_Target]:
        """Of every matrix that may have an adapter."""
        inside = [
            cls(target, layer, f"model.layers.{layer}.{_PARAMETERS.get(target, module)}")
            for layer in range(arch.num_layers)
            for target, module in MODULE_OF.items()
        ]
        return [*inside, cls("lm_head", None, "lm_head")]


# What other adapters may say and Ossia's can't be: key -> the values under which it says nothing.
_SAYS_NOTHING: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base's weights too
}
# Keys that decide how it was made or is saved, not what it computes.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "lora_dropout",
    "target_modules",
    "target_parameters",
}


class _PeftConfig:
    """adapter_config.json, and what it means for a gpt-oss model; complaints name file, key, found and allowed."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    @classmethod
    def open(cls, file: Path) -> _PeftConfig:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise AdapterError(f"{file} is not JSON ({error}); copy it again") from error
        if not isinstance(found, dict):
            raise AdapterError(f"{file} holds a {type(found).__name__}; allowed: a JSON object")
        return cls(found, str(file))

    def fail(self, key: str, allowed: str) -> AdapterError:
        """The error to raise for `key`."""
        return AdapterError(f"{self.where}: `{key}` is {self.config.get(key)!r}; allowed: {allowed}")

    def spec(self, arch: Arch) -> LoraSpec:
        """What is adapted, by PEFT's own rules of which names match."""
        self._refuse_other_kinds()
        targets: dict[str, tuple[int, float]] = {}
        layers: dict[str, list[int | None]] = {}
        for target, layer, key in _Target.all(arch):
            if not self._is_targeted(key, "target_parameters" if target in _PARAMETERS else "target_modules"):
                continue
            size = self._size(key)
            if targets.setdefault(target, size) != size:
                raise AdapterError(
                    f"{self.where}: {target} has (rank, alpha) {targets[target]} in one layer and {size} in layer "
                    f"{layer}; allowed: the same in all layers"
                )
            layers.setdefault(target, []).append(layer)
        for target, found in layers.items():
            if target != "lm_head" and len(found) != arch.num_layers:
                raise AdapterError(
                    f"{self.where}: {target} is adapted in layers {found} only; allowed: all {arch.num_layers} layers. "
                    "Merge it with `peft` and name the merged model"
                )
        if not targets:
            raise self.fail("target_modules", f"with `target_parameters`, any of {', '.join(TARGETS)}")
        return LoraSpec(targets, self._number("lora_dropout", 0.0), bool(self.config.get("use_rslora", False)))

    def _refuse_other_kinds(self) -> None:
        if self.config.get("peft_type") != "LORA":
            raise self.fail("peft_type", "LORA")
        for key, value in self.config.items():
            if key not in _WITHOUT_EFFECT | _READ and value not in _SAYS_NOTHING.get(key, (None, False, [], {})):
                allowed = ", ".join(map(repr, _SAYS_NOTHING.get(key, (None,))))
                raise self.fail(key, f"{allowed}. Ossia has plain LoRA; merge it with `peft` and name the merged model")

    def _is_targeted(self, key: str, option: str) -> bool:
        wanted = self.config.get(option)
        if wanted is None:
            return False
        if wanted == "all-linear":
            return ".self_attn." in key
        if isinstance(wanted, str):
            return self._matches(re.fullmatch, wanted, key, option)
        if not isinstance(wanted, list):
            raise self.fail(option, "a list of names")
        return any(key == name or key.endswith(f".{name}") for name in wanted)

    def _size(self, key: str) -> tuple[int, float]:
        """Rank and alpha: of the first pattern that matches, otherwise the general ones."""
        found = []
        for patterns_key, general in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            patterns = self.config.get(patterns_key) or {}
            matching = (p for p in patterns if self._matches(re.match, rf"(.*\.)?({p})$", key, patterns_key))
            first = next(matching, None)
            value = patterns[first] if first is not None else self.config.get(general)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
                raise self.fail(general if first is None else patterns_key, "numbers above 0")
            found.append(value)
        if not isinstance(found[0], int):
            raise self.fail("r", "a whole number")
        return found[0], float(found[1])

    def _matches(self, match: Any, pattern: str, key: str, option: str) -> bool:
        try:
            return match(pattern, key) is not None
        except re.error as error:
            raise self.fail(option, f"regular expressions ({error})") from error

    def _number(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise self.fail(key, "a number from 0 to below 1")
        return float(value)
