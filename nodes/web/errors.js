// What a node of this pack says when it fails: in the toast, where ComfyUI writes only that something failed, and away from
// the node again with the next run.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));
const TEXT = "$$node-text-preview"; // where ComfyUI shows what a node says of itself
let said = "";

api.addEventListener("execution_error", ({ detail }) => {
  const kind = window.LiteGraph?.registered_node_types?.[detail.node_type];
  if (kind?.nodeData?.python_module !== `custom_nodes.${PACK}`) return;
  said = detail.exception_message.trim();
  // hosts without this setting show a dialog with the whole sentence
  if (!app.extensionManager?.setting?.get("Comfy.RightSidePanel.ShowErrorsTab")) return;
  app.extensionManager.toast.add({ severity: "error", summary: kind.title, detail: said, life: 30000 });
});

api.addEventListener("execution_start", () => {
  for (const node of said ? everyNode(app.rootGraph ?? app.graph) : []) {
    const at = node.widgets?.findIndex((widget) => widget.name === TEXT && widget.value === said) ?? -1;
    if (at >= 0) {
      node.widgets[at].onRemove?.();
      node.widgets.splice(at, 1);
      node.setDirtyCanvas?.(true);
    }
  }
  said = "";
});

function everyNode(graph) {
  return (graph?.nodes ?? graph?._nodes ?? []).flatMap((node) => [node, ...everyNode(node.subgraph)]);
}
