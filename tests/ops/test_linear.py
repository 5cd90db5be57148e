"""Projection with adapter, RMS norm, and dropout that repeats itself."""

from __future__ import annotations

import torch

from ossia.ops.linear import Dropout, Linear, linear, rms_norm


def test_the_adapter_adds_its_low_rank_update() -> None:
    x, weight, bias, a, b = (torch.randn(s, dtype=torch.float64) for s in ((5, 8), (6, 8), (6,), (2, 8), (6, 2)))
    torch.testing.assert_close(linear(x, Linear(weight, bias, a, b)), x @ (weight + b @ a).T + bias)
    torch.testing.assert_close(linear(x, Linear(weight)), x @ weight.T)


def test_rms_norm_equals_its_definition_with_both_gradients() -> None:
    x = torch.randn(7, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)
    grad = torch.randn(7, 16)
    found = torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), grad)
    plain = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), plain)
    for mine, true in zip(found, torch.autograd.grad(plain, (x, weight), grad), strict=True):
        torch.testing.assert_close(mine, true)


def test_dropout_zeroes_its_share_keeps_the_mean_and_repeats_itself() -> None:
    x = torch.ones(200, 500)
    dropped = Dropout(0.25, seed=3)(x, 1)
    assert abs(float((dropped == 0).float().mean()) - 0.25) < 0.01
    assert abs(float(dropped.mean()) - 1.0) < 0.01
    assert torch.equal(dropped, Dropout(0.25, seed=3)(x, 1))
    assert not torch.equal(dropped, Dropout(0.25, seed=3)(x, 2))
    assert not torch.equal(dropped, Dropout(0.25, seed=4)(x, 1))
