from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ossia.errors import RunError
from ossia.train.optim import AdamW, decays, lr_at, warmup_steps


def rates(steps: int, **changes: object) -> list[float]:
    how: dict = {"peak": 1.0, "schedule": "cosine", "warmup": 0, "min_lr_ratio": 0.0} | changes
    return [lr_at(step, steps=steps, **how) for step in range(1, steps + 1)]


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"w{i}": nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for i, s in enumerate(shapes)}


def adamw(params: dict[str, Tensor], weight_decay: float = 0.0) -> AdamW:
    return AdamW(params, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)


def set_gradients(params: dict[str, Tensor], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)


def test_a_linear_schedule_goes_in_equal_steps_to_a_zero_that_is_never_taken() -> None:
    assert rates(5, schedule="linear") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(4, schedule="linear", min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_a_cosine_schedule_is_half_way_in_the_middle_and_symmetric() -> None:
    found = rates(8)
    assert found == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(8)])
    assert rates(8, min_lr_ratio=0.5)[4] == pytest.approx(0.75)


def test_warm_up_rises_in_equal_steps_to_the_peak_and_the_decay_starts_there() -> None:
    assert rates(7, schedule="linear", warmup=3) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
    assert rates(6, schedule="constant", warmup=2) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0])


def test_warm_up_is_a_share_of_the_run_below_one_and_a_count_from_one_on() -> None:
    assert [warmup_steps(0.03, 500), warmup_steps(0.03, 10), warmup_steps(1, 500), warmup_steps(20, 500)] == [
        15,
        0,
        1,
        20,
    ]


def test_a_warm_up_as_long_as_the_run_is_an_error_that_says_how_long_it_may_be() -> None:
    with pytest.raises(RunError, match=r"train.warmup: 10 is 10 steps, but the run has only 8; give fewer than 8"):
        rates(8, warmup=10)


def test_the_first_update_moves_every_weight_by_the_learning_rate_against_its_gradient() -> None:
    params = parameters((3, 4))
    before = params["w0"].detach().clone()
    set_gradients(params, 1)
    signs = params["w0"].grad.sign()
    adamw(params).update(loss=1.0, lr=0.01, clip=None)
    torch.testing.assert_close(params["w0"].detach(), before - 0.01 * signs, rtol=0, atol=1e-6)


def test_weight_decay_shrinks_matrices_apart_from_the_gradient_and_leaves_biases_and_norms_alone() -> None:
    params = {"proj.weight": torch.ones(2, 2), "norm.weight": torch.ones(2), "experts.down_proj_bias": torch.ones(2, 2)}
    for param in params.values():
        param.grad = torch.zeros_like(param)
    adamw(params, weight_decay=0.1).update(loss=1.0, lr=0.5, clip=None)
    assert [float(p.flatten()[0]) for p in params.values()] == pytest.approx([0.95, 1.0, 1.0])
    assert [decays(name, param.ndim) for name, param in params.items()] == [True, False, False]


def test_many_updates_follow_the_papers_recurrence_in_double_precision() -> None:
    params = parameters((5, 7), (3, 3))
    optimizer, lr, decay = adamw(params, weight_decay=0.1), 0.02, 0.1
    wanted = {name: p.detach().double() for name, p in params.items()}
    mean, square = ({name: torch.zeros_like(w) for name, w in wanted.items()} for _ in range(2))
    for step in range(1, 20):
        set_gradients(params, step, scale=0.05)
        for name, param in params.items():
            grad = param.grad.double()
            mean[name] = 0.9 * mean[name] + 0.1 * grad
            square[name] = 0.95 * square[name] + 0.05 * grad**2
            move = mean[name] / (1 - 0.9**step) / ((square[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            wanted[name] = wanted[name] * (1 - lr * decay) - lr * move
        optimizer.update(loss=1.0, lr=lr, clip=None)
    for name, param in params.items():
        torch.testing.assert_close(param.detach().double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_gradients_over_the_limit_are_scaled_together_and_the_norm_before_is_returned() -> None:
    seen: list[Tensor] = []
    for clip, scale in ((2.5, 0.5), (5.0, 1.0), (None, 1.0)):
        params = {"a": torch.zeros(1), "b": torch.zeros(1)}
        params["a"].grad, params["b"].grad = torch.tensor([3.0]), torch.tensor([4.0])
        grads = [p.grad for p in params.values()]
        optimizer = adamw(params)
        assert optimizer.update(loss=1.0, lr=0.1, clip=clip) == pytest.approx(5.0)
        moments = optimizer.state_dict()
        seen.append(torch.cat([moments["exp_avg.a"], moments["exp_avg.b"]]))
        torch.testing.assert_close(seen[-1], 0.1 * scale * torch.tensor([3.0, 4.0]))
        assert all(p.grad is None for p in params.values()), grads


def test_a_bfloat16_weight_learns_from_updates_smaller_than_its_own_spacing() -> None:
    params = {"w": torch.ones(4, 4, dtype=torch.bfloat16)}
    optimizer = adamw(params)
    for _ in range(100):
        params["w"].grad = torch.ones_like(params["w"])
        optimizer.update(loss=1.0, lr=1e-4, clip=None)
    assert float(params["w"][0, 0]) == pytest.approx(0.99, abs=0.004)
    assert params["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_before_anything_changed(bad: float) -> None:
    params = parameters((2, 3))
    optimizer, before = adamw(params), params["w0"].detach().clone()
    set_gradients(params, 1)
    with pytest.raises(
        RunError, match=r"step 1: the loss is -?(nan|inf)\. No update was made: .* step 0\.\n  try: a lower"
    ):
        optimizer.update(loss=bad, lr=0.1, clip=1.0)
    assert torch.equal(params["w0"], before)
    assert optimizer.num_updates == 0


def test_a_gradient_that_is_not_finite_stops_before_anything_changed_and_names_the_first_one() -> None:
    params = parameters((2, 3), (4,), (5,))
    optimizer = adamw(params)
    set_gradients(params, 1)
    optimizer.update(loss=1.0, lr=0.1, clip=1.0)
    before = {n: t.clone() for n, t in (optimizer.state_dict() | params).items()}
    set_gradients(params, 2)
    params["w1"].grad[2], params["w2"].grad[0], params["w2"].grad[3] = math.nan, math.inf, math.nan
    message = r"step 2: the gradient of `w1` has 1 NaN and 0 infinite of 4 values; 2 of 3 trainable tensors"
    with pytest.raises(RunError, match=message):
        optimizer.update(loss=1.0, lr=0.1, clip=1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in (optimizer.state_dict() | params).items())


def test_finite_gradients_whose_norm_overflows_are_told_apart_from_infinite_ones() -> None:
    params = parameters((2, 2))
    params["w0"].grad = torch.full((2, 2), 3e38)
    with pytest.raises(RunError, match=r"`w0` has values up to 3\.0e\+38, whose norm overflows float32"):
        adamw(params).update(loss=1.0, lr=0.1, clip=1.0)


def test_a_parameter_without_a_gradient_is_an_error_and_not_skipped() -> None:
    params = parameters((2, 2), (3,))
    params["w0"].grad = torch.ones(2, 2)
    with pytest.raises(RunError, match=r"step 1: `w1` is trainable but received no gradient"):
        adamw(params).update(loss=1.0, lr=0.1, clip=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_optimizer_with_the_saved_state_goes_on_in_the_same_bits(dtype: torch.dtype) -> None:
    params = parameters((33, 7), (5,), dtype=dtype)
    optimizer = adamw(params, weight_decay=0.1)
    for step in range(1, 9):
        if step == 5:
            saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
            copies = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
            other = adamw(copies, weight_decay=0.1)
            other.load_state_dict(saved)
        set_gradients(params, step)
        optimizer.update(loss=1.0, lr=0.01, clip=1.0)
        if step >= 5:
            set_gradients(copies, step)
            other.update(loss=1.0, lr=0.01, clip=1.0)
    assert other.num_updates == 8
    found, wanted = other.state_dict() | copies, optimizer.state_dict() | params
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_size_of_the_state_is_known_before_the_first_update() -> None:
    params = parameters((4, 4)) | {"half": nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))}
    optimizer = adamw(params)
    promised = optimizer.state_bytes()
    set_gradients(params, 1)
    optimizer.update(loss=1.0, lr=0.1, clip=None)
    held = sum(t.numel() * t.element_size() for name, t in optimizer.state_dict().items() if name != "num_updates")
    assert promised == held == 2 * 4 * 24 + 4 * 8


def test_a_state_of_other_parameters_is_refused_by_name() -> None:
    params, others = parameters((2, 2)), parameters((2, 3))
    optimizer = adamw(params)
    set_gradients(others, 1)
    other = adamw(others)
    other.update(loss=1.0, lr=0.1, clip=None)
    with pytest.raises(RunError, match=r"`exp_avg.w0` is \(2, 3\) in the checkpoint, \(2, 2\) here"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(RunError, match=r"`num_updates` is missing in the checkpoint"):
        optimizer.load_state_dict({})


def test_one_thread_and_two_give_the_same_bits() -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = parameters((301, 257), (1001,))
        optimizer = adamw(params, weight_decay=0.1)
        for step in range(3):
            set_gradients(params, step)
            optimizer.update(loss=1.0, lr=0.01, clip=None)
        found.append(torch.cat([p.detach().flatten() for p in params.values()]))
    torch.set_num_threads(1)
    assert torch.equal(*found)
