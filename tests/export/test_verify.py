"""The comparison of an export with what was trained: its numbers, and the reading of GGUF that it stands on."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from ossia.errors import CheckpointError
from ossia.export.gguf.read import decode, gguf_model, unpack_mxfp4
from ossia.export.gguf.write import repack_mxfp4
from ossia.export.merge import Changes, write_merged
from ossia.export.verify import PassingWeights, changed_model, compare, cost_by_layer, fixed_texts
from ossia.harmony import Vocabulary
from ossia.model.checkpoint import Checkpoint, write_checkpoint
from ossia.model.transformer import Transformer
from tests.conftest import MakeTiny
from tests.export.conftest import random_lora
from tests.oracle.model_pairs import load
from tests.shapes import SHALLOW, UNEQUAL


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_agreement_is_that_of_the_whole_models_logits(
    tiny: MakeTiny, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer and expert by expert, with shared experts, in blocks of the vocabulary: the plain numbers."""
    monkeypatch.setattr("ossia.export.verify._VOCAB_BLOCK", 100)
    path = tiny(UNEQUAL, layout)
    base = Checkpoint.open(path)
    changes = Changes(random_lora(base.arch))
    write_merged(tmp_path / "out", base, changes, path, "bf16")
    packs = fixed_texts(Vocabulary.from_file(path))
    assert len(packs) == 1
    assert len(packs[0].sources) == 4
    weights = PassingWeights(base)
    trained = changed_model(weights, changes)
    found = compare(
        trained, [changed_model(PassingWeights(Checkpoint.open(tmp_path / "out"))), changed_model(weights)], packs
    )

    want = load(path, lora=changes.lora).logits(packs[0]).double()
    for agreement, other in zip(found, (load(tmp_path / "out"), load(path)), strict=True):
        have = other.logits(packs[0]).double()
        kl = (want.softmax(-1) * (want.log_softmax(-1) - have.log_softmax(-1))).sum(-1)
        assert agreement.positions == len(want)
        assert agreement.kl == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
        assert agreement.median_kl == pytest.approx(float(kl.median()), rel=1e-2, abs=1e-6)
        assert agreement.max_abs == pytest.approx(float((want - have).abs().max()), rel=1e-3)
        assert agreement.top1 == pytest.approx(float((want.argmax(-1) == have.argmax(-1)).double().mean()), abs=2e-3)
    assert found[1].kl > 10 * found[0].kl > 0


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_what_a_layer_costs_is_the_kl_of_a_model_with_that_layer_alone(
    tiny: MakeTiny, tmp_path: Path, layout: str
) -> None:
    path = tiny(UNEQUAL, layout)
    base = Checkpoint.open(path)
    changes = Changes(random_lora(base.arch))
    write_merged(tmp_path / "merged", base, changes, path, "bf16")
    write_merged(tmp_path / "rounded", base, changes, path, "mxfp4")
    write_merged(tmp_path / "plain", Checkpoint.open(tmp_path / "rounded"), Changes(), path, "bf16")  # the same values
    merged, plain = (Checkpoint.open(tmp_path / name) for name in ("merged", "plain"))
    packs = fixed_texts(Vocabulary.from_file(path), 64)
    assert len(packs[0].ids) < len(fixed_texts(Vocabulary.from_file(path))[0].ids) <= 4 * 256
    assert len(packs[0].ids) <= 4 * 64
    rounded = changed_model(PassingWeights(Checkpoint.open(tmp_path / "rounded")))
    costs = cost_by_layer(changed_model(PassingWeights(merged)), rounded, packs)

    want = load(tmp_path / "merged").logits(packs[0]).double().log_softmax(-1)
    for layer, cost in enumerate(costs):
        mixed = (
            (name, (plain if name.startswith(f"model.layers.{layer}.") else merged).tensor(name))
            for name in merged.specs
        )
        write_checkpoint(tmp_path / f"mixed-{layer}", base.arch, mixed, "bf16", tokenizer_from=path)
        have = load(tmp_path / f"mixed-{layer}").logits(packs[0]).double().log_softmax(-1)
        assert cost == pytest.approx(float((want.exp() * (want - have)).sum(-1).mean()), rel=1e-2, abs=1e-7)
    assert costs[0] != pytest.approx(costs[1], rel=0.1)
    assert min(costs) > 1e-5


def test_a_run_that_was_trained_rounded_is_compared_rounded(tiny: MakeTiny) -> None:
    for layout in ("mxfp4", "bf16"):
        path = tiny(SHALLOW, layout)
        base = Checkpoint.open(path)
        weights, lora = PassingWeights(base), random_lora(base.arch)
        packs = fixed_texts(Vocabulary.from_file(path))
        rounded, plain = (changed_model(weights, Changes(lora, qat=qat)) for qat in (True, False))
        (found,) = compare(rounded, [plain], packs)
        models = (Transformer(load(path).weights, lora=lora, qat=qat) for qat in (True, False))
        want, have = (model.logits(packs[0]).double() for model in models)
        assert found.max_abs == pytest.approx(float((want - have).abs().max()), rel=1e-2)


def test_a_model_is_exactly_itself(tiny: MakeTiny) -> None:
    path = tiny(SHALLOW)
    packs = fixed_texts(Vocabulary.from_file(path))
    (found,) = compare(
        changed_model(PassingWeights(Checkpoint.open(path))),
        [changed_model(PassingWeights(Checkpoint.open(path)))],
        packs,
    )
    assert (found.max_abs, found.kl, found.top1) == (0.0, 0.0, 1.0)


def test_weights_trained_whole_are_compared_as_they_are(tiny: MakeTiny) -> None:
    path = tiny(SHALLOW)
    model = load(path)
    model.train_all_weights()
    for tensor in model.trainable.tensors.values():
        tensor.mul_(1.25)
    packs = fixed_texts(Vocabulary.from_file(path))
    base = PassingWeights(Checkpoint.open(path))
    (found,) = compare(changed_model(base, Changes.of(model)), [changed_model(base)], packs)
    want, have = (x.logits(packs[0]).double() for x in (model, load(path)))
    assert found.max_abs == pytest.approx(float((want - have).abs().max()), rel=1e-3)


@pytest.mark.parametrize("kind", ["MXFP4", "Q8_0", "BF16", "F16", "F32"])
def test_every_type_of_a_gguf_file_is_read_as_the_gguf_package_reads_it(kind: str) -> None:
    weights = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0)).numpy()
    raw = quantize(weights, GGMLQuantizationType[kind])
    out = torch.empty(3, 5, 96)
    decode(torch.from_numpy(raw.view("uint8").copy()), GGMLQuantizationType[kind], out)
    assert torch.equal(out, torch.from_numpy(dequantize(raw, GGMLQuantizationType[kind])))


def test_ggmls_order_of_the_nibbles_comes_back_to_ours() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 3, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (2, 3, 4), dtype=torch.uint8, generator=generator)
    assert all(map(torch.equal, unpack_mxfp4(repack_mxfp4(blocks, scales)), (blocks, scales)))


def test_a_gguf_file_of_another_model_or_none_is_refused(tiny: MakeTiny, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny(SHALLOW))
    (tmp_path / "no.gguf").write_bytes(bytes(64))
    with pytest.raises(CheckpointError, match="is no GGUF file of version 3"):
        gguf_model(tmp_path / "no.gguf", base)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt-oss")
    writer.add_array("numbers", [[1, 2], [3, 4]])
    writer.add_tensor("token_embd.weight", torch.zeros(3, 32).numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(CheckpointError, match=r"`blk\.0\.attn_k\.bias` is missing, to be"):
        gguf_model(tmp_path / "other.gguf", base)
