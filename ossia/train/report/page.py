"""RUN/report.html from what lies in a run folder: curves, samples before and after, counts, recipe, environment.

Read are events.jsonl and, where they exist, samples.jsonl, recipe.yaml, env.json and checkpoints/; the same folder
gives the same page, byte for byte, also while the run is still going on. A line of samples.jsonl is one of
`ossia generate` with the step it was made after:

```text
{"step": 0, "messages": [...], "completions": [{"messages": [...]} or {"text": "..."}], "expected": "..."}
```
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from ossia.config import RECIPE_IN_RUN
from ossia.errors import RunError
from ossia.train.events import ENV, EVENTS, fullest, read_events
from ossia.train.report.chart import Series, chart_html
from ossia.train.report.rewards import Kept, alarms, is_rewarded, reward_charts
from ossia.train.sinks import human_time
from ossia.train.state import checkpoint_paths, human_bytes, step_of, write_file

REPORT, SAMPLES = "report.html", "samples.jsonl"
_MOST_SAMPLES = 20
_STEP_KEYS = {
    *("event", "step", "loss", "tokens", "trained", "weight", "grad_norm"),
    *("tokens_per_s", "step_s", "lr", "peak_bytes"),
}
_COUNTS = {
    "rows": "rows read",
    "skipped": "bad rows skipped",
    "dropped": "samples dropped as too long",
    "truncated": "samples truncated",
    "untrained": "samples without a trained token",
}
_REASONING = ("thinking", "reasoning", "reasoning_content")
Event = Mapping[str, Any]


def write_report(run: Path) -> Path:
    """Write RUN/report.html, replacing an older one at once when all is written; its path.

    Raises RunError if the folder holds no run or a file of it can't be read or written
    """
    if not (run / EVENTS).is_file():
        raise RunError(f"{run}: no {EVENTS} here, so this is not the folder of a run; give the `output` of a recipe")
    return write_file(run / REPORT, report_html(run))


def report_html(run: Path) -> str:
    """The page as text. Raises RunError for a line of events.jsonl or samples.jsonl that can't be read."""
    events = read_events(run / EVENTS)
    start = next((e for e in events if e["event"] == "start"), {})
    steps = [e for e in events if e["event"] == "step"]
    evals = [e for e in events if e["event"] == "eval"]
    name = escape(run.resolve().name)
    sections = (
        _section("Alarms", _facts(alarms(steps))),
        _section("Curves", _curves(steps, evals)),
        *(_section(title, _samples(found)) for title, found in _read_samples(run / SAMPLES)),
        '<div class="columns">\n',
        _section("Data", _counts(steps)),
        _section("Checkpoints", _checkpoints(run)),
        _section("Model", _facts({k: v for k, v in start.items() if k not in ("event", "step", "steps")})),
        _section("Environment", _environment(run / ENV)),
        "</div>\n",
        _section("Recipe", _recipe(run / RECIPE_IN_RUN)),
    )
    style = (resources.files(__package__) / "style.css").read_text()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is fetched or run, whatever text a sample brings.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{name} · Ossia run</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<header><h1>{name}</h1><p class="soft">{_status(start, steps)}</p></header>\n<main>\n'
        f"{_tiles(steps, evals)}{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>\n" if content else ""


def _status(start: Event, steps: Sequence[Event]) -> str:
    done, planned = (steps[-1]["step"] if steps else 0), start.get("steps")
    if planned is None:
        return f"{done:,} steps"
    if done == planned:
        return f"Finished: {done:,} steps"
    return f"Step {done:,} of {planned:,}"


def _tiles(steps: Sequence[Event], evals: Sequence[Event]) -> str:
    """The run in a few numbers."""
    tiles: list[tuple[str, str, str]] = []
    if evals:
        first, last = evals[0], evals[-1]
        title, key = ("Held-out loss", "eval_loss") if "eval_loss" in last else ("Held-out reward", "eval_reward")
        after = f"{first[key]:.4f} {_when(first['step'])}" if len(evals) > 1 else ""
        tiles.append((title, f"{last[key]:.4f}", after))
    if is_rewarded(steps):
        judged = [e for e in steps if "reward" in e]  # a step whose samples all failed has none
        if judged:
            before = f"{judged[0]['reward']:.4f} in step {judged[0]['step']:,}"
            tiles.append(("Reward", f"{judged[-1]['reward']:.4f}", before))
    if steps:
        last, trained = steps[-1], sum(e["trained"] for e in steps)
        tokens, seconds = sum(e["tokens"] for e in steps), sum(e["step_s"] for e in steps)
        tiles += [
            ("Training loss", f"{last['loss']:.4f}", f"{steps[0]['loss']:.4f} in step {steps[0]['step']:,}"),
            ("Trained tokens", f"{trained:,}", f"of {tokens:,} tokens read"),
            ("Speed", f"{median(e['tokens_per_s'] for e in steps):,.0f}", "trained tokens/s, median step"),
            ("Peak memory", *_peak(steps)),
            ("Time in steps", human_time(seconds), f"{human_time(sum(e['eval_s'] for e in evals))} in evaluations"),
        ]
    cells = "".join(f"<div><dt>{t}</dt><dd>{v}{f'<small>{n}</small>' if n else ''}</dd></div>\n" for t, v, n in tiles)
    return f'<dl class="tiles">\n{cells}</dl>\n' if tiles else "<p>No step has been taken yet.</p>\n"


def _peak(steps: Sequence[Event]) -> tuple[str, str]:
    most, whose = max(map(fullest, steps))
    return human_bytes(most), whose


def _curves(steps: Sequence[Event], evals: Sequence[Event]) -> str:
    """Loss, learning rate, gradient norm, speed and memory over the steps."""

    def points(key: str, events: Sequence[Event], scale: float = 1.0) -> list[tuple[int, float]]:
        return [(e["step"], e[key] * scale) for e in events]

    if not steps:
        return ""
    losses = [
        Series("training loss", points("loss", steps)),
        Series("held-out loss", points("eval_loss", [e for e in evals if "eval_loss" in e]), sparse=True),
    ]
    unit = "of the policy" if is_rewarded(steps) else "nats per trained token, weighted"
    exponent, power = _power_of_ten(max(e["lr"] for e in steps))
    rate, norm = points("lr", steps, 10.0**-exponent), points("grad_norm", steps)
    speed, memory = points("tokens_per_s", steps), [(e["step"], fullest(e)[0] * 2.0**-30) for e in steps]
    charts = [
        *(reward_charts(steps, evals) if is_rewarded(steps) else []),
        chart_html("Loss", unit, losses, from_zero=False),
        chart_html("Learning rate", power, [Series("learning rate", rate)], from_zero=True),
        chart_html("Gradient norm", "L2, before clipping", [Series("gradient norm", norm)], from_zero=True),
        chart_html("Speed", "trained tokens/s", [Series("tokens/s", speed)], from_zero=True),
        chart_html("Peak memory", "GiB", [Series("GiB", memory)], from_zero=True),
    ]
    size = -(-len(steps) // 200)
    note = f'<p class="soft">A line shows the mean of every {size} steps, the band behind it their range.</p>\n'
    return f'{note if size > 1 else ""}<div class="charts">\n{"".join(charts)}</div>\n'


def _power_of_ten(most: float) -> tuple[int, str]:
    """The exponent to take out of small numbers, and the words for it: (-4, "× 10⁻⁴"); (0, "per update") for none."""
    exponent = int(f"{most:e}".split("e")[1])
    if most == 0 or -3 < exponent < 3:
        return 0, "per update"
    return exponent, "× 10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _counts(steps: Sequence[Event]) -> str:
    """The running counts of the data, as they were after the last step."""
    counts = {k: v for k, v in (steps[-1].items() if steps else ()) if k not in _STEP_KEYS and isinstance(v, int)}
    return _facts({_COUNTS.get(key, key): value for key, value in counts.items()})


def _checkpoints(run: Path) -> str:
    rows = [(f"step {step_of(p):,}", human_bytes(_folder_bytes(p)), p.name) for p in checkpoint_paths(run)]
    aside = sorted((run / "checkpoints").glob("step-*.corrupt"))
    rows += [("set aside as corrupt", human_bytes(_folder_bytes(path)), path.name) for path in aside]
    body = "".join(f'<tr><td>{w}</td><td class="num">{s}</td><td>checkpoints/{n}</td></tr>' for w, s, n in rows)
    return f'<div class="card scroll"><table><tbody>{body}</tbody></table></div>\n' if rows else ""


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _recipe(path: Path) -> str:
    return f'<div class="card"><pre>{escape(path.read_text().rstrip())}</pre></div>\n' if path.is_file() else ""


def _environment(path: Path) -> str:
    if not path.is_file():
        return ""
    env = json.loads(path.read_text())
    resumed = env.pop("resumed", [])
    if "memory_bytes" in env:
        env["memory"] = human_bytes(env.pop("memory_bytes"))
    for number, entry in enumerate(resumed, 1):
        changed = ", ".join(f"{k} {v}" for k, v in entry.items() if k not in ("step", "at"))
        env[f"resumed ({number})"] = f"from step {entry['step']:,}, {entry['at']}{f'; {changed}' if changed else ''}"
    return _facts({key: value for key, value in env.items() if value is not None})


def _facts(facts: Mapping[str, Any]) -> str:
    """A table of names and values."""
    told = {name.replace("_", " "): f"{value:,}" if type(value) is int else str(value) for name, value in facts.items()}
    rows = "".join(f"<tr><th scope=row>{escape(n)}</th><td>{escape(text)}</td></tr>" for n, text in told.items())
    return f'<div class="card scroll"><table><tbody>{rows}</tbody></table></div>\n' if rows else ""


def _read_samples(path: Path) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """What is shown of samples.jsonl under which title; a torn last line is left out.

    Raises  RunError, naming file:line, for any other bad one
    """
    found = Kept()
    for number, line in enumerate(_lines(path), 1):
        if not line.endswith("\n"):
            break
        try:
            sample = json.loads(line)
            found.add({key: sample[key] for key in ("step", "messages", "completions")} | sample)
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}:{number}: not a sample ({type(error).__name__}: {error}); it needs step, messages, completions"
            ) from error
    return found.sections()


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from file


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Each prompt once, with its first and its last answer."""

    def prompt(sample: Mapping[str, Any]) -> str:
        return json.dumps(sample["messages"])

    order = {key: place for place, key in reversed(list(enumerate(map(prompt, samples))))}
    by_prompt = [list(group) for _, group in groupby(sorted(samples, key=lambda s: order[prompt(s)]), key=prompt)]
    cards = []
    for group in by_prompt[:_MOST_SAMPLES]:
        group.sort(key=lambda sample: sample["step"])
        shown = group[:1] if len(group) == 1 else [group[0], group[-1]]
        ask = "".join(f"<h4>{escape(m['role'])}</h4>{_message(m)}" for m in group[0]["messages"])
        heads = [f"<h4>{_when(s['step'])}{_reward(s)}</h4>" for s in shown]
        answers = "".join(f"<div>{h}{_answers(s['completions'])}</div>" for h, s in zip(heads, shown, strict=True))
        wanted = group[-1].get("expected")
        expected = f'<p class="text expected">Expected: {escape(str(wanted))}</p>' if wanted is not None else ""
        cards.append(
            f'<article class="card sample"><div class="ask">{ask}</div>'
            f'<div class="answers">{answers}</div>{expected}</article>\n'
        )
    left = len(by_prompt) - _MOST_SAMPLES
    return "".join(cards) + (f'<p class="soft">{left:,} more in {SAMPLES}.</p>\n' if left > 0 else "")


def _when(step: int) -> str:
    return f"after step {step:,}" if step else "before training"


def _reward(sample: Mapping[str, Any]) -> str:
    if "reward" not in sample:
        return ""
    return ": failed" if sample["reward"] is None else f": reward {sample['reward']:.3g}"


def _answers(completions: Sequence[Mapping[str, Any]]) -> str:
    """What was sampled: parsed messages where there are some, else the text."""
    parts = []
    for completion in completions:
        messages = completion.get("messages") or [{"content": completion.get("text", "")}]
        parts += map(_message, messages)
    return "".join(parts)


def _message(message: Mapping[str, Any]) -> str:
    """Thinking, text and tool calls of one message in OpenAI's form."""
    thinking = next((message[key] for key in _REASONING if message.get(key)), None)
    parts = [f'<p class="text thinking"><b>thinking</b> {escape(str(thinking))}</p>'] if thinking else []
    content = message.get("content")
    if content:
        parts.append(f'<p class="text">{escape(content if isinstance(content, str) else json.dumps(content))}</p>')
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        shown = arguments if isinstance(arguments, str) else json.dumps(arguments)
        parts.append(f'<p class="text call"><b>call</b> {escape(function["name"])}({escape(shown)})</p>')
    return "".join(parts) or '<p class="text soft">(nothing)</p>'
