"""Tensors that are cut over the ranks, whole on rank 0 and back: for checkpoints as one process writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ossia.model.cut.ranks import part_of, part_size
from ossia.train.optim import AdamW
from ossia.train.state import SavedState, set_rng_state

if TYPE_CHECKING:
    from ossia.train.ranks.world import World

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class WholeState:
    """An optimizer's state, whole, as `save_checkpoint` wants it."""

    tensors: Mapping[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """By the names of `AdamW.state_dict`."""
        return dict(self.tensors)

    def state_bytes(self) -> int:
        """Once an update has been made, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def stand_ins(shapes: Shapes) -> tuple[dict[str, Tensor], WholeState]:
    """Parameters of these shapes and their moments, in tensors that take no memory."""
    nothing = torch.zeros(())
    params = {name: nothing.expand(tuple(shape)) for name, shape in shapes.items()}
    return params, WholeState({f"{m}.{name}": tensor for name, tensor in params.items() for m in (1, 2)})


def whole(world: World, tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """On rank 0 the tensors whose flat parts the ranks have, in the machine's memory, one after the other; on others
    none. A tensor is named as in `shapes`, or with a word and a point before that; what is scalar is handed on."""
    found = {}
    for name, own in tensors.items():
        if not own.ndim:
            found[name] = own
            continue
        shape = torch.Size(shapes[_parameter(name, shapes)])
        each = part_size(shape.numel(), world.size)
        padded = torch.zeros(each, dtype=own.dtype, device=world.device)
        padded[: len(own)] = own.detach()
        rows = world.to_first(padded)
        if rows is not None:
            found[name] = torch.cat(rows)[: shape.numel()].view(shape).cpu()
    return found if world.leads else {}


def restore_parts(
    world: World, saved: SavedState, params: Mapping[str, Tensor], optimizer: AdamW, shapes: Shapes
) -> None:
    """`SavedState.restore` of a run whose parameters are cut: rank 0 reads, and deals each tensor out.

    Raises  RunError, as `SavedState.restore`, with nothing changed
    """
    tensors, state = dict[str, Tensor](), dict[str, Tensor]()
    if world.leads:
        tensors, state = saved.load({name: (tuple(shape), "torch.float32") for name, shape in shapes.items()})
    generators = saved.generators() if world.leads else None
    num_updates, generators = world.from_first([int(state.get("num_updates", 0)), generators])
    own = optimizer.empty_state(num_updates)
    for name, nothing in own.items():
        if nothing.ndim:
            own[name] = _dealt(world, state.get(name), params[_parameter(name, shapes)], shapes, name)
    optimizer.load_state_dict(own)
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(_dealt(world, tensors.get(name), param, shapes, name))
    set_rng_state(generators)


def _dealt(world: World, tensor: Tensor | None, like: Tensor, shapes: Shapes, name: str) -> Tensor:
    """This rank's part of a tensor that rank 0 has."""
    numel = torch.Size(shapes[_parameter(name, shapes)]).numel()
    each = part_size(numel, world.size)
    rows = None
    if tensor is not None:
        flat = tensor.flatten().to(world.device)
        rows = [torch.zeros(each, device=world.device) for _ in range(world.size)]
        for rank, row in enumerate(rows):
            part = flat[part_of(numel, rank, world.size)]
            row[: len(part)] = part
    return world.part_from_first(torch.empty(each, device=world.device), rows)[: len(like)]


def _parameter(name: str, shapes: Shapes) -> str:
    return name if name in shapes else name.partition(".")[2]
