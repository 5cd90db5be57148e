"""The step that a CUDA graph holds: shapes that depend on nothing on the device, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ossia.engine import Engine, Request, Sampling
from ossia.engine.cache import Cache
from ossia.engine.decode import TorchDecoder, fuses
from ossia.engine.graphs import GraphDecoder
from ossia.kernels import Kernels
from ossia.model.lora import TARGETS
from ossia.model.transformer import Transformer
from ossia.model.weights import Placement, Weights
from tests.conftest import MakeTiny
from tests.engine.support import adapter, random_prompts
from tests.engine.test_engine import NARROW
from tests.oracle.model_pairs import CPU, load


def filled(
    tiny: MakeTiny, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32, placement: Placement = "bf16"
) -> tuple[Transformer, Cache]:
    """A model with an adapter on all targets, and a cache with random keys and values of rows of these lengths."""
    base = load(tiny(NARROW), placement=placement, dtype=dtype)
    model = load(tiny(NARROW), placement=placement, dtype=dtype, lora=adapter(base, *TARGETS))
    cache = Cache(model.arch, model.dtype, CPU, 1 << 30)
    for row, length in enumerate(lengths):
        holding = cache.new()
        cache.extend(holding, length + 1)
        cache.set_row(row, holding)
    generator = torch.Generator().manual_seed(0)
    for layer, lane in enumerate(cache.of_layer):
        lane.pool(layer).copy_(torch.randn(lane.pool(layer).shape, generator=generator))
    return model, cache


def test_a_step_of_static_shapes_says_what_the_plain_one_says_also_with_rows_that_nothing_runs_in(
    tiny: MakeTiny,
) -> None:
    lengths = (3, 15, 16, 63, 64, 130)
    model, cache = filled(tiny, lengths)
    x_BD = torch.randn(8, NARROW.hidden_size, generator=torch.Generator().manual_seed(1))
    position_B = torch.tensor([*lengths, 0, 0])
    for lane in cache.lanes:
        lane.reserve_rows(8)
    with torch.inference_mode():
        plain = TorchDecoder(model, cache.of_layer, [model.lora]).forward(x_BD[:6], position_B[:6], [0] * 6)
        static = TorchDecoder(model, cache.of_layer, [model.lora], grouped=True)
        found = static.forward_rows(0, x_BD, torch.arange(8), position_B, None, static=True)
    assert float((found[:6] - plain).abs().max() / plain.abs().max()) <= 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter; a GPU has the captured step below")
@pytest.mark.parametrize("placement", ["bf16", "resident"])
@pytest.mark.parametrize(("static", "rows"), [(False, 6), (True, 6), (True, 2)])
def test_fused_layers_say_what_the_plain_ones_say(
    tiny: MakeTiny, placement: Placement, static: bool, rows: int
) -> None:
    pytest.importorskip("triton", reason="pip install 'ossia[dev-gpu]'")
    lengths = (3, 15, 16, 63, 64, 130)[-rows:]
    model, cache = filled(tiny, lengths, placement=placement)
    other = filled(tiny, lengths, placement=placement)[1]  # each writes the step's own keys and values
    fused = Transformer(model.weights, lora=model.lora, kernels="triton")
    x_BD = torch.randn(rows, NARROW.hidden_size, generator=torch.Generator().manual_seed(1))
    found, expected = [], []
    with torch.inference_mode():
        for one, mine, out in ((fused, cache, found), (model, other, expected)):
            assert fuses(one, mine.of_layer) == (one is fused)
            decoder = TorchDecoder(one, mine.of_layer, [one.lora])
            routes = torch.zeros(NARROW.num_layers, rows, NARROW.experts_per_token, dtype=torch.int16)
            out += [
                decoder.forward_rows(0, x_BD, torch.arange(rows), torch.tensor(lengths), routes, static=static), routes,
                *(lane.pool(layer) for layer, lane in enumerate(mine.of_layer)),
            ]  # fmt: skip
    assert torch.equal(found[1], expected[1])
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine - theirs).abs().max() / theirs.abs().max()) <= 1e-4


def test_the_static_step_asks_nothing_of_the_device_and_its_shapes_are_known_beforehand(tiny: MakeTiny) -> None:
    """Under fake tensors there are no numbers to wait for: whatever needs one raises."""
    model, cache = filled(tiny, (3, 130), torch.bfloat16)
    decoder = TorchDecoder(model, cache.of_layer, [model.lora], grouped=True)
    routes_LBk = torch.zeros(NARROW.num_layers, 2, NARROW.experts_per_token, dtype=torch.int16)

    def step(x_BD: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
        return decoder.forward_rows(0, x_BD, torch.arange(2), position_B, routes_LBk, static=True)

    def lengths_matter(x_BD: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
        return decoder.forward_rows(0, x_BD, torch.arange(2), position_B, routes_LBk, static=False)

    with torch.no_grad():
        inputs = torch.zeros(2, NARROW.hidden_size, dtype=torch.bfloat16), torch.tensor([3, 130])
        step(*inputs)
        trace = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        assert len(trace.graph.nodes) > 50
        with pytest.raises(Exception, match=r"(?i)data.dependent|item"):
            make_fx(lengths_matter, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("placement", ["bf16", "resident"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("lengths", [(3, 60, 17, 130, 1), (60, 130), (130,)])
def test_a_captured_step_says_what_the_plain_one_says(
    tiny: MakeTiny, placement: Placement, kernels: Kernels, lengths: tuple[int, ...]
) -> None:
    base, device = load(tiny(NARROW), placement="bf16", dtype=torch.bfloat16), torch.device("cuda")
    weights = Weights(base.weights.checkpoint, placement, torch.bfloat16, device)
    lora = adapter(base, *TARGETS).to(device)
    model, plain = (Transformer(weights, lora=lora, kernels=one) for one in (kernels, "torch"))
    requests = [Request(prompt, Sampling(0), 40) for prompt in random_prompts(lengths)]
    engine = Engine(model)
    captures = placement == "bf16" or kernels == "triton"
    assert isinstance(engine.session()._decoder, GraphDecoder if captures else TorchDecoder)
    found, expected = engine.generate(requests), Engine(plain, decoder="torch").generate(requests)
    for mine, theirs in zip(found, expected, strict=True):
        # up to and with the first choice that differs, which then is between tokens as likely as each other
        first = next((i for i in range(40) if mine.ids[i] != theirs.ids[i]), 40)
        assert mine.logprobs[: first + 1] == pytest.approx(theirs.logprobs[: first + 1], abs=0.1)
