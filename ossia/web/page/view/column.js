// A column: a model, its thread, and what can be done there. Its data are a conversation's {model, tree}.

import { isEmpty } from "../chat/rows.js";
import { add, lastShown, removeLeaf, shownPath, turnTo, version } from "../chat/tree.js";
import { button, el, setText } from "./dom.js";
import { MessageView } from "./message.js";
import { factsOf, hasStep, modelOptions } from "./models.js";

/** `app` is main.js's: what is served, what is set, and who generates. */
export class Column {
  constructor(data, place, app) {
    this.data = data;
    this.app = app;
    this.views = new Map();
    const id = `model-${place}`;
    this.select = el("select", { id, on: { change: () => this.choose() } });
    this.used = el("span", { class: "used soft small" });
    this.exporting = button("Export", () => app.exportRow(this), { "aria-haspopup": "dialog" });
    this.closing = button("Close", () => app.close(this), { "aria-label": "Close this column", hidden: true });
    const label = el("label", { for: id, class: "hidden" }, "Model or adapter");
    this.head = el("div", { class: "column-head" }, label, this.select, this.used, this.exporting, this.closing);
    this.empty = el("div", { class: "empty" });
    this.asking = el(
      "div",
      { class: "asking", hidden: true },
      button("", () => this.answer(), { class: "primary" }),
    );
    this.thread = el("div", { class: "thread" }, this.empty, this.asking);
    this.scroll = el("div", { class: "scroll", tabindex: "0", role: "region" }, this.thread);
    this.element = el("section", { class: "column" }, this.head, this.scroll);
    this.scroll.addEventListener("scroll", () => {
      this.following = this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight < 48;
    });
    this.following = true;
    new ResizeObserver(() => this.follow()).observe(this.scroll);
    this.drawModels();
  }

  /** Stays at the end, for as long as the reader is there. */
  follow() {
    if (this.following) this.scroll.scrollTop = this.scroll.scrollHeight;
  }

  get tree() {
    return this.data.tree;
  }

  get streaming() {
    return shownPath(this.tree).find((node) => node.state === "streaming") ?? null;
  }

  /** The answer whose calls wait for results, or null. */
  get waitingCall() {
    const last = lastShown(this.tree);
    return last?.role === "assistant" && last.state !== "streaming" && last.calls.length ? last : null;
  }

  choose() {
    this.data.model = this.select.value;
    this.app.saveSoon();
    this.app.drawTabs();
    this.drawModels();
    this.draw();
  }

  /** Lists what is served. */
  drawModels() {
    const key = JSON.stringify([this.app.models, this.data.model]);
    if (this.select.dataset.key === key) return; // a list that is open now would close
    this.select.dataset.key = key;
    this.select.replaceChildren(...modelOptions(this.app.models, this.data.model));
    this.select.value = this.data.model;
    this.element.setAttribute("aria-label", `Conversation with ${this.data.model}`);
    this.scroll.setAttribute("aria-label", `Messages, ${this.data.model}`);
  }

  /** Draws all that is shown; messages that are drawn already stay. */
  draw() {
    const path = shownPath(this.tree);
    const shown = path.filter((node) => node.role !== "tool");
    for (const [id, view] of this.views) {
      if (!shown.some((node) => node.id === id)) {
        view.element.remove();
        this.views.delete(id);
      }
    }
    for (const node of shown) this.drawNode(node, path);
    this.drawEmpty(shown.length === 0);
    this.drawAsking(path.at(-1));
    this.drawUsed(path);
    this.follow();
  }

  drawNode(node, path) {
    let view = this.views.get(node.id);
    if (!view) {
      view = new MessageView(node, this.actions);
      this.views.set(node.id, view);
      this.asking.before(view.element);
    }
    const after = path[path.indexOf(node) + 1];
    const given = after?.role === "tool" ? after : null;
    view.update(version(this.tree, node), given, given && version(this.tree, given));
  }

  drawEmpty(empty) {
    this.empty.hidden = !empty;
    if (!empty) return;
    const model = this.app.models.find(({ id }) => id === this.data.model);
    const { about } = this.app;
    const name = el("p", { class: "big" }, this.data.model || "No model yet");
    if (!model) return this.empty.replaceChildren(name);
    const facts = el("p", { class: "soft" }, factsOf(model, about));
    const words = model.problem && (hasStep(model) ? "Its newest checkpoint can't be used: " : "") + model.problem;
    this.empty.replaceChildren(name, facts, ...(words ? [el("p", { class: "soft small" }, words)] : []));
  }

  drawAsking(last) {
    const unanswered = last && (last.role === "user" || last.role === "tool");
    this.asking.hidden = !unanswered;
    setText(this.asking.firstChild, `Let ${this.data.model} answer`);
  }

  drawUsed(path) {
    const usage = path.findLast((node) => node.usage)?.usage;
    const length = this.app.models.find(({ id }) => id === this.data.model)?.length;
    const total = usage && (usage.prompt + usage.completion).toLocaleString("en");
    setText(this.used, usage && length ? `${total} of ${length.toLocaleString("en")} tokens` : "");
  }

  /** What the messages can ask for. */
  get actions() {
    return {
      redraw: () => this.draw(),
      notice: (text) => this.app.notice(text),
      openSettings: (field) => this.app.openSettings(field),
      lastResult: (name) => this.lastResult(name),
      regenerate: (node) => this.regenerate(node),
      edited: (node, fields) => this.edited(node, fields),
      sendResults: (node, results) => this.sendResults(node, results),
      turn: (node, step) => this.turn(node, step),
    };
  }

  /** A message of the reader's, and the answer to it. */
  send(text) {
    if (!this.app.ready(this)) return;
    const last = lastShown(this.tree);
    this.following = true;
    const node = add(this.tree, last?.id ?? null, { role: "user", text });
    this.app.generate(this, node.id);
  }

  answer() {
    if (!this.app.ready(this)) return;
    this.following = true;
    this.app.generate(this, lastShown(this.tree).id);
  }

  regenerate(node) {
    if (!this.app.ready(this)) return;
    // an answer that never began leaves no version behind
    if (node.state === "failed" && isEmpty(node)) removeLeaf(this.tree, node);
    this.following = true;
    this.app.generate(this, node.parent);
  }

  edited(node, fields) {
    if (node.role === "user" && !this.app.ready(this)) return;
    const base = node.role === "user" ? { role: "user" } : { ...blank(node), edited: true };
    const added = add(this.tree, node.parent, { ...base, ...fields });
    if (node.role === "user") {
      this.app.generate(this, added.id);
    } else {
      this.app.save();
      this.draw();
      this.focusIn(added, "edit");
    }
  }

  sendResults(node, results) {
    if (!this.app.ready(this)) return;
    const given = add(this.tree, node.id, { role: "tool", results });
    this.following = true;
    this.app.generate(this, given.id);
  }

  turn(node, step) {
    const other = turnTo(this.tree, node, step);
    this.app.save();
    this.following = false;
    this.draw();
    const holder = other.role === "tool" ? this.tree.nodes[other.parent] : other;
    this.focusIn(holder, step < 0 ? "Previous" : "Next");
    const { place, count } = version(this.tree, other);
    this.app.say(`Version ${place + 1} of ${count}`);
  }

  /** The same button in the message that took another's place, so that the keyboard stays where it was. */
  focusIn(node, role) {
    const { element } = this.views.get(node.id);
    const wanted = [`[data-role=${role}]`, ".versions button", "[data-role=edit]"]
      .map((selector) => element.querySelector(`${selector}:enabled`))
      .find(Boolean);
    (wanted ?? element).focus();
  }

  lastResult(name) {
    const given = Object.values(this.tree.nodes).flatMap((node) => node.results ?? []);
    return given.findLast((result) => result.name === name)?.text ?? "";
  }

  focusCall() {
    this.views.get(this.waitingCall.id).calls.focus();
  }
}

function blank({ role, model, calls }) {
  const figures = { usage: null, pieces: 0, firstSeconds: null, thinkingSeconds: null, seconds: 0 };
  return { role, model, calls, state: "done", finish: calls.length ? "tool_calls" : "stop", error: null, ...figures };
}
