"""adapter_config.json as PEFT writes it: which matrices of a gpt-oss model it means, with what rank and alpha."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ossia.errors import AdapterError
from ossia.model.arch import Arch
from ossia.model.lora import MODULE_OF, TARGETS, LoraSpec

CONFIG = "adapter_config.json"
PARAMETERS = {  # targets that aren't linear modules in transformers, by PEFT's name of the parameter
    "gate_up_proj": MODULE_OF["gate_up_proj"],
    "down_proj": MODULE_OF["down_proj"],
    "router": f"{MODULE_OF['router']}.weight",
}
Form = Literal["stacked", "listed", "apart"]
"""Experts of a layer as one parameter, as lists of linear modules, or one by one with gate and up apart."""
_EXPERT_KEYS: Mapping[Form, Mapping[str, tuple[str, ...]]] = {
    "stacked": {},
    "listed": {"gate_up_proj": ("gate_up_projs.{expert}",), "down_proj": ("down_projs.{expert}",)},
    "apart": {
        "gate_up_proj": ("{expert}.gate_proj", "{expert}.up_proj"),
        "down_proj": ("{expert}.down_proj",),
    },
}


class _Target(NamedTuple):
    """One adapted matrix as PEFT addresses it."""

    target: str
    layer: int | None
    key: str
    option: str

    @classmethod
    def all(cls, arch: Arch, form: Form) -> list[_Target]:
        """Of every matrix that may have an adapter."""
        found = []
        for layer in range(arch.num_layers):
            place = f"model.layers.{layer}"
            for target, module in MODULE_OF.items():
                if target in _EXPERT_KEYS[form]:
                    names = [
                        pattern.format(expert=expert)
                        for expert in range(arch.num_experts)
                        for pattern in _EXPERT_KEYS[form][target]
                    ]
                    keys, option = [f"{place}.mlp.experts.{name}" for name in names], "target_modules"
                else:
                    keys = [f"{place}.{PARAMETERS.get(target, module)}"]
                    option = "target_parameters" if target in PARAMETERS else "target_modules"
                found += [cls(target, layer, key, option) for key in keys]
        return [*found, cls("lm_head", None, "lm_head", "target_modules")]


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
    "lora_B_layout",  # Unsloth's word for the order of experts, here and in the next one: see layout.py
    "unsloth_fused_expert_lora",
}


class PeftConfig:
    """adapter_config.json, and what it means for a gpt-oss model; complaints name file, key, found and allowed."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    @classmethod
    def open(cls, file: Path) -> PeftConfig:
        """Raises AdapterError if the file holds no JSON object."""
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

    def spec(self, arch: Arch, form: Form = "stacked") -> LoraSpec:
        """What is adapted, by PEFT's own rules of which names match.

        form    how experts are named; gate and up apart are one adapter of twice the rank, with the same scaling
        Raises  AdapterError for a kind of adapter that Ossia doesn't have, or one on some layers or experts only
        """
        self._refuse_other_kinds()
        rslora = bool(self.config.get("use_rslora", False))
        targets: dict[str, tuple[int, float]] = {}
        layers: dict[str, list[int | None]] = {}
        every = _Target.all(arch, form)
        for target, layer, key, option in every:
            if not self._is_targeted(key, option, form):
                continue
            size = self._size(key)
            if targets.setdefault(target, size) != size:
                raise AdapterError(
                    f"{self.where}: {target} has (rank, alpha) {targets[target]} in one layer and {size} in layer "
                    f"{layer}; allowed: the same in all layers"
                )
            layers.setdefault(target, []).append(layer)
        wanted = Counter(place.target for place in every)
        for target, found in layers.items():
            if len(found) != wanted[target]:
                some = " only" if wanted[target] == arch.num_layers else ", but not all of their experts"
                raise AdapterError(
                    f"{self.where}: {target} is adapted in layers {sorted(set(found))}{some}; allowed: all "
                    f"{arch.num_layers} layers. Merge it with `peft` and name the merged model"
                )
        if not targets:
            raise self.fail("target_modules", f"with `target_parameters`, any of {', '.join(TARGETS)}")
        if form == "apart" and "gate_up_proj" in targets:
            rank, alpha = targets["gate_up_proj"]
            targets["gate_up_proj"] = (2 * rank, alpha * (math.sqrt(2) if rslora else 2))
        return LoraSpec(targets, self._number("lora_dropout", 0.0), rslora)

    def _refuse_other_kinds(self) -> None:
        if self.config.get("peft_type") != "LORA":
            raise self.fail("peft_type", "LORA")
        for key, value in self.config.items():
            if key not in _WITHOUT_EFFECT | _READ and value not in _SAYS_NOTHING.get(key, (None, False, [], {})):
                allowed = ", ".join(map(repr, _SAYS_NOTHING.get(key, (None,))))
                raise self.fail(key, f"{allowed}. Ossia has plain LoRA; merge it with `peft` and name the merged model")

    def _is_targeted(self, key: str, option: str, form: Form) -> bool:
        wanted = self.config.get(option)
        if wanted is None:
            return False
        if wanted == "all-linear":
            return ".self_attn." in key or (form != "stacked" and ".mlp.experts." in key)
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
