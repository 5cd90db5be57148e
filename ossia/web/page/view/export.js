// The window that shows a conversation as a row to train on.

import { copyText, el } from "./dom.js";

export class ExportWindow {
  constructor(dialog, notice) {
    this.dialog = dialog;
    this.row = dialog.querySelector("#export-row");
    this.remarks = dialog.querySelector("#export-remarks");
    dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
    dialog.querySelector("#export-download").addEventListener("click", () => this.download());
    const copy = dialog.querySelector("#export-copy");
    copy.addEventListener("click", async () => {
      copy.textContent = (await copyText(this.line)) ? "Copied" : "Not allowed here";
    });
    dialog.addEventListener("close", () => {
      copy.textContent = "Copy";
      this.opener.focus();
    });
  }

  show({ row, remarks }, name, opener) {
    this.line = JSON.stringify(row);
    this.name = name;
    this.opener = opener;
    this.row.textContent = this.line;
    this.remarks.replaceChildren(...remarks.map((remark) => el("li", {}, remark)));
    this.remarks.hidden = !remarks.length;
    this.dialog.showModal();
  }

  download() {
    const address = URL.createObjectURL(new Blob([`${this.line}\n`], { type: "application/jsonl" }));
    el("a", { href: address, download: `${this.name}.jsonl` }).click();
    // the browser reads it after this turn
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  }
}
