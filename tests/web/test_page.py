"""The chat page in a real browser, against a real server with a model that has learned a few conversations by heart."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ossia.config.schema import DataSourceConfig, HarmonyConfig
from ossia.data.formats import Encoder, build, recognise
from ossia.data.sources import open_rows
from ossia.harmony import Renderer, TrainOn
from ossia.web.app import PAGE
from tests.web.browser import ALT, CHROMIUM, CTRL, SHIFT, Browser, Page, chromium
from tests.web.conftest import WEATHER_TOOL, Live, Model, serving, wait_until

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to open the page"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
AXE = "4.14.1"
ATTACK = "<img src=x onerror='globalThis.hacked=1'><script>globalThis.hacked=1</script>"
PLAN = """A **bold** _plan_ with `code <b>`, [a link](https://example.com/a) and [none](javascript:alert(1)).

## Steps
1. first
2. second
   - inner **x**

```python
if a < b: print("**not bold**")
```
| shape | tokens/s |
|:--|--:|
| B1 | 345 |
> said
"""
IDLE = "[...document.querySelectorAll('.answer')].every((one) => one.getAttribute('aria-busy') === 'false')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for all tests here; each has a page with a storage of its own."""
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, live: Live) -> Iterator[Page]:
    """The page, freshly opened, with the model that talks and no chance in it; nothing may go wrong inside."""
    page = browser.new_page(live.url)
    begin(page)
    yield page
    assert page.problems() == []
    page.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's script; npm caches the package."""
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm to get axe-core")
    command = [npm, "pack", f"axe-core@{AXE}", "--silent", "--prefer-offline"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"npm can't get axe-core: {done.stderr.strip()[-300:]}")
    with tarfile.open(folder / f"axe-core-{AXE}.tgz") as archive:
        script = archive.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


def begin(page: Page) -> None:
    """Choose the model that talks, and leave nothing to chance."""
    page.wait("document.querySelector('select').length > 1")
    page.choose("select", "talker")
    set_up(page, temperature="0")


def set_up(page: Page, **fields: str) -> None:
    """Type into the settings, wherever their panel is."""
    for name, text in fields.items():
        field = f"document.querySelector('#settings-form').elements[{json.dumps(name)}]"
        page.js(f"{field}.value = {json.dumps(text)}")
        page.js(f"({field}.length ? {field}[0] : {field}).dispatchEvent(new Event('input', {{bubbles: true}}))")


def ask(page: Page, text: str) -> None:
    """Type a message, send it, and wait for every answer."""
    page.fill("#prompt", text)
    page.press("Enter")
    page.wait(IDLE)


def answers(page: Page) -> list[str]:
    """The visible text of the answers, thinking and buttons left out."""
    return page.texts(".answer .text")


def edit(page: Page, which: str, texts: dict[int, str], button: str) -> None:
    """Open a message's fields, type over some of them, and press a button."""
    page.click(f"{which} .actions button", "Edit")
    page.wait_for(".edit")
    for place, text in texts.items():
        page.js(f"document.querySelectorAll('.edit textarea')[{place}].select()")
        page.js(f"document.querySelectorAll('.edit textarea')[{place}].focus()")
        page.type(text)
    page.click(".edit button", button)


def change_requests(page: Page, **more: Any) -> None:
    """What the page sends from now on has these fields too; what it sent is kept in `sent`."""
    page.js(
        f"""(() => {{
          globalThis.sent = [];
          const real = window.fetch;
          window.fetch = (address, options) => {{
            if (!options.body) return real(address, options);
            sent.push(JSON.parse(options.body));
            return real(address, {{ ...options, body: JSON.stringify({{ ...sent.at(-1), ...{json.dumps(more)} }}) }});
          }};
        }})()"""
    )


def slow_down(page: Page) -> None:
    """A line so slow that an answer can be watched."""
    page.call("Network.enable")
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=3000, uploadThroughput=-1)


def test_an_answer_has_its_thinking_apart_and_closed_above_it(page: Page) -> None:
    ask(page, "hi")
    assert page.text(".question .message") == "hi"
    assert answers(page) == ["Hello!"]
    assert not page.js("document.querySelector('.thinking').open")
    assert not page.shown(".thought")
    assert page.js("find('.thinking').compareDocumentPosition(find('.text')) === Node.DOCUMENT_POSITION_FOLLOWING")
    page.click(".thinking summary")
    assert page.text(".thought") == "They greet.\nSo do I."
    assert re.search(r"Thinking \([\d.]+ s, \d+ tokens\)", page.text("summary"))
    assert re.search(r"^\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s$", page.text(".meta"))
    assert re.search(r"^\d+ of [\d,]+ tokens$", page.text(".used"))
    assert page.js("document.activeElement.id") == "prompt"
    heard = page.js("[...document.querySelectorAll('#live p')].map((one) => one.textContent)")
    assert [line for line in heard if line not in ("talker is thinking.", "talker answers.")] == ["Hello!", "talker is done."]
    assert page.js("document.querySelector('#live').ariaLive") == "polite"


def test_thinking_and_answer_can_be_watched_as_they_come(page: Page) -> None:
    slow_down(page)
    page.fill("#prompt", "count")
    page.press("Enter")
    page.wait("find('summary')?.textContent === 'Thinking…'")
    page.click(".thinking summary")
    thoughts = set()
    while not page.js("find('.text')?.textContent"):
        thoughts.add(page.js("find('.thought').textContent"))
    assert len(thoughts) > 2, "the thinking came at once"
    assert page.js("find('.answer').getAttribute('aria-busy')") == "true"
    parts = set()
    while not page.js(IDLE):
        parts.add(page.js("find('.text').textContent"))
    assert len(parts) > 2, "the answer came at once"
    assert answers(page) == ["one, two, three, four"]
    assert page.js("document.querySelector('.thinking').open"), "opening it is up to the reader"


def test_stopping_keeps_what_came_and_frees_the_engine(page: Page, live: Live, endless: dict[str, int]) -> None:
    change_requests(page, logit_bias=endless)
    page.fill("#prompt", "hi")
    page.click("#send")
    page.wait("document.querySelector('.answer')?.innerText.length > 80")
    assert page.shown("#stop")
    assert not page.shown("#send")
    page.click("#stop")
    page.wait(IDLE)
    wait_until(lambda: live.server.worker.outstanding == 0)
    assert re.search(r"^at least \d+ tokens · [\d.]+ s · stopped$", page.text(".meta"))
    assert page.shown("#send")
    page.press("Escape")
    assert page.js("document.activeElement.id") == "prompt"


def test_asking_again_and_editing_leave_the_older_branch_within_reach(page: Page) -> None:
    ask(page, "hi")
    ask(page, "count")
    page.click(".answer .actions button", "Regenerate")  # the first answer's: what followed belongs to the older one
    page.wait(IDLE)
    assert answers(page) == ["Hello!"]
    assert page.text(".answer .number") == "2/2"
    page.click(".answer .actions button", "Previous answer")
    assert page.texts(".question .message") == ["hi", "count"]
    assert page.js("document.activeElement.ariaLabel") == "Next answer"
    edit(page, ".question", {0: "emoji"}, "Send")
    page.wait(IDLE)
    assert page.texts(".question .message") == ["emoji"]
    assert answers(page) == ["Größe 🎉 done"]
    assert page.text(".question .number") == "2/2"
    page.click(".question .actions button", "Previous message")
    assert page.texts(".question .message") == ["hi", "count"]
    edit(page, ".answer", {0: "Greet in French.", 1: "Bonjour !"}, "Save as a new version")
    assert answers(page) == ["Bonjour !"]
    assert page.text(".meta") == "edited"
    assert page.text(".answer .number") == "3/3"


def test_a_call_is_a_card_and_the_result_one_makes_up_goes_on_with_the_turn(page: Page) -> None:
    set_up(page, tools=json.dumps([WEATHER_TOOL]))
    ask(page, "Paris?")
    assert answers(page) == ["One moment."]
    assert json.loads(page.text(".call pre")) == {"city": "Paris"}
    assert page.text(".call h4") == "get_weather"
    ask(page, "and?")
    assert page.text("#notice p") == "Give the result of get_weather first."
    assert page.js("document.activeElement.closest('.call') !== null")
    page.type("19C")
    page.press("Enter", CTRL)
    page.wait("document.querySelectorAll('.answer').length === 2")
    page.wait(IDLE)
    assert answers(page) == ["One moment.", "It is 19C."]
    assert page.texts(".call pre")[1] == "19C"
    page.click(".calls button", "Edit result")
    assert page.js("document.activeElement.value") == "19C"
    page.type("20C")
    page.click(".calls button", "Send as a new result")
    page.wait("document.querySelector('.calls .number')?.innerText === '2/2'")
    page.wait(IDLE)
    page.click(".calls button", "Previous result")
    assert page.texts(".call pre")[1] == "19C"
    assert answers(page)[1] == "It is 19C."


def test_two_columns_answer_the_same_prompt_each_on_its_own(page: Page, live: Live) -> None:
    ask(page, "hi")
    page.click("#compare")
    assert page.texts(".column:nth-child(2) .question .message") == ["hi"]
    assert page.js("document.querySelectorAll('select')[1].value") == "base"
    page.click(".asking button", "Let base answer")
    page.wait("document.querySelector('.column:nth-child(2) .answer')?.innerText.length > 20")
    page.press("Escape")
    page.wait(IDLE)
    page.fill("#prompt", "count")
    page.press("Enter")
    page.wait("document.querySelectorAll('.column:nth-child(1) .answer[aria-busy=false]').length === 2")
    assert page.texts(".column:nth-child(1) .text")[-1] == "one, two, three, four"
    assert page.js("document.querySelectorAll('.column:nth-child(2) .question').length") == 2
    page.press("Escape")
    page.wait(IDLE)
    wait_until(lambda: live.server.worker.outstanding == 0)
    page.click(".column:nth-child(2) button", "Close this column")
    assert len(page.texts(".column")) == 1
    assert page.texts(".conversation .title") == ["hi", "hi"]
    page.click("#notice button", "Open it")
    assert page.js("find('select').value") == "base"


def test_what_is_set_is_what_is_asked(page: Page) -> None:
    change_requests(page)
    page.click("#open-settings")
    page.click(".segments span", "High")
    page.fill("#system", "You are terse.")
    page.fill("#developer", "Answer in French.")
    page.click("#tools-example")
    numbers = {"temperature": "0.7", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "3", "seed": "7"}
    for name, text in numbers.items():
        page.fill(f"#settings-form [name={name}]", text)
    ask(page, "hi")
    (sent,) = page.js("sent")
    assert sent["messages"] == [
        {"role": "system", "content": "You are terse."},
        {"role": "developer", "content": "Answer in French."},
        {"role": "user", "content": "hi"},
    ]
    assert (sent["model"], sent["reasoning_effort"]) == ("talker", "high")
    assert {name: sent[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 7,
    }
    assert sent["max_completion_tokens"] == 3
    assert sent["tools"][0]["function"]["name"] == "get_weather"
    assert page.text(".meta").endswith("cut off at the most tokens")


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("tools", "[{", "Not JSON yet"),
        ("tools", '{"name": "x"}', "Expected a list of functions"),
        ("tools", '[{"name": "a b"}]', "Tool 1: its function needs a name"),
        ("tools", '[{"name": "a"}, {"name": "a"}]', "Tool 2: a is listed twice"),
        ("temperature", "hot", "Temperature: a number from 0 to 2, or nothing."),
        ("top_k", "1.5", "Top k: a whole number, at least 0, or nothing."),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_before_anything_is_sent(
    page: Page, field: str, text: str, words: str
) -> None:
    change_requests(page)
    set_up(page, **{field: text})
    page.fill("#prompt", "hi")
    page.press("Enter")
    page.wait_for(f"#{field}-problem")
    assert words in page.text(f"#{field}-problem")
    assert words in page.text("#notice p")
    assert page.js("document.activeElement.name") == field
    assert page.js("document.activeElement.ariaInvalid") == "true"
    assert page.js("sent") == []
    assert page.js("document.querySelector('#prompt').value") == "hi"


def test_the_exported_row_is_one_that_training_takes(browser: Browser, page: Page, model: Model, tmp_path: Path) -> None:
    set_up(page, tools=json.dumps([WEATHER_TOOL]), developer="Be brief.", effort="high")
    page.click("button", "Export")
    assert page.text("#notice p") == "There is no answer to train on yet."
    ask(page, "Paris?")
    page.click(".call textarea")
    page.type("19C")
    page.click(".calls button", "Send result")
    page.wait("document.querySelectorAll('.answer').length === 2")
    page.wait(IDLE)
    edit(page, ".answer:last-of-type", {1: "19 °C."}, "Save as a new version")
    browser.call(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), browserContextId=page.context
    )
    page.click("button", "Export")
    page.click("#export-download")
    file = tmp_path / "paris.jsonl"
    wait_until(file.is_file)
    assert file.read_text() == page.js("document.querySelector('#export-row').textContent") + "\n"
    page.press("Escape")
    assert page.js("document.activeElement.textContent") == "Export"

    rows = open_rows(str(file))
    layout, _ = recognise(rows, DataSourceConfig(path=str(file)), HarmonyConfig())
    assert layout.format == "messages"
    assert layout.unused(rows.row(0)) == ()
    found = build(layout, rows.row(0), "x:1", Encoder(model.vocab, Renderer(model.vocab), TrainOn("all")))
    for words in ("Be brief.", "Reasoning: high", "get_weather", "19C"):
        assert any(words in model.vocab.decode(sample.ids.tolist()) for sample in found), words
    trained = model.vocab.decode([int(n) for sample in found for n in sample.ids[sample.weights > 0]])
    for words in ("I look.", "One moment.", '{"city":"Paris"}', "19 °C."):
        assert words in trained


def test_a_row_with_a_broken_off_answer_says_so(page: Page) -> None:
    set_up(page, max_tokens="3")
    ask(page, "hi")
    page.click("button", "Export")
    assert "breaks off in the middle" in page.text("#export-remarks")


def test_a_reload_brings_back_conversation_branch_and_settings(page: Page, endless: dict[str, int]) -> None:
    set_up(page, system="Be kind.")
    ask(page, "hi")
    page.click(".answer .actions button", "Regenerate")
    page.wait(IDLE)
    page.click(".answer .actions button", "Previous answer")
    page.reload()
    page.wait_for(".answer .text")
    assert answers(page) == ["Hello!"]
    assert page.text(".answer .number") == "1/2"
    assert page.js("document.querySelector('#system').value") == "Be kind."
    assert page.js("find('select').value") == "talker"
    change_requests(page, logit_bias=endless)
    page.fill("#prompt", "more")
    page.press("Enter")
    page.wait("document.querySelectorAll('.answer')[1]?.innerText.length > 40")
    page.reload()
    page.wait_for(".answer .text")
    assert page.texts(".meta")[1].endswith("stopped")
    assert page.js(IDLE)


def test_conversations_are_listed_opened_deleted_and_brought_back(page: Page) -> None:
    ask(page, "hi")
    page.press("n", ALT)
    ask(page, "count")
    assert page.texts(".conversation .title") == ["count", "hi"]
    page.click(".conversation:not([aria-current])")
    assert answers(page) == ["Hello!"]
    page.click(".cross", "Delete hi")
    assert page.texts(".conversation .title") == ["count"]
    page.click("#notice button", "Undo")
    assert answers(page) == ["Hello!"]
    assert page.texts(".conversation .title") == ["count", "hi"]


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    page.reload()
    page.wait("document.querySelector('select').length > 1")
    page.wait("document.activeElement.id === 'prompt'")
    page.type("hi")
    page.press("Enter", SHIFT)
    page.press("Backspace")
    page.press("Enter")
    page.wait_for(".answer")
    page.wait(IDLE)
    walked = []
    for _ in range(40):
        page.press("Tab", SHIFT)
        walked.append(page.js("(document.activeElement.ariaLabel ?? document.activeElement.innerText).trim()"))
        assert page.js("document.activeElement.matches(':focus-visible')"), walked
        if walked[-1] == "Skip to the message box":
            break
    assert {"Regenerate", "Edit", "Copy", "Export", "Settings", "Compare", "New", "Conversations"} <= set(walked)
    page.press("Enter")
    assert page.js("document.activeElement.id") == "prompt"
    for _ in range(walked.index("Edit") + 1):
        page.press("Tab", SHIFT)
    page.press("Enter")
    assert page.js("document.activeElement.closest('.edit') !== null")
    page.type(" there")
    page.press("Escape")
    assert page.js("document.activeElement.innerText") == "Edit"
    page.press("Enter")
    page.press("a", CTRL)
    page.type("Salut !")
    page.press("Enter", CTRL)
    assert answers(page) == ["Salut !"]
    page.press("m", ALT)
    assert page.js("document.activeElement.id") == "prompt"


def test_a_narrow_screen_needs_no_scrolling_sideways(page: Page) -> None:
    page.size(390, 800)
    ask(page, "hi")
    wide = f"{PLAN}\n{'x' * 300}\n\n```\n{'y' * 300}\n```\n|{'z|' * 80}\n|{'-|' * 80}\n"
    edit(page, ".answer", {1: wide}, "Save as a new version")
    overflow = "document.scrollingElement.scrollWidth > 390 || find('.scroll').scrollWidth > find('.scroll').clientWidth"
    assert not page.js(overflow)
    page.click("#open-list")
    assert page.js("document.querySelector('#list').matches(':modal')")
    assert not page.js(overflow)
    page.press("Escape")
    assert page.js("document.activeElement.id") == "open-list"
    page.click("#open-settings")
    assert not page.js("document.scrollingElement.scrollWidth > 390")
    page.press("Escape")
    page.click("#compare")
    assert len(page.texts(".column")) == 1
    page.click("#tabs button", "base")
    assert page.js("find('select').value") == "base"
    assert not page.js(overflow)


def test_markdown_becomes_elements_and_never_more_than_its_own(page: Page) -> None:
    ask(page, "hi")
    edit(page, ".answer", {1: PLAN}, "Save as a new version")
    shape = page.js("[...document.querySelectorAll('.text *')].map((one) => one.tagName.toLowerCase()).join(' ')")
    assert shape == (
        "p strong em code a h5 ol li li ul li strong figure figcaption span button pre code "
        "div table thead tr th th tbody tr td td blockquote p"
    )
    assert page.text(".text pre") == 'if a < b: print("**not bold**")'
    assert page.js("[...document.querySelectorAll('.text a')].map((one) => one.href)") == ["https://example.com/a"]
    assert "[none](javascript:alert(1))" in page.text(".text")


def test_whatever_a_model_says_is_text(page: Page) -> None:
    schema = {"type": "object", "properties": {"say": {"const": ATTACK}}, "required": ["say"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    change_requests(page, response_format=form)
    ask(page, "hi")  # the model itself, held to these words by a grammar
    assert json.loads(answers(page)[0]) == {"say": ATTACK}
    page.reload()
    page.wait_for(".answer")
    code = f"```{ATTACK.replace(' ', '')}\n{ATTACK}\n```"
    link = f'[{ATTACK}](https://example.com/"onmouseover="x)'
    edit(page, ".answer", {0: ATTACK, 1: f"{ATTACK}\n\n# {ATTACK}\n- **{ATTACK}**\n\n{link}\n\n{code}"}, "Save as a new version")
    page.click("summary")
    assert page.text(".thought") == ATTACK
    ask(page, ATTACK)
    page.press("n", ALT)
    set_up(page, tools=json.dumps([WEATHER_TOOL]))
    ask(page, "Paris?")
    page.click(".call textarea")
    page.type(ATTACK)
    page.click(".calls button", "Send result")
    page.wait("document.querySelectorAll('.answer').length === 2")
    page.wait(IDLE)
    assert page.texts(".call pre")[1] == ATTACK
    page.press("n", ALT)
    ask(page, ATTACK)  # now it is a title too
    assert page.texts(".conversation .title")[0] == ATTACK[:80]
    assert page.js("document.querySelectorAll('img, script:not([src]), [onerror], [onmouseover]').length") == 0
    assert page.js("globalThis.hacked") is None


def test_copying_an_answer_copies_its_source(browser: Browser, page: Page) -> None:
    rights = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    browser.call("Browser.grantPermissions", permissions=rights, browserContextId=page.context)
    ask(page, "hi")
    edit(page, ".answer", {1: PLAN}, "Save as a new version")
    page.click(".answer .actions button", "Copy")
    page.wait_for("#notice p", "Copied.")
    assert page.js("navigator.clipboard.readText()") == PLAN


def test_a_key_that_is_missing_is_asked_for(browser: Browser, model: Model) -> None:
    with serving(model, api_key="sesame") as live:
        page = browser.new_page(live.url)
        page.wait_for("#notice button", "Type the key")
        page.click("#notice button", "Type the key")
        assert page.js("document.activeElement.id") == "key"
        page.type("sesame")
        begin(page)
        ask(page, "hi")
        assert answers(page) == ["Hello!"]
        assert page.js("Object.values(localStorage).every((text) => !text.includes('sesame'))")
        page.close()


def test_an_error_says_what_to_do_next_and_trying_again_is_a_button(browser: Browser, model: Model) -> None:
    with serving(model, max_length=230) as live:
        page = browser.new_page(live.url)
        begin(page)
        ask(page, "x " * 300)
        assert "this model's context is 230 tokens" in page.text(".failure")
        assert "start a new one" in page.text(".failure")
        edit(page, ".question", {0: "hi"}, "Send")
        page.wait(IDLE)
        assert answers(page) == ["Hello!"]
        live.server.draining = True
        page.click(".answer .actions button", "Regenerate")
        page.wait_for(".failure")
        assert "the server is shutting down" in page.text(".failure")
        live.server.draining = False
        page.click(".failure button", "Try again")
        page.wait("document.querySelector('.failure') === null && document.querySelector('.answer .text')?.innerText === 'Hello!'")
        assert page.text(".answer .number") == "2/2", "an answer that never began leaves no version"
    page.click(".answer .actions button", "Regenerate")
    page.wait_for(".failure")
    assert "The server doesn't answer." in page.text(".failure")
    assert "Is ossia serve still running?" in page.text(".failure")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, axe: str, scheme: str) -> None:
    page.scheme(scheme)
    page.js(f"{axe}; 0")
    found: dict[str, list[str]] = {}

    def look(state: str) -> None:
        options = "{ resultTypes: ['violations'] }"
        for finding in page.js(f"axe.run(document, {options}).then(({{ violations }}) => violations)"):
            if finding["impact"] in ("serious", "critical"):
                places = [node["html"][:120] for node in finding["nodes"]]
                found[f"{state}: {finding['help']}"] = places

    look("empty")
    ask(page, "hi")
    edit(page, ".answer", {1: PLAN}, "Save as a new version")
    page.click("summary")
    page.click("#open-settings")
    set_up(page, tools="[{")
    page.js("document.querySelector('#tools').dispatchEvent(new Event('focusout', {bubbles: true}))")
    page.wait_for("#tools-problem")
    look("an answer and the settings")
    set_up(page, tools=json.dumps([WEATHER_TOOL]))
    page.press("n", ALT)
    ask(page, "Paris?")
    page.click(".question .actions button", "Edit")
    look("a call and an edit")
    page.press("Escape")
    page.click("button", "Export")
    look("the row")
    page.press("Escape")
    page.click("#compare")
    look("two columns")
    page.size(390, 800)
    look("two columns, narrow")
    page.call("Network.enable")
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.click("#tabs button", "base")
    page.click(".asking button")
    page.wait_for(".failure")
    look("an error")
    assert found == {}
    page.problems()  # that the server could not be reached stands in the console too


def test_the_pages_files_are_small_and_take_no_shortcut_to_markup(live: Live) -> None:
    files = sorted(file for file in PAGE.rglob("*") if file.is_file())
    assert {file.suffix for file in files} == {".html", ".js", ".css", ".svg"}
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, file
        assert max(map(len, text.splitlines())) <= 160, file
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), file
        if file.suffix in (".js", ".css"):
            assert not re.search(r"""["'(]https?://""", text), f"{file}: nothing comes from elsewhere"
        found = httpx2.get(f"{live.url}/page/{file.relative_to(PAGE)}")
        assert (found.status_code, found.headers["cache-control"]) == (200, "no-cache")
    assert "default-src 'none'" in httpx2.get(live.url).text
