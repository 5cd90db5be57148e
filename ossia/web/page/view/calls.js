// The cards of an answer's tool calls: arguments as the model wrote them, and results that the reader makes up.

import { button, el, growing, isComposing, setText } from "./dom.js";

/** `actions`: sendResults(node, results), lastResult(name), turn(node, step). */
export class CallCards {
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.cards = [];
    this.given = null; // the tool node whose results are shown, or null
    this.editing = false;
    this.foot = el("div", { class: "actions" });
    this.element = el("div", { class: "calls", hidden: true }, this.foot);
  }

  /** Shows the calls so far; `given` is the tool node after them, `place` its {place, count} among its versions. */
  update(given, place, streaming) {
    this.element.hidden = !this.node.calls.length;
    this.node.calls.forEach((call, index) => {
      this.cards[index] ??= this.newCard(call);
      const { body, kind } = prettyArguments(call.arguments, streaming);
      setText(this.cards[index].body, body);
      setText(this.cards[index].kind, kind);
    });
    if (given !== this.given) this.editing = false;
    this.given = given;
    this.place = place;
    this.streaming = streaming;
    this.drawResults();
  }

  newCard(call) {
    const id = `result-${this.node.id}-${call.id}`;
    const card = {
      call,
      kind: el("span", { class: "soft small" }),
      body: el("pre", { tabindex: "0", role: "region", "aria-label": `Arguments of ${call.name}` }),
      area: growing(
        el("textarea", { id, class: "code", rows: "1", placeholder: 'For example {"ok": true}', spellcheck: "false" }),
      ),
      shown: el("pre", { tabindex: "0", role: "region", "aria-label": `Result of ${call.name}` }),
      label: el("label", { for: id }, "Result (yours to make up)"),
      filled: false,
    };
    card.area.addEventListener("keydown", (event) => this.keyed(event));
    const head = el("header", {}, el("h4", {}, el("code", {}, call.name)), card.kind);
    card.element = el(
      "section",
      { class: "call", "aria-label": `Call of ${call.name}` },
      head,
      card.body,
      card.label,
      card.area,
      card.shown,
    );
    this.foot.before(card.element);
    return card;
  }

  keyed(event) {
    if (isComposing(event)) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.send();
    } else if (event.key === "Escape" && this.editing) {
      event.stopPropagation();
      this.edit(false);
    }
  }

  drawResults() {
    const open = !this.streaming && (!this.given || this.editing);
    for (const card of this.cards) {
      const result = this.given?.results.find(({ id }) => id === card.call.id);
      if (open && !card.filled) {
        card.filled = true;
        card.area.value = result?.text ?? this.actions.lastResult(card.call.name);
      }
      card.area.hidden = !open;
      card.label.hidden = this.streaming;
      setText(card.label, open ? "Result (yours to make up)" : "Result");
      card.shown.hidden = open || !result;
      setText(card.shown, result?.text || "(nothing)");
    }
    this.drawFoot(open);
  }

  drawFoot(open) {
    const many = this.cards.length > 1 ? "results" : "result";
    const key = `${open} ${this.editing} ${this.streaming} ${many} ${this.place?.place}/${this.place?.count}`;
    if (key === this.footKey) return;
    this.footKey = key;
    const parts = [];
    if (this.streaming) {
      parts.push();
    } else if (open) {
      parts.push(
        button(this.editing ? `Send as a new ${many}` : `Send ${many}`, () => this.send(), { class: "primary" }),
      );
      if (this.editing) parts.push(button("Cancel", () => this.edit(false)));
    } else {
      parts.push(button(`Edit ${many}`, () => this.edit(true), { "data-role": "edit" }));
      parts.push(...versionButtons(this.place, "result", (step) => this.actions.turn(this.given, step)));
    }
    this.foot.replaceChildren(...parts);
  }

  edit(editing) {
    this.editing = editing;
    for (const card of this.cards) card.filled = false;
    this.drawResults();
    if (editing) this.focus();
    else this.foot.querySelector("[data-role=edit]")?.focus();
  }

  send() {
    this.editing = false;
    this.actions.sendResults(
      this.node,
      this.cards.map(({ call, area }) => ({ id: call.id, name: call.name, text: area.value })),
    );
  }

  focus() {
    this.cards[0]?.area.focus();
  }
}

function prettyArguments(text, streaming) {
  if (streaming) return { body: text, kind: "being written" };
  try {
    return { body: JSON.stringify(JSON.parse(text || "{}"), null, 2), kind: "tool call" };
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return { body: text, kind: "tool call; its arguments are not JSON" };
  }
}

/** Buttons to the version before and after, with `1/2` between; nothing where there is but one. */
export function versionButtons(place, what, turn) {
  if (!place || place.count < 2) return [];
  const step = (label, by, sign, disabled) =>
    button(sign, () => turn(by), {
      "aria-label": `${label} ${what}`,
      title: `${label} ${what}`,
      "data-role": label,
      disabled,
    });
  return [
    el(
      "span",
      { class: "versions", role: "group", "aria-label": `Versions of this ${what}` },
      step("Previous", -1, "‹", place.place === 0),
      el("span", { class: "number" }, `${place.place + 1}/${place.count}`),
      step("Next", 1, "›", place.place === place.count - 1),
    ),
  ];
}
