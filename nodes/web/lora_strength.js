// Strength by block: sliders for the blocks of the node's LoRA file, over the text in its `selector`.

import { blockSliders, SELECTOR } from "./blocks.js";
import { button, drawText, h } from "./shared.js";

drawText({ kind: "ImagePromptLoRAStrength", input: "selector", type: "IMAGE_PROMPT_SELECTOR", least: 90, width: 420, make: selectorEditor });

function selectorEditor({ node, change }) {
  let written = "";
  const fileWidget = () => node.widgets?.find((widget) => widget.name === "file");
  const text = h("textarea", { ...SELECTOR, style: "height: 54px" }); // as vectors and tables have several lines
  const sliders = blockSliders({
    field: text,
    file: () => fileWidget()?.value,
    selector: () => written,
    change(next) {
      written = text.value = next;
      change(next);
    },
  });
  const panel = h("div", { class: "image-prompt-panel", hidden: true });
  const open = button("▥ blocks", "strength by block", () => {
    const opens = open.getAttribute("aria-expanded") !== "true";
    open.setAttribute("aria-expanded", String(opens));
    panel.hidden = !opens;
    panel.replaceChildren(...(opens ? [sliders.element] : []));
    if (opens) follow();
    sliders.refresh();
  }, { "aria-expanded": "false" });
  let followed;

  /** Draw the sliders anew when another file is chosen. */
  function follow() {
    const widget = fileWidget();
    if (!widget || widget === followed) return;
    followed = widget;
    const { callback } = widget;
    widget.callback = function (...values) {
      const result = callback?.apply(this, values);
      sliders.refresh();
      return result;
    };
  }

  return {
    element: h("div", {}, text, h("div", { class: "image-prompt-line" }, open), panel),
    show(next) {
      written = next;
      sliders.refresh();
    },
  };
}
