"""What an optimizer changes of a model, and how the computation gets copies of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def passing_on(copy: Tensor, pass_on: Callable[[Tensor], None]) -> Tensor:
    """Where gradients are on, `copy` as a leaf that hands each gradient that reaches it on and keeps none."""
    if not torch.is_grad_enabled():
        return copy

    def hand_over(leaf: Tensor) -> None:
        assert leaf.grad is not None
        grad, leaf.grad = leaf.grad, None
        pass_on(grad)

    leaf = copy.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(hand_over)
    return leaf


@dataclass(slots=True)
class Trainable:
    """The tensors that an optimizer changes: float32, by name, in the computation's layout.

    The computation gets copies in its own dtype; a gradient that reaches a copy is added to the tensor's `.grad` in
    float32, so micro-batches don't round each other away.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def use(self, name: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """`scale` times the tensor in `dtype`: where gradients are on, a leaf that passes its gradient on."""
        master = self.tensors[name]
        copy = (master.detach() * scale if scale != 1.0 else master.detach()).to(dtype)

        def pass_on(grad: Tensor) -> None:
            grad = grad.to(torch.float32)
            self.add_grad(name, grad * scale if scale != 1.0 else grad)

        return passing_on(copy, pass_on)

    def add_grad(self, name: str, grad: Tensor) -> None:
        """Add to a tensor's gradient, which may take the float32 tensor given as its own."""
        master = self.tensors[name]
        master.grad = grad if master.grad is None else master.grad.add_(grad)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for tensor in self.tensors.values():
            tensor.grad = None

    @property
    def cut(self) -> bool:
        """Whether the tensors are parts, of which other ranks hold the others; see `model.cut.trained`."""
        return False

    def sum_up(self, name: str) -> None:
        """What is due once the backward of what a tensor belongs to is over: nothing, where tensors are whole."""

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())
