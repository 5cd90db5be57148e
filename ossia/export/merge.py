"""A model's weights as a checkpoint holds them: what training changed is merged in, everything else stays bit for bit.

Merged in float32 (the base expanded from its bytes, plus scale * B A) and rounded once. It goes tensor by tensor and
expert by expert, each tensor mapped from its file for as long as it is needed, so memory doesn't grow with the model.
Letters: E experts, O out, D in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ossia.errors import CheckpointError
from ossia.model.arch import Layout
from ossia.model.checkpoint import Checkpoint, write_checkpoint
from ossia.model.lora import Lora
from ossia.model.packed import Base, Factors, Packed, merged_experts, pieces, rounded_experts
from ossia.model.transformer import Transformer
from ossia.model.weights import EXPERT_WEIGHTS, expert_module, interleave_gate_up
from ossia.ops.mxfp4 import dequantize_mxfp4
from ossia.pieces import Journal, Progress
from ossia.train.shards.sliced import rows_of, shape_of

_PIECE = 1 << 24  # weights of a matrix merged at a time

PACKED = ("blocks", "scales")

NoteRounding = Callable[[str, float], None]
"""(a projection's name, relative error of its weights)"""


@dataclass(frozen=True, slots=True)
class Changes:
    """What training changed: an adapter, or tensors that take a weight's place (float32, in the computation's layout,
    by name; the mapping may read them from files one by one, or row by row: `train.shards.Sliced`). Neither: nothing.

    qat  it was trained with experts rounded to MXFP4, so they are that in whatever layout they are written
    """

    lora: Lora | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    qat: bool = False

    @classmethod
    def of(cls, model: Transformer) -> Changes:
        """What differs in a model from its checkpoint."""
        if model.lora is not None:
            return cls(model.lora, qat=model.qat)
        return cls(None, model.trainable.tensors, model.qat)

    def __bool__(self) -> bool:
        """Whether training changed anything."""
        return self.lora is not None or bool(self.tensors)

    def touch(self, module: str) -> bool:
        """Whether a tensor, by its name less `.weight`, is another than in the base."""
        adapted = self.lora is not None and module in self.lora.sites
        return adapted or module in self.tensors or f"{module}.weight" in self.tensors


def write_model(
    path: Path,
    model: Transformer,
    *,
    tokenizer_from: Path,
    layout: Layout = "bf16",
    progress: Progress | None = None,
) -> None:
    """Write a model as it is now, adapter merged in, as a checkpoint folder; all of it or nothing.

    tokenizer_from  as in `write_checkpoint`
    layout          mxfp4: experts that weren't trained keep their bytes, others are rounded
    Raises          CheckpointError as `write_checkpoint`, for experts whose sizes MXFP4 doesn't have, and for a weight
                    that is not finite
    """
    write_merged(path, model.weights.checkpoint, Changes.of(model), tokenizer_from, layout, progress)


def write_merged(
    path: Path,
    base: Checkpoint,
    changes: Changes,
    tokenizer_from: Path,
    layout: Layout,
    progress: Progress | None = None,
    note: NoteRounding | None = None,
    journal: Journal | None = None,
) -> None:
    """`write_model` without a model in memory: a checkpoint on disk, and what changed.

    note     is told of every projection whose experts are rounded to MXFP4, once it is written
    journal  as in `write_checkpoint`; what is whole in it is not computed again, and `note` isn't told of it then:
             it has to be the journal's `remark`
    """
    if journal is not None and layout == "mxfp4":
        _forget_unremarked(base, changes, journal)
    tensors = merged_tensors(base, changes, layout, note, () if journal is None else journal.whole)
    write_checkpoint(
        path, base.arch, tensors, layout, tokenizer_from=tokenizer_from, progress=progress, journal=journal
    )


def _forget_unremarked(base: Checkpoint, changes: Changes, journal: Journal) -> None:
    """Have rounded projections written again unless both of their parts and what was noted of them are there."""
    for layer in range(base.arch.num_layers):
        for projection in EXPERT_WEIGHTS:
            module = expert_module(layer, projection)
            parts = [f"{module}_{part}" for part in PACKED]
            known = module in journal.remarks and all(part in journal.whole for part in parts)
            if rounds_experts(base, changes, module) and not known:
                for part in parts:
                    journal.whole.pop(part, None)


def merged_tensors(
    base: Checkpoint,
    changes: Changes,
    layout: Layout,
    note: NoteRounding | None = None,
    but: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the merged checkpoint, in the pieces that `write_checkpoint` takes: slices of the first axis.

    but  names of those that are left out; both parts of a rounded projection or none
    """
    for name in base.arch.tensor_specs(layout):
        if name in but:
            continue
        module, _, leaf = name.rpartition("_")
        if layout == "bf16" or leaf not in PACKED or not rounds_experts(base, changes, module):
            for piece in merged_tensor(base, changes, name):
                yield name, piece
        elif leaf == PACKED[0]:  # its other part comes with it
            for packed in rounded_projection(base, changes, module, note):
                for part, piece in zip(PACKED, packed, strict=True):
                    yield f"{module}_{part}", piece


def rounds_experts(base: Checkpoint, changes: Changes, module: str) -> bool:
    """Whether a projection's experts have to be rounded to be in MXFP4; else the base's bytes are theirs."""
    return base.layout == "bf16" or changes.touch(module)


def rounded_projection(
    base: Checkpoint, changes: Changes, module: str, note: NoteRounding | None = None
) -> Iterator[Packed]:
    """A projection's experts in MXFP4 with what training changed, one by one, (1, O, ...): gate and up rows in turn.

    note    is told after the last how far rounding moved the weights: the norm of that as a share of theirs
    Raises  CheckpointError for a weight that is not finite
    """
    error, whole = 0.0, 0.0
    for one, own in _one_by_one(base, changes, module):
        merged = merged_experts(one, own)
        if not is_finite(merged):
            raise CheckpointError(_not_finite(module))
        packed = rounded_experts(one, own, merged)
        if note is not None:
            error += float((packed.expand(torch.float32) - merged).double().square().sum())
            whole += float(merged.double().square().sum())
        yield packed
    if note is not None:
        note(module, (error / whole) ** 0.5 if whole else 0.0)


def _one_by_one(base: Checkpoint, changes: Changes, module: str) -> Iterator[tuple[Base, Factors | None]]:
    """Each expert of a projection, rows in the checkpoint's order, and its adapter's delta."""
    if module not in changes.tensors:
        yield from pieces(_held(base, module), _delta(changes, module), at_once=1)
        return
    for expert in range(base.arch.num_experts):
        one = rows_of(changes.tensors, module, expert, expert + 1)
        yield interleave_gate_up(one) if module.endswith("gate_up_proj") else one, None


def _held(base: Checkpoint, module: str) -> Base:
    if base.layout == "bf16":
        return mapped_tensor(base, module).transpose(1, 2)
    return Packed(*(mapped_tensor(base, f"{module}_{part}") for part in PACKED))


def _delta(changes: Changes, module: str) -> Factors | None:
    """On the CPU, rows of B in the checkpoint's order."""
    if changes.lora is None or (delta := changes.lora.factors(module)) is None:
        return None
    b_EOr = delta.b.cpu()
    return Factors(delta.a.cpu(), interleave_gate_up(b_EOr) if module.endswith("gate_up_proj") else b_EOr, delta.scale)


def _not_finite(name: str) -> str:
    return f"`{name}` would hold inf or nan: the run diverged; export an earlier checkpoint"


def merged_tensor(base: Checkpoint, changes: Changes, name: str) -> Iterator[Tensor]:
    """One tensor of the merged checkpoint, by its name in either layout: slices of its first axis, bfloat16.

    Raises  CheckpointError for a weight that is not finite
    """
    leaf = name.rpartition(".")[2]
    changed = changes.touch(name.removesuffix(".weight"))
    if ".mlp.experts." in name and leaf in EXPERT_WEIGHTS:
        found = _experts(base, changes, name)
    elif name in changes.tensors:
        found = _rounded(changes.tensors, name)
    elif changed and name.endswith(".weight"):
        found = _linear(base, changes, name)
    else:
        found, changed = iter((mapped_tensor(base, name),)), False
    for piece in found:
        if changed and not is_finite(piece.transpose(1, 2) if piece.dim() == 3 else piece):
            raise CheckpointError(_not_finite(name))
        yield piece


def is_finite(piece: Tensor) -> bool:
    """One pass over a contiguous tensor, where `isfinite` takes nine times as long; a nan is its least and largest."""
    least, largest = piece.aminmax()
    return bool(least.isfinite() and largest.isfinite())


def mapped_tensor(base: Checkpoint, name: str) -> Tensor:
    """A tensor on a mapping of its own: the file's pages leave memory with it, and don't add up over a model."""
    with safe_open(base.file_of(name), framework="pt", device="cpu") as file:
        return file.get_tensor(name)


def _rounded(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    num_rows, *rest = shape_of(tensors, name)
    at_once = max(1, _PIECE // max(1, prod(rest)))
    for start in range(0, num_rows, at_once):
        part = rows_of(tensors, name, start, min(start + at_once, num_rows))
        yield (interleave_gate_up(part) if name.endswith("gate_up_proj_bias") else part).to(torch.bfloat16)


def _linear(base: Checkpoint, changes: Changes, name: str) -> Iterator[Tensor]:
    """Rows of a matrix (O, D) with its adapter's delta."""
    assert changes.lora is not None
    module, weight_OD = name.removesuffix(".weight"), mapped_tensor(base, name)
    a_rD, b_Or, scale = _factors(changes.lora, module)
    rows = max(1, _PIECE // weight_OD.shape[1])
    for weight, b in zip(weight_OD.split(rows), b_Or.split(rows), strict=True):
        yield torch.addmm(weight.float(), b, a_rD, alpha=scale).bfloat16()


def _experts(base: Checkpoint, changes: Changes, name: str) -> Iterator[Tensor]:
    """A projection's experts one by one, (1, D, O): gate and up in turn, as the checkpoint has them."""
    if changes.qat and rounds_experts(base, changes, name):
        for packed in rounded_projection(base, changes, name):
            yield packed.expand(torch.bfloat16).transpose(1, 2)  # exact
        return
    factors = _factors(changes.lora, name) if changes.lora is not None and name in changes.lora.sites else None
    parts = (name,) if base.layout == "bf16" else (f"{name}_blocks", f"{name}_scales")
    held = [mapped_tensor(base, part) for part in parts] if name not in changes.tensors else []
    in_turn = interleave_gate_up if name.endswith("gate_up_proj") else lambda x: x
    for expert in range(base.arch.num_experts):
        one = slice(expert, expert + 1)
        if name in changes.tensors:  # asked for anew each time: a mapping that is let go of takes its pages along
            yield in_turn(rows_of(changes.tensors, name, expert, expert + 1)).transpose(1, 2).bfloat16()
            continue
        if factors is None:
            yield _expert(held, one, torch.bfloat16).transpose(1, 2)
            continue
        a_ErD, b_EOr, scale = factors
        weight_1OD = _expert(held, one, torch.float32)
        weight_1OD[0].addmm_(in_turn(b_EOr[one])[0], a_ErD[expert], alpha=scale)
        yield weight_1OD.transpose(1, 2).bfloat16()


def _expert(held: list[Tensor], one: slice, dtype: torch.dtype) -> Tensor:
    """(1, O, D) of the base: exact in either type."""
    if len(held) == 1:
        return held[0][one].transpose(1, 2).to(dtype)
    blocks, scales = held
    return dequantize_mxfp4(blocks[one], scales[one], dtype)


def _factors(lora: Lora, module: str) -> tuple[Tensor, Tensor, float]:
    """A, B and their scale; float32 on the CPU."""
    a, b = (lora.trainable.tensors[f"{module}.lora_{side}"].detach().cpu() for side in "AB")
    return a, b, lora.spec.scale(lora.sites[module].target)
