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

/** The answer of one of this pack's routes (`lora/facts`); an Error with the server's sentence where it has none. */
export async function ask(path, query = {}) {
  const answer = await api.fetchApi(address(path, query));
  const table = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(table.error ?? `${path}: ${answer.status}`);
  return table;
}

/** Where one of this pack's routes is, for `ask` and, with `api.apiURL`, for pictures. */
export function address(path, query = {}) {
  return `/image_prompt/${path}?${new URLSearchParams(query)}`;
}

/**
 * Draw a text input of a node with an element. `make({node, change})` gives `element`, `show(text)`, which is called with
 * every text that comes from elsewhere, and `height()`, the least height in pixels; it calls `change(text)` with what the
 * user made of it.
 */
export function drawText({ kind, input, type, make }) {
  app.registerExtension({
    name: `image_prompt.${kind}.${input}`,
    getCustomWidgets: () => ({
      [type]: (node, name, spec) => ({ widget: textWidget(node, name, type, spec[1]?.default ?? "", make) }),
    }),
    beforeRegisterNodeDef(nodeType, nodeData) {
      if (nodeData.name !== kind) return;
      const spec = nodeData.input.required?.[input] ?? nodeData.input.optional?.[input];
      if (spec) spec[1] = { ...spec[1], widgetType: type };
    },
  });
}

function textWidget(node, name, type, initial, make) {
  let text = initial;
  const drawn = make({
    node,
    change(next) {
      text = next;
      widget.callback?.(text);
      grow(node);
    },
  });
  const widget = node.addDOMWidget(name, type, drawn.element, {
    hideOnZoom: false,
    getMinHeight: drawn.height,
    getValue: () => text,
    setValue(next) {
      text = String(next ?? "");
      drawn.show(text);
      grow(node);
    },
  });
  drawn.show(text);
  return widget;
}

/** Make room for widgets that have become taller. */
function grow(node) {
  const least = node.computeSize();
  if (least[1] > node.size[1]) node.setSize([node.size[0], least[1]]);
  node.setDirtyCanvas?.(true, true);
}
