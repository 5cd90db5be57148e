"""The model, its type, what is trained of it, and where the run goes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ossia.axolotl.draft import Draft, Fate
from ossia.config.schema import TARGET_GROUPS
from ossia.config.yaml_lines import KeyPath

_ADAPTERS = ("lora", "qlora")
_LINEAR = ["attention"]  # what Axolotl finds in gpt-oss: experts and router are no linear modules there
_TARGETS = {name: name for group in TARGET_GROUPS.values() for name in group} | {
    "lm_head": "lm_head",
    "router": "router",
    "experts": "experts",
}
_LAYER = re.compile(r"(^|[.\\])\d+[.\\]")  # "22._checkpoint_wrapped_module.mlp.experts.down_proj"


def map_model(draft: Draft) -> None:
    """`model`, `dtype`, `adapter`, `qat` and `output`."""
    _base_model(draft)
    _dtype(draft)
    if output := draft.text("output_dir"):
        draft.map(("output_dir",), ("output",), re.sub(r"^\./|/+$", "", output) or output)
    _plugins(draft)
    _adapter(draft)
    if draft.get("qat") is not None:
        _qat(draft)


def _base_model(draft: Draft) -> None:
    name = draft.get("base_model")
    words = ""
    if name.endswith("-dequantized"):
        words = "a bfloat16 copy, which Ossia reads, as it does the released MXFP4 checkpoint"
    draft.map(("base_model",), ("model",), name, words)
    if not _is_gpt_oss(name):
        draft.remarks.append(
            f"`base_model` is {name}, which by its name is no gpt-oss; Ossia trains only those and stops at any other"
        )


def _is_gpt_oss(name: str) -> bool:
    """By the config of a folder that is here, else by the name."""
    config = Path(name).expanduser() / "config.json"
    if config.is_file():
        try:
            found = json.loads(config.read_text(encoding="utf-8"))
        except ValueError:
            return False
        return isinstance(found, dict) and found.get("model_type") == "gpt_oss"
    return re.search(r"gpt[-_]?oss", name.lower()) is not None


def _dtype(draft: Draft) -> None:
    """bf16 wins over fp16 in Axolotl, and neither is float32."""
    given = {key: draft.flag(key) for key in ("bf16", "bfloat16", "fp16", "float16", "float32")}
    brain, half = given["bf16"] or given["bfloat16"], given["fp16"] or given["float16"]
    says_none = given["bf16"] is False and not half
    dtype = "bfloat16" if brain else "float16" if half else "float32" if says_none or given["float32"] else None
    ours = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "float32": "float32"}
    for key, value in given.items():
        if value is None:
            continue
        if dtype == ours[key] or (says_none and key == "bf16"):
            draft.map((key,), ("dtype",), dtype)
        else:
            draft.skip((key,), f"`dtype` is {dtype}, by another key" if dtype else "off, as it is anyway")


def _plugins(draft: Draft) -> None:
    plugins = draft.get("plugins")
    if plugins is None:
        return
    names = [str(name).rpartition(".")[2] for name in (plugins if isinstance(plugins, list) else [plugins])]
    ours = {
        "CutCrossEntropyPlugin": "the loss is computed in chunks, so the logits are never whole in memory",
        "LigerPlugin": "norms, rotation and activations are fused where the device gains by it",
        "KernelsPlugin": "kernels for the experts are Ossia's own",
    }
    if unknown := [name for name in names if name not in ours]:
        draft.refuse(("plugins",), f"plug-ins of Axolotl's run nowhere else: {', '.join(unknown)}; leave them out")
    else:
        draft.skip(("plugins",), "; ".join(ours[name] for name in names))


def _adapter(draft: Draft) -> None:
    kind = draft.get("adapter")
    if kind is None:
        for key in [key for key in draft.given if key.startswith("lora_") or key == "peft_use_rslora"]:
            draft.skip((key,), "without `adapter` Axolotl trains all weights, and so does the recipe")
        draft.remarks.append(
            "all weights are trained, on one device: `ossia plan RECIPE` says whether they fit. What takes a fraction: "
            "`adapter: {rank: 16, targets: [attention, experts]}`"
        )
        return
    if kind not in _ADAPTERS:
        draft.refuse(("adapter",), "the recipe has a LoRA adapter, the only kind there is")
        draft.put(("adapter", "rank"), 16, "Ossia's default")
    base = "LoRA; the base stays in its MXFP4 bytes" if kind == "qlora" else "LoRA"
    draft.say(("adapter",), Fate.mapped, f"the section `adapter`: {base}")
    if (rank := draft.whole("lora_r")) is not None:
        draft.map(("lora_r",), ("adapter", "rank"), rank)
    if (alpha := draft.number("lora_alpha")) is not None:
        draft.map(("lora_alpha",), ("adapter", "alpha"), alpha)
    if (dropout := draft.number("lora_dropout")) is not None:
        draft.map(("lora_dropout",), ("adapter", "dropout"), dropout)
    if (rslora := draft.flag("peft_use_rslora")) is not None:
        draft.map(("peft_use_rslora",), ("adapter", "rslora"), rslora)
    if folder := draft.text("lora_model_dir"):
        draft.map(("lora_model_dir",), ("adapter", "init_from"), folder)
    _targets(draft)
    _patterns(draft)


def _targets(draft: Draft) -> None:
    """`adapter.targets` from all the keys that name modules; each says what it gave."""
    names: list[str] = []
    note: list[str] = []
    key: KeyPath = ("adapter", "targets")
    for source in ("lora_target_linear", "lora_target_modules", "lora_target_parameters"):
        if draft.get(source) is None:
            continue
        if source == "lora_target_linear":
            if not draft.flag(source):
                draft.skip((source,), "off; the targets are named")
                continue
            found, lost = list(_LINEAR), []
            words = "q, k, v and o, the linear modules that Axolotl finds in gpt-oss; add `experts` to train them too"
        else:
            found, lost = _named(draft.get(source))
            words = ""
            given = draft.get(source)
            if any(_LAYER.search(str(one)) for one in (given if isinstance(given, list) else [given])):
                words = "in every layer, not only those named: adapters of single layers aren't there"
        if lost:
            draft.refuse(
                (source,),
                f"no target of Ossia's: {', '.join(lost)}; allowed in `adapter.targets`: "
                f"attention, experts, {', '.join(_TARGETS)}",
            )
        else:
            shown = f"adapter.targets: {', '.join(found)}"
            draft.map((source,), key, found, words or shown)
        names += found
        note.append(source)
    if names:
        draft.put(key, _grouped(names), ", ".join(note), (note[0],))
        return
    draft.put(key, ["attention"], "Axolotl names none that Ossia has")
    draft.remarks.append("no target of the adapter could be carried over; the recipe has [attention]")


def _named(given: Any) -> tuple[list[str], list[str]]:
    """The targets that module names, or a regular expression over them, stand for; and what stands for none."""
    found, lost = [], []
    for one in given if isinstance(given, list) else [given]:
        if one in ("all-linear", "all_linear"):
            found += _LINEAR
            continue
        names = [name for name in _TARGETS if re.search(rf"(^|[^A-Za-z_]){name}($|[^A-Za-z_])", str(one))]
        names = names[1:] if "experts" in names and len(names) > 1 and names[0] == "experts" else names
        inner = [name for name in names if name != "experts"]
        if not names:
            lost.append(str(one))
        found += inner or names
    return list(dict.fromkeys(found)), lost


def _grouped(names: list[str]) -> list[str]:
    """Targets without repeats, a group's name in place of all its members."""
    left = list(dict.fromkeys(names))
    for group, members in TARGET_GROUPS.items():
        if group in left or set(members) <= set(left):
            left = [group, *(name for name in left if name not in (*members, group))]
    return sorted(left, key=lambda name: [*TARGET_GROUPS, *_TARGETS].index(name))


def _patterns(draft: Draft) -> None:
    """Ranks and alphas of single modules, which are a mapping in `adapter.targets`."""
    own: dict[str, dict[str, float]] = {}
    for source, what in (("lora_rank_pattern", "rank"), ("lora_alpha_pattern", "alpha")):
        pattern = draft.get(source)
        if not isinstance(pattern, dict):
            continue
        for name in pattern:
            found, lost = _named(name)
            value = draft.whole(source, name) if what == "rank" else draft.number(source, name)
            if value is None:
                continue
            if lost or _LAYER.search(str(name)):
                draft.refuse((source, name), "a rank of its own is for a target in all layers: `adapter.targets`")
                continue
            for target in found:
                own.setdefault(target, {})[what] = value if what == "rank" else float(value)
            draft.map((source, name), ("adapter", "targets"), found, f"with {what} {value:g}")
    if own:
        section = draft.recipe["adapter"]
        section["targets"] = {name: own.pop(name, {}) for name in _ungrouped(section["targets"], own)}
        draft.remarks += [f"`{name}` has a rank or alpha of its own, but isn't a target" for name in own]


def _ungrouped(names: list[str], own: dict[str, dict[str, float]]) -> list[str]:
    """The same targets, groups taken apart of which a member is in `own`."""
    return [
        single
        for name in names
        for single in (TARGET_GROUPS.get(name, (name,)) if own.keys() & set(TARGET_GROUPS.get(name, ())) else (name,))
    ]


def _qat(draft: Draft) -> None:
    if not isinstance(draft.get("qat"), dict):
        draft.refuse(("qat",), "expected a section; Ossia has `qat: mxfp4`")
        return
    targets = draft.recipe.get("adapter", {}).get("targets", ["experts"])
    experts = not {"experts", *TARGET_GROUPS["experts"]}.isdisjoint(targets)
    if draft.get("qat", "weight_dtype") == "mxfp4" and experts:
        draft.map(
            ("qat", "weight_dtype"), ("qat",), "mxfp4", "of trained experts, as `ossia export --to hf-mxfp4` rounds"
        )
    draft.refuse(("qat",), "quantisation-aware training is `qat: mxfp4`, of trained experts, with no options")
