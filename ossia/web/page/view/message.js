// One message of a thread: what was asked, or an answer with its thinking, its calls and its figures.

import { isCutOff, isEmpty } from "../chat/rows.js";
import { tokensPerSecond } from "../chat/runs.js";
import { showMarkdown } from "../markdown/draw.js";
import { CallCards, versionButtons } from "./calls.js";
import { button, copyText, el, growing, isComposing, setText } from "./dom.js";

const SHAPE = { user: "question", assistant: "answer" };

/** `actions` beside those of CallCards: regenerate(node), edited(node, fields), openSettings(), notice(text). */
export class MessageView {
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.isUser = node.role === "user";
    this.head = el("h3", {}, this.isUser ? "You" : node.model);
    this.body = el("div", { class: "message" });
    this.foot = el("div", { class: "actions" });
    this.element = el("article", { class: SHAPE[node.role], tabindex: "-1" }, this.head, this.body, this.foot);
    this.element.setAttribute("aria-label", this.isUser ? "You" : `Answer of ${node.model}`);
    if (this.isUser) this.buildQuestion();
    else this.buildAnswer();
  }

  buildQuestion() {
    this.body.append(el("p", { class: "said" }, this.node.text));
  }

  buildAnswer() {
    this.thought = el("p", { class: "thought" });
    this.summary = el("summary", {});
    this.thinking = el("details", { class: "thinking", hidden: true }, this.summary, this.thought);
    this.text = el("div", { class: "text" });
    this.waiting = el("p", { class: "waiting", hidden: true }, "Waiting for the first token");
    this.calls = new CallCards(this.node, this.actions);
    this.problem = el("div", { class: "failure", hidden: true });
    this.meta = el("p", { class: "meta" });
    this.body.append(this.thinking, this.text, this.waiting, this.calls.element, this.problem);
    this.element.append(this.meta);
  }

  /** Shows the node as it is now. `place`: {place, count}; `given`, `givenPlace`: the results after its calls. */
  update(place, given, givenPlace) {
    if (!this.isUser) this.updateAnswer(given, givenPlace);
    const key = `${place.place}/${place.count} ${this.node.state} ${Boolean(this.form)}`;
    if (key === this.footKey) return;
    this.footKey = key;
    this.drawFoot(place);
  }

  updateAnswer(given, givenPlace) {
    const { node } = this;
    const streaming = node.state === "streaming";
    this.element.setAttribute("aria-busy", String(streaming));
    this.thinking.hidden = !node.reasoning;
    setText(this.thought, node.reasoning);
    const busy = streaming && !node.content && !node.calls.length;
    this.thinking.classList.toggle("busy", busy);
    setText(this.summary, busy ? "Thinking…" : thinkingText(node));
    showMarkdown(this.text, node.content);
    this.text.classList.toggle("busy", streaming && Boolean(node.content) && !node.calls.length);
    this.waiting.hidden = !(streaming && isEmpty(node));
    this.calls.update(given, givenPlace, streaming);
    this.drawProblem();
    setText(this.meta, metaText(node));
  }

  drawProblem() {
    const { error } = this.node;
    this.problem.hidden = !error;
    if (!error || this.problem.childElementCount) return;
    this.problem.setAttribute("role", "alert");
    const again = button("Try again", () => this.actions.regenerate(this.node), { class: "primary" });
    const settings = button("Open settings", () =>
      this.actions.openSettings(error.status === 401 ? "key" : error.param),
    );
    const buttons = el("div", { class: "buttons" }, again, error.status === 401 || error.param ? settings : null);
    this.problem.append(el("p", {}, el("strong", {}, error.message)), el("p", {}, error.next), buttons);
  }

  drawFoot(place) {
    const { node, actions } = this;
    const streaming = node.state === "streaming";
    const copy = button("Copy", async () => {
      const done = await copyText(this.isUser ? node.text : node.content);
      actions.notice(
        done ? "Copied." : "The browser doesn't let this page copy. Select the text and copy it yourself.",
      );
    });
    const parts = [];
    if (!streaming && !this.form) {
      if (this.isUser || node.content) parts.push(copy);
      if (this.isUser || !isEmpty(node)) parts.push(button("Edit", () => this.edit(), { "data-role": "edit" }));
      // a failure has a button of its own
      if (!this.isUser && !node.error) parts.push(button("Regenerate", () => actions.regenerate(node)));
    }
    parts.push(...versionButtons(place, this.isUser ? "message" : "answer", (step) => actions.turn(node, step)));
    this.foot.replaceChildren(...parts);
  }

  /** Opens the fields of this message. */
  edit() {
    const { node } = this;
    const fields = this.isUser
      ? [this.field("Message", node.text)]
      : [
          this.field("Thinking", node.reasoning),
          this.field("Answer", node.content),
          ...node.calls.map((call) => this.field(`Arguments of ${call.name}`, call.arguments, "code")),
        ];
    const submit = el("button", { type: "submit", class: "primary" }, this.isUser ? "Send" : "Save as a new version");
    const cancel = button("Cancel", () => this.closeForm());
    this.form = el(
      "form",
      { class: "edit" },
      fields.map(({ element }) => element),
      el("div", { class: "buttons" }, submit, cancel),
    );
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit(fields.map(({ area }) => area.value));
    });
    this.form.addEventListener("keydown", (event) => this.keyed(event));
    this.body.hidden = true;
    this.body.after(this.form);
    this.actions.redraw();
    fields[this.isUser ? 0 : 1].area.focus();
  }

  field(label, value, kind = "") {
    const area = growing(el("textarea", { rows: "2", class: kind }));
    area.value = value;
    return { area, element: el("label", {}, label, area) };
  }

  keyed(event) {
    if (isComposing(event)) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.form.requestSubmit();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      this.closeForm();
    }
  }

  submit(values) {
    if (this.isUser) {
      if (!values[0].trim()) return;
      this.closeForm();
      this.actions.edited(this.node, { text: values[0] });
      return;
    }
    const [reasoning, content, ...written] = values;
    const calls = this.node.calls.map((call, index) => ({ ...call, arguments: written[index] }));
    this.closeForm();
    this.actions.edited(this.node, { reasoning, content, calls });
  }

  closeForm() {
    this.form.remove();
    this.form = null;
    this.body.hidden = false;
    this.actions.redraw();
    this.foot.querySelector("[data-role=edit]")?.focus();
  }
}

function thinkingText(node) {
  const parts = [];
  if (node.thinkingSeconds >= 0.1) parts.push(`${node.thinkingSeconds.toFixed(1)} s`);
  if (node.usage?.reasoning) parts.push(`${node.usage.reasoning.toLocaleString("en")} tokens`);
  return parts.length ? `Thinking (${parts.join(", ")})` : "Thinking";
}

function metaText(node) {
  const parts = [];
  if (node.edited) parts.push("edited");
  if (node.version) parts.push(node.version);
  if (node.usage) {
    const speed = tokensPerSecond(node);
    parts.push(`${node.usage.completion.toLocaleString("en")} tokens`);
    if (speed !== null) parts.push(`${speed.toFixed(1)} tokens/s`);
    if (node.firstSeconds !== null) parts.push(`first after ${node.firstSeconds.toFixed(2)} s`);
  } else if (node.pieces) {
    // a piece of the stream holds one token or more; how many, the server says at the end
    const least = node.pieces.toLocaleString("en");
    parts.push(`at least ${least} ${node.pieces === 1 ? "token" : "tokens"}`, `${node.seconds.toFixed(1)} s`);
  }
  if (node.state === "stopped") parts.push("stopped");
  else if (node.state === "done" && isCutOff(node)) parts.push("cut off at the most tokens");
  else if (node.state === "done" && isEmpty(node))
    parts.push("an empty answer, left out when the conversation goes on");
  return parts.join(" · ");
}
