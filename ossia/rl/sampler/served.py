"""A rollout server as a recipe names it, and the adapters that a run has loaded into it.

The server reads an adapter from the disk, so it has to see the run folder under the same path. Every version gets a
name of its own, since a server may keep what it computed under a name; the one before is taken out again.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ossia.config import Recipe, is_hub_name
from ossia.errors import RunError, ServerError
from ossia.model.lora import Lora
from ossia.model.peft import save_adapter
from ossia.remote import Server

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be started with
FOLDER = "rollout"  # of the run folder: the adapters that the server has


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers.

    model  the name that it lists the model itself under
    """

    recipe: Recipe
    server: Server
    model: str

    @classmethod
    def open(cls, recipe: Recipe) -> Served:
        """The server of `rl.rollout`, looked at before any weight is read.

        Raises  RunError if it isn't there, lists no model, takes no adapters, or has fewer positions than `max_length`
        """
        server = Server(recipe.rl.rollout, wait_s=recipe.rl.rollout_timeout_s)
        try:
            cards = server.cards()
        except ServerError as error:
            raise _error(recipe, told(error)) from error
        bases = [card for card in cards if card.get("parent") is None]
        if not bases:
            raise _error(recipe, f"{server.base} lists no model")
        positions = bases[0].get("max_model_len")
        if isinstance(positions, int) and positions < recipe.max_length:
            why = f"{server.base} has {positions:,} positions, the recipe's `max_length` is {recipe.max_length:,}"
            raise _error(recipe, why)
        try:
            server.tell("/load_lora_adapter", {"lora_name": "", "lora_path": ""})
        except ServerError as error:
            if error.status != 400:  # which is what it says to an empty name where it knows the route
                raise _error(recipe, f"{server.base} takes no adapters while it runs ({told(error)})") from error
        return cls(recipe, server, str(bases[0]["id"]))

    def error(self, why: str) -> RunError:
        """That the run can't go on, and how it can once the server is there."""
        return _error(self.recipe, why, running=True)


def told(error: ServerError) -> str:
    """What a server said; of one that can't be reached that alone, since it was there, or `_error` says what to do."""
    return str(error) if error.status is not None else str(error).partition("\n")[0]


def _error(recipe: Recipe, why: str, *, running: bool = False) -> RunError:
    more = f"\n  then go on: {recipe.resume_command}" if running else ""
    return RunError(f"rl.rollout: {why}\n  next: see that it runs, as by: {start_command(recipe)}{more}")


def start_command(recipe: Recipe) -> str:
    """The shell command of a vLLM server that the recipe can sample with."""
    assert recipe.adapter is not None
    model = recipe.model if is_hub_name(recipe.model) else Path(recipe.model).expanduser().resolve()
    rank = max(shape.rank for shape in recipe.adapter.by_target().values())
    port = urlsplit(recipe.rl.rollout).port
    parts = [
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {model} --enable-lora --max-loras 1",
        f"--max-lora-rank {next((one for one in _RANKS if one >= rank), rank)} --max-model-len {recipe.max_length}",
    ]
    if recipe.dtype != "bfloat16":
        parts.append(f"--dtype {recipe.dtype}")
    if recipe.rl.router_replay:
        parts.append("--enable-return-routed-experts")
    if port not in (None, 8000):
        parts.append(f"--port {port}")
    return " ".join(parts)


class Adapters:
    """The run's adapters in a server: one at a time."""

    def __init__(self, served: Served) -> None:
        self._served = served
        output = served.recipe.output.absolute()
        digest = hashlib.blake2b(str(output).encode(), digest_size=4).hexdigest()
        self._prefix = f"{output.name}-{digest}-"  # no other run's
        self._folder = output / FOLDER
        self._loaded: str | None = None

    @property
    def model(self) -> str:
        """The name that requests give."""
        return self._loaded or self._served.model

    def clear(self) -> None:
        """Take out what the run left there when it was killed."""
        for card in self._served.server.cards():
            if str(card["id"]).startswith(self._prefix):
                self._unload(str(card["id"]))
        shutil.rmtree(self._folder, ignore_errors=True)

    def use(self, label: str, lora: Lora | None) -> None:
        """Have the server take an adapter in place of the one before; None: of none. The same label: nothing.

        Raises  RunError with what the server says against it
        """
        name, before = self._prefix + label, self._loaded
        if name == before:
            return
        if lora is not None:
            folder = self._folder / label
            save_adapter(folder, lora, base_model=self._served.recipe.model)
            try:
                self._served.server.tell("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            except ServerError as error:
                why = f"the server doesn't take the adapter in {folder}: {told(error)}"
                if error.status == 404:
                    why += "\n  it reads the folder itself, so it has to see it under the same path"
                raise self._served.error(why) from error
        self._loaded = None if lora is None else name
        if before is not None:
            self._unload(before)
            shutil.rmtree(self._folder / before.removeprefix(self._prefix), ignore_errors=True)

    def _unload(self, name: str) -> None:
        try:
            self._served.server.tell("/unload_lora_adapter", {"lora_name": name})
        except ServerError as error:
            raise self._served.error(f"the server doesn't let go of the adapter {name}: {told(error)}") from error
