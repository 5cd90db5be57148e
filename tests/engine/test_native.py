"""The decode step in C against the one in torch, and against the training forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ossia.engine.cache import Cache
from ossia.engine.decode import Decoder, TorchDecoder
from ossia.engine.native import NativeDecoder, Panels, find_kernels
from ossia.kernels.cpu.native import Kernels, Unavailable, load_kernels
from ossia.model.arch import Arch, Layout, alternating_layers
from ossia.model.lora import TARGETS, Lora, LoraSpec
from ossia.model.transformer import Transformer
from ossia.model.weights import Placement
from ossia.ops.linear import linear
from tests.conftest import MakeTiny
from tests.oracle.model_pairs import CPU, held_out, load, pack_of, relative_error
from tests.shapes import UNEQUAL

FLOAT, BF16 = torch.float32, torch.bfloat16
# a window of 8, blocks of 64, 512 slots that share a maximum
EDGES = (0, 1, 7, 8, 9, 16, 63, 64, 65, 127, 128, 300, 511, 512, 513)
PLACES: list[tuple[Placement, Layout]] = [("bf16", "mxfp4"), ("mmap", "mxfp4"), ("resident", "mxfp4"), ("mmap", "bf16")]
# 32 inputs are one MXFP4 block; 10 heads of 8 no whole vector; an odd number of experts
ODD = dataclasses.replace(
    UNEQUAL,
    hidden_size=32,
    num_layers=3,
    layer_types=alternating_layers(3),
    num_heads=10,
    head_dim=8,
    num_kv_heads=1,
    num_experts=33,
    experts_per_token=4,
)


def adapter(model: Transformer, ranks: dict[str, int], seed: int = 1) -> Lora:
    """An adapter whose B isn't zero, with a rank of its own for each target."""
    spec = LoraSpec({target: (rank, 2.0 * rank) for target, rank in ranks.items()})
    lora = Lora.fresh(model.arch, spec, seed=seed, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in lora.trainable.tensors.items():
        if name.endswith("lora_B"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return lora


def kernels_for(model: Transformer, adapters: Sequence[Lora | None] = (None,)) -> Kernels:
    found = find_kernels(model, adapters)
    if isinstance(found, Unavailable):
        pytest.skip(found.reason)
    return found


def native(
    model: Transformer, cache: Cache, adapters: Sequence[Lora | None], *, tiles: bool = True, panels: bool = True
) -> NativeDecoder:
    kernels_for(model, adapters)
    kernels = load_kernels(tiles=tiles)
    assert isinstance(kernels, Kernels)
    return NativeDecoder(model, cache.of_layer, adapters, kernels, Panels.wanted(model) if panels else None)


@dataclasses.dataclass
class Stage:
    """Caches full of random keys and values of the right spread, and a token for each row."""

    model: Transformer
    lengths: Sequence[int]
    adapters: Sequence[Lora | None] = (None,)
    seed: int = 0
    int8: bool = False
    tiles: bool = True
    panels: bool = True

    def step(self, make: type[TorchDecoder] | None = None, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Output, routes, and all keys and values afterwards; in C unless `make` says otherwise."""
        lengths, arch = self.lengths[rows], self.model.arch
        cache = Cache(arch, self.model.dtype, CPU, 1 << 32, int8=self.int8)
        self._fill(cache, range(len(self.lengths))[rows])
        generator = torch.Generator().manual_seed(self.seed)
        x_BD = torch.randn(len(self.lengths), arch.hidden_size, generator=generator).to(self.model.dtype)[rows]
        adapter_B = [row % len(self.adapters) for row in range(len(self.lengths))][rows]
        routes_LBk = torch.full((arch.num_layers, len(lengths), arch.experts_per_token), -1, dtype=torch.int16)
        decoder: Decoder
        if make is None:
            decoder = native(self.model, cache, self.adapters, tiles=self.tiles, panels=self.panels)
        else:
            decoder = make(self.model, cache.of_layer, self.adapters)
        with torch.inference_mode():
            out_BD = decoder.forward(x_BD, torch.tensor(lengths), adapter_B, routes_LBk)
        written = [
            lane.at(layer, lane.slots([int(b) for b in lane.table_RM[row]], torch.tensor([length])))
            for lane in cache.lanes
            for layer in lane.layers
            for row, length in enumerate(lengths)
        ]
        return out_BD, routes_LBk, torch.cat(written)

    def _fill(self, cache: Cache, rows: Sequence[int]) -> None:
        """Rows grow side by side, so that no row's blocks are neighbours."""
        holdings = [cache.new() for _ in rows]
        for length in range(0, max(self.lengths) + 64, 64):
            for row, holding in zip(rows, holdings, strict=True):
                assert cache.extend(holding, min(length, self.lengths[row]) + 1)
        for index, (row, holding) in enumerate(zip(rows, holdings, strict=True)):
            length = self.lengths[row]
            cache.set_row(index, holding)
            for lane, blocks in zip(cache.lanes, holding, strict=True):
                seen = torch.arange(max(0, length - (lane.window or length)), length)
                for layer in lane.layers:
                    generator = torch.Generator().manual_seed(1000 * row + layer)
                    kv = torch.randn(length, *lane.pool(layer).shape[1:], generator=generator)
                    lane.write(layer, lane.slots(blocks, seen), kv[seen].to(self.model.dtype))


def assert_same(stage: Stage, tolerance: float = 3e-6) -> None:
    found, expected = stage.step(), stage.step(TorchDecoder)
    assert torch.equal(found[1], expected[1])
    assert relative_error(found[0], expected[0]) < tolerance
    assert relative_error(found[2], expected[2]) < tolerance


@pytest.mark.parametrize(("placement", "layout"), PLACES)
def test_a_step_in_c_is_torchs_at_every_edge_of_window_and_blocks(
    tiny: MakeTiny, placement: Placement, layout: Layout
) -> None:
    model = load(tiny(UNEQUAL, layout), FLOAT, placement)
    assert_same(Stage(model, EDGES))


@pytest.mark.parametrize("arch", [UNEQUAL, ODD])
def test_a_cache_of_8_bits_is_read_and_written_in_c_as_in_torch(tiny: MakeTiny, arch: Arch) -> None:
    model = load(tiny(arch), FLOAT, "mmap")
    stage = Stage(model, EDGES, int8=True)
    assert_same(stage)
    assert relative_error(stage.step()[0], Stage(model, EDGES).step()[0]) > 1e-3, "8 bits show"
    rounded = Stage(load(tiny(arch), BF16, "mmap"), EDGES, int8=True)
    assert relative_error(rounded.step()[0], rounded.step(TorchDecoder)[0]) < 0.1


def test_sizes_that_are_no_whole_vectors_and_a_context_above_4096(tiny: MakeTiny) -> None:
    for placement in ("bf16", "mmap"):
        assert_same(Stage(load(tiny(ODD), FLOAT, placement), (4500, 3)))


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("placement", ["bf16", "mmap"])
def test_several_adapters_of_any_rank_in_one_batch(tiny: MakeTiny, dtype: torch.dtype, placement: Placement) -> None:
    model = load(tiny(UNEQUAL), dtype, placement)
    ranks = dict(zip(TARGETS, (1, 3, 5, 16, 7, 9, 2, 4), strict=True))
    adapters = [None, adapter(model, ranks), adapter(model, {"down_proj": 1, "q_proj": 4}, seed=2), None]
    stage = Stage(model, EDGES[:11], adapters)
    if dtype == FLOAT:
        assert_same(stage)
    assert relative_error(stage.step()[0], stage.step(TorchDecoder)[0]) < 0.1
    plain = Stage(model, EDGES[:11])
    changed = (stage.step()[0] != plain.step()[0]).any(1).tolist()
    assert changed == [row % 4 in (1, 2) for row in range(11)]


@pytest.mark.parametrize("target", TARGETS[:-1])
def test_no_target_of_an_adapter_is_ignored(tiny: MakeTiny, target: str) -> None:
    model = load(tiny(UNEQUAL), FLOAT, "mmap")
    plain = Stage(model, (5, 70)).step()
    model.use_adapter(adapter(model, {target: 3}))
    stage = Stage(model, (5, 70), [model.lora])
    assert_same(stage)
    assert relative_error(stage.step()[0], plain[0]) > 1e-3


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_every_placement_gives_the_same_bits(tiny: MakeTiny, dtype: torch.dtype) -> None:
    steps = [Stage(load(tiny(UNEQUAL, layout), dtype, placement), EDGES).step()[0] for placement, layout in PLACES]
    # packed codes are summed in another order than floats, which only float32 shows
    same = torch.equal if dtype == BF16 else lambda a, b: relative_error(a, b) < 1e-6
    assert all(same(steps[0], step) for step in steps[1:])


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_tiles_of_numbers_are_another_order_of_the_same_sums(tiny: MakeTiny, layout: Layout) -> None:
    """With adapters: their factors are multiplied by tiles too, of fewer rows than a tile has."""
    model = load(tiny(UNEQUAL, layout), BF16, "bf16")
    if not kernels_for(model).uses_tiles:
        pytest.skip("this machine multiplies no tiles")
    adapters = [None, adapter(model, dict.fromkeys(TARGETS, 5))]
    tiles, single = (Stage(model, EDGES, adapters, tiles=tiles).step()[0] for tiles in (True, False))
    assert relative_error(tiles, single) < 0.03
    assert relative_error(tiles, Stage(model, EDGES, adapters).step(TorchDecoder)[0]) < 0.1


def test_panels_are_another_order_of_the_same_sums(tiny: MakeTiny) -> None:
    for arch in (UNEQUAL, dataclasses.replace(ODD, num_experts=32)):
        model = load(tiny(arch), FLOAT, "bf16")
        panels, rows = (Stage(model, EDGES, panels=panels).step()[0] for panels in (True, False))
        assert 0 < relative_error(panels, rows) < 2e-6


def test_panels_follow_a_matrix_that_is_trained(tiny: MakeTiny) -> None:
    model = load(tiny(UNEQUAL), FLOAT, "bf16")
    panels = Panels.wanted(model)
    assert panels is not None
    assert Panels.wanted(load(tiny(UNEQUAL), BF16, "bf16")) is None
    weight_EOD = torch.randn(3, 64, 5).bfloat16().float()
    first = panels.of("some", weight_EOD)
    assert first.dtype == BF16
    assert torch.equal(first.float(), weight_EOD.view(3, 2, 32, 5).transpose(2, 3))
    assert panels.of("some", weight_EOD) is first
    for _ in range(2):
        weight_EOD.add_(0.1)
        trained = panels.of("some", weight_EOD)
        assert torch.equal(trained, weight_EOD.view(3, 2, 32, 5).transpose(2, 3))


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("placement", ["bf16", "mmap"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_rows_bits_depend_neither_on_its_batch_nor_on_the_threads(
    tiny: MakeTiny, dtype: torch.dtype, placement: Placement, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ossia.engine.native._THREAD_PRODUCTS", 1)
    model = load(tiny(UNEQUAL), dtype, placement)
    adapters = [None, adapter(model, dict.fromkeys(TARGETS, 5))]
    stage = Stage(model, [(37 * row) % 150 for row in range(64)], adapters, int8=placement == "mmap")
    stage.tiles = stage.panels = fast
    together = stage.step()
    for rows in (slice(0, 1), slice(11, 12), slice(20, 25), slice(30, 63)):
        assert torch.equal(stage.step(rows=rows)[0], together[0][rows]), rows
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for one, other in zip(stage.step(), together, strict=True):
                assert torch.equal(one, other), threads
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@torch.inference_mode()
def test_weights_that_are_all_trained_are_read_again_on_refresh(tiny: MakeTiny, dtype: torch.dtype) -> None:
    model = load(tiny(UNEQUAL), dtype, "mmap")
    model.train_all_weights()
    cache = Cache(model.arch, dtype, CPU, 1 << 30)
    holding = cache.new()
    cache.extend(holding, 1)
    cache.set_row(0, holding)
    decoder = native(model, cache, [None])
    x_BD = torch.randn(1, model.arch.hidden_size).to(dtype)
    before = decoder.forward(x_BD, torch.tensor([0]), [0])
    for number, tensor in enumerate(model.trainable.tensors.values()):
        tensor.mul_(1.0 + 0.02 * (number % 5 + 1))
    decoder.refresh()
    after = decoder.forward(x_BD, torch.tensor([0]), [0])
    assert relative_error(after, before) > 1e-2
    expected = TorchDecoder(model, cache.of_layer, [None]).forward(x_BD, torch.tensor([0]), [0])
    assert relative_error(after, expected) < (3e-6 if dtype == FLOAT else 0.03)


@torch.inference_mode()
def test_gates_and_ups_are_clamped_at_both_ends(tiny: MakeTiny) -> None:
    model = load(tiny(UNEQUAL), FLOAT, "mmap")
    model.train_all_weights()
    for name, tensor in model.trainable.tensors.items():
        if name.endswith("gate_up_proj_bias"):
            tensor.mul_(100.0)
    assert_same(Stage(model, (3, 20)))


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 4), (5, 3), (33, 4), (100, 8)])
def test_of_equal_logits_those_are_chosen_that_torch_chooses(tiny: MakeTiny, num_experts: int, top_k: int) -> None:
    """In bfloat16 equal logits are common, and training breaks the ties as torch does."""
    arch = dataclasses.replace(
        ODD, num_layers=60, layer_types=alternating_layers(60), num_experts=num_experts, experts_per_token=top_k
    )
    arch = dataclasses.replace(
        arch, intermediate_size=32, num_heads=1, num_layers=12, layer_types=alternating_layers(12)
    )
    model = load(tiny(arch), FLOAT, "mmap")
    router = "model.layers.{}.mlp.router.{}"
    generator = torch.Generator().manual_seed(0)
    biases = [torch.randint(3 + layer, (num_experts,), generator=generator).float() for layer in range(12)]
    for layer, bias in enumerate(biases):
        weight = torch.zeros(num_experts, arch.hidden_size)
        model.trainable.tensors |= {router.format(layer, "weight"): weight, router.format(layer, "bias"): bias}
    _, routes_LBk, _ = Stage(model, (0,)).step()
    assert routes_LBk[:, 0].tolist() == [bias.topk(top_k).indices.tolist() for bias in biases]


def decoded(model: Transformer, ids_BT: Sequence[Sequence[int]]) -> Tensor:
    """Logits of every position, token by token from an empty cache, (B, T, V) float32."""
    cache = Cache(model.arch, model.dtype, CPU, 1 << 30)
    for row, ids in enumerate(ids_BT):
        holding = cache.new()
        cache.extend(holding, len(ids))
        cache.set_row(row, holding)
    decoder, steps = native(model, cache, [model.lora]), []
    with torch.inference_mode():
        for position, column in enumerate(zip(*ids_BT, strict=True)):
            position_B = torch.full((len(ids_BT),), position)
            x_BD = decoder.forward(model.embed(torch.tensor(column)), position_B, [0] * len(ids_BT))
            steps.append(linear(model.final_norm(x_BD), model.head()).float())
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize(("dtype", "most"), [(FLOAT, 1e-5), (BF16, 3e-4)])
@pytest.mark.parametrize("adapted", [False, True])
def test_token_by_token_gives_the_distributions_of_the_training_forward(
    trained: Path, dtype: torch.dtype, most: float, adapted: bool
) -> None:
    model = load(trained, dtype, "mmap")
    if adapted:
        lora = adapter(model, dict.fromkeys(TARGETS, 4))
        for tensor in lora.trainable.tensors.values():
            tensor.mul_(0.3)
        model.use_adapter(lora)
    divergences = []
    for sample in held_out(trained, 8):
        sample = dataclasses.replace(sample, ids=sample.ids[:200], weights=sample.weights[:200], targets=None)
        pack = pack_of([sample])
        expected = model.logits(pack).double().log_softmax(-1)
        found = decoded(model, [sample.ids.tolist()])[0].double().log_softmax(-1)
        kl_T = (expected.exp() * (expected - found)).sum(-1)
        divergences.append(kl_T[pack.weights > 0])  # where answers are sampled; all prompts begin alike
    assert -1e-6 < float(torch.cat(divergences).mean()) < most


@pytest.mark.parametrize(("target", "int8"), [("q_proj", False), ("k_proj", True), ("v_proj", True)])
def test_nan_in_a_row_comes_out_of_that_row_alone(tiny: MakeTiny, target: str, int8: bool) -> None:
    model = load(tiny(UNEQUAL), FLOAT, "mmap")
    broken = adapter(model, {target: 2})
    next(iter(broken.trainable.tensors.values())).fill_(torch.nan)
    out_BD, routes_LBk, _ = Stage(model, (3, 4, 5), [None, broken], int8=int8).step()
    assert out_BD.isfinite().all(1).tolist() == [True, False, True]
    assert set(routes_LBk.flatten().tolist()) <= set(range(UNEQUAL.num_experts))


def test_what_c_cannot_decode_says_why(tiny: MakeTiny) -> None:
    half = find_kernels(load(tiny(UNEQUAL), torch.float16, "mmap"), [None])
    assert isinstance(half, Unavailable)
    assert "float16 on cpu" in half.reason
    model = load(tiny(UNEQUAL), FLOAT, "mmap")
    beside = [None, adapter(model, {"q_proj": 2})]
    assert not isinstance(find_kernels(model, beside), Unavailable) or "compile" in find_kernels(model, beside).reason
    model.train_all_weights()
    refused = find_kernels(model, beside)
    assert isinstance(refused, Unavailable)
    assert "weights are trained" in refused.reason
