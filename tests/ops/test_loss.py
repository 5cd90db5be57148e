"""Log-probabilities without logits, against `F.cross_entropy` in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ossia.ops.loss
from ossia.ops.loss import linear_logprob, weighted_nll


@pytest.fixture(params=[(4096, 1024), (100, 7)], ids=["one block", "ragged blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_block, row_block = request.param
    monkeypatch.setattr(ossia.ops.loss, "VOCAB_BLOCK", vocab_block)
    monkeypatch.setattr(ossia.ops.loss, "ROW_BLOCK", row_block)


def problem(dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = (torch.randn(20, 16, generator=generator) * spread).to(dtype).requires_grad_()
    head = torch.randn(333, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(333, (20,), generator=generator)
    return h, head, targets, torch.randn(20, generator=generator)


def expected(h: Tensor, head: Tensor, targets: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, head = (x.detach().double().requires_grad_() for x in (h, head))
    logp = -F.cross_entropy(h @ head.T, targets, reduction="none")
    return logp.detach(), *torch.autograd.grad(logp, (h, head), grad.double())


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 2e-3)])
def test_values_and_both_gradients_equal_cross_entropy(dtype: torch.dtype, bound: float) -> None:
    h, head, targets, grad = problem(dtype)
    logp = linear_logprob(h, head, targets)
    assert logp.dtype == torch.float32
    found = (logp.detach(), *torch.autograd.grad(logp, (h, head), grad))
    for mine, true in zip(found, expected(h, head, targets, grad), strict=True):
        assert float((mine.double() - true).norm() / true.norm()) <= bound


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("spread", [1e-4, 40.0])
def test_flat_and_extreme_logits_stay_exact(spread: float) -> None:
    h, head, targets, grad = problem(torch.float32, spread)
    logp = linear_logprob(h, head, targets)
    true, dh, _ = expected(h, head, targets, grad)
    torch.testing.assert_close(logp.double(), true, rtol=2e-6, atol=1e-5)
    assert float((torch.autograd.grad(logp, h, grad)[0].double() - dh).norm() / dh.norm()) <= 1e-5


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("sure", [0.5, 1.0])
def test_in_bf16_what_a_sure_prediction_still_lacks_is_as_exact_as_the_rest(sure: float) -> None:
    h, head, targets, _ = problem(torch.bfloat16)
    h = (h.detach() * 0.1 + sure * head[targets].detach()).requires_grad_()
    logp = linear_logprob(h, head, targets)
    assert bool((logp <= 0).all()), "a probability above 1"
    weights = -1 / logp.detach().expm1()  # every row counts the same, however sure
    found = (logp.detach() * weights, *torch.autograd.grad(logp, (h, head), weights))
    true, *grads = expected(h, head, targets, weights)
    for mine, exact in zip(found, (true * weights, *grads), strict=True):
        assert float((mine.double() - exact).norm() / exact.norm()) <= 0.05


def test_a_frozen_head_gets_no_gradient_and_no_second_pass_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    h, head, targets, _ = problem(torch.float32)
    monkeypatch.setattr(ossia.ops.loss, "_head_gradient", lambda *_: pytest.fail("the head is frozen"))
    linear_logprob(h, head.detach(), targets).sum().backward()
    assert h.grad is not None


def test_the_logits_of_all_rows_never_exist_at_once() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    h, head = torch.randn(3000, 8).requires_grad_(), torch.randn(20_000, 8)
    with Sizes():
        linear_logprob(h, head, torch.zeros(3000, dtype=torch.long)).sum().backward()
    assert largest <= 1024 * 4096 < h.shape[0] * head.shape[0]


def test_the_loss_is_one_sum_over_one_denominator() -> None:
    logp, weights = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1.0, 0.5, 0.0])
    assert float(weighted_nll(logp, weights, 1.5)) == pytest.approx(2.0 / 1.5)
