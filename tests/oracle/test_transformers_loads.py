"""Oracle: transformers 5.23.0 and 4.57.6 load Ossia's checkpoints as they are, both layouts, and compute the same.

4.57.6 runs in a process of its own, see `old_transformers.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ossia.model.arch import SHAPES, Arch, Layout
from ossia.model.checkpoint import Checkpoint
from ossia.model.tiny import make_tiny
from ossia.ops.mxfp4 import dequantize_mxfp4
from tests.harmony.support import o200k
from tests.oracle.old_transformers import run_transformers_457
from tests.shapes import UNUSUAL

CONVERSATION = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "The capital of France? " * 20},
    {"role": "assistant", "thinking": "Paris.", "content": "Paris"},
    {"role": "user", "content": "Of Norway?"},
]


class Twins(NamedTuple):
    """One random model as an MXFP4 and as a bf16 checkpoint."""

    mxfp4: Path
    bf16: Path


@pytest.fixture(scope="module")
def twins(o200k_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    folder = tmp_path_factory.mktemp("twins")
    found = Twins(folder / "mxfp4", folder / "bf16")
    make_tiny(found.mxfp4, UNUSUAL, seed=5, tokenizer=o200k_tokenizer)
    make_tiny(found.bf16, UNUSUAL, seed=5, weights="bf16", tokenizer=found.mxfp4, shard_bytes=20e6)
    assert len(Checkpoint.open(found.bf16).files) > 1
    return found


@pytest.fixture(scope="module")
def tokenizer(twins: Twins) -> Any:
    return AutoTokenizer.from_pretrained(twins.bf16)


@pytest.fixture(scope="module")
def ids(tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)


def _load(path: Path, dtype: str) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model


def _logits(path: Path, dtype: str, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return _load(path, dtype)(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_523_computes_the_same_from_both_layouts(dtype: str, twins: Twins, ids: list[int]) -> None:
    packed, plain = _logits(twins.mxfp4, dtype, ids), _logits(twins.bf16, dtype, ids)
    assert packed.shape == (len(ids), UNUSUAL.vocab_size)
    assert packed.isfinite().all()
    assert packed.std() > 0.3
    assert torch.equal(packed, plain)


def test_transformers_523_loads_bfloat16_unless_told_otherwise(twins: Twins) -> None:
    for path in twins:
        assert {tensor.dtype for tensor in _load(path, "auto").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_transformers_523_reads_and_writes_the_config_that_we_mean(layout: Layout, tmp_path: Path) -> None:
    for arch in (UNUSUAL, SHAPES["20b"]):
        config = GptOssConfig(**arch.to_config(layout))
        config.save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text()
        assert "rope_parameters" in text
        assert Arch.from_config(json.loads(text), "config.json") == arch


def test_transformers_523_tokenizes_as_ossia_does_and_knows_where_to_stop(twins: Twins, tokenizer: Any) -> None:
    text = "Straße, 12345 naïve\n\n  it's 東京 🎼 <b>"
    assert tokenizer(text).input_ids == o200k().encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (199998, 200002, 199999)
    assert tokenizer.model_max_length == UNUSUAL.max_positions
    for path in twins:
        config = GenerationConfig.from_pretrained(path)
        assert (config.eos_token_id, config.pad_token_id) == ([200002, 199999, 200012], 199999)


def test_transformers_523_dequantises_the_blocks_to_the_same_bits(twins: Twins) -> None:
    checkpoint = Checkpoint.open(twins.mxfp4)
    base = "model.layers.1.mlp.experts.down_proj"
    blocks, scales = checkpoint.tensor(f"{base}_blocks"), checkpoint.tensor(f"{base}_scales")
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(dequantize_mxfp4(blocks, scales, torch.bfloat16).mT, theirs)


def test_transformers_523_loads_a_vocabulary_with_padding_rows(small_tokenizer: Path, tmp_path: Path) -> None:
    arch = make_tiny(tmp_path / "padded", UNUSUAL, tokenizer=small_tokenizer, vocab_rows=640)
    model, tokenizer = _load(tmp_path / "padded", "float32"), AutoTokenizer.from_pretrained(tmp_path / "padded")
    ids = tokenizer("You are ChatGPT", return_tensors="pt").input_ids
    assert len(tokenizer) < arch.vocab_size == 640
    with torch.no_grad():
        assert model(ids).logits.shape[-1] == 640


@pytest.fixture(scope="module")
def old_results(twins: Twins, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers 4.57.6 makes of the twins."""
    return run_transformers_457(*twins, CONVERSATION, tmp_path_factory.mktemp("old"))


def test_transformers_457_computes_the_same_from_both_layouts(old_results: dict[str, Any]) -> None:
    assert old_results["version"] == "4.57.6"
    assert old_results["mxfp4"].isfinite().all()
    assert torch.equal(old_results["mxfp4"], old_results["bf16"])


def test_transformers_457_and_523_agree_on_ids_stops_rope_and_logits(
    old_results: dict[str, Any], twins: Twins, ids: list[int]
) -> None:
    assert old_results["ids"] == ids
    assert (old_results["eos"], old_results["pad"]) == (200002, 199999)
    assert old_results["stops"] == [200002, 199999, 200012]
    model = _load(twins.bf16, "float32")
    assert torch.allclose(old_results["inv_freq"], model.model.rotary_emb.inv_freq, rtol=1e-6)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    assert torch.allclose(old_results["float32"], logits, atol=1e-4)
