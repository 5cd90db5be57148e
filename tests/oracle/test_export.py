"""The merged checkpoint against `peft`'s own merge, and in transformers against base and adapter."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ossia.data.sample import Sample
from ossia.export import export_model
from ossia.model.peft import save_adapter
from ossia.model.weights import EXPERT_WEIGHTS, interleave_gate_up
from tests.conftest import MakeTiny
from tests.export.conftest import arch_of, random_lora
from tests.oracle.model_pairs import documents, held_out, load, load_transformers, pack_of, relative_error
from tests.oracle.old_transformers import run_transformers_457
from tests.shapes import SHALLOW


def test_the_exported_folder_has_the_same_logits_in_transformers_as_in_ossia(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tiny(SHALLOW)
    lora = random_lora(arch_of(path))
    save_adapter(tmp_path / "adapter", lora, base_model=str(path))
    out = export_model(str(path), to="hf-bf16", output=tmp_path / "out", adapter=str(tmp_path / "adapter"))
    (sample,) = documents(arch_of(path), (200,))
    pack = pack_of([sample])
    with torch.no_grad():
        found = load_transformers(out)(pack.ids[None]).logits[0]
    assert relative_error(found, load(out).logits(pack)) <= 1e-5, "the same rounded weights, float32 in both"


def test_exporting_a_trained_model_changes_its_logits_by_rounding_alone(trained: Path, tmp_path: Path) -> None:
    lora = random_lora(arch_of(trained), size=0.1)
    save_adapter(tmp_path / "adapter", lora, base_model=str(trained))
    out = export_model(str(trained), to="hf-bf16", output=tmp_path / "out", adapter=str(tmp_path / "adapter"))
    pack = pack_of(held_out(trained, 20))
    with_adapter, without = load(trained, lora=lora).logits(pack), load(trained).logits(pack)
    assert relative_error(load(out).logits(pack), with_adapter) <= 0.02
    assert relative_error(without, with_adapter) > 0.1


def test_merged_weights_are_those_that_peft_merges(tiny: MakeTiny, tmp_path: Path) -> None:
    from peft import PeftModel

    path = tiny(SHALLOW)
    save_adapter(tmp_path / "adapter", random_lora(arch_of(path)), base_model=str(path))
    out = export_model(str(path), to="hf-bf16", output=tmp_path / "out", adapter=str(tmp_path / "adapter"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(load_transformers(path), str(tmp_path / "adapter")).merge_and_unload()
    ours = dict(load_transformers(out).named_parameters())
    for name, merged in theirs.named_parameters():
        rounded = merged.detach().bfloat16().float()
        # sums in another order may fall on the other side of a rounding's middle
        assert float((ours[name] != rounded).float().mean()) < 1e-3, name
        torch.testing.assert_close(ours[name].detach(), rounded, rtol=2**-7, atol=1e-6)


@pytest.fixture(scope="module")
def rounded(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with an adapter on everything, in MXFP4."""
    folder = tmp_path_factory.mktemp("rounded")
    save_adapter(folder / "adapter", random_lora(arch_of(trained), size=0.02), base_model=str(trained))
    adapter = str(folder / "adapter")
    return export_model(str(trained), to="hf-mxfp4", output=folder / "out", adapter=adapter, max_kl=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_523_expands_an_mxfp4_export_to_the_weights_that_ossia_reads(
    rounded: Path, dtype: torch.dtype
) -> None:
    theirs, ours = dict(load_transformers(rounded, dtype).named_parameters()), load(rounded, dtype)
    for layer in range(ours.arch.num_layers):
        for name in EXPERT_WEIGHTS:
            weight = ours.weights.expert_weight(layer, name)
            weight = interleave_gate_up(weight) if name == "gate_up_proj" else weight
            found = theirs[f"model.layers.{layer}.mlp.experts.{name}"].detach()
            assert found.dtype == dtype
            assert torch.equal(found, weight.mT), (layer, name)
    for name, found in theirs.items():
        if ".mlp.experts." not in name:
            assert torch.equal(found.detach(), ours.weights.get(name)), name


def test_transformers_523_computes_the_same_from_an_mxfp4_export_as_ossia(trained: Path, rounded: Path) -> None:
    pack = pack_of(held_out(trained, 8)[:1])
    with torch.no_grad():
        found = load_transformers(rounded)(pack.ids[None]).logits[0]
    assert relative_error(found, load(rounded).logits(pack)) <= 1e-5


def test_transformers_457_computes_the_same_from_an_mxfp4_export_as_from_its_expanded_twin(
    rounded: Path, tmp_path: Path
) -> None:
    plain = export_model(str(rounded), to="hf-bf16", output=tmp_path / "plain")
    chat = [{"role": "user", "content": "Sort 314159."}]
    found = run_transformers_457(rounded, plain, chat, tmp_path)
    assert found["mxfp4"].isfinite().all()
    assert torch.equal(found["mxfp4"], found["bf16"])
    ids = torch.tensor(found["ids"])
    with torch.no_grad():
        ours = load(rounded).logits(
            pack_of([Sample(ids.numpy().astype(np.int32), np.ones(len(ids), np.float32), None, "", ())])
        )
    assert relative_error(found["float32"], ours) <= 1e-5, "the expanded twin in float32"
