"""A gpt-oss GGUF file as a Hugging Face folder again: one of ours, or one that llama.cpp's converter wrote.

The inverse of `write`: MXFP4 experts go back to the checkpoint's order of bytes, or are expanded; everything else
becomes bfloat16. Tensor by tensor and expert by expert, so memory doesn't grow with the model.
Letters: E experts, O out, D in, G groups of 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ossia.errors import CheckpointError
from ossia.export.gguf.file import GgufFile
from ossia.export.gguf.read import decode, unpack_mxfp4
from ossia.export.gguf.scratch import scratch_folder
from ossia.export.gguf.tokenizer import write_tokenizer
from ossia.export.gguf.write import gguf_names
from ossia.export.merge import PACKED, NoteRounding, is_finite
from ossia.model.arch import Arch, Layout, alternating_layers
from ossia.model.budget.weights import is_expert_weight
from ossia.model.checkpoint import write_checkpoint
from ossia.ops.mxfp4 import BLOCK
from ossia.pieces import Journal, Progress

READABLE = tuple(GGMLQuantizationType[name] for name in ("MXFP4", "BF16", "F16", "F32", "Q8_0"))
_PIECE = 1 << 24  # weights of a matrix decoded at a time
_PREFIX = "gpt-oss."
_INTEGERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "expert_feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "num_experts": "expert_count",
    "experts_per_token": "expert_used_count",
    "sliding_window": "attention.sliding_window",
    "rope_original": "rope.scaling.original_context_length",
    "max_positions": "context_length",
}
_NUMBERS = {
    "rms_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_factor": "rope.scaling.factor",
}
_BETAS = {"rope_beta_fast": "rope.scaling.yarn_beta_fast", "rope_beta_slow": "rope.scaling.yarn_beta_slow"}
_ALIKE = {  # keys that say again what others say, or what a gpt-oss can't have otherwise
    "feed_forward_length": "expert_feed_forward_length",
    "attention.value_length": "attention.key_length",
    "rope.dimension_count": "attention.key_length",
}
_OTHERS = ("vocab_size", "rope.scaling.type", "expert_count")


def arch_of(file: GgufFile) -> tuple[Arch, list[str]]:
    """The shape in a file's metadata, and keys of it that aren't read here.

    What no key says is gpt-oss's own: sliding and full layers in turn, `swiglu_limit` 7, `swiglu_alpha` 1.702, and
    YaRN's `truncate` false.
    Raises  CheckpointError for another architecture, a part of a split file, a key missing or of another value than a
            gpt-oss can have
    """
    if (found := file.value("general.architecture")) != "gpt-oss":
        raise CheckpointError(f"{file.path}: is a {found!r} model; allowed: 'gpt-oss'")
    if (kind := file.value("general.type", "model")) != "model":
        raise CheckpointError(f"{file.path}: holds no model but {kind!r}; name the model's own file")
    if (parts := file.value("split.count", 0)) > 1:
        raise CheckpointError(
            f"{file.path}: is one of {parts} parts; join them first: llama-gguf-split --merge FIRST.gguf WHOLE.gguf"
        )
    if (form := file.value(f"{_PREFIX}rope.scaling.type")) != "yarn":
        _refuse(file, "rope.scaling.type", form, "'yarn'")
    integers = {name: _integer(file, key) for name, key in _INTEGERS.items()}
    numbers = {name: _number(file, key) for name, key in _NUMBERS.items()}
    numbers |= {name: _number(file, key) for name, key in _BETAS.items() if _PREFIX + key in file.fields}
    for key, same in _ALIKE.items():
        if (value := file.value(_PREFIX + key, file.value(_PREFIX + same))) != file.value(_PREFIX + same):
            _refuse(file, key, value, f"the same as {_PREFIX}{same}")
    embedding = file.places.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: `token_embd.weight` is missing; get the file again")
    known = {*_INTEGERS.values(), *_NUMBERS.values(), *_BETAS.values(), *_ALIKE, *_OTHERS}
    ours = [key for key in file.fields if key.startswith(_PREFIX)]
    arch = Arch(
        vocab_size=embedding.shape[0], layer_types=alternating_layers(integers["num_layers"]), **integers, **numbers
    )
    arch.check(str(file.path))
    file.require_shapes(arch)
    return arch, [key for key in ours if key.removeprefix(_PREFIX) not in known]


def _refuse(file: GgufFile, key: str, found: object, allowed: str) -> NoReturn:
    raise CheckpointError(f"{file.path}: `{_PREFIX}{key}` is {found!r}; allowed: {allowed}")


def _integer(file: GgufFile, key: str) -> int:
    found: Any = file.value(_PREFIX + key)
    if type(found) is not int or found < 1:
        _refuse(file, key, found, "a whole number from 1")
    return found


def _number(file: GgufFile, key: str) -> float:
    found: Any = file.value(_PREFIX + key)
    if type(found) is not float or not 0 < found < math.inf:
        _refuse(file, key, found, "a finite number above 0")
    return float(str(np.float32(found)))  # 1e-05, and not its nearest float32's 9.999999747378752e-06


def require_readable(file: GgufFile, layout: Layout) -> None:
    """Raise CheckpointError for a tensor of a type that isn't read, or for MXFP4 experts wanted that aren't there."""
    for name, place in file.places.items():
        if place.kind not in READABLE:
            raise CheckpointError(
                f"{file.path}: `{name}` is in {place.kind.name}\n"
                f"  allowed: {', '.join(kind.name for kind in READABLE)}; other types lost too much to train on\n"
                "  next: take a file of the model in one of these"
            )
        if layout == "mxfp4" and "_exps.weight" in name and place.kind is not GGMLQuantizationType.MXFP4:
            raise CheckpointError(
                f"{file.path}: `{name}` is in {place.kind.name}, so its bytes aren't MXFP4's to be kept\n"
                "  next: --to hf-bf16, then --to hf-mxfp4 of that folder, which rounds experts and says what it costs"
            )


def write_folder(
    journal: Journal,
    file: GgufFile,
    arch: Arch,
    layout: Layout,
    *,
    tokenizer: Path | None,
    note: NoteRounding,
    progress: Progress | None = None,
) -> None:
    """Write a file's model and tokenizer as a Hugging Face folder, the journal's target; what is whole in it is kept.

    tokenizer  a checkpoint's folder or a tokenizer.json instead of the file's own
    note       is told of a tensor that bfloat16 rounds, and by how much; the journal's `remark`
    Raises     CheckpointError, StoppedError as `write_checkpoint`, and for a weight that isn't finite; TokenizerError
    """
    with scratch_folder() as scratch:
        if tokenizer is None:
            write_tokenizer(file, scratch)
        write_checkpoint(
            journal.target,
            arch,
            _tensors(file, arch, layout, note, journal.whole),
            layout,
            tokenizer_from=scratch if tokenizer is None else tokenizer,
            progress=progress,
            journal=journal,
        )


def _tensors(
    file: GgufFile, arch: Arch, layout: Layout, note: NoteRounding, but: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors in the pieces that `write_checkpoint` takes, less those that are whole already."""
    for name in arch.tensor_specs("bf16"):
        if is_expert_weight(name) and layout == "mxfp4":
            wanted = [part for part in PACKED if f"{name}_{part}" not in but]
            for packed in _packed(file, name, arch.num_experts) if wanted else ():
                yield from (
                    (f"{name}_{part}", tensor) for part, tensor in zip(PACKED, packed, strict=True) if part in wanted
                )
        elif name not in but:
            yield from ((name, piece) for piece in _rounded(_decoded(file, name), name, note))


def _packed(file: GgufFile, name: str, num_experts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A projection's blocks (1, O, G, 16) and scales (1, O, G), expert by expert, gate and up rows in turn."""
    targets = gguf_names(name)
    for expert in range(num_experts):
        raw = [file.raw(target, slice(expert, expert + 1)) for target in targets]
        parts = [unpack_mxfp4(each.unflatten(-1, (-1, 1 + BLOCK // 2))) for each in raw]
        blocks, scales = (torch.stack(half, dim=2).flatten(1, 2) for half in zip(*parts, strict=True))
        yield blocks, scales


def _decoded(file: GgufFile, name: str) -> Iterator[Tensor]:
    """A tensor in float32 as the bf16 layout has it, in slices of its first axis."""
    targets = gguf_names(name)
    shape = file.places[targets[0]].shape
    if is_expert_weight(name):
        steps = [slice(expert, expert + 1) for expert in range(shape[0])]
    elif len(shape) == 1 or len(targets) == 2:  # vectors, and the experts' biases
        steps = [slice(None)]
    else:
        rows = max(1, _PIECE // shape[1])
        steps = [slice(start, start + rows) for start in range(0, shape[0], rows)]
    for some in steps:
        parts = []
        for target in targets:
            raw, place = file.raw(target, some), file.places[target]
            parts.append(torch.empty(*raw.shape[:-1], place.shape[-1]))
            decode(raw, place.kind, parts[-1])
        whole = parts[0] if len(parts) == 1 else torch.stack(parts, dim=2).flatten(1, 2)  # gate and up in turn
        yield whole.transpose(1, 2) if is_expert_weight(name) else whole


def _rounded(pieces: Iterator[Tensor], name: str, note: Callable[[str, float], None]) -> Iterator[Tensor]:
    error, whole = 0.0, 0.0
    for piece in pieces:
        rounded = piece.bfloat16()
        if not is_finite(rounded.transpose(-1, -2) if rounded.dim() == 3 else rounded):
            raise CheckpointError(f"`{name}` would hold inf or nan; get the file again, or another one")
        error += float((rounded.float() - piece).double().square().sum())
        whole += float(piece.double().square().sum())
        yield rounded
    if error:
        note(name, (error / whole) ** 0.5)
