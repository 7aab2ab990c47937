// A picture beside a preset's name while the pointer is on it in an open list: a cell of the sheet in docs/presets.webp,
// which ipadapter_core/demo/presets_sheet.py drew. Lists are the host's, of either renderer; what they offer is not changed.

import { app } from "../../scripts/app.js";
import { ask, h } from "./shared.js";

const SHEET = new URL("./docs/presets.webp", import.meta.url).href;
const [COLUMNS, CELL, LABEL, GAP, BEFORE] = [4, 120, 24, 8, 4];
const ENTRIES = ".litemenu-entry, [role=option]";

let presets = new Map();
let shown;

function hide() {
  shown?.remove();
  shown = undefined;
}

/** The preset that an entry of an open list offers; nothing for entries of other lists, which may have one name in common. */
function presetOf(entry) {
  const name = entry?.textContent.trim();
  if (!presets.has(name)) return undefined;
  const list = [...entry.parentElement.children].map((other) => other.textContent.trim());
  return list.filter((other) => presets.has(other)).length > 3 ? name : undefined;
}

function show(entry, name) {
  const { at, meaning } = presets.get(name);
  const [x, y] = [at % COLUMNS, Math.floor(at / COLUMNS)];
  const box = entry.getBoundingClientRect();
  const left = box.right + CELL + 24 < innerWidth ? box.right + 8 : box.left - CELL - 24;
  const top = Math.min(box.top, innerHeight - CELL - 70);
  hide();
  shown = h(
    "div",
    {
      class: "image-prompt-preset",
      role: "img",
      "aria-label": `${name}: ${meaning}`,
      style:
        `position: fixed; left: ${left}px; top: ${top}px; width: ${CELL}px; padding: 8px; z-index: 100000; pointer-events: none; box-sizing: content-box; ` +
        "border-radius: 6px; font: 12px/1.35 system-ui, sans-serif; color: var(--input-text, #ddd); " +
        "background: var(--comfy-menu-bg, #222); border: 1px solid var(--border-color, #555)",
    },
    h("div", {
      style:
        `width: ${CELL}px; height: ${CELL}px; margin-bottom: 6px; background-image: url("${SHEET}"); ` +
        `background-position: ${-(GAP / 2 + x * (CELL + GAP))}px ${-(GAP / 2 + y * (CELL + LABEL + GAP) + LABEL)}px`,
    }),
    meaning,
  );
  document.body.append(shown);
}

app.registerExtension({
  name: "image_prompt.preset_pictures",
  async setup() {
    const { presets: known } = await ask("presets").catch(() => ({ presets: [] }));
    presets = new Map(known.map(({ name, meaning }, i) => [name, { at: i + BEFORE, meaning }]));
    document.addEventListener("pointerover", (event) => {
      const entry = event.target.closest?.(ENTRIES);
      const name = presetOf(entry);
      if (name) show(entry, name);
      else hide();
    });
    document.addEventListener("pointerdown", hide, true);
    document.addEventListener("keydown", hide, true);
  },
});
