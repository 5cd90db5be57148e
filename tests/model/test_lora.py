"""What is adapted, how it starts, and dropout. Against `peft`: tests/oracle/test_peft.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from ossia.config.schema import AdapterConfig
from ossia.errors import AdapterError
from ossia.model.arch import Arch
from ossia.model.lora import TARGETS, Lora, LoraSpec, sites
from ossia.ops.linear import Dropout
from ossia.train.schedule import forward_backward
from tests.conftest import MakeTiny
from tests.oracle.model_pairs import CPU, documents, load, pack_of, relative_error
from tests.shapes import SMALL

EVERYTHING = LoraSpec(dict.fromkeys(TARGETS, (3, 6.0)), dropout=0.25)


def test_a_fresh_adapter_leaves_the_model_as_it_was(tiny: MakeTiny) -> None:
    path = tiny(SMALL)
    arch = load(path).arch
    pack = pack_of(documents(arch, (40, 7)))
    lora = Lora.fresh(arch, EVERYTHING, seed=0, device=CPU)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(load(path, dtype, lora=lora).logits(pack), load(path, dtype).logits(pack))


def test_a_fresh_a_is_uniform_within_one_over_the_root_of_its_inputs(small: Arch) -> None:
    lora = Lora.fresh(small, EVERYTHING, seed=0, device=CPU)
    for module, site in lora.sites.items():
        a, b = (lora.trainable.tensors[f"{module}.lora_{side}"] for side in "AB")
        bound = 1 / math.sqrt(site.fan_in)
        assert bound * 0.9 < float(a.abs().max()) <= bound
        assert abs(float(a.mean())) < 4 * bound / math.sqrt(3 * a.numel()), "off the middle by more than 4 deviations"
        assert not b.any()


def test_a_fresh_adapter_depends_on_seed_and_name_alone(small: Arch) -> None:
    def fresh(targets: tuple[str, ...], seed: int) -> dict[str, Tensor]:
        spec = LoraSpec(dict.fromkeys(targets, (4, 8.0)))
        return Lora.fresh(small, spec, seed=seed, device=CPU).trainable.tensors

    alone, together, other = fresh(("o_proj",), 7), fresh(("q_proj", "o_proj", "down_proj"), 7), fresh(("o_proj",), 8)
    factors = [name for name in alone if name.endswith("lora_A")]
    assert all(torch.equal(alone[name], together[name]) for name in factors)
    assert not any(torch.equal(alone[name], other[name]) for name in factors)
    assert not torch.equal(alone[factors[0]], alone[factors[1]])
    assert fresh(("o_proj",), 2**40), "any seed of a recipe will do"


def test_a_target_that_matches_nothing_is_an_error_that_lists_those_that_do(small: Arch) -> None:
    with pytest.raises(
        AdapterError, match=r"\['gate_proj'\] match nothing in a gpt-oss model; allowed: q_proj, k_proj"
    ):
        sites(small, LoraSpec({"gate_proj": (4, 8.0), "q_proj": (4, 8.0)}))


def test_the_table_counts_every_parameter_once(small: Arch) -> None:
    lora = Lora.fresh(small, EVERYTHING, seed=0, device=CPU)
    rows = lora.table()
    assert [row[0] for row in rows] == list(TARGETS)
    assert sum(row[3] for row in rows) == lora.trainable.num_parameters
    matrices = {target: count for target, _, count, _ in rows}
    layers = small.num_layers
    assert matrices["q_proj"] == layers
    assert matrices["down_proj"] == layers * small.num_experts
    assert matrices["lm_head"] == 1


def test_a_recipes_adapter_section_becomes_a_spec() -> None:
    config = AdapterConfig(rank=8, alpha=4.0, targets={"experts": {}, "q_proj": {"rank": 2}}, dropout=0.5, rslora=True)
    spec = LoraSpec.of(config)
    assert dict(spec.targets) == {"gate_up_proj": (8, 4.0), "down_proj": (8, 4.0), "q_proj": (2, 1.0)}
    assert (spec.dropout, spec.rslora) == (0.5, True)
    assert spec.scale("down_proj") == 4.0 / math.sqrt(8)
    assert dataclasses.replace(spec, rslora=False).scale("q_proj") == 0.5


def test_an_adapter_to_start_from_keeps_its_meaning_or_is_refused(small: Arch) -> None:
    lora = Lora.fresh(small, LoraSpec({"q_proj": (4, 8.0)}), seed=0, device=CPU)
    found = lora.with_spec(LoraSpec({"q_proj": (4, 8)}, dropout=0.1))
    assert found.spec.dropout == 0.1
    assert found.trainable.tensors is lora.trainable.tensors
    for other in (
        LoraSpec({"q_proj": (8, 8.0)}),
        LoraSpec({"q_proj": (4, 16.0)}),
        LoraSpec({"q_proj": (4, 8.0), "k_proj": (4, 8.0)}),
        LoraSpec({"q_proj": (4, 8.0)}, rslora=True),
    ):
        with pytest.raises(AdapterError, match=r"(q_proj: \(4, 8.0\) there|k_proj: none there|rslora: False there)"):
            lora.with_spec(other)


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    x = torch.ones(1000, 500)
    dropped = Dropout(0.3, seed=5)(x, 2)
    zeros = float((dropped == 0).float().mean())
    assert abs(zeros - 0.3) < 4 * math.sqrt(0.3 * 0.7 / x.numel())
    torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / 0.7]))
    assert abs(float(dropped.mean()) - 1) < 4 * math.sqrt(0.3 / 0.7 / x.numel())
    per_row = (dropped == 0).float().mean(1)
    assert float((per_row - 0.3).abs().max()) < 6 * math.sqrt(0.3 * 0.7 / 500), "rows are dropped alike"
    assert torch.equal(dropped, Dropout(0.3, seed=5)(x, 2))
    assert not torch.equal(dropped, Dropout(0.3, seed=5)(x, 3))
    assert not torch.equal(dropped, Dropout(0.3, seed=6)(x, 2))


def gradients(path: str, lora: Lora, *, recompute: bool, seed: int | None) -> tuple[float, dict[str, Tensor]]:
    model = load(path, lora=lora)
    samples = documents(model.arch, (60, 17, 90))
    packs = [pack_of(samples[:2]), pack_of(samples[2:])]
    lora.trainable.zero_grad()
    loss = forward_backward(model, packs, lambda logp, m, rows: -logp.mean(), recompute=recompute, dropout_seed=seed)
    return loss, {name: tensor.grad.clone() for name, tensor in lora.trainable.tensors.items()}


@pytest.fixture
def lora(tiny: MakeTiny) -> Lora:
    lora = Lora.fresh(load(tiny(SMALL)).arch, EVERYTHING, seed=0, device=CPU)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in lora.trainable.tensors.items():
        if name.endswith("lora_B"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return lora


def test_a_recomputed_layer_drops_the_same_inputs(tiny: MakeTiny, lora: Lora) -> None:
    path = tiny(SMALL)
    loss, kept = gradients(path, lora, recompute=False, seed=11)
    again_loss, again = gradients(path, lora, recompute=True, seed=11)
    other_loss, _ = gradients(path, lora, recompute=True, seed=12)
    plain_loss, _ = gradients(path, lora, recompute=True, seed=None)
    assert loss == again_loss
    for name, grad in kept.items():
        assert torch.equal(grad, again[name]), name
    assert len({loss, other_loss, plain_loss}) == 3


def test_the_gradient_under_dropout_is_that_of_the_loss_it_gives(tiny: MakeTiny, lora: Lora) -> None:
    """Along a direction, by finite differences: the mask is the same at both points."""
    path = tiny(SMALL)
    _, grads = gradients(path, lora, recompute=True, seed=3)
    names = [name for name in grads if name.startswith("model.layers.3") and "router" not in name]
    before = {name: lora.trainable.tensors[name].clone() for name in names}
    size, losses = 1e-3, []
    for sign in (1, -1):
        for name in names:
            step = sign * size * grads[name] / grads[name].norm()
            lora.trainable.tensors[name].copy_(before[name] + step)
        losses.append(gradients(path, lora, recompute=True, seed=3)[0])
    found = torch.tensor((losses[0] - losses[1]) / (2 * size))
    expected = sum((grads[name].norm() for name in names), start=torch.tensor(0.0))
    assert relative_error(found, expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_rank_works_on_experts(tiny: MakeTiny, dtype: torch.dtype) -> None:
    """The grouped matmul takes rows of whole 16 bytes only; the ranks between are padded."""
    path = tiny(SMALL)
    pack = pack_of(documents(load(path).arch, (30,)))
    for rank in (1, 5, 8):
        spec = LoraSpec({"gate_up_proj": (rank, 2.0 * rank), "down_proj": (rank, 2.0 * rank)})
        model = load(path, dtype, lora=Lora.fresh(load(path).arch, spec, seed=0, device=CPU))
        assert torch.equal(model.logits(pack), load(path, dtype).logits(pack))
        forward_backward(model, [pack], lambda logp, m, rows: -logp.mean(), recompute=True)
        for name, tensor in model.trainable.tensors.items():
            assert tensor.grad.shape == tensor.shape
            assert bool(tensor.grad.any()) == name.endswith("lora_B"), name
