// The page: one conversation is open, with one column or two; all else hangs on this.

import { ApiFailure, listModels } from "./chat/api.js";
import { requestBody, trainingRow } from "./chat/rows.js";
import { newAnswer, Runs } from "./chat/runs.js";
import { DEFAULTS, readSettings } from "./chat/settings.js";
import { newId, Store } from "./chat/store.js";
import { add, newTree, pathTo, shownPath, treeOf } from "./chat/tree.js";
import { Column } from "./view/column.js";
import { button, growing, isComposing } from "./view/dom.js";
import { ExportWindow } from "./view/export.js";
import { ConversationList } from "./view/list.js";
import { isFollowed } from "./view/models.js";
import { Panel } from "./view/panel.js";
import { SettingsForm } from "./view/settings.js";
import { Voice } from "./view/voice.js";

const at = (selector) => document.querySelector(selector);
const SAVE_EVERY_MS = 1000; // while an answer streams
const LOOK_EVERY_MS = 5000; // for newer checkpoints of runs

class App {
  constructor() {
    this.voice = new Voice(at("#live"), at("#notice"));
    this.store = new Store((message) => this.voice.notice(message, { stays: true }));
    this.runs = new Runs();
    this.models = [];
    this.about = null;
    this.columns = [];
    this.listPanel = new Panel(at("#list"), at("#open-list"), (listOpen) => this.store.prefer({ listOpen }));
    this.settingsPanel = new Panel(at("#settings"), at("#open-settings"), (settings) =>
      this.store.prefer({ settings }),
    );
    this.form = new SettingsForm(at("#settings-form"), this);
    this.list = new ConversationList(at("#conversations"), at("#list-note"), this);
    this.exporting = new ExportWindow(at("#export"));
    this.prompt = growing(at("#prompt"));
    at("#composer").addEventListener("submit", (event) => this.submit(event));
    at("#stop").addEventListener("click", () => this.stop());
    at("#new").addEventListener("click", () => this.startNew());
    at("#compare").addEventListener("click", () => this.compare());
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) this.submit(event);
    });
    document.addEventListener("keydown", (event) => this.keyed(event));
    // before the browser cuts the streams off, which would look as if the server had
    window.addEventListener("beforeunload", () => this.runs.stopAll());
    window.addEventListener("pagehide", () => this.saveNow());
    window.addEventListener("focus", () => this.readModels());
    setInterval(() => {
      if (this.models.some(isFollowed) && !this.failing && !document.hidden) this.readModels();
    }, LOOK_EVERY_MS);
  }

  async start() {
    this.setTheme(this.theme);
    const wanted = this.store.load(this.store.preferences.current ?? "");
    this.show(wanted ?? this.newConversation());
    const { listOpen = true, settingsOpen = false } = this.store.preferences;
    if (listOpen) this.listPanel.openIfRoomy();
    if (settingsOpen) this.settingsPanel.openIfRoomy();
    this.prompt.focus();
    await this.readModels();
  }

  // --- what the server has

  async readModels() {
    try {
      ({ models: this.models, about: this.about } = await listModels(this.key));
    } catch (error) {
      if (!(error instanceof ApiFailure)) throw error;
      const locked = error.status === 401;
      const act = locked ? () => this.openSettings("key") : () => this.readModels();
      this.failing = true;
      this.voice.notice(`${error.message} ${error.next}`, {
        label: locked ? "Type the key" : "Try again",
        act,
        stays: true,
      });
      return;
    }
    if (this.failing) this.voice.quiet();
    this.failing = false;
    for (const column of this.columns) {
      column.data.model ||= this.models[0].id;
      column.drawModels();
      column.draw();
    }
    this.drawTabs();
  }

  get key() {
    return this.store.key;
  }

  setKey(key) {
    this.store.key = key;
    clearTimeout(this.keyTimer);
    this.keyTimer = setTimeout(() => this.readModels(), 400);
  }

  // --- which conversation is open

  newConversation() {
    const { settings = {}, model = "" } = this.store.preferences;
    const served = this.models.some(({ id }) => id === model) || !this.models.length ? model : this.models[0].id;
    return {
      id: newId(),
      title: "",
      updated: Date.now(),
      settings: { ...DEFAULTS, ...this.conversation?.settings, ...settings },
      columns: [{ model: this.columns[0]?.data.model || served, tree: newTree() }],
    };
  }

  startNew() {
    this.show(this.newConversation());
    this.prompt.focus();
  }

  show(conversation) {
    this.conversation = conversation;
    this.layOut();
    this.form.fill();
    this.store.prefer({ current: conversation.id });
    this.list.draw();
    document.title = conversation.title ? `${conversation.title} – Ossia` : "Ossia";
  }

  layOut() {
    this.columns = this.conversation.columns.map((data, place) => new Column(data, place, this));
    at("#columns").replaceChildren(...this.columns.map((column) => column.element));
    const many = this.columns.length > 1;
    document.body.classList.toggle("comparing", many);
    at("#compare").hidden = many;
    for (const column of this.columns) {
      column.closing.hidden = !many;
      column.draw();
    }
    this.showColumn(0);
    this.drawRunning();
  }

  /** From the list: opens a conversation. */
  choose(id) {
    this.show(this.store.load(id));
    if (!this.listPanel.isRoomy) this.listPanel.close();
    this.prompt.focus();
  }

  isRunning(conversation) {
    return conversation.columns.some(({ tree }) => Object.values(tree.nodes).some((node) => this.runs.has(node)));
  }

  // --- settings

  get settings() {
    return this.conversation.settings;
  }

  get theme() {
    return this.store.preferences.theme ?? "auto";
  }

  setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    this.store.prefer({ theme });
  }

  changed() {
    this.store.prefer({ settings: this.settings });
    if (this.columns.some(({ tree }) => tree.root.children.length)) this.saveSoon();
  }

  openSettings(field) {
    if (!this.settingsPanel.dialog.open) this.settingsPanel.open();
    this.form.showProblems(Object.keys(DEFAULTS));
    this.form.focus(field === "max_completion_tokens" ? "max_tokens" : field);
  }

  // --- asking

  /** Whether a column can be asked; if not, the reader is told why. */
  ready(column) {
    const [problem] = Object.entries(readSettings(this.settings).problems);
    if (problem) {
      this.voice.notice(`The settings can't be used yet. ${problem[1]}`);
      this.openSettings(problem[0]);
      return false;
    }
    if (this.models.some(({ id }) => id === column.data.model)) return true;
    const name = column.data.model ? `${column.data.model} is not served here` : "No model is known yet";
    this.voice.notice(`${name}. Choose another model at the top.`);
    column.select.focus();
    this.readModels();
    return false;
  }

  submit(event) {
    event.preventDefault();
    const text = this.prompt.value.trimEnd();
    if (!text.trim() || this.columns.some((column) => column.streaming)) return;
    const waiting = this.columns.find((column) => column.waitingCall);
    if (waiting) {
      this.showColumn(this.columns.indexOf(waiting));
      this.voice.notice(`Give the result of ${waiting.waitingCall.calls[0].name} first.`);
      waiting.focusCall();
      return;
    }
    if (!this.columns.every((column) => this.ready(column))) return;
    this.prompt.value = "";
    this.prompt.dispatchEvent(new Event("input"));
    for (const column of this.columns) column.send(text);
    this.prompt.focus();
  }

  /** Answers after the node `parent`, in a column. */
  generate(column, parent) {
    const { conversation, runs } = this;
    const { tree, model } = column.data;
    this.stopIn(tree);
    this.voice.passed();
    const { values } = readSettings(this.settings);
    const body = requestBody(model, this.settings, values, pathTo(tree, tree.nodes[parent]));
    const node = add(tree, parent, newAnswer(model));
    this.touch(conversation);
    this.store.prefer({ model });
    const isAlone = conversation.columns.length === 1;
    runs.run(node, body, this.key, () => {
      if (node.version && node.state !== "streaming") this.readModels(); // it may be newer than the list says
      if (node.state !== "streaming" || this.conversation !== conversation) this.store.save(conversation);
      else this.saveSoon();
      this.voice.follow(node, isAlone);
      this.drawSoon();
    });
    column.draw();
    this.drawRunning();
    this.list.draw();
    if (!document.activeElement || document.activeElement === document.body) this.prompt.focus();
  }

  touch(conversation) {
    const first = shownPath(conversation.columns[0].tree).find((node) => node.role === "user");
    conversation.title = (first?.text ?? "").trim().split("\n")[0].slice(0, 80);
    conversation.updated = Date.now();
    document.title = conversation.title ? `${conversation.title} – Ossia` : "Ossia";
    this.store.save(conversation);
  }

  stop() {
    for (const column of this.columns) this.stopIn(column.tree);
    this.prompt.focus();
  }

  stopIn(tree) {
    for (const node of Object.values(tree.nodes)) this.runs.stop(node);
  }

  drawSoon() {
    if (this.drawing) return;
    this.drawing = true;
    const draw = () => {
      this.drawing = false;
      for (const column of this.columns) column.draw();
      this.drawRunning();
      this.drawTabs();
    };
    // a hidden tab has no frames
    if (document.hidden) setTimeout(draw, 250);
    else requestAnimationFrame(draw);
  }

  drawRunning() {
    const running = this.columns.some((column) => column.streaming);
    const hadFocus = [at("#send"), at("#stop")].includes(document.activeElement);
    at("#send").hidden = running;
    at("#stop").hidden = !running;
    if (hadFocus) this.prompt.focus();
  }

  save() {
    this.touch(this.conversation);
    this.list.draw();
  }

  saveSoon() {
    this.saving ??= setTimeout(() => this.saveNow(), SAVE_EVERY_MS);
  }

  saveNow() {
    clearTimeout(this.saving);
    this.saving = null;
    if (this.columns.some(({ tree }) => tree.root.children.length)) this.store.save(this.conversation);
  }

  // --- side by side

  /** A second column with the same questions, for another model. */
  compare() {
    const [first] = this.columns;
    const path = shownPath(first.tree);
    const last = path.findLastIndex((node) => node.role === "user");
    const other = this.models.find(({ id }) => id !== first.data.model) ?? this.models[0];
    const data = { model: other?.id ?? first.data.model, tree: treeOf(path.slice(0, last + 1)) };
    this.conversation.columns.push(data);
    this.layOut();
    this.saveNow();
    this.columns[1].select.focus();
    this.voice.say("Two columns. Both get what you send.");
  }

  /** Closes a column; what was said there becomes a conversation of its own. */
  close(column) {
    const { conversation } = this;
    const { data } = column;
    conversation.columns.splice(this.columns.indexOf(column), 1);
    if (shownPath(data.tree).some((node) => node.role === "assistant")) {
      const { settings, title } = conversation;
      const other = { id: newId(), title, updated: Date.now(), settings: { ...settings }, columns: [data] };
      this.store.save(other);
      this.voice.notice("The closed column is now a conversation of its own.", {
        label: "Open it",
        act: () => this.show(other),
      });
    }
    this.layOut();
    this.saveNow();
    this.list.draw();
    at("#compare").focus();
  }

  /** Where there is room for one column alone: which one. */
  showColumn(place) {
    this.shownColumn = place;
    at("#columns").dataset.shown = String(place);
    this.drawTabs();
  }

  drawTabs() {
    const tabs = at("#tabs");
    tabs.hidden = this.columns.length < 2;
    const texts = this.columns.map((column) => `${column.data.model}${column.streaming ? " …" : ""}`);
    const key = `${this.shownColumn} ${texts.join("\n")}`;
    if (tabs.dataset.key === key) return;
    tabs.dataset.key = key;
    const focused = [...tabs.children].indexOf(document.activeElement);
    tabs.replaceChildren(
      ...texts.map((text, place) =>
        button(text, () => this.showColumn(place), { "aria-pressed": String(place === this.shownColumn) }),
      ),
    );
    tabs.children[focused]?.focus();
  }

  // --- the rest

  exportRow(column) {
    const { values, problems } = readSettings(this.settings);
    if (problems.tools) {
      this.ready(column);
      return;
    }
    const found = trainingRow(this.settings, values, shownPath(column.tree));
    if (!found) {
      this.voice.notice("There is no answer to train on yet.");
      return;
    }
    const name = (this.conversation.title || "conversation")
      .toLowerCase()
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .slice(0, 40);
    this.exporting.show(found, name.replace(/^-|-$/g, "") || "conversation", column.exporting);
  }

  notice(text) {
    this.voice.notice(text);
  }

  say(text) {
    this.voice.say(text);
  }

  keyed(event) {
    if (event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog:modal")) {
      if (this.columns.some((column) => column.streaming)) this.stop();
    } else if (event.altKey && !event.ctrlKey && !event.metaKey && event.code === "KeyN") {
      event.preventDefault();
      this.startNew();
    } else if (event.altKey && !event.ctrlKey && !event.metaKey && event.code === "KeyM") {
      event.preventDefault();
      this.prompt.focus();
    }
  }
}

new App().start();
