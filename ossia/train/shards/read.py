"""What a checkpoint holds, read into the tensors of a run: by ranks that are cut in another way, or by one process.

Hosts may have a disk each. A rank reads the files that its own part comes from; those that its host hasn't got are sent
by a rank that has them, in pieces, and have to have the manifest's sha256.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from ossia.disk import sync_to_disk
from ossia.errors import RunError
from ossia.train.optim import AdamW
from ossia.train.shards.form import METADATA, Form, Part, Shards
from ossia.train.shards.hosts import keepers
from ossia.train.state import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    TRAINABLE,
    SavedState,
    files_of,
    human_bytes,
    missing,
    missing_files,
    read_state,
    set_rng_state,
    storage_error,
)

if TYPE_CHECKING:
    from ossia.train.ranks.world import World

_SENT = 2**24  # bytes at a time
_NUM_UPDATES = "num_updates"


class Saved(Protocol):
    """The tensors of a checkpoint, flat, from its files."""

    @property
    def form(self) -> Form: ...

    def files_of(self, name: str, start: int, count: int) -> set[str]: ...

    def read(self, name: str, start: int, count: int, into: Tensor | None = None) -> Tensor: ...


class _Whole:
    """The tensors of a checkpoint that one process wrote; `num_updates` isn't one of them."""

    def __init__(self, path: Path) -> None:
        self._path, self._file_of = path, dict[str, str]()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._form: dict[str, tuple[int, torch.dtype]] = {}
        for file in (TRAINABLE, OPTIMIZER):
            with safe_open(path / file, framework="pt", device="cpu") as handle:
                for name in handle.keys():  # noqa: SIM118
                    tensor = handle.get_tensor(name)  # mapped: not read
                    if name == _NUM_UPDATES:
                        self.num_updates = int(tensor)
                        continue
                    self._file_of[name], self.shapes[name] = file, tuple(tensor.shape)
                    self._form[name] = tensor.numel(), tensor.dtype

    @property
    def form(self) -> Form:
        return self._form

    def files_of(self, name: str, start: int, count: int) -> set[str]:
        return {self._file_of[name]} if count else set()

    def read(self, name: str, start: int, count: int, into: Tensor | None = None) -> Tensor:
        with safe_open(self._path / self._file_of[name], framework="pt", device="cpu") as handle:
            found = handle.get_tensor(name).view(-1)[start : start + count]
            return found.clone() if into is None else into.copy_(found)


def restore_whole(path: Path, params: Mapping[str, Tensor], optimizer: AdamW) -> None:
    """Copy a sharded checkpoint's values into whole tensors, one after the other.

    Raises  RunError, with nothing changed, if names, shapes or dtypes are not those of this run, or a file isn't there
    """
    if lost := missing_files(path):
        raise missing(path, lost)
    state, shards = read_state(path), Shards(path)
    planned = optimizer.empty_state(state[_NUM_UPDATES])
    planned.pop(_NUM_UPDATES)
    shapes = {name: tuple(tensor.shape) for name, tensor in {**params, **planned}.items()}
    form = {name: (tensor.numel(), tensor.dtype) for name, tensor in {**params, **planned}.items()}
    _require_same(path, _described(shards.form, state["shapes"]), _described(form, shapes))
    optimizer.load_state_dict(optimizer.empty_state(state[_NUM_UPDATES]))
    live = {**params, **optimizer.state_dict()}
    with torch.no_grad():
        for name in form:
            shards.read(name, 0, live[name].numel(), into=live[name].detach().view(-1))


def restore_parts(
    world: World,
    run: Path,
    saved: SavedState,
    ready: Callable[[int], Mapping[str, Part]],
    shapes: Mapping[str, Sequence[int]],
) -> None:
    """Copy a checkpoint of either kind into this rank's part of each tensor, and set the random number generators. All
    ranks call it together.

    ready   the updates that the optimizer had made -> this rank's part of each tensor, by name, to be written to
    shapes  of the tensors, before they were made flat
    Raises  RunError if names, shapes or dtypes are not those of this run, or a file that is needed can't be had
    """
    keeper = keepers(world, run)
    told = None
    if world.leads:
        seen = saved.seen or {0: frozenset(files_of(saved.path))}
        have = [[rank, sorted(names)] for rank, names in seen.items()]
        told = [saved.sharded, (saved.path / MANIFEST).read_text(), have]
    sharded, manifest, have = world.from_first(told)
    have = {rank: set(names) for rank, names in have}
    saved.path.mkdir(parents=True, exist_ok=True)
    if keeper[world.rank] == world.rank != 0:
        (saved.path / MANIFEST).write_text(manifest)
    at_first = {METADATA, STATE} if sharded else {STATE, TRAINABLE, OPTIMIZER}
    _send_missing(world, saved.path, have, dict.fromkeys(set(keeper), at_first))
    state = read_state(saved.path)
    source: Shards | _Whole = Shards(saved.path) if sharded else _Whole(saved.path)
    found_shapes = source.shapes if isinstance(source, _Whole) else state["shapes"]
    num_updates = source.num_updates if isinstance(source, _Whole) else int(state[_NUM_UPDATES])
    parts = ready(num_updates)
    form = {name: (part.total, part.local.dtype) for name, part in parts.items()}
    _require_same(saved.path, _described(source.form, found_shapes), _described(form, shapes))
    ranges = [(name, part.start, len(part.local)) for name, part in parts.items()]
    needed = sorted({file for one in ranges for file in source.files_of(*one)})
    wanted: dict[int, set[str]] = {}
    for rank, names in enumerate(world.gather(needed)):
        wanted.setdefault(keeper[rank], set()).update(names)
    _send_missing(world, saved.path, have, wanted)
    with world.busy("reading the checkpoint"):
        _read(source, parts)
        set_rng_state(state["rng"])
    world.gather(None)  # whoever couldn't has said so


def _read(source: Saved, parts: Mapping[str, Part]) -> None:
    with torch.no_grad():
        for name, part in parts.items():
            if len(part.local):
                source.read(name, part.start, len(part.local), into=part.local)


def _described(form: Form, shapes: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{tuple(shapes.get(name, (total,)))} {dtype}" for name, (total, dtype) in form.items()}


def _require_same(path: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    differing = sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))
    if differing:
        name = differing[0]
        raise RunError(
            f"{path}: `{name}` is {found.get(name, 'missing')} there, {wanted.get(name, 'missing')} in this run; was "
            "the dtype or the model of the recipe changed since?"
        )


def _send_missing(world: World, place: Path, have: dict[int, set[str]], wanted: Mapping[int, Collection[str]]) -> None:
    """Bring to each keeper's folder the files that its ranks want; `have`, the same on all ranks, grows accordingly."""
    entries = world.from_first(files_of(place))
    for keeper, names in sorted(wanted.items()):
        lacking = sorted(set(names) - have.setdefault(keeper, set()))
        if lost := [name for name in lacking if not any(name in there for there in have.values())]:
            if world.leads:
                raise missing(place, lost)
            world.gather(None)  # where the others hear it
        if keeper == world.rank and lacking:
            need, free = sum(entries[name]["bytes"] for name in lacking), shutil.disk_usage(place).free
            if need > free:
                raise RunError(
                    f"{place}: {human_bytes(need)} of other hosts' files have to come here, and the disk has "
                    f"{human_bytes(free)} free\n  next: free some space there"
                )
        for name in lacking:
            source = min(rank for rank, there in have.items() if name in there)
            if world.rank == source:
                with world.busy("sending a checkpoint"):
                    _send(world, place / name, entries[name]["bytes"], keeper)
            elif world.rank == keeper:
                with world.busy("receiving a checkpoint"):
                    _receive(world, place / name, entries[name], source)
            have[keeper].add(name)
    world.gather(None)  # the files are there before anyone reads them


def _send(world: World, file: Path, num_bytes: int, to: int) -> None:
    with file.open("rb") as handle:
        for start in range(0, num_bytes, _SENT):
            piece = bytearray(handle.read(min(_SENT, num_bytes - start)))
            world.send(torch.frombuffer(piece, dtype=torch.uint8).to(world.device), to)


def _receive(world: World, file: Path, entry: Mapping[str, Any], of: int) -> None:
    digest, partial = hashlib.sha256(), file.with_name(f".{file.name}.coming")
    try:
        with partial.open("wb") as handle:
            for start in range(0, entry["bytes"], _SENT):
                piece = torch.empty(min(_SENT, entry["bytes"] - start), dtype=torch.uint8, device=world.device)
                world.receive(piece, of)
                raw = piece.cpu().numpy().tobytes()
                digest.update(raw)
                handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())
        if digest.hexdigest() != entry["sha256"]:
            raise RunError(f"{file}: what rank {of} sent isn't what was written (sha256 differs); start again")
        os.replace(partial, file)
        sync_to_disk(file.parent)
    except OSError as error:
        raise storage_error(error, saving=str(file), need=entry["bytes"], safe=[]) from error
    finally:
        partial.unlink(missing_ok=True)
