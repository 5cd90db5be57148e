"""Prompts through the decode step in C, many tokens of each at once, against the training forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ossia.engine.cache import Cache
from ossia.engine.decode import TorchDecoder
from ossia.engine.prefill import Prefill, Prompt
from ossia.model.lora import TARGETS, Lora
from ossia.model.transformer import Transformer
from ossia.model.weights import Placement
from tests.conftest import MakeTiny
from tests.engine.support import adapter, random_prompts
from tests.engine.test_native import native
from tests.oracle.model_pairs import CPU, load, relative_error
from tests.shapes import UNEQUAL

FLOAT, BF16 = torch.float32, torch.bfloat16
LENGTHS = (1, 7, 8, 9, 64, 65, 130, 700)  # a window of 8, blocks of 64, 512 tokens a call
Found = tuple[list[Tensor], list[Tensor], Tensor]


def read(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    in_c: bool = True,
    parts: int = 10_000,
    adapters: Sequence[Lora | None] = (None,),
    int8: bool = False,
) -> Found:
    """Hidden states and routes of each prompt, and all keys and values afterwards; `parts` tokens of each at a time."""
    models = [model, *(Transformer(model.weights, lora=lora) for lora in adapters[1:])]
    cache = Cache(model.arch, model.dtype, CPU, 1 << 32, int8=int8)
    decoder = native(model, cache, adapters) if in_c else TorchDecoder(model, cache.of_layer, adapters)
    prefill = Prefill(models, cache, decoder)
    read = [Prompt(tuple(ids), i % len(adapters), cache.new(), True) for i, ids in enumerate(prompts)]
    for prompt in read:
        cache.extend(prompt.holding, len(prompt.ids))
    with torch.inference_mode():
        while any(prompt.num_left for prompt in read):
            prefill.run([(prompt, min(parts, prompt.num_left)) for prompt in read if prompt.num_left])
    kept = [
        lane.at(layer, lane.slots(prompt.holding[lane.index], torch.arange(seen, len(prompt.ids)))).flatten()
        for lane in cache.lanes
        for layer in lane.layers
        for prompt in read
        for seen in [max(0, len(prompt.ids) - (lane.window or len(prompt.ids)))]
    ]
    hidden = [prompt.hidden_D for prompt in read if prompt.hidden_D is not None]
    routes = [torch.cat([torch.tensor(part) for part in prompt.routes]) for prompt in read]
    assert len(hidden) == len(read)
    return hidden, routes, torch.cat(kept)


def assert_same(found: Found, expected: Found, tolerance: float) -> None:
    assert relative_error(torch.stack(found[0]), torch.stack(expected[0])) < tolerance
    assert relative_error(found[2], expected[2]) < tolerance
    if tolerance < 1e-4:
        for mine, theirs in zip(found[1], expected[1], strict=True):
            said = mine[:, -1, 0] >= 0  # the last layer of a part's last token, which may be one of several here
            assert torch.equal(mine[:, :-1], theirs[:, :-1])
            assert bool(said[-1])
            assert torch.equal(mine[-1], theirs[-1])


@pytest.mark.parametrize("parts", [10_000, 64, 5])
@pytest.mark.parametrize("placement", ["bf16", "mmap"])
def test_prompts_read_in_c_are_those_of_the_training_forward(tiny: MakeTiny, placement: Placement, parts: int) -> None:
    """Whole, or in parts that begin and end on both sides of windows and blocks."""
    model = load(tiny(UNEQUAL), FLOAT, placement)
    prompts = random_prompts(LENGTHS)
    assert_same(read(model, prompts, parts=parts), read(model, prompts, in_c=False), 5e-6)


@pytest.mark.parametrize("parts", [64, 5])
def test_with_a_cache_of_8_bits_the_parts_before_are_read_as_torch_reads_them(tiny: MakeTiny, parts: int) -> None:
    model, prompts = load(tiny(UNEQUAL), FLOAT, "mmap"), random_prompts((1, 8, 65, 130, 300))
    found = read(model, prompts, parts=parts, int8=True)
    # a number between two of the 8-bit ones may fall to either side by a last digit
    assert_same(found, read(model, prompts, in_c=False, parts=parts, int8=True), 3e-4)
    exact = read(model, prompts)
    assert relative_error(torch.stack(found[0]), torch.stack(exact[0])) > 1e-3


def test_in_bf16_as_well(tiny: MakeTiny) -> None:
    model, prompts = load(tiny(UNEQUAL), BF16, "bf16"), random_prompts(LENGTHS)
    assert_same(read(model, prompts), read(model, prompts, in_c=False), 0.03)


def test_prompts_of_several_adapters_in_one_call(tiny: MakeTiny) -> None:
    model = load(tiny(UNEQUAL), FLOAT, "mmap")
    targets = [target for target in TARGETS if target != "lm_head"]
    adapters = [None, adapter(model, *targets), adapter(model, "down_proj", "k_proj", seed=2)]
    prompts = random_prompts((30, 9, 70, 30, 9))
    found = read(model, prompts, adapters=adapters)
    assert_same(found, read(model, prompts, adapters=adapters, in_c=False), 5e-6)
    plain = read(model, prompts)
    changed = [not torch.equal(a, b) for a, b in zip(found[0], plain[0], strict=True)]
    assert changed == [False, True, True, False, True]


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_a_prompts_bits_depend_neither_on_its_mates_nor_on_the_threads(tiny: MakeTiny, dtype: torch.dtype) -> None:
    model = load(tiny(UNEQUAL), dtype, "mmap")
    prompts = random_prompts((3, 8, 40, 70, 100, 900))  # two calls
    together = read(model, prompts)
    eight = read(model, prompts, int8=True)
    assert torch.equal(read(model, prompts[-1:], int8=True)[0][0], eight[0][-1]), "cut where it is cut alone"
    for place, prompt in enumerate(prompts):
        assert torch.equal(read(model, [prompt])[0][0], together[0][place])
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            again = read(model, prompts)
            assert torch.equal(torch.stack(again[0]), torch.stack(together[0]))
            assert torch.equal(again[2], together[2])
    finally:
        torch.set_num_threads(1)


def test_a_large_model_reads_prompts_through_the_training_forward(tiny: MakeTiny) -> None:
    large = dataclasses.replace(UNEQUAL, hidden_size=2048, num_layers=1, layer_types=UNEQUAL.layer_types[:1])
    small, big = (load(tiny(arch), FLOAT, "mmap") for arch in (UNEQUAL, large))
    reads = [native(model, Cache(model.arch, FLOAT, CPU, 1 << 30), [None]).reads_prompts for model in (small, big)]
    assert reads == [True, False]
