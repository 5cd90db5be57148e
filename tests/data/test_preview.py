"""What people see of samples: trained or not without colours, no control characters, and a page that stands alone."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ossia.config import Recipe
from ossia.data.dataset import Datasets, Statistics, open_datasets, scan
from ossia.data.page import write_page
from ossia.data.preview import first_samples, json_lines, show
from ossia.harmony.vocab import Vocabulary

Open = Callable[..., Datasets]
NASTY = "\x1b[31mred <b>&amp; \u202ebold</b><script>alert(1)</script>\r\n\tnext"
ROW = {
    "messages": [
        {"role": "user", "content": NASTY},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "thinking": "hm", "content": "second", "weight": 0.5},
    ],
    "lang": "en",
}


@pytest.fixture
def datasets(write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary) -> Datasets:
    paths = [
        write_rows([ROW, {"messages": 3}], "one.jsonl"),
        write_rows([{"text": f"t{n}"} for n in range(4)], "two.jsonl"),
    ]
    return open_datasets(make_recipe(*paths, on_bad_row="skip"), vocab)


def shown(datasets: Datasets, vocab: Vocabulary, **console: Any) -> str:
    out = io.StringIO()
    samples = first_samples(datasets.whole, 2)
    show(samples, scan(datasets.whole), datasets.notes, vocab, Console(file=out, width=160, **console))
    return out.getvalue()


def test_json_lines_have_the_fields_that_other_tools_stand_on(datasets: Datasets, vocab: Vocabulary) -> None:
    records = [json.loads(line) for line in json_lines(datasets.whole, None)]
    assert len(records) == 5
    first = records[0]
    assert list(first) == ["source", "ids", "weights", "roles", "channels", "targets"]
    assert first["source"].endswith("one.jsonl:1")
    assert {len(first[name]) for name in ("ids", "weights", "roles", "channels", "targets")} == {len(first["ids"])}
    assert all(isinstance(number, int) for number in first["ids"] + first["targets"])
    assert set(first["weights"]) == {0, 0.5, 1}
    by_author = dict.fromkeys(zip(first["roles"], first["channels"], strict=True))
    authors = [("system", None), ("user", None), ("assistant", "final"), ("assistant", "analysis")]
    assert list(by_author) == authors
    end, stop = vocab.special["<|end|>"], vocab.special["<|return|>"]
    differ = [pair for pair in zip(first["ids"], first["targets"], strict=True) if pair[0] != pair[1]]
    assert differ == [(end, stop)]
    assert "targets" not in records[1]
    assert len(list(json_lines(datasets.whole, 2))) == 2


def test_the_first_samples_are_taken_from_every_source_in_turn(datasets: Datasets) -> None:
    places = [sample.source.rpartition("/")[2] for sample in first_samples(datasets.whole, 4)]
    assert places == ["one.jsonl:1", "two.jsonl:1", "two.jsonl:2", "two.jsonl:3"]


def test_a_log_file_shows_what_is_trained_without_colours(datasets: Datasets, vocab: Vocabulary) -> None:
    text = shown(datasets, vocab)
    assert "\x1b" not in text
    lines = [line.rstrip() for line in text.splitlines() if line.startswith("+ ")]
    assert lines[0].startswith("+ assistant final")
    assert "<|channel|>final<|message|>first<|end|>→<|return|>" in lines[0]
    assert "assistant analysis x0.5" in lines[1]
    assert lines[2].endswith("<|start|>assistant<|channel|>final<|message|>second<|return|>")
    context = [line for line in text.splitlines() if line.startswith(". ")]
    assert any("user" in line and "\\x1b[31mred" in line for line in context)
    assert "</script>\\r" in text
    assert re.search(r"one.jsonl:1   \d+ tokens, \d+ trained", text)


def test_the_totals_and_what_was_left_out_are_shown(datasets: Datasets, vocab: Vocabulary) -> None:
    text = shown(datasets, vocab)
    assert re.search(r"^rows +6 *$", text, re.MULTILINE)
    assert re.search(r"^skipped rows +1 *$", text, re.MULTILINE)
    assert "rows skipped: 1 of 6, the first:" in text
    assert "one.jsonl:2: messages: expected a list of messages, found a number" in text
    assert "rows with the column `lang`, which is not used: 1" in text
    assert "format messages (recognised by messages)" in text


def test_a_terminal_gets_colours_and_no_control_character_of_the_data(datasets: Datasets, vocab: Vocabulary) -> None:
    text = shown(datasets, vocab, force_terminal=True, color_system="standard")
    assert "\x1b[31m" not in text  # the data's own red; the preview uses none
    assert "\u202e" not in text
    underlined = "".join(re.findall(r"\x1b\[(?:\d+;)*4(?:;\d+)*m([^\x1b]*)", text))
    assert underlined.startswith("<|channel|>final<|message|>first<|end|>→<|return|><|channel|>analysis<|message|>hm")


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_shows_the_data_as_text(
    datasets: Datasets, vocab: Vocabulary, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text("an older page")
    samples = first_samples(datasets.whole, 2)
    write_page(file, samples, scan(datasets.whole), datasets.notes, vocab)
    assert [path.name for path in tmp_path.glob("*page*")] == ["page.html"]
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "b"} & set(page.tags)
    assert not {"src", "href", "onclick"} & {name for name, _ in page.attributes}
    assert "url(" not in text
    assert "@import" not in text
    assert "<script>alert(1)</script>" in page.text  # escaped, so it is text
    assert ">&lt;</span>" in text
    assert "><</span>" not in text
    assert "\x1b" not in text
    assert "prefers-color-scheme: dark" in text
    assert "text-decoration: underline" in text
    for word in ("trained, ", "context, ", "assistant final", "skipped", "one.jsonl:1"):
        assert word in page.text
    assert page.tags.count("section") == 2
    assert sum(name == "title" for name, _ in page.attributes) == sum(map(len, samples))


def test_an_empty_statistic_has_no_warnings() -> None:
    assert Statistics().warnings() == []
