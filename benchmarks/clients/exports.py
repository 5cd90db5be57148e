"""What the clients load: a small trained model, an adapter trained on it, and what `ossia export` makes of them.

The base is the demo's model with its experts rounded to MXFP4, so that its MXFP4 folder and its bf16 twin are one
function. A random model would show nothing: its routers go elsewhere under the smallest rounding.
Letters: V vocabulary, D hidden.
"""

from __future__ import annotations

import json
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

TEXT_TOKENS, MAX_NEW = 300, 60
FAR = 1.0  # nats: what four bits cost so small a model is not the question here
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class Exports:
    """Where everything is.

    base     the model in MXFP4; base_bf16, base_gguf: exported without an adapter, the latter with the same MXFP4 codes
    run      the run folder of the adapter; adapter: what it exports for PEFT
    merged   base and adapter as a bf16 folder; merged_mxfp4: as an MXFP4 one, its experts rounded once more;
             merged_gguf: in float32, merged_bf16_gguf and merged_q8_gguf
    exact_gguf  base_bf16 in float32, experts too; adapter_gguf: the adapter alone, for that
    attention  an adapter on attention alone, for PEFT
    full     base_bf16 with the released vocabulary of 201,088 tokens; full_merged: the adapter merged into it
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
    def merged_mxfp4(self) -> Path:
        return self.folder / "merged-mxfp4"

    @property
    def exact_gguf(self) -> Path:
        return self.folder / "base-f32.gguf"

    @property
    def adapter_gguf(self) -> Path:
        return self.folder / "adapter.gguf"

    @property
    def full(self) -> Path:
        return self.folder / "full"

    @property
    def full_merged(self) -> Path:
        return self.folder / "full-merged"

    @property
    def merged_gguf(self) -> Path:
        return self.folder / "merged.gguf"

    @property
    def merged_bf16_gguf(self) -> Path:
        return self.folder / "merged-bf16.gguf"

    @property
    def merged_q8_gguf(self) -> Path:
        return self.folder / "merged-q8_0.gguf"


def make_exports(trained: Path, folder: Path, *, steps: int = 25) -> Exports:
    """Round a trained model to MXFP4, train an adapter on it to call tools, export both in every way.

    trained  a demo's model, its data in `../data`
    folder   a new one
    steps    of the adapter's training
    """
    exports = Exports(folder)
    folder.mkdir(parents=True)
    export_model(str(trained), to="hf-mxfp4", output=exports.base, max_kl=FAR)
    calling = [json.dumps(row) for row in read_rows(trained.parent / DATA / "train.jsonl") if "tools" in row]
    (folder / "calls.jsonl").write_text("\n".join(calling) + "\n", encoding="utf-8")
    _train(exports.base, folder / "calls.jsonl", exports.run, targets=["attention", "experts"], steps=steps)
    base, run = str(exports.base), str(exports.run)
    export_model(base, to="hf-bf16", output=exports.base_bf16)
    export_model(base, to="gguf", output=exports.base_gguf, gguf_type="f32")
    export_model(run, to="peft", output=exports.adapter)
    export_model(run, to="hf-bf16", output=exports.merged)
    export_model(run, to="hf-mxfp4", output=exports.merged_mxfp4, max_kl=FAR)
    export_model(run, to="gguf", output=exports.merged_gguf, gguf_type="f32")
    export_model(str(exports.base_bf16), to="gguf", output=exports.exact_gguf, gguf_type="f32")
    export_model(run, to="gguf-lora", output=exports.adapter_gguf)
    return exports


def add_exports(exports: Exports, tokenizer: Path, *, steps: int = 10) -> None:
    """What only the slower clients are asked for.

    tokenizer  a tokenizer.json of the whole o200k_harmony, for clients that render Harmony themselves
    steps      of the training of the adapter on attention alone
    """
    run = str(exports.run)
    export_model(run, to="gguf", output=exports.merged_bf16_gguf)
    export_model(run, to="gguf", output=exports.merged_q8_gguf, gguf_type="q8_0")
    attention = exports.folder / "attention-run"
    _train(exports.base, exports.folder / "calls.jsonl", attention, targets=["attention"], steps=steps)
    export_model(str(attention), to="peft", output=exports.attention)
    _with_all_rows(exports.base_bf16, exports.full, tokenizer)
    export_model(str(exports.full), adapter=str(exports.adapter), to="hf-bf16", output=exports.full_merged)


def _train(model: Path, data: Path, output: Path, *, targets: list[str], steps: int) -> None:
    train = {"steps": steps, "tokens_per_step": 1024, "learning_rate": 3e-3, "warmup": 3, "save_every": 0, "seed": 1}
    recipe = {"model": str(model), "dtype": "float32", "adapter": {"rank": 8, "targets": targets}, "data": str(data)}
    ossia.train(recipe | {"max_length": 512, "train": train, "output": str(output)})


def _with_all_rows(trained: Path, path: Path, full: Path) -> None:
    """The same model with the released vocabulary."""
    source, rows_V = Checkpoint.open(trained), _rows_in(trained, full)
    arch = replace(source.arch, vocab_size=MODEL_ROWS)
    names = arch.tensor_specs("bf16")
    tensors = ((name, source.tensor(name)) for name in names)
    spread = ((name, _spread(one, rows_V, name) if name in _TABLES else one) for name, one in tensors)
    write_checkpoint(path, arch, spread, "bf16", tokenizer_from=full)


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
