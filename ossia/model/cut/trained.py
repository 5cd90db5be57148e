"""Weights that are trained in full, cut over the ranks: float32 masters, their gradients and with them AdamW's moments.

Each tensor is seen flat and lies over the ranks as DTensor's `Shard(0)` would lay it, so an optimizer goes over the
parts as it would over the whole. What travels together is a group: the embedding, a layer, or the final norm with the
head. A group's parts are cast to the computation's dtype and gathered in one exchange, while the group before computes;
of the whole gradients, summed over micro-batches in float32, each rank gets the sum of its part, in one more, as soon
as the group's backward is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ossia.model.budget.weights import EMBEDDING, HEAD, is_of_experts
from ossia.model.cut.home import Home
from ossia.model.cut.ranks import Ranks, part_size
from ossia.model.trainable import Trainable, passing_on

_ALIGNED = 16  # numbers: from a multiple of that on each tensor begins in a part


class _Place(NamedTuple):
    """Where a tensor's pieces are in the parts of its group: from `start` on, of `each` numbers at most."""

    start: int
    each: int


class TrainedParts(Trainable):
    """A model's weights, float32, of which `tensors` has this rank's flat parts.

    shapes    of the whole tensors, by name, in the computation's layout
    gathered  bytes that were gathered so far, the own ones among them; summed: those of gradients
    staying   a rank's part of what is of experts is some experts, whole: nobody gathers it, and its gradient is there
    """

    def __init__(
        self,
        parts: dict[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        ranks: Ranks,
        dtype: torch.dtype,
        home: Home,
        *,
        staying: bool = False,
    ) -> None:
        super().__init__(parts)
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.gathered = self.summed = 0
        self._ranks, self._dtype, self._home = ranks, dtype, home
        self._groups: dict[str, list[str]] = {}
        self._staying: dict[str, list[str]] = {}
        for name in self.shapes:
            groups = self._staying if staying and is_of_experts(name) else self._groups
            groups.setdefault(group_of(name), []).append(name)
        self._order = list(self._groups)  # the embedding, layers, the head: as a forward needs them
        self._places: dict[str, _Place] = {}
        self._part_sizes = {group: self._lay_out(names) for group, names in self._groups.items()}
        self._rows: dict[int, Tensor] = {}  # by size: layers come in the same one
        self._at: str | None = None
        self._here: dict[str, Tensor] = {}
        self._coming: tuple[str, Tensor, Callable[[], None]] | None = None
        self._summing: tuple[str, Tensor, Tensor, Callable[[], None]] | None = None
        self._grads: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self.missing: list[str] = []

    @property
    def cut(self) -> bool:
        return True

    @property
    def num_parameters(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def use(self, name: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """The whole tensor, gathered with its group: until another group is asked for."""
        assert (dtype, scale) == (self._dtype, 1.0)
        group = group_of(name)
        if name in self._staying.get(group, ()):
            return passing_on(self._own(name), lambda grad: self._add_own(name, grad.to(torch.float32)))
        if group != self._at:
            self._take(group)
        return passing_on(self._here[name], lambda grad: self.add_grad(name, grad.to(torch.float32)))

    def _own(self, name: str) -> Tensor:
        """The rank's experts, in the computation's dtype."""
        own = self.tensors[name].detach().to(self._dtype)
        return own.to(self._home.device).view(-1, *self.shapes[name][1:])

    def _add_own(self, name: str, grad: Tensor) -> None:
        part, grad = self.tensors[name], grad.flatten().to(self._home.place)
        part.grad = grad if part.grad is None else part.grad.add_(grad)

    def add_grad(self, name: str, grad: Tensor) -> None:
        """Add to the whole tensor's gradient, which may take the float32 tensor given as its own."""
        before = self._grads.get(name)
        self._grads[name] = grad if before is None else before.add_(grad)

    def zero_grad(self) -> None:
        super().zero_grad()
        self._grads.clear()
        self._norms.clear()
        self.missing = []

    def sum_up(self, name: str) -> None:
        """Begin to sum the gradients of the group that a tensor is in over the ranks: its backward is over on this one.

        The sum goes on while the next group is differentiated, and is waited for when that one's begins; the
        embedding's, which is the last, at once.
        """
        self._end_sum()
        group = group_of(name)
        size, each = self._ranks.size, self._part_sizes[group]
        rows = torch.zeros((size, each), device=self._home.device)
        for one in self._groups[group]:
            grad = self._grads.pop(one, None)
            if grad is None:
                self.missing.append(one)
                continue
            self._norms[one] = torch.linalg.vector_norm(grad)
            _deal_out(grad.flatten(), rows, self._places[one])
        for one in self._staying.get(group, ()):
            if self.tensors[one].grad is None:
                self.missing.append(one)
                self.tensors[one].grad = torch.zeros_like(self.tensors[one])
            self._norms[one] = torch.linalg.vector_norm(self.tensors[one].grad)
        part = torch.empty(each, device=rows.device)
        self.summed += rows.nbytes
        self._summing = group, part, rows, self._ranks.begin_sum(part, rows.view(-1))
        if self._at == group:
            self._at, self._here = None, {}
        if group == EMBEDDING:
            self._end_sum()

    def _end_sum(self) -> None:
        """Wait for the sum that was begun last, and give every tensor of its group its part of the gradient."""
        if self._summing is None:
            return
        group, part, _, wait = self._summing
        wait()
        self._summing = None
        part = part.to(self._home.place)
        for one in self._groups[group]:
            start = self._places[one].start
            self.tensors[one].grad = part[start : start + self.tensors[one].numel()]

    def not_finite(self) -> list[str]:
        """Tensors whose gradient on this rank, before it was summed, wasn't finite."""
        if not self._norms:
            return []
        finite = torch.stack(list(self._norms.values())).isfinite().tolist()
        return [name for name, fine in zip(self._norms, finite, strict=True) if not fine]

    def _lay_out(self, names: Sequence[str]) -> int:
        """Places for a group's tensors; the numbers of a part of it."""
        end = 0
        for name in names:
            self._places[name] = _Place(end, part_size(self.shapes[name].numel(), self._ranks.size))
            end += -(-self._places[name].each // _ALIGNED) * _ALIGNED
        return end

    def _take(self, group: str) -> None:
        """Put the whole tensors of a group where `use` finds them, and send for those that are needed next."""
        before, self._at, self._here = self._at, None, {}
        if self._coming is not None and self._coming[0] != group:
            self._coming[2]()
            self._coming = None
        if self._coming is None:
            self._send(group)
        assert self._coming is not None
        _, rows, wait = self._coming
        wait()
        self._coming = None
        for name in self._groups[group]:
            start, each = self._places[name]
            shape = self.shapes[name]
            whole = torch.empty((self._ranks.size, each), dtype=rows.dtype, device=rows.device)
            whole.copy_(rows[:, start : start + each])  # the rows are for the next group
            self._here[name] = whole.view(-1)[: shape.numel()].view(shape)
        self._at = group
        if (following := self._after(group, before)) is not None:
            self._send(following)

    def _after(self, group: str, before: str | None) -> str | None:
        """What a step asks for next: down to the head, and back from the last layer but one, whose graph is kept."""
        index, last = self._order.index(group), len(self._order) - 1
        down = group == self._order[last] or (before is None and index > 0)
        if not down:
            return self._order[index + 1]
        found = last - 2 if index == last else index - 1
        return self._order[found] if torch.is_grad_enabled() and found > 0 else None

    def _send(self, group: str) -> None:
        each = self._part_sizes[group]
        part = self._home.room(each, self._dtype)
        for name in self._groups[group]:
            own = self.tensors[name].detach()
            part[self._places[name].start :][: own.numel()].copy_(own)
        layer = group not in (self._order[0], self._order[-1])
        rows = self._rows.get(each) if layer else None
        if rows is None:
            rows = torch.empty((self._ranks.size, each), dtype=self._dtype, device=self._home.device)
            if layer:
                self._rows[each] = rows
        self.gathered += rows.nbytes
        self._coming = group, rows, self._home.begin_gather(self._ranks, rows.view(-1), part)


def group_of(name: str) -> str:
    """What a tensor travels with: its layer, the embedding or the head."""
    if name.startswith("model.layers."):
        return ".".join(name.split(".")[:3])
    return EMBEDDING if name == EMBEDDING else HEAD


def _deal_out(flat: Tensor, rows: Tensor, place: _Place) -> None:
    """Write a flat tensor's pieces into the ranks' rows."""
    start, each = place
    full, rest = divmod(len(flat), each)
    rows[:full, start : start + each] = flat[: full * each].view(full, each)
    if rest:
        rows[full, start : start + rest] = flat[full * each :]
