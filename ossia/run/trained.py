"""What a run trains and what it leaves: an adapter or all weights, put on the model before it and written after it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ossia.config import Recipe
from ossia.export.merge import Changes, write_merged, write_model
from ossia.model.arch import Layout
from ossia.model.checkpoint import Checkpoint
from ossia.model.cut.ranks import Ranks
from ossia.model.cut.trained import TrainedParts
from ossia.model.lora import Lora, LoraSpec
from ossia.model.peft import find_adapter, load_adapter, save_adapter
from ossia.model.transformer import Transformer
from ossia.model.weights import Weights
from ossia.train.ranks.world import World
from ossia.train.shards.run import cut_parts
from ossia.train.shards.sliced import on_first

ADAPTER, MODEL = "adapter", "model"


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run: its folder, its last step, and where the trained adapter or model is."""

    folder: Path
    step: int
    trained: Path


def make_trainable(model: Transformer, recipe: Recipe, ranks: Ranks | None = None) -> None:
    """Put the recipe's adapter on the model, or make all weights trainable.

    ranks   over which weights are cut that are trained in full
    Raises  AdapterError for a target that matches nothing, or an adapter to start from that doesn't fit;
            CheckpointError for `qat` where the experts' sizes aren't multiples of 32
    """
    adapter = recipe.adapter
    if recipe.qat is not None:
        model.arch.tensor_specs(recipe.qat)  # refuses sizes that the format doesn't have
        model.qat = True
    if adapter is None:
        if model.weights.checkpoint.layout == "mxfp4":
            print(
                f"{recipe.model}: MXFP4 experts are expanded to be trained: 4.25 bits a weight become 16 bytes in "
                f"training and {'4.25 bits' if recipe.qat else '2 bytes'} in the trained checkpoint",
                file=sys.stderr,
            )
        model.train_all_weights(ranks, offload=recipe.parallel.offload)
        return
    spec = LoraSpec.of(adapter)
    if adapter.init_from is None:
        model.use_adapter(Lora.fresh(model.arch, spec, seed=recipe.train.seed, device=model.device))
    else:
        base = model.weights.checkpoint
        found = load_adapter(find_adapter(adapter.init_from), model.arch, model.device, base=base)
        model.use_adapter(found.with_spec(spec))


def show_trainable(model: Transformer) -> None:
    """The table of what will change, on stderr."""
    table = Table("trained", "rank", "matrices", "parameters", title="What is trained", title_justify="left")
    if model.lora is None:
        table.add_row("all weights", "-", str(len(model.trainable.tensors)), f"{model.trainable.num_parameters:,}")
    else:
        for target, rank, matrices, parameters in model.lora.table():
            table.add_row(target, str(rank), f"{matrices:,}", f"{parameters:,}")
        table.add_row("in all", "", "", f"{model.trainable.num_parameters:,}", style="bold")
    Console(stderr=True).print(table)


def result_folder(recipe: Recipe) -> Path:
    """Where a run leaves what it trained: RUN/adapter, in PEFT's format, or RUN/model, a checkpoint."""
    return recipe.output / (MODEL if recipe.adapter is None else ADAPTER)


def save_result(recipe: Recipe, model: Transformer, world: World | None = None) -> Path:
    """Write what was trained into `result_folder`, of several ranks rank 0; returns it. All of them call it."""
    checkpoint, path = model.weights.checkpoint, result_folder(recipe)
    leads = world is None or world.leads
    if model.lora is not None:
        if leads:
            save_adapter(path, model.lora, base_model=recipe.model)
        return path
    layout: Layout = "bf16" if recipe.qat is None else recipe.qat
    # it appears whole, at the end of a run: a finished run that is resumed has it already
    if world is not None and isinstance(model.trainable, TrainedParts):
        if not world.from_first(path.exists()):
            shapes = model.trainable.shapes
            with on_first(world, cut_parts(model.trainable.tensors, shapes, world), shapes) as tensors:
                if tensors is not None:
                    write_merged(path, checkpoint, Changes(tensors=tensors, qat=model.qat), checkpoint.path, layout)
    elif leads and not path.exists():
        write_model(path, model, tokenizer_from=checkpoint.path, layout=layout)
    return path


def whole_model(model: Transformer, trained: Path) -> Transformer:
    """A finished run's model for one process alone: where trained weights are cut over ranks, of the folder that
    `save_result` has written."""
    if not model.trainable.cut:
        return model.whole()
    weights = Weights(Checkpoint.open(trained), "mmap", model.dtype, model.device)
    return Transformer(weights, backend=model.backend, kernels=model.kernels, qat=model.qat)
