"""Write `adapters/<writer>/`: adapters of a tiny gpt-oss as other programs saved them, and what those compute.

Run: python -m tests.golden.write_adapters WRITER [WHEEL_FOLDER]      with the packages of the writer first on the path:

    peft-0.17.0-transformers-4     pip install peft==0.17.0 transformers==4.57.6
    peft-0.18.1-transformers-5     pip install peft==0.18.1 transformers==5.23.0
    peft-0.19.0-transformers-5     pip install peft==0.19.0 transformers==5.23.0
    peft-0.21.2-transformers-4     pip install peft==0.21.2 transformers==4.57.6
    unsloth-zoo-2026.9.2           as in constraints.txt; WHEEL_FOLDER: unsloth_zoo==2026.9.2, unpacked
    unsloth-zoo-2026.9.2-4bit      the same
    tinker-cookbook-0.6.1          as in constraints.txt; WHEEL_FOLDER: tinker_cookbook==0.6.1, unpacked

`deltas.safetensors` holds what the writer's own code adds to each matrix, (in, out), by the matrix's name. Unsloth and
Tinker need a GPU or a service to be imported whole, so their functions are run out of the unpacked wheel; no line of
theirs is kept here.
"""

from __future__ import annotations

import ast
import json
import shutil
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = Path(__file__).with_name("adapters")
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
}
RANK, ALPHA = 2, 6
EXPERTS = ("gate_up_proj", "down_proj")
ATTENTION = ["q_proj", "v_proj"]


def tiny_model() -> nn.Module:
    """A random gpt-oss of these sizes."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**SIZES))


def with_adapter(model: nn.Module, **options: Any) -> Any:
    """The model with a random adapter of PEFT's on it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config)


def pefts_deltas(model: Any) -> dict[str, Tensor]:
    """What PEFT adds to every adapted matrix, by its name in the model: (in, out), of experts (E, in, out)."""
    deltas = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            delta, name = module.get_delta_weight("default").detach(), name.replace(".base_layer", "")
            if hasattr(module, "parameter_name"):
                deltas[f"{name}.{module.parameter_name}"] = delta.contiguous()
            else:
                deltas[name] = delta.T.contiguous()
    return deltas


def by_peft(folder: Path) -> dict[str, Tensor]:
    """PEFT, whichever is installed."""
    parameters = [f"mlp.experts.{name}" for name in EXPERTS]
    model = with_adapter(tiny_model(), target_modules=ATTENTION, target_parameters=parameters)
    model.save_pretrained(str(folder))
    return pefts_deltas(model)


# --- Unsloth ----------------------------------------------------------------------------------------------------------


def out_of(file: Path, name: str, **names: Any) -> Any:
    """A function or class of a file that can't be imported, with the names that it uses."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
    space: dict[str, Any] = {"torch": torch, "nn": nn, **names}
    exec(compile(ast.Module([found[-1]], []), str(file), "exec"), space)
    return space[name]


def mark_as_unsloth(folder: Path) -> None:
    """What Unsloth puts into the config of every adapter."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["auto_mapping"] = {"base_model_class": "GptOssForCausalLM", "parent_library": "x", "unsloth_fixed": True}
    file.write_text(json.dumps(config, indent=2, sort_keys=True))


def by_unsloth(folder: Path, wheel: Path) -> dict[str, Tensor]:
    """Experts in 16 bits: saved by PEFT, computed with by Unsloth's own reading of the factors."""
    from typing import Optional

    deltas = by_peft(folder)
    mark_as_unsloth(folder)
    factors = out_of(
        wheel / "unsloth_zoo/temporary_patches/moe_utils.py",
        "_canonical_lora_weights_for_grouped_mm",
        Tuple=tuple,
        Optional=Optional,
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    for layer in range(SIZES["num_hidden_layers"]):
        for name, place in zip(EXPERTS, (".base_layer", ""), strict=True):
            owner = f"model.layers.{layer}.mlp.experts"
            a, b = (tensors[f"base_model.model.{owner}{place}.lora_{side}.weight"] for side in "AB")
            first, second = factors(a, b, SIZES["num_local_experts"], RANK, a.shape[1], b.shape[0])
            deltas[f"{owner}.{name}"] = torch.bmm(first, second) * (ALPHA / RANK)
    return deltas


def by_unsloth_4bit(folder: Path, wheel: Path) -> dict[str, Tensor]:
    """Experts in 4 bits: lists of linear modules, with an adapter of PEFT's on each."""
    file = wheel / "unsloth_zoo/temporary_patches/gpt_oss.py"
    experts = out_of(file, "GptOssExpertsBnb4bit", dtype_from_config=lambda config: torch.float32)
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.experts = experts(model.config)
    each = [f"{name}s.{expert}" for name in EXPERTS for expert in range(SIZES["num_local_experts"])]
    adapted = with_adapter(model, target_modules=[*ATTENTION, *each])
    adapted.save_pretrained(str(folder))
    mark_as_unsloth(folder)
    deltas = pefts_deltas(adapted)
    for layer in range(SIZES["num_hidden_layers"]):
        owner = f"model.layers.{layer}.mlp.experts"
        for name in EXPERTS:
            mine = [deltas.pop(f"{owner}.{name}s.{expert}") for expert in range(SIZES["num_local_experts"])]
            deltas[f"{owner}.{name}"] = torch.stack(mine)
    return deltas


# --- Tinker -----------------------------------------------------------------------------------------------------------


def by_tinker(folder: Path, wheel: Path) -> dict[str, Tensor]:
    """An adapter as the service hands it out, converted by the cookbook; computed with by the cookbook's merge."""
    sys.path.insert(0, str(wheel))
    for name in ("tinker_cookbook", "tinker_cookbook.weights"):  # without what their own __init__ imports
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(wheel / name.replace(".", "/"))]  # type: ignore[attr-defined]
    from tinker_cookbook.weights import _adapter, _merge

    hidden, inner, experts = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_local_experts"]
    generator = torch.Generator().manual_seed(0)
    tensors, model = {}, tiny_model()
    for layer in range(SIZES["num_hidden_layers"]):
        place = f"base_model.model.model.layers.{layer}"
        shapes = {
            "attn.q_proj": ((RANK, hidden), (SIZES["num_attention_heads"] * SIZES["head_dim"], RANK)),
            "mlp.experts.w1": ((1, RANK, hidden), (experts, inner, RANK)),
            "mlp.experts.w3": ((1, RANK, hidden), (experts, inner, RANK)),
            "mlp.experts.w2": ((experts, RANK, inner), (1, hidden, RANK)),
        }
        for name, pair in shapes.items():
            for side, shape in zip("AB", pair, strict=True):
                tensors[f"{place}.{name}.lora_{side}.weight"] = torch.randn(shape, generator=generator)
    config = {"lora_alpha": ALPHA, "r": RANK}
    with TemporaryDirectory() as scratch:
        given, base = Path(scratch) / "given", Path(scratch) / "base"
        model.save_pretrained(str(base))
        given.mkdir()
        save_file(tensors, given / "adapter_model.safetensors")
        (given / "adapter_config.json").write_text(json.dumps(config))
        shutil.rmtree(folder)
        _adapter.build_lora_adapter(base_model=str(base), adapter_path=str(given), output_path=str(folder))
        file = folder / "adapter_config.json"
        file.write_text(file.read_text().replace(str(base), "openai/gpt-oss-20b"))
        weights, _ = _adapter.load_adapter_weights(given)
        keys = set(model.state_dict())
        profile = _merge.detect_merge_profile(json.loads((base / "config.json").read_text()), keys)
        planned = _merge.plan_merge_ops(weights, config, keys, profile)
    deltas = {}
    for name, operations in planned.items():
        zero = {name: torch.zeros(model.state_dict()[name].shape)}
        for operation in operations:
            _merge.apply_merge_op(zero, operation)
        delta = zero[name]
        deltas[name.removesuffix(".weight")] = (delta if delta.ndim == 3 else delta.T).contiguous()
    return deltas


WITH_WHEEL: dict[str, Callable[[Path, Path], dict[str, Tensor]]] = {
    "unsloth-zoo-2026.9.2": by_unsloth,
    "unsloth-zoo-2026.9.2-4bit": by_unsloth_4bit,
    "tinker-cookbook-0.6.1": by_tinker,
}


def main(writer: str, wheel: str | None = None) -> None:
    """Write one folder."""
    folder = FOLDER / writer
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if writer in WITH_WHEEL:
        assert wheel is not None, "name the folder of the unpacked wheel"
        deltas = WITH_WHEEL[writer](folder, Path(wheel))
    else:
        installed = f"peft-{version('peft')}-transformers-{version('transformers').partition('.')[0]}"
        assert writer == installed, f"installed is {installed}"
        deltas = by_peft(folder)
    (folder / "README.md").unlink(missing_ok=True)
    save_file(deltas, folder / "deltas.safetensors")
    print(folder, sorted(deltas))


if __name__ == "__main__":
    main(*sys.argv[1:])
