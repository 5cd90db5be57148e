"""AdamW, the learning rate of every step, gradient clipping, and the checks that stop a run before a bad update.

The arithmetic of AdamW is torch's own `torch.optim.AdamW`, in its fused form on every device: one pass over each
tensor instead of a dozen, elementwise, so nothing depends on the order in which threads finish; with the same inputs
it gave the same bits again, on one thread and on two. What is added here: parameters keep their names (so the state
is a flat table of named tensors that a checkpoint can hold), weights kept in bfloat16 or float16 are updated through
a float32 master copy (an update of 1e-4 is lost in bfloat16, whose neighbours are 0.8% apart), and nothing is written
to a weight until loss and gradients have been seen to be finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ossia.errors import RunError

Schedule = Literal["cosine", "linear", "constant"]
Total = Callable[[float], float]
_MOMENTS = ("exp_avg", "exp_avg_sq")
_NUM_UPDATES = "num_updates"


def warmup_steps(warmup: float, steps: int) -> int:
    """The number of warm-up steps: `warmup` itself if it is 1 or more, else that share of `steps`, rounded.

    Raises RunError if nothing of the run would be left after the warm-up.
    """
    num_warmup = int(warmup) if warmup >= 1 else math.floor(warmup * steps + 0.5)
    if num_warmup >= steps > 0:
        raise RunError(
            f"train.warmup: {warmup:g} is {num_warmup} steps, but the run has only {steps}; "
            f"give fewer than {steps}, or a share of the run such as 0.03"
        )
    return num_warmup


def lr_at(step: int, *, steps: int, peak: float, schedule: Schedule, warmup: float, min_lr_ratio: float) -> float:
    """Learning rate of update number `step`, counted from 1, of a run of `steps` updates.

    With W warm-up steps the rate is peak * step / (W + 1) up to step W and `peak` at step W + 1. From there `cosine`
    and `linear` fall so that they would meet peak * min_lr_ratio at step `steps` + 1, the first that isn't taken: no
    step is spent at a rate of 0. `constant` stays at the peak.

    warmup        >= 1: a number of steps; below 1: a share of `steps` (see `warmup_steps`)
    min_lr_ratio  0..1, the end of the decay as a share of the peak
    Raises        RunError if the warm-up leaves no step of the run
    """
    assert 1 <= step <= steps, (step, steps)
    num_warmup = warmup_steps(warmup, steps)
    if step <= num_warmup:
        return peak * step / (num_warmup + 1)
    done = (step - 1 - num_warmup) / (steps - num_warmup)
    if schedule == "constant":
        return peak
    fall = done if schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))
    return peak * (1.0 - (1.0 - min_lr_ratio) * fall)


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay pulls on a parameter of so many dimensions: matrices yes; norms, sinks and biases no.

    Told by name as well as by shape, because the experts' biases have two dimensions (expert, row).
    """
    return ndim >= 2 and not name.endswith("bias")


def check_loss(loss: float, *, step: int) -> None:
    """Raise RunError if the loss of update number `step` isn't a finite number."""
    if not math.isfinite(loss):
        raise RunError(
            f"step {step}: the loss is {loss}. No update was made: the weights are still those of step {step - 1}.\n"
            "  try: a lower train.learning_rate, a longer train.warmup, dtype: bfloat16 in place of float16, "
            "or `ossia data RECIPE` to look for rows that can't be right"
        )


def gradient_norm(params: Mapping[str, Tensor], *, step: int, total: Total = float) -> float:
    """Global L2 norm over the gradients of all parameters; float32 within a tensor, float64 across tensors.

    total   makes the sum of squares over all ranks of this one's, where each has parts of the parameters
    Raises RunError, naming the first parameter in order, if a gradient is missing or not finite.
    """
    for name, param in params.items():
        if param.grad is None:
            raise RunError(
                f"step {step}: `{name}` is trainable but received no gradient, so it would never change. "
                "No update was made.\n  try: take its target out of adapter.targets; if it should train, report this"
            )
    norms = torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float32).cpu() for p in params.values()])
    squares = float(norms.double().square().sum())
    if not math.isfinite(squares):
        raise RunError(_not_finite(params, norms, step))
    return math.sqrt(total(squares))


def _not_finite(params: Mapping[str, Tensor], norms: Tensor, step: int) -> str:
    """The message for gradients whose norms (one per parameter) aren't all finite."""
    bad = [name for name, norm in zip(params, norms.tolist(), strict=True) if not math.isfinite(norm)]
    grad = params[bad[0]].grad
    num_nan, num_inf = int(grad.isnan().sum()), int(grad.isinf().sum())
    found = f"{num_nan:,} NaN and {num_inf:,} infinite of {grad.numel():,} values"
    if num_nan + num_inf == 0:
        found = f"values up to {float(grad.abs().max()):.1e}, whose norm overflows float32"
    return not_finite(bad[0], found, len(bad), len(params), step)


def not_finite(name: str, found: str, bad: int, tensors: int, step: int) -> str:
    """The message for a gradient in which something was found; of so many tensors so many are bad."""
    return (
        f"step {step}: the gradient of `{name}` has {found}; {bad} of {tensors} trainable tensors are "
        f"affected. No update was made: the weights are still those of step {step - 1}.\n"
        "  try: a lower train.learning_rate, a longer train.warmup, dtype: bfloat16 in place of float16"
    )


class AdamW:
    """AdamW with decoupled weight decay over named parameters.

    Source: arXiv:1711.05101. Weight decay multiplies a weight by 1 - lr * weight_decay, apart from the moments, where
    `decays` says so.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        shapes: Mapping[str, Sequence[int]] | None = None,
        total: Total = float,
    ) -> None:
        """`params` by name, in the order in which errors are looked for; at least one.

        shapes, total  where they are parts of parameters: the shapes of these, and as in `gradient_norm`
        """
        assert params, "nothing to train"
        self._total = total
        ndims = {name: p.ndim if shapes is None else len(shapes[name]) for name, p in params.items()}
        self.params = dict(params)
        self.num_updates = 0
        self._masters = {n: p.detach().float() for n, p in self.params.items() if p.dtype != torch.float32}
        groups = [
            {"params": [self._target(n) for n in self.params if decays(n, ndims[n]) is on], "weight_decay": decay}
            for on, decay in ((True, weight_decay), (False, 0.0))
        ]
        self._torch = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)

    def _target(self, name: str) -> Tensor:
        """The float32 tensor that AdamW updates for this parameter: its master copy, or itself."""
        return self._masters.get(name, self.params[name])

    def update(self, *, loss: float, lr: float, clip: float | None) -> float:
        """Check, clip, update, and drop the gradients; the global gradient norm before clipping.

        lr      of this update (see `lr_at`)
        clip    the gradients are scaled down together so that their global norm is at most this; None: never
        Raises  RunError, before any weight or moment has changed, if the loss or a gradient isn't finite or a
                gradient is missing
        """
        step = self.num_updates + 1
        check_loss(loss, step=step)
        norm = gradient_norm(self.params, step=step, total=self._total)
        if clip is not None and norm > clip:
            for param in self.params.values():
                param.grad.mul_(clip / norm)
        for name, master in self._masters.items():
            master.grad = self.params[name].grad.float()
            self.params[name].grad = None
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()
        self._torch.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, master in self._masters.items():
                self.params[name].copy_(master)
        # torch's fused form leaves the versions as they were, and who generates with these tensors looks at them
        torch.autograd.graph.increment_version(list(self.params.values()))
        self.num_updates = step
        return norm

    def state_bytes(self) -> int:
        """Size of `state_dict()` once an update has been made, in bytes: two float32 moments, and master copies."""
        moments = 2 * 4 * sum(p.numel() for p in self.params.values())
        return moments + 4 * sum(m.numel() for m in self._masters.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the parameters that decides the next update: `exp_avg.NAME`, `exp_avg_sq.NAME` and, where
        there is one, `master.NAME`, all float32 in the parameter's shape, and the scalar `num_updates` (int64).

        The tensors are the live ones, not copies.
        """
        state = {_NUM_UPDATES: torch.tensor(self.num_updates)}
        for name in self.params if self.num_updates else ():
            moments = self._torch.state[self._target(name)]
            state |= {f"{moment}.{name}": moments[moment] for moment in _MOMENTS}
        return state | {f"master.{name}": master for name, master in self._masters.items()}

    def empty_state(self, num_updates: int) -> dict[str, Tensor]:
        """A state after so many updates as `state_dict` names and shapes it, in tensors that take no memory."""
        nothing = torch.zeros(())
        state = {
            f"{moment}.{name}": nothing.expand(param.shape)
            for name, param in self.params.items()
            for moment in _MOMENTS
            if num_updates
        }
        state |= {f"master.{name}": nothing.expand(master.shape) for name, master in self._masters.items()}
        return state | {_NUM_UPDATES: torch.tensor(num_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over, by copy, a state that `state_dict()` of the same parameters gave.

        Raises RunError if a name or a shape is not what these parameters need; nothing has changed then.
        """
        num_updates = int(state[_NUM_UPDATES]) if _NUM_UPDATES in state else 0
        wanted = {name: tensor.shape for name, tensor in self.empty_state(num_updates).items()}
        found = {name: tensor.shape for name, tensor in state.items()}
        if found != wanted:
            name = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))[0]
            raise RunError(
                f"the optimizer state doesn't fit this run: `{name}` is {_shape(found.get(name))} in the checkpoint, "
                f"{_shape(wanted.get(name))} here; was the adapter or the dtype changed since?"
            )
        self.num_updates = num_updates
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(state[f"master.{name}"])
        self._torch.state.clear()
        for name in self.params if num_updates else ():
            target = self._target(name)
            moments = {m: torch.empty_like(target).copy_(state[f"{m}.{name}"]) for m in _MOMENTS}
            self._torch.state[target] = {"step": torch.tensor(float(num_updates), device=target.device), **moments}


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
