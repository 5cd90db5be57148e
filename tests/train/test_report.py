from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ossia.errors import RunError
from ossia.train.events import write_env
from ossia.train.report import write_report
from ossia.train.report.chart import Series, buckets, chart_html, nice_ticks, tick_text
from tests.train.small_run import train

VOID = {"meta", "path", "rect", "br"}


class Outline(HTMLParser):
    """Texts by tag, and whether every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def of(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]


def sample(step: int, question: str, answer: str) -> dict[str, Any]:
    said = {"role": "assistant", "thinking": f"about {question}", "content": answer}
    messages = [{"role": "user", "content": question}]
    return {"step": step, "messages": messages, "completions": [{"messages": [said]}], "expected": "42"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run with everything a run folder may hold."""
    run = tmp_path_factory.mktemp("report") / "a & b"
    train(run)
    (run / "recipe.yaml").write_text("method: sft\nmodel: <folder>\n")
    write_env(run, {"torch": "2.13.0", "memory_bytes": 2**34}, now=datetime(2025, 1, 2, tzinfo=UTC), say=print)
    lines = [sample(0, "q1", "bad"), sample(0, "q2", "worse"), sample(3, "q1", "between"), sample(6, "q1", "good")]
    call = {"function": {"name": "look", "arguments": '{"at": "x"}'}}
    lines.append(
        {
            "step": 6,
            "messages": [{"role": "user", "content": "q3 <script>alert(1)</script>"}],
            "completions": [{"messages": [{"role": "assistant", "tool_calls": [call]}]}, {"text": "<|channel|>raw"}],
        }
    )
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture(scope="module")
def outline(run: Path) -> Outline:
    page = Outline(write_report(run).read_text())
    assert page.open == []
    return page


def test_the_page_is_well_formed_and_needs_nothing_from_outside(run: Path, outline: Outline) -> None:
    text = write_report(run).read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in outline.attributes}
    assert "url(" not in text
    assert "default-src 'none'; style-src 'unsafe-inline'" in text


def test_what_a_run_wrote_is_shown_as_text_and_never_as_markup(outline: Outline) -> None:
    assert "q3 <script>alert(1)</script>" in outline.of("p")
    assert outline.of("pre") == ["method: sft\nmodel: <folder>"]
    assert outline.of("h1") == ["a & b"]


def test_every_curve_says_what_it_is_to_those_who_cannot_see_it_and_has_its_numbers_in_a_table(
    outline: Outline,
) -> None:
    charts = [attributes for tag, attributes in outline.attributes if tag == "svg"]
    assert outline.of("h3") == ["Loss", "Learning rate", "Gradient norm", "Speed", "Peak memory"]
    assert [chart["role"] for chart in charts] == ["img"] * 5
    ids = {attributes.get("id") for tag, attributes in outline.attributes if tag == "title"}
    assert {chart["aria-labelledby"] for chart in charts} <= ids
    assert outline.of("caption") == outline.of("h3")
    titles = outline.of("title")
    assert any(
        re.fullmatch(r"Loss \(nats .*\): training loss from \S+ to \S+; held-out .*, up to step 6", t) for t in titles
    )


def test_pointing_at_a_step_names_its_numbers(run: Path, outline: Outline) -> None:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for event in events[2:]:
        name, key = ("held-out loss", "eval_loss") if event["event"] == "eval" else ("training loss", "loss")
        assert f"step {event['step']}: {name} {event[key]:.5g}" in outline.of("title")


def test_samples_are_shown_once_a_question_with_the_first_and_the_last_answer(outline: Outline) -> None:
    heads, paragraphs = outline.of("h4"), outline.of("p")
    assert heads == ["user", "before training", "after step 6", "user", "before training", "user", "after step 6"]
    assert [p for p in paragraphs if p in ("bad", "worse", "between", "good")] == ["bad", "good", "worse"]
    assert ' look({"at": "x"})' in paragraphs
    assert "<|channel|>raw" in paragraphs
    assert paragraphs.count("Expected: 42") == 2


def test_of_several_ranks_the_page_shows_the_memory_of_the_fullest(run: Path, tmp_path: Path) -> None:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    ranks = [e | {"rank_peak_bytes": [2**30, 5 * 2**30]} if e["event"] == "step" else e for e in events]
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in ranks))
    shown = Outline(write_report(tmp_path / "run").read_text())
    assert "5.0 GiB" in shown.of("dd")
    assert "rank 1, the most of 2" in shown.of("small")


def test_the_page_holds_counts_checkpoints_environment_and_totals(outline: Outline) -> None:
    cells = outline.of("td")
    assert {"checkpoints/step-00000004", "checkpoints/step-00000006", "2.13.0", "16.0 GiB"} <= set(cells)
    assert "rows skipped" in outline.of("th")
    assert "72" in outline.of("dd")  # 6 steps of 12 trained tokens
    assert "of 144 tokens read" in outline.of("small")
    assert "Finished: 6 steps" in outline.of("p")


def test_the_same_folder_gives_the_same_page(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_run_that_is_still_going_on_or_has_only_begun_has_a_page_too(run: Path, tmp_path: Path) -> None:
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    for kept, words in ((1, "No step has been taken yet."), (2, "Step 0 of 6"), (5, "Step 3 of 6")):
        (tmp_path / "events.jsonl").write_text("".join(lines[:kept]) + '{"event": "st')
        page = Outline(write_report(tmp_path).read_text())
        assert page.open == []
        assert words in page.of("p")


def test_a_folder_without_events_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no events\.jsonl here, so this is not the folder of a run"):
        write_report(tmp_path)


def test_a_sample_that_lacks_its_keys_is_named_by_file_and_line(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "events.jsonl", tmp_path)
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample(0, "q", "a")) + '\n{"step": 1, "messages": []}\n')
    with pytest.raises(RunError, match=r"samples\.jsonl:2: not a sample \(KeyError: 'completions'\)"):
        write_report(tmp_path)


def test_ticks_are_round_numbers_around_the_values() -> None:
    assert nice_ticks(0.0, 0.93) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert nice_ticks(1.08, 2.63) == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    assert nice_ticks(0, 500, about=5, whole=True) == [0, 100, 200, 300, 400, 500]
    assert nice_ticks(0, 3, about=5, whole=True) == [0, 1, 2, 3]
    flat = nice_ticks(2.0, 2.0)
    assert flat[0] <= 2.0 < flat[-1]
    assert [tick_text(t, (0.0, 0.25)) for t in (0.0, 0.25, 1.5)] == ["0.00", "0.25", "1.50"]
    assert [tick_text(t, (0.0, 2000.0)) for t in (0.0, 2000.0)] == ["0", "2,000"]


def test_many_points_become_few_that_keep_mean_and_range() -> None:
    points = [(step, float(step % 10)) for step in range(1, 1001)]
    found = buckets(points, 100)
    assert len(found) == 100
    assert [(b.first, b.last, b.low, b.high) for b in found[:2]] == [(1, 10, 0.0, 9.0), (11, 20, 0.0, 9.0)]
    assert all(b.mean == pytest.approx(4.5) for b in found)
    assert sum(b.last - b.first + 1 for b in buckets(points[:-7], 100)) == 993


def test_points_lie_where_the_axes_say() -> None:
    drawn = chart_html("T", "u", [Series("s", [(0, 0.0), (5, 5.0), (10, 10.0)])], from_zero=True)
    assert 'class="line c0" d="M0.0 300.0L500.0 150.0L1000.0 0.0"' in drawn


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium to render the page")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_draws_the_page_in_light_and_dark_without_overflowing(run: Path, tmp_path: Path, width: int) -> None:
    page, shades = write_report(run), []
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    for scheme in (0, 1):  # dark, light
        shot = tmp_path / f"{scheme}.png"
        command = ["chromium", *flags, f"--user-data-dir={tmp_path / f'profile{scheme}'}", f"--window-size={width},900"]
        command += [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(shot) as image:
            assert image.size == (width, 900)
            colours = image.convert("L").getcolors(2**16)
            shades.append(max(colours)[1])
            right = image.convert("RGB").crop((width - 6, 0, width, 900)).getcolors(2**16)
            assert len(right) == 1, "something runs into the right edge"
    assert shades[0] < 40 < 200 < shades[1]
