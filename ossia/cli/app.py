"""The `ossia` command itself: how a command is registered, how its errors end, what Ctrl-C does.

Nothing heavy is imported before a command runs, so `ossia --help` answers at once. Results go to stdout, all else to
stderr. Exit codes: 0 done; 2 the user's input, message only; 130 interrupted; 1 a fault of ours, with a traceback, or
an environment that pays for attacks (`ossia attack`).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import FrameType, TracebackType
from typing import Annotated, Any

import typer

from ossia.cli.llama import runs_llama
from ossia.errors import OssiaError, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune, run and export OpenAI's gpt-oss models. Every command: ossia COMMAND --help.",
)


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as the command `name`."""
    return lambda body: app.command(name)(reporting(body))


def reporting(body: Callable[..., None]) -> Callable[..., None]:
    """`body` with its errors ended as the module's docstring says: message and exit code, no traceback.

    What is no OssiaError is our own fault: it passes through, to `main`'s hook.
    """

    @wraps(body)
    def run(*args: object, **kwargs: object) -> None:
        try:
            with _on_ctrl_c(signal.default_int_handler):
                body(*args, **kwargs)
                sys.stdout.flush()
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            raise SystemExit(128 + signal.SIGPIPE) from None  # as a tool that the signal ends
        except UserError as error:
            print(error, file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        except OssiaError as error:  # Interrupted: what was saved, and how to go on
            print(f"\n{error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return run


@contextmanager
def _on_ctrl_c(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Have Ctrl-C call `handler` meanwhile, where it is heard at all: in the main thread, and not ignored."""
    heard = threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, handler) if heard else None
    try:
        yield
    finally:
        if heard:
            signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once, which is right while nothing has begun."""
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


def importing() -> AbstractContextManager[None]:
    """For the imports of a command: a KeyboardInterrupt inside of a library's becomes whatever that makes of it."""
    return _on_ctrl_c(_leave)


def _reader_is_gone() -> bool:
    """Whether what reads stdout has closed it (`| head`); nothing is written there any more then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told without being asked for
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def main() -> None:
    """The entry point of the `ossia` command."""
    sys.excepthook = _our_fault
    # Threads that wait by sleeping: spinning ones make two busy processes on the same cores many times slower. Results
    # don't depend on it; torch's OpenMP reads it when it is loaded. llama.cpp meets at barriers far more often, and
    # generates ten times slower asleep.
    if not runs_llama(sys.argv[1:]):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with importing():  # until a command's body begins
        typer.main.get_command(app)(prog_name="ossia")


def _our_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    words = "This is a fault of Ossia, not of what you gave it. Please report it with the lines above,"
    print(f"\n{words}\nthe command you typed, and what `ossia doctor` prints.", file=sys.stderr)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from ossia import __version__

        print(f"ossia {__version__}")
        raise typer.Exit
