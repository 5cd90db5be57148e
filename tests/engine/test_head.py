"""Tokens from hidden states: in C against torch, and which way a request goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ossia.engine import Engine, Request, Sampling
from ossia.engine.head import Draw, Drawn, draw_plainly
from ossia.engine.native import draw_natively
from ossia.kernels.cpu.native import Kernels, Unavailable, load_kernels
from tests.conftest import MakeTiny
from tests.engine.support import adapter, random_prompts
from tests.oracle.model_pairs import load
from tests.shapes import SMALL

FLOAT, BF16 = torch.float32, torch.bfloat16
SIZES = [(64, 1000), (40, 256), (33, 255), (128, 257), (256, 3)]  # hidden, vocabulary; blocks of 256 tokens


def kernels(tiles: bool = True) -> Kernels:
    found = load_kernels(tiles=tiles)
    if isinstance(found, Unavailable):
        pytest.skip(found.reason)
    return found


def in_c(h_BD: Tensor, head_VD: Tensor, draw: Draw, threads: int, *, tiles: bool = True) -> Drawn:
    found = kernels(tiles)
    num_bytes = found.head_workspace_bytes(len(h_BD), *head_VD.shape[::-1], threads) + 64
    return draw_natively(found, h_BD, head_VD, draw, threads, torch.empty(num_bytes, dtype=torch.uint8))


def stage(hidden: int, vocab: int, dtype: torch.dtype, rows: int = 11) -> tuple[Tensor, Tensor, Draw]:
    """Hidden states, a head, and every kind of draw in turn: likeliest, temperatures, logits wanted."""
    generator = torch.Generator().manual_seed(vocab)
    h_BD = torch.randn(rows, hidden, generator=generator).to(dtype)
    head_VD = (torch.randn(vocab, hidden, generator=generator) * hidden**-0.5 * 2).to(dtype)
    kinds = torch.tensor([0.0, 1.0, 0.7, 3.0]).repeat(rows)[:rows]
    uniform_B = torch.rand(rows, generator=generator, dtype=torch.float64)
    return h_BD, head_VD, Draw(kinds, uniform_B, [row for row in (2, 5, 8) if row < rows])


def one(draw: Draw, row: int) -> Draw:
    """What row `row` asks for, alone."""
    return Draw(draw.temperature_B[row : row + 1], draw.uniform_B[row : row + 1], [0] if row in draw.left else [])


def drawn_rows(draw: Draw) -> list[int]:
    return [row for row in range(len(draw.uniform_B)) if row not in draw.left]


def assert_same_bits(found: Drawn, expected: Drawn, rows: Sequence[int]) -> None:
    assert torch.equal(found.ids_B[list(rows)], expected.ids_B[list(rows)])
    assert torch.equal(found.logprob_B[list(rows)], expected.logprob_B[list(rows)])
    assert torch.equal(found.lse_B, expected.lse_B)
    assert torch.equal(found.logits_LV, expected.logits_LV)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize(("hidden", "vocab"), SIZES)
@pytest.mark.parametrize("tiles", [True, False])
def test_a_draw_in_c_is_torchs(hidden: int, vocab: int, dtype: torch.dtype, tiles: bool) -> None:
    h_BD, head_VD, draw = stage(hidden, vocab, dtype, rows=37)
    found, expected = in_c(h_BD, head_VD, draw, 1, tiles=tiles), draw_plainly(h_BD, head_VD, draw)
    # where float32 sums in another order fall on the other side, bfloat16 rounds to its next number
    apart = 2**-7 if dtype == BF16 else 1e-5
    assert torch.allclose(found.logits_LV, expected.logits_LV, rtol=apart, atol=1e-5)
    assert torch.allclose(found.lse_B, expected.lse_B, atol=apart, rtol=0)
    rows = drawn_rows(draw)
    same = [row for row in rows if found.ids_B[row] == expected.ids_B[row]]
    assert len(same) >= len(rows) - 2 * (dtype == BF16)  # equals of bfloat16, and the edges of a running sum
    assert torch.allclose(found.logprob_B[same], expected.logprob_B[same], atol=apart, rtol=0)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize(("hidden", "vocab"), SIZES)
@pytest.mark.parametrize("tiles", [True, False])
def test_a_rows_draw_depends_neither_on_its_batch_nor_on_the_threads(
    hidden: int, vocab: int, dtype: torch.dtype, tiles: bool
) -> None:
    h_BD, head_VD, draw = stage(hidden, vocab, dtype, rows=21)
    together = in_c(h_BD, head_VD, draw, 1, tiles=tiles)
    for threads in (2, 3):
        assert_same_bits(in_c(h_BD, head_VD, draw, threads, tiles=tiles), together, drawn_rows(draw))
    for row in range(len(h_BD)):
        alone = in_c(h_BD[row : row + 1], head_VD, one(draw, row), 1, tiles=tiles)
        assert torch.equal(alone.lse_B, together.lse_B[row : row + 1])
        if row in draw.left:
            assert torch.equal(alone.logits_LV[0], together.logits_LV[draw.left.index(row)])
        else:
            assert torch.equal(alone.ids_B, together.ids_B[row : row + 1])
            assert torch.equal(alone.logprob_B, together.logprob_B[row : row + 1])


def test_tiles_of_numbers_are_used_where_they_are_wanted() -> None:
    """Sums in another order, which shows after rounding in one logit of some thousand."""
    if not kernels().uses_tiles:
        pytest.skip("this machine multiplies no tiles")
    h_BD, head_VD, draw = stage(1024, 4000, BF16)
    tiles, single = (in_c(h_BD, head_VD, draw, 1, tiles=tiles) for tiles in (True, False))
    differ = float((tiles.logits_LV != single.logits_LV).float().mean())
    assert 0 < differ < 0.01
    assert torch.allclose(tiles.logits_LV, single.logits_LV, rtol=2**-7)


@pytest.mark.parametrize("way", [draw_plainly, lambda *x: in_c(*x, 1)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_as_often_as_the_distribution_says(way: Callable[..., Drawn], temperature: float) -> None:
    """A ladder of uniform numbers falls on each token as often as it is likely, and no two orders differ."""
    draws, logits_V = 4000, torch.tensor([1.0, -2.0, 0.0, -30.0, 2.0]).repeat_interleave(120)
    uniform_B = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    draw = Draw(torch.full((draws,), temperature), uniform_B, [])
    drawn = way(torch.ones(draws, 1), logits_V[:, None].contiguous(), draw)
    assert bool((drawn.ids_B.diff() >= 0).all())
    probs_V = (logits_V.double() / temperature).softmax(-1)
    assert float((drawn.ids_B.bincount(minlength=600) / draws - probs_V).abs().max()) <= 1.01 / draws
    assert torch.allclose(drawn.logprob_B, logits_V.log_softmax(-1)[drawn.ids_B], atol=1e-5)


def test_the_edges_of_the_running_sum_fall_on_tokens_that_have_weight() -> None:
    logits_V = torch.full((1000,), -1000.0)
    logits_V[[17, 700]] = torch.tensor([0.0, -30.0])
    uniform_B = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    draw = Draw(torch.ones(2), uniform_B, [])
    drawn = in_c(torch.ones(2, 1), logits_V[:, None].contiguous(), draw, 1)
    assert drawn.ids_B.tolist() == [17, 700]


def test_of_equal_logits_the_first_is_taken_across_blocks_and_threads() -> None:
    logits_V = torch.zeros(2000)
    logits_V[[300, 310, 1500]] = 4.0
    draw = Draw(torch.zeros(3), torch.zeros(3, dtype=torch.float64), [])
    for threads in (1, 2):
        drawn = in_c(torch.ones(3, 1), logits_V[:, None].contiguous(), draw, threads)
        assert drawn.ids_B.tolist() == [300] * 3


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_one_row_that_is_not_finite_says_so_and_leaves_the_others_alone(wrong: float) -> None:
    h_BD, head_VD, draw = stage(64, 1000, FLOAT)
    expected = in_c(h_BD, head_VD, draw, 1)
    broken_BD = h_BD.clone()
    broken_BD[3, 5] = wrong
    for way in (lambda *x: in_c(*x, 1), draw_plainly):
        found = way(broken_BD, head_VD, draw)
        assert found.lse_B.isfinite().tolist() == [row != 3 for row in range(11)]
        others = [row for row in drawn_rows(draw) if row != 3]
        assert found.ids_B[others].tolist() == expected.ids_B[others].tolist()
        assert 0 <= int(found.ids_B[3]) < 1000


def test_a_request_draws_the_same_beside_others_that_need_their_logits(tiny: MakeTiny) -> None:
    """Rows go through the decoder or through their logits, each by its own request."""
    base = load(tiny(dataclasses.replace(SMALL, num_layers=2, layer_types=SMALL.layer_types[:2])), placement="bf16")
    head = {"head": adapter(base, "lm_head")}
    prompts = random_prompts((5, 9, 3, 7, 4))
    requests = [
        Request(prompts[0], Sampling(0), 8),
        Request(prompts[1], Sampling(0.8, seed=1), 8),
        Request(prompts[2], Sampling(0.8, top_p=0.7, seed=2), 8),
        Request(prompts[3], Sampling(seed=3), 8, adapter="head"),
        Request(prompts[4], Sampling(seed=4), 8, top_logprobs=3),
    ]
    together = Engine(base, adapters=head).generate(requests)
    for request, found in zip(requests, together, strict=True):
        (alone,) = Engine(base, adapters=head).generate([request])
        assert found.ids == alone.ids
        assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-6)
        assert [len(top) for top in found.top] == [3] * 8 * bool(request.top_logprobs)
    plain = Engine(base).generate([dataclasses.replace(requests[3], adapter=None)])
    assert plain[0].logprobs != pytest.approx(together[3].logprobs, abs=1e-4)
