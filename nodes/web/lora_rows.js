// LoRA Rows: any number of LoRAs, a row each, over the JSON list in the node's `rows`.

import { blockSliders } from "./blocks.js";
import { ask, button, chooseName, copy, drag, drawText, h, namesOfLoras, numberField, pictureAt } from "./shared.js";

drawText({ kind: "ImagePromptLoRARows", input: "rows", type: "IMAGE_PROMPT_LORA_ROWS", least: 70, width: 480, make: rowsEditor });

function rowsEditor({ change }) {
  let rows = [];
  let problem = "";
  let asText = false;
  const list = h("ul", { "aria-label": "LoRAs" });
  const toggleAll = h("input", {
    type: "checkbox", "aria-label": "all LoRAs on", title: "all on or off",
    onchange() {
      for (const row of rows) row.on = toggleAll.checked;
      draw();
      emit();
    },
  });
  const count = h("span", { class: "image-prompt-fill image-prompt-note" });
  const plain = button("{ }", "edit as text", () => {
    asText = !asText;
    draw();
  });
  const add = button("+ add LoRA", "add a LoRA", async () => {
    const names = await namesOfLoras();
    chooseName({
      anchor: add,
      label: "add a LoRA",
      names,
      chosen(file) {
        rows.push({ on: true, file, strength: 1, text_strength: null, selector: "" });
        draw();
        emit();
        list.lastElementChild?.querySelector("[role=spinbutton]")?.focus();
      },
    });
  });
  const area = h("textarea", {
    "aria-label": "rows as JSON", spellcheck: "false",
    onchange() {
      read(area.value);
      draw();
      change(area.value);
    },
  });
  const error = h("div", { class: "image-prompt-error", role: "alert" });
  const element = h(
    "div",
    {},
    h("div", { class: "image-prompt-line" }, toggleAll, count, plain, add),
    error,
    list,
    area,
  );
  const items = new Map(); // a row and its element

  function read(text) {
    try {
      const found = JSON.parse(text.trim() || "[]");
      if (!Array.isArray(found) || found.length > MOST_ROWS) throw new Error(`a list of at most ${MOST_ROWS} rows was expected`);
      rows = found.map(rowOf);
      problem = "";
    } catch (reason) {
      problem = `This is no list of rows: ${reason.message}`;
    }
  }

  function emit() {
    change(written());
    summarise();
  }

  function written() {
    const lines = rows.map((row) => {
      const kept = { on: row.on, file: row.file, strength: row.strength };
      if (row.text_strength != null) kept.text_strength = row.text_strength;
      if (row.selector) kept.selector = row.selector;
      return JSON.stringify(kept);
    });
    return lines.length ? `[\n${lines.join(",\n")}\n]` : "[]";
  }

  function summarise() {
    const on = rows.filter((row) => row.on).length;
    toggleAll.checked = on === rows.length && on > 0;
    toggleAll.indeterminate = on > 0 && on < rows.length;
    count.textContent = rows.length ? `${on} of ${rows.length} on` : "no LoRA yet";
    if (!problem) area.value = written();
  }

  function draw() {
    for (const row of [...items.keys()]) if (!rows.includes(row)) items.delete(row);
    for (const row of rows) if (!items.has(row)) items.set(row, rowElement(row, actions));
    for (const item of items.values()) item.update();
    list.replaceChildren(...rows.map((row) => items.get(row).element));
    const text = asText || problem !== "";
    plain.setAttribute("aria-pressed", String(text));
    list.hidden = text;
    area.hidden = !text;
    error.textContent = problem;
    error.hidden = !problem;
    summarise();
  }

  const actions = {
    emit,
    remove(row) {
      const at = rows.indexOf(row);
      rows.splice(at, 1);
      draw();
      emit();
      (list.children[Math.min(at, rows.length - 1)]?.querySelector("button") ?? add).focus();
    },
    move(row, to) {
      const at = rows.indexOf(row);
      if (to < 0 || to >= rows.length || to === at) return false;
      rows.splice(at, 1);
      rows.splice(to, 0, row);
      draw();
      return true;
    },
    place: (row) => rows.indexOf(row),
    /** The place in the list that a height on the page is at. */
    placeAt: (y) => {
      const lines = [...list.children].map((item) => item.getBoundingClientRect());
      return lines.filter((box) => y > (box.top + box.bottom) / 2).length;
    },
  };

  return {
    element,
    show(text) {
      read(text);
      if (problem) area.value = text;
      draw();
    },
  };
}

const MOST_ROWS = 200; // as the server takes

/** A row of a list from elsewhere, also of rgthree's node. Throws what the server would refuse too, in a few words. */
function rowOf(found, index) {
  const expected = (what) => new Error(`row ${index + 1} has no ${what}`);
  if (found === null || typeof found !== "object") throw expected("names and values");
  const { lora, strengthTwo, ...named } = found;
  const row = {
    on: named.on ?? true,
    file: named.file ?? lora ?? "",
    strength: "strength" in named ? named.strength : 1,
    text_strength: named.text_strength ?? strengthTwo ?? null,
    selector: named.selector ?? "",
  };
  if (typeof row.file !== "string" || typeof row.selector !== "string") throw expected("texts for its file and its selector");
  if (typeof row.on !== "boolean") throw expected("true or false for 'on'");
  for (const value of [row.strength, row.text_strength ?? 0]) {
    if (typeof value !== "number" || Math.abs(value) > 20) throw expected("strength within -20 to 20");
  }
  return row;
}

/** One row; `update()` draws what the row is now. */
function rowElement(row, { emit, remove, move, place, placeAt }) {
  const handle = button("⠿", "reorder: drag, or use the arrow keys", () => {}, {
    style: "cursor: grab; touch-action: none",
    onpointerdown(event) {
      if (event.button !== 0) return;
      let moved = false;
      drag(event, {
        move(next) {
          const to = placeAt(next.clientY);
          moved = move(row, to > place(row) ? to - 1 : to) || moved;
        },
        end: () => moved && emit(),
      });
    },
    onkeydown(event) {
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      if (move(row, place(row) + step)) emit();
      handle.focus();
    },
  });
  const on = h("input", {
    type: "checkbox", role: "switch",
    onchange() {
      row.on = on.checked;
      update();
      emit();
    },
  });
  const name = button("", "choose a file", async () => {
    const names = await namesOfLoras();
    chooseName({
      anchor: name,
      label: "choose a LoRA",
      names,
      current: row.file,
      chosen(file) {
        row.file = file;
        update();
        emit();
        sliders.refreshIfOpen();
      },
    });
  }, { class: "image-prompt-fill" });
  const strength = numberField({
    label: "strength",
    value: row.strength,
    change(value) {
      row.strength = value;
      emit();
    },
  });
  const textStrength = numberField({
    label: "strength on the text encoders; empty: the same",
    value: row.text_strength,
    empty: "text",
    change(value) {
      row.text_strength = value;
      emit();
    },
  });
  textStrength.follows = () => row.strength;
  const panel = h("div", { class: "image-prompt-panel", hidden: true });
  const sliders = blockSliders({
    file: () => row.file,
    selector: () => row.selector,
    change(text) {
      row.selector = text;
      update();
      emit();
    },
  });
  sliders.refreshIfOpen = () => {
    if (blocks.getAttribute("aria-expanded") === "true") sliders.refresh();
    if (info.getAttribute("aria-expanded") === "true") showFacts(panel, row.file);
  };
  const open = (opener, fill) => {
    const opens = opener.getAttribute("aria-expanded") !== "true";
    for (const other of [blocks, info]) other.setAttribute("aria-expanded", String(opens && other === opener));
    panel.hidden = !opens;
    panel.replaceChildren();
    if (opens) fill();
  };
  const blocks = button("▥", "strength by block", () =>
    open(blocks, () => {
      panel.append(sliders.element);
      sliders.refresh();
    }), { "aria-expanded": "false" });
  const info = button("i", "what this LoRA is", () => open(info, () => showFacts(panel, row.file)), {
    class: "image-prompt-info", "aria-expanded": "false",
  });
  const gone = button("×", "remove", () => remove(row));
  const line = h("div", { class: "image-prompt-line" }, handle, on, name, strength, textStrength, blocks, info, gone);
  const element = h("li", {}, line, panel);

  function update() {
    on.checked = row.on;
    on.setAttribute("aria-label", `${row.file || "no file"} on`);
    name.textContent = shortName(row.file);
    name.title = row.file || "choose a file";
    name.setAttribute("aria-label", `file: ${row.file || "none"}`);
    name.classList.toggle("image-prompt-off", !row.on);
    blocks.setAttribute("aria-pressed", String(row.selector !== ""));
    blocks.title = row.selector ? `strength by block: ${row.selector}` : "strength by block";
  }
  update();
  return { element, update };
}

/** A file's name without folders and ending. */
function shortName(file) {
  return file ? file.split(/[\\/]/).pop().replace(/\.[^.]+$/, "") : "choose a file…";
}

async function showFacts(panel, file) {
  panel.replaceChildren(h("div", { class: "image-prompt-note" }, "reading…"));
  try {
    const facts = await ask("lora/facts", { file });
    const pairs = (table) => Object.entries(table).map(([name, number]) => `${name} × ${number}`).join(", ");
    const rows = [
      ["file", file],
      ["base model", facts.base_model],
      ["made as", `${pairs(facts.algorithms)}; rank ${Object.keys(facts.ranks).join(", ") || "none"}`],
      ["layers", pairs(facts.modules)],
      ["tags", Object.keys(facts.tags).join(", ")],
      ["not applied", facts.not_applied.join("; ")],
      ["notes", facts.notes.join("; ")],
    ];
    const words = facts.trigger_words.map((word) => button(word, `copy ${word}`, () => copy(word)));
    panel.replaceChildren(
      h("dl", {}, ...rows.filter(([, text]) => text).flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)])),
      words.length ? h("div", { class: "image-prompt-words" }, h("span", { class: "image-prompt-note" }, "trigger words "), ...words) : "",
      h(
        "a",
        { href: pictureAt("lora/heatmap", { file }), target: "_blank", title: "open the heat map" },
        h("img", { src: pictureAt("lora/heatmap", { file }), alt: `heat map of ${file}: how strongly it changes each block and kind of layer` }),
      ),
    );
  } catch (error) {
    panel.replaceChildren(h("div", { class: "image-prompt-error", role: "alert" }, error.message));
  }
}
