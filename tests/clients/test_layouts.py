"""What no client tries here, SGLang and vLLM's MXFP4 kernels on a GPU among it: bytes against the documented layout.

Read with no code of Ossia's: names, shapes and types from the safetensors header, values from the format's own table,
keys of the JSON files. Source: transformers' `modeling_gpt_oss.py` and `integrations/mxfp4.py`, which load the released
files; OCP Microscaling Formats v1.0.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from ossia.export import export_model, write_model
from tests.conftest import MakeTiny
from tests.oracle.model_pairs import load
from tests.shapes import UNEQUAL

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EXPERTS_BF16 = {"gate_up_proj": ("BF16", [5, 64, 192]), "down_proj": ("BF16", [5, 96, 64])}
EXPERTS_MXFP4 = {
    "gate_up_proj_blocks": ("U8", [5, 192, 2, 16]),
    "gate_up_proj_scales": ("U8", [5, 192, 2]),
    "down_proj_blocks": ("U8", [5, 64, 3, 16]),
    "down_proj_scales": ("U8", [5, 64, 3]),
}


def documented(experts: dict[str, tuple[str, list[int]]], rows: int) -> dict[str, tuple[str, list[int]]]:
    """Every tensor of a model of the shape UNEQUAL, written down and not computed."""
    found: dict[str, tuple[str, list[int]]] = {
        "model.embed_tokens.weight": ("BF16", [rows, 64]),
        "model.norm.weight": ("BF16", [64]),
        "lm_head.weight": ("BF16", [rows, 64]),
    }
    for layer in ("model.layers.0.", "model.layers.1."):
        attention, moe = f"{layer}self_attn.", f"{layer}mlp."
        found |= {
            f"{layer}input_layernorm.weight": ("BF16", [64]),
            f"{layer}post_attention_layernorm.weight": ("BF16", [64]),
            f"{attention}q_proj.weight": ("BF16", [96, 64]),
            f"{attention}q_proj.bias": ("BF16", [96]),
            f"{attention}k_proj.weight": ("BF16", [48, 64]),
            f"{attention}k_proj.bias": ("BF16", [48]),
            f"{attention}v_proj.weight": ("BF16", [48, 64]),
            f"{attention}v_proj.bias": ("BF16", [48]),
            f"{attention}o_proj.weight": ("BF16", [64, 96]),
            f"{attention}o_proj.bias": ("BF16", [64]),
            f"{attention}sinks": ("BF16", [4]),
            f"{moe}router.weight": ("BF16", [5, 64]),
            f"{moe}router.bias": ("BF16", [5]),
            f"{moe}experts.gate_up_proj_bias": ("BF16", [5, 192]),
            f"{moe}experts.down_proj_bias": ("BF16", [5, 64]),
        }
        found |= {f"{moe}experts.{name}": spec for name, spec in experts.items()}
    return found


def header(file: Path) -> dict[str, Any]:
    """What a safetensors file says it holds."""
    with file.open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


@pytest.fixture(scope="module")
def twins(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model as both folders that an export writes."""
    base, folder = tiny(UNEQUAL), tmp_path_factory.mktemp("layouts")
    export_model(str(base), to="hf-bf16", output=folder / "bf16")
    write_model(folder / "mxfp4", load(base), tokenizer_from=base, layout="mxfp4")
    return {"bf16": folder / "bf16", "mxfp4": folder / "mxfp4"}


@pytest.mark.parametrize(("layout", "experts"), [("bf16", EXPERTS_BF16), ("mxfp4", EXPERTS_MXFP4)])
def test_a_folder_holds_the_documented_tensors_and_nothing_else(
    twins: dict[str, Path], layout: str, experts: dict[str, tuple[str, list[int]]]
) -> None:
    found = header(twins[layout] / "model.safetensors")
    assert found.pop("__metadata__") == {"format": "pt"}
    rows = found["lm_head.weight"]["shape"][0]
    assert {name: (one["dtype"], one["shape"]) for name, one in found.items()} == documented(experts, rows)
    spans = sorted(one["data_offsets"] for one in found.values())
    assert spans[0][0] == 0
    assert all(end == start for (_, end), (start, _) in pairwise(spans)), "holes, or overlaps"


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_mxfp4_bytes_mean_what_the_format_says(twins: dict[str, Path], name: str) -> None:
    """Low nibble first, sign in bit 3, blocks along the inputs, a scale of 2^(byte - 127); out-major, unlike bf16."""
    tensor = f"model.layers.1.mlp.experts.{name}"
    packed = load_file(twins["mxfp4"] / "model.safetensors")
    plain = load_file(twins["bf16"] / "model.safetensors")[tensor].float().numpy()
    blocks, scales = (packed[tensor + part].numpy() for part in ("_blocks", "_scales"))
    generator = np.random.default_rng(0)
    for _ in range(500):
        expert, out, group, place = (generator.integers(size) for size in (*blocks.shape[:3], 32))
        byte = int(blocks[expert, out, group, place // 2])
        code = byte >> 4 if place % 2 else byte & 15
        value = math.copysign(E2M1[code & 7], -1 if code & 8 else 1) * 2.0 ** (int(scales[expert, out, group]) - 127)
        assert plain[expert, 32 * group + place, out] == value


def test_the_config_says_what_loaders_of_either_generation_ask_for(twins: dict[str, Path]) -> None:
    for layout, path in twins.items():
        config = json.loads((path / "config.json").read_text())
        assert (config["architectures"], config["model_type"]) == (["GptOssForCausalLM"], "gpt_oss")
        assert (config["num_local_experts"], config["num_experts_per_tok"], config["experts_per_token"]) == (5, 3, 3)
        assert config["layer_types"] == ["sliding_attention", "full_attention"]
        assert (config["rope_theta"], config["rope_scaling"]["rope_type"]) == (150000.0, "yarn")
        assert config["rope_scaling"]["truncate"] is False
        assert (config["swiglu_limit"], config["attention_bias"], config["torch_dtype"]) == (7.0, True, "bfloat16")
        if layout == "bf16":
            assert "quantization_config" not in config
        else:
            quantization = config["quantization_config"]
            assert quantization["quant_method"] == "mxfp4"
            kept = {"model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"}
            assert set(quantization["modules_to_not_convert"]) == kept


def test_the_tokenizers_files_name_a_class_that_every_transformers_knows(twins: dict[str, Path]) -> None:
    """transformers 5 writes `TokenizersBackend`, which 4.57 and what stands on it refuse."""
    for path in twins.values():
        said = json.loads((path / "tokenizer_config.json").read_text())
        assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert (said["eos_token"], said["pad_token"]) == ("<|return|>", "<|endoftext|>")
        assert (path / "chat_template.jinja").is_file()
        tokens = {
            one["content"]: one["id"] for one in json.loads((path / "tokenizer.json").read_text())["added_tokens"]
        }
        stops = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
        assert {tokens[name] for name in ("<|return|>", "<|call|>")} <= set(stops)
