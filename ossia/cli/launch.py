"""Starting the ranks of a run on this machine, with PyTorch's own launcher."""

from __future__ import annotations

import signal
import sys
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ossia.cli.app import importing
from ossia.errors import UserError
from ossia.train.ranks.launched import launched
from ossia.train.ranks.number import NumRanks, num_ranks

if TYPE_CHECKING:
    from ossia.config import Recipe

_TO_SAVE_S = 60  # that ranks have to finish a step and save, once they are asked to stop


def ranks_to_start(recipe: Recipe, nproc: int | None) -> NumRanks | None:
    """How many processes a run is to be, see `num_ranks`; None: a launcher has started this one, and has decided.

    Raises  UserError for an `nproc` that a launcher or the recipe doesn't leave to the command
    """
    if launched() is not None:
        if nproc is not None:
            raise UserError("--nproc: a launcher has started this process already; say there how many there are to be")
        return None
    return ranks_here(recipe, nproc)


def ranks_here(recipe: Recipe, nproc: int | None = None) -> NumRanks:
    """As many as `ossia train` starts on this machine; as `num_ranks`."""
    return num_ranks(recipe, nproc, visible_gpus)


def visible_gpus() -> int:
    """GPUs that this process, and so each rank, may use.

    torch's own count, as the ranks choose by its numbers: it knows every form of `CUDA_VISIBLE_DEVICES` and has none
    where it is built for CPUs, which files in /dev don't tell. It asks NVML, so no CUDA context is made here. Who runs
    or launches a run imports torch in any case.
    """
    with importing():
        import torch

    found = torch.cuda.device_count()
    # the list of GPUs doesn't say whether this torch works with their driver; that makes no context either
    return found if found < 2 or torch.cuda.is_available() else 0


def check_restarts(max_restarts: int) -> None:
    """Raises UserError for restarts that this process can't make, as it starts no others."""
    if not max_restarts:
        return
    if launched() is not None:
        raise UserError("--max-restarts: a launcher has started this process already; give it there")
    raise UserError(
        f"--max-restarts: {max_restarts}, but this run is one process, which no launcher starts again\n"
        "  next: leave it out, and go on after a stop with --resume; or start several, with --nproc"
    )


def launch(ranks: int, arguments: Sequence[str], *, max_restarts: int) -> None:
    """Run `ossia ARGUMENTS` in so many processes; back when all are done.

    max_restarts  after a failure all are started again so often; they go on from the last checkpoint
    Raises        SystemExit with a rank's exit code where one failed, 130 where this process was asked to stop
    """
    with importing():
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=max_restarts,
        shutdown_timeout=_TO_SAVE_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "ossia", *arguments)
    except SignalException:
        raise SystemExit(130) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # a process that was killed has said nothing itself
            name = signal.Signals(-failure.exitcode).name
            print(
                f"rank {rank}: its process was ended by {name}; to go on: the same command with --resume",
                file=sys.stderr,
            )
        raise SystemExit(max(failure.exitcode, 1)) from None
