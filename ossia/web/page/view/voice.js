// What is said beside the thread: a notice that all see, and a log that screen readers read out, politely.

import { el } from "./dom.js";

const KEPT = 30; // lines of the log

export class Voice {
  constructor(live, notice) {
    this.live = live;
    this.box = notice;
    this.text = notice.querySelector("p");
    this.action = notice.querySelector("[data-action]");
    this.spoken = new WeakMap();
    notice.querySelector("[data-dismiss]").addEventListener("click", () => this.quiet());
    this.action.addEventListener("click", () => {
      const { act } = this;
      this.quiet();
      act();
    });
  }

  say(text) {
    this.live.append(el("p", {}, text));
    while (this.live.childElementCount > KEPT) this.live.firstElementChild.remove();
  }

  /** Shows a notice, until it is dismissed or, without a button of its own, some seconds are over. */
  notice(text, { label = "", act = null, stays = false } = {}) {
    clearTimeout(this.timer);
    this.timer = null;
    this.act = act;
    this.action.hidden = !act;
    this.action.textContent = label;
    this.box.hidden = false;
    this.text.textContent = text;
    this.say(text);
    if (!stays) this.timer = setTimeout(() => this.quiet(), act ? 20_000 : 6_000);
  }

  /** What was said before is over, unless it had to stay. */
  passed() {
    if (this.timer) this.quiet();
  }

  quiet() {
    clearTimeout(this.timer);
    this.timer = null;
    if (this.box.contains(document.activeElement)) document.querySelector("#prompt").focus();
    this.box.hidden = true;
    this.text.textContent = "";
  }

  /** Reads out more of an answer, sentence by sentence; with several columns only that it has come. */
  follow(node, isAlone) {
    const said = this.spoken.get(node) ?? { state: "", length: 0 };
    const { content, state, calls } = node;
    const stage =
      state !== "streaming" ? state : content || calls.length ? "answering" : node.reasoning ? "thinking" : "";
    if (isAlone) {
      const rest = content.slice(said.length);
      const end = state === "streaming" ? lastSentence(rest) : rest.length;
      if (end && rest.slice(0, end).trim()) this.say(rest.slice(0, end).trim());
      said.length += end;
    }
    if (stage && stage !== said.state) {
      said.state = stage;
      const text = stageText(node, stage);
      if (text) this.say(text);
    }
    this.spoken.set(node, said);
  }
}

function lastSentence(text) {
  return /^[\s\S]*(?:[.!?:;](?=\s)|\n)/.exec(text)?.[0].length ?? 0;
}

function stageText(node, stage) {
  const { model: who, calls } = node;
  if (stage === "thinking") return `${who} is thinking.`;
  if (stage === "answering") return `${who} answers.`;
  if (stage === "stopped") return `${who} was stopped.`;
  if (stage === "failed") return ""; // an alert in the thread
  if (calls.length) return `${who} calls ${calls.map((call) => call.name).join(", ")}. Give the result.`;
  return `${who} is done.`;
}
