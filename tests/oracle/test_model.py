"""Logits and all gradients against transformers' `GptOssForCausalLM`, on the same files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ossia.train.schedule import forward_backward
from tests.conftest import MakeTiny
from tests.oracle.model_pairs import (
    Batch,
    documents,
    gradients_of,
    in_our_layout,
    load,
    load_transformers,
    pack_of,
    relative_error,
)
from tests.shapes import SMALL

SHAPES = {
    "small": SMALL,
    "wide window": dataclasses.replace(SMALL, sliding_window=256, num_heads=8, num_kv_heads=1),
    "narrow window": dataclasses.replace(SMALL, sliding_window=16, experts_per_token=2, rope_truncate=True),
}
LENGTHS = (1, 130, 37, 257, 2, 128)


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_float32_logits_equal_transformers_on_each_document_alone(
    tiny: MakeTiny, shape: str, layout: str
) -> None:
    path = tiny(SHAPES[shape], layout)
    model, reference = load(path), load_transformers(path)
    samples = documents(model.arch, LENGTHS)
    found = model.logits(pack_of(samples)).split(LENGTHS)
    for sample, logits in zip(samples, found, strict=True):
        with torch.no_grad():
            expected = reference(torch.from_numpy(sample.ids).long()[None]).logits[0]
        assert relative_error(logits, expected) <= 1e-5, len(sample)


def test_packed_logits_equal_a_right_padded_batch_in_transformers(tiny: MakeTiny) -> None:
    path = tiny(SMALL)
    model, reference = load(path), load_transformers(path)
    samples = documents(model.arch, (50, 200, 131))
    batch = Batch.of(samples)
    with torch.no_grad():
        expected = reference(batch.ids, attention_mask=batch.mask).logits
    found = model.logits(pack_of(samples)).split([len(sample) for sample in samples])
    for row, logits in enumerate(found):
        assert relative_error(logits, expected[row, : len(logits)]) <= 1e-5


@pytest.mark.slow
def test_logits_past_the_window_and_past_4096_positions_equal_transformers(tiny: MakeTiny) -> None:
    arch = dataclasses.replace(SMALL, num_layers=2, layer_types=SMALL.layer_types[:2], num_heads=2, num_kv_heads=1)
    path = tiny(arch)
    model, reference = load(path), load_transformers(path)
    (sample,) = documents(model.arch, (4300,))
    found = model.logits(pack_of([sample]))
    with torch.no_grad():
        expected = reference(torch.from_numpy(sample.ids).long()[None]).logits[0]
    for rows in (slice(0, 128), slice(128, 4096), slice(4096, None)):
        assert relative_error(found[rows], expected[rows]) <= 1e-5, rows


@pytest.mark.parametrize("placement", ["mmap", "resident", "bf16"])
def test_every_placement_gives_the_same_bits(tiny: MakeTiny, placement: str) -> None:
    path = tiny(SMALL)
    pack = pack_of(documents(load(path).arch, (40, 3)))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(load(path, dtype, placement).logits(pack), load(path, dtype).logits(pack))


@pytest.mark.parametrize("recompute", [True, False])
def test_every_gradient_of_full_training_equals_transformers(tiny: MakeTiny, recompute: bool) -> None:
    path = tiny(SMALL)
    model, reference = load(path), load_transformers(path)
    model.train_all_weights()
    samples = documents(model.arch, LENGTHS)
    packs = [pack_of(samples[:2]), pack_of(samples[2:5]), pack_of(samples[5:])]
    total = sum(float(pack.weights.sum()) for pack in packs)
    loss, grads = gradients_of(model, packs, recompute=recompute)
    expected_loss = 0.0
    for sample in samples:
        ids, weights = torch.from_numpy(sample.ids).long(), torch.from_numpy(sample.weights)
        nll = F.cross_entropy(reference(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        part = (nll * weights[1:]).sum() / total
        if len(sample) > 1:
            part.backward()
        expected_loss += float(part.detach())
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    parameters = dict(reference.named_parameters())
    assert set(parameters) == set(grads)
    for name, grad in grads.items():
        assert relative_error(grad, in_our_layout(name, parameters[name].grad)) <= 1e-5, name


def test_a_batch_of_one_token_documents_without_any_counted_row_has_no_gradient(tiny: MakeTiny) -> None:
    model = load(tiny(SMALL))
    model.train_all_weights()
    counted, silent = pack_of(documents(model.arch, (20,))), pack_of(documents(model.arch, (1, 1)))
    for packs in ([counted], [counted, silent]):
        model.trainable.zero_grad()
        forward_backward(model, packs, lambda logp, m, rows: -logp.sum(), recompute=True)
        grads = {name: tensor.grad.clone() for name, tensor in model.trainable.tensors.items()}
        if len(packs) == 1:
            alone = grads
    for name, grad in grads.items():
        assert torch.equal(grad, alone[name]), name


def test_the_files_of_a_checkpoint_are_never_written_to(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tiny(SMALL)
    before = (path / "model.safetensors").read_bytes()
    model = load(path)
    model.train_all_weights()
    for tensor in model.trainable.tensors.values():
        tensor.mul_(2.0)
    assert (path / "model.safetensors").read_bytes() == before
