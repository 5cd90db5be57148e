"""A model as one GGUF file for llama.cpp, written with the `gguf` package from our own weights.

Experts that are MXFP4 in the checkpoint and weren't trained keep every bit: the file has the same codes in another
order, and they are never expanded. All else is the merged model of `ossia.export.merge`. It goes expert by expert, each
piece to its place in the file, so memory doesn't grow with the model. Own code and not llama.cpp's converter: that one
wants a merged bf16 checkpoint on the disk first.
Source: llama.cpp's `ggml-quants.h` for MXFP4's and Q8_0's blocks, its model `openai-moe` for names and what it expects.
Letters: E experts, O out, G groups of 32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, TokenType
from gguf.quants import quantize
from torch import Tensor

from ossia.errors import CheckpointError, TokenizerError
from ossia.export.gguf.scratch import scratch_folder
from ossia.export.merge import Changes, mapped_tensor, merged_tensor
from ossia.harmony.tokenizer_json import SPLIT, TokenizerFile, read_tokenizer_text, tokenizer_file
from ossia.model.arch import Arch, alternating_layers
from ossia.model.budget.weights import is_expert_weight
from ossia.model.checkpoint import Checkpoint
from ossia.model.template import chat_template
from ossia.pieces import Journal, Progress, Region, RegionWriter

GgufType = Literal["bf16", "f16", "q8_0", "f32"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
_KINDS = {name: GGMLQuantizationType[name.upper()] for name in GGUF_TYPES}
_FILE_TYPES = {
    "bf16": LlamaFileType.MOSTLY_BF16,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "f32": LlamaFileType.ALL_F32,
}
_PIECE = 1 << 24  # weights of a matrix encoded at a time
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
}
_EXACT = ("norm.weight", "layernorm.weight", "bias", "sinks", "router.weight")  # llama.cpp wants these in F32
_BOS, _EOS, _PAD = "<|startoftext|>", "<|return|>", "<|endoftext|>"


def gguf_names(name: str) -> tuple[str, ...]:
    """What llama.cpp calls a tensor of a bf16 checkpoint: one name, or those of its gate half and its up half."""
    if name in _TOP:
        return (_TOP[name],)
    _, _, layer, inner = name.split(".", 3)
    if inner == "self_attn.sinks":
        return (f"blk.{layer}.attn_sinks.weight",)
    if inner.startswith("mlp.experts."):
        kind = "bias" if inner.endswith("_bias") else "weight"
        parts = ("gate", "up") if "gate_up_proj" in inner else ("down",)
        return tuple(f"blk.{layer}.ffn_{part}_exps.{kind}" for part in parts)
    module, _, kind = inner.rpartition(".")
    return (f"blk.{layer}.{_OF_LAYER[module]}.{kind}",)


def gguf_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file with its shape, the axis that is contiguous last; an expert's matrix is (out, in)."""
    shapes = {}
    for name, spec in arch.tensor_specs("bf16").items():
        names, shape = gguf_names(name), spec.shape
        if is_expert_weight(name):
            shape = (shape[0], shape[2], shape[1])
        if len(names) == 2:
            shape = (shape[0], shape[1] // 2, *shape[2:])
        shapes |= dict.fromkeys(names, shape)
    return shapes


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of the file: its type and size."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes


def write_gguf(
    journal: Journal,
    base: Checkpoint,
    changes: Changes,
    *,
    name: str,
    dense: GgufType = "bf16",
    progress: Progress | None = None,
) -> None:
    """Write a model and its tokenizer as one GGUF file, the journal's target; what is whole in it is kept.

    name    what the model is called in it
    dense   type of every matrix that is not an untouched MXFP4 expert or the router; norms, biases, sinks and the
            router are F32
    Raises  CheckpointError for what llama.cpp's gpt-oss can't be (`require_llama_cpp`), a weight that isn't finite, a
            matrix whose rows Q8_0 can't hold; StoppedError for a full disk; TokenizerError for a tokenizer that it
            doesn't know
    """
    require_llama_cpp(base)
    places = _plan(base, changes, _KINDS[dense])
    with journal.growing(sum(place.num_bytes for place in places.values())):
        head = _head(base, places, name, _FILE_TYPES[dense] if _all_dense(places) else None)
        regions, position = {}, len(head)
        for target, place in places.items():
            regions[target] = Region("", GGUFWriter.ggml_pad(position, _ALIGNMENT), place.num_bytes)
            position = regions[target].end
        end = GGUFWriter.ggml_pad(position, _ALIGNMENT)
        with RegionWriter(journal.target, {"": head}, regions, journal=journal, progress=progress) as writer:
            for target, raw in _pieces(base, changes, places, journal.whole):
                if target not in journal.whole:  # a gate may be whole without its up
                    writer.write(target, memoryview(raw).cast("B"))
            writer.finish({"": end})


_ALIGNMENT = 32  # of tensors in the file, the format's default


def require_llama_cpp(base: Checkpoint) -> None:
    """Raise CheckpointError for a gpt-oss variant that a GGUF file has no key for: llama.cpp would compute another."""
    arch = base.arch
    fixed = {
        "layer_types": (arch.layer_types, alternating_layers(arch.num_layers)),
        "swiglu_limit": (arch.swiglu_limit, 7.0),
        "swiglu_alpha": (arch.swiglu_alpha, 1.702),
    }
    for key, (found, only) in fixed.items():
        if found != only:
            raise CheckpointError(
                f"{base.path}: `{key}` is {found}; llama.cpp computes gpt-oss with {only} alone and a GGUF file can't "
                "say otherwise\n  next: export hf-bf16 for another program"
            )


def _plan(base: Checkpoint, changes: Changes, dense: GGMLQuantizationType) -> dict[str, _Place]:
    """Every tensor of the file in its order."""
    places = {}
    shapes = gguf_shapes(base.arch)
    for name in base.arch.tensor_specs("bf16"):
        kind = GGMLQuantizationType.F32 if name.endswith(_EXACT) else dense
        if is_expert_weight(name) and base.layout == "mxfp4" and not changes.touch(name):
            kind = GGMLQuantizationType.MXFP4
        for target in gguf_names(name):
            if shapes[target][-1] % GGML_QUANT_SIZES[kind][0]:
                raise CheckpointError(
                    f"{base.path}: `{name}` has {shapes[target][-1]} inputs; {kind.name} needs multiples of 32"
                )
            places[target] = _Place(kind, shapes[target])
    return places


def _all_dense(places: dict[str, _Place]) -> bool:
    return all(place.kind is not GGMLQuantizationType.MXFP4 for place in places.values())


def _pieces(
    base: Checkpoint, changes: Changes, places: dict[str, _Place], whole: Collection[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The bytes of every tensor that isn't whole yet, piece by piece; those of one tensor in order."""
    for name in base.arch.tensor_specs("bf16"):
        names = gguf_names(name)
        if all(target in whole for target in names):
            continue
        kind = places[names[0]].kind
        if kind is GGMLQuantizationType.MXFP4:
            blocks_EOGb, scales_EOG = (mapped_tensor(base, f"{name}_{part}") for part in ("blocks", "scales"))
            for blocks, scales in zip(blocks_EOGb, scales_EOG, strict=True):
                packed = repack_mxfp4(blocks, scales)
                for part, target in enumerate(names):
                    yield target, packed[part :: len(names)].contiguous().numpy()
            continue
        for piece in merged_tensor(base, changes, name):
            matrices = piece.transpose(1, 2) if is_expert_weight(name) else piece
            for part, target in enumerate(names):
                half = matrices[:, part :: len(names)] if len(names) == 2 else matrices
                rows = half.reshape(-1, half.shape[-1])
                for some in rows.split(max(1, _PIECE // rows.shape[-1])):
                    yield target, _encoded(some, kind, name)


def repack_mxfp4(blocks_xGb: Tensor, scales_xG: Tensor) -> Tensor:
    """A checkpoint's MXFP4 bytes in ggml's order; no code and no scale changes.

    blocks   (..., G, 16) uint8: byte j holds element 2j in its low half, 2j + 1 in its high one
    scales   (..., G) uint8
    Returns  (..., G, 17) uint8: the scale, then bytes of which j holds element j and element j + 16
    """
    codes = torch.stack((blocks_xGb & 15, blocks_xGb >> 4), dim=-1).flatten(-2)
    return torch.cat((scales_xG.unsqueeze(-1), codes[..., :16] | (codes[..., 16:] << 4)), dim=-1)


def _encoded(rows: Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    if kind is GGMLQuantizationType.BF16:
        return rows.contiguous().view(torch.int16).numpy()
    if kind is GGMLQuantizationType.F16:
        half = rows.to(torch.float16).contiguous()
        if not half.isfinite().all():
            raise CheckpointError(f"`{name}` holds weights above float16's 65504; next: --gguf-type bf16")
        return half.numpy()
    full = rows.float().contiguous().numpy()
    return full if kind is GGMLQuantizationType.F32 else quantize(full, kind)


def _head(base: Checkpoint, places: dict[str, _Place], name: str, file_type: LlamaFileType | None) -> bytes:
    """Everything before the tensors: metadata, tokenizer, and the list of tensors."""
    with scratch_folder() as scratch:  # the package writes to files alone
        path = scratch / "head"
        _write_head(path, base, places, name, file_type)
        return path.read_bytes()


def _write_head(
    path: Path, base: Checkpoint, places: dict[str, _Place], name: str, file_type: LlamaFileType | None
) -> None:
    writer = GGUFWriter(path, "gpt-oss")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.MOSTLY_MXFP4_MOE if file_type is None else file_type)
    writer.add_quantization_version(2)
    _add_arch(writer, base.arch)
    _add_tokenizer(writer, base)
    for target, place in places.items():
        writer.add_tensor_info(target, place.shape, np.dtype(np.float32), place.num_bytes, raw_dtype=place.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_arch(writer: GGUFWriter, arch: Arch) -> None:
    writer.add_block_count(arch.num_layers)
    writer.add_context_length(arch.max_positions)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_expert_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_layer_norm_rms_eps(arch.rms_eps)
    writer.add_sliding_window(arch.sliding_window)
    writer.add_expert_count(arch.num_experts)
    writer.add_expert_used_count(arch.experts_per_token)
    writer.add_vocab_size(arch.vocab_size)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(arch.rope_factor)
    writer.add_rope_scaling_orig_ctx_len(arch.rope_original)
    writer.add_rope_scaling_yarn_beta_fast(arch.rope_beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(arch.rope_beta_slow)


def _add_tokenizer(writer: GGUFWriter, base: Checkpoint) -> None:
    """The checkpoint's tokenizer and chat template; rows of the model beyond its ids are unused tokens."""
    where = tokenizer_file(base.path)
    tokenizer = TokenizerFile.parse(read_tokenizer_text(where), str(where))
    steps, model = tokenizer.layout["pre_tokenizer"]["pretokenizers"], tokenizer.layout["model"]
    if steps[0] != SPLIT:
        raise TokenizerError(f"{where}: llama.cpp knows gpt-oss's way to cut text alone; use a gpt-oss tokenizer.json")
    if not model["merges"]:
        raise TokenizerError(f"{where}: has no merges, and llama.cpp loads no such tokenizer; use a gpt-oss one")
    if lacking := sorted({_BOS, _EOS, _PAD} - tokenizer.added.keys()):
        raise TokenizerError(f"{where}: no special tokens {lacking}; use a gpt-oss tokenizer.json")
    size = base.arch.vocab_size
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    for ids, kind in ((tokenizer.vocab, TokenType.NORMAL), (tokenizer.added, TokenType.CONTROL)):
        for token, number in ids.items():
            tokens[number], types[number] = token, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.added[_BOS])
    writer.add_eos_token_id(tokenizer.added[_EOS])
    writer.add_pad_token_id(tokenizer.added[_PAD])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    template = base.path / "chat_template.jinja"
    writer.add_chat_template(template.read_text(encoding="utf-8") if template.is_file() else chat_template())
