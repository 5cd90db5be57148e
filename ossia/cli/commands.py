"""The commands: one verb each, every body a thin call into the part that does the work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ossia.cli.app import command, importing
from ossia.cli.attack import attack
from ossia.cli.imports import import_recipe
from ossia.cli.launch import check_restarts, launch, ranks_to_start
from ossia.cli.llama import LlamaGiven, is_gguf, is_gguf_alone, with_llama_options
from ossia.cli.merge_shards import merge_shards
from ossia.cli.plan import plan
from ossia.cli.push import PrivateOption, PushOption, hub_for, push, push_result
from ossia.errors import UserError

if TYPE_CHECKING:
    from ossia.config import Recipe
    from ossia.model.arch import Arch


class Dtype(StrEnum):
    """Types of activations."""

    bfloat16 = "bfloat16"
    float32 = "float32"
    float16 = "float16"


class Weights(StrEnum):
    """Where a model's weights are while it is used."""

    auto = "auto"
    resident = "resident"
    stream = "stream"
    mmap = "mmap"
    bf16 = "bf16"


class Device(StrEnum):
    """Where the model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Effort(StrEnum):
    """Reasoning effort in the system message."""

    low = "low"
    medium = "medium"
    high = "high"


class Layout(StrEnum):
    """How a checkpoint stores its experts."""

    mxfp4 = "mxfp4"
    bf16 = "bf16"


class ExportFormat(StrEnum):
    """What `ossia export` writes."""

    hf_bf16 = "hf-bf16"
    hf_mxfp4 = "hf-mxfp4"
    peft = "peft"
    gguf = "gguf"
    gguf_lora = "gguf-lora"


class AdapterLayout(StrEnum):
    """How an adapter's file stores experts."""

    rank_major = "rank-major"
    expert_major = "expert-major"
    rank_major_transposed = "rank-major-transposed"
    expert_major_transposed = "expert-major-transposed"


class GgufType(StrEnum):
    """How a GGUF file stores the matrices that aren't MXFP4."""

    bf16 = "bf16"
    f16 = "f16"
    q8_0 = "q8_0"
    f32 = "f32"


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to set: train.steps=100 data.0.path=x.jsonl"),
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a run's too, or owner/name on the hub.")]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", metavar="RUN", help="A run folder or an adapter's folder, put on the model.")
]
InFile = Annotated[Path, typer.Option("--in", metavar="X.jsonl", help='Rows with "ids" or "messages" (and "tools").')]
OutFile = Annotated[Path, typer.Option("--out", metavar="Y.jsonl", help="Where the same rows go, with the results.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Type of activations.")]
WeightsOption = Annotated[Weights, typer.Option("--weights", help="Where the weights are: as in a recipe.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the model runs.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Keep the likeliest tokens up to this share.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Keep this many of the likeliest tokens; 0 keeps all.")]
MOST_TOKENS = 4096  # of an answer in a chat
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer, at most.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]


def _recipe(path: Path, overrides: list[str] | None, *, resume: bool = False, writes: bool) -> Recipe:
    """The checked recipe; every command with a recipe begins here."""
    with importing():
        from ossia.config import checked_recipe

    return checked_recipe(path, overrides or (), resume=resume, writes=writes)


@command("demo")
def demo(
    output: Annotated[Path, typer.Option("--output", help="The run folder.")] = Path("runs/demo"),
    seed: Seed = 0,
) -> None:
    """Fine-tune a tiny model and talk to it, in minutes. Needs neither a GPU nor the network."""
    with importing():
        from ossia.demo.run import run_demo

    run_demo(output, seed=seed)


@command("train")
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the recipe's output folder.")] = False,
    nproc: Annotated[
        int | None, typer.Option("--nproc", metavar="N", min=1, help="Processes that share the work on this machine.")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", metavar="K", min=0, help="With several: start again so often if one fails.")
    ] = 0,
) -> None:
    """Train as the recipe says. Prints the run folder."""
    from ossia.train.ranks.launched import launched

    place = launched()
    # a launcher may have started this before: then the ranks go on, which they know once they have met
    checked = _recipe(recipe, overrides, resume=resume or place is not None, writes=True)
    ranks = ranks_to_start(checked, nproc)
    for line in ranks.lines if ranks else ():
        print(line, file=sys.stderr)
    if ranks is not None and ranks.number > 1:
        flags = ["--resume"] if resume else []
        launch(ranks.number, ["train", str(recipe), *(overrides or ()), *flags], max_restarts=max_restarts)
        return
    check_restarts(max_restarts)
    with importing():
        from ossia.api import run_recipe

    result = run_recipe(checked, resume=resume)
    if place is None or place.rank == 0:
        print(result.folder)


command("plan")(plan)


@command("data")
def data(
    recipe: RecipeFile,
    overrides: Overrides = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Samples to show (5; with --json all).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a sample.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page to look at instead.")
    ] = None,
) -> None:
    """Show samples as tokens, trained or not, with source and totals; or tasks, and whether their rewards hold."""
    checked = _recipe(recipe, overrides, writes=False)
    with importing():
        from ossia.preview import show_data

    show_data(checked, limit=limit if limit or as_json else 5, as_json=as_json, html=html)


@command("eval")
def evaluate_held_out(
    recipe: RecipeFile,
    overrides: Overrides = None,
    adapter: AdapterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Held-out loss of a recipe's model. With --adapter, of that model as a run has trained it."""
    checked = _recipe(recipe, overrides, writes=False)
    from dataclasses import asdict

    with importing():
        from ossia import evaluate

    result = asdict(evaluate.run(checked, adapter=adapter))
    print(json.dumps(result) if as_json else "\n".join(f"{name}: {value}" for name, value in result.items()))


@command("chat")
@with_llama_options
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a run's too, x.gguf, owner/name on the hub, or http://...")
    ],
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="RUN", help="A run or an adapter's folder; of a server, a model's name."),
    ] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="What the server asks for.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="Identity in the system message.")] = None,
    developer: Annotated[str | None, typer.Option("--developer", help="Developer instructions.")] = None,
    effort: Annotated[Effort, typer.Option("--effort", help="Reasoning effort.")] = Effort.medium,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            help=f"Tokens of an answer, at most; {MOST_TOKENS}, or what the server has, if left out.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Left out: another answer each time.")] = None,
    dtype: DtypeOption = Dtype.bfloat16,
    weights: WeightsOption = Weights.auto,
    device: DeviceOption = Device.auto,
    llama: LlamaGiven = MappingProxyType({}),
) -> None:
    """Talk to a model in the terminal. Its thinking is shown apart from its answer."""
    placed = (dtype, weights, device) != (Dtype.bfloat16, Weights.auto, Device.auto)
    gguf = is_gguf(model, llama, {"--adapter": adapter is not None, "--dtype, --weights or --device": placed})
    told = {"system": system, "developer": developer, "effort": effort.value}
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    settings |= {} if seed is None else {"seed": seed}
    if model.startswith(("http://", "https://")):
        if placed:
            raise UserError(f"{model}: the server decides about --dtype, --weights and --device; leave them out")
        with importing():
            from ossia.web.client import run_remote_chat

        settings |= {"top_k": top_k} if top_k else {}  # not a field of OpenAI's own
        settings |= {"max_tokens": max_tokens} if max_tokens else {}  # more than its context would be refused
        run_remote_chat(model, model=adapter, api_key=api_key, settings=settings, **told)
        return
    if api_key is not None:
        raise UserError("--api-key is for a server; MODEL has to be its address then, http://HOST:PORT")
    if gguf:
        with importing():
            from ossia.web.gguf import LlamaOptions, run_gguf_chat

        # llama.cpp's own defaults are others
        settings |= {"top_k": top_k, "min_p": 0.0, "max_tokens": max_tokens or MOST_TOKENS}
        run_gguf_chat(model, LlamaOptions(**llama), settings=settings, **told)
        return
    with importing():
        from ossia.chat import run_chat

    run_chat(
        model,
        adapter=adapter,
        **told,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens or MOST_TOKENS,
        seed=seed,
        dtype=dtype.value,
        weights=weights.value,
        device=device.value,
    )


@command("generate")
def generate(
    model: ModelName,
    source: InFile,
    target: OutFile,
    adapter: AdapterOption = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_tokens: MaxTokens = 1024,
    num: Annotated[int, typer.Option("--n", min=1, help="Completions of each row.")] = 1,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.bfloat16,
    weights: WeightsOption = Weights.auto,
    device: DeviceOption = Device.auto,
) -> None:
    """Answer every row of a file. The rows come back with "completions"."""
    with importing():
        from ossia.batch import generate_file

    generate_file(
        model,
        source,
        target,
        adapter=adapter,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        num_completions=num,
        seed=seed,
        dtype=dtype.value,
        weights=weights.value,
        device=device.value,
    )


@command("score")
def score(
    model: ModelName,
    source: InFile,
    target: OutFile,
    adapter: AdapterOption = None,
    dtype: DtypeOption = Dtype.bfloat16,
    weights: WeightsOption = Weights.auto,
    device: DeviceOption = Device.auto,
) -> None:
    """Log-probability of every given token. The rows come back with "logprobs"."""
    with importing():
        from ossia.batch import score_file

    score_file(
        model, source, target, adapter=adapter, dtype=dtype.value, weights=weights.value, device=device.value
    )  # fmt: skip


@command("serve")
@with_llama_options
def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Folders, runs, hub names, NAME=MODEL; x.gguf.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=DIR", help="An adapter, by NAME; several may be. A run is followed."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on; this machine alone if left out.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key: Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="What clients have to send.")] = None,
    allow_hosts: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Its name, beside localhost; several may be, * is any."),
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Answers generated at once.")] = 64,
    max_queue: Annotated[int, typer.Option("--max-queue", min=0, help="Answers that may wait; more get a 429.")] = 256,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=2, help="Tokens of a prompt and its answer; the model's if left out."),
    ] = None,
    int8_cache: Annotated[bool, typer.Option("--int8-cache", help="Half the cache's bytes, not exact.")] = False,
    drain: Annotated[float, typer.Option("--drain", min=0.0, help="Seconds that running answers have left.")] = 30.0,
    dtype: DtypeOption = Dtype.bfloat16,
    weights: WeightsOption = Weights.auto,
    device: DeviceOption = Device.auto,
    llama: LlamaGiven = MappingProxyType({}),
) -> None:
    """Serve models over HTTP. OpenAI's interface and a chat page; one SIGTERM or Ctrl-C drains, two stop."""
    placed = (dtype, weights, device) != (Dtype.bfloat16, Weights.auto, Device.auto)
    batched = (max_batch, max_queue, max_length, int8_cache, drain) != (64, 256, None, False, 30.0)
    not_for_gguf = {
        "--adapter or --allow-host": bool(adapters or allow_hosts),
        "--dtype, --weights or --device": placed,
        "--max-batch, --max-queue, --max-length, --int8-cache or --drain": batched,
    }
    if is_gguf_alone(models, llama, not_for_gguf):
        with importing():
            from ossia.web.gguf import LlamaOptions, run_gguf_server

        run_gguf_server(models[0], LlamaOptions(**llama), host=host, port=port, api_key=api_key)
        return
    with importing():
        from ossia.web import check_installed

    check_installed()
    with importing():
        from ossia.web.serve import run_server

    run_server(
        models,
        adapters=adapters or (),
        host=host,
        port=port,
        api_key=api_key,
        allow_hosts=allow_hosts or (),
        max_batch=max_batch,
        max_queue=max_queue,
        max_length=max_length,
        int8_cache=int8_cache,
        drain_s=drain,
        dtype=dtype.value,
        weights=weights.value,
        device=device.value,
    )


@command("export")
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a model (with --adapter), or a GGUF file.")
    ],
    to: Annotated[ExportFormat, typer.Option("--to", help="What to write.")],
    output: Annotated[Path, typer.Option("--output", metavar="PATH", help="A folder (GGUF: a file) not there yet.")],
    adapter: AdapterOption = None,
    adapter_layout: Annotated[
        AdapterLayout | None,
        typer.Option("--adapter-layout", help="How the adapter stores experts, where its file reads in two ways."),
    ] = None,
    gguf_type: Annotated[
        GgufType | None, typer.Option("--gguf-type", help="Of gguf: how matrices other than MXFP4 are stored (bf16).")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Of a GGUF file: a folder whose tokenizer is taken instead.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", min=0.0, help="KL divergence from what was trained, in nats, that is not refused."),
    ] = None,
    push_to: PushOption = None,
    private: PrivateOption = False,
) -> None:
    """Write a model that other programs load. It is verified by reading it back. Prints its folder or file."""
    with importing():
        from ossia.export import export_model

    kind = None if gguf_type is None else gguf_type.value
    layout = None if adapter_layout is None else adapter_layout.value
    hub = hub_for(push_to, private)
    written = export_model(
        source,
        to=to.value,
        output=output,
        adapter=adapter,
        adapter_layout=layout,
        gguf_type=kind,
        tokenizer=tokenizer,
        max_kl=max_kl,
    )
    print(written)
    push_result(written, hub, source)


command("merge-shards")(merge_shards)
command("push")(push)


@command("tiny")
def tiny(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that isn't there yet.")],
    shape: Annotated[
        str, typer.Option("--shape", help="demo, B1, B2, 20b or 120b; the next options change it.")
    ] = "demo",
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Layers.")] = None,
    hidden: Annotated[int | None, typer.Option("--hidden", min=1, help="Width of a token.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="Width of an expert.")] = None,
    experts: Annotated[int | None, typer.Option("--experts", min=1, help="Experts of a layer.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Experts that a token goes to.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", min=1, help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", min=1, help="Key and value heads.")] = None,
    window: Annotated[int | None, typer.Option("--window", min=1, help="Tokens that a sliding layer sees.")] = None,
    vocab: Annotated[
        int | None, typer.Option("--vocab", min=1, help="Rows of the vocabulary; padding beyond the tokenizer's.")
    ] = None,
    seed: Seed = 0,
    weights: Annotated[Layout, typer.Option("--weights", help="How experts are stored.")] = Layout.mxfp4,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="A folder whose tokenizer is taken.")] = None,
) -> None:
    """Write a random checkpoint of any size. gpt-oss architecture, released format. Prints its folder."""
    with importing():
        from ossia.model.tiny import make_tiny

    sizes = {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_experts": experts,
        "experts_per_token": top_k,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "sliding_window": window,
    }
    arch = _arch(shape, {name: size for name, size in sizes.items() if size is not None})
    with _bar(f"writing {folder}") as progress:
        make_tiny(
            folder,
            arch,
            seed=seed,
            weights=weights.value,
            tokenizer=tokenizer,
            vocab_rows=vocab,
            progress=progress,
        )
    print(folder)


@contextmanager
def _bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over bytes on stderr, where that is a terminal; yields what to call with (done, in all)."""
    with importing():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(words), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(words, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _arch(shape: str, sizes: dict[str, int]) -> Arch:
    """A named shape with some of its sizes changed; layers alternate as in the released models."""
    from dataclasses import replace

    with importing():
        from ossia.model.arch import SHAPES, alternating_layers

    if shape not in SHAPES:
        raise UserError(f"--shape {shape}: no such shape\n  allowed: {', '.join(SHAPES)}")
    num_layers = sizes.get("num_layers", SHAPES[shape].num_layers)
    arch = replace(SHAPES[shape], **sizes, layer_types=alternating_layers(num_layers))
    arch.check("ossia tiny")
    return arch


command("attack")(attack)
command("import-recipe")(import_recipe)


@command("explain")
def explain(
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="A key or a section; left out: all keys.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/recipe.md.")] = False,
) -> None:
    """What a recipe's keys mean. With types and defaults."""
    with importing():
        from ossia.config import explain as words
        from ossia.config import recipe_page

    print(recipe_page() if markdown else words(key), end="")


@command("doctor")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """What this machine can do. Devices, memory, versions, optional packages."""
    from ossia.cli.doctor import as_text, examine

    with importing():  # of torch; it changes nothing
        found = examine()
    print(json.dumps(found) if as_json else as_text(found))
