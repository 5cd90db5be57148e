"""Servers that speak OpenAI's HTTP, seen from a client's side."""

from ossia.remote.server import Server

__all__ = ["Server"]
