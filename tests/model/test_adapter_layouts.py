"""Adapters that other programs and older versions wrote: read as what their writers compute, told apart, or refused.

The files are in tests/golden/adapters/, each made by the real package (tests/golden/write_adapters.py says how).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ossia.cli.commands import AdapterLayout
from ossia.errors import AdapterError
from ossia.model.arch import Arch
from ossia.model.lora import Lora, LoraSpec
from ossia.model.peft import CONFIG, LAYOUTS, TENSORS, LayoutName, load_adapter, save_adapter
from ossia.model.weights import interleave_gate_up
from tests.shapes import UNEQUAL

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden" / "adapters"
ARCH = dataclasses.replace(
    UNEQUAL, hidden_size=16, intermediate_size=12, num_experts=3, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=32
)
# With every matrix of down as wide as it is high, as in the released models.
SQUARE = dataclasses.replace(ARCH, intermediate_size=16)
UNSLOTH = "unsloth-zoo-2026.9.2"
# writer -> what has to be said of its layout
WRITERS = {
    "peft-0.17.0-transformers-4": "",
    "peft-0.18.1-transformers-5": "",
    "peft-0.19.0-transformers-5": "rank-major-transposed, as PEFT 0.19.0 wrote it, and later ones on transformers 4",
    "peft-0.21.2-transformers-4": "rank-major-transposed, as PEFT 0.19.0 wrote it, and later ones on transformers 4",
    "unsloth-zoo-2026.9.2-4bit": "one pair of tensors for each expert, as Unsloth's 4-bit experts have it",
    "tinker-cookbook-0.6.1": "one pair of tensors for each expert, gate and up by themselves, as Tinker's cookbook",
}


def deltas_of(lora: Lora) -> dict[str, Tensor]:
    """What an adapter adds to every matrix, (in, out), of experts (E, in, out), as the checkpoint has them."""
    found = {}
    for module, site in lora.sites.items():
        a, b = (lora.trainable.tensors[f"{module}.lora_{side}"] for side in "AB")
        b = interleave_gate_up(b) if site.target == "gate_up_proj" else b
        found[module] = lora.spec.scale(site.target) * (b @ a).transpose(-1, -2)
    return found


def same_deltas(lora: Lora, folder: Path) -> bool:
    found, wanted = deltas_of(lora), load_file(folder / "deltas.safetensors")
    return found.keys() == wanted.keys() and all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in wanted)


@pytest.mark.parametrize("writer", WRITERS)
def test_an_adapter_that_another_program_wrote_adds_what_its_writer_adds(tmp_path: Path, writer: str) -> None:
    said: list[str] = []
    lora = load_adapter(GOLDEN / writer, ARCH, CPU, say=said.append)
    assert same_deltas(lora, GOLDEN / writer)
    assert (len(said) == 1 and WRITERS[writer] in said[0]) if WRITERS[writer] else said == []
    # and in today's layout it is the same adapter, with nothing left to say
    save_adapter(tmp_path / "today", lora, base_model="x")
    again = load_adapter(tmp_path / "today", ARCH, CPU, say=said.append)
    assert same_deltas(again, GOLDEN / writer)
    assert len(said) == bool(WRITERS[writer])


def test_the_command_offers_the_layouts_that_there_are() -> None:
    assert {layout.value for layout in AdapterLayout} == set(LAYOUTS)


def test_a_transposed_file_isnt_read_as_if_it_were_straight_by_its_bytes(tmp_path: Path) -> None:
    straight, turned = (load_file(GOLDEN / f"peft-0.1{n}-transformers-5" / TENSORS) for n in ("8.1", "9.0"))
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    assert straight[name].shape == (6, 12)
    assert turned[name].shape == (6, 16)


# --- Unsloth's order, which no shape shows ----------------------------------------------------------------------------


def test_an_unsloth_adapter_without_its_mark_is_refused_naming_both_readings_and_what_to_do() -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapter(GOLDEN / UNSLOTH, ARCH, CPU)
    text = str(caught.value)
    assert "can be read in 2 ways" in text
    assert "\n  rank-major: as PEFT" in text
    assert "\n  expert-major: as Unsloth before 2026.9.6" in text
    assert "--adapter-layout expert-major --to peft" in text
    assert str(GOLDEN / UNSLOTH / TENSORS) in text


def test_the_layout_that_the_user_says_decides(tmp_path: Path) -> None:
    assert same_deltas(load_adapter(GOLDEN / UNSLOTH, ARCH, CPU, layout="expert-major"), GOLDEN / UNSLOTH)
    other = load_adapter(GOLDEN / UNSLOTH, ARCH, CPU, layout="rank-major")
    assert not same_deltas(other, GOLDEN / UNSLOTH)
    assert same_deltas(other, GOLDEN / "peft-0.18.1-transformers-5"), "PEFT's reading of the same tensors"


def marked(folder: Path, **marks: Any) -> Path:
    """Unsloth's adapter with the marks that it writes from 2026.9.6 on; `inside`: those of `auto_mapping`."""
    shutil.copytree(GOLDEN / UNSLOTH, folder)
    config = json.loads((folder / CONFIG).read_text())
    config["auto_mapping"] |= marks.pop("inside", {})
    (folder / CONFIG).write_text(json.dumps({**config, **marks}))
    return folder


def by_parameter(gate_up: str, down: str) -> dict[str, Any]:
    orders = {"gate_up_proj": gate_up, "down_proj": down}
    detail = {name: {"lora_B_layout": order, "num_experts": 3} for name, order in orders.items()}
    return {"unsloth_fused_expert_lora": {"lora_A_layout": "grouped_by_expert", "parameters": detail}}


MARKS: dict[str, dict[str, Any]] = {
    "flat": {"lora_B_layout": "grouped_by_expert"},
    "by parameter": by_parameter("grouped_by_expert", "grouped_by_expert"),
    "inside": {"inside": by_parameter("grouped_by_expert", "grouped_by_expert")},
    "the outer one counts": {
        "inside": by_parameter("rank_major", "rank_major"),
        "lora_B_layout": "grouped_by_expert",
    },
}


@pytest.mark.parametrize("mark", MARKS)
def test_the_mark_of_a_newer_unsloth_decides_and_cant_be_overruled(tmp_path: Path, mark: str) -> None:
    said: list[str] = []
    folder = marked(tmp_path / "x", **MARKS[mark])
    assert same_deltas(load_adapter(folder, ARCH, CPU, say=said.append), GOLDEN / UNSLOTH)
    assert "expert-major (of down_proj, gate_up_proj), as Unsloth" in said[0]
    with pytest.raises(AdapterError, match=r"says that gate_up_proj is expert-major, not rank-major; leave"):
        load_adapter(folder, ARCH, CPU, layout="rank-major")


def test_a_mark_may_differ_between_the_two_matrices(tmp_path: Path) -> None:
    said: list[str] = []
    folder = marked(tmp_path / "x", **by_parameter("rank_major", "grouped_by_expert"))
    found = deltas_of(load_adapter(folder, ARCH, CPU, say=said.append))
    grouped, pefts = (load_file(GOLDEN / who / "deltas.safetensors") for who in (UNSLOTH, "peft-0.18.1-transformers-5"))
    for layer in range(2):
        owner = f"model.layers.{layer}.mlp.experts"
        assert torch.allclose(found[f"{owner}.down_proj"], grouped[f"{owner}.down_proj"], atol=1e-6)
        assert torch.allclose(found[f"{owner}.gate_up_proj"], pefts[f"{owner}.gate_up_proj"], atol=1e-6)
    assert "expert-major (of down_proj)" in said[0]
    with pytest.raises(AdapterError, match="`lora_B_layout` of down_proj is 'mixed'"):
        load_adapter(marked(tmp_path / "y", **by_parameter("rank_major", "mixed")), ARCH, CPU)


def test_rank_major_marked_is_todays_layout(tmp_path: Path) -> None:
    said: list[str] = []
    folder = marked(tmp_path / "x", lora_B_layout="rank_major")
    assert same_deltas(load_adapter(folder, ARCH, CPU, say=said.append), GOLDEN / "peft-0.18.1-transformers-5")
    assert said == []


def test_a_rank_of_one_has_one_reading_and_attention_alone_none_to_tell(tmp_path: Path) -> None:
    for number, targets in enumerate(({"gate_up_proj": (1, 2.0), "down_proj": (1, 2.0)}, {"q_proj": (2, 4.0)})):
        lora = random_lora(ARCH, LoraSpec(targets))
        folder = tmp_path / str(number)
        save_adapter(folder, lora, base_model="x")
        set_config(folder, auto_mapping={"unsloth_fixed": True}, peft_version="0.21.2")
        found = deltas_of(load_adapter(folder, ARCH, CPU))
        assert all(torch.equal(delta, found[name]) for name, delta in deltas_of(lora).items())
    with pytest.raises(AdapterError, match=r"adapts no experts, so it has one reading; leave --adapter-layout"):
        load_adapter(tmp_path / "1", ARCH, CPU, layout="expert-major")


# --- transposed or not, where a matrix is square ----------------------------------------------------------------------


def random_lora(arch: Arch, spec: LoraSpec) -> Lora:
    lora = Lora.fresh(arch, spec, seed=0, device=CPU)
    for name, tensor in lora.trainable.tensors.items():
        if name.endswith("lora_B"):
            tensor.normal_(generator=torch.Generator().manual_seed(1))
    return lora


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def transposed(folder: Path) -> None:
    """The same adapter as a PEFT that turns parameters round has it: A for B and B for A."""
    tensors = load_file(folder / TENSORS)
    turned = dict(tensors)
    for name in [name for name in tensors if ".mlp.experts." in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a_Er, b_OrE = tensors[name].unflatten(0, (3, -1)), tensors[other].unflatten(1, (-1, 3))
        turned[name] = b_OrE.permute(2, 1, 0).flatten(0, 1).contiguous()
        turned[other] = a_Er.permute(2, 1, 0).flatten(1).contiguous()
    save_file(turned, folder / TENSORS)


@pytest.mark.parametrize("turned", [False, True])
def test_gate_up_tells_the_orientation_of_a_square_down(tmp_path: Path, turned: bool) -> None:
    lora = random_lora(SQUARE, LoraSpec({"gate_up_proj": (2, 4.0), "down_proj": (2, 4.0)}))
    save_adapter(tmp_path / "x", lora, base_model="x")
    set_config(tmp_path / "x", peft_version="0.21.2")
    if turned:
        transposed(tmp_path / "x")
    found = deltas_of(load_adapter(tmp_path / "x", SQUARE, CPU))
    assert all(torch.allclose(delta, found[name], atol=1e-6) for name, delta in deltas_of(lora).items())
    said: LayoutName = "rank-major" if turned else "rank-major-transposed"
    with pytest.raises(AdapterError, match=rf"by their shapes its tensors are {'' if turned else 'not '}transposed"):
        load_adapter(tmp_path / "x", SQUARE, CPU, layout=said)


def test_a_square_down_alone_is_refused_unless_its_version_or_the_user_decides(tmp_path: Path) -> None:
    lora = random_lora(SQUARE, LoraSpec({"down_proj": (2, 4.0)}))
    wanted, folder = deltas_of(lora), tmp_path / "x"
    save_adapter(folder, lora, base_model="x")

    def reads(layout: LayoutName | None = None) -> bool:
        found = deltas_of(load_adapter(folder, SQUARE, CPU, layout=layout))
        return all(torch.allclose(delta, found[name], atol=1e-6) for name, delta in wanted.items())

    assert reads(), "Ossia's own, and PEFT's until 0.17: they leave no version"
    set_config(folder, peft_version="0.18.1")
    assert reads(), "turns nothing round"
    for version in ("0.19.0", "0.21.2", "1.0.0"):
        set_config(folder, peft_version=version)
        with pytest.raises(
            AdapterError, match=r"in 2 ways(.|\n)*rank-major: (.|\n)*rank-major-transposed: as PEFT 0.19"
        ):
            reads()
    assert reads("rank-major")
    transposed(folder)
    assert reads("rank-major-transposed")
    assert not reads("rank-major")
    set_config(folder, auto_mapping={"unsloth_fixed": True})
    with pytest.raises(AdapterError, match="in 4 ways"):
        reads()


# --- one by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["unsloth-zoo-2026.9.2-4bit", "tinker-cookbook-0.6.1"])
def test_experts_one_by_one_have_to_be_all_there_and_nothing_can_be_said_about_them(
    tmp_path: Path, writer: str
) -> None:
    with pytest.raises(AdapterError, match="stores experts one by one, so it has one reading"):
        load_adapter(GOLDEN / writer, ARCH, CPU, layout="rank-major")
    shutil.copytree(GOLDEN / writer, tmp_path / "x")
    tensors = load_file(tmp_path / "x" / TENSORS)
    gone = next(name for name in sorted(tensors) if ".mlp.experts." in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "x" / TENSORS)
    with pytest.raises(AdapterError, match=rf"`{gone}` .* is missing"):
        load_adapter(tmp_path / "x", ARCH, CPU)


def test_an_adapter_on_some_experts_only_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "unsloth-zoo-2026.9.2-4bit", tmp_path / "x")
    targets = json.loads((tmp_path / "x" / CONFIG).read_text())["target_modules"]
    set_config(tmp_path / "x", target_modules=[name for name in targets if name != "down_projs.1"])
    with pytest.raises(AdapterError, match=r"down_proj is adapted in layers \[0, 1\], but not all of their experts"):
        load_adapter(tmp_path / "x", ARCH, CPU)


def test_gate_and_up_apart_keep_their_scaling_with_rslora(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "tinker-cookbook-0.6.1", tmp_path / "x")
    set_config(tmp_path / "x", use_rslora=True)
    found = deltas_of(load_adapter(tmp_path / "x", ARCH, CPU))
    wanted = load_file(GOLDEN / "tinker-cookbook-0.6.1" / "deltas.safetensors")
    for name, delta in wanted.items():  # alpha / sqrt(2) instead of alpha / 2
        assert torch.allclose(found[name], delta * 2**0.5, atol=1e-5), name


# --- what is written --------------------------------------------------------------------------------------------------


def test_todays_files_are_what_vllm_stacks_into_the_layers_matrices(tmp_path: Path) -> None:
    """vLLM 0.32 `_stack_moe_lora_weights`: A (E r, in) to (E, r, in); B (out, r E) to (out, r, E) to (E, out, r); gate
    rows even and up rows odd, as in its fused weight. Its own code was run once on such a file, with equal products."""
    lora = random_lora(ARCH, LoraSpec({"gate_up_proj": (2, 4.0), "down_proj": (3, 3.0)}))
    save_adapter(tmp_path / "x", lora, base_model="x")
    tensors, deltas = load_file(tmp_path / "x" / TENSORS), deltas_of(lora)
    for layer in range(ARCH.num_layers):
        owner = f"model.layers.{layer}.mlp.experts"
        for name, place, scale in (("gate_up_proj", ".base_layer", 2.0), ("down_proj", "", 1.0)):
            a, b = (tensors.pop(f"base_model.model.{owner}{place}.lora_{side}.weight") for side in "AB")
            a_Erd = a.reshape(3, -1, a.shape[-1])
            b_Eor = b.reshape(b.shape[0], -1, 3).permute(2, 0, 1)
            assert torch.allclose(scale * (b_Eor @ a_Erd).transpose(1, 2), deltas[f"{owner}.{name}"], atol=1e-6)
    assert tensors == {}
