// Bars to be dragged, by group: strengths of blocks or sites of a model. Dragging across several paints them.

import { clamp, drag, h, numberField, shown } from "./shared.js";

const HEIGHT = 72; // pixels of a bar at the greatest value

/** Rules `[{where, factor}]` as the text that the server reads. */
export function textOf(rules) {
  return rules.map(({ where, factor }) => `${where}: ${factor}`).join(", ");
}

/**
 * Show `bars`, `[{group, key, label, low, high}]`, by group, and write what the user makes of them into `rules`, those that the
 * server read of the text. `whole(group)` is what a rule calls a whole group; `change(text)` is called with every new text,
 * also while the user drags, and `done()` when they let go.
 */
export function barsOfRules(bars, { rules, whole, change, done }) {
  const groups = new Map();
  for (const bar of bars) groups.set(bar.group, [...(groups.get(bar.group) ?? []), bar]);
  const replace = (wheres, values) => {
    rules = rules.filter(({ where }) => !wheres.has(where));
    for (const [where, factor] of values) rules.push({ where, factor });
    change(textOf(rules));
  };
  return barsOf([...groups].map(([name, bars]) => ({ name, bars })), {
    change: (values) => replace(new Set(values.keys()), values),
    done,
    setGroup({ name, bars }, factor) {
      replace(new Set([...bars.map((bar) => bar.key), whole(name)]), [[whole(name), factor]]);
      done();
    },
  });
}

/** Put `bars` in place of those in `place`; the keyboard stays where it was. */
export function putBars(place, bars) {
  const stops = () => [...place.querySelectorAll("[tabindex], input")];
  const at = stops().indexOf(document.activeElement);
  place.replaceChildren(bars);
  if (at >= 0) stops()[at]?.focus();
}

/**
 * Show `groups`: `[{name, bars: [{key, label, low, high}]}]`, where low and high differ if what a bar stands for has
 * several values. `change(values)` is called while the user drags, with a Map of the keys that changed, and `done()` when
 * they let go; `setGroup(group, value)` when a whole group gets one value.
 */
function barsOf(groups, { top = 2, change, done, setGroup }) {
  const status = h("div", { class: "image-prompt-note", role: "status" }, "drag a bar, or across several; arrow keys, 0 and 1");
  const all = groups.flatMap((group) => group.bars);
  const high = Math.max(top, ...all.map((bar) => bar.high));
  const low = Math.min(0, ...all.map((bar) => bar.low));
  const bars = new Map();

  const tell = (bar) => {
    const range = bar.low === bar.high ? shown(bar.low) : `${shown(bar.low)} to ${shown(bar.high)}`;
    status.textContent = `${bar.label}: ${range}`;
    return range;
  };
  const draw = (bar, element) => {
    const part = (value) => (100 * (value - low)) / (high - low);
    const [from, to] = [Math.min(0, bar.low), Math.max(0, bar.high)];
    const fill = element.firstElementChild;
    fill.style.bottom = `${part(from)}%`;
    fill.style.height = `${Math.max(part(to) - part(from), 2)}%`;
    fill.classList.toggle("image-prompt-mixed", bar.low !== bar.high);
    element.setAttribute("aria-valuenow", shown(bar.high));
    element.setAttribute("aria-valuetext", tell(bar));
  };
  const set = (pairs) => {
    const changed = new Map();
    for (const [bar, value] of pairs) {
      const rounded = Math.round(clamp(value, -20, 20) * 20) / 20;
      if (bar.low === rounded && bar.high === rounded) continue;
      bar.low = bar.high = rounded;
      changed.set(bar.key, rounded);
      draw(bar, bars.get(bar));
    }
    if (changed.size) change(changed);
    return changed.size > 0;
  };
  const valueAt = (y, element) => {
    const box = element.getBoundingClientRect();
    return clamp(low + ((box.bottom - y) / box.height) * (high - low), low, high);
  };

  for (const bar of all) {
    const element = h(
      "div",
      {
        class: "image-prompt-bar", role: "slider", tabindex: 0, "aria-label": bar.label, "aria-orientation": "vertical",
        "aria-valuemin": low, "aria-valuemax": high,
        onfocus: () => tell(bar),
        onpointerenter: () => tell(bar),
        onpointerdown(event) {
          if (event.button !== 0) return;
          set([[bar, valueAt(event.clientY, element)]]);
          drag(event, {
            move(next) {
              const under = [...bars].find(([, other]) => {
                const box = other.getBoundingClientRect();
                return next.clientX >= box.left && next.clientX < box.right;
              });
              const [hit, over] = under ?? [bar, element];
              set([[hit, valueAt(next.clientY, over)]]);
            },
            end: () => done(),
          });
        },
        onkeydown(event) {
          const to = { ArrowUp: bar.high + 0.05, ArrowDown: bar.high - 0.05, Home: 0, End: high, 0: 0, 1: 1 }[event.key];
          if (to === undefined) return;
          event.preventDefault();
          if (set([[bar, to]])) done();
        },
      },
      h("div", { class: "image-prompt-bar-fill" }),
    );
    bars.set(bar, element);
    draw(bar, element);
  }
  status.textContent = "drag a bar, or across several; arrow keys, 0 and 1";

  const element = h(
    "div",
    { class: "image-prompt-bars" },
    ...groups.map((group) =>
      h(
        "div",
        { class: "image-prompt-group", role: "group", "aria-label": group.name, style: `flex-grow: ${group.bars.length}` },
        h("div", { class: "image-prompt-columns" }, ...group.bars.map((bar) => bars.get(bar))),
        h(
          "div",
          { class: "image-prompt-line" },
          h("span", { class: "image-prompt-note" }, group.name),
          group.bars.length > 1
            ? numberField({
                label: `all of ${group.name}`,
                value: same(group.bars),
                empty: "…",
                change: (value) => value != null && setGroup(group, value),
              })
            : null,
        ),
      ),
    ),
  );
  return h("div", {}, element, status);
}

function same(bars) {
  const values = new Set(bars.flatMap((bar) => [bar.low, bar.high]));
  return values.size === 1 ? [...values][0] : null;
}

const STYLE = `
.image-prompt-bars { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: flex-start; }
.image-prompt-group { display: flex; flex-direction: column; }
.image-prompt-columns { display: flex; gap: 1px; height: ${HEIGHT}px; }
.image-prompt-bar { position: relative; flex: 1 1 10px; min-width: 5px; max-width: 28px; background: color-mix(in srgb, var(--input-text) 12%, transparent); border-radius: 2px; cursor: ns-resize; touch-action: none; }
.image-prompt-bar-fill { position: absolute; left: 0; right: 0; background: var(--p-primary-color, #4a9eff); border-radius: 2px; pointer-events: none; }
.image-prompt-mixed { background: repeating-linear-gradient(45deg, var(--p-primary-color, #4a9eff) 0 3px, transparent 3px 6px); }
`;
document.head.append(h("style", {}, STYLE));
