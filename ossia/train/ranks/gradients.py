"""A step's packs divided over ranks, and the sum of what they found: one denominator, one norm, the same update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ossia.data.pack import Pack
from ossia.errors import RunError
from ossia.train.optim import check_loss, gradient_norm, not_finite

if TYPE_CHECKING:
    from ossia.model.cut.trained import TrainedParts
    from ossia.train.ranks.world import World

_BUCKET = 2**26  # numbers that are summed together: 256 MiB


def share(packs: Sequence[Pack], size: int) -> list[list[int]]:
    """Each rank's packs, by their numbers in the step: the longest first, each to the rank that has the fewest tokens.

    A rank gets none where there are fewer packs than ranks; every rank makes the same choice
    """
    loads, shares = [0] * size, [list[int]() for _ in range(size)]
    for number in sorted(range(len(packs)), key=lambda n: (-packs[n].num_tokens, n)):
        rank = loads.index(min(loads))
        shares[rank].append(number)
        loads[rank] += packs[number].num_tokens
    return [sorted(numbers) for numbers in shares]


def sum_gradients(world: World, tensors: Mapping[str, Tensor], loss: float, *, step: int) -> float:
    """The step's loss; each tensor's `.grad` (float32) becomes the sum over ranks, the same bits on each.

    loss    this rank's part; 0.0, and no gradients, where it had no packs
    Raises  RunError naming the rank whose loss or gradient isn't finite, before anything is summed
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor.grad is not None}
    problem = _problem(present, loss, step)
    said = world.gather([loss if problem is None else 0.0, problem, [n for n in tensors if n not in present]])
    for rank, (_, found, _) in enumerate(said):
        if found is not None:
            raise RunError(f"rank {rank}, {found}")
    nowhere = set.intersection(*(set(missing) for _, _, missing in said))
    for bucket in _buckets([tensor for name, tensor in tensors.items() if name not in nowhere]):
        grads = [torch.zeros_like(t).flatten() if t.grad is None else t.grad.flatten() for t in bucket]
        flat = torch.cat(grads) if len(grads) > 1 else grads[0].contiguous()
        del grads
        world.sum_over_ranks([flat])
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.grad = part.view(tensor.shape)
    return math.fsum(part for part, _, _ in said)


def agree_on_parts(world: World, parts: TrainedParts, loss: float, *, step: int) -> float:
    """`sum_gradients` where gradients have been summed as the layers' backward went: every rank has its part of each.

    Raises  RunError naming the rank whose loss or gradient wasn't finite
    """
    said = world.gather([loss if math.isfinite(loss) else 0.0, _problem_of_parts(parts, loss, step), parts.missing])
    for rank, (_, found, _) in enumerate(said):
        if found is not None:
            raise RunError(f"rank {rank}, {found}")
    for name in set.intersection(*(set(missing) for _, _, missing in said)):
        parts.tensors[name].grad = None  # for the optimizer to refuse
    return math.fsum(part for part, _, _ in said)


def _problem_of_parts(parts: TrainedParts, loss: float, step: int) -> str | None:
    try:
        check_loss(loss, step=step)
    except RunError as error:
        return str(error)
    if bad := parts.not_finite():
        return not_finite(bad[0], "values that are not finite", len(bad), len(parts.tensors), step)
    return None


def _problem(params: Mapping[str, Tensor], loss: float, step: int) -> str | None:
    """What is wrong with a rank's own loss and gradients, in words."""
    try:
        check_loss(loss, step=step)
        if params:
            gradient_norm(params, step=step)
    except RunError as error:
        return str(error)
    return None


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, as many together as a bucket holds; a larger one alone."""
    bucket, size = list[Tensor](), 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
