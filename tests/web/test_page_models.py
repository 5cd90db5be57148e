"""The chat page with several models and an adapter that follows a run, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from ossia.web.app import Server
from ossia.web.hosting import Limits, open_hosted, read_wanted
from ossia.web.metrics import Metrics
from tests.conftest import MakeTiny
from tests.e2e.conftest import ARCH
from tests.web.browser import CHROMIUM, Browser, Page
from tests.web.conftest import Live, Talker, running, wait_until
from tests.web.page_steps import ask, change_requests, set_up
from tests.web.test_follow import Run, flip_a_bit

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to open the page"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def run(talker: Talker, tmp_path: Path) -> Run:
    run = Run(tmp_path / "run", talker)
    run.save(10, strength=0.0)
    return run


@pytest.fixture
def served(run: Run, talker: Talker, tiny: MakeTiny) -> Iterator[Live]:
    """Two models; the first one's adapter `live` follows the run."""
    metrics = Metrics()
    wanted = read_wanted([f"one={talker.model}", f"two={tiny(ARCH, seed=7)}"], [f"live={run.folder}"])
    limits = Limits(max_batch=4, max_queue=8)
    hosted = open_hosted(wanted, metrics, limits, dtype="float32", weights="auto", device="cpu")
    with running(Server(tuple(hosted), metrics)) as live:
        yield live


@pytest.fixture
def page(browser: Browser, served: Live) -> Iterator[Page]:
    page = browser.new_page(served.url)
    page.wait("document.querySelector('select').length > 1")
    set_up(page, temperature="0", max_tokens="150")
    yield page
    assert page.problems() == []
    page.close()


def options(page: Page, column: int = 1) -> list[str]:
    found: list[str] = page.js(
        f"[...document.querySelector('.column:nth-child({column}) select').options].map((one) => one.textContent)"
    )
    return found


def test_both_columns_can_have_any_model_of_the_server(page: Page, served: Live) -> None:
    assert options(page) == ["one", "live · step 10", "two"]
    assert page.js("[...document.querySelectorAll('optgroup')].map((one) => one.label)") == ["one", "two"]
    page.click("#compare")
    assert options(page, 2) == options(page)
    page.choose(".column:nth-child(1) select", "two")
    page.choose(".column:nth-child(2) select", "one")
    change_requests(page)
    ask(page, "hi")
    page.click("#open-settings")
    page.wait("find('#settings').open")
    names = page.js("[...document.querySelectorAll('select')].map((one) => one.clientWidth)")
    assert min(names) > 50, "what is compared stays in sight beside the panels"
    assert [body["model"] for body in page.js("sent")] == ["two", "one"]
    page.choose(".column:nth-child(1) select", "live")
    page.choose(".column:nth-child(2) select", "two")
    ask(page, "hi")
    assert [body["model"] for body in page.js("sent")][2:] == ["live", "two"]
    assert len(page.texts(".answer .meta")) == 4
    assert not page.shown(".failure")
    text = httpx2.get(f"{served.url}/metrics").text
    sampled = {name: int(num) for name, num in re.findall(r'completion_tokens_total{model="(\w+)"} (\d+)', text)}
    assert min(sampled["one"], sampled["two"]) > 100, "each in an engine of its own"


def test_an_adapter_becomes_its_runs_newest_checkpoint_and_each_answer_says_which_it_is_of(
    page: Page, run: Run, served: Live
) -> None:
    page.js("document.querySelector('select').focus()")
    page.choose("select", "live")
    assert "adapter of one · step 10, newer ones as they come" in page.text(".empty")
    ask(page, "hi")
    run.save(80)
    page.wait("document.querySelector('select').selectedOptions[0].textContent === 'live · step 80'")
    page.click(".answer .actions button", "Regenerate")
    page.wait("find('.answer .text')?.innerText === 'Hello!'")
    page.wait("find('.meta').innerText.startsWith('step 80 · ')")
    page.click(".answer .actions button", "Previous answer")
    assert page.text(".meta").startswith("step 10 · ")
    run.save(90, spoil=flip_a_bit)
    page.click("#new")
    wait_until(lambda: served.server.followed[0][0].problem is not None)
    page.js("window.dispatchEvent(new Event('focus'))")  # whoever comes back to the tab need not wait
    page.wait("find('.empty').innerText.includes('Its newest checkpoint can’t be used'.replace('’', \"'\"))")
    assert "step 80" in page.text(".empty")


def test_a_run_without_a_checkpoint_is_named_as_such_until_its_first_one_comes(
    browser: Browser, talker: Talker, tmp_path: Path
) -> None:
    run, metrics = Run(tmp_path / "run", talker), Metrics()
    wanted, limits = read_wanted([f"live={run.folder}"], []), Limits(max_batch=4, max_queue=8)
    hosted = open_hosted(wanted, metrics, limits, dtype="float32", weights="auto", device="cpu")
    with running(Server(tuple(hosted), metrics)) as served:
        page = browser.new_page(served.url)
        page.wait("document.querySelector('select').length > 1")
        page.choose("select", "live")
        assert "its run's checkpoints as they come" in page.text(".empty")
        assert "the run has saved no checkpoint yet" in page.text(".empty")
        assert "can't be used" not in page.text(".empty")
        run.save(10)
        page.wait("document.querySelector('select').selectedOptions[0].textContent === 'live · step 10'")
        page.wait("!find('.empty').innerText.includes('no checkpoint')")
        assert page.problems() == []
        page.close()
