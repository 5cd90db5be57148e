"""The shape of a gpt-oss model: what config.json says, as one frozen record, and the tensors that follow from it.

No torch here: planning a run needs the shape of a model and none of its weights.
Letters: V vocabulary, H hidden, I expert width, E experts, N query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from ossia.errors import CheckpointError

Layout = Literal["mxfp4", "bf16"]
LayerType = Literal["sliding_attention", "full_attention"]
MXFP4_BLOCK = 32  # weights that share one scale
DTYPE_BYTES = {"BF16": 2, "U8": 1}  # safetensors' names of the types a gpt-oss checkpoint holds
_UNQUANTIZED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


class TensorSpec(NamedTuple):
    """What a tensor must look like on disk: its shape, and its type by safetensors' name ("BF16" or "U8")."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Arch:
    """One gpt-oss architecture. Field names are ours; `from_config` and `to_config` translate config.json.

    rope_truncate  whether YaRN's correction range is rounded to whole dimensions (the released models: no)
    sliding_window number of keys a query of a sliding layer sees, its own included
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    sliding_window: int
    vocab_size: int
    layer_types: tuple[LayerType, ...]
    rms_eps: float = 1e-5
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_original: int = 4096
    rope_truncate: bool = False
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    max_positions: int = 131072

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Arch:
        """Read the contents of a config.json, in the released form or as transformers 5 writes it.

        where   the file's name, for messages
        Raises  CheckpointError for a missing or ill-typed key, and for whatever the model code doesn't implement
        Source  config.json of openai/gpt-oss-20b and -120b; transformers 5.23 `GptOssConfig` for the keys it adds
        """
        read = _Config(config, where)
        read.expect_fixed_choices()
        num_layers = read.integer("num_hidden_layers")
        arch = cls(
            hidden_size=read.integer("hidden_size"),
            intermediate_size=read.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=read.integer("num_attention_heads"),
            num_kv_heads=read.integer("num_key_value_heads"),
            head_dim=read.integer("head_dim"),
            num_experts=read.integer("num_local_experts"),
            experts_per_token=read.experts_per_token(),
            sliding_window=read.integer("sliding_window"),
            vocab_size=read.integer("vocab_size"),
            layer_types=read.layer_types(num_layers),
            rms_eps=read.number("rms_norm_eps"),
            swiglu_limit=read.number("swiglu_limit", 7.0),
            swiglu_alpha=read.number("swiglu_alpha", 1.702),
            max_positions=read.integer("max_position_embeddings"),
            **read.rope(),
        )
        arch.check(where)
        return arch

    def check(self, where: str) -> None:
        """Raise CheckpointError, naming `where`, if the sizes don't go together."""
        rules = {
            "num_attention_heads": (self.num_heads, self.num_kv_heads, "a multiple of num_key_value_heads"),
            "head_dim": (self.head_dim, 2, "an even number: RoPE turns pairs"),
        }
        for key, (found, divisor, allowed) in rules.items():
            if found % divisor:
                raise _refusal(where, key, found, allowed)
        if self.experts_per_token > self.num_experts:
            raise _refusal(where, "num_experts_per_tok", self.experts_per_token, "at most num_local_experts")
        if self.rope_factor < 1:
            raise _refusal(where, "rope_scaling.factor", self.rope_factor, "1 or more")
        if len(self.layer_types) != self.num_layers:
            raise _refusal(where, "layer_types", self.layer_types, f"{self.num_layers}, one for each layer")

    def to_config(
        self, layout: Layout, *, bos_token_id: int = 199998, eos_token_id: int = 200002, pad_token_id: int = 199999
    ) -> dict[str, Any]:
        """The config.json of a checkpoint of this shape, in the released form that transformers 4 and 5 both read.

        The `rope_theta` + `rope_scaling` form and not transformers 5's `rope_parameters`: version 4 ignores that one
        and falls back to its defaults without a word, version 5 reads both.
        """
        config: dict[str, Any] = {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "experts_per_token": self.experts_per_token,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initial_context_length": self.rope_original,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_types": list(self.layer_types),
            "max_position_embeddings": self.max_positions,
            "model_type": "gpt_oss",
            "num_attention_heads": self.num_heads,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "num_local_experts": self.num_experts,
            "output_router_logits": False,
            "pad_token_id": pad_token_id,
            "rms_norm_eps": self.rms_eps,
            "rope_scaling": {
                "beta_fast": self.rope_beta_fast,
                "beta_slow": self.rope_beta_slow,
                "factor": self.rope_factor,
                "original_max_position_embeddings": self.rope_original,
                "rope_type": "yarn",
                "truncate": self.rope_truncate,
            },
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.9,
            "sliding_window": self.sliding_window,
            "swiglu_alpha": self.swiglu_alpha,
            "swiglu_limit": self.swiglu_limit,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.55.0.dev0",  # without one transformers 5 warns of Mistral's tokenizer
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
        if layout == "mxfp4":
            config["quantization_config"] = {"modules_to_not_convert": _UNQUANTIZED, "quant_method": "mxfp4"}
        return config

    def tensor_specs(self, layout: Layout) -> dict[str, TensorSpec]:
        """Every tensor of a checkpoint of this shape by its name, in the order of the forward pass.

        layout  "mxfp4": experts as `_blocks` and `_scales`, out-major; "bf16": experts as (in, out) matrices
        Raises  CheckpointError if MXFP4 is asked for and hidden_size or intermediate_size is no multiple of 32
        """
        specs: dict[str, TensorSpec] = {}
        bf16_VH = TensorSpec((self.vocab_size, self.hidden_size), "BF16")
        specs["model.embed_tokens.weight"] = bf16_VH
        for layer in range(self.num_layers):
            specs |= {f"model.layers.{layer}.{name}": spec for name, spec in self._layer_specs(layout)}
        specs["model.norm.weight"] = TensorSpec((self.hidden_size,), "BF16")
        specs["lm_head.weight"] = bf16_VH
        return specs

    def _layer_specs(self, layout: Layout) -> Iterator[tuple[str, TensorSpec]]:
        hidden, experts, width = self.hidden_size, self.num_experts, self.intermediate_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim

        def bf16(*shape: int) -> TensorSpec:
            return TensorSpec(shape, "BF16")

        yield "input_layernorm.weight", bf16(hidden)
        for name, fan_out in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
            yield f"self_attn.{name}.weight", bf16(fan_out, hidden)
            yield f"self_attn.{name}.bias", bf16(fan_out)
        yield "self_attn.o_proj.weight", bf16(hidden, q_size)
        yield "self_attn.o_proj.bias", bf16(hidden)
        yield "self_attn.sinks", bf16(self.num_heads)
        yield "post_attention_layernorm.weight", bf16(hidden)
        yield "mlp.router.weight", bf16(experts, hidden)
        yield "mlp.router.bias", bf16(experts)
        for name, fan_in, fan_out in (("gate_up_proj", hidden, 2 * width), ("down_proj", width, hidden)):
            if layout == "bf16":
                yield f"mlp.experts.{name}", bf16(experts, fan_in, fan_out)
            else:
                if fan_in % MXFP4_BLOCK:
                    raise CheckpointError(f"{name} has {fan_in} inputs; MXFP4 needs a multiple of 32: use bf16")
                blocks = fan_in // MXFP4_BLOCK
                yield f"mlp.experts.{name}_blocks", TensorSpec((experts, fan_out, blocks, MXFP4_BLOCK // 2), "U8")
                yield f"mlp.experts.{name}_scales", TensorSpec((experts, fan_out, blocks), "U8")
            yield f"mlp.experts.{name}_bias", bf16(experts, fan_out)

    def num_parameters(self) -> int:
        """Number of weights, whatever the layout."""
        return sum(math.prod(spec.shape) for spec in self.tensor_specs("bf16").values())


def alternating_layers(num_layers: int) -> tuple[LayerType, ...]:
    """A sliding layer, a full one, and so on: the released models' order."""
    return tuple("full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers))


def _shape(hidden: int, width: int, layers: int, experts: int, heads: int, kv_heads: int, head_dim: int = 64) -> Arch:
    return Arch(
        hidden_size=hidden,
        intermediate_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        experts_per_token=4,
        sliding_window=128,
        vocab_size=201088,
        layer_types=alternating_layers(layers),
    )


# The released models, and small ones for the demo and the benchmarks; YaRN and vocabulary as released. "demo" is what
# `ossia demo` trains, and benchmarks of the demo shape run, there with a small vocabulary in the released one's place.
SHAPES: Mapping[str, Arch] = MappingProxyType(
    {
        "demo": _shape(128, 64, 4, 32, 4, 2, head_dim=32),
        "B1": _shape(256, 256, 8, 16, 8, 2),
        "B2": _shape(512, 512, 12, 32, 8, 2),
        "20b": _shape(2880, 2880, 24, 32, 64, 8),
        "120b": _shape(2880, 2880, 36, 128, 64, 8),
    }
)


def _refusal(where: str, key: str, found: object, allowed: str) -> CheckpointError:
    return CheckpointError(f"{where}: `{key}` is {found!r}; allowed: {allowed}")


class _Config:
    """config.json's values with their types checked; every complaint names file, key, what was found and allowed."""

    def __init__(self, config: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.config, self.where, self.prefix = config, where, prefix

    def fail(self, key: str, allowed: str, default: object = None) -> CheckpointError:
        """The error to raise for `key`."""
        return _refusal(self.where, self.prefix + key, self.config.get(key, default), allowed)

    def expect_fixed_choices(self) -> None:
        """Refuse the variants that transformers' GptOss can express and this model code doesn't implement."""
        fixed: dict[str, tuple[object, object]] = {  # key: the only value, what a missing key means
            "model_type": ("gpt_oss", None),
            "architectures": (["GptOssForCausalLM"], ["GptOssForCausalLM"]),
            "hidden_act": ("silu", "silu"),
            "attention_bias": (True, True),
            "attention_dropout": (0, 0),
            "tie_word_embeddings": (False, False),
        }
        for key, (only, default) in fixed.items():
            if self.config.get(key, default) != only:
                raise self.fail(key, f"{only!r}, as in the released gpt-oss models")
        quantization = self.config.get("quantization_config")
        if quantization is not None and quantization.get("quant_method") != "mxfp4":
            raise self.fail("quantization_config", "quant_method 'mxfp4', or no such key for bf16 weights")

    def integer(self, key: str) -> int:
        found = self.config.get(key)
        if type(found) is not int or found < 1:
            raise self.fail(key, "a whole number from 1")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        found = self.config.get(key, default)
        if type(found) not in (int, float) or not 0 < found < math.inf:
            raise self.fail(key, "a finite number above 0", default)
        return float(found)

    def experts_per_token(self) -> int:
        """The released config says it under two names; either will do, two different numbers won't."""
        names = [key for key in ("num_experts_per_tok", "experts_per_token") if key in self.config]
        values = {self.integer(key) for key in names or ["num_experts_per_tok"]}
        if len(values) > 1:
            raise self.fail("experts_per_token", "the same number as `num_experts_per_tok`")
        return values.pop()

    def layer_types(self, num_layers: int) -> tuple[LayerType, ...]:
        """Absent, they alternate from a sliding layer on, as in the released models."""
        found = self.config.get("layer_types")
        if found is None:
            return alternating_layers(num_layers)
        if not isinstance(found, list) or len(found) != num_layers or not set(found) <= set(get_args(LayerType)):
            raise self.fail("layer_types", f"{num_layers} times 'sliding_attention' or 'full_attention'")
        return tuple(found)

    def rope(self) -> dict[str, Any]:
        """YaRN's numbers, from `rope_scaling` + `rope_theta` or `rope_parameters`; if both stand they must agree."""
        forms = [key for key in ("rope_scaling", "rope_parameters") if self.config.get(key) is not None]
        if not forms:
            raise self.fail("rope_scaling", "YaRN's parameters, here or in `rope_parameters`")
        readings = [self._yarn(key) for key in forms]
        if readings[0] != readings[-1]:
            raise self.fail("rope_parameters", "the same numbers as in `rope_scaling` and `rope_theta`")
        return readings[0]

    def _yarn(self, form: str) -> dict[str, Any]:
        if not isinstance(self.config[form], Mapping):
            raise self.fail(form, "a mapping with rope_type 'yarn'")
        yarn = _Config(self.config[form], self.where, f"{form}.")
        if yarn.config.get("rope_type", yarn.config.get("type")) != "yarn":
            raise yarn.fail("rope_type", "'yarn'", yarn.config.get("type"))
        for key, only in (
            ("attention_factor", None),
            ("mscale", None),
            ("mscale_all_dim", None),
            ("partial_rotary_factor", 1),
        ):
            if yarn.config.get(key) not in (None, only):
                raise yarn.fail(key, "no such key; this model code has the released YaRN only")
        truncate = yarn.config.get("truncate", True)  # what transformers takes a missing key for
        if type(truncate) is not bool:
            raise yarn.fail("truncate", "true or false")
        theta = yarn if "rope_theta" in yarn.config else self
        return {
            "rope_theta": theta.number("rope_theta"),
            "rope_factor": yarn.number("factor"),
            "rope_beta_fast": yarn.number("beta_fast", 32.0),
            "rope_beta_slow": yarn.number("beta_slow", 1.0),
            "rope_original": yarn.integer("original_max_position_embeddings"),
            "rope_truncate": truncate,
        }
