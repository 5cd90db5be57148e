"""config.json read strictly, and the tensors that follow from it."""

from __future__ import annotations

from typing import Any

import pytest

from ossia.errors import CheckpointError
from ossia.model.arch import SHAPES, Arch, Layout, TensorSpec

LAYER_TYPES = ["sliding_attention", "full_attention"] * 12
YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
# config.json of openai/gpt-oss-20b
RELEASED_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": LAYER_TYPES,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": YARN,
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


def _without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_the_released_config_is_the_20b_shape() -> None:
    assert Arch.from_config(RELEASED_20B, "config.json") == SHAPES["20b"]


def test_the_form_that_transformers_5_writes_reads_the_same() -> None:
    new_form = _without(RELEASED_20B, "rope_scaling", "rope_theta", "experts_per_token", "layer_types") | {
        "rope_parameters": YARN | {"rope_theta": 150000.0},
        "swiglu_alpha": 1.702,
        "dtype": "bfloat16",
        "layer_types": None,
    }
    assert Arch.from_config(new_form, "config.json") == SHAPES["20b"]
    assert Arch.from_config(new_form | {"rope_scaling": YARN, "rope_theta": 150000}, "config.json") == SHAPES["20b"]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_a_written_config_reads_back(name: str, layout: Layout) -> None:
    config = SHAPES[name].to_config(layout)
    assert Arch.from_config(config, "config.json") == SHAPES[name]
    assert ("quantization_config" in config) == (layout == "mxfp4")


def test_a_written_config_says_nothing_that_the_released_one_contradicts() -> None:
    written = SHAPES["20b"].to_config("mxfp4")
    ours = {"bos_token_id", "swiglu_alpha", "torch_dtype"}
    assert _without(written, *ours) == RELEASED_20B


@pytest.mark.parametrize(
    ("name", "parameters", "num_bytes"),
    [("20b", 20_914_757_184, 13_761_264_768), ("120b", 116_829_156_672, 65_248_815_744)],
)
def test_the_released_models_have_their_published_sizes(name: str, parameters: int, num_bytes: int) -> None:
    assert SHAPES[name].num_parameters() == parameters
    assert sum(spec.num_bytes for spec in SHAPES[name].tensor_specs("mxfp4").values()) == num_bytes


def test_tensor_names_and_shapes_are_the_released_ones(small: Arch) -> None:
    experts = "model.layers.1.mlp.experts."
    mxfp4, bf16 = small.tensor_specs("mxfp4"), small.tensor_specs("bf16")
    assert bf16[f"{experts}gate_up_proj"] == TensorSpec((5, 64, 192), "BF16")
    assert bf16[f"{experts}down_proj"] == TensorSpec((5, 96, 64), "BF16")
    assert mxfp4[f"{experts}gate_up_proj_blocks"] == TensorSpec((5, 192, 2, 16), "U8")
    assert mxfp4[f"{experts}gate_up_proj_scales"] == TensorSpec((5, 192, 2), "U8")
    assert mxfp4[f"{experts}down_proj_blocks"] == TensorSpec((5, 64, 3, 16), "U8")
    assert mxfp4[f"{experts}down_proj_scales"] == TensorSpec((5, 64, 3), "U8")
    assert mxfp4["model.layers.0.self_attn.q_proj.weight"] == TensorSpec((96, 64), "BF16")
    assert mxfp4["model.layers.0.self_attn.k_proj.bias"] == TensorSpec((48,), "BF16")
    assert mxfp4["model.layers.0.self_attn.sinks"] == TensorSpec((4,), "BF16")
    assert len(mxfp4) == 3 + 2 * 19
    assert len(bf16) == 3 + 2 * 17


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mixtral"}, "`model_type` is 'mixtral'; allowed: 'gpt_oss'"),
    ({"architectures": ["GptOssForSequenceClassification"]}, "`architectures`"),
    ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'; allowed: 'silu'"),
    ({"attention_bias": False}, "`attention_bias` is False"),
    ({"attention_dropout": 0.1}, "`attention_dropout` is 0.1"),
    ({"tie_word_embeddings": True}, "`tie_word_embeddings` is True; allowed: False"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "`quantization_config`"),
    ({"layer_types": LAYER_TYPES[:-1]}, "`layer_types`"),
    (
        {"layer_types": ["chunked_attention", *LAYER_TYPES[1:]]},
        "`layer_types`.*'sliding_attention' or 'full_attention'",
    ),
    ({"hidden_size": "2880"}, "`hidden_size` is '2880'; allowed: a whole number from 1"),
    ({"num_local_experts": 0}, "`num_local_experts` is 0"),
    ({"use_cache": True, "sliding_window": None}, "`sliding_window` is None"),
    ({"experts_per_token": 2}, "`experts_per_token` is 2; allowed: the same number as `num_experts_per_tok`"),
    ({"num_experts_per_tok": 33, "experts_per_token": 33}, "`num_experts_per_tok` is 33; allowed: at most"),
    ({"num_key_value_heads": 7}, "`num_attention_heads` is 64; allowed: a multiple of num_key_value_heads"),
    ({"head_dim": 63}, "`head_dim` is 63"),
    ({"rms_norm_eps": float("inf")}, "`rms_norm_eps` is inf"),
    ({"rope_scaling": None}, "`rope_scaling` is None"),
    ({"rope_scaling": YARN | {"rope_type": "linear"}}, "`rope_scaling.rope_type` is 'linear'; allowed: 'yarn'"),
    ({"rope_scaling": YARN | {"factor": None}}, "`rope_scaling.factor` is None"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "`rope_scaling.factor` is 0.5; allowed: 1 or more"),
    ({"rope_scaling": YARN | {"truncate": 0}}, "`rope_scaling.truncate` is 0"),
    ({"rope_scaling": YARN | {"attention_factor": 1.0}}, "`rope_scaling.attention_factor` is 1.0"),
    ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "`rope_scaling.partial_rotary_factor`"),
    ({"rope_theta": None}, "`rope_theta` is None"),
    ({"rope_parameters": YARN | {"rope_theta": 10000.0}}, "`rope_parameters`.*allowed: the same numbers"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:45] for _, message in REFUSED])
def test_what_the_model_code_does_not_implement_is_refused_by_file_and_key(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"some/config.json: {message}"):
        Arch.from_config(RELEASED_20B | change, "some/config.json")


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "vocab_size", "rms_norm_eps", "max_position_embeddings"])
def test_a_missing_key_is_refused_by_its_name(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"`{key}` is None"):
        Arch.from_config(_without(RELEASED_20B, key), "config.json")


def test_a_missing_truncate_means_what_transformers_takes_it_for() -> None:
    config = RELEASED_20B | {"rope_scaling": _without(YARN, "truncate")}
    assert Arch.from_config(config, "config.json").rope_truncate is True


def test_mxfp4_needs_widths_of_whole_blocks() -> None:
    odd = Arch.from_config(RELEASED_20B | {"intermediate_size": 2881}, "config.json")
    assert odd.tensor_specs("bf16")
    with pytest.raises(CheckpointError, match="down_proj has 2881 inputs; MXFP4 needs a multiple of 32"):
        odd.tensor_specs("mxfp4")
