"""Adapters written as a folder in PEFT's format: today's layout, which `peft` 0.21 and vLLM read."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ossia.disk import sync_to_disk
from ossia.errors import AdapterError
from ossia.model.lora import TARGETS, Lora, LoraSpec, Site
from ossia.model.peft.config import CONFIG, PARAMETERS
from ossia.model.peft.layout import stem
from ossia.model.peft.places import TENSORS
from ossia.model.weights import interleave_gate_up


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
            tensor = lora.trainable.tensors[f"{site.module}.lora_{side}"].detach().cpu()
            tensors[f"{stem(site, lora.spec.targets)}.lora_{side}.weight"] = _to_peft(site, side, tensor)
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
    parameters = [target for target in TARGETS if target in spec.targets and target in PARAMETERS]
    modules = [target for target in TARGETS if target in spec.targets and target not in PARAMETERS]
    rank, alpha = Counter(spec.targets[target] for target in parameters or modules).most_common(1)[0][0]
    names = {target: PARAMETERS.get(target, target) for target in (*modules, *parameters)}
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


def _to_peft(site: Site, side: str, x: Tensor) -> Tensor:
    """Our layout to the file's: (E, r, in) to (E r, in), (E, O, r) to (O, r E)."""
    if site.num_experts is None:
        return x.contiguous()
    if side == "A":
        return x.flatten(0, 1).contiguous()
    rows_EOr = interleave_gate_up(x) if site.target == "gate_up_proj" else x
    return rows_EOr.permute(1, 2, 0).flatten(1).contiguous()
