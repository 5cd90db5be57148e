"""What tests do on the chat page."""

from __future__ import annotations

import json
from typing import Any

from tests.web.browser import Page

ATTACK = "<img src=x onerror='globalThis.hacked=1'><script>globalThis.hacked=1</script>"
PLAN = """A **bold** _plan_ with `code <b>`, [a link](https://example.com/a) and [none](javascript:hack).

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
OFFLINE = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
IDLE = "[...document.querySelectorAll('.answer')].every((one) => one.getAttribute('aria-busy') === 'false')"


def begin(page: Page) -> None:
    """Choose the model that talks, and leave nothing to chance."""
    page.wait("document.querySelector('select').length > 1")
    page.choose("select", "talker")
    set_up(page, temperature="0")


def set_up(page: Page, **fields: str) -> None:
    """Type into the settings, wherever their panel is."""
    for name, text in fields.items():
        page.js(
            f"""(() => {{
              const field = document.querySelector("#settings-form").elements[{json.dumps(name)}];
              field.value = {json.dumps(text)};
              const one = field instanceof RadioNodeList ? [...field].find((radio) => radio.checked) : field;
              one.dispatchEvent(new Event("input", {{ bubbles: true }}));
            }})()"""
        )


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


def change_requests(page: Page, to: str = "", **more: Any) -> None:
    """What the page sends (to the model `to`) has these fields too; what it sent itself is kept in `sent`."""
    page.js(
        f"""(() => {{
          globalThis.sent = [];
          const real = window.fetch;
          window.fetch = (address, options) => {{
            if (!options.body) return real(address, options);
            const body = JSON.parse(options.body);
            sent.push(body);
            const more = [body.model, ""].includes({json.dumps(to)}) ? {json.dumps(more)} : {{}};
            return real(address, {{ ...options, body: JSON.stringify({{ ...body, ...more }}) }});
          }};
        }})()"""
    )
