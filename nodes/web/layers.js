// Strength per layer: bars for the model that the schedule's prompt is applied to, over the table in a node's `sites`.

import { app } from "../../scripts/app.js";
import { barsOf } from "./bars.js";
import { ask, button, copy, drawText, h, oneLine } from "./shared.js";

drawText({ kind: "ImagePromptSchedule", input: "sites", type: "IMAGE_PROMPT_LAYERS", least: 60, width: 400, make: layerEditor });

function layerEditor({ node, change }) {
  let written = "";
  let rules = [];
  let asked = 0;
  const text = h("input", {
    class: "image-prompt-fill", type: "text", spellcheck: "false", "aria-label": "factor per place: all: 0.2, output: 1, …",
    placeholder: "everywhere 1; or 'all: 0.2, output: 1, t3: 0'",
    onchange: () => write(text.value),
  });
  const presets = h("select", { class: "image-prompt-fill", "aria-label": "fill from a preset", onchange: () => presets.value && write(presets.value) });
  const open = button("▥ layers", "strength per layer of the connected model", () => {
    const opens = open.getAttribute("aria-expanded") !== "true";
    open.setAttribute("aria-expanded", String(opens));
    body.hidden = !opens;
    if (opens) refresh();
  }, { "aria-expanded": "false" });
  const bars = h("div", {});
  const model = h("div", { class: "image-prompt-note" });
  const body = h(
    "div",
    { class: "image-prompt-panel", hidden: true },
    h("div", { class: "image-prompt-line" }, presets, button("copy", "copy the table", () => copy(written)),
      button("reset", "everywhere 1", () => write(""))),
    bars,
    model,
  );
  const element = h("div", {}, h("div", { class: "image-prompt-line" }, open, text), body);

  function write(next) {
    written = next;
    text.value = oneLine(next);
    change(next);
    refresh();
  }

  function setRules(wheres, pairs) {
    rules = rules.filter(({ where }) => !wheres.has(where));
    for (const [where, factor] of pairs) rules.push({ where, factor });
    written = joined(rules);
    text.value = written;
    change(written);
  }

  async function refresh() {
    if (body.hidden) return;
    const turn = ++asked;
    const asks = modelOf(node);
    const name = asks ? (asks.file ?? "Demo World") : "";
    model.textContent = name;
    if (!asks) {
      bars.replaceChildren(h("div", { class: "image-prompt-note" },
        "Connect the schedule to an apply node, and that to a model from a loader or Demo World: then every layer is a bar here."));
      return;
    }
    try {
      const found = await ask("sites", { ...asks, sites: written });
      if (turn !== asked) return;
      model.textContent = `${found.base_model}: ${name}`;
      rules = found.rules;
      const groups = grouped(found.layers);
      bars.replaceChildren(
        barsOf(groups, {
          change: (values) => setRules(new Set(values.keys()), values),
          done: refresh,
          setGroup(name, factor) {
            const members = groups.find((group) => group.name === name).bars.map((bar) => bar.key);
            setRules(new Set([...members, name]), [[name, factor]]);
            refresh();
          },
        }),
      );
      const option = (name, value) => h("option", { value }, name);
      const tables = Object.entries(found.presets).map(([name, factors]) =>
        [name, joined(Object.entries(factors).map(([where, factor]) => ({ where, factor })))]);
      presets.replaceChildren(option("fill from a preset…", ""), ...tables.map(([name, table]) => option(name, table)));
      presets.value = tables.some(([, table]) => table === written) ? written : "";
    } catch (error) {
      if (turn === asked) bars.replaceChildren(h("div", { class: "image-prompt-error", role: "alert" }, error.message));
    }
  }

  return {
    element,
    show(next) {
      written = next;
      text.value = oneLine(next);
      refresh();
    },
  };
}

function joined(rules) {
  return rules.map(({ where, factor }) => `${where}: ${factor}`).join(", ");
}

function grouped(layers) {
  const groups = new Map();
  for (const { order, group, number, sites, role, low, high } of layers) {
    if (!groups.has(group)) groups.set(group, []);
    const label = [`${group} ${number} (t${order})`, sites > 1 ? `${sites} attentions` : "", role].filter(Boolean).join(", ");
    groups.get(group).push({ key: `t${order}`, label, low, high });
  }
  return [...groups].map(([name, bars]) => ({ name, bars }));
}

const LOADERS = { ckpt_name: "checkpoints", unet_name: "diffusion_models" };
const DEMO_WORLD = "ImagePromptDemoWorld";
const FARTHEST = 500; // nodes that are looked through; no real graph has so many in a row

/** Which model a node's output ends at, as the route `sites` is asked for it: `{kind, file}`, of the demo world no file; or null. */
function modelOf(node) {
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
