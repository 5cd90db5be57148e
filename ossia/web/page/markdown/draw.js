// Markdown as elements. Whatever the model writes is text: nothing here makes markup from a string.

import { button, copyText, el } from "../view/dom.js";
import { blocksOf } from "./blocks.js";
import { inline } from "./inline.js";

const drawnIn = new WeakMap(); // what stands in a place, so that it need not be read back from the elements

/** Draws `text` into `place`; blocks that are as they were stay, so that a selection in them stays too. */
export function showMarkdown(place, text) {
  const blocks = blocksOf(text);
  const drawn = drawnIn.get(place) ?? [];
  let same = 0;
  while (same < blocks.length && same < drawn.length && drawn[same] === blocks[same].source) same += 1;
  while (place.children.length > same) place.lastElementChild.remove();
  place.append(...blocks.slice(same).map(draw));
  drawnIn.set(
    place,
    blocks.map((block) => block.source),
  );
}

const DRAW = {
  paragraph: (block) => el("p", {}, inline(block.text)),
  // the page's own headings are h1 to h3, so the answer's begin below them
  heading: (block) => el(`h${Math.min(block.level + 3, 6)}`, { class: `level-${block.level}` }, inline(block.text)),
  rule: () => el("hr"),
  quote: (block) => el("blockquote", {}, block.blocks.map(draw)),
  list: (block) => el(block.start === null ? "ul" : "ol", { start: block.start }, block.items.map(drawItem)),
  code: drawCode,
  table: drawTable,
};

function draw(block) {
  return DRAW[block.kind](block);
}

function drawItem(blocks) {
  const [first, ...rest] = blocks;
  if (first?.kind !== "paragraph") return el("li", {}, blocks.map(draw));
  const loose = rest.some((block) => block.kind === "paragraph");
  return el("li", {}, loose ? draw(first) : inline(first.text), rest.map(draw));
}

function drawCode({ language, text }) {
  const copy = button("Copy", async () => {
    copy.textContent = (await copyText(text)) ? "Copied" : "Not allowed";
  });
  const label = language ? `Code, ${language}` : "Code";
  return el(
    "figure",
    { class: "code-block" },
    el("figcaption", {}, el("span", {}, language || "code"), copy),
    el("pre", { tabindex: "0", role: "region", "aria-label": label }, el("code", {}, text)),
  );
}

function drawTable({ head, rows, sides }) {
  const row = (tag, line) =>
    el(
      "tr",
      {},
      head.map((_, place) => el(tag, { class: sides[place] }, inline(line[place] ?? ""))),
    );
  const table = el(
    "table",
    {},
    el("thead", {}, row("th", head)),
    el(
      "tbody",
      {},
      rows.map((line) => row("td", line)),
    ),
  );
  return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}
