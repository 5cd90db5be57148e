"""An export pushed to the Hugging Face hub with its model card, in one commit: the whole of it or nothing.

One commit and not one a few files, so nobody ever loads half a checkpoint. What was uploaded before a connection broke
isn't sent again: the hub keeps it by content. Nothing on the disk changes, whatever happens.
`huggingface_hub` finds the token and the address by its own rules.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ossia.config.check import is_hub_name
from ossia.errors import CheckpointError, Interrupted, MissingExtraError, ServerError, UserError
from ossia.export.card import WRITTEN_BY, Kind, Run, license_of, model_card
from ossia.model.checkpoint import CONFIG
from ossia.model.peft import CONFIG as ADAPTER_CONFIG

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
_BASE = "base_model_name_or_path"
_TEXT = (".json", ".jinja", ".md", ".txt")
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,})")


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository on the hub that we may write to, as far as can be told before writing."""

    api: HfApi
    repo: str
    private: bool

    @classmethod
    def open(cls, repo: str, *, private: bool, endpoint: str | None = None, token: str | None = None) -> Hub:
        """Check name, token and visibility; nothing is made yet.

        endpoint, token  None: huggingface_hub's own
        Raises           UserError for a name that is none, or a public repository where a private one is wanted;
                         ServerError for a token that is missing or refused, and where the hub doesn't answer;
                         MissingExtraError without huggingface_hub
        """
        if find_spec("huggingface_hub") is None:
            raise MissingExtraError("pushing to the hub needs huggingface_hub: pip install 'ossia[hub]'")
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repo)
            wrong = "" if repo.count("/") == 1 else "it has no owner"
        except HFValidationError as error:
            wrong = str(error)
        if wrong:
            raise UserError(f"--push {repo}: no name of a repository ({wrong}); allowed: OWNER/NAME")
        hub = cls(HfApi(endpoint=endpoint, token=token, library_name="ossia"), repo, private)
        with _told(hub):
            hub.api.whoami()
            try:
                found = hub.api.model_info(repo)
            except RepositoryNotFoundError:
                return hub
        if private and not found.private:
            raise UserError(
                f"{repo} is there already and public, which --private doesn't change\n"
                "  next: make it private in its settings on the hub, or name another repository"
            )
        return hub


@contextmanager
def _told(hub: Hub, then: str = "") -> Iterator[None]:
    """The hub's errors in our words; `then` follows them."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what was uploaded already isn't sent again{then}") from None
    # RuntimeError and ValueError: of an upload's threads and of answers that huggingface_hub doesn't understand
    except (HTTPError, LocalTokenNotFoundError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException = error
        while not isinstance(cause, HTTPError) and cause.__cause__ is not None:
            cause = cause.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        reason = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        if status == 401 or isinstance(error, LocalTokenNotFoundError):
            told = f"it isn't known who you are ({reason})\n  next: run `hf auth login` with a token that may write"
        elif status == 403:
            told = (
                f"your token may not write there ({reason})\n"
                "  next: `hf auth login` with a token that may, or name a repository of yours"
            )
        else:
            told = f"{reason}\n  next: try again when it can be reached; what was uploaded already isn't sent again"
        raise ServerError(f"{hub.repo} on {hub.api.endpoint}: {told}{then}", status) from error


def push_export(
    path: Path,
    hub: Hub,
    *,
    run: Path | None = None,
    base: str | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> str:
    """Upload what `ossia export` wrote, and a model card, to a repository, which is made if it isn't there.

    path     the folder or file
    run      the run folder that it came from, whose recipe and figures the card gives
    base     hub name of the model that it was made from, where neither the run nor the adapter's own file names it so
    Returns  the address of the repository
    Raises   UserError for what is no export, an adapter whose base has no hub name, or a text that would give away a
             folder of this machine or a token; ServerError where the hub refuses or can't be reached, with the command
             that tries again. Nothing on the disk changes
    """
    kind = kind_of(path)
    told = None if run is None else Run.open(run)
    named = _base_of(path, kind, told, base)
    if named is None and kind == "peft":
        raise UserError(
            f"{path / ADAPTER_CONFIG}: `{_BASE}` is a folder of this machine, which nobody else can load it on\n"
            f"  next: say what that model is called on the hub: {_again(path, hub, run)} --base openai/gpt-oss-20b"
        )
    then = f"\n  kept: {path}; once more: {_again(path, hub, run)}"
    with _told(hub, then):
        datasets = [] if told is None else list(_public_datasets(hub, told))
    files: dict[str, Path | bytes] = dict(_files(path, kind, named))
    if CARD in files:
        say(f"{path / CARD} is the model card")
    else:
        file = path.name if path.is_file() else None
        files[CARD] = model_card(kind, hub.repo, file=file, base=named, datasets=datasets, run=told).encode()
        if license_of(named) is None:
            say("mind: the card names no licence, because the base is none of OpenAI's; add it on the hub")
    _refuse_what_is_private(files, path, told, run)
    with _told(hub, then):
        url = _commit(hub, files, say)
    say(f"pushed {len(files)} files to {url}")
    return url


def kind_of(path: Path) -> Kind:
    """What an export is, by its files. Raises UserError for anything else, CheckpointError for a broken one."""
    if path.is_file() and path.suffix == ".gguf":
        if find_spec("gguf") is None:
            raise MissingExtraError("reading GGUF needs the package gguf: pip install 'ossia[gguf]'")
        from gguf import GGUFReader

        try:
            field = GGUFReader(path, "c").get_field("general.type")
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: no whole GGUF file ({error}); write it again") from error
        return "gguf-lora" if field is not None and field.contents() == "adapter" else "gguf"
    if (path / ADAPTER_CONFIG).is_file():
        return "peft"
    if (path / CONFIG).is_file():
        return "hf-mxfp4" if "quantization_config" in _json(path / CONFIG) else "hf-bf16"
    found = "is no export" if path.exists() else "isn't there"
    raise UserError(f"{path} {found}; allowed: a folder or a .gguf file that `ossia export` wrote")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); write the export again") from error
    return found if isinstance(found, dict) else {}


def _base_of(path: Path, kind: Kind, run: Run | None, base: str | None) -> str | None:
    recorded = _json(path / ADAPTER_CONFIG).get(_BASE) if kind == "peft" else None
    names = [base, recorded, None if run is None else run.recipe.model]
    return next((name for name in names if isinstance(name, str) and is_hub_name(name)), None)


def _files(path: Path, kind: Kind, base: str | None) -> Iterator[tuple[str, Path | bytes]]:
    """Every file by its name in the repository; an adapter names its base as the hub does."""
    if path.is_file():
        yield path.name, path
        return
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if kind == "peft" and str(name) == ADAPTER_CONFIG:
            config = json.dumps({**_json(file), _BASE: base}, indent=2, sort_keys=True) + "\n"
            yield str(name), config.encode()
        else:
            yield name.as_posix(), file


def _public_datasets(hub: Hub, run: Run) -> Iterator[str]:
    """The run's datasets that anybody can see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    for source in run.recipe.data or ():
        if is_hub_name(source.path):
            try:
                hub.api.dataset_info(source.path, token=False)
            except RepositoryNotFoundError:
                continue
            yield source.path


def _refuse_what_is_private(
    files: Mapping[str, Path | bytes], path: Path, run: Run | None, folder: Path | None
) -> None:
    """Raise UserError for a text with a token, or with a folder of this machine."""
    places = {str(place) for place in (Path.home(), Path.cwd(), path.absolute().parent) if len(place.parts) > 1}
    if folder is not None:
        places.add(str(folder.absolute()))
    if run is not None:
        given = [run.recipe.model, str(run.recipe.output), *(source.path for source in run.recipe.data or ())]
        places |= {place for place in given if "/" in place and not is_hub_name(place)}
    for name, content in files.items():
        if not name.endswith(_TEXT) or name == "tokenizer.json":  # a vocabulary may hold any word
            continue
        text = content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8", errors="replace")
        found = [place for place in sorted(places, key=len, reverse=True) if place in text]
        if token := _TOKEN.search(text):
            found = [f"{token[0][:6]}..., which looks like a token"]
        if found:
            raise UserError(
                f"{name} holds {found[0]}, which isn't for others to read; nothing was pushed\n"
                "  next: take it out of that file, and push again"
            )


def _commit(hub: Hub, files: dict[str, Path | bytes], say: Callable[[str], None]) -> str:
    from huggingface_hub import CommitOperationAdd

    url = hub.api.create_repo(hub.repo, private=hub.private or None, exist_ok=True)
    if isinstance(files[CARD], bytes) and _has_a_card_of_its_own(hub):
        say(f"{hub.repo} has a {CARD} that Ossia didn't write; it stays as it is")
        del files[CARD]
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    hub.api.create_commit(hub.repo, operations, commit_message="Written by ossia export")
    return str(url)


def _has_a_card_of_its_own(hub: Hub) -> bool:
    from huggingface_hub.errors import EntryNotFoundError

    with TemporaryDirectory(prefix="ossia-") as scratch:
        try:
            file = hub.api.hf_hub_download(hub.repo, CARD, local_dir=scratch)
        except EntryNotFoundError:
            return False
        return WRITTEN_BY not in Path(file).read_text(encoding="utf-8")


def _again(path: Path, hub: Hub, run: Path | None) -> str:
    command = ["ossia", "push", str(path), hub.repo]
    return shlex.join([*command, *(["--private"] if hub.private else []), *(["--run", str(run)] if run else [])])
