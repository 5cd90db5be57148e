"""Attention in Triton against its definition: on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ossia.ops.attention import BACKENDS, Segments
from ossia.ops.attention.reference import attend as definition

pytest.importorskip("triton", reason="pip install 'ossia[dev-gpu]'")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = BACKENDS["triton"]
# documents of one token, and on both sides of a window of 128
SHORT, LONG = [0, 1, 2, 40], [0, 1, 128, 256, 390]


def inputs(tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + heads)
    shapes = ((tokens, heads, size), (tokens, kv_heads, size), (tokens, kv_heads, size), (heads,))
    found = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    found[3] *= 2
    return found


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    return [float((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm()) for a, b in pairs]


@pytest.mark.parametrize(
    ("starts", "window", "heads", "kv_heads", "size"),
    [
        *((SHORT, window, *sizes) for window in (None, 1, 16) for sizes in ((8, 1, 16), (3, 3, 16), (6, 2, 32))),
        *((LONG, window, 8, 1, 16) for window in (None, 127, 128, 129)),
    ],
)
def test_outputs_and_all_gradients_are_those_of_the_definition(
    starts: list[int], window: int | None, heads: int, kv_heads: int, size: int
) -> None:
    segments = Segments(torch.tensor(starts), DEVICE)
    results = []
    for attend in (TRITON.attend, definition):
        leaves = [x.requires_grad_() for x in inputs(starts[-1], heads, kv_heads, size, torch.float32)]
        out = attend(*leaves, segments, window, 0.3)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert max(errors(*results)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_close_to_float32(dtype: torch.dtype) -> None:
    segments = Segments(torch.tensor([0, 30, 61, 62]), DEVICE)
    given = inputs(62, 8, 2, 16, dtype)
    results = []
    for attend, kind in ((TRITON.attend, dtype), (definition, torch.float32)):
        leaves = [x.detach().to(kind).requires_grad_() for x in given]
        out = attend(*leaves, segments, 16, 0.25)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).to(kind)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert max(errors(*results)) <= (2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("window", [None, 5, 16])
@pytest.mark.parametrize(("before", "count"), [(0, 30), (1, 1), (47, 7), (100, 1)])
def test_a_later_part_of_a_document_sees_what_came_before_it(before: int, count: int, window: int | None) -> None:
    q, k, v, sinks = inputs(before + count, 8, 2, 16, torch.float32)
    whole = definition(q, k, v, sinks, Segments(torch.tensor([0, before + count]), DEVICE), window, 0.25)
    first = 0 if window is None else max(0, before - window + 1)
    found = TRITON.prefix(q[before:], k[first:], v[first:], sinks, window, 0.25)
    assert errors([found], [whole[before:]])[0] <= 1e-5


def test_gradients_repeat_bit_for_bit() -> None:
    segments = Segments(torch.tensor([0, 70]), DEVICE)
    results = []
    for _ in range(2):
        leaves = [x.requires_grad_() for x in inputs(70, 8, 2, 16, torch.float32)]
        out = TRITON.attend(*leaves, segments, None, 0.25)
        results.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
