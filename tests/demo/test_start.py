"""The untrained checkpoint, its vocabulary and the recipe: what the demo's training begins with."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from ossia.config import check_recipe, load_recipe
from ossia.demo.conversations import read_rows
from ossia.demo.prepare import RECIPE, main
from ossia.demo.start import write_untrained
from ossia.demo.vocabulary import conversation_of
from ossia.harmony.render import Renderer
from ossia.harmony.vocab import Vocabulary
from ossia.model.arch import SHAPES
from ossia.model.checkpoint import Checkpoint
from ossia.ops.mxfp4 import dequantize_mxfp4


def test_the_untrained_model_is_in_the_released_format_and_under_30_million_parameters(prepared):
    checkpoint = Checkpoint.open(prepared / "start")
    assert checkpoint.layout == "mxfp4"
    embeddings = 2 * checkpoint.arch.vocab_size * checkpoint.arch.hidden_size
    assert 3e6 < checkpoint.arch.num_parameters() - embeddings < 30e6


def test_the_untrained_weights_have_the_spread_they_are_drawn_with(prepared):
    checkpoint = Checkpoint.open(prepared / "start")
    prefix = "model.layers.1.mlp.experts.gate_up_proj"
    blocks, scales = (checkpoint.tensor(f"{prefix}{part}") for part in ("_blocks", "_scales"))
    experts = dequantize_mxfp4(blocks.clone(), scales.clone(), torch.float32)
    attention = checkpoint.tensor("model.layers.1.self_attn.q_proj.weight").float()
    assert experts.std().item() == pytest.approx(0.08, rel=0.03)
    assert attention.std().item() == pytest.approx(0.08, rel=0.03)
    assert not checkpoint.tensor("model.layers.1.self_attn.q_proj.bias").any()


def test_the_same_seed_gives_the_same_untrained_bytes_and_another_seed_does_not(prepared, tmp_path):
    tokenizer = prepared / "data" / "tokenizer.json"
    for name, seed in (("same", 0), ("other", 1)):
        write_untrained(tmp_path / name, tokenizer, seed=seed)
    first, same, other = (
        (folder / "model.safetensors").read_bytes()
        for folder in (prepared / "start", tmp_path / "same", tmp_path / "other")
    )
    assert first == same != other


def test_experts_can_be_as_wide_as_asked_for(prepared, tmp_path):
    arch = write_untrained(tmp_path / "wide", prepared / "data" / "tokenizer.json", seed=0, width=128)
    assert arch.intermediate_size == 128
    assert Checkpoint.open(tmp_path / "wide").arch == arch


def test_every_row_has_the_same_tokens_under_the_small_vocabulary_as_under_the_full_one(prepared, o200k_tokenizer):
    full, small = Vocabulary.from_file(o200k_tokenizer), Vocabulary.from_file(prepared / "start")
    renderers = [(vocab, Renderer(vocab)) for vocab in (full, small)]
    rows = read_rows(prepared / "data" / "train.jsonl")
    seen: Counter[str] = Counter()
    for row in rows:
        conversation = conversation_of(row)
        texts = [[vocab.token(n) for n in renderer.training_ids(conversation)] for vocab, renderer in renderers]
        assert texts[0] == texts[1]
        seen.update(texts[1])
    assert small.size < 1500
    assert len(seen) > 400, "the rows use few tokens"


def test_a_digit_of_a_question_is_one_token(prepared):
    vocab = Vocabulary.from_file(prepared / "start")
    assert [vocab.token(number) for number in vocab.encode("4 0 7")] == ["4", " ", "0", " ", "7"]


def test_nothing_is_written_where_something_is_and_the_command_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("mine")
    monkeypatch.setattr("sys.argv", ["prepare", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"{tmp_path / 'data'} is there already; name another folder, or remove it first\n"
    assert [file.name for file in tmp_path.rglob("*")] == ["data", "train.jsonl"]
    assert (tmp_path / "data" / "train.jsonl").read_text() == "mine"


def test_the_recipe_passes_its_own_checks(prepared):
    recipe = load_recipe(prepared / RECIPE)
    check_recipe(recipe)
    assert recipe.output == prepared
    assert recipe.adapter is None
    assert recipe.train.tokens_per_pack == recipe.train.tokens_per_step == 512


def test_the_untrained_model_is_the_demo_shape_with_its_own_vocabulary(prepared):
    vocab_size = Vocabulary.from_file(prepared / "start").size
    arch = Checkpoint.open(prepared / "start").arch
    assert arch == replace(SHAPES["demo"], vocab_size=vocab_size)
    assert (arch.num_layers, arch.num_experts, arch.experts_per_token, arch.sliding_window) == (4, 32, 4, 128)
    assert arch.layer_types[:2] == ("sliding_attention", "full_attention")
