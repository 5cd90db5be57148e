"""The chat page in a real browser, against a real server with a model that has learned a few conversations by heart."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from ossia.config.schema import DataSourceConfig, HarmonyConfig
from ossia.data.formats import Encoder, build
from ossia.data.layout import recognise
from ossia.data.sources import open_rows
from ossia.harmony import Renderer, TrainOn
from tests.web.browser import ALT, CHROMIUM, CTRL, SHIFT, Browser, Page
from tests.web.conftest import WEATHER_TOOL, Live, Model, serving, wait_until
from tests.web.page_steps import ATTACK, IDLE, PLAN, answers, ask, begin, change_requests, edit, set_up

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to open the page"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_an_answer_has_its_thinking_apart_and_closed_above_it(page: Page) -> None:
    ask(page, "hi")
    assert page.js("document.activeElement.id") == "prompt"
    assert page.text(".question .message") == "hi"
    assert answers(page) == ["Hello!"]
    assert not page.js("document.querySelector('.thinking').open")
    assert not page.shown(".thought")
    assert page.js("find('.thinking').compareDocumentPosition(find('.text')) === Node.DOCUMENT_POSITION_FOLLOWING")
    page.click(".thinking summary")
    assert page.text(".thought") == "They greet.\nSo do I."
    assert re.search(r"^Thinking \(([\d.]+ s, )?\d+ tokens\)$", page.text("summary"))
    assert re.search(r"^\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s$", page.text(".meta"))
    assert re.search(r"^\d+ of [\d,]+ tokens$", page.text(".used"))
    heard = page.js("[...document.querySelectorAll('#live p')].map((one) => one.textContent)")
    assert [line for line in heard if line not in ("talker is thinking.", "talker answers.")] == [
        "Hello!",
        "talker is done.",
    ]
    assert page.js("document.querySelector('#live').ariaLive") == "polite"


def test_thinking_and_answer_can_be_watched_as_they_come(
    page: Page, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = live.worker._step
    monkeypatch.setattr(live.worker, "_step", lambda *given: (time.sleep(0.03), step(*given))[1])
    page.js(
        """(() => {
          globalThis.seen = [];
          new MutationObserver(() => seen.push({
            thought: document.querySelector(".thought")?.textContent ?? "",
            text: find(".answer .text")?.textContent ?? "",
            busy: find(".answer")?.ariaBusy ?? "",
          })).observe(document.querySelector("#columns"), { subtree: true, childList: true, characterData: true });
        })()"""
    )
    page.fill("#prompt", "count")
    page.press("Enter")
    page.click(".thinking summary", "Thinking…")
    page.wait(IDLE)
    seen = [moment for moment in page.js("seen") if moment["busy"] == "true"]
    thoughts = {moment["thought"] for moment in seen if moment["thought"] and not moment["text"]}
    assert len(thoughts) > 2, "the thinking came at once"
    assert len({moment["text"] for moment in seen if moment["text"]}) > 2, "the answer came at once"
    assert answers(page) == ["one, two, three, four"]
    assert page.js("document.querySelector('.thinking').open"), "opening it is up to the reader"


def test_stopping_keeps_what_came_and_frees_the_engine(page: Page, live: Live, chatter: dict[str, int]) -> None:
    change_requests(page, logit_bias=chatter)
    page.choose("select", "base")
    page.fill("#prompt", "hi")
    page.click("#send")
    page.wait("find('.answer .message')?.innerText.length > 40")
    assert page.shown("#stop")
    assert not page.shown("#send")
    page.click("#stop")
    page.wait(IDLE)
    wait_until(lambda: live.worker.outstanding == 0)
    assert re.search(r"^at least \d+ tokens? · [\d.]+ s · stopped$", page.text(".meta"))
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


def test_two_columns_answer_the_same_prompt_each_on_its_own(page: Page, live: Live, chatter: dict[str, int]) -> None:
    change_requests(page, "base", logit_bias=chatter)
    ask(page, "hi")
    page.click("#compare")
    assert page.texts(".column:nth-child(2) .question .message") == ["hi"]
    assert page.js("document.querySelectorAll('select')[1].value") == "base"
    page.click(".asking button", "Let base answer")
    page.wait("document.querySelector('.column:nth-child(2) .answer')?.innerText.length > 20")
    page.press("Escape")
    page.wait(IDLE)
    page.press("n", ALT)
    page.click("#compare")
    page.fill("#prompt", "count")
    page.press("Enter")
    page.wait(
        "find('.column:nth-child(1) .answer[aria-busy=false]') && find('.column:nth-child(2) .answer[aria-busy=true]')"
    )
    assert page.text(".column:nth-child(1) .text") == "one, two, three, four"
    assert page.texts(".column:nth-child(2) .question .message") == ["count"]
    page.press("Escape")
    page.wait(IDLE)
    wait_until(lambda: live.worker.outstanding == 0)
    page.click(".column:nth-child(2) button", "Close this column")
    assert len(page.texts(".column")) == 1
    assert page.texts(".conversation .title") == ["count", "count", "hi"]
    page.click("#notice button", "Open it")
    assert page.js("find('select').value") == "base"


def test_what_is_set_is_what_is_asked(page: Page) -> None:
    change_requests(page)
    page.click("#open-settings")
    assert not page.js("document.scrollingElement.scrollHeight > innerHeight"), "only its parts scroll"
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


def test_the_exported_row_is_one_that_training_takes(
    browser: Browser, page: Page, model: Model, tmp_path: Path
) -> None:
    set_up(page, tools=json.dumps([WEATHER_TOOL]))
    page.click("button", "Export")
    assert page.text("#notice p") == "There is no answer to train on yet."
    ask(page, "Paris?")
    page.click(".call textarea")
    page.type("19C")
    page.click(".calls button", "Send result")
    page.wait("document.querySelectorAll('.answer').length === 2")
    page.wait(IDLE)
    edit(page, ".answer:last-of-type", {1: "19 °C."}, "Save as a new version")
    set_up(page, developer="Be brief.", effort="high")
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
    assert layout.ignored(rows.row(0)) == ()
    found = build(layout, rows.row(0), "x:1", Encoder(model.vocab, Renderer(model.vocab), TrainOn("all")))
    for words in ("Be brief.", "Reasoning: high", "get_weather", "19C"):
        assert any(words in model.vocab.decode(sample.ids.tolist()) for sample in found), words
    trained = model.vocab.decode([int(n) for sample in found for n in sample.ids[sample.weights > 0]])
    for words in ("I look.", "One moment.", '{"city":"Paris"}', "19 °C."):
        assert words in trained


def test_a_row_with_a_broken_off_answer_says_so(page: Page) -> None:
    set_up(page, max_tokens="16")
    ask(page, "hi")
    page.click("button", "Export")
    assert "breaks off in the middle" in page.text("#export-remarks")


def test_a_reload_brings_back_conversation_branch_and_settings(page: Page, chatter: dict[str, int]) -> None:
    ask(page, "hi")
    page.click(".answer .actions button", "Regenerate")
    page.wait(IDLE)
    set_up(page, system="Be kind.")
    page.click(".answer .actions button", "Previous answer")
    page.reload()
    page.wait_for(".answer .text")
    assert answers(page) == ["Hello!"]
    assert page.text(".answer .number") == "1/2"
    assert page.js("document.querySelector('#system').value") == "Be kind."
    assert page.js("find('select').value") == "talker"
    assert page.shown("#list")
    assert not page.shown("#settings"), "a panel that was closed stays closed"
    page.wait("document.querySelector('select').length > 1")  # the models are known, and base can be chosen
    change_requests(page, logit_bias=chatter)
    page.press("n", ALT)
    assert page.js("document.querySelector('#system').value") == "Be kind.", "a new one begins as the last one was set"
    page.choose("select", "base")
    page.fill("#prompt", "hi")
    page.press("Enter")
    page.wait("find('.answer .message')?.innerText.length > 40")
    page.reload()
    page.wait_for(".answer .meta")
    assert page.text(".meta").endswith("stopped")
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


def test_a_model_that_is_chosen_makes_no_conversation_before_anything_is_said(page: Page) -> None:
    page.choose("select", "base")
    page.choose("select", "talker")
    time.sleep(1.2)  # what is changed is kept after a second
    page.press("n", ALT)
    assert page.texts(".conversation") == []


def test_the_end_stays_in_sight_when_a_panel_opens_beside_it(page: Page) -> None:
    ask(page, "hi")
    edit(page, ".answer", {1: "many words " * 700}, "Save as a new version")
    at_the_end = "(({ scrollTop, scrollHeight, clientHeight }) => scrollHeight - scrollTop - clientHeight < 2)"
    page.js("find('.scroll').scrollTop = 1e6")
    page.wait(f"{at_the_end}(find('.scroll'))")
    page.click("#open-settings")
    page.size(900, 700)
    page.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.js(f"{at_the_end}(find('.scroll'))")


def test_a_browser_that_keeps_nothing_is_told_so_and_can_chat_all_the_same(page: Page) -> None:
    page.call("Emulation.setDocumentCookieDisabled", disabled=True)
    page.reload()
    begin(page)
    assert "keeps nothing" in page.text("#list-note")
    ask(page, "hi")
    assert answers(page) == ["Hello!"]


def test_a_full_storage_is_told_and_stops_nothing(page: Page) -> None:
    page.js("for (let size = 2 ** 23; size; size >>= 1) try { localStorage[size] = 'x'.repeat(size) } catch {}")
    ask(page, "hi")
    assert answers(page) == ["Hello!"]
    assert "The browser's storage is full" in page.text("#notice p")


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
    page.wait_for(".answer .text")
    assert answers(page) == ["Salut !"]
    page.press("m", ALT)
    assert page.js("document.activeElement.id") == "prompt"


def test_a_narrow_screen_needs_no_scrolling_sideways(page: Page) -> None:
    page.size(390, 800)
    ask(page, "hi")
    wide = f"{PLAN}\n{'x' * 300}\n\n```\n{'y' * 300}\n```\n|{'z|' * 80}\n|{'-|' * 80}\n"
    edit(page, ".answer", {1: wide}, "Save as a new version")
    overflow = (
        "document.scrollingElement.scrollWidth > 390 || find('.scroll').scrollWidth > find('.scroll').clientWidth"
    )
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
    assert "[none](javascript:hack)" in page.text(".text")


def test_whatever_a_model_says_is_text(page: Page) -> None:
    say = {"properties": {"say": {"const": ATTACK}}, "required": ["say"]}
    schema = {"type": "object", "additionalProperties": False, **say}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    change_requests(page, response_format=form)
    ask(page, "hi")  # the model itself, held to these words by a grammar
    assert json.loads(answers(page)[0]) == {"say": ATTACK}
    page.reload()
    page.wait_for(".answer")
    code = f"```{ATTACK.replace(' ', '')}\n{ATTACK}\n```"
    link = f'[{ATTACK}](https://example.com/"onmouseover="x)'
    edit(
        page,
        ".answer",
        {0: ATTACK, 1: f"{ATTACK}\n\n# {ATTACK}\n- **{ATTACK}**\n\n{link}\n\n{code}"},
        "Save as a new version",
    )
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
        page.wait("!find('.failure') && find('.answer .text')?.innerText === 'Hello!'")
        assert page.text(".answer .number") == "2/2", "an answer that never began leaves no version"
    page.click(".answer .actions button", "Regenerate")
    page.wait_for(".failure")
    assert "The server doesn't answer." in page.text(".failure")
    assert "Is ossia serve still running?" in page.text(".failure")
    page.close()
