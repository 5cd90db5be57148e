"""The address that a server listens on, the names that it answers to, and the key that it asks for."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from ossia.errors import UserError

_HERE = ("localhost", "127.0.0.1", "::1")
_ANY = "*"
_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^\s:/@\[\]]+))(?::\d*)?", re.IGNORECASE)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where there can't be one: better before the model is loaded.

    Its connections inherit TCP_NODELAY, which asyncio sets only on sockets made with a protocol number: without it the
    second packet of an answer waits for the client's delayed acknowledgement, 40 ms.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise UserError(
            f"can't listen on {host} port {port}: {os.strerror(error.errno) if error.errno else error}\n"
            "  next: choose another --port (0 takes any that is free) or --host"
        ) from None


def own_names(address: str, given: Sequence[str] = ()) -> frozenset[str] | None:
    """The names that a server answers to, in lower case; None: to any.

    A web page can have its own name resolve to 127.0.0.1, and then reads as its own what a server there says to
    anybody (DNS rebinding). The name stands in the request, so a server that only this machine reaches compares it.

    address  what it listens on, an IP address; if that isn't a loopback one, only `given` makes it compare names
    given    names beside localhost and the loopback addresses; "*" is any
    Raises   UserError for one that isn't a name
    """
    names = [name.strip("[]").lower() for name in given]
    for name, plain in zip(given, names, strict=True):
        if name != _ANY and not _is_name(plain):
            raise UserError(
                f"--allow-host {name}: expected a name alone, without http:// and port, like chat.example.com"
            )
    if _ANY in given or not (given or ip_address(address).is_loopback):
        return None
    return frozenset((*_HERE, address, *names))


def foreign_name(headers: Iterable[tuple[bytes, bytes]], names: frozenset[str]) -> tuple[str, str] | None:
    """The header of a request that names another server or site, and what it says; None: there is none.

    Host is what the client calls the server; Origin, which browsers alone send, the site whose page asks. Any port will
    do: a page of this machine that is being developed is passed on from another one.
    """
    for header, value in headers:
        said = value.decode("latin-1")
        if header == b"host" and said and _name_of_host(said) not in names:  # HTTP/1.0, no browser, may leave it out
            return "Host", said
        if header == b"origin" and _name_of_origin(said) not in names:
            return "Origin", said
    return None


def _is_name(text: str) -> bool:
    if ":" not in text:
        return re.fullmatch(r"[\w.-]+", text) is not None
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _name_of_host(said: str) -> str | None:
    found = _HOST.fullmatch(said)
    return None if found is None else (found["v6"] or found["name"]).lower()


def _name_of_origin(said: str) -> str | None:
    try:
        return urlsplit(said).hostname
    except ValueError:
        return None


def check_key(api_key: str | None) -> None:
    """Raise UserError for a key that protects nothing or can't stand in a header; None: no key is asked for."""
    if api_key is None:
        return
    if not api_key:
        raise UserError(
            "--api-key: an empty key would let everybody in; give one, or leave it out\n"
            '  next: if it came from a variable, like --api-key "$KEY", see that it is set'
        )
    if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise UserError("--api-key: allowed: ASCII letters, digits and signs, no spaces (it is sent in a header)")


def open_to_all(host: str, api_key: str | None) -> str | None:
    """A warning where others than this machine can use the server without a key; None where they can't."""
    if api_key is not None or host in ("127.0.0.1", "::1", "localhost"):
        return None
    return (
        f"WARNING: the server listens on {host} without a key: whoever reaches this machine can use it.\n"
        "         Give it one with --api-key, or leave --host out to serve this machine alone."
    )
