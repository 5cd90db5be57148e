"""The preview as one HTML file: no network, no script, light and dark; trained tokens are underlined and named so."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ossia.data.dataset import Statistics
from ossia.data.preview import Run, describe, runs, token_texts, totals
from ossia.data.sample import Sample
from ossia.harmony.vocab import Vocabulary

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fdfdfc; --line: #d4d4d8; --soft: #5c5c66; --even: #0000000d;
  --analysis: #855300; --commentary: #8a1f86; --final: #14692f; --user: #075985; --tool: #3730a3; --other: #52525b }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --paper: #17171a; --line: #3f3f46; --soft: #a5a5b0;
  --even: #ffffff12; --analysis: #f0b65a; --commentary: #e39be0; --final: #7ddb97; --user: #7cc7f0; --tool: #b0b4ff;
  --other: #b5b5bf } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left; font-weight: normal }
td { text-align: right; font-variant-numeric: tabular-nums }
.warning { border-left: 4px solid var(--analysis); padding-left: .6rem; overflow-wrap: anywhere; white-space: pre-wrap }
.run { display: grid; grid-template-columns: 11rem 1fr; border-top: 1px solid var(--line) }
.who { padding: .3rem .6rem .3rem 0; font-size: .85rem; color: var(--soft) }
.who strong { display: block; color: var(--ink) }
.text { margin: 0; padding: .3rem 0 .3rem .6rem; border-left: 4px solid transparent; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .9rem/1.7 ui-monospace, monospace }
.text span:nth-child(even) { background: var(--even) }
.text .special { font-style: italic; font-weight: 300 }
.trained .text { border-left-color: currentColor; text-decoration: underline; text-underline-offset: .25em }
.analysis .text { color: var(--analysis) } .commentary .text { color: var(--commentary) }
.final .text { color: var(--final) } .user .text { color: var(--user) } .tool .text { color: var(--tool) }
.other .text { color: var(--other) }
@media (max-width: 40rem) { .run { grid-template-columns: 1fr } }
"""


def write_page(
    file: Path, samples: Sequence[Sample], statistics: Statistics, notes: Iterable[str], vocab: Vocabulary
) -> None:
    """Write the page; a file of that name is replaced at once, when all is written."""
    rows = "".join(f"<tr><th scope=row>{name}</th><td>{value}</td></tr>\n" for name, value in totals(statistics))
    warnings = "".join(f"<p class=warning>{escape(line)}</p>\n" for line in statistics.warnings())
    sources = "".join(f"<p>{escape(note)}</p>\n" for note in notes)
    sections = "".join(_section(sample, vocab) for sample in samples)
    page = (
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>Training samples</title>\n<style>{_STYLE}</style>\n<main>\n<h1>Training samples</h1>\n"
        f"{sources}<table>\n<caption>The whole dataset</caption>\n{rows}</table>\n{warnings}"
        "<p>Underlined, with a bar at the left and the word <em>trained</em>: tokens that are trained. "
        "All else is context. A→B: token A is predicted as B. Point at a token for its id.</p>\n"
        f"{sections}</main>\n</html>\n"
    )
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, file)


def _section(sample: Sample, vocab: Vocabulary) -> str:
    body = "".join(_run(sample, run, vocab) for run in runs(sample))
    return f"<section>\n<h2>{escape(describe(sample))}</h2>\n{body}</section>\n"


def _run(sample: Sample, run: Run, vocab: Vocabulary) -> str:
    kind = run.channel if run.role == "assistant" else run.role
    known = kind if kind in ("analysis", "commentary", "final", "user", "tool") else "other"
    tokens = "".join(
        f'<span title="{number}"{" class=special" if vocab.is_special(number) else ""}>{escape(text)}</span>'
        for number, text in zip(
            sample.ids[run.start : run.end].tolist(), token_texts(sample, vocab, run.start, run.end), strict=True
        )
    )
    trained = "trained" if run.weight else "context"
    return (
        f'<div class="run {known} {trained}"><div class=who><strong>{escape(run.label or "-")}</strong>'
        f"{trained}, {run.end - run.start:,} tokens</div><p class=text>{tokens}</p></div>\n"
    )
