"""`ossia export --to gguf-lora`: the bytes, what is folded into B, what is refused; and llama.cpp applies it.

Exact logits come from `llama-cpp-python`, which is built from source: that test skips itself where it isn't there.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from torch import Tensor

from ossia.engine import Engine, Request, Sampling
from ossia.errors import AdapterError, CheckpointError, UserError
from ossia.export import export_model
from ossia.export.gguf.lora import read_gguf_lora
from ossia.export.merge import Changes
from ossia.export.verify import PassingWeights, changed_model
from ossia.model.checkpoint import CONFIG, Checkpoint
from ossia.model.lora import TARGETS, Lora, LoraSpec
from ossia.model.open import open_model
from ossia.model.peft import save_adapter
from ossia.web.gguf import LlamaOptions, start_llama
from tests.conftest import MakeTiny
from tests.export.conftest import EVERYTHING, arch_of, random_lora
from tests.oracle.model_pairs import held_out, pack_of
from tests.shapes import SHALLOW, UNEQUAL

ROUNDED = dataclasses.replace(SHALLOW, rope_truncate=True, sliding_window=16)
UNLIKE = LoraSpec({target: (number + 1, 2.5 * number + 1) for number, target in enumerate(TARGETS)})


def exported(model: Path, lora: Lora, folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter's file, as gguf's own reader has them."""
    save_adapter(folder / "adapter", lora, base_model=str(model))
    output = folder / "lora.gguf"
    export_model(str(model), to="gguf-lora", output=output, adapter=str(folder / "adapter"))
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(output).tensors}


def added(lora: Lora) -> dict[str, Tensor]:
    """What an adapter adds to every matrix, by its module: (out, in), of experts (E, out, in)."""
    return {
        module: lora.spec.scale(site.target)
        * (lora.trainable.tensors[f"{module}.lora_B"] @ lora.trainable.tensors[f"{module}.lora_A"])
        for module, site in lora.sites.items()
    }


def test_every_pair_is_there_with_gate_and_up_apart_and_nothing_changed(tiny: MakeTiny, tmp_path: Path) -> None:
    model = tiny(UNEQUAL)
    lora = random_lora(arch_of(model), EVERYTHING)
    found = exported(model, lora, tmp_path)
    ours = lora.trainable.tensors
    for layer in range(UNEQUAL.num_layers):
        prefix, block = f"model.layers.{layer}", f"blk.{layer}"
        dense = {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o"}
        names = {f"{block}.{name}": f"{prefix}.self_attn.{part}_proj" for name, part in dense.items()}
        names |= {f"{block}.ffn_gate_inp": f"{prefix}.mlp.router"}
        names |= {f"{block}.ffn_down_exps": f"{prefix}.mlp.experts.down_proj"}
        for name, module in names.items():
            for side in "AB":
                tensor = found.pop(f"{name}.weight.lora_{side.lower()}")
                assert np.array_equal(tensor, ours[f"{module}.lora_{side}"].numpy()), name
        gate_up = f"{prefix}.mlp.experts.gate_up_proj"
        for half, name in enumerate(("ffn_gate_exps", "ffn_up_exps")):
            b_EIr = ours[f"{gate_up}.lora_B"].chunk(2, dim=1)[half]
            assert np.array_equal(found.pop(f"{block}.{name}.weight.lora_a"), ours[f"{gate_up}.lora_A"].numpy())
            assert np.array_equal(found.pop(f"{block}.{name}.weight.lora_b"), b_EIr.numpy())
    assert sorted(found) == ["output.weight.lora_a", "output.weight.lora_b"]
    reader = GGUFReader(tmp_path / "lora.gguf")
    said = {key: reader.get_field(key).contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert said == {
        "general.architecture": "gpt-oss",
        "general.type": "adapter",
        "general.name": "lora",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }


@pytest.mark.parametrize("rslora", [False, True])
def test_a_scaling_of_its_own_is_folded_into_b(
    tiny: MakeTiny, tmp_path: Path, rslora: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(UNEQUAL)
    lora = random_lora(arch_of(model), dataclasses.replace(UNLIKE, rslora=rslora))
    exported(model, lora, tmp_path)
    assert "one alpha for a file" in capsys.readouterr().err
    found = added(read_gguf_lora(tmp_path / "lora.gguf", arch_of(model)))
    for module, delta in added(lora).items():
        assert torch.allclose(found[module], delta, rtol=1e-6, atol=1e-7), module


def test_ranks_of_their_own_and_one_alpha_need_no_folding(
    tiny: MakeTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(UNEQUAL)
    lora = random_lora(arch_of(model), LoraSpec({target: (number + 1, 7.0) for number, target in enumerate(TARGETS)}))
    exported(model, lora, tmp_path)
    assert "one alpha for a file" not in capsys.readouterr().err
    read = read_gguf_lora(tmp_path / "lora.gguf", arch_of(model))
    assert read.spec == lora.spec
    assert all(torch.equal(read.trainable.tensors[name], x) for name, x in lora.trainable.tensors.items())


def test_what_has_no_adapter_or_llama_cpp_cant_be_is_refused_and_leaves_nothing(tiny: MakeTiny, tmp_path: Path) -> None:
    model = tiny(UNEQUAL)
    with pytest.raises(UserError, match="brings no adapter"):
        export_model(str(model), to="gguf-lora", output=tmp_path / "x.gguf")
    with pytest.raises(UserError, match=r"--gguf-type f32 is for --to gguf"):
        export_model(str(model), to="gguf-lora", output=tmp_path / "x.gguf", gguf_type="f32")
    other = tiny(dataclasses.replace(UNEQUAL, layer_types=("full_attention", "sliding_attention")))
    lora = random_lora(arch_of(other), EVERYTHING)
    save_adapter(tmp_path / "adapter", lora, base_model="x")
    with pytest.raises(CheckpointError, match="`layer_types` is"):
        export_model(str(other), to="gguf-lora", output=tmp_path / "x.gguf", adapter=str(tmp_path / "adapter"))
    lora.trainable.tensors["lm_head.lora_B"][0, 0] = float("nan")
    save_adapter(tmp_path / "adapter", lora, base_model="x")
    with pytest.raises(AdapterError, match=r"`output.weight.lora_b` would hold inf or nan"):
        export_model(str(model), to="gguf-lora", output=tmp_path / "x.gguf", adapter=str(tmp_path / "adapter"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_disk_that_runs_full_is_told_and_nothing_is_left(
    tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("4096 requested and 512 written")  # numpy's words, without a number

    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
    model = tiny(SHALLOW)
    save_adapter(tmp_path / "given", random_lora(arch_of(model)), base_model="model")
    with pytest.raises(CheckpointError, match="could not be written: 4096 requested and 512 written; make room"):
        export_model(str(model), adapter=str(tmp_path / "given"), to="gguf-lora", output=tmp_path / "x.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["given"]


def test_a_file_that_isnt_such_an_adapter_is_refused(tiny: MakeTiny, tmp_path: Path) -> None:
    model = tiny(UNEQUAL)
    tensors = exported(model, random_lora(arch_of(model), EVERYTHING), tmp_path)

    def written(changed: dict[str, np.ndarray | None], kind: str = "lora") -> Path:
        file = tmp_path / "changed.gguf"
        writer = GGUFWriter(file, "gpt-oss")
        writer.add_type("adapter")
        writer.add_string("adapter.type", kind)
        writer.add_float32("adapter.lora.alpha", 6.0)
        for name, tensor in {**tensors, **changed}.items():
            if tensor is not None:
                writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    a, up = "blk.1.ffn_down_exps.weight.lora_a", "blk.0.ffn_up_exps.weight.lora_a"
    for changed, message in (
        ({a: None}, "`blk.1.ffn_down_exps.weight.lora_a` is missing"),
        ({a: tensors[a][:4]}, r"`blk.1.ffn_down_exps.weight.lora_a` is F32 \[4, 3, 96\]"),
        ({a: tensors[a].astype(np.float16)}, "is F16"),
        ({up: tensors[up] + 1}, "gate and up of model.layers.0.mlp.experts.gate_up_proj have an A of their own"),
        ({"blk.9.attn_q.weight.lora_a": tensors[a]}, "belongs to no matrix of this model"),
    ):
        with pytest.raises(AdapterError, match=message):
            read_gguf_lora(written(changed), arch_of(model))
    with pytest.raises(AdapterError, match="not a LoRA for gpt-oss"):
        read_gguf_lora(written({}, "control-vector"), arch_of(model))


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def next_token(server: Any, ids: list[int]) -> int:
    body = {"prompt": ids, "n_predict": 1, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())["tokens"][0]


def test_llama_cpps_server_applies_the_adapter_experts_router_and_head_included(tiny: MakeTiny, tmp_path: Path) -> None:
    model = tiny(ROUNDED, "bf16")
    lora = random_lora(arch_of(model), EVERYTHING, size=0.5)
    exported(model, lora, tmp_path)
    export_model(str(model), to="gguf", output=tmp_path / "base.gguf", gguf_type="f32")
    ours, _ = open_model(str(model), adapter=tmp_path / "adapter", dtype="float32", weights="bf16", device="cpu")
    generator, same, base_same, total = torch.Generator().manual_seed(3), 0, 0, 0
    exact = LlamaOptions(threads=1, ctx_size=512, parallel=1, cache_type_k="f32", cache_type_v="f32")
    plain = start_llama(tmp_path / "base.gguf", exact)
    adapted = start_llama(tmp_path / "base.gguf", dataclasses.replace(exact, lora=[str(tmp_path / "lora.gguf")]))
    for length in (3, 17, 40):
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        (answer,) = Engine(ours).generate([Request(ids, Sampling(0), 10)])
        for number in answer.ids:
            same += next_token(adapted, ids) == number
            base_same += next_token(plain, ids) == number
            total += 1
            ids.append(number)
    assert same >= 0.9 * total
    assert base_same < 0.5 * total, "the adapter has to matter"
    with pytest.raises(UserError, match=r"--lora .*nowhere.gguf: there is no such file"):
        start_llama(tmp_path / "base.gguf", dataclasses.replace(exact, lora=[str(tmp_path / "nowhere.gguf")]))


def rounding_yarn(model: Path, folder: Path) -> Path:
    """The same model with YaRN's range rounded as llama.cpp rounds it."""
    shutil.copytree(model, folder)
    config = json.loads((folder / CONFIG).read_text())
    config["rope_scaling"]["truncate"] = True
    if "rope_parameters" in config:
        config["rope_parameters"]["truncate"] = True
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python, which is built from source")
@pytest.mark.parametrize("spec", ["experts", "everything unlike"])
def test_llama_cpps_logits_are_ours_to_a_few_hundred_thousandths(trained: Path, tmp_path: Path, spec: str) -> None:
    import llama_cpp

    model = rounding_yarn(trained, tmp_path / "model")
    base = Checkpoint.open(model)
    assert base.arch.rope_truncate
    chosen = LoraSpec({"gate_up_proj": (4, 8.0), "down_proj": (4, 8.0)}) if spec == "experts" else UNLIKE
    lora = random_lora(base.arch, chosen, size=0.02)
    exported(model, lora, tmp_path)
    export_model(str(model), to="gguf", output=tmp_path / "base.gguf", gguf_type="f32")
    (sample,) = held_out(trained, 1)
    pack = pack_of([sample])
    with torch.no_grad():
        ours = changed_model(PassingWeights(base), Changes(lora)).logits(pack)
        plain = changed_model(PassingWeights(base)).logits(pack)
    options = {"n_ctx": 256, "logits_all": True, "type_k": 0, "type_v": 0, "n_threads": 1, "verbose": False}
    llama = llama_cpp.Llama(str(tmp_path / "base.gguf"), lora_path=str(tmp_path / "lora.gguf"), **options)
    llama.eval(pack.ids.tolist())
    theirs = torch.from_numpy(np.array(llama.scores[: len(pack.ids)]))
    off, moved = (theirs - ours).abs().max(), (ours - plain).abs().max()
    print(f"{spec}: max |logit difference| {off:.1e}, the adapter moves them by up to {moved:.1e}")
    assert moved > 0.1
    assert off <= 1e-3
    assert bool((theirs.argmax(-1) == ours.argmax(-1)).all())
