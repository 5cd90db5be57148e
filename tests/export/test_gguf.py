"""`ossia export --to gguf`: the bytes, names and metadata of the file, and what is refused. tests/web has it run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize

from ossia.errors import CheckpointError, MissingExtraError, TokenizerError, UserError
from ossia.export import export_model
from ossia.export.verify import Agreement
from ossia.harmony import Vocabulary
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import LoraSpec
from ossia.model.peft import save_adapter
from ossia.model.tiny import make_tiny
from tests.conftest import MakeTiny
from tests.export.conftest import arch_of, random_lora
from tests.shapes import SHALLOW, UNEQUAL, UNUSUAL

ATTENTION = LoraSpec(dict.fromkeys(("q_proj", "v_proj"), (4, 8.0)))


def exported(model: Path, output: Path, **options: Any) -> dict[str, ReaderTensor]:
    export_model(str(model), to="gguf", output=output, **options)
    return {tensor.name: tensor for tensor in GGUFReader(output).tensors}


def apart(kl: float) -> Agreement:
    return Agreement(1, kl, kl, kl, 1.0)


def values(tensor: ReaderTensor) -> np.ndarray:
    """What llama.cpp computes with, as gguf's own reader has it."""
    return dequantize(tensor.data, tensor.tensor_type)


def test_untouched_experts_keep_every_code_and_scale_in_ggmls_order(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tiny(UNEQUAL)
    base, found = Checkpoint.open(path), exported(path, tmp_path / "x.gguf")
    for layer in range(UNEQUAL.num_layers):
        for projection, names in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            prefix = f"model.layers.{layer}.mlp.experts.{projection}"
            blocks, scales = (base.tensor(f"{prefix}_{part}").numpy() for part in ("blocks", "scales"))
            assert 8 in blocks & 15, "no -0.0 among the codes: the test would show less"
            for part, name in enumerate(names):
                tensor = found[f"blk.{layer}.ffn_{name}_exps.weight"]
                assert tensor.tensor_type == GGMLQuantizationType.MXFP4
                ours = tensor.data.reshape(*scales[:, part :: len(names)].shape, 17)
                assert np.array_equal(ours[..., 0], scales[:, part :: len(names)])
                theirs = blocks[:, part :: len(names)]
                for element in range(32):  # one by one, as the two formats are described
                    code = theirs[..., element // 2] >> 4 * (element % 2) & 15
                    assert np.array_equal(ours[..., 1 + element % 16] >> 4 * (element // 16) & 15, code), element


def test_names_and_shapes_are_those_that_the_gguf_package_lists_for_gpt_oss(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tiny(UNEQUAL)
    base, found = Checkpoint.open(path), exported(path, tmp_path / "x.gguf")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, UNEQUAL.num_layers)
    dense = [name for name in base.specs if ".experts." not in name and not name.endswith("sinks")]
    for name in dense:
        tensor = found.pop(known.get_name(name, (".weight", ".bias")))
        assert np.array_equal(values(tensor), base.tensor(name).float().numpy()), name
        plain = "norm" in name or "router" in name or name.endswith("bias")
        assert tensor.tensor_type == (GGMLQuantizationType.F32 if plain else GGMLQuantizationType.BF16), name
    for layer in range(UNEQUAL.num_layers):
        prefix, block = f"model.layers.{layer}", f"blk.{layer}"
        sinks = found.pop(f"{block}.attn_sinks.weight")
        assert np.array_equal(values(sinks), base.tensor(f"{prefix}.self_attn.sinks").float().numpy())
        gate_up = base.tensor(f"{prefix}.mlp.experts.gate_up_proj_bias").float().numpy()
        assert np.array_equal(values(found.pop(f"{block}.ffn_gate_exps.bias")), gate_up[:, 0::2])
        assert np.array_equal(values(found.pop(f"{block}.ffn_up_exps.bias")), gate_up[:, 1::2])
        down = base.tensor(f"{prefix}.mlp.experts.down_proj_bias").float().numpy()
        assert np.array_equal(values(found.pop(f"{block}.ffn_down_exps.bias")), down)
    assert sorted(found) == sorted(
        f"blk.{layer}.ffn_{part}_exps.weight" for layer in range(UNEQUAL.num_layers) for part in ("gate", "up", "down")
    )


def test_metadata_and_tokenizer_are_the_models(small_tokenizer: Path, tmp_path: Path) -> None:
    path, rows = tmp_path / "model", 600
    arch = make_tiny(path, UNUSUAL, tokenizer=small_tokenizer, vocab_rows=rows)
    exported(path, tmp_path / "named.gguf")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "named.gguf").fields.items()}
    wanted = {
        "general.architecture": "gpt-oss",
        "general.name": "named",
        "general.file_type": 38,
        "gpt-oss.block_count": arch.num_layers,
        "gpt-oss.context_length": arch.max_positions,
        "gpt-oss.embedding_length": arch.hidden_size,
        "gpt-oss.feed_forward_length": arch.intermediate_size,
        "gpt-oss.expert_feed_forward_length": arch.intermediate_size,
        "gpt-oss.attention.head_count": arch.num_heads,
        "gpt-oss.attention.head_count_kv": arch.num_kv_heads,
        "gpt-oss.attention.key_length": arch.head_dim,
        "gpt-oss.attention.value_length": arch.head_dim,
        "gpt-oss.attention.sliding_window": arch.sliding_window,
        "gpt-oss.attention.layer_norm_rms_epsilon": arch.rms_eps,
        "gpt-oss.expert_count": arch.num_experts,
        "gpt-oss.expert_used_count": arch.experts_per_token,
        "gpt-oss.rope.freq_base": arch.rope_theta,
        "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": arch.rope_factor,
        "gpt-oss.rope.scaling.original_context_length": arch.rope_original,
        "gpt-oss.rope.scaling.yarn_beta_fast": arch.rope_beta_fast,
        "gpt-oss.rope.scaling.yarn_beta_slow": arch.rope_beta_slow,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": (path / "chat_template.jinja").read_text(encoding="utf-8"),
    }
    for key, value in wanted.items():
        assert fields[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    vocab = Vocabulary.from_file(path)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == rows > vocab.size
    for name, number in vocab.special.items():
        assert (tokens[number], types[number]) == (name, TokenType.CONTROL)
    assert (tokens[-1], types[-1]) == (f"[PAD{rows - 1}]", TokenType.UNUSED)
    assert types.count(TokenType.NORMAL) == vocab.size - len(vocab.special)
    for key, name in (("bos", "<|startoftext|>"), ("eos", "<|return|>"), ("padding", "<|endoftext|>")):
        assert fields[f"tokenizer.ggml.{key}_token_id"] == vocab.special[name]
    assert all(len(merge.split(" ")) == 2 for merge in fields["tokenizer.ggml.merges"])


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_an_adapter_is_merged_as_the_bf16_export_merges_it(tiny: MakeTiny, tmp_path: Path, layout: str) -> None:
    path = tiny(SHALLOW, layout)
    save_adapter(tmp_path / "adapter", random_lora(arch_of(path)), base_model=str(path))
    found = exported(path, tmp_path / "x.gguf", adapter=str(tmp_path / "adapter"))
    export_model(str(path), to="hf-bf16", output=tmp_path / "hf", adapter=str(tmp_path / "adapter"))
    merged = Checkpoint.open(tmp_path / "hf")
    assert not any(tensor.tensor_type == GGMLQuantizationType.MXFP4 for tensor in found.values())
    assert np.array_equal(values(found["output.weight"]), merged.tensor("lm_head.weight").float().numpy())
    q = merged.tensor("model.layers.1.self_attn.q_proj.weight").float().numpy()
    assert np.array_equal(values(found["blk.1.attn_q.weight"]), q)
    router = merged.tensor("model.layers.1.mlp.router.weight").float().numpy()
    assert np.array_equal(values(found["blk.1.ffn_gate_inp.weight"]), router)
    gate_up = merged.tensor("model.layers.1.mlp.experts.gate_up_proj").float().numpy()
    for part, name in enumerate(("gate", "up")):
        wanted = gate_up[:, :, part::2].transpose(0, 2, 1)
        assert np.array_equal(values(found[f"blk.1.ffn_{name}_exps.weight"]), wanted), name
    down = merged.tensor("model.layers.1.mlp.experts.down_proj").float().numpy().transpose(0, 2, 1)
    assert np.array_equal(values(found["blk.1.ffn_down_exps.weight"]), down)


def test_experts_stay_mxfp4_where_the_adapter_is_elsewhere(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tiny(SHALLOW)
    save_adapter(tmp_path / "adapter", random_lora(arch_of(path), ATTENTION), base_model=str(path))
    before = exported(path, tmp_path / "base.gguf")
    after = exported(path, tmp_path / "x.gguf", adapter=str(tmp_path / "adapter"))
    changed = {name for name in after if not np.array_equal(before[name].data, after[name].data)}
    assert changed == {f"blk.{layer}.attn_{part}.weight" for layer in range(2) for part in "qv"}


@pytest.mark.parametrize(("kind", "off"), [("f32", 0.0), ("f16", 2.0**-11), ("q8_0", 0.5 / 127 + 2.0**-11)])
def test_other_types_are_as_near_as_they_can_be(tiny: MakeTiny, tmp_path: Path, kind: str, off: float) -> None:
    path = tiny(SHALLOW, "bf16")
    base, found = Checkpoint.open(path), exported(path, tmp_path / "x.gguf", gguf_type=kind)
    for name, ours in (
        ("lm_head.weight", "output.weight"),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
    ):
        assert found[ours].tensor_type == GGMLQuantizationType[kind.upper()]
        wanted = base.tensor(name).float().numpy().reshape(-1, 32)
        far = np.abs(values(found[ours]).reshape(-1, 32) - wanted)
        size = np.abs(wanted).max(-1, keepdims=True) if kind == "q8_0" else np.abs(wanted)
        assert np.all(far <= size * (off * 1.01) + 2.0**-24), name
    assert found["blk.0.ffn_down_exps.weight"].tensor_type == GGMLQuantizationType[kind.upper()]
    assert found["blk.0.ffn_gate_inp.weight"].tensor_type == GGMLQuantizationType.F32


def test_of_a_model_that_nobody_trained_nothing_is_said_of_training(
    tiny: MakeTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes over the same weights differ by rounding, or may: here they do."""
    monkeypatch.setattr("ossia.export.export.compare", lambda *_: [apart(1e-9), apart(1e-11)])
    exported(tiny(SHALLOW), tmp_path / "x.gguf")
    assert "training moved" not in capsys.readouterr().err
    lora = random_lora(arch_of(tiny(SHALLOW)), ATTENTION)
    save_adapter(tmp_path / "adapter", lora, base_model="x")
    exported(tiny(SHALLOW), tmp_path / "y.gguf", adapter=str(tmp_path / "adapter"))
    assert "training moved the model by a KL of only 1.00e-11" in capsys.readouterr().err


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_file_that_computes_something_else_is_refused_and_removed(
    tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_the_checkpoints_order(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.cat((scales.unsqueeze(-1), blocks), dim=-1)

    monkeypatch.setattr("ossia.export.gguf.write.repack_mxfp4", in_the_checkpoints_order)
    with pytest.raises(CheckpointError, match="isn't the one that was trained"):
        exported(tiny(SHALLOW), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_a_gguf_file_cannot_say_is_refused(tiny: MakeTiny, tmp_path: Path) -> None:
    full = ("full_attention", "full_attention")
    for change, key in (({"layer_types": full}, "layer_types"), ({"swiglu_limit": 5.0}, "swiglu_limit")):
        with pytest.raises(CheckpointError, match=rf"`{key}` is .* a GGUF file can't say otherwise"):
            exported(tiny(dataclasses.replace(SHALLOW, **change)), tmp_path / "x.gguf")
    odd = dataclasses.replace(SHALLOW, head_dim=12)
    with pytest.raises(CheckpointError, match=r"o_proj\.weight` has 48 inputs; Q8_0 needs multiples of 32"):
        exported(tiny(odd), tmp_path / "x.gguf", gguf_type="q8_0")
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_said_before_anything_is_written(
    tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, taken = tiny(SHALLOW), tmp_path / "taken.gguf"
    taken.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already; name a new file"):
        exported(path, taken)
    with pytest.raises(CheckpointError, match="is no folder; make it first"):
        exported(path, tmp_path / "no" / "x.gguf")
    with pytest.raises(UserError, match="--gguf-type f16 is for --to gguf"):
        export_model(str(path), to="hf-bf16", output=tmp_path / "x", gguf_type="f16")
    monkeypatch.setattr("ossia.export.export.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ossia\[gguf\]'"):
        exported(path, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == [taken]
    assert taken.read_text() == "mine"


def test_a_tokenizer_that_llama_cpp_cannot_have_is_refused(small_tokenizer: Path, tmp_path: Path) -> None:
    layout = json.loads(small_tokenizer.read_text(encoding="utf-8"))
    single = [token for token in layout["model"]["vocab"] if len(token) == 1]
    layout["model"] |= {"merges": [], "vocab": {token: number for number, token in enumerate(single)}}
    for number, token in enumerate(layout["added_tokens"], len(single)):
        token["id"] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    make_tiny(tmp_path / "model", SHALLOW, tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="has no merges"):
        exported(tmp_path / "model", tmp_path / "x.gguf")
