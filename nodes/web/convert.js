// "Convert to IP-Adapter Studio" in the menus of old nodes and of the canvas: what `ipadapter migrate` does to a saved
// graph, for one node (with those that cannot change without it) or for the whole graph, as one step that undo takes back.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { ask, h } from "./shared.js";

const ONE = "Convert to IP-Adapter Studio";
const ALL = "Convert all to IP-Adapter Studio";

/** Class types of other packs that can be converted; empty until the server has told. */
let oldTypes = new Set();

const isOld = (node) => oldTypes.has(node?.type) || oldTypes.has(node?.comfyClass);

/** The graph that is saved: the one around all subgraphs. */
const whole = () => app.rootGraph ?? app.graph;

const graphs = () => [whole(), ...(whole().subgraphs?.values?.() ?? [])];

function nodeItems(node) {
  if (!isOld(node)) return [];
  return [
    { content: ONE, callback: () => convert(node) },
    { content: ALL, callback: () => convert() },
  ];
}

function canvasItems() {
  const there = graphs().some((graph) => (graph.nodes ?? graph._nodes ?? []).some(isOld));
  return there ? [{ content: ALL, callback: () => convert() }] : [];
}

/** Convert one node (with those that cannot change without it), or all; say what changed and what stays. */
async function convert(node) {
  let told;
  // a number is one of a graph, and that of a subgraph has an id
  const asked = node && { nodes: [node.id], subgraph: node.graph === whole() ? undefined : node.graph.id };
  try {
    const answer = await api.fetchApi("/image_prompt/migrate", {
      method: "POST",
      body: JSON.stringify({ workflow: whole().serialize(), ...asked }),
    });
    told = await answer.json();
    if (!answer.ok) throw new Error(told.error ?? answer.statusText);
    if (told.rewritten) await put(told.workflow);
  } catch (error) {
    return report("Nothing was converted", [error.message]);
  }
  if (!told.rewritten) return report("Nothing was converted", told.report);
  report(`${told.rewritten} of ${told.found} old nodes converted`, [...told.report, "Ctrl+Z takes it back."]);
}

/** Put a graph in the place of the open one, as one step of its history. */
async function put(graph) {
  const workflow = app.extensionManager?.workflow?.activeWorkflow;
  const history = workflow?.changeTracker;
  if (!history?.undoQueue) return app.loadGraphData(graph, false, false);
  (history.captureCanvasState ?? history.checkState)?.call(history); // what was edited until now is a step of its own
  history.undoQueue.push(structuredClone(history.activeState));
  history.redoQueue.length = 0;
  history.store?.(); // which subgraph is open, and the view
  history._restoringState = true; // as undo itself does: loading shall not begin a new history
  try {
    await app.loadGraphData(graph, false, false, workflow);
    for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame); // drawing settles the sizes of nodes
    history.activeState = JSON.parse(JSON.stringify(whole().serialize()));
    history.updateModified?.();
  } finally {
    history._restoringState = false;
  }
}

function report(title, lines) {
  const close = () => {
    dialog.close();
    dialog.remove();
  };
  const dialog = h(
    "dialog",
    {
      class: "image-prompt-report",
      "aria-label": title,
      style:
        "max-width: min(720px, 90vw); max-height: 80vh; padding: 20px 24px; border-radius: 8px; font: 14px/1.5 system-ui, sans-serif; " +
        "color: var(--input-text, #ddd); background: var(--comfy-menu-bg, #222); border: 1px solid var(--border-color, #555)",
      oncancel: close,
    },
    h("h3", { style: "margin: 0 0 12px" }, title),
    h("ul", { style: "margin: 0 0 16px; padding-left: 20px" }, ...lines.map((line) => h("li", {}, line))),
    h("button", { onclick: close, autofocus: true, style: "padding: 6px 18px" }, "Close"),
  );
  document.body.append(dialog);
  dialog.showModal();
}

/** Older editors have no place for items of packs: theirs are added to what the canvas makes. */
function intoOlderMenus() {
  const { prototype } = globalThis.LGraphCanvas;
  const { getNodeMenuOptions, getCanvasMenuOptions } = prototype;
  prototype.getNodeMenuOptions = function (node) {
    const items = nodeItems(node);
    return [...getNodeMenuOptions.call(this, node), ...(items.length ? [null, ...items] : [])];
  };
  prototype.getCanvasMenuOptions = function () {
    const items = canvasItems();
    return [...getCanvasMenuOptions.call(this), ...(items.length ? [null, ...items] : [])];
  };
}

app.registerExtension({
  name: "image_prompt.convert",
  async setup() {
    if (!app.collectNodeMenuItems) intoOlderMenus();
    try {
      oldTypes = new Set((await ask("migrate")).types);
    } catch (error) {
      console.warn(`old nodes cannot be converted here: ${error.message}`);
    }
  },
  getNodeMenuItems: nodeItems,
  getCanvasMenuItems: canvasItems,
});
