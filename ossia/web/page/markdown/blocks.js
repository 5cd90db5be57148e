// Markdown's blocks. Text that streams in may end anywhere: an open fence is code up to the end.

const DEEPEST = 6; // quotes and lists inside each other; below, they are plain text
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** The blocks of a text: {kind, source, ...}. */
export function blocksOf(text, depth = 0) {
  const lines = text.split("\n");
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = blockAt(lines, at, depth);
    found.push({ ...block, source: lines.slice(at, block.end).join("\n") });
    at = block.end;
  }
  return found;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return codeAt(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = heading[2]
      .trimEnd()
      .replace(/(?<=\s)#+$/, "")
      .trimEnd();
    return { kind: "heading", level: heading[1].length, text, end: at + 1 };
  }
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (isTable(lines, at)) return tableAt(lines, at);
  if (depth < DEEPEST && QUOTE.test(line)) return quoteAt(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return listAt(lines, at, depth);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !beginsOther(lines, end, depth)) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).join("\n").trim(), end };
}

function beginsOther(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at)) return true;
  return depth < DEEPEST && (QUOTE.test(line) || ITEM.test(line));
}

function codeAt(lines, at, fence) {
  const [, ticks, language] = fence;
  let end = at + 1;
  const closes = (line) => line.trim().length >= ticks.length && line.trim() === ticks[0].repeat(line.trim().length);
  while (end < lines.length && !closes(lines[end])) end += 1;
  return { kind: "code", language, text: lines.slice(at + 1, end).join("\n"), end: Math.min(end + 1, lines.length) };
}

function quoteAt(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { kind: "quote", blocks: blocksOf(inner.join("\n"), depth + 1), end };
}

function listAt(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const items = [];
  let end = at;
  let inner = 0;
  while (end < lines.length) {
    const line = lines[end];
    const item = ITEM.exec(line);
    const space = line.search(/\S/);
    if (space < 0) {
      // an empty line belongs to the list only if the list goes on behind it
      let next = end + 1;
      while (next < lines.length && !lines[next].trim()) next += 1;
      if (next === lines.length) break;
      if (lines[next].search(/\S/) < inner && !isSibling(ITEM.exec(lines[next]), indent, ordered)) break;
      items.at(-1).push(...Array(next - end).fill(""));
      end = next;
      continue;
    } else if (space >= inner && items.length) {
      items.at(-1).push(line.slice(inner));
    } else if (isSibling(item, indent, ordered)) {
      inner = item[1].length + item[2].length + 1;
      items.push([item[4]]);
    } else if (item || beginsOther(lines, end, DEEPEST) || !lines[end - 1].trim()) {
      break;
    } else {
      items.at(-1).push(line.trimStart());
    }
    end += 1;
  }
  const start = ordered ? Number.parseInt(mark, 10) : null;
  return { kind: "list", start, items: items.map((item) => blocksOf(item.join("\n"), depth + 1)), end };
}

function isSibling(item, indent, ordered) {
  return Boolean(item) && Math.abs(item[1].length - indent.length) < 2 && /\d/.test(item[2]) === ordered;
}

function isTable(lines, at) {
  const rule = lines[at + 1] ?? "";
  return (
    lines[at].includes("|") &&
    rule.includes("-") &&
    TABLE_RULE.test(rule) &&
    cells(lines[at]).length === cells(rule).length
  );
}

function tableAt(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const sides = cells(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left",
  );
  return { kind: "table", head: cells(lines[at]), rows: lines.slice(at + 2, end).map(cells), sides, end };
}

function cells(line) {
  const inner = line
    .trim()
    .replace(/^\|/, "")
    .replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}
