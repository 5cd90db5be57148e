// The list of conversations: open one, delete one, and what other tabs do to them.

import { button, el } from "./dom.js";

const DAY = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric" });
const TIME = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });

export class ConversationList {
  /** `app` is main.js's. */
  constructor(place, note, app) {
    this.place = place;
    this.note = note;
    this.app = app;
    window.addEventListener("storage", (event) => this.otherTab(event.key));
  }

  draw() {
    const { store } = this.app;
    const listed = store.list();
    const focused = document.activeElement?.closest("[data-id]")?.dataset.id;
    this.place.replaceChildren(...listed.map((one) => this.item(one)));
    if (focused) this.place.querySelector(`[data-id="${focused}"] button`)?.focus();
    if (!store.works) this.note.textContent = "This browser keeps nothing for this page: conversations end with it.";
    else this.note.textContent = listed.length ? "" : "They appear here, and stay in this browser.";
  }

  item({ id, title, updated }) {
    const name = title || "Untitled";
    const isCurrent = id === this.app.conversation.id;
    const when = el("time", { datetime: new Date(updated).toISOString(), class: "soft small" }, whenText(updated));
    const open = el(
      "button",
      {
        type: "button",
        class: "conversation",
        "aria-current": isCurrent ? "true" : null,
        on: { click: () => this.app.choose(id) },
      },
      el("span", { class: "title" }, name),
      when,
    );
    const away = button("×", () => this.remove(id), {
      class: "quiet cross",
      "aria-label": `Delete ${name}`,
      title: "Delete",
    });
    return el("li", { "data-id": id }, open, away);
  }

  remove(id) {
    const { app } = this;
    const gone = app.store.load(id);
    for (const column of gone.columns) app.stopIn(column.tree);
    app.store.remove(id);
    if (id === app.conversation.id) app.show(app.newConversation());
    this.draw();
    const undo = () => {
      app.store.save(gone);
      app.show(gone);
    };
    app.voice.notice(`Deleted “${gone.title || "Untitled"}”.`, { label: "Undo", act: undo });
    (this.place.querySelector("button") ?? document.querySelector("#new")).focus();
  }

  otherTab(name) {
    const { app } = this;
    const id = app.store.idOf(name);
    if (id === null) return;
    const open = app.store.open.get(id);
    // what streams here is newer than what the other tab has
    if (open && app.isRunning(open)) return;
    app.store.open.delete(id);
    const changed = id === app.conversation.id ? app.store.load(id) : null;
    if (changed) app.show(changed);
    this.draw();
  }
}

function whenText(updated) {
  const date = new Date(updated);
  const isToday = date.toDateString() === new Date().toDateString();
  return (isToday ? TIME : DAY).format(date);
}
