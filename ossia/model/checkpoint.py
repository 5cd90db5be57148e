"""gpt-oss checkpoints on disk: opened without reading a weight, written without holding more than a few tensors.

The released layouts are the only ones: MXFP4 (`*_blocks`, `*_scales`) and bf16, one safetensors file or shards with an
index. Opening is strict both ways, because a tensor that is missing, left over or of another shape is a model that
answers nonsense. Own writer: safetensors' own wants a whole file's tensors in memory at once.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ossia.disk import sync_folder_to_disk, sync_to_disk
from ossia.errors import CheckpointError, first_few
from ossia.model.arch import Arch, Layout, TensorSpec
from ossia.model.template import write_companions
from ossia.pieces import MARGIN_BYTES, Journal, Progress, Region, RegionWriter

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TORCH_DTYPES: Mapping[str, torch.dtype] = {"BF16": torch.bfloat16, "U8": torch.uint8}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint folder. Weights are memory-mapped: they cost no memory until they are read."""

    path: Path
    arch: Arch
    layout: Layout
    specs: Mapping[str, TensorSpec]
    files: tuple[Path, ...]
    _file_of: Mapping[str, Path] = field(repr=False)
    _handles: Mapping[Path, safe_open] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a folder and check every tensor's name, shape and type against config.json, from the headers alone.

        Raises  CheckpointError naming tensor and file for anything missing, unread, misshapen, of another type, listed
                in the index but not in its file, present in two files, or cut short
        """
        path = Path(path)
        config = _read_json(path / CONFIG)
        arch = Arch.from_config(config, str(path / CONFIG))
        weight_map = _weight_map(path)
        files = tuple(sorted({*weight_map.values()})) if weight_map else (path / SINGLE,)
        handles = {file: _open_file(file) for file in files}
        file_of, problems = _locate(handles, weight_map)
        layout: Layout = "mxfp4" if any(name.endswith(("_blocks", "_scales")) for name in file_of) else "bf16"
        specs = arch.tensor_specs(layout)
        problems += _compare(specs, file_of, handles)
        if problems:
            raise CheckpointError(_listing(path, layout, problems))
        if ("quantization_config" in config) != (layout == "mxfp4"):
            raise CheckpointError(
                f"{path / CONFIG}: `quantization_config` is {config.get('quantization_config')!r} but the "
                f"experts are in the {layout} layout; it belongs to MXFP4 experts and only to them: correct {CONFIG}"
            )
        return cls(path, arch, layout, specs, files, file_of, handles)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the checkpoint, on the CPU, sharing the file's pages; writing to it never reaches the file."""
        return self._handles[self._file_of[name]].get_tensor(name)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[name]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.num_bytes for spec in self.specs.values())


def write_checkpoint(
    path: Path,
    arch: Arch,
    tensors: Iterable[tuple[str, Tensor]],
    layout: Layout,
    *,
    tokenizer_from: Path,
    shard_bytes: float = 5e9,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> None:
    """Write a checkpoint folder that Ossia, transformers 4.57 and 5.23 load as it is; all of it or nothing.

    It grows in a hidden folder beside `path` and takes its name when everything is on disk. With a journal it grows in
    `path` itself, the journal's target, and what is whole stays for the next try.

    tensors         (name, tensor) in any order, of exactly `arch.tensor_specs(layout)`; a tensor may come in pieces:
                    successive slices of its first axis under the same name. Any device; only one is held at a time
    tokenizer_from  a checkpoint folder, whose tokenizer files, chat template and generation config are copied, or a
                    tokenizer.json, for which they are made
    shard_bytes     weights up to this size go into one file, more into shards of at most this size
    progress        called with (bytes written, bytes in all) as it goes
    journal         what is whole in it already isn't to come again
    Raises          CheckpointError if `path` is taken or the disk too small, StoppedError with a journal; without one
                    nothing is left behind
    """
    path = Path(path)
    specs = arch.tensor_specs(layout)
    total_bytes = sum(spec.num_bytes for spec in specs.values())
    if journal is None and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} exists already; name a new folder or remove it first")
    with _whole_or_nothing(path, total_bytes) if journal is None else _kept(journal, total_bytes) as partial:
        token_ids = write_companions(tokenizer_from, partial, arch.max_positions)
        config = arch.to_config(layout, **token_ids)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        file_of = _plan_files(specs, shard_bytes)
        if len(set(file_of.values())) > 1:
            _write_index(partial, specs, file_of)
        _write_weights(partial, specs, file_of, tensors, progress, journal)


@contextmanager
def _kept(journal: Journal, total_bytes: int) -> Iterator[Path]:
    """The journal's own folder, whatever is in it by now."""
    with journal.growing(total_bytes):
        journal.target.mkdir(exist_ok=True)
        yield journal.target
        sync_folder_to_disk(journal.target)


@contextmanager
def _whole_or_nothing(path: Path, total_bytes: int) -> Iterator[Path]:
    """A hidden sibling folder that becomes `path` on success and disappears on any failure."""
    target, needed = path.absolute(), total_bytes + MARGIN_BYTES
    partial = target.with_name(f".{target.name}.partial")
    done = False
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed writer left
        partial.mkdir(parents=True)
        if shutil.disk_usage(partial).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield partial
        sync_folder_to_disk(partial)
        partial.rename(target)
        sync_to_disk(target.parent)
        done = True
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(next(parent for parent in target.parents if parent.exists())).free
        raise CheckpointError(
            f"{path}: could not write the checkpoint: {error.strerror}. It needs {needed / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free there; nothing was kept: make room or name another folder"
        ) from error
    finally:
        if not done:
            shutil.rmtree(partial, ignore_errors=True)


def _plan_files(specs: Mapping[str, TensorSpec], shard_bytes: float) -> dict[str, str]:
    """Tensor name -> file name: in order, a new file where the next tensor would go over the size."""
    shard, size, shard_of = 0, 0, {}
    for name, spec in specs.items():
        if size and size + spec.num_bytes > shard_bytes:
            shard, size = shard + 1, 0
        shard_of[name] = shard
        size += spec.num_bytes
    if shard == 0:
        return dict.fromkeys(specs, SINGLE)
    return {name: f"model-{i + 1:05d}-of-{shard + 1:05d}.safetensors" for name, i in shard_of.items()}


def _write_index(folder: Path, specs: Mapping[str, TensorSpec], weight_map: Mapping[str, str]) -> None:
    total_bytes = sum(spec.num_bytes for spec in specs.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    file_of: Mapping[str, str],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Progress | None,
    journal: Journal | None,
) -> None:
    """Headers first, from the specs alone; then every tensor, or piece of one, at its place as it comes."""
    heads: dict[str, bytes] = {}
    regions: dict[str, Region] = {}
    for file in dict.fromkeys(file_of.values()):
        heads[file], starts = _header({name: spec for name, spec in specs.items() if file_of[name] == file})
        regions |= {name: Region(file, start, specs[name].num_bytes) for name, start in starts.items()}
    with RegionWriter(folder, heads, regions, journal=journal, progress=progress) as writer:
        for name, piece in tensors:
            spec = specs[name]
            assert piece.dtype == TORCH_DTYPES[spec.dtype], f"{name}: {piece.dtype}, to be {spec.dtype}"
            assert piece.shape[1:] == spec.shape[1:], f"{name}: rows of {piece.shape}, to be {spec.shape}"
            # a row alone is a matrix, which torch transposes six times as fast as a stack of one
            raw = (
                (piece[0] if len(piece) == 1 else piece).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            )
            writer.write(name, memoryview(raw))
        writer.finish()


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, and where in the file each tensor starts."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, offset + spec.num_bytes]}
        offset += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data 8-byte aligned
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + header[name]["data_offsets"][0] for name in specs}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.parent.is_dir():
        raise CheckpointError(f"{file.parent} is no folder; a checkpoint is one, with {CONFIG} and safetensors files")
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; a checkpoint folder needs it: download the folder again")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}; allowed: a JSON object")
    return found


def _weight_map(path: Path) -> dict[str, Path] | None:
    """The index's tensor name -> file, None for a single file; no weights file of the folder may stay unread."""
    present = {file.name for file in path.glob("model*.safetensors")}
    if not (path / INDEX).is_file():
        if present != {SINGLE}:
            raise CheckpointError(
                f"{path}: found {sorted(present) or 'no model*.safetensors'}; needed: {SINGLE} alone, "
                f"or shards with {INDEX}. Download the folder again, or name the folder that holds them"
            )
        return None
    weight_map = _read_json(path / INDEX).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{path / INDEX}: `weight_map` must map each tensor's name to a file name; download it again"
        )
    listed = set(weight_map.values())
    if missing := sorted(listed - present):
        raise CheckpointError(f"{path}: {INDEX} lists {missing}, not in the folder; download them")
    if unread := sorted(present - listed):
        raise CheckpointError(f"{path}: {unread} would stay unread, {INDEX} doesn't list them; move them elsewhere")
    return {name: path / file for name, file in weight_map.items()}


def _open_file(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is cut short or no safetensors file ({error}); download it again") from error


def _locate(
    handles: Mapping[Path, safe_open], weight_map: Mapping[str, Path] | None
) -> tuple[dict[str, Path], list[str]]:
    """Where each tensor is by the files' own headers, and where that disagrees with the index."""
    file_of: dict[str, Path] = {}
    problems = []
    for file, handle in handles.items():
        names: list[str] = handle.keys()
        for name in names:
            if name in file_of:
                problems.append(f"`{name}` is in both {file_of[name].name} and {file.name}")
            elif weight_map is not None and weight_map.get(name, file) != file:
                problems.append(f"`{name}` is in {file.name}; the index says {weight_map[name].name}")
            elif weight_map is not None and name not in weight_map:
                problems.append(f"`{name}` is in {file.name} but not in the index")
            file_of.setdefault(name, file)
    for name, file in (weight_map or {}).items():
        if name not in file_of:
            problems.append(f"`{name}` is not in {file.name}, though the index says so")
    return file_of, problems


def _compare(
    specs: Mapping[str, TensorSpec], file_of: Mapping[str, Path], handles: Mapping[Path, safe_open]
) -> list[str]:
    """What differs between the tensors that config.json implies and those in the files."""
    problems = [
        f"`{name}` {list(spec.shape)} {spec.dtype} is missing" for name, spec in specs.items() if name not in file_of
    ]
    for name, file in file_of.items():
        if name not in specs:
            problems.append(f"`{name}` in {file.name} belongs to no part of the model and would stay unread")
            continue
        header = handles[file].get_slice(name)
        found = TensorSpec(tuple(header.get_shape()), header.get_dtype())
        if found != specs[name]:
            problems.append(
                f"`{name}` in {file.name} is {list(found.shape)} {found.dtype}; "
                f"by config.json it must be {list(specs[name].shape)} {specs[name].dtype}"
            )
    return problems


def _listing(path: Path, layout: Layout, problems: list[str]) -> str:
    lines = [f"{path}: the files don't hold the {layout} checkpoint that {CONFIG} describes", *first_few(problems)]
    if any("_blocks`" in problem and " BF16; by" in problem for problem in problems):
        lines.append(
            "bf16 weights under MXFP4 names are what transformers 5 saves of an MXFP4 model that it dequantised; "
            "export again from a model that was loaded from bf16 weights"
        )
    elif any(" F32; by" in problem or " F16; by" in problem for problem in problems):
        lines.append("save the model in bfloat16: `model.to(torch.bfloat16).save_pretrained(FOLDER)` in transformers")
    else:
        lines.append(f"download the folder again, or use the {CONFIG} that belongs to these files")
    return "\n  ".join(lines)
