"""The text files beside the weights: tokenizer config, chat template, generation config.

A client that isn't Ossia (transformers, llama.cpp, vLLM) talks to the checkpoint through these alone.
The chat template is our own and says in `chat_template.jinja` what `ossia.harmony` says in Python; a test holds it to
openai-harmony's ids.
"""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

from ossia.errors import TokenizerError
from ossia.harmony.tokenizer_json import TOKENIZER, TokenizerFile, read_tokenizer_text, tokenizer_file

_BOS, _EOS, _PAD = "<|startoftext|>", "<|return|>", "<|endoftext|>"
_STOPS = (_EOS, _PAD, "<|call|>")


def chat_template() -> str:
    """The Jinja text of Ossia's chat template."""
    return files("ossia.model").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def vocabulary_size(source: Path) -> int:
    """One more than the largest id of a tokenizer. `source` as in `write_companions`."""
    tokenizer = _tokenizer(source)
    return 1 + max(max(ids.values(), default=0) for ids in (tokenizer.vocab, tokenizer.added))


def write_companions(source: Path, folder: Path, max_positions: int) -> dict[str, int]:
    """Write the text files of a checkpoint into `folder`: those of `source` as they are, what it lacks made new.

    source         a checkpoint folder, or a tokenizer.json
    max_positions  the model's longest sequence in tokens
    Returns        the token ids that config.json names: bos_token_id, eos_token_id, pad_token_id
    Raises         TokenizerError if there is no tokenizer.json, or one without the special tokens that these files name
    """
    ids = _tokenizer(source).added
    if lacking := sorted({_BOS, *_STOPS} - ids.keys()):
        raise TokenizerError(f"{tokenizer_file(source)}: no special tokens {lacking}; use a gpt-oss {TOKENIZER}")
    special = {"bos_token": _BOS, "eos_token": _EOS, "pad_token": _PAD}
    made = {
        "special_tokens_map.json": special,
        "tokenizer_config.json": special
        | {
            # Not transformers 5's "TokenizersBackend", which transformers 4 doesn't know; 5 reads both.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": max_positions,
        },
        "generation_config.json": {
            "bos_token_id": ids[_BOS],
            "do_sample": True,
            "eos_token_id": [ids[token] for token in _STOPS],
            "pad_token_id": ids[_PAD],
        },
    }
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in made.items()}
    texts["chat_template.jinja"] = chat_template()
    for name, text in texts.items():
        if source.is_dir() and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
        else:
            (folder / name).write_text(text, encoding="utf-8")
    shutil.copyfile(tokenizer_file(source), folder / TOKENIZER)
    return {"bos_token_id": ids[_BOS], "eos_token_id": ids[_EOS], "pad_token_id": ids[_PAD]}


def _tokenizer(source: Path) -> TokenizerFile:
    file = tokenizer_file(source)
    return TokenizerFile.parse(read_tokenizer_text(file), str(file))
