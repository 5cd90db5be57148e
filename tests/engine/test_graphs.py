"""The step that a CUDA graph holds: shapes that depend on nothing on the device, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ossia.engine import Engine, Request, Sampling
from ossia.engine.cache import Cache
from ossia.engine.decode import TorchDecoder
from ossia.engine.graphs import GraphDecoder
from ossia.model.lora import TARGETS
from tests.conftest import MakeTiny
from tests.engine.support import adapter, random_prompts
from tests.engine.test_engine import NARROW
from tests.oracle.model_pairs import CPU, load


def filled(tiny: MakeTiny, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32):
    """A model with an adapter on all targets, and a cache with random keys and values of rows of these lengths."""
    base = load(tiny(NARROW), placement="bf16", dtype=dtype)
    model = load(tiny(NARROW), placement="bf16", dtype=dtype, lora=adapter(base, *TARGETS))
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
def test_a_captured_step_says_what_the_plain_one_says(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16", dtype=torch.bfloat16)
    on_device = type(model)(type(model.weights)(model.weights.checkpoint, "bf16", torch.bfloat16, torch.device("cuda")))
    requests = [Request(prompt, Sampling(0), 40) for prompt in random_prompts((3, 60, 17, 130, 1))]
    engine = Engine(on_device)
    session = engine.session()
    assert isinstance(session._decoder, GraphDecoder)
    captured = engine.generate(requests)
    plain = Engine(on_device, decoder="torch").generate(requests)
    for mine, theirs in zip(captured, plain, strict=True):
        first = next((i for i in range(40) if mine.ids[i] != theirs.ids[i]), 40)
        assert first >= 2
        assert mine.logprobs[:first] == pytest.approx(theirs.logprobs[:first], abs=0.1)
