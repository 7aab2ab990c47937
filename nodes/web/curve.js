// Strength over the steps: a curve to be drawn, over the points in a node's `curve`.

import { clamp, drag, drawText, h, oneLine, shown } from "./shared.js";

const HEIGHT = 130;
const LEFT = 30; // for the numbers beside the curve
const SHAPES = {
  constant: "0: 1, 1: 1",
  "fade out": "0: 1, 1: 0",
  "fade in": "0: 0, 1: 1",
  "early only": "0: 1, 0.4: 1, 0.5: 0, 1: 0",
  "late only": "0: 0, 0.5: 0, 0.6: 1, 1: 1",
  "strong start": "0: 1.5, 0.3: 1, 1: 1",
  "in the middle": "0: 0, 0.5: 1, 1: 0",
};

drawText({
  kind: "ImagePromptSchedule", input: "curve", type: "IMAGE_PROMPT_CURVE", least: 190, width: 400, instead: ["drawn"], make: curveEditor,
});

function curveEditor({ change }) {
  let points = [];
  let written = "";
  let width = 360;
  const picture = svg("svg", { height: HEIGHT, role: "group", "aria-label": "strength over the steps; a press adds a point" });
  picture.style.cssText = "display: block; width: 100%; touch-action: none; cursor: crosshair; background: var(--comfy-input-bg); border-radius: 4px";
  const status = h("div", { class: "image-prompt-note", role: "status" });
  const error = h("div", { class: "image-prompt-error", role: "alert" });
  const text = h("input", {
    class: "image-prompt-fill", type: "text", spellcheck: "false", "aria-label": "curve as text: progress: factor, …",
    placeholder: "constant 1",
    onchange: () => take(text.value),
  });
  const shapes = h("select", { "aria-label": "shape", onchange: () => shapes.value && take(shapes.value) },
    h("option", { value: "" }, "shape…"), ...Object.entries(SHAPES).map(([name, value]) => h("option", { value }, name)));
  const element = h("div", {}, picture, h("div", { class: "image-prompt-line" }, shapes, text), status, error);

  const top = () => Math.max(2, ...points.map(([, y]) => Math.ceil(y)));
  const bottom = () => Math.min(0, ...points.map(([, y]) => Math.floor(y)));
  const toX = (x) => LEFT + x * (width - LEFT - 8);
  const toY = (y) => 8 + ((top() - y) / (top() - bottom())) * (HEIGHT - 16);

  function at(event, frame) {
    const box = picture.getBoundingClientRect();
    const scale = box.width / width || 1;
    const x = ((event.clientX - box.left) / scale - LEFT) / (width - LEFT - 8);
    const y = frame.top - (((event.clientY - box.top) / scale - 8) / (HEIGHT - 16)) * (frame.top - frame.bottom);
    return [round(clamp(x, 0, 1)), round(clamp(y, frame.bottom, frame.top), 20)];
  }

  function take(next) {
    written = next;
    read();
    draw();
    change(next);
  }

  function emit() {
    written = points.map(([x, y]) => `${shown(x)}: ${shown(y)}`).join(", ");
    change(written);
    text.value = written;
  }

  function read() {
    const found = parse(written);
    error.textContent = found ? "" : "Points are written as '0: 1, 0.5: 0.3, 1: 0' (progress: factor), with rising progress within 0 to 1.";
    error.hidden = found !== null;
    points = found ?? [];
    text.value = oneLine(written);
    shapes.value = Object.values(SHAPES).includes(written) ? written : "";
    status.textContent = "a press adds a point; drag it, or arrow keys; Delete or a double press removes it";
  }

  function set(index, [x, y]) {
    const before = index > 0 ? points[index - 1][0] : 0;
    const after = index < points.length - 1 ? points[index + 1][0] : 1;
    points[index] = [clamp(x, before, after), clamp(y, -20, 20)];
    draw(index);
    emit();
  }

  function remove(index) {
    points.splice(index, 1);
    draw(Math.min(index, points.length - 1));
    emit();
  }

  function follow(event, index) {
    if (event.button !== 0) return;
    event.stopPropagation();
    const frame = { top: top(), bottom: bottom() };
    picture.querySelectorAll("circle")[index]?.focus();
    drag(event, { move: (next) => set(index, at(next, frame)) });
  }

  picture.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !error.hidden) return;
    const place = at(event, { top: top(), bottom: bottom() });
    if (!points.length) points = [[0, 1], [1, 1]];
    const after = points.findIndex(([x]) => x > place[0]);
    const index = after < 0 ? points.length : after;
    points.splice(index, 0, place);
    draw(index);
    emit();
    follow(event, index);
  });

  function draw(focused = null) {
    const drawn = points.length ? points : [[0, 1], [1, 1]];
    const grid = [];
    for (let y = bottom(); y <= top(); y += top() - bottom() > 6 ? 2 : 1) {
      grid.push(svg("line", { x1: LEFT, x2: width - 8, y1: toY(y), y2: toY(y), stroke: "var(--border-color)" }));
      const label = svg("text", { x: LEFT - 9, y: toY(y) + 4, "text-anchor": "end", "font-size": 10, fill: "var(--descrip-text)" });
      label.textContent = String(y);
      grid.push(label);
    }
    const line = [[0, drawn[0][1]], ...drawn, [1, drawn.at(-1)[1]]].map(([x, y]) => `${toX(x)},${toY(y)}`).join(" ");
    const curve = svg("polyline", { points: line, fill: "none", stroke: "var(--p-primary-color, #4a9eff)", "stroke-width": 2 });
    const knobs = points.map(([x, y], index) => {
      const name = `point ${index + 1} of ${points.length}`;
      const knob = svg("circle", {
        cx: toX(x), cy: toY(y), r: 6, tabindex: 0, role: "slider", "aria-label": name, "aria-valuenow": shown(y),
        "aria-valuetext": `factor ${shown(y)} at ${Math.round(x * 100)} % of the steps`, "aria-orientation": "vertical",
        fill: "var(--p-primary-color, #4a9eff)", stroke: "var(--input-text)",
      });
      knob.style.cursor = "grab";
      knob.addEventListener("pointerdown", (event) => follow(event, index));
      knob.addEventListener("dblclick", () => remove(index));
      knob.addEventListener("focus", () => {
        status.textContent = `${name}: ${knob.getAttribute("aria-valuetext")}`;
      });
      knob.addEventListener("keydown", (event) => {
        const steps = { ArrowUp: [0, 0.05], ArrowDown: [0, -0.05], ArrowLeft: [-0.01, 0], ArrowRight: [0.01, 0] };
        const step = steps[event.key];
        if (event.key === "Delete" || event.key === "Backspace") remove(index);
        else if (step) set(index, [round(x + step[0]), round(y + step[1])]);
        else return;
        event.preventDefault();
      });
      return knob;
    });
    picture.replaceChildren(...grid, curve, ...knobs);
    knobs[focused]?.focus({ preventScroll: true });
  }

  new ResizeObserver(([entry]) => {
    if (!entry.contentRect.width) return;
    width = entry.contentRect.width;
    draw();
  }).observe(element);

  return {
    element,
    show(next) {
      written = next;
      read();
      draw();
    },
  };
}

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  return element;
}

function round(value, steps = 100) {
  return Math.round(value * steps) / steps;
}

/** The points of a text as the server reads it; null if it is none. */
function parse(text) {
  const points = [];
  const entries = text.split(/\r?\n/).flatMap((line) => line.split("#")[0].split(",")).map((part) => part.trim()).filter(Boolean);
  for (const entry of entries) {
    const found = entry.match(/^([^:=]*)[:=]([^:=]*)$/);
    if (!found) return null;
    const [x, y] = [found[1], found[2]].map((part) => (part.trim() === "" ? NaN : Number(part)));
    if (!Number.isFinite(x) || !Number.isFinite(y) || x < 0 || x > 1 || x < (points.at(-1)?.[0] ?? 0)) return null;
    points.push([x, y]);
  }
  return points;
}
