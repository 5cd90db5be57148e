"""A model ready to use, from what a person typed: a folder or a hub name, an adapter or none, and a machine.

Training, evaluation, chat, generation and export all open models here, so `auto` means the same everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch

from ossia.config import RECIPE_IN_RUN, is_hub_name, load_recipe
from ossia.errors import CheckpointError, MissingExtraError, UserError
from ossia.harmony.vocab import Vocabulary
from ossia.model.budget import choose as budget
from ossia.model.budget.weights import WeightBytes
from ossia.model.budget.work import DeviceKind
from ossia.model.checkpoint import CONFIG, Checkpoint
from ossia.model.cut.ranks import Ranks
from ossia.model.peft import find_adapter, load_adapter
from ossia.model.transformer import Transformer
from ossia.model.weights import Placement, Weights
from ossia.ops.attention import Backend, Place, check_backend
from ossia.ops.memory import gpu_memory, machine_memory

WeightsChoice = Literal["auto", "resident", "stream", "mmap", "bf16"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["bfloat16", "float32", "float16"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MODEL_IN_RUN = "model"  # where a run that trained all weights leaves them
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")
_HUB_FOLDERS = ("original/*", "metal/*")  # the same weights once more, in other formats


def open_model(
    model: str,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | DtypeName = "bfloat16",
    weights: WeightsChoice = "auto",
    device: DeviceChoice = "auto",
    attention: Backend | Literal["auto"] = "auto",
    ranks: Ranks | None = None,
    offload: bool = False,
) -> tuple[Transformer, Vocabulary]:
    """Open a checkpoint and its tokenizer, with an adapter on it if one is named.

    model    a checkpoint's folder, or owner/name on the Hugging Face hub (extra `hub`; downloaded once, then cached);
             or a run folder: what it trained, its model with its adapter on it or all of its weights
    adapter  a run folder, or a folder in PEFT's format. Of a run with `qat` experts are rounded as in its training
    dtype    of the activations
    weights  where the weights are, see `choose_placement` for `auto`
    device   auto: a CUDA device if there is one
    attention  its backend, see `ops.attention.backends`
    ranks    over which the weights are cut, in the checkpoint's own bytes, whatever `weights` says; see `model.cut`.
             With `offload` a rank's parts wait in the machine's memory
    Raises   CheckpointError, TokenizerError, AdapterError, MissingExtraError; UserError for a device that isn't there,
             or attention that it can't compute in that way
    """
    _one_of("weights", weights, get_args(WeightsChoice))
    activations = DTYPES[_one_of("dtype", dtype, tuple(DTYPES))] if isinstance(dtype, str) else dtype
    place = _device(device)
    if adapter is None and _is_run(Path(model).expanduser()):
        model, adapter = _of_run(Path(model).expanduser())
    folder = model_folder(model)
    adapter_path = None if adapter is None else find_adapter(adapter)
    qat = adapter is not None and trained_rounded(Path(adapter).expanduser())
    checkpoint, vocabulary = Checkpoint.open(folder), Vocabulary.from_file(folder)
    if vocabulary.size > checkpoint.arch.vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer.json knows {vocabulary.size:,} tokens, the model has rows for "
            f"{checkpoint.arch.vocab_size:,}; put the tokenizer that belongs to this model there"
        )
    lora = None
    if adapter_path is not None:
        lora = load_adapter(adapter_path, checkpoint.arch, place, base=checkpoint)
    placement: Placement = "resident"
    if ranks is None:
        placement = choose_placement(checkpoint, activations, place) if weights == "auto" else weights
    backend = None
    if attention != "auto":
        backend = check_backend(attention, Place.of(place, activations, checkpoint.arch.head_dim))
    kind: DeviceKind = "cuda" if place.type == "cuda" else "cpu"
    on_host = budget.waits_on_host(checkpoint.arch, checkpoint.layout, placement, kind, memory_of(place))
    placed = Weights(checkpoint, placement, activations, place, on_host, ranks, offload=offload)
    return Transformer(placed, lora=lora, backend=backend, qat=qat), vocabulary


def model_folder(model: str) -> Path:
    """The folder of a model's files on this machine; a hub model is downloaded if it isn't there yet.

    Raises  CheckpointError if there is no such folder or hub model, MissingExtraError without huggingface_hub
    """
    if is_hub_name(model):
        return _download(model)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.suffix == ".gguf" and folder.is_file():
            raise CheckpointError(
                f"{model}: this is a GGUF file\n"
                f"  next: make a folder of it: ossia export {model} --to hf-mxfp4 --output FOLDER (or hf-bf16)"
            )
        found = "this is a file" if folder.exists() else f"no such folder (the current one is {Path.cwd()})"
        raise CheckpointError(
            f"{model}: {found}\n"
            "  allowed: a checkpoint's folder, or owner/name on the Hugging Face hub, like openai/gpt-oss-20b"
        )
    if _is_run(folder):
        merged, recipe = folder / MODEL_IN_RUN, load_recipe(folder / RECIPE_IN_RUN)
        if (merged / CONFIG).is_file():
            todo = f"its trained model is {merged}"
        elif recipe.adapter is None:
            todo = "it trains all weights; make a model of its newest checkpoint with `ossia export`"
        else:
            todo = f"name its model with the adapter: {recipe.model} --adapter {model}; or make one with `ossia export`"
        raise CheckpointError(f"{model}: this is a run folder, not a model\n  next: {todo}")
    return folder


def _is_run(folder: Path) -> bool:
    return (folder / RECIPE_IN_RUN).is_file() and not (folder / CONFIG).is_file()


def trained_rounded(run: Path) -> bool:
    """Whether this is the folder of a run with `qat`: its adapter goes with experts rounded to MXFP4."""
    return _is_run(run) and load_recipe(run / RECIPE_IN_RUN).qat is not None


def _of_run(run: Path) -> tuple[str, Path | None]:
    """The model and the adapter that stand for what a run trained; before the end of one that trains all weights, the
    run folder itself, which `model_folder` refuses with what to do."""
    recipe, merged = load_recipe(run / RECIPE_IN_RUN), run / MODEL_IN_RUN
    if recipe.adapter is not None:
        return recipe.model, run
    return str(merged if (merged / CONFIG).is_file() else run), None


def choose_placement(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Placement:
    """What `weights: auto` stands for here and now; the rule is `budget.choose.choose_placement`."""
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    memory = memory_of(device)
    return budget.choose_placement(checkpoint.arch, checkpoint.layout, DTYPE_NAMES[dtype], kind, memory).placement


def memory_of(device: torch.device) -> budget.Memory:
    """Memory of the machine, and of the device where it is a GPU."""
    gpu, gpu_free = gpu_memory(device) if device.type == "cuda" else (0, 0)
    return budget.Memory(*machine_memory(), gpu=gpu, gpu_free=gpu_free)


def weights_bytes(weights: Weights) -> int:
    """Bytes of a model's weights where they are: in memory, or with placement mmap in the file, read as needed."""
    if weights.placement != "bf16":  # of `stream` most are in the machine's memory
        return weights.checkpoint.num_bytes
    w = WeightBytes.of(weights.arch, weights.checkpoint.layout, DTYPE_NAMES[weights.dtype])
    return w.other + w.expanded


def _device(choice: str) -> torch.device:
    _one_of("device", choice, get_args(DeviceChoice))
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device: cuda, but torch finds no CUDA device here\n  next: use auto or cpu; see `ossia doctor`"
        )
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise UserError(f"{option}: {value!r}; allowed: {', '.join(allowed)}")
    return value


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise MissingExtraError(
            f"{name}: no such folder; to download it from the Hugging Face hub: pip install 'ossia[hub]'"
        ) from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_FOLDERS)))
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{name}: neither a folder here nor a model on the hub that can be downloaded: {reason}\n"
            "  next: check the name and the connection; for a private model run `hf auth login`"
        ) from error
    return folder
