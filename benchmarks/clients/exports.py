"""What the clients load: a small trained model, an adapter trained on it, and what `ossia export` makes of them.

The base is the demo's model with its experts rounded to MXFP4, so that its MXFP4 folder and its bf16 twin are one
function. A random model would show nothing: its routers go elsewhere under the smallest rounding.
Letters: V vocabulary, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ossia
from benchmarks.clients.compare import Questions
from ossia.demo.conversations import read_rows
from ossia.demo.prepare import DATA
from ossia.demo.vocabulary import conversation_of
from ossia.engine import harmony_stops
from ossia.export import export_model
from ossia.harmony import Renderer, Vocabulary
from ossia.harmony.o200k import MODEL_ROWS
from ossia.harmony.tokenizer_json import TokenizerFile, read_tokenizer_text, tokenizer_file
from ossia.model.checkpoint import Checkpoint, write_checkpoint
from ossia.ops.mxfp4 import quantize_mxfp4

TEXT_TOKENS, MAX_NEW = 300, 60
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class Exports:
    """Where everything is.

    base     the model in MXFP4; base_bf16, base_gguf: exported without an adapter, the latter with the same MXFP4 codes
    run      the run folder of the adapter; adapter: what it exports for PEFT
    merged   base and adapter as a bf16 folder; merged_gguf: the same in float32, merged_bf16_gguf and merged_q8_gguf
    attention  an adapter on attention alone, for PEFT
    """

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def base_bf16(self) -> Path:
        return self.folder / "base-bf16"

    @property
    def base_gguf(self) -> Path:
        return self.folder / "base.gguf"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def attention(self) -> Path:
        return self.folder / "attention"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    @property
    def merged_gguf(self) -> Path:
        return self.folder / "merged.gguf"

    @property
    def merged_bf16_gguf(self) -> Path:
        return self.folder / "merged-bf16.gguf"

    @property
    def merged_q8_gguf(self) -> Path:
        return self.folder / "merged-q8_0.gguf"


def make_exports(trained: Path, folder: Path, *, steps: int = 25, full: Path | None = None) -> Exports:
    """Round a trained model to MXFP4, train an adapter on it to call tools, export both in every way.

    trained  a demo's model, its data in `../data`
    folder   a new one
    steps    of the adapter's training
    full     a tokenizer.json of the whole o200k_harmony: the model gets its 201,088 rows, as clients want that render
             Harmony themselves
    """
    exports, data = Exports(folder), trained.parent / DATA
    folder.mkdir(parents=True)
    write_base(trained, exports.base, full=full)
    calling = [json.dumps(row) for row in read_rows(data / "train.jsonl") if "tools" in row]
    (folder / "calls.jsonl").write_text("\n".join(calling) + "\n", encoding="utf-8")
    _train(exports.base, folder / "calls.jsonl", exports.run, targets=["attention", "experts"], steps=steps)
    base, run = str(exports.base), str(exports.run)
    export_model(base, to="hf-bf16", output=exports.base_bf16)
    export_model(base, to="gguf", output=exports.base_gguf, gguf_type="f32")
    export_model(run, to="peft", output=exports.adapter)
    export_model(run, to="hf-bf16", output=exports.merged)
    export_model(run, to="gguf", output=exports.merged_gguf, gguf_type="f32")
    return exports


def add_exports(exports: Exports, *, steps: int = 10) -> None:
    """What takes longer, or what only the slower clients are asked for."""
    run = str(exports.run)
    export_model(run, to="gguf", output=exports.merged_bf16_gguf)
    export_model(run, to="gguf", output=exports.merged_q8_gguf, gguf_type="q8_0")
    attention = exports.folder / "attention-run"
    _train(exports.base, exports.folder / "calls.jsonl", attention, targets=["attention"], steps=steps)
    export_model(str(attention), to="peft", output=exports.attention)


def _train(model: Path, data: Path, output: Path, *, targets: list[str], steps: int) -> None:
    train = {"steps": steps, "tokens_per_step": 1024, "learning_rate": 3e-3, "warmup": 3, "save_every": 0, "seed": 1}
    recipe = {"model": str(model), "dtype": "float32", "adapter": {"rank": 8, "targets": targets}, "data": str(data)}
    ossia.train(recipe | {"max_length": 512, "train": train, "output": str(output)})


def write_base(trained: Path, path: Path, *, full: Path | None = None) -> None:
    """Write a bf16 model's MXFP4 twin: experts rounded, the rest as it is, with the tokenizer `full` where given."""
    source = Checkpoint.open(trained)
    arch = source.arch if full is None else replace(source.arch, vocab_size=MODEL_ROWS)
    rows = None if full is None else _rows_in(trained, full)
    tensors = _rounded(source, rows)
    write_checkpoint(path, arch, tensors, "mxfp4", tokenizer_from=full or trained)


def _rounded(source: Checkpoint, rows_V: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    for name in source.arch.tensor_specs("mxfp4"):
        stem, _, part = name.rpartition("_")
        if part == "blocks":
            blocks, scales = quantize_mxfp4(source.tensor(stem).float().transpose(1, 2).contiguous())
            yield from ((name, blocks), (f"{stem}_scales", scales))
        elif part != "scales":
            tensor = source.tensor(name)
            yield name, _spread(tensor, rows_V, name) if rows_V is not None and name in _TABLES else tensor


def _rows_in(small: Path, large: Path) -> Tensor:
    """(V,) of the small vocabulary: each token's id in the large one."""
    of_small, of_large = ({**file.vocab, **file.added} for file in map(_tokenizer, (small, large)))
    return torch.tensor([of_large[token] for token, _ in sorted(of_small.items(), key=lambda pair: pair[1])])


def _tokenizer(where: Path) -> TokenizerFile:
    file = tokenizer_file(where)
    return TokenizerFile.parse(read_tokenizer_text(file), str(file))


def _spread(table_VD: Tensor, rows_V: Tensor, name: str) -> Tensor:
    """The rows at their ids among the released model's.

    The others are the mean row: as an embedding it is as good as any, and in the head its logit is the mean one, about
    -3; eight times that leaves nothing to 200,000 tokens that no training saw.
    """
    others_D = table_VD.float().mean(0) * (8 if name.startswith("lm_head") else 1)
    spread = others_D.to(table_VD.dtype).repeat(MODEL_ROWS, 1)
    spread[rows_V] = table_VD[: len(rows_V)]
    return spread


def questions(model: Path, data: Path, *, num_texts: int = 6, num_prompts: int = 20) -> Questions:
    """Held-out conversations of the demo: whole ones as texts; sorting questions and openings with tools as prompts."""
    vocab = Vocabulary.from_file(model)
    renderer = Renderer(vocab)

    def ids(row: dict[str, Any]) -> list[int]:
        return renderer.completion(conversation_of(row))

    held_out, asked = read_rows(data / "heldout.jsonl"), read_rows(data / "questions.jsonl")
    tools = [row | {"messages": row["messages"][:1]} for row in held_out if "tools" in row][: num_prompts // 3]
    prompts = [ids(row) for row in (*asked[: num_prompts - len(tools)], *tools)]
    texts = [ids(row)[:TEXT_TOKENS] for row in held_out[:num_texts]]
    return Questions(texts, prompts, MAX_NEW, sorted(harmony_stops(vocab)))
