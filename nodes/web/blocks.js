// The selector of a LoRA as sliders: a bar for each block of the file, presets, and the text itself.

import { barsOfRules, putBars } from "./bars.js";
import { ask, button, copy, h } from "./shared.js";

export const SELECTOR = {
  "aria-label": "selector", spellcheck: "false",
  placeholder: "everywhere 1; or 'all: 0, out3-5: 0.8', a block vector, a preset's name",
};

/**
 * An element that shows and changes `selector()` for `file()`; `change(text)` is called with every new one. `refresh()`
 * draws what they are now. Without `field`, a control elsewhere that has the text, one is among the sliders.
 */
export function blockSliders({ file, selector, change, field = null }) {
  const text = field ?? h("input", { class: "image-prompt-fill", type: "text", ...SELECTOR });
  text.addEventListener("change", () => write(text.value));
  const presets = h("select", {
    class: field ? "image-prompt-fill" : null, "aria-label": "preset",
    onchange: () => presets.value && write(presets.value),
  });
  const body = h("div", {});
  let asked = 0;

  const write = (next) => {
    change(next);
    refresh();
  };

  async function refresh() {
    const turn = ++asked;
    text.value = selector();
    if (!element.isConnected) return; // nobody sees them
    if (!file()) return body.replaceChildren(h("div", { class: "image-prompt-note" }, "choose a file first"));
    try {
      const found = await ask("lora/blocks", { file: file(), selector: selector() });
      if (turn !== asked) return;
      putBars(
        body,
        barsOfRules(found.blocks.map(barOf), {
          rules: found.rules,
          whole: (group) => `${group}*`,
          change(next) {
            asked++; // what is being drawn is of before, and would take the bars out of the user's hand
            change((text.value = next));
          },
          done: refresh,
        }),
      );
      await offer(found.base_model, turn);
    } catch (error) {
      if (turn === asked) body.replaceChildren(h("div", { class: "image-prompt-error", role: "alert" }, error.message));
    }
  }

  async function offer(baseModel, turn) {
    const found = await ask("lora/presets", { base_model: baseModel });
    if (turn !== asked) return;
    const option = (name, value) => h("option", { value, title: value }, name);
    presets.replaceChildren(
      option("preset…", ""),
      h("optgroup", { label: `for ${baseModel}` }, ...found.presets.map((name) => option(name, name))),
      h("optgroup", { label: `yours (${found.file})` }, ...Object.entries(found.own).map(([name, value]) => option(name, value))),
    );
    presets.value = [...presets.options].some((entry) => entry.value === selector()) ? selector() : "";
  }

  const element = h(
    "div",
    {},
    h(
      "div",
      { class: "image-prompt-line" },
      presets,
      field ? null : text,
      button("copy", "copy the selector", () => copy(text.value)),
      button("reset", "everywhere 1", () => write("")),
    ),
    body,
  );
  return { element, refresh };
}

/** Blocks such as in4 are grouped by what they begin with; what has no number is a group of its own. */
function barOf({ block, layers, low, high }) {
  const [, name, number] = block.match(/^(.*?)(\d*)$/);
  return { group: number && !name.startsWith("te") ? name : block, key: block, label: `${block} (${layers} layers)`, low, high };
}
