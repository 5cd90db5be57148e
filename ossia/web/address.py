"""The address that a server listens on, and the key that it asks for."""

from __future__ import annotations

import socket

from ossia.errors import UserError


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
            f"can't listen on {host} port {port}: {error.strerror or error}\n"
            "  next: choose another --port (0 takes any that is free) or --host"
        ) from None


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
