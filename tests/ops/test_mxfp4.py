"""MXFP4 against its definition: every byte, every scale, every type, and back."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor

from ossia.errors import CheckpointError
from ossia.kernels.cpu.build import Unavailable
from ossia.kernels.cpu.mxfp4 import load_mxfp4
from ossia.kernels.cpu.pages import Room
from ossia.ops.mxfp4 import ScaleRule, dequantize_mxfp4, quantize_mxfp4

# By definition (OCP Microscaling Formats v1.0): e2m1 codes 0..7, then the same with the sign bit.
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def _by_definition(blocks: Tensor, scales: Tensor) -> Tensor:
    """float64 weights, in which every MXFP4 value is exact."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    return (VALUES[codes.long()] * torch.exp2(scales.double() - 127).unsqueeze(-1)).flatten(-2)


def _every_byte_under(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (S, 16, 16) holding all 256 bytes under each of the S scales."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(len(scales), 1, 1)
    return blocks, scales.to(torch.uint8).unsqueeze(1).repeat(1, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_under_every_scale_is_the_defined_weight_to_the_last_bit(dtype: torch.dtype) -> None:
    blocks, scales = _every_byte_under(torch.arange(255))
    found, expected = dequantize_mxfp4(blocks, scales, dtype), _by_definition(blocks, scales).to(dtype)
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit()), "-0.0 must stay -0.0"


def test_bfloat16_and_float32_lose_nothing() -> None:
    blocks, scales = _every_byte_under(torch.arange(252))  # above, 6 * 2^(s - 127) is beyond both types
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(dequantize_mxfp4(blocks, scales, dtype).double(), _by_definition(blocks, scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formats_nan_scale_gives_nan(dtype: torch.dtype) -> None:
    blocks, scales = _every_byte_under(torch.tensor([255]))
    assert dequantize_mxfp4(blocks, scales, dtype).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantising_writes_where_it_is_told_across_chunk_borders(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 700, 30, 16), dtype=torch.uint8)  # 21,000 blocks an expert: two chunks
    scales = torch.randint(100, 140, (2, 700, 30), dtype=torch.uint8)
    out = torch.full((2, 700, 960), 7.0, dtype=dtype)
    result = dequantize_mxfp4(blocks[1], scales[1], dtype, out=out[1])
    assert result.data_ptr() == out[1].data_ptr()
    assert (out[0] == 7).all()
    assert torch.equal(out[1], _by_definition(blocks[1], scales[1]).to(dtype))


def test_blocks_at_an_odd_address_dequantise_too() -> None:
    raw = torch.arange(161, dtype=torch.uint8)
    blocks, scales = raw[1:].view(1, 10, 16), torch.full((1, 10), 120, dtype=torch.uint8)
    assert torch.equal(dequantize_mxfp4(blocks, scales, torch.bfloat16).double(), _by_definition(blocks, scales))


RULES = pytest.mark.parametrize("rule", ["error", "largest"])


@RULES
def test_weights_on_the_grid_return_as_identical_bytes(rule: ScaleRule) -> None:
    torch.manual_seed(1)
    blocks = torch.randint(0, 256, (253, 64, 16), dtype=torch.uint8)
    blocks[..., 0] |= 6  # a 4 or a 6 in each block, so that no smaller scale would do
    scales = torch.arange(1, 254).clamp(max=252).to(torch.uint8).unsqueeze(1).repeat(1, 64)
    for dtype in (torch.float32, torch.bfloat16):
        again_blocks, again_scales = quantize_mxfp4(dequantize_mxfp4(blocks, scales, dtype), rule)
        assert torch.equal(again_blocks, blocks)
        assert torch.equal(again_scales, scales)


@RULES
def test_weights_on_the_grid_return_as_the_same_weights_even_where_a_smaller_scale_would_do(rule: ScaleRule) -> None:
    torch.manual_seed(2)
    blocks = torch.randint(0, 256, (1000, 4, 16), dtype=torch.uint8) & 0x99 | 0x22  # nothing above 1.5
    scales = torch.randint(1, 253, (1000, 4), dtype=torch.uint8)
    weights = dequantize_mxfp4(blocks, scales, torch.float32)
    again = dequantize_mxfp4(*quantize_mxfp4(weights, rule), torch.float32)
    assert torch.equal(again, weights)
    assert torch.equal(again.signbit(), weights.signbit())


def _nearest(weights: Tensor, scales: Tensor) -> Tensor:
    """Codes by exhaustive search: the nearest value, of two equally near the even code."""
    units = weights.double().unflatten(-1, (-1, 32)) / torch.exp2(scales.double() - 127).unsqueeze(-1)
    distance = (units.abs().unsqueeze(-1) - VALUES[:8]).abs()
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # argmin takes the first of equals
    return order[distance[..., order].argmin(-1)] | (units.signbit().long() << 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_by_the_largest_is_to_the_nearest_value_under_the_smallest_scale_that_does_not_saturate(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(3)
    weights = (torch.randn(600, 64) * torch.exp2(torch.randint(-12, 12, (600, 1)))).to(dtype)
    weights[:200] = (weights[:200] * 8).round() / 8  # coarse: many exact ties
    blocks, scales = quantize_mxfp4(weights, "largest")
    largest = weights.double().abs().unflatten(-1, (-1, 32)).amax(-1)
    unit = torch.exp2(scales.double() - 127)
    assert (largest <= 6 * unit).all()
    assert (largest > 3 * unit)[largest > 0].all()
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
    assert torch.equal(codes, _nearest(weights, scales))


def test_ties_go_to_the_even_code() -> None:
    block = torch.zeros(32)
    block[:9] = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -2.5])
    rounded = dequantize_mxfp4(*quantize_mxfp4(block), torch.float32)
    assert rounded[:9].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -2]


@pytest.mark.parametrize(("largest", "byte"), [(6.0, 127), (6.000001, 128), (3.0, 126), (3.000001, 127), (4.0, 127)])
def test_the_scale_changes_exactly_above_six(largest: float, byte: int) -> None:
    block = torch.zeros(32)
    block[5] = largest
    assert quantize_mxfp4(block)[1].tolist() == [byte]


def _errors_by_scale(weights_N32: Tensor) -> Tensor:
    """(N, 255) float64 squared error of each block under every scale byte that isn't the format's NaN: by search."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    found = []
    for byte in range(255):
        unit = 2.0 ** (byte - 127)
        size = weights_N32.double().abs() / unit
        found.append(((size - VALUES[:8][torch.bucketize(size, middles)]) * unit).square().sum(1))
    return torch.stack(found, dim=1)


def _blocks_to_try() -> dict[str, Tensor]:
    """(N, 32) float32 each, from the harmless to what only just decides for another scale."""
    torch.manual_seed(5)
    spread = torch.exp2(torch.randint(-60, 60, (500, 1)).float())
    fine = torch.tensor([0.25, 0.75, 1.25, 1.75, 0.125, 0.5, 1.0, 2.0, 2.5, 5.0])
    edges = fine[torch.randint(0, len(fine), (3000, 32))]
    edges[:1000] = 0.25  # under half the scale all of them are exact: the most that can be won
    # where a block's largest alone decides: about 3, 4.46875 and 6, from both sides
    edges[:, 7] = torch.tensor([3.0, 4.46875, 6.0])[torch.arange(3000) % 3] * (
        1 + torch.randint(-9, 9, (3000,)) * 2.0**-22
    )
    edges[1500:, 7] = 3 + 3 * torch.rand(1500)
    return {
        "normal": torch.randn(500, 32) * spread,
        "uniform": (torch.rand(500, 32) - 0.5) * spread,
        "heavy-tailed": torch.distributions.StudentT(1.5).sample((500, 32)) * spread,
        "one outlier": torch.cat((torch.randn(500, 31) * 0.1, 10 * torch.randn(500, 1)), dim=1) * spread,
        "few different": (torch.randint(-8, 9, (500, 32)) / 4) * spread,
        "edges": edges,
        "one weight": torch.eye(32) * torch.randn(32, 1),
        "all equal": torch.randn(500, 1).expand(-1, 32),
        "bfloat16": torch.randn(500, 32).bfloat16().float(),
    }


@pytest.mark.parametrize("kind", list(_blocks_to_try()))
def test_no_scale_of_the_format_has_a_smaller_squared_error_than_the_one_taken(kind: str) -> None:
    weights = _blocks_to_try()[kind]
    blocks, scales = quantize_mxfp4(weights)
    taken = (dequantize_mxfp4(blocks, scales, torch.float32).double() - weights.double()).square().sum(1)
    errors = _errors_by_scale(weights)
    assert (taken <= errors.min(1).values * (1 + 1e-14)).all()  # of float64 sums; the squares themselves are exact
    if kind == "edges":
        assert (scales[:, 0] != quantize_mxfp4(weights, "largest")[1][:, 0]).sum() > 100, "half the scale never won"


def test_the_least_error_is_never_above_that_of_the_rules_that_look_at_the_largest_weight_alone() -> None:
    better = torch.zeros(3, dtype=torch.int64)
    for weights in _blocks_to_try().values():
        blocks, scales = quantize_mxfp4(weights)
        taken = (dequantize_mxfp4(blocks, scales, torch.float32).double() - weights.double()).square().sum(1)
        exponent = torch.frexp(weights.abs().amax(1)).exponent - 1
        floor = _errors_by_scale(weights).gather(1, (exponent - 2 + 127).long()[:, None])[:, 0]  # llama.cpp
        up = dequantize_mxfp4(*quantize_mxfp4(weights, "largest"), torch.float32)  # OpenAI
        rules = torch.stack((floor, (up.double() - weights.double()).square().sum(1)))
        assert (taken <= rules.min(0).values * (1 + 1e-14)).all()
        better += (taken < torch.cat((rules, rules.min(0, keepdim=True).values)) * (1 - 1e-6)).sum(1)
    assert (better > 100).all(), f"blocks in which it is better than llama.cpp's rule, OpenAI's, and both: {better}"


@RULES
@pytest.mark.parametrize("dtype", DTYPES)
def test_c_writes_the_same_bytes_as_torch(rule: ScaleRule, dtype: torch.dtype) -> None:
    if isinstance(found := load_mxfp4(), Unavailable):
        pytest.skip(found.reason)
    weights = torch.cat([*_blocks_to_try().values(), torch.randn(70_000, 32), torch.zeros(3, 32), -torch.zeros(3, 32)])
    weights = weights.clamp(-60000, 60000).to(dtype) if dtype == torch.float16 else weights.to(dtype)
    for fast, plain in zip(*(quantize_mxfp4(weights, rule, kernels) for kernels in ("c", "torch")), strict=True):
        assert torch.equal(fast, plain)


def test_the_largest_floats_saturate_instead_of_becoming_infinite() -> None:
    weights = torch.full((2, 32), torch.finfo(torch.float32).max)
    weights[1] = 6 * 2.0**125
    for rule, kernels in itertools.product(("error", "largest"), ("torch", None)):
        found = dequantize_mxfp4(*quantize_mxfp4(weights, rule, kernels), torch.float32)
        assert (found == 6 * 2.0**125).all()


def test_blocks_of_zeros_and_of_the_tiniest_weights_get_a_scale_that_every_reader_takes() -> None:
    tiny = torch.tensor([0.0, 1e-45, -1e-40, 1e-38]).unsqueeze(1).repeat(1, 32)
    blocks, scales = quantize_mxfp4(tiny)
    assert (scales == 1).all()
    assert blocks[2].unique().item() == 0x88  # -0.0


def test_transposed_weights_quantise_as_their_copies() -> None:
    torch.manual_seed(4)
    weights = torch.randn(3, 64, 5)
    for found, expected in zip(quantize_mxfp4(weights.mT), quantize_mxfp4(weights.mT.contiguous()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernels", ["torch", None])
def test_a_weight_that_is_not_finite_is_refused(bad: float, kernels: Literal["torch"] | None) -> None:
    weights = torch.ones(4, 64)
    weights[2, 40] = bad
    with pytest.raises(CheckpointError, match="not finite"):
        quantize_mxfp4(weights, kernels=kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("split", [False, True])
def test_c_expands_to_the_same_bits_as_torch(dtype: torch.dtype, split: bool) -> None:
    if isinstance(found := load_mxfp4(), Unavailable):
        pytest.skip(found.reason)
    torch.manual_seed(6)
    blocks = torch.randint(0, 256, (3, 100, 7, 16), dtype=torch.uint8)  # more than a thread is alone with
    scales = torch.arange(3 * 100 * 7).remainder(256).to(torch.uint8).view(3, 100, 7)  # all of them, NaN too
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    fast, plain = (dequantize_mxfp4(blocks, scales, dtype, kernels=kernels, split=split) for kernels in ("c", "torch"))
    is_nan = plain.isnan()  # of which no reader looks at the bits
    assert torch.equal(fast.isnan(), is_nan)
    assert torch.equal(fast.view(bits)[~is_nan], plain.view(bits)[~is_nan])
    rows = dequantize_mxfp4(blocks, scales, dtype, kernels="torch").view(bits)
    assert torch.equal(torch.cat((rows[:, 0::2], rows[:, 1::2]), 1) if split else rows, plain.view(bits))


def test_what_is_written_into_a_room_of_more_bytes_is_what_new_memory_gets() -> None:
    room, torch_bits = Room(), torch.int16
    first = room.take((4, 64), torch.float32)
    blocks, scales = torch.randint(0, 256, (2, 2, 16), dtype=torch.uint8), torch.full((2, 2), 127, dtype=torch.uint8)
    found = dequantize_mxfp4(blocks, scales, torch.bfloat16, room.take((2, 64), torch.bfloat16))
    assert found.data_ptr() == first.data_ptr(), "a room is one place"
    assert torch.equal(found.view(torch_bits), dequantize_mxfp4(blocks, scales, torch.bfloat16).view(torch_bits))
