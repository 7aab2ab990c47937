// Strength per layer: bars for the model that the schedule's prompt is applied to, over the table in a node's `sites`.

import { barsOfRules, putBars, textOf } from "./bars.js";
import { modelAfter } from "./models.js";
import { ask, button, copy, drawText, h, oneLine } from "./shared.js";

drawText({ kind: "ImagePromptSchedule", input: "sites", type: "IMAGE_PROMPT_LAYERS", least: 60, width: 400, make: layerEditor });

function layerEditor({ node, change }) {
  let written = "";
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

  async function refresh() {
    if (body.hidden) return;
    const turn = ++asked;
    const asks = modelAfter(node);
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
      putBars(
        bars,
        barsOfRules(found.layers.map(barOf), {
          rules: found.rules,
          whole: (group) => group,
          change(next) {
            asked++; // as in blocks.js
            change((written = text.value = next));
          },
          done: refresh,
        }),
      );
      const option = (name, value) => h("option", { value }, name);
      const tables = Object.entries(found.presets).map(([name, factors]) =>
        [name, textOf(Object.entries(factors).map(([where, factor]) => ({ where, factor })))]);
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

function barOf({ order, group, number, sites, role, low, high }) {
  const label = [`${group} ${number} (t${order})`, sites > 1 ? `${sites} attentions` : "", role].filter(Boolean).join(", ");
  return { group, key: `t${order}`, label, low, high };
}
