// Markdown inside a line: code, bold, italics, struck out, links. Text nodes and elements, never markup from a string.

import { el } from "../view/dom.js";

const SPECIAL = /[`*_~[\\]|https?:\/\//g;
const LINK = /\[([^\]\n]{1,500})\]\((https?:\/\/[^\s()<>]{1,2000})\)/y;
const ADDRESS = /https?:\/\/[^\s<>()[\]`"'*]{1,2000}/y;
const ESCAPED = "\\`*_{}#+.!|~>-";
const DEEPEST = 6;
const TAGS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };

/** The nodes of a text. */
export function inline(text, depth = 0) {
  const found = [];
  const hopeless = new Set(); // delimiters without a partner further on: looked for once, not at each place
  let plain = "";
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const special = SPECIAL.exec(text);
    const next = special ? special.index : text.length;
    plain += text.slice(at, next);
    if (!special) break;
    const span = spanAt(text, next, depth, hopeless);
    if (span.node) {
      if (plain) found.push(plain);
      plain = "";
      found.push(span.node);
    } else {
      plain += span.text;
    }
    at = span.end;
  }
  if (plain) found.push(plain);
  return found;
}

function spanAt(text, at, depth, hopeless) {
  const mark = text[at];
  if (mark === "`") return codeSpan(text, at, hopeless);
  if (mark === "\\") {
    const escaped = ESCAPED.includes(text[at + 1] ?? " ");
    return { text: escaped ? text[at + 1] : "\\", end: at + 1 + Number(escaped) };
  }
  if (mark === "[" || mark === "h") return linkAt(text, at, depth);
  const delimiter = text[at + 1] === mark ? mark + mark : mark;
  const end = TAGS[delimiter] && depth < DEEPEST ? closing(text, at, delimiter, hopeless) : -1;
  if (end < 0) return { text: delimiter, end: at + delimiter.length };
  const inner = text.slice(at + delimiter.length, end);
  return { node: el(TAGS[delimiter], {}, inline(inner, depth + 1)), end: end + delimiter.length };
}

function codeSpan(text, at, hopeless) {
  const ticks = /`+/y;
  ticks.lastIndex = at;
  const [open] = ticks.exec(text);
  const begin = at + open.length;
  if (!hopeless.has(open)) {
    for (let close = text.indexOf(open, begin); close >= 0;) {
      let after = close;
      while (text[after] === "`") after += 1;
      if (after - close === open.length) {
        const code = text.slice(begin, close);
        const trimmed = /^ .*\S.* $/s.test(code) ? code.slice(1, -1) : code;
        return { node: el("code", {}, trimmed), end: after };
      }
      close = text.indexOf(open, after);
    }
    hopeless.add(open);
  }
  return { text: open, end: begin };
}

function closing(text, at, delimiter, hopeless) {
  const word = /[\p{L}\p{N}]/u;
  const inWords = delimiter[0] === "_";
  const size = delimiter.length;
  if (hopeless.has(delimiter) || !/\S/.test(text[at + size] ?? " ")) return -1;
  if (inWords && word.test(text[at - 1] ?? " ")) return -1;
  for (let close = text.indexOf(delimiter, at + size + 1); close >= 0;) {
    let after = close;
    while (text[after] === delimiter[0]) after += 1;
    const fits = size === 2 || after - close !== 2;
    if (fits && /\S/.test(text[close - 1]) && !(inWords && word.test(text[after] ?? " "))) {
      return size === 2 ? after - 2 : close;
    }
    close = text.indexOf(delimiter, after);
  }
  hopeless.add(delimiter);
  return -1;
}

function linkAt(text, at, depth) {
  const rule = text[at] === "[" ? LINK : ADDRESS;
  rule.lastIndex = at;
  const match = rule.exec(text);
  if (!match || /\w/.test(text[at] === "h" ? (text[at - 1] ?? " ") : " ")) return { text: text[at], end: at + 1 };
  if (rule === LINK)
    return { node: link(match[2], inline(match[1], Math.max(depth, DEEPEST))), end: at + match[0].length };
  const address = match[0].replace(/[.,;:!?]+$/, "");
  return { node: link(address, [address]), end: at + address.length };
}

function link(address, children) {
  return el("a", { href: address, target: "_blank", rel: "noopener noreferrer", title: address }, children);
}
