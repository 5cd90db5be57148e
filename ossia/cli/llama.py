"""llama.cpp's options under its own names, for `ossia serve x.gguf` and `ossia chat x.gguf`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from types import MappingProxyType
from typing import Annotated, Any

import typer

from ossia.errors import UserError


class CacheType(StrEnum):
    """Types of llama.cpp's key-value cache."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q5_1 = "q5_1"
    q5_0 = "q5_0"
    q4_1 = "q4_1"
    q4_0 = "q4_0"
    iq4_nl = "iq4_nl"


OverrideTensor = Annotated[
    list[str] | None,
    typer.Option(
        "-ot",
        "--override-tensor",
        metavar="PATTERN=BUFFER",
        help="GGUF: where tensors go whose names match, like 'ffn_.*_exps=CPU'; several may be.",
    ),
]
GpuLayers = Annotated[
    int | None, typer.Option("-ngl", "--n-gpu-layers", min=0, help="GGUF: layers on the GPU, at most.")
]
CacheTypeK = Annotated[CacheType | None, typer.Option("-ctk", "--cache-type-k", help="GGUF: type of cached keys.")]
CacheTypeV = Annotated[CacheType | None, typer.Option("-ctv", "--cache-type-v", help="GGUF: type of cached values.")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="GGUF: threads that generate.")]
CtxSize = Annotated[
    int | None, typer.Option("-c", "--ctx-size", min=0, help="GGUF: tokens of context; 0: the model's.")
]
Parallel = Annotated[int | None, typer.Option("-np", "--parallel", min=1, help="GGUF: answers generated at once.")]

LoraFiles = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="L.gguf", help="GGUF: an adapter of `--to gguf-lora` on it; several may be."),
]


_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "override_tensor": OverrideTensor,
        "n_gpu_layers": GpuLayers,
        "cache_type_k": CacheTypeK,
        "cache_type_v": CacheTypeV,
        "threads": Threads,
        "ctx_size": CtxSize,
        "parallel": Parallel,
        "lora": LoraFiles,
    }
)
LlamaGiven = Mapping[str, Any]
"""llama.cpp's options that were given, by their names in `ossia.web.gguf.LlamaOptions`."""


def with_llama_options(body: Callable[..., None]) -> Callable[..., None]:
    """A command with llama.cpp's options beside its own; `body` gets those that were given as `llama`."""

    @wraps(body)
    def run(**given: Any) -> None:
        llama = {name: given.pop(name) for name in _OPTIONS}
        body(**given, llama={name: value for name, value in llama.items() if value is not None and value != []})

    own = [one for one in signature(body, eval_str=True).parameters.values() if one.name != "llama"]
    ours = [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in _OPTIONS.items()]
    run.__signature__ = Signature([*(one.replace(kind=Parameter.KEYWORD_ONLY) for one in own), *ours])
    run.__annotations__ = {**{one.name: one.annotation for one in own}, **_OPTIONS}
    return run


def runs_llama(words: Sequence[str]) -> bool:
    """Whether the words of a command line are for llama.cpp: known before anything is imported."""
    return words[:1] in (["serve"], ["chat"]) and any(word.lower().endswith(".gguf") for word in words[1:])


def is_gguf(model: str, llama: LlamaGiven, not_for_gguf: Mapping[str, bool]) -> bool:
    """Whether MODEL is a file for llama.cpp.

    not_for_gguf  options of other models, and whether they were given
    Raises        UserError for an option that is for the other kind of model
    """
    gguf = model.lower().endswith(".gguf") and not model.startswith(("http://", "https://"))
    if llama and not gguf:
        flag = next(iter(llama)).replace("_", "-")
        raise UserError(f"--{flag} is llama.cpp's, which runs .gguf files; {model} is none: leave it out")
    if gguf and (wrong := [flags for flags, given in not_for_gguf.items() if given]):
        raise UserError(
            f"{wrong[0]}: not for {model}, which llama.cpp runs; leave it out\n  allowed: what --help marks GGUF"
        )
    return gguf


def is_gguf_alone(models: Sequence[str], llama: LlamaGiven, not_for_gguf: Mapping[str, bool]) -> bool:
    """`is_gguf` of all that one server is asked to serve. Raises UserError also for a file that isn't alone."""
    found = [is_gguf(model, llama, not_for_gguf) for model in models]
    if any(found) and len(models) > 1:
        file = models[found.index(True)]
        raise UserError(f"{file}: llama.cpp's server has one model\n  next: start another server for it")
    return found[0]
