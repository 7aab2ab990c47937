// Which model a node is about: the loader at the beginning of its line of MODEL links, also through subgraphs.

import { app } from "../../scripts/app.js";

const LOADERS = { ckpt_name: "checkpoints", unet_name: "diffusion_models" };
const DEMO_WORLD = "ImagePromptDemoWorld";
const FARTHEST = 500; // nodes that are looked through; no real graph has so many in a row

/** The model that a node's output ends at, or null: `{kind, file}`, as routes are asked for it; of the demo world there is no file. */
export function modelAfter(node) {
  const seen = new Set();
  for (const output of node.outputs ?? []) {
    for (const id of output.links ?? []) {
      for (const target of targets(node.graph, id)) {
        const found = upstream(target, seen);
        if (found) return found;
      }
    }
  }
  return null;
}

function upstream(node, seen) {
  if (seen.has(node) || seen.size > FARTHEST) return null;
  seen.add(node);
  if (node.type === DEMO_WORLD) return { kind: "demo" };
  for (const [name, kind] of Object.entries(LOADERS)) {
    const widget = node.widgets?.find((candidate) => candidate.name === name);
    if (widget?.value) return { kind, file: widget.value };
  }
  const inputs = (node.inputs ?? []).filter((input) => input.link != null && (input.type === "MODEL" || input.type === "*"));
  for (const input of inputs) {
    const before = source(node.graph, input.link);
    const found = before && upstream(before, seen);
    if (found) return found;
  }
  return null;
}

/** The model that comes into a node, likewise. */
export function modelBefore(node) {
  return upstream(node, new Set());
}

/** The node that a link comes from, also through the borders of subgraphs; of a subgraph that is used twice, the first use counts. */
function source(graph, id, depth = 0) {
  const link = linkOf(graph, id);
  if (!link || depth > FARTHEST) return null;
  if (link.origin_id === graph.inputNode?.id) {
    const outer = useOf(graph);
    const before = outer?.inputs?.[link.origin_slot]?.link;
    return before == null ? null : source(outer.graph, before, depth + 1);
  }
  const node = graph.getNodeById(link.origin_id);
  if (!node?.subgraph) return node;
  const inner = node.subgraph.outputs?.[link.origin_slot]?.linkIds?.[0];
  return inner == null ? null : source(node.subgraph, inner, depth + 1);
}

/** The nodes that a link goes to, likewise: inside of a subgraph it may be several. */
function targets(graph, id, depth = 0) {
  const link = linkOf(graph, id);
  if (!link || depth > FARTHEST) return [];
  const further = (where, ids) => [...(ids ?? [])].flatMap((next) => targets(where, next, depth + 1));
  if (link.target_id === graph.outputNode?.id) {
    const outer = useOf(graph);
    return outer ? further(outer.graph, outer.outputs?.[link.target_slot]?.links) : [];
  }
  const node = graph.getNodeById(link.target_id);
  if (!node?.subgraph) return node ? [node] : [];
  return further(node.subgraph, node.subgraph.inputs?.[link.target_slot]?.linkIds);
}

/** The first node that stands for a subgraph. */
function useOf(subgraph) {
  const root = subgraph.rootGraph ?? app.rootGraph ?? app.graph;
  const graphs = [root, ...(root.subgraphs?.values?.() ?? [])];
  return graphs.flatMap((graph) => graph.nodes ?? graph._nodes ?? []).find((node) => node.subgraph === subgraph);
}

function linkOf(graph, id) {
  return graph?.getLink?.(id) ?? graph?.links?.[id] ?? app.graph.links?.[id];
}
