// What a node of this pack says when it fails, or refuses before it runs: in a toast, where ComfyUI writes only that
// something failed. With the next run it is gone, from the node too.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));
const TEXT = "$$node-text-preview"; // where ComfyUI shows what a node says of itself
let toasts = [];
let said = "";

api.addEventListener("execution_error", ({ detail }) => {
  if (!kindOf(detail.node_type)) return;
  said = detail.exception_message.trim();
  tell(detail.node_type, said);
});

const queuePrompt = api.queuePrompt;
api.queuePrompt = async function (...args) {
  forget();
  try {
    return await queuePrompt.apply(this, args);
  } catch (error) {
    for (const { class_type, errors } of Object.values(error.response?.node_errors ?? {})) {
      const refused = errors.filter((one) => one.type === "custom_validation_failed" && kindOf(class_type));
      // every input that the node's check reads is named in turn, with the same sentence
      for (const sentence of new Set(refused.map((one) => one.details.replace(/^\w+ - /, "")))) tell(class_type, sentence);
    }
    throw error;
  }
};

/** The class of a node of this pack; undefined for others'. */
function kindOf(type) {
  const kind = window.LiteGraph?.registered_node_types?.[type];
  return kind?.nodeData?.python_module === `custom_nodes.${PACK}` ? kind : undefined;
}

function tell(type, sentence) {
  // hosts without this setting show a dialog with the whole sentence
  if (!app.extensionManager?.setting?.get("Comfy.RightSidePanel.ShowErrorsTab")) return;
  const toast = { severity: "error", summary: kindOf(type).title, detail: sentence, life: 30000 };
  toasts.push(toast);
  app.extensionManager.toast.add(toast);
}

function forget() {
  for (const toast of toasts) app.extensionManager.toast.remove(toast);
  toasts = [];
  for (const node of said ? everyNode(app.rootGraph ?? app.graph) : []) {
    const at = node.widgets?.findIndex((widget) => widget.name === TEXT && widget.value === said) ?? -1;
    if (at < 0) continue;
    node.widgets[at].onRemove?.();
    node.widgets.splice(at, 1);
    node.setDirtyCanvas?.(true);
  }
  said = "";
}

function everyNode(graph) {
  return (graph?.nodes ?? graph?._nodes ?? []).flatMap((node) => [node, ...everyNode(node.subgraph)]);
}
