"""Folders that `save_pretrained` leaves after `merge_and_unload`: a start for further training, as they are.

Written by transformers 5.23.0 here, and by 4.57.6 in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ossia
from benchmarks.clients.venvs import transformers_457
from ossia.errors import CheckpointError
from ossia.harmony import Vocabulary
from ossia.model.checkpoint import INDEX, Checkpoint
from ossia.model.lora import LoraSpec
from ossia.model.peft import save_adapter
from tests.conftest import MakeTiny
from tests.export.conftest import arch_of, random_lora
from tests.oracle import save_merged as script
from tests.oracle.model_pairs import documents, load, load_transformers, pack_of, relative_error
from tests.shapes import SHALLOW

ATTENTION = LoraSpec(dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4, 8.0)))
SHARDS = {"one file": "1GB", "shards": "100KB"}


@pytest.fixture(scope="module")
def adapter(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On attention, which both versions merge."""
    base, folder = tiny(SHALLOW, "bf16"), tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(folder, random_lora(arch_of(base), ATTENTION), base_model=str(base))
    return folder


def saved_by_457(*arguments: str | Path) -> None:
    command = [sys.executable, script.__file__, *arguments]
    environment = os.environ | {"PYTHONPATH": str(transformers_457())}
    subprocess.run(list(map(str, command)), check=True, timeout=240, env=environment)


def assert_trains(folder: Path, base: Path, work: Path) -> None:
    """Opens, computes what transformers computes of it, and another step of training goes on from it."""
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.layout, checkpoint.arch) == ("bf16", arch_of(base))
    pack = pack_of(documents(checkpoint.arch, (200,)))
    with torch.no_grad():
        theirs = load_transformers(folder)(pack.ids[None]).logits[0]
    ours = load(folder).logits(pack)
    assert relative_error(ours, theirs) <= 1e-5
    assert relative_error(load(base).logits(pack), ours) > 0.05, "the adapter changed nothing: this shows little"
    assert Vocabulary.from_file(folder).encode("It's 12.") == Vocabulary.from_file(base).encode("It's 12.")
    row = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]}
    (work / "rows.jsonl").write_text(json.dumps(row) + "\n")
    recipe = {"model": str(folder), "data": str(work / "rows.jsonl"), "output": str(work / "run")}
    train = {"steps": 1, "tokens_per_step": 256, "learning_rate": 1e-2, "warmup": 0}
    assert ossia.train(recipe | {"adapter": {"rank": 2}, "max_length": 256, "train": train}).step == 1


@pytest.mark.parametrize("shards", SHARDS)
def test_what_transformers_523_saved_after_a_merge_is_trained_on(
    tiny: MakeTiny, adapter: Path, tmp_path: Path, shards: str
) -> None:
    base, folder = tiny(SHALLOW, "bf16"), tmp_path / "merged"
    script.save_merged(base, adapter, folder, SHARDS[shards])
    config = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in config
    assert "rope_scaling" not in config
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    assert (folder / INDEX).is_file() == (shards == "shards")
    assert_trains(folder, base, tmp_path)


@pytest.mark.parametrize("shards", SHARDS)
def test_what_transformers_457_saved_after_a_merge_is_trained_on(
    tiny: MakeTiny, adapter: Path, tmp_path: Path, shards: str
) -> None:
    base, folder = tiny(SHALLOW, "bf16"), tmp_path / "merged"
    saved_by_457(base, adapter, folder, SHARDS[shards])
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers_version"] == "4.57.6"
    assert "rope_parameters" not in config
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (folder / INDEX).is_file() == (shards == "shards")
    assert_trains(folder, base, tmp_path)


def test_the_texts_beside_weights_and_tokenizer_may_be_missing(tiny: MakeTiny, adapter: Path, tmp_path: Path) -> None:
    base, folder = tiny(SHALLOW, "bf16"), tmp_path / "merged"
    script.save_merged(base, adapter, folder, "1GB")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    model, vocab = ossia.load(folder).transformer, Vocabulary.from_file(folder)
    assert vocab.size == model.arch.vocab_size


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_of_another_type_are_refused_with_what_to_do(
    tiny: MakeTiny, adapter: Path, tmp_path: Path, dtype: str
) -> None:
    script.save_merged(tiny(SHALLOW, "bf16"), adapter, tmp_path / "merged", "1GB", dtype)
    with pytest.raises(CheckpointError, match=r"by config.json it must be .* BF16(.|\n)*save the model in bfloat16"):
        Checkpoint.open(tmp_path / "merged")


def test_an_mxfp4_model_that_transformers_523_dequantised_and_saved_is_refused_with_the_reason(
    tiny: MakeTiny, tmp_path: Path
) -> None:
    load_transformers(tiny(SHALLOW), torch.bfloat16).save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="bf16 weights under MXFP4 names are what transformers 5 saves"):
        Checkpoint.open(tmp_path / "saved")
