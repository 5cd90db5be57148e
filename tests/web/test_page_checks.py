"""The chat page under axe, and its files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile

import httpx2
import pytest

from ossia.web.app import PAGE
from tests.web.browser import ALT, CHROMIUM, Page
from tests.web.conftest import WEATHER_TOOL, Live
from tests.web.page_steps import OFFLINE, PLAN, ask, edit, set_up

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to open the page"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
AXE = "4.14.1"


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
    page.call("Network.emulateNetworkConditions", **OFFLINE)
    page.click("#tabs button", "base")
    page.click(".asking button")
    page.wait_for(".failure")
    look("an error")
    assert found == {}
    page.call("Network.emulateNetworkConditions", **{**OFFLINE, "offline": False})
    page.problems()  # that the server could not be reached stands in the console too


def test_the_pages_files_are_small_and_take_no_shortcut_to_markup(live: Live) -> None:
    files = sorted(file for file in PAGE.rglob("*") if file.is_file())
    assert {file.suffix for file in files} == {".html", ".js", ".css", ".svg"}
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, file
        assert max(map(len, text.splitlines())) <= 120, file
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), file
        if file.suffix in (".js", ".css"):
            assert not re.search(r"""["'(]https?://""", text), f"{file}: nothing comes from elsewhere"
        found = httpx2.get(f"{live.url}/page/{file.relative_to(PAGE)}")
        assert (found.status_code, found.headers["cache-control"]) == (200, "no-cache")
    assert "default-src 'none'" in httpx2.get(live.url).text
