"""`ossia plan`: what a recipe will take, on this machine or on a GPU that isn't here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ossia.cli.app import importing
from ossia.cli.launch import ranks_here
from ossia.errors import UserError

if TYPE_CHECKING:
    from ossia.config import Recipe
    from ossia.plan.machine import Machine
    from ossia.plan.many.predict import Wanted
    from ossia.train.ranks.number import NumRanks

DOES_NOT_FIT = 3  # the exit code


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to set; `model` may be 20b, 120b, B1, B2 too."),
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="A GPU that isn't here: 3090, H100.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option("--gpu-memory", metavar="GB", min=1, help="Or one by its memory.")
    ] = None,
    gpu_tflops: Annotated[
        float, typer.Option("--gpu-tflops", min=0, help="Its data sheet's bfloat16 TFLOP/s; 0: speed isn't told.")
    ] = 0.0,
    gpu_bandwidth: Annotated[
        float, typer.Option("--gpu-bandwidth", metavar="GB/S", min=0.1, help="Its way to the machine's memory.")
    ] = 24.0,
    machine_memory: Annotated[
        float | None,
        typer.Option("--machine-memory", metavar="GB", min=1, help="Free memory of the machine that it is in."),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", metavar="N", min=1, help="So many of that GPU; else as many as `ossia train` starts."),
    ] = None,
    per_machine: Annotated[int, typer.Option("--per-machine", metavar="N", min=1, help="GPUs of a machine.")] = 8,
    network: Annotated[
        str, typer.Option("--network", metavar="NAME", help="Between machines: infiniband or ethernet.")
    ] = "infiniband",
    shards: Annotated[
        int | None, typer.Option("--shards", metavar="N", min=1, help="Ranks that a layer is divided over.")
    ] = None,
    expert_parallel: Annotated[
        int | None,
        typer.Option(
            "--expert-parallel", metavar="N", min=1, help="Ranks that experts stay on for good; else the recipe's."
        ),
    ] = None,
    context_parallel: Annotated[
        int | None,
        typer.Option(
            "--context-parallel", metavar="N", min=1, help="Ranks that share one sequence; else the recipe's."
        ),
    ] = None,
    offload: Annotated[
        bool | None, typer.Option("--offload/--no-offload", help="What is trained waits in the machine's memory.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What a recipe will take: memory by part, fits or not. No weight is read; exits with 3 where it doesn't fit."""
    with importing():
        from ossia.config import load_recipe
        from ossia.plan.predict import as_json as plain
        from ossia.plan.predict import make_plan
        from ossia.plan.text import as_text

    checked = load_recipe(recipe, overrides or ())
    with importing():
        machine = _machine(
            gpu,
            gpu_memory,
            gpu_tflops,
            gpu_bandwidth,
            machine_memory,
            (checked.device, checked.dtype, checked.train.threads),
        )
    division = (shards, expert_parallel, context_parallel, offload)
    elsewhere = gpu is not None or gpu_memory is not None
    ranks = _ranks(checked, gpus, elsewhere=elsewhere)
    if machine.kind == "cpu" and (gpus is not None or any(said is not None for said in division)):
        raise UserError("--gpus is of GPUs that aren't here; name one: --gpu H100, or say what it is: --gpu-memory GB")
    if machine.kind == "cuda" and (ranks.number > 1 or any(said is not None for said in division)):
        wanted = _wanted(ranks.number, network, per_machine if elsewhere or gpus else ranks.number, division)
        _print_many(checked, machine, wanted, None if elsewhere else ranks, as_json=as_json)
        return
    if machine.kind == "cpu" and ranks.number > 1:
        alone = "what follows is of one process alone; what each of several takes the run says in its first lines"
        ranks = replace(ranks, idle=alone)
    found = make_plan(checked, machine)
    _print(plain(found) if as_json else as_text(found), None if elsewhere else ranks)
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _ranks(recipe: Recipe, gpus: int | None, *, elsewhere: bool) -> NumRanks:
    """As many as `--gpus` says, or as `ossia train` would start; of a GPU that isn't here `auto` is one."""
    from ossia.train.ranks.number import NumRanks, num_ranks

    if gpus is not None:
        return NumRanks(gpus, "--gpus")
    return num_ranks(recipe, None, lambda: 1) if elsewhere else ranks_here(recipe)


def _print(plan: dict[str, Any] | str, ranks: NumRanks | None) -> None:
    """A plan's words or its JSON; with the ranks that `ossia train` would start here."""
    if isinstance(plan, str):
        first = [] if ranks is None else [("ranks", f"{ranks.number} ({ranks.why})"), ("", ranks.idle)]
        print("\n".join([*(f"{label:<13}{words}" for label, words in first if words), plan]))
        return
    print(json.dumps(plan if ranks is None else {"ranks": {"number": ranks.number, "why": ranks.why}} | plan))


def _wanted(
    gpus: int, network: str, per_machine: int, division: tuple[int | None, int | None, int | None, bool | None]
) -> Wanted:
    from ossia.model.budget.many.links import NETWORKS
    from ossia.plan.many.predict import Wanted

    if network not in NETWORKS:
        raise UserError(f"--network {network}: no such network; allowed: {', '.join(NETWORKS)}")
    return Wanted(gpus, NETWORKS[network], per_machine, *division)


def _print_many(recipe: Recipe, machine: Machine, wanted: Wanted, ranks: NumRanks | None, *, as_json: bool) -> None:
    from ossia.plan.many.predict import as_json as plain
    from ossia.plan.many.predict import make_many_plan
    from ossia.plan.many.text import as_text

    found = make_many_plan(recipe, machine, wanted)
    _print(plain(found) if as_json else as_text(found), ranks)
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _machine(
    gpu: str | None,
    memory: float | None,
    tflops: float,
    bandwidth: float,
    machine_memory: float | None,
    recipe: tuple[str, str, int | None],
) -> Machine:
    from ossia.plan.machine import described_gpu, here, named_gpu

    if gpu is not None and memory is not None:
        raise UserError("--gpu and --gpu-memory are both given; keep one")
    if gpu is not None:
        return named_gpu(gpu, machine_memory)
    if memory is not None:
        return described_gpu(memory, tflops, bandwidth, machine_memory)
    if machine_memory is not None:
        raise UserError("--machine-memory is of the machine that a --gpu is in; this machine's is known")
    return here(*recipe)
