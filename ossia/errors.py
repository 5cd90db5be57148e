"""Errors that a person can act on: each message says where, what was found, what is allowed, and the next step.

`UserError` and its children are printed without a traceback (exit code 2); anything else that escapes is our own fault
(exit code 1, with a traceback and how to report it).
"""

from __future__ import annotations

from collections.abc import Sequence


class OssiaError(Exception):
    """Root of every error that Ossia raises on purpose."""

    exit_code = 1


class UserError(OssiaError):
    """Something in what the user gave (recipe, rows, files, options, machine) has to change; message only."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe key, value or combination that can't be used; the message holds one `file:line: ...` per finding."""


class DataError(UserError):
    """A data file, row or field that can't be used."""


class HarmonyError(UserError):
    """A conversation that the Harmony format can't express; `field` names the part of it, `messages[2].content`."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class TokenizerError(UserError):
    """A tokenizer file that is missing, unreadable, or lacks what Harmony needs."""


class CheckpointError(UserError):
    """A checkpoint folder whose files, names, shapes or types are not those of a gpt-oss model."""


class StoppedError(CheckpointError):
    """A disk that is full, or refuses: what was written whole is kept, and the same command goes on from there."""


class AdapterError(UserError):
    """An adapter that doesn't fit the model, or a target that matches nothing."""


class RunError(UserError):
    """A run that can't start, go on, or be resumed: folder in use, non-finite loss, full disk, no checkpoint."""


class RewardError(UserError):
    """An environment whose rewards can't be trained on."""


class JailError(UserError):
    """A jail that this machine can't give, or that is gone; never what a program in it did."""


class ServerError(UserError):
    """Another server that can't be reached, refuses, or answers what can't be used.

    `status` is the HTTP status that it answered with; None: none, because it couldn't be reached or broke off.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class MissingExtraError(UserError):
    """An optional package is needed; the message gives the `pip install 'ossia[...]'` line."""


class Interrupted(OssiaError):
    """Ctrl-C: what was done is saved, and the message says how to go on."""

    exit_code = 130


def first_few(findings: Sequence[str], most: int = 8) -> list[str]:
    """The first `most` of what one message has to tell, and how many more there are: nothing is left out in silence."""
    hidden = len(findings) - most
    return [*findings[:most], *([f"and {hidden:,} more"] if hidden > 0 else [])]
