// Load Image Prompt Models: the files that its need takes on the connected model, those that are missing with a button each that
// downloads them. Nothing here is a value of the node, and no address comes from a graph: the server's table of public files has them.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { modelBefore } from "./models.js";
import { ask, button, h, place } from "./shared.js";

const KIND = "ImagePromptLoadModels";
const WIDTH = 380; // of a new node: names of files are long
const panels = new Set();

app.registerExtension({
  name: "image_prompt.needed",
  nodeCreated(node) {
    if (node.comfyClass !== KIND) return;
    const panel = filesPanel(node);
    const { onRemoved } = node;
    node.onRemoved = function (...args) {
      panels.delete(panel);
      return onRemoved?.apply(this, args);
    };
    panels.add(panel);
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
    setTimeout(panel.refresh); // when it has its values
  },
  afterConfigureGraph: () => refreshAll(),
  refreshComboInNodes: () => refreshAll(true), // the key R, which people press when a file has come
});

api.addEventListener("graphChanged", () => refreshAll());

function refreshAll(anew = false) {
  for (const panel of panels) panel.refresh(anew);
}

function filesPanel(node) {
  const list = h("ul", { "aria-label": "files for this need" });
  const title = h("span", { class: "image-prompt-note", role: "status", style: "flex: 1 1 0" });
  const again = button("↻", "look again", () => refresh(true));
  place(node, "files", "IMAGE_PROMPT_FILES", h("div", {}, h("div", { class: "image-prompt-line" }, title, again), list), {
    least: 60, serialize: false, getValue: () => undefined, setValue: () => {},
  }).serialize = false;
  let shown = "";
  let turn = 0;

  async function refresh(anew = false) {
    if (!node.graph) return;
    const asked = { need: node.widgets.find((widget) => widget.name === "need")?.value, ...modelBefore(node) };
    const key = JSON.stringify(asked);
    if (!anew && key === shown) return;
    shown = key;
    const mine = ++turn;
    if (!asked.kind) {
      list.replaceChildren();
      title.textContent = "Connect a model: the files that it takes are listed here.";
      return;
    }
    try {
      const { files } = await ask("needs", asked);
      if (mine !== turn) return;
      const missing = files.filter((one) => !one.file).length;
      title.textContent = missing ? `${missing} of ${files.length} files are missing` : "all files are there";
      list.replaceChildren(...files.map(row));
    } catch (error) {
      if (mine !== turn) return;
      title.textContent = "";
      list.replaceChildren(h("li", { class: "image-prompt-note" }, error.message));
    }
  }

  return { refresh };
}

function row({ part, folder, file, public: found, comes_as: comesAs }) {
  if (file) return h("li", { class: "image-prompt-line" }, h("span", { class: "image-prompt-fill", title: file }, `✓ ${part}: ${file}`));
  if (!found) return h("li", { class: "image-prompt-line" }, `${part}: no public file is known; put yours into models/${folder}`);
  const where = h("div", { class: "image-prompt-note image-prompt-wrap" },
    `${part} → models/${folder}${comesAs ? `, saved under the name above (there it is ${comesAs})` : ""}${found.note ? `; ${found.note}` : ""}`);
  const link = h("a", {
    class: "image-prompt-button", href: found.url, download: found.name, target: "_blank", rel: "noopener noreferrer",
    title: found.url, "aria-label": `download ${found.name}`,
  }, "Download");
  for (const event of ["pointerenter", "focus"]) link.addEventListener(event, () => tellSize(found.url, link), { once: true });
  return h("li", {},
    h("div", { class: "image-prompt-line" }, h("span", { class: "image-prompt-fill", title: found.name }, found.name), link), where);
}

/** Write how large a file is on its button, where the other server tells, which is asked when somebody points at the button. */
async function tellSize(url, link) {
  const answer = await fetch(url, { method: "HEAD" }).catch(() => null);
  const bytes = Number(answer?.ok && answer.headers.get("content-length"));
  if (bytes) link.textContent = `Download ${bytes < 1e9 ? `${Math.round(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`}`;
}
