"""`ossia export`: what it writes, from every kind of source, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ossia.errors import AdapterError, CheckpointError, RunError, UserError
from ossia.export import export_model, verify_export, write_model
from ossia.export.merge import Changes
from ossia.export.source import Source, open_source
from ossia.model.arch import alternating_layers
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import TARGETS, LoraSpec
from ossia.model.peft import save_adapter
from ossia.model.tiny import make_tiny
from ossia.model.weights import split_gate_up
from ossia.ops.mxfp4 import dequantize_mxfp4
from ossia.train.optim import AdamW
from ossia.train.state import TRAINABLE, save_checkpoint
from tests.conftest import MakeTiny
from tests.export.conftest import EVERYTHING, MakeRun, arch_of, random_lora
from tests.oracle.model_pairs import load
from tests.shapes import SHALLOW

ATTENTION = LoraSpec(dict.fromkeys(("q_proj", "v_proj"), (4, 8.0)))
TEXT_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
}


def in_float32(checkpoint: Checkpoint, name: str) -> Tensor:
    """A weight as the computation has it, from either layout; experts (E, out, in), gate rows before up rows."""
    if ".mlp.experts." not in name or name.endswith("_bias"):
        return checkpoint.tensor(name).float()
    if checkpoint.layout == "bf16":
        weight = checkpoint.tensor(name).float().transpose(1, 2)
    else:
        blocks, scales = (checkpoint.tensor(name + part).contiguous() for part in ("_blocks", "_scales"))
        weight = dequantize_mxfp4(blocks, scales, torch.float32)
    return split_gate_up(weight) if "gate_up" in name else weight


def unchanged(base: Checkpoint, exported: Checkpoint, name: str) -> bool:
    """Bit for bit, signs of zeros included."""
    before, after = (in_float32(checkpoint, name).contiguous() for checkpoint in (base, exported))
    return torch.equal(before.view(torch.int32), after.view(torch.int32))


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_every_merged_weight_is_the_base_plus_the_delta_rounded_once(
    tiny: MakeTiny, tmp_path: Path, layout: str
) -> None:
    path = tiny(SHALLOW, layout)
    lora = random_lora(arch_of(path))
    save_adapter(tmp_path / "adapter", lora, base_model=str(path))
    export_model(str(path), to="hf-bf16", output=tmp_path / "out", adapter=str(tmp_path / "adapter"))
    base, exported = Checkpoint.open(path), Checkpoint.open(tmp_path / "out")
    assert exported.layout == "bf16"
    for module, site in lora.sites.items():
        name = module if site.num_experts else f"{module}.weight"
        a, b = (lora.trainable.tensors[f"{module}.lora_{side}"].double() for side in "AB")
        exact = in_float32(base, name).double() + lora.spec.scale(site.target) * (b @ a)
        found = in_float32(exported, name)
        assert found.dtype == torch.float32
        # half a unit in the last of bfloat16's eight bits, and float32's own rounding before it
        off = (found.double() - exact).abs() / exact.abs().clamp_min(1e-3)
        assert float(off.max()) <= 2**-8 * 1.001, name
        assert not torch.equal(found, in_float32(base, name)), name


def test_the_adapter_alone_is_written_for_peft_and_a_model_without_one_is_refused(
    tiny: MakeTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(SHALLOW)
    lora = random_lora(arch_of(model))
    save_adapter(tmp_path / "adapter", lora, base_model="elsewhere")
    export_model(str(model), to="peft", output=tmp_path / "out", adapter=str(tmp_path / "adapter"))
    assert "the same bit for bit" in capsys.readouterr().err
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        wanted = (tmp_path / "adapter" / name).read_bytes().replace(b"elsewhere", str(model).encode())
        assert (tmp_path / "out" / name).read_bytes() == wanted
    with pytest.raises(UserError, match=r"brings no adapter(.|\n)*--to hf-bf16"):
        export_model(str(model), to="peft", output=tmp_path / "none")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "none"))]


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_untouched_tensors_and_text_files_are_those_of_the_base(tiny: MakeTiny, tmp_path: Path, layout: str) -> None:
    path = tiny(SHALLOW, layout)
    lora = random_lora(arch_of(path), ATTENTION)
    save_adapter(tmp_path / "adapter", lora, base_model=str(path))
    export_model(str(path), to="hf-bf16", output=tmp_path / "out", adapter=str(tmp_path / "adapter"))
    base, exported = Checkpoint.open(path), Checkpoint.open(tmp_path / "out")
    for name in exported.specs:
        assert unchanged(base, exported, name) == (name.removesuffix(".weight") not in lora.sites), name
    for name in TEXT_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes(), name


def test_a_model_without_an_adapter_is_exported_as_it_is(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tiny(SHALLOW)
    export_model(str(path), to="hf-bf16", output=tmp_path / "out", adapter=None)
    base, exported = Checkpoint.open(path), Checkpoint.open(tmp_path / "out")
    assert all(unchanged(base, exported, name) for name in exported.specs)


def test_the_bytes_of_experts_that_were_not_trained_survive_in_mxfp4(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tiny(SHALLOW)
    base = Checkpoint.open(path)
    model = load(path, lora=random_lora(base.arch, ATTENTION))
    write_model(tmp_path / "out", model, tokenizer_from=path, layout="mxfp4")
    exported = Checkpoint.open(tmp_path / "out")
    assert exported.layout == "mxfp4"
    packed = [name for name in base.specs if name.endswith(("_blocks", "_scales"))]
    assert len(packed) == 4 * base.arch.num_layers
    codes = torch.cat([base.tensor(name).flatten() for name in packed if name.endswith("_blocks")])
    assert bool((codes & 15 == 8).any()), "no -0.0 among the codes: the test would show nothing"
    for name in base.specs:
        same = torch.equal(base.tensor(name), exported.tensor(name))
        assert same == (name.removesuffix(".weight") not in model.lora.sites), name


def test_a_model_trained_whole_is_written_with_every_weight_rounded_once(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tiny(SHALLOW)
    model = load(path)
    model.train_all_weights()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.trainable.tensors.values():
        tensor.mul_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
    write_model(tmp_path / "out", model, tokenizer_from=path)
    exported = Checkpoint.open(tmp_path / "out")
    for name, tensor in model.trainable.tensors.items():
        found = in_float32(exported, name)
        found = split_gate_up(found) if name.endswith("gate_up_proj_bias") else found
        assert torch.equal(found, tensor.bfloat16().float()), name


def optimizer_of(params: dict[str, Tensor]) -> AdamW:
    return AdamW(params, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


# --- sources ----------------------------------------------------------------------------------------------------------


def same_files(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_run_with_an_adapter_is_exported_from_its_result_and_before_that_from_its_newest_checkpoint(
    tiny: MakeTiny, tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny(SHALLOW)
    run = make_run(path, adapter={"rank": 4, "alpha": 8.0, "targets": ["attention", "experts"]}, held_out=True)
    spec = LoraSpec({t: (4, 8.0) for t in TARGETS if t not in ("router", "lm_head")})
    loras = {step: random_lora(arch_of(path), spec, seed=step) for step in (3, 12)}
    for step, lora in loras.items():
        params = lora.trainable.tensors
        save_checkpoint(run, step=step, params=params, optimizer=optimizer_of(params), progress={}, keep=2)
    for step in (3, 12):
        save_adapter(tmp_path / f"adapter-{step}", loras[step], base_model=str(path))
        export_model(
            str(path), to="hf-bf16", output=tmp_path / f"wanted-{step}", adapter=str(tmp_path / f"adapter-{step}")
        )
    assert "on fixed texts" in capsys.readouterr().err
    assert not same_files(tmp_path / "wanted-3", tmp_path / "wanted-12")

    export_model(str(run), to="hf-bf16", output=tmp_path / "newest")
    said = capsys.readouterr().err
    assert same_files(tmp_path / "newest", tmp_path / "wanted-12")
    assert "step-00000012" in said
    export_model(str(run), to="peft", output=tmp_path / "newest-adapter")
    for file in (tmp_path / "adapter-12").iterdir():
        assert (tmp_path / "newest-adapter" / file.name).read_bytes() == file.read_bytes()
    capsys.readouterr()
    assert "4 held-out texts" in said or "3 held-out texts" in said or "2 held-out texts" in said

    broken = run / "checkpoints" / "step-00000012" / TRAINABLE
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    export_model(str(run), to="hf-bf16", output=tmp_path / "before")
    assert same_files(tmp_path / "before", tmp_path / "wanted-3")
    assert "sha256 differs" in capsys.readouterr().err

    save_adapter(run / "adapter", loras[12], base_model=str(path))
    (tmp_path / "data.jsonl").unlink()
    export_model(str(run), to="hf-bf16", output=tmp_path / "final")
    assert same_files(tmp_path / "final", tmp_path / "wanted-12")
    assert "on fixed texts (the run's own can't be read: " in capsys.readouterr().err


def test_a_run_that_trained_all_weights_is_exported_from_its_model_or_its_newest_checkpoint(
    tiny: MakeTiny, tmp_path: Path, make_run: MakeRun
) -> None:
    path = tiny(SHALLOW)
    run = make_run(path)
    model = load(path)
    model.train_all_weights()
    params = model.trainable.tensors
    generator = torch.Generator().manual_seed(0)
    for tensor in params.values():
        tensor.mul_(1 + 0.05 * torch.randn(tensor.shape, generator=generator))
    save_checkpoint(run, step=5, params=params, optimizer=optimizer_of(params), progress={}, keep=1)
    export_model(str(run), to="hf-bf16", output=tmp_path / "from-checkpoint")
    write_model(run / "model", model, tokenizer_from=path)
    export_model(str(run), to="hf-bf16", output=tmp_path / "from-model")
    assert same_files(tmp_path / "from-checkpoint", run / "model")
    assert same_files(tmp_path / "from-model", run / "model")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_said_before_anything_is_written(
    tiny: MakeTiny, tmp_path: Path, make_run: MakeRun
) -> None:
    path, out = tiny(SHALLOW), tmp_path / "out"
    run = make_run(path, adapter={})
    other = tiny(dataclasses.replace(SHALLOW, hidden_size=96))
    save_adapter(tmp_path / "adapter", random_lora(arch_of(path), ATTENTION), base_model=str(path))
    cases = [
        ({"source": str(path), "to": "onnx"}, UserError, "no such format; allowed: hf-bf16, hf-mxfp4, gguf"),
        ({"source": str(path), "output": path}, CheckpointError, "exists already"),
        ({"source": str(tmp_path / "nowhere")}, CheckpointError, "no such folder"),
        ({"source": str(run), "adapter": str(run)}, UserError, "leave --adapter out"),
        ({"source": str(run)}, RunError, "no whole checkpoint yet"),
        ({"source": str(path), "adapter": str(run)}, AdapterError, "saved no checkpoint yet"),
        ({"source": str(other), "adapter": str(tmp_path / "adapter")}, AdapterError, r"q_proj\.lora_A\.weight` is"),
    ]
    for given, kind, message in cases:
        with pytest.raises(kind, match=message):
            export_model(**{"to": "hf-bf16", "output": out, "adapter": None, **given})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "data.jsonl", "run"]


def test_an_exported_model_that_answers_otherwise_is_refused(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tiny(SHALLOW)
    base = Checkpoint.open(path)
    model = load(path, lora=random_lora(base.arch, size=0.1))
    write_model(tmp_path / "right", model, tokenizer_from=path)
    said: list[str] = []
    right = verify_export(Source(base, Changes.of(model)), tmp_path / "right", said.append)
    assert right.kl < 0.005
    assert "KL" in said[0]
    # each single target left out, as a merge would that forgot it
    for target in EVERYTHING.targets:
        spec = LoraSpec({name: size for name, size in EVERYTHING.targets.items() if name != target})
        kept = {k: v for k, v in model.lora.trainable.tensors.items() if target not in k}
        wrong = load(path, lora=type(model.lora)(base.arch, spec, kept))
        write_model(tmp_path / target, wrong, tokenizer_from=path)
        with pytest.raises(CheckpointError, match="isn't the one that was trained"):
            verify_export(Source(base, Changes.of(model)), tmp_path / target, said.append)


def test_an_adapter_that_diverged_is_refused_and_leaves_nothing_behind(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tiny(SHALLOW)
    lora = random_lora(arch_of(path))
    lora.trainable.tensors["model.layers.1.mlp.experts.down_proj.lora_B"][3, 2, 1] = torch.inf
    save_adapter(tmp_path / "adapter", lora, base_model=str(path))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj` would hold inf or nan"):
        export_model(str(path), to="hf-bf16", output=tmp_path / "out", adapter=str(tmp_path / "adapter"))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_checkpoint_of_another_model_is_refused(tiny: MakeTiny, tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tiny(dataclasses.replace(SHALLOW, hidden_size=96)))
    model = load(tiny(SHALLOW))
    model.train_all_weights()
    params = model.trainable.tensors
    save_checkpoint(run, step=1, params=params, optimizer=optimizer_of(params), progress={}, keep=1)
    with pytest.raises(CheckpointError, match="was that model replaced since"):
        open_source(str(run), None, lambda text: None)


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import sys, threading, time, torch
from pathlib import Path
torch.set_num_threads(1)
from ossia.export import export_model

folder = Path(sys.argv[1])

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

def watch(done, peak):
    while not done.wait(0.002):
        peak[0] = max(peak[0], status("RssAnon"))

for depth in ("shallow", "deep"):
    done, peak = threading.Event(), [0]
    threading.Thread(target=watch, args=(done, peak), daemon=True).start()
    names = (str(folder / f"{depth}-{part}") for part in ("model", "adapter"))
    export_model(next(names), to="hf-bf16", output=folder / f"{depth}-out", adapter=next(names))
    done.set()
    print(peak[0])
for to in ("hf-bf16", "gguf"):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = status("VmRSS")
    export_model(str(folder / "deep-model"), to=to, output=folder / to, adapter=str(folder / "deep-adapter"))
    print(status("VmHWM") - start)
"""


def test_memory_does_not_grow_with_the_model(small_tokenizer: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_experts": 32}
    for depth, layers in (("shallow", 2), ("deep", 16)):
        arch = dataclasses.replace(SHALLOW, num_layers=layers, layer_types=alternating_layers(layers), **sizes)
        arch = make_tiny(tmp_path / f"{depth}-model", arch, tokenizer=small_tokenizer)
        spec = LoraSpec({**ATTENTION.targets, "gate_up_proj": (1, 1.0), "down_proj": (1, 1.0)})
        # zeros in B go the same way, and no router of the deep random model can decide otherwise after rounding
        save_adapter(tmp_path / f"{depth}-adapter", random_lora(arch, spec, size=0.0), base_model="model")
    # blocks from 64 KiB on go back when they are freed: what a heap keeps differs from run to run, by up to two layers
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200, env=env)
    shallow, deep, *resident = map(int, done.stdout.split())
    layer_bytes = 2 * 3 * arch.hidden_size * arch.intermediate_size * arch.num_experts
    assert Checkpoint.open(tmp_path / "deep-out").num_bytes > 16 * layer_bytes
    # its own memory; the pages of mapped files come and go as the machine likes
    # (fourteen layers more would be held if they were)
    assert deep - shallow < 2 * layer_bytes, f"{(deep - shallow) / layer_bytes:.2f} layers more"
    # here with them, from a heap that holds nothing: writing and comparing drop each tensor's pages with the tensor
    assert max(resident) < 3 * layer_bytes, f"{[size / layer_bytes for size in resident]} layers"
