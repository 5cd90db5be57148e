"""An adapter alone as a GGUF LoRA for llama.cpp, experts, router and head included, and read back as one of ours.

llama.cpp adds `alpha / r * B A` to a matrix, with one alpha for the file and r from B's shape. Where a target's own
scaling is another (its own alpha, or rslora), the difference is multiplied into its B. Own code and not llama.cpp's
converter: that one stops at experts. It keeps gate and up apart, so each has half of B's rows, and A twice.
Source: llama.cpp's `llama-adapter.cpp` for names and metadata, `build_lora_mm` and `build_lora_mm_id` of its
`llama-graph.cpp` for what is computed.
Letters: E experts, r rank, O out, D in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter, Keys, ReaderTensor
from torch import Tensor

from ossia.disk import sync_to_disk
from ossia.errors import AdapterError, CheckpointError
from ossia.export.gguf.write import gguf_names, gguf_shapes, require_llama_cpp
from ossia.model.arch import Arch
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import TARGETS, Lora, LoraSpec, Site, sites


def write_gguf_lora(path: Path, base: Checkpoint, lora: Lora, *, name: str) -> None:
    """Write an adapter as one GGUF file, float32; whoever calls it removes the file if it fails.

    name    what the adapter is called in it
    Raises  CheckpointError for a base that llama.cpp's gpt-oss can't be (`require_llama_cpp`), or a full disk;
            AdapterError for a tensor that isn't finite
    """
    require_llama_cpp(base)
    alpha = _common_alpha(lora.spec)
    try:
        writer = GGUFWriter(path, "gpt-oss")
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for key, tensor in _tensors(lora, alpha).items():
            if not tensor.isfinite().all():
                raise AdapterError(f"`{key}` would hold inf or nan: the run diverged; export an earlier checkpoint")
            writer.add_tensor(key, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        sync_to_disk(path)
    except OSError as error:
        why = error.strerror or error  # numpy's errors have words alone
        raise CheckpointError(f"{path}: could not be written: {why}; make room or name another") from error


def folded(spec: LoraSpec) -> dict[str, float]:
    """What the B of each target is multiplied with where llama.cpp's one alpha for a file doesn't give its scaling."""
    alpha = _common_alpha(spec)
    factors = {target: _alpha(spec, target) / alpha for target in spec.targets}
    return {target: factor for target, factor in factors.items() if factor != 1}


def _common_alpha(spec: LoraSpec) -> float:
    """The alpha that gives most targets their scaling without touching B."""
    return float(np.float32(Counter(_alpha(spec, target) for target in spec.targets).most_common(1)[0][0]))


def _alpha(spec: LoraSpec, target: str) -> float:
    """The alpha with which alpha / r is a target's scaling."""
    rank, alpha = spec.targets[target]
    return alpha * math.sqrt(rank) if spec.rslora else alpha


def _tensors(lora: Lora, alpha: float) -> dict[str, Tensor]:
    """Every tensor of the file: A (r, D) and B (O, r), of experts (E, r, D) and (E, O, r)."""
    found = {}
    for site in lora.sites.values():
        a, b = (lora.trainable.tensors[f"{site.module}.lora_{side}"].detach().cpu() for side in "AB")
        b = b * (_alpha(lora.spec, site.target) / alpha)
        names = _names(site)
        for key, part in zip(names, b.chunk(len(names), dim=-2), strict=True):
            found[f"{key}.lora_a"], found[f"{key}.lora_b"] = a.contiguous(), part.contiguous()
    return found


def _names(site: Site) -> tuple[str, ...]:
    """What llama.cpp calls a site's matrix, or its gate half and its up half (in our B: gate's rows come first)."""
    return gguf_names(site.module if site.num_experts is not None else f"{site.module}.weight")


def read_gguf_lora(path: Path, arch: Arch) -> Lora:
    """The adapter in a GGUF file as one of ours, by llama.cpp's rule for its scaling; strict both ways.

    Raises  AdapterError for a file that is no LoRA for gpt-oss, a tensor that is missing, left over, misshapen or not
            float32, gate and up with different A, a target on some layers only
    """
    reader = GGUFReader(path, "c")
    said = {key: _text(reader, key) for key in ("general.type", "general.architecture", Keys.Adapter.TYPE)}
    if list(said.values()) != ["adapter", "gpt-oss", "lora"]:
        raise AdapterError(f"{path}: not a LoRA for gpt-oss: {said}; name a file of `ossia export --to gguf-lora`")
    field = reader.get_field(Keys.Adapter.LORA_ALPHA)
    alpha = 0.0 if field is None else float(field.contents())
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _require_shapes(path, tensors, gguf_shapes(arch))
    targets: dict[str, tuple[int, float]] = {}
    every = sites(arch, LoraSpec(dict.fromkeys(TARGETS, (1, 1.0))))
    for site in every:
        first = tensors.get(f"{_names(site)[0]}.lora_a")
        if first is not None:
            rank = int(first.shape[1])
            targets.setdefault(site.target, (rank, alpha or float(rank)))
    spec = LoraSpec({target: targets[target] for target in TARGETS if target in targets})
    ours: dict[str, Tensor] = {}
    used = set()
    for site in sites(arch, spec):
        keys = [(f"{name}.lora_a", f"{name}.lora_b") for name in _names(site)]
        if lacking := [key for pair in keys for key in pair if key not in tensors]:
            raise AdapterError(f"{path}: `{lacking[0]}` is missing; allowed: {site.target} in all layers, or in none")
        a_parts, b_parts = ([_values(tensors[pair[side]]) for pair in keys] for side in (0, 1))
        if not all(torch.equal(a_parts[0], part) for part in a_parts):
            raise AdapterError(f"{path}: gate and up of {site.module} have an A of their own; Ossia's have one")
        ours[f"{site.module}.lora_A"] = a_parts[0]
        ours[f"{site.module}.lora_B"] = torch.cat(b_parts, dim=-2)
        used |= {key for pair in keys for key in pair}
        if ours[f"{site.module}.lora_A"].shape[-2] != spec.targets[site.target][0]:
            raise AdapterError(f"{path}: {site.target} has several ranks; allowed: the same in all layers")
    if unread := sorted(tensors.keys() - used):
        raise AdapterError(f"{path}: `{unread[0]}` and {len(unread) - 1} more would stay unread")
    return Lora(arch, spec, ours)


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _require_shapes(path: Path, tensors: Mapping[str, ReaderTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise AdapterError where a pair doesn't fit the matrix that it is added to."""
    for name, tensor in tensors.items():
        matrix, _, side = name.rpartition(".lora_")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if matrix not in shapes or side not in ("a", "b"):
            raise AdapterError(f"{path}: `{name}` belongs to no matrix of this model")
        *lead, outs, ins = shapes[matrix]
        kept, wanted = (-1, ins) if side == "a" else (-2, outs)
        if list(shape[:-2]) != lead or shape[kept] != wanted or tensor.tensor_type.name != "F32":
            raise AdapterError(
                f"{path}: `{name}` is {tensor.tensor_type.name} {list(shape)}; `{matrix}`, F32 and "
                f"{shapes[matrix]}, can't take it"
            )


def _values(tensor: ReaderTensor) -> Tensor:
    return torch.from_numpy(np.array(tensor.data))
