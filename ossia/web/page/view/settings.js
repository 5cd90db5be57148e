// The form of the settings: what is typed goes to the conversation at once, what can't be used is said beside it.

import { DEFAULTS, EXAMPLE_TOOLS, readSettings } from "../chat/settings.js";
import { growing } from "./dom.js";

const FIELDS = Object.keys(DEFAULTS);

export class SettingsForm {
  /** `app`: settings (of the conversation), changed(), key, setKey(text), theme, setTheme(name). */
  constructor(form, app) {
    this.form = form;
    this.app = app;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => this.typed(event.target));
    form.addEventListener("focusout", () => this.showProblems(FIELDS));
    form.querySelector("#tools-example").addEventListener("click", () => this.setTools(EXAMPLE_TOOLS));
    form.querySelector("#tools-format").addEventListener("click", () => {
      const { values, problems } = readSettings(app.settings);
      if (!problems.tools && values.tools.length) this.setTools(values.tools);
      else this.showProblems(["tools"]);
    });
    form.querySelectorAll("textarea").forEach(growing);
  }

  get fields() {
    return this.form.elements;
  }

  /** Shows the conversation's settings. */
  fill() {
    for (const name of FIELDS) this.fields[name].value = this.app.settings[name];
    this.fields.theme.value = this.app.theme;
    this.fields.key.value = this.app.key;
    this.showProblems(FIELDS);
  }

  typed({ name, value }) {
    if (name === "theme") {
      this.app.setTheme(value);
    } else if (name === "key") {
      this.app.setKey(value.trim());
    } else {
      this.app.settings[name] = value;
      this.app.changed();
      // a half-typed list is no mistake yet, so only what was wrong before is looked at while typing
      this.showProblems(FIELDS.filter((field) => this.isMarked(field)));
    }
  }

  setTools(tools) {
    this.fields.tools.value = JSON.stringify(tools, null, 2);
    this.fields.tools.dispatchEvent(new Event("input", { bubbles: true }));
    this.showProblems(["tools"]);
  }

  isMarked(field) {
    const input = this.fields[field];
    return input instanceof HTMLElement && input.getAttribute("aria-invalid") === "true";
  }

  showProblems(fields) {
    const { problems } = readSettings(this.app.settings);
    for (const field of fields) {
      const place = this.form.querySelector(`#${field}-problem`);
      if (!place) continue;
      if (place.textContent !== (problems[field] ?? "")) place.textContent = problems[field] ?? "";
      this.fields[field].setAttribute("aria-invalid", String(field in problems));
    }
  }

  /** Puts the cursor where something has to change. */
  focus(field) {
    const input = this.fields[field];
    if (input instanceof HTMLElement) input.focus();
  }
}
