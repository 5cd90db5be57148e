"""Sink attention: the block and per-document paths against the dense definition, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ossia.ops.attention import Backend, Kept, Segments, prefix_attention, sink_attention

STARTS = ([0, 50], [0, 300], [0, 1, 130, 259, 700], [0, 128, 256], [0, 127, 128, 129, 258])


def inputs(num_tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(num_tokens, heads, 64) for heads in (8, 2, 2))
    return [x.to(dtype).requires_grad_() for x in (q, k, v, torch.randn(8) * 2)]


def run(backend: Backend, starts: list[int], window: int | None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The output and the gradients of q, k, v and sinks for a fixed random gradient."""
    segments, tensors = Segments(torch.tensor(starts)), inputs(starts[-1], dtype)
    out = sink_attention(*tensors, segments, window=window, scale=0.125, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("window", [None, 128, 16])
@pytest.mark.parametrize("starts", STARTS, ids=str)
def test_the_cpu_kernels_equal_the_dense_definition_with_all_gradients(starts: list[int], window: int | None) -> None:
    assert max(errors(run("cpu", starts, window), run("reference", starts, window))) <= 1e-6


@pytest.mark.parametrize("window", [None, 128])
def test_bf16_kernels_stay_close_to_float32(window: int | None) -> None:
    starts = [0, 200, 500]
    exact = run("reference", starts, window)
    assert max(errors(run("cpu", starts, window, torch.bfloat16), exact)) <= 2e-2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("window", [None, 128, 16])
def test_changing_one_document_changes_no_other(backend: Backend, window: int | None) -> None:
    segments = Segments(torch.tensor([0, 100, 240, 300]))
    q, k, v, sinks = (x.detach() for x in inputs(300))
    before = sink_attention(q, k, v, sinks, segments, window=window, scale=0.125, backend=backend)
    for x in (q, k, v):
        x[100:240] += 1.0
    after = sink_attention(q, k, v, sinks, segments, window=window, scale=0.125, backend=backend)
    assert torch.equal(before[:100], after[:100])
    assert torch.equal(before[240:], after[240:])
    assert not torch.equal(before[100:240], after[100:240])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("window", [None, 128, 16])
def test_documents_that_share_their_beginning_attend_and_learn_as_if_each_had_its_own(
    backend: Backend, window: int | None
) -> None:
    prefix, own = 150, (40, 1, 90)
    rows = torch.arange(prefix), *torch.arange(prefix, prefix + sum(own)).split(own)
    unfold = torch.cat([torch.cat((rows[0], mine)) for mine in rows[1:]])
    starts = torch.tensor([0, *(prefix + n for n in own)]).cumsum(0)
    shared = inputs(prefix + sum(own))
    apart = [x.detach()[unfold].requires_grad_() for x in shared[:3]] + [shared[3].detach().requires_grad_()]
    out = sink_attention(*shared, Segments(starts, unfold=unfold), window=window, scale=0.125, backend=backend)
    expected = sink_attention(*apart, Segments(starts), window=window, scale=0.125, backend=backend)
    assert errors([out[unfold].detach()], [expected.detach()])[0] <= 1e-6
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    once = torch.zeros_like(expected)  # of a shared row the gradient counts once, at its first document
    once[:prefix] = grad[:prefix]
    for row, mine in enumerate(rows[1:]):
        once[int(starts[row]) + prefix : int(starts[row + 1])] = grad[mine]
    found, wanted = torch.autograd.grad(out, shared, grad), torch.autograd.grad(expected, apart, once)
    summed = [torch.zeros_like(x).index_add(0, unfold, g) for x, g in zip(shared[:3], wanted[:3], strict=True)]
    assert max(errors(list(found), [*summed, wanted[3]])) <= 1e-5


def test_a_window_of_128_sees_the_last_128_keys_including_its_own() -> None:
    segments = Segments(torch.tensor([0, 400]))
    q, k, v, sinks = (x.detach() for x in inputs(400))
    before = sink_attention(q, k, v, sinks, segments, window=128, scale=0.125, backend="cpu")
    v[100] += 1.0
    changed = (sink_attention(q, k, v, sinks, segments, window=128, scale=0.125, backend="cpu") != before).flatten(1)
    assert changed.any(1).nonzero()[:, 0].tolist() == list(range(100, 228))


def test_rescaling_outside_and_dropping_the_gradient_of_the_log_sum_exp_is_wrong() -> None:
    """The negative control: what looks like a shortcut has the right output and the wrong gradient."""
    q, k, v, sinks = inputs(200)
    causal = torch.ones(200, 200, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(4, 1)) * 0.125
    lse = scores.masked_fill(~causal, -torch.inf).logsumexp(-1)
    plain = torch.einsum("hqk,khd->qhd", (scores - lse[..., None]).masked_fill(~causal, -torch.inf).exp(),
                         v.repeat_interleave(4, 1))  # fmt: skip
    shortcut = plain * (lse.detach() - sinks[:, None]).sigmoid().T[..., None]
    exact = run("cpu", [0, 200], None)
    assert max(errors([shortcut.detach()], exact[:1])) <= 1e-6
    grad = torch.randn(shortcut.shape, generator=torch.Generator().manual_seed(1))
    dq, dk, _ = torch.autograd.grad(shortcut, (q, k, v), grad)
    assert min(errors([dq, dk], exact[1:3])) >= 1e-2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("window", [None, 128, 16])
@pytest.mark.parametrize(("before", "count"), [(0, 300), (1, 1), (130, 7), (15, 300), (600, 520)])
def test_a_later_part_of_a_document_sees_what_came_before_it(
    before: int, count: int, window: int | None, backend: Backend
) -> None:
    total = before + count
    q, k, v, sinks = (x.detach() for x in inputs(total))
    whole = sink_attention(
        q, k, v, sinks, Segments(torch.tensor([0, total])), window=window, scale=0.125, backend="reference"
    )
    first = 0 if window is None else max(0, before - window + 1)  # a ring keeps no more than that
    part = prefix_attention(q[before:], k[first:], v[first:], sinks, window=window, scale=0.125, backend=backend)
    assert max(errors([part], [whole[before:]])) <= 1e-6


@pytest.mark.parametrize("starts", STARTS, ids=str)
def test_kept_results_are_taken_in_their_order_and_once(starts: list[int]) -> None:
    segments, tensors, kept = Segments(torch.tensor(starts)), inputs(starts[-1]), Kept()
    how = {"window": None, "scale": 0.125, "backend": "cpu"}
    expected = run("cpu", starts, None)
    with torch.no_grad():
        first = sink_attention(*tensors, segments, **how, kept=kept)
    kept.again = True
    out = sink_attention(*tensors, segments, **how, kept=kept)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = [out.detach(), *torch.autograd.grad(out, tensors, grad)]
    assert torch.equal(first, expected[0])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    with pytest.raises(IndexError):
        sink_attention(*tensors, segments, **how, kept=kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 128])
def test_a_later_part_on_cuda_stays_close_to_float32(window: int | None) -> None:
    q, k, v, sinks = (x.detach() for x in inputs(700))
    exact = prefix_attention(q[400:], k, v, sinks, window=window, scale=0.125, backend="reference")
    on_device = [x.to("cuda", torch.bfloat16) for x in (q[400:], k, v, sinks)]
    found = prefix_attention(*on_device, window=window, scale=0.125, backend="flash")
    assert max(errors([found.cpu()], [exact])) <= 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("starts", STARTS, ids=str)
def test_the_cuda_kernel_stays_close_to_float32_with_all_gradients(starts: list[int], window: int | None) -> None:
    exact = run("reference", starts, window)
    device = torch.device("cuda")
    tensors = [x.detach().to(device).requires_grad_() for x in inputs(starts[-1], torch.bfloat16)]
    out = sink_attention(*tensors, Segments(torch.tensor(starts), device), window=window, scale=0.125, backend="flash")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    found = [out.detach(), *torch.autograd.grad(out, tensors, grad)]
    assert max(errors([x.cpu() for x in found], exact)) <= 2e-2
