"""A model's vocabulary without its weights: what rows are read with before a model is opened."""

from __future__ import annotations

from pathlib import Path

from ossia.config import is_hub_name
from ossia.errors import MissingExtraError, TokenizerError
from ossia.harmony.vocab import Vocabulary


def open_vocabulary(model: str) -> Vocabulary:
    """The vocabulary of a checkpoint's folder or of a hub model, of which only `tokenizer.json` is downloaded.

    Raises  TokenizerError if it isn't there or isn't one for Harmony; MissingExtraError without huggingface_hub
    """
    return Vocabulary.from_file(_tokenizer_file(model) if is_hub_name(model) else Path(model).expanduser())


def _tokenizer_file(model: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError(f"{model}: no such folder; from the hub: pip install 'ossia[hub]'") from error
    try:
        return Path(hf_hub_download(model, "tokenizer.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TokenizerError(f"{model}: its tokenizer.json can't be fetched: {str(error).splitlines()[0]}") from error
