"""Checkpoints: everything that decides the next step, in a folder that is either complete or not there.

```text
RUN/checkpoints/step-00000100/
  trainable.safetensors   the trained tensors under their names, in their own dtypes
  optimizer.safetensors   the moments and master copies of `AdamW.state_dict`
  state.json              step, progress (the loop's own JSON: data position and the like), random number generators
  manifest.json           size and sha256 of the three; written last
```
A checkpoint is written into a hidden folder beside its place, every file and the folder are flushed to the disk, and
one rename makes it visible; only then are older ones removed. So a kill or a full disk at any moment leaves either the
old set or the new one. What a kill can't do, a failing disk or a copied folder can: `newest_checkpoint` checks every
byte against the manifest, sets a bad checkpoint aside as `step-00000100.corrupt`, says so, and takes the one before.

A run whose tensors are cut over ranks writes sharded checkpoints instead (`train.shards`): the same folder, state.json
and manifest, with other files for the tensors. `newest_checkpoint` and what removes old ones go for both.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ossia.disk import sync_to_disk
from ossia.errors import RunError, first_few
from ossia.train.optim import AdamW

FORMAT = 1
TRAINABLE, OPTIMIZER, STATE, MANIFEST = (
    "trainable.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
SHARDED = ".metadata"  # of a sharded checkpoint, beside its *.distcp
_NAME = re.compile(r"step-(\d{8,})")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STATE_JSON_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class SavedState:
    """A checkpoint whose files were found to be what its manifest says.

    seen  of a sharded one that ranks found together: by the rank that keeps a run folder, which files are whole there
    """

    path: Path
    step: int
    progress: dict[str, Any]
    seen: Mapping[int, frozenset[str]] | None = None

    def restore(self, params: Mapping[str, Tensor], optimizer: AdamW) -> None:
        """Copy the saved values into `params` and `optimizer`, and set the random number generators.

        Raises RunError, with nothing changed, if names, shapes or dtypes are not those of this run.
        """
        if self.sharded:
            from ossia.train.shards.read import restore_whole

            restore_whole(self.path, params, optimizer)
            set_rng_state(read_state(self.path)["rng"])
            return
        tensors = safetensors.torch.load_file(self.path / TRAINABLE)
        found = {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()}
        wanted = {name: (tuple(p.shape), str(p.dtype)) for name, p in params.items()}
        if found != wanted:
            name = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))[0]
            raise RunError(
                f"{self.path}: `{name}` is {found.get(name, 'missing')} there, {wanted.get(name, 'missing')} in this "
                "run; was the adapter, the dtype or the model of the recipe changed since?"
            )
        optimizer.load_state_dict(safetensors.torch.load_file(self.path / OPTIMIZER))
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(tensors[name])
        set_rng_state(read_state(self.path)["rng"])

    @property
    def sharded(self) -> bool:
        """Whether ranks wrote it, each its part."""
        return is_sharded(self.path)


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint folder was written by ranks, each its part."""
    return (path / SHARDED).exists() or any(path.glob("*.distcp"))


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint folder."""
    found: dict[str, Any] = json.loads((path / STATE).read_text())
    return found


def checkpoint_paths(run: Path) -> list[Path]:
    """The checkpoint folders of a run by step, oldest first; they are not verified."""
    found = [path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def checkpoint_path(run: Path, step: int) -> Path:
    """The checkpoint folder of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def partial_path(place: Path) -> Path:
    """Where a checkpoint grows before it takes its place."""
    return place.with_name(f".partial-{place.name}")


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def checkpoint_bytes(params: Mapping[str, Tensor], optimizer: AdamW) -> int:
    """About how large a checkpoint of these parameters is, in bytes."""
    return sum(p.numel() * p.element_size() for p in params.values()) + optimizer.state_bytes() + _STATE_JSON_BYTES


def check_room(run: Path, params: Mapping[str, Tensor], optimizer: AdamW) -> None:
    """Raise RunError if the disk couldn't hold even one checkpoint: known now rather than when the first is due.

    What a save that was killed left behind is removed first.
    """
    sweep(run)
    need, free = checkpoint_bytes(params, optimizer), shutil.disk_usage(run).free
    if free < need:
        raise RunError(
            f"{run}: a checkpoint of this run needs {human_bytes(need)} and the disk has {human_bytes(free)} free; "
            "free some space or choose another `output`"
        )


def save_checkpoint(
    run: Path, *, step: int, params: Mapping[str, Tensor], optimizer: AdamW, progress: Mapping[str, Any], keep: int
) -> Path:
    """Write RUN/checkpoints/step-<step>, then remove all but the newest `keep` (at least 1); the new folder.

    progress  what else decides the next step; anything JSON can hold
    Raises    RunError if the disk is full or can't be written; earlier checkpoints are untouched then
    """
    place = checkpoint_path(run, step)
    assert keep >= 1, keep
    assert not place.exists(), place
    partial = partial_path(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(run)
        partial.mkdir()
        _write_files(partial, step, params, optimizer, progress)
        os.rename(partial, place)
        sync_to_disk(place.parent)
        prune(run, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        safe = checkpoint_paths(run)
        raise storage_error(
            error, saving=f"the checkpoint {place}", need=checkpoint_bytes(params, optimizer), safe=safe
        ) from error
    return place


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (the newest must be known to be whole), and unfinished saves."""
    for old in checkpoint_paths(run)[:-keep]:
        os.rename(old, old.with_name(f".old-{old.name}"))
    sweep(run)


def newest_checkpoint(run: Path, say: Callable[[str], None]) -> SavedState | None:
    """The newest checkpoint whose every byte is right; None if there is none at all.

    A bad one is set aside under the ending `.corrupt`, and `say` is told which and why.
    Raises RunError if there are checkpoints, or were before they were set aside, but no good one; or if a file of the
    newest isn't there that ranks wrote, which may be on another host
    """
    for path in reversed(checkpoint_paths(run)):
        if is_sharded(path) and (lost := missing_files(path)):
            raise missing(path, lost)
        problem = verify(path)
        if problem is None:
            return SavedState(path, step_of(path), read_state(path)["progress"])
        aside = set_aside(path)
        say(f"{path}: {problem}; set aside as {aside.name}, trying the checkpoint before it")
    require_none_set_aside(run)
    return None


def set_aside(path: Path) -> Path:
    """Give a bad checkpoint the ending `.corrupt`; its new path."""
    aside = path.with_name(f"{path.name}.corrupt")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    return aside


def require_none_set_aside(run: Path) -> None:
    """Raises RunError if checkpoints were set aside: where no other is left, a run must not start over in silence."""
    num_bad = len(list((run / "checkpoints").glob("step-*.corrupt")))
    if num_bad:
        raise RunError(
            f"{run}: none of its {num_bad} checkpoints is whole (they are kept as checkpoints/*.corrupt)\n"
            "  next: start the run again in another `output` folder; or, to begin at step 0 here and lose its events, "
            f"remove {run / 'checkpoints'}/*.corrupt"
        )


def files_of(path: Path) -> dict[str, dict[str, Any]]:
    """By name, what the manifest says of a sharded checkpoint's files; none where it can't be read."""
    try:
        found: dict[str, dict[str, Any]] = json.loads((path / MANIFEST).read_text())["files"]
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def missing_files(path: Path) -> list[str]:
    """Files of a sharded checkpoint, by its manifest, that aren't in its folder."""
    return [name for name in files_of(path) if not (path / name).exists()]


def missing(path: Path, names: Sequence[str]) -> RunError:
    """The error for files of a sharded checkpoint that no one sees: who wrote them, and what to do."""
    written = files_of(path)
    whose = [f"{name}, written by rank {written[name]['rank']} on {written[name]['host']}" for name in names]
    others = ["", f"missing too: {'; '.join(first_few(whose[1:]))}"] if whose[1:] else []
    return RunError(
        f"{path}: {whose[0]}, isn't there, one of {len(names)} missing files of {len(written)}"
        + "\n  ".join(others)
        + "\n  next: copy them there from the run's folder on that host, or start with that host among the others; if "
        f"they are lost, rename {path.name} to {path.name}.corrupt, and the checkpoint before it is taken"
    )


def verify(path: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with a checkpoint folder, in words, or None if these files are what the manifest says.

    names  of the files; None: all that a checkpoint of its kind has
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if names is None:
            names = {STATE, SHARDED, *manifest["files"]} if is_sharded(path) else _FILES
        entries = {name: manifest["files"][name] for name in sorted(names)}
        sizes = {name: int(entry["bytes"]) for name, entry in entries.items()}
        digests = {name: str(entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} can't be read ({type(error).__name__}: {error})"
    for name in entries:
        try:
            found = entry_of(path / name)
        except OSError as error:
            return f"its {name} can't be read ({error})"
        if found["bytes"] != sizes[name]:
            return f"its {name} has {found['bytes']:,} bytes where {sizes[name]:,} were written"
        if found["sha256"] != digests[name]:
            return f"the bytes of its {name} are not those that were written (sha256 differs)"
    return None


def storage_error(error: Exception, *, saving: str, need: int, safe: list[Path]) -> RunError:
    """The RunError for a write that failed: what was being saved, how much room it needs, what is still safe."""
    number = error.errno if isinstance(error, OSError) else _os_error_number(str(error))
    why = os.strerror(number) if number else str(error)
    newest = f"{safe[-1]} and all that it holds" if safe else "nothing yet: no checkpoint had been completed"
    todo = "free some space there" if number in _NO_ROOM else "mend that"
    goes_on = f"go on from step {step_of(safe[-1])}" if safe else "start again"
    return RunError(
        f"can't save {saving}: {why}\n  needed: {human_bytes(need)}\n  safe: {newest}\n"
        f"  next: {todo}, then run the same command with --resume to {goes_on}"
    )


def write_file(path: Path, text: str) -> Path:
    """Write a file right inside a run's folder, replacing an older one at once when all is written; `path`.

    Raises RunError, and leaves the older one, if the disk refuses it
    """
    content, partial = text.encode(), path.with_name(f".{path.name}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)  # a part of it would only take the room
        safe = checkpoint_paths(path.parent)
        raise storage_error(error, saving=str(path), need=len(content), safe=safe) from error
    return path


def human_bytes(num: float) -> str:
    """A size for people, in binary units: 512 B, 1.5 KiB, 13.8 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num < 1024:
            return f"{num:.0f} B" if unit == "B" else f"{num:.1f} {unit}"
        num /= 1024
    return f"{num:.1f} TiB"


_FILES = {TRAINABLE, OPTIMIZER, STATE}


def _write_files(
    folder: Path, step: int, params: Mapping[str, Tensor], optimizer: AdamW, progress: Mapping[str, Any]
) -> None:
    """Write and flush the four files of a checkpoint, the manifest last."""
    safetensors.torch.save_file({n: p.detach().contiguous() for n, p in params.items()}, folder / TRAINABLE)
    safetensors.torch.save_file(optimizer.state_dict(), folder / OPTIMIZER)
    state = {"step": step, "progress": progress, "rng": rng_state()}
    (folder / STATE).write_text(json.dumps(state, allow_nan=False))
    for name in sorted(_FILES):
        sync_to_disk(folder / name)
    write_manifest(folder, step, {name: entry_of(folder / name) for name in _FILES})


def write_manifest(folder: Path, step: int, files: Mapping[str, Mapping[str, Any]], **more: Any) -> None:
    """Write and flush a checkpoint's last file. Raises OSError."""
    manifest = {"format": FORMAT, "step": step, **more, "files": {name: files[name] for name in sorted(files)}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    sync_to_disk(folder / MANIFEST)
    sync_to_disk(folder)


def entry_of(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file as it can be read back."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def sweep(run: Path) -> None:
    """Remove what an unfinished save or removal left behind."""
    folder = run / "checkpoints"
    for leftover in (*folder.glob(".partial-step-*"), *folder.glob(".old-step-*")):
        shutil.rmtree(leftover)


def _os_error_number(text: str) -> int | None:
    """The errno in a message of the safetensors writer, which wraps the system's errors in its own class."""
    match = re.search(r"\(os error (\d+)\)", text)
    return int(match.group(1)) if match else None


def seed_generators(seed: int) -> None:
    """Start every generator that a checkpoint saves (torch on all devices, numpy, Python) from one seed."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every generator that a step may draw from, as JSON."""
    numpy_state = np.random.get_state(legacy=False)
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(s) for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else [],
        "numpy": numpy_state | {"state": numpy_state["state"] | {"key": numpy_state["state"]["key"].tolist()}},
        "python": random.getstate(),
    }


def set_rng_state(saved: Mapping[str, Any]) -> None:
    """Put every generator back where `rng_state` found it."""
    torch.set_rng_state(_from_hex(saved["torch"]))
    # A checkpoint may go on with fewer devices than it was made with; the generators of the missing ones have no use.
    for device, state in zip(range(torch.cuda.device_count()), saved["cuda"], strict=False):
        torch.cuda.set_rng_state(_from_hex(state), device)
    np.random.set_state(saved["numpy"])
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
