// Conversations in the browser's own storage, one entry each, so that two tabs don't overwrite each other's.

const PREFIX = "ossia.chat.";
const PREFERENCES = "ossia.preferences";
const KEY = "ossia.key";

export class Store {
  /** `failed(message)` is called when something can't be kept. */
  constructor(failed) {
    // with cookies blocked, merely reading window.localStorage throws
    const allowed = navigator.cookieEnabled;
    this.local = allowed ? window.localStorage : null;
    this.session = allowed ? window.sessionStorage : null;
    this.failed = failed;
    this.open = new Map();
  }

  get works() {
    return this.local !== null;
  }

  /** What the list shows, the newest first. */
  list() {
    const found = new Map();
    for (let index = 0; this.local && index < this.local.length; index += 1) {
      const name = this.local.key(index);
      if (!name.startsWith(PREFIX)) continue;
      const { id, title, updated } = JSON.parse(this.local.getItem(name));
      found.set(id, { id, title, updated });
    }
    return [...found.values()].sort((a, b) => b.updated - a.updated);
  }

  /** The conversation, the same object each time, or null. */
  load(id) {
    if (this.open.has(id)) return this.open.get(id);
    const text = this.local?.getItem(PREFIX + id);
    if (!text) return null;
    const conversation = JSON.parse(text);
    for (const column of conversation.columns) {
      for (const node of Object.values(column.tree.nodes)) {
        // whoever was streaming it is gone with the page
        if (node.state === "streaming") node.state = "stopped";
      }
    }
    this.open.set(id, conversation);
    return conversation;
  }

  save(conversation) {
    this.open.set(conversation.id, conversation);
    this.write(PREFIX + conversation.id, JSON.stringify(conversation));
  }

  remove(id) {
    this.open.delete(id);
    this.local?.removeItem(PREFIX + id);
  }

  /** The id of the conversation that an entry of this name holds, or null. */
  idOf(name) {
    return name?.startsWith(PREFIX) ? name.slice(PREFIX.length) : null;
  }

  get preferences() {
    return JSON.parse(this.local?.getItem(PREFERENCES) ?? "{}");
  }

  prefer(change) {
    this.write(PREFERENCES, JSON.stringify({ ...this.preferences, ...change }));
  }

  get key() {
    return this.session?.getItem(KEY) ?? "";
  }

  set key(text) {
    this.session?.setItem(KEY, text);
  }

  write(name, text) {
    if (!this.local) return;
    try {
      this.local.setItem(name, text);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      this.failed(
        "The browser's storage is full, so this is not kept. Export what you need and delete old conversations.",
      );
    }
  }
}

export function newId() {
  const [random] = crypto.getRandomValues(new Uint32Array(1));
  return Date.now().toString(36) + random.toString(36);
}
