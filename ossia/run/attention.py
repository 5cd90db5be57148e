"""Attention is tried on the device before anything is trained with it, and a line says what is in force."""

from __future__ import annotations

from collections.abc import Callable

from ossia.errors import RunError
from ossia.model.transformer import Transformer
from ossia.ops.attention import BACKENDS, AttentionBackend, candidates
from ossia.ops.attention.probe import Probed, probe


def settle_attention(model: Transformer, *, automatic: bool, say: Callable[[str], None]) -> None:
    """Try the model's attention on its device (`ops.attention.probe`) and say what computes it.

    automatic  nobody asked for this backend: where it fails, the next that can run there takes its place, and a line
               says so
    Raises     RunError where one that was asked for fails, naming one that doesn't; or where all do
    """
    asked = BACKENDS[model.backend]
    # the asked-for one first; the others are what could be used instead
    able = [asked, *(record for record in candidates(model.place) if record.name != asked.name)]
    problems: list[str] = []
    for record in able:
        found = probe_model(record, model)
        if found.problem is None:
            break
        problems.append(f"attention: {record.name} ({record.what}) fails on this {model.device.type}: {found.problem}")
    else:
        raise RunError("\n".join(problems) + "\n  next: report this, with what `ossia doctor` says")
    if problems and not automatic:
        raise RunError(f"{problems[0]}\n  next: use {record.name}, which doesn't fail here; or leave `attention: auto`")
    for problem in problems:
        say(problem)
    model.backend, model.probed = record.name, found
    say(f"attention: {describe(record, found)}")


def probe_model(record: AttentionBackend, model: Transformer) -> Probed:
    """The backend tried with heads like the model's."""
    a = model.arch
    return probe(record, model.device, model.dtype, heads=a.num_heads, kv_heads=a.num_kv_heads, size=a.head_dim)


def describe(record: AttentionBackend, found: Probed) -> str:
    """A backend that passed, in words."""
    return f"{record.name} ({record.what}); tried: documents apart, outputs and gradients within {found.error:.1g}"
