// Small helpers around the DOM.

/** An element with attributes and children. Text becomes text, never markup; `on` holds event handlers. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    } else if (value !== false && value !== null && value !== undefined) {
      node.setAttribute(name, value === true ? "" : value);
    }
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export function button(text, handler, attributes = {}) {
  return el("button", { type: "button", class: "quiet", on: { click: handler }, ...attributes }, text);
}

/** Sets a text only if it is another one: what is written anew loses the reader's selection. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Copies a text. Returns whether it worked. */
export async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      return false;
    }
  }
  // plain http on another machine has no clipboard of its own
  const focused = document.activeElement;
  const area = el("textarea", { class: "hidden", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

/** A field that grows with what is typed, where the style sheet can't do it. */
export function growing(area) {
  if (CSS.supports("field-sizing", "content")) return area;
  const grow = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight}px`;
  };
  area.addEventListener("input", grow);
  requestAnimationFrame(grow);
  return area;
}

export function isComposing(event) {
  // Enter that ends an input method's composition; Safari says so by the key code alone
  return event.isComposing || event.keyCode === 229;
}
