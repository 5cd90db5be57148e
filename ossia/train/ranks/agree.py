"""What has to be the same on every rank, compared before the first step and at every checkpoint; and what rank 0 read.

Ranks may stand on hosts that share no disk: only rank 0 reads and writes checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import ossia
from ossia.errors import RunError
from ossia.model.checkpoint import Checkpoint
from ossia.train.optim import AdamW
from ossia.train.state import SavedState, rng_state, set_rng_state

if TYPE_CHECKING:
    from ossia.train.ranks.world import World

_PROBE_BYTES = 4096


def agree(world: World, facts: Mapping[str, str]) -> None:
    """Compare facts by name. Raises RunError naming the first fact that differs, whose, and both values."""
    said = world.gather(dict(facts))
    for name, first in said[0].items():
        others = {rank: one[name] for rank, one in enumerate(said) if one[name] != first}
        if others:
            rank, found = next(iter(others.items()))
            more = f" (so do ranks {', '.join(map(str, [*others][1:]))})" if len(others) > 1 else ""
            raise RunError(
                f"rank {rank}: its {name} differs from rank 0's{more}: {found} there, {first} on rank 0\n"
                "  next: give every host the same recipe, data, model and version of Ossia"
            )


def code_identity() -> str:
    """Ossia's own sources and torch's version, as a short hash and in words."""
    folder = Path(ossia.__file__).parent
    files = sorted(folder.rglob("*.py"))
    content = b"".join(str(file.relative_to(folder)).encode() + file.read_bytes() for file in files)
    return f"{ossia.__version__} {hashlib.sha256(content).hexdigest()[:16]}, torch {torch.__version__}"


def weights_identity(checkpoint: Checkpoint) -> str:
    """A hash of every tensor's name, shape, type, and 4 KiB from its middle: a whole 20b would take minutes to read."""
    digest = hashlib.sha256()
    for name, spec in checkpoint.specs.items():
        raw = checkpoint.tensor(name).view(-1).view(torch.uint8)
        start = max(0, len(raw) // 2 - _PROBE_BYTES // 2)
        digest.update(f"{name} {spec}".encode() + raw[start : start + _PROBE_BYTES].numpy().tobytes())
    return digest.hexdigest()[:16]


def tensors_identity(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of float32 tensors' bits, cheap enough for every checkpoint: it tells copies that drifted apart."""
    sums = [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors.values()]
    values = torch.stack([one.cpu() for one in sums]).numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


def restore(world: World, saved: SavedState, params: Mapping[str, Tensor], optimizer: AdamW) -> None:
    """`SavedState.restore` on rank 0, whose parameters, optimizer and generators the others take over."""
    if world.leads:
        saved.restore(params, optimizer)
    num_updates, generators = world.from_first([optimizer.num_updates, rng_state()])
    if not world.leads:
        optimizer.load_state_dict(optimizer.empty_state(num_updates))
        set_rng_state(generators)
    world.take_from_first(params.values())
    world.take_from_first(tensor for tensor in optimizer.state_dict().values() if tensor.ndim or tensor.is_cuda)
