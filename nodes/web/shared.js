// Pieces that the widgets of this pack are made of. Plain modules: what ComfyUI serves is what stands here.
//
// A widget here is a drawing over a text input of a node: its value is that text, so that graphs, the API and nodes
// without this folder are the same. Names and texts of files come from strangers: they become text nodes, never HTML.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

/** An element with attributes, listeners (`onclick: …`) and children; strings become text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** A small button; `label` is its name for screen readers and its tooltip. */
export function button(text, label, onclick, attributes = {}) {
  return h("button", { type: "button", "aria-label": label, title: label, onclick, ...attributes }, text);
}

/** The answer of one of this pack's routes (`lora/facts`); an Error with the server's sentence where it has none. */
export async function ask(path, query = {}) {
  const answer = await api.fetchApi(address(path, query));
  const table = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(table.error ?? `${path}: ${answer.status}`);
  return table;
}

/** Where a picture of one of this pack's routes is. */
export function pictureAt(path, query = {}) {
  return api.apiURL(address(path, query));
}

function address(path, query) {
  return `/image_prompt/${path}?${new URLSearchParams(query)}`;
}

/** Names of LoRAs, as this pack's own nodes list them now. */
export async function namesOfLoras() {
  const node = "ImagePromptLoRAStrength";
  const answer = await api.fetchApi(`/object_info/${node}`);
  return answer.ok ? (await answer.json())[node].input.required.file[1].options : [];
}

/** Put a text on the clipboard, also where the page is not served over HTTPS. */
export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = h("textarea", { "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A number as people write it: at most two digits behind the point. */
export function shown(value) {
  return String(Math.round(value * 100) / 100);
}

/** Entries on several lines as a field of one line shows them. */
export function oneLine(text) {
  return text.trim().replace(/[\s,]*\n[\s,]*/g, ", ");
}

export function clamp(value, low, high) {
  return Math.min(high, Math.max(low, value));
}

/**
 * Follow the pointer from a `pointerdown` until it is let go. Listens before everything else on the page, as the newer
 * renderer keeps events of widgets to itself; `mouseup` still comes, by which ComfyUI notices changes.
 */
export function drag(event, { move, end }) {
  const moved = (next) => {
    next.stopPropagation();
    move(next);
  };
  const done = (next) => {
    for (const [name, listener] of listeners) window.removeEventListener(name, listener, true);
    end?.(next);
  };
  const listeners = [["pointermove", moved], ["pointerup", done], ["pointercancel", done]];
  for (const [name, listener] of listeners) window.addEventListener(name, listener, true);
}

/**
 * A field for a number: drag it sideways, type, or use the arrow keys. With `empty`, a text that stands for no number,
 * the value may be null. `change(value)` is called with every new one.
 */
export function numberField({ label, value, low = -20, high = 20, empty = null, change }) {
  const field = h("input", {
    class: "image-prompt-number", type: "text", inputmode: "decimal", role: "spinbutton", autocomplete: "off",
    "aria-label": label, title: `${label}: drag, type, or use the arrow keys`, "aria-valuemin": low, "aria-valuemax": high,
    placeholder: empty,
  });
  let current = value;
  const show = () => {
    field.value = current == null ? "" : shown(current);
    if (current == null) field.removeAttribute("aria-valuenow");
    else field.setAttribute("aria-valuenow", shown(current));
  };
  const set = (next) => {
    const number = next == null ? null : Math.round(clamp(next, low, high) * 100) / 100;
    const changed = number !== current;
    current = number;
    show();
    if (changed) change(current);
  };
  field.addEventListener("mousedown", (event) => {
    if (document.activeElement !== field) event.preventDefault(); // a press may become a drag
  });
  field.addEventListener("pointerdown", (event) => {
    if (document.activeElement === field || event.button !== 0) return;
    const from = current ?? field.follows?.() ?? 1;
    let dragged = false;
    drag(event, {
      move(next) {
        const distance = next.clientX - event.clientX;
        dragged ||= Math.abs(distance) > 3;
        if (dragged) set(from + distance / 100);
      },
      end() {
        if (!dragged) field.select();
      },
    });
  });
  field.addEventListener("keydown", (event) => {
    const step = { ArrowUp: 0.05, ArrowDown: -0.05 }[event.key];
    if (step) {
      event.preventDefault();
      set((current ?? field.follows?.() ?? 1) + step * (event.shiftKey ? 10 : 1));
    }
    if (event.key === "Enter") field.blur();
  });
  field.addEventListener("change", () => {
    const text = field.value.trim().replace(",", ".");
    if (text === "" && empty != null) set(null);
    else if (text !== "" && Number.isFinite(Number(text))) set(Number(text));
    else show();
  });
  show();
  return field;
}

/** A panel above everything, beside `anchor`; closed by Escape and by a press elsewhere. Returns the function that closes it. */
export function popover(anchor, label, ...children) {
  const panel = h("div", { class: "image-prompt image-prompt-popover", role: "dialog", "aria-label": label }, ...children);
  const close = () => {
    panel.remove();
    window.removeEventListener("pointerdown", elsewhere, true);
    window.removeEventListener("keydown", escape, true);
  };
  const elsewhere = (event) => panel.contains(event.target) || close();
  const escape = (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    close();
    anchor.focus();
  };
  document.body.append(panel);
  const box = anchor.getBoundingClientRect();
  panel.style.left = `${clamp(box.left, 8, Math.max(8, window.innerWidth - panel.offsetWidth - 8))}px`;
  panel.style.top = `${clamp(box.bottom + 2, 8, Math.max(8, window.innerHeight - panel.offsetHeight - 8))}px`;
  window.addEventListener("pointerdown", elsewhere, true);
  window.addEventListener("keydown", escape, true);
  return close;
}

const SHOWN_NAMES = 300; // of a list that is searched; more are found by typing

/** Let the user choose one of many names by typing parts of it. */
export function chooseName({ anchor, label, names, current, chosen }) {
  const list = h("ul", { role: "listbox", "aria-label": label, id: "image-prompt-names" });
  const search = h("input", {
    type: "search", role: "combobox", "aria-expanded": "true", "aria-controls": list.id, "aria-label": label,
    placeholder: "search: parts of the name", autocomplete: "off",
  });
  const count = h("div", { class: "image-prompt-note", role: "status" });
  let active = 0;
  let found = [];
  const mark = () => {
    [...list.children].forEach((item, index) => item.setAttribute("aria-selected", String(index === active)));
    list.children[active]?.scrollIntoView({ block: "nearest" });
    search.setAttribute("aria-activedescendant", list.children[active]?.id ?? "");
  };
  const take = (name) => {
    close();
    chosen(name);
  };
  const fill = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = names.filter((name) => words.every((word) => name.toLowerCase().includes(word)));
    list.replaceChildren(
      ...found.slice(0, SHOWN_NAMES).map((name, index) =>
        h("li", { role: "option", id: `image-prompt-name-${index}`, title: name, onclick: () => take(name) }, name)),
    );
    active = Math.max(0, words.length ? 0 : found.indexOf(current));
    const more = found.length > SHOWN_NAMES ? `, the first ${SHOWN_NAMES} shown` : "";
    count.textContent = found.length ? `${found.length} of ${names.length}${more}` : "no such name";
    mark();
  };
  search.addEventListener("input", fill);
  search.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (step) {
      event.preventDefault();
      active = clamp(active + step, 0, list.children.length - 1);
      mark();
    }
    if (event.key === "Enter" && found[active]) take(found[active]);
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
  const close = popover(anchor, label, search, list, count);
  fill();
  search.focus();
}

/**
 * Draw a text input of a node with an element. `make({node, change})` gives `element`, and `show(text)`, which is called
 * with every text that comes from elsewhere; it calls `change(text)` with what the user made of it. The element is as tall
 * as what is in it; `least` is its height before it was drawn, `width` that of a new node. Of the inputs in `instead`, what is
 * connected counts in place of the text, as a text that is connected itself.
 */
export function drawText({ kind, input, type, least = 60, width = 1, instead = [], make }) {
  app.registerExtension({
    name: `image_prompt.${kind}.${input}`,
    getCustomWidgets: () => ({
      [type]: (node, name, spec) => ({
        widget: textWidget(node, name, type, spec[1]?.default ?? "", least, [name, ...instead], make),
        minWidth: width,
      }),
    }),
    beforeRegisterNodeDef(nodeType, nodeData) {
      if (nodeData.name !== kind) return;
      const spec = nodeData.input.required?.[input] ?? nodeData.input.optional?.[input];
      if (spec) spec[1] = { ...spec[1], widgetType: type };
    },
  });
}

const MARGIN = 10; // that the host leaves around an element, on all sides

function textWidget(node, name, type, initial, least, inputs, make) {
  let text = initial;
  const drawn = make({
    node,
    change(next) {
      text = next;
      widget.callback?.(text);
      node.setDirtyCanvas?.(true, true);
    },
  });
  const note = h("div", { class: "image-prompt-note", hidden: true }, "what is connected counts, not what is drawn here");
  const { onConnectionsChange } = node;
  node.onConnectionsChange = function (...change) {
    const linked = node.inputs?.some((input) => inputs.includes(input.name) && input.link != null) ?? false;
    note.hidden = !linked;
    drawn.element.classList.toggle("image-prompt-off", linked);
    return onConnectionsChange?.apply(this, change);
  };
  const widget = place(node, name, type, h("div", {}, note, drawn.element), {
    least,
    getValue: () => text,
    setValue(next) {
      text = String(next ?? "");
      drawn.show(text);
    },
  });
  drawn.show(text);
  return widget;
}

const owners = new WeakMap(); // elements among the widgets of nodes, and of which

/**
 * Show the elements of the nodes that are there. The newer renderer keeps those of nodes that were there before under the same
 * number, as after undo or in the next tab (its component takes an element when it is mounted, and never again).
 */
function showThoseThatAre() {
  for (const element of document.querySelectorAll(".image-prompt")) {
    const owner = owners.get(element);
    const node = owner && app.canvas.graph?.getNodeById(owner.node.id);
    if (!node || node === owner.node) continue;
    const heir = node.widgets?.find((widget) => widget.name === owner.name && owners.has(widget.element))?.element;
    if (heir && !heir.isConnected) element.replaceWith(heir);
  }
}

async function afterDrawing() {
  // nothing tells when the renderer has mounted its components: now, or some frames later in a large graph
  for (let frame = 0; frame < 5; frame++) {
    await new Promise(requestAnimationFrame);
    showThoseThatAre();
  }
}

app.registerExtension({
  name: "image_prompt.shared",
  afterConfigureGraph: () => void afterDrawing(),
  setup: () => app.canvas.canvas.addEventListener("litegraph:set-graph", afterDrawing),
});

/** Put an element among the widgets of a node, as tall as what is in it; `least` is its height before it was drawn. */
export function place(node, name, type, drawn, { least, ...options }) {
  // wide enough before the host gives it a place: words under each other would make the node tall for good
  const content = h("div", { style: "min-width: 280px" }, drawn);
  const element = h("div", { class: "image-prompt", "aria-label": name, role: "group" }, content);
  // keys of the editor, such as Delete, are not meant for the node while a control has the focus
  element.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.stopPropagation());
  const height = () => (content.offsetHeight || least) + 2 * MARGIN;
  const widget = node.addDOMWidget(name, type, element, { hideOnZoom: false, getMinHeight: height, getMaxHeight: height, ...options });
  owners.set(element, { node, name });
  new ResizeObserver(() => fit(node)).observe(content);
  return widget;
}

/** Make the node as tall as its widgets need; one that was made taller by hand stays so. */
function fit(node) {
  if (!node.graph) return;
  const [width, height] = node.size;
  const least = node.computeSize()[1];
  const was = node.image_prompt_least ?? 0;
  node.image_prompt_least = least;
  if (height < least || Math.abs(height - was) < 2) node.setSize([width, least]);
  node.setDirtyCanvas?.(true, true);
}

const STYLE = `
.image-prompt { color: var(--input-text); font: 12px/1.4 Inter, Arial, sans-serif; box-sizing: border-box; overflow: hidden auto; }
.image-prompt *, .image-prompt-popover * { box-sizing: border-box; }
.image-prompt [hidden] { display: none !important; }
.image-prompt button, .image-prompt input, .image-prompt select, .image-prompt textarea {
  font: inherit; color: inherit; background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 4px;
  margin: 0; padding: 2px 6px; min-width: 0; height: 24px; }
.image-prompt button { cursor: pointer; }
.image-prompt button:hover, .image-prompt button[aria-pressed="true"], .image-prompt button[aria-expanded="true"] { border-color: var(--input-text); }
.image-prompt textarea { width: 100%; height: 90px; resize: vertical; font-family: monospace; }
.image-prompt :focus-visible { outline: 2px solid var(--p-primary-color, #4a9eff); outline-offset: 1px; }
.image-prompt-line { display: flex; align-items: center; gap: 4px; padding: 2px; }
.image-prompt-line > button { flex: none; min-width: 24px; padding: 0 4px; }
.image-prompt-fill, .image-prompt .image-prompt-fill { flex: 1 1 0; text-align: left; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.image-prompt input.image-prompt-number { flex: none; width: 52px; text-align: center; cursor: ew-resize; }
.image-prompt input.image-prompt-number:focus { cursor: text; }
.image-prompt input[type="checkbox"] { flex: none; width: 16px; height: 16px; cursor: pointer; accent-color: var(--p-primary-color, #4a9eff); }
.image-prompt-wrap { padding: 0 2px 4px; overflow-wrap: anywhere; }
.image-prompt a.image-prompt-button { flex: none; color: var(--input-text); text-decoration: none; background: var(--comfy-input-bg);
  border: 1px solid var(--p-primary-color, #4a9eff); border-radius: 4px; padding: 2px 8px; }
.image-prompt a.image-prompt-button:hover { background: var(--border-color); }
.image-prompt-note { color: var(--descrip-text); }
.image-prompt-error { color: var(--error-text, #ff4444); }
.image-prompt-off { opacity: 0.5; }
.image-prompt ul { list-style: none; margin: 0; padding: 0; }
.image-prompt-info { font-style: italic; font-family: Georgia, serif; }
.image-prompt-panel { padding: 4px 4px 10px 4px; display: flex; flex-direction: column; gap: 4px; overflow-wrap: anywhere; }
.image-prompt-panel img { max-width: 100%; align-self: flex-start; background: #fff; }
.image-prompt-panel dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 8px; margin: 0; }
.image-prompt-panel dt { color: var(--descrip-text); }
.image-prompt-panel dd { margin: 0; }
.image-prompt-popover { position: fixed; z-index: 10000; width: 420px; max-width: calc(100vw - 16px); padding: 6px; background: var(--comfy-menu-bg);
  border: 1px solid var(--border-color); border-radius: 6px; box-shadow: 0 4px 16px rgba(0, 0, 0, 0.4); overflow: visible; }
.image-prompt-popover input { width: 100%; }
.image-prompt-popover ul { max-height: 50vh; overflow-y: auto; margin: 4px 0; }
.image-prompt-popover li { padding: 3px 6px; cursor: pointer; border-radius: 4px; overflow-wrap: anywhere; }
.image-prompt-popover li:hover, .image-prompt-popover li[aria-selected="true"] { background: var(--comfy-input-bg); }
`;
document.head.append(h("style", {}, STYLE));
