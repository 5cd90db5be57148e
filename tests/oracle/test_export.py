"""The merged checkpoint against `peft`'s own merge, and in transformers against base and adapter."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from ossia.export import export_model
from ossia.model.peft import save_adapter
from tests.conftest import MakeTiny
from tests.export.conftest import ARCH, arch_of, random_lora
from tests.oracle.model_pairs import documents, load, load_transformers, pack_of, relative_error


def test_the_exported_folder_loads_in_transformers_with_the_logits_of_base_plus_adapter(
    tiny: MakeTiny, tmp_path: Path
) -> None:
    path = tiny(ARCH)
    lora = random_lora(arch_of(path))
    save_adapter(tmp_path / "adapter", lora, base_model=str(path))
    out = export_model(str(path), to="hf-bf16", output=tmp_path / "out", adapter=str(tmp_path / "adapter"))
    (sample,) = documents(arch_of(path), (200,))
    pack = pack_of([sample])
    with torch.no_grad():
        found = load_transformers(out)(pack.ids[None]).logits[0]
    assert relative_error(found, load(out).logits(pack)) <= 1e-5, "the same rounded weights, float32 in both"
    with_adapter, without = load(path, lora=lora).logits(pack), load(path).logits(pack)
    # Rounding moves a weight by up to 2^-8 of itself, at random. Where a random router is torn between two experts
    # that decides between them, and the row is far off: so the median row.
    off = torch.stack([(row - want).norm() / want.norm() for row, want in zip(found, with_adapter, strict=True)])
    assert float(off.median()) <= 1e-2
    assert relative_error(without, with_adapter) > 0.1


def test_merged_weights_are_those_that_peft_merges(tiny: MakeTiny, tmp_path: Path) -> None:
    from peft import PeftModel

    path = tiny(ARCH)
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
