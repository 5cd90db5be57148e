// A panel at the side: beside the thread where there is room, over it, with the focus kept inside, where there isn't.

const ROOMY = window.matchMedia("(min-width: 62rem)");

export class Panel {
  /** `changed(open)` is called when the reader opens or closes it. */
  constructor(dialog, opener, changed) {
    this.dialog = dialog;
    this.opener = opener;
    this.changed = changed;
    opener.addEventListener("click", () => (dialog.open ? this.close() : this.open()));
    dialog.querySelector("[data-close]").addEventListener("click", () => this.close());
    dialog.addEventListener("cancel", (event) => {
      event.preventDefault();
      this.close();
    });
    // beside the thread a dialog has no Escape of its own
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.defaultPrevented && ROOMY.matches) {
        event.stopPropagation();
        this.close();
      }
    });
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog && !ROOMY.matches) this.close();
    });
    ROOMY.addEventListener("change", () => {
      if (!dialog.open) return;
      dialog.close();
      if (ROOMY.matches) this.show();
      else this.mark();
    });
  }

  get isRoomy() {
    return ROOMY.matches;
  }

  open() {
    this.show();
    this.changed(true);
  }

  /** Opens it without the reader having asked: only where it takes nothing away. */
  openIfRoomy() {
    if (!ROOMY.matches) return;
    const focused = document.activeElement;
    this.show();
    focused.focus();
  }

  show() {
    if (!this.dialog.open) {
      if (ROOMY.matches) this.dialog.show();
      else this.dialog.showModal();
    }
    this.mark();
  }

  close() {
    this.dialog.close();
    this.mark();
    this.opener.focus();
    this.changed(false);
  }

  mark() {
    this.opener.setAttribute("aria-expanded", String(this.dialog.open));
  }
}
