"""Where an adapter's files are, in a folder of PEFT's format or in a run."""

from __future__ import annotations

import re
from pathlib import Path

from ossia.config import RECIPE_IN_RUN, load_recipe
from ossia.errors import AdapterError
from ossia.model.peft.config import CONFIG, PeftConfig

TENSORS = "adapter_model.safetensors"
ADAPTER_IN_RUN = "adapter"
RUN_TENSORS = "trainable.safetensors"  # of a run's checkpoint: our names and layouts; the recipe says the rest


def find_adapter(path: str | Path) -> Path:
    """The folder that holds an adapter, for `load_adapter`: a folder in PEFT's format as it is; of a run, its final
    adapter, or that of its newest checkpoint while it has none.

    Raises  AdapterError if there is neither
    """
    path = Path(path).expanduser()
    for folder in (path, path / ADAPTER_IN_RUN):
        if (folder / CONFIG).is_file():
            return folder
    if (path / RUN_TENSORS).is_file():
        return path
    saved = [found.parent for found in (path / "checkpoints").glob(f"step-*/{RUN_TENSORS}")]
    whole = [folder for folder in saved if re.fullmatch(r"step-\d+", folder.name)]
    if whole:
        return max(whole, key=lambda folder: int(folder.name.removeprefix("step-")))
    if not path.is_dir():
        found = f"no such folder (the current one is {Path.cwd()})"
    elif (path / RECIPE_IN_RUN).is_file():
        every = "; it saves one every `train.save_every` steps, and at its end"
        raise AdapterError(f"{path}: the run has saved no checkpoint yet{every}\n  next: wait for the first one")
    else:
        found = f"no {CONFIG} in it, nor in its folder {ADAPTER_IN_RUN}, nor checkpoints of a run"
    raise AdapterError(f"{path}: {found}\n  allowed: a run folder of `ossia train`, or a folder in PEFT's format")


def recorded_base(path: Path) -> str | None:
    """The model that an adapter says it was trained on, a folder or a hub name; None if it doesn't say.

    path  a folder that `find_adapter` gave
    """
    if (path / CONFIG).is_file():
        base = PeftConfig.open(path / CONFIG).config.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None
    recipe = path.parent.parent / RECIPE_IN_RUN
    return load_recipe(recipe).model if recipe.is_file() else None
