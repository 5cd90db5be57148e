"""What is exported: a run or a model by its name, as a base checkpoint and what training changed of it.

Nothing here is loaded but an adapter: weights stay in their files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ossia import __version__
from ossia.config import RECIPE_IN_RUN, Recipe, load_recipe
from ossia.errors import CheckpointError, RunError, UserError
from ossia.export.merge import Changes
from ossia.model.arch import Arch
from ossia.model.checkpoint import CONFIG, Checkpoint
from ossia.model.open import MODEL_IN_RUN, model_folder, trained_rounded
from ossia.model.peft import ADAPTER_IN_RUN, LayoutName, find_adapter, load_adapter
from ossia.model.weights import EXPERT_WEIGHTS
from ossia.train.shards.sliced import InShards
from ossia.train.state import MANIFEST, TRAINABLE, checkpoint_paths, is_sharded, missing, missing_files, verify


@dataclass(frozen=True, slots=True)
class Source:
    """A base, what training changed of it, and the recipe of the run, where it was one."""

    base: Checkpoint
    changes: Changes
    recipe: Recipe | None = None

    def identity(self, **options: str | None) -> dict[str, str]:
        """All that decides about the bytes of an export, short: of two that have it in common one can end the other.

        options  what is written and how
        Returns  texts by key: the base's folder, its files' sizes and times and its texts, what training changed (an
                 adapter by its bytes), the programs' versions, and the options
        """
        base = self.base.path.absolute()
        texts = [file for file in sorted(base.iterdir()) if file.suffix in (".json", ".jinja")]
        return identity_of(
            base,
            self.base.files,
            texts=_digest(*(part for file in texts for part in (file.name.encode(), file.read_bytes()))),
            changes=_of_changes(self.changes),
            **options,
        )


def identity_of(source: Path, files: Sequence[Path], **options: str | None) -> dict[str, str]:
    """`Source.identity` of any files that hold weights."""
    found = {
        "ossia": __version__,
        "torch": torch.__version__,
        "source": str(source.absolute()),
        "weights": _digest(json.dumps([_stamp(file) for file in files]).encode()),
    }
    return found | {key: str(value) for key, value in options.items()}


def _stamp(file: Path) -> tuple[str, int, int, int]:
    """What differs once a file was written to or replaced, without reading it."""
    status = file.stat()
    return file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _of_changes(changes: Changes) -> str:
    qat = "qat" if changes.qat else ""
    if changes.lora is not None:
        spec, tensors = changes.lora.spec, changes.lora.trainable.tensors
        what = json.dumps([sorted(spec.targets.items()), spec.rslora, sorted(tensors)])
        values = (memoryview(tensors[name].numpy()).cast("B") for name in sorted(tensors))
        return _digest(what.encode(), *values) + qat
    if isinstance(changes.tensors, TensorsInFile):
        return _digest(json.dumps([str(changes.tensors.file.absolute()), *_stamp(changes.tensors.file)]).encode()) + qat
    if isinstance(changes.tensors, InShards):
        return _digest((changes.tensors.path / MANIFEST).read_bytes()) + qat
    assert not changes.tensors
    return "none"


def open_source(
    name: str,
    adapter: str | None,
    say: Callable[[str], None],
    layout: LayoutName | None = None,
    *,
    of_ranks: bool = False,
) -> Source:
    """What a name means: a run folder (its final adapter or model, else its newest whole checkpoint), or a model.

    name     a run folder, a checkpoint's folder, or owner/name on the hub
    adapter  put on a model: a run folder or an adapter's folder
    layout   how that one's experts are stored, where its file can be read in two ways
    of_ranks of a run, the newest whole checkpoint that ranks have written, each its part, whatever else there is
    Raises   UserError (CheckpointError, AdapterError, RunError, ...) if something is missing or doesn't fit
    """
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file() or not (folder / RECIPE_IN_RUN).is_file():
        base = Checkpoint.open(model_folder(name))
        if adapter is not None:
            qat = trained_rounded(Path(adapter).expanduser())
            return Source(base, _adapted(base, find_adapter(adapter), say, layout=layout, qat=qat))
        if layout is not None:
            raise UserError(f"--adapter-layout {layout} says how an --adapter is stored; there is none")
        return Source(base, Changes())
    if adapter is not None or layout is not None:
        raise UserError(f"{name} is a run folder and brings what it trained; leave --adapter out, or name a model")
    recipe = load_recipe(folder / RECIPE_IN_RUN)
    qat = recipe.qat is not None
    if of_ranks and not any(map(is_sharded, checkpoint_paths(folder))):
        raise UserError(
            f"{name}: no checkpoint there is in shards; `ossia export {name} --to ... --output ...` writes it"
        )
    if recipe.adapter is None and (folder / MODEL_IN_RUN).is_dir() and not of_ranks:
        return Source(Checkpoint.open(folder / MODEL_IN_RUN), Changes(), recipe)
    base = Checkpoint.open(model_folder(recipe.model))
    if recipe.adapter is not None and (folder / ADAPTER_IN_RUN).is_dir():
        return Source(base, _adapted(base, folder / ADAPTER_IN_RUN, say, qat=qat), recipe)
    newest = _newest_whole(folder, say)
    if recipe.adapter is not None:
        return Source(base, _adapted(base, newest, say, qat=qat), recipe)
    if is_sharded(newest):
        shards = InShards(newest)
        _require_weights(newest, shards.shapes, base.arch)
        return Source(base, Changes(tensors=shards, qat=qat), recipe)
    return Source(base, Changes(tensors=TensorsInFile.open(newest / TRAINABLE, base.arch), qat=qat), recipe)


def _adapted(
    base: Checkpoint,
    folder: Path,
    say: Callable[[str], None],
    *,
    layout: LayoutName | None = None,
    qat: bool = False,
) -> Changes:
    say(f"adapter: {folder}")
    lora = load_adapter(folder, base.arch, torch.device("cpu"), base=base, layout=layout, say=say)
    return Changes(lora, qat=qat)


def _newest_whole(run: Path, say: Callable[[str], None]) -> Path:
    """The run's newest checkpoint whose every byte is right; the run may still be going on, so nothing is moved."""
    incomplete: RunError | None = None
    for path in reversed(checkpoint_paths(run)):
        if is_sharded(path) and (lost := missing_files(path)):
            error = missing(path, lost)
            incomplete = incomplete or error
            say(f"{str(error).splitlines()[0]}; trying the checkpoint before it")
            continue
        problem = verify(path)
        if problem is None:
            say(f"exporting {path.name} of {run}")
            return path
        say(f"{path}: {problem}; trying the checkpoint before it")
    if incomplete is not None:
        raise incomplete
    raise RunError(f"{run}: the run has saved no whole checkpoint yet; let it go on with `ossia train ... --resume`")


def _require_weights(path: Path, found: Mapping[str, tuple[int, ...]], arch: Arch) -> None:
    """Raises CheckpointError unless these are the shapes of all weights of such a model, as it computes."""
    wanted = {}
    for name, spec in arch.tensor_specs("bf16").items():
        transposed = name.rpartition(".")[2] in EXPERT_WEIGHTS
        wanted[name] = (spec.shape[0], spec.shape[2], spec.shape[1]) if transposed else tuple(spec.shape)
    if differing := sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name)):
        name = differing[0]
        raise CheckpointError(
            f"{path}: `{name}` is {found.get(name, 'missing')} there, {wanted.get(name, 'not there')} in the model "
            f"that the run's recipe names ({len(differing)} tensors differ); was that model replaced since?"
        )


@dataclass(frozen=True, slots=True)
class TensorsInFile(Mapping[str, Tensor]):
    """The tensors of a run that trains all weights, each mapped from the file when it is asked for."""

    file: Path
    names: frozenset[str]

    @classmethod
    def open(cls, file: Path, arch: Arch) -> TensorsInFile:
        """Raises CheckpointError unless it holds every weight of such a model, in the computation's layout."""
        with safe_open(file, framework="pt", device="cpu") as handle:
            found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        _require_weights(file, found, arch)
        return cls(file, frozenset(found))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.file, framework="pt", device="cpu") as handle:
            return handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
