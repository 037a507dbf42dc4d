// The sliders of the attributes that can be edited, as /v1/model lists them.

import { element } from "./tiles.js";

const MOST = 3; // standard deviations, in either direction
const list = document.getElementById("edit-list");
const sliders = () => [...list.querySelectorAll("input")];

/** A slider for each attribute; what an edit costs, as it was measured, is said below it. */
export function showEdits(edits) {
  document.getElementById("edits").hidden = !edits.length;
  list.replaceChildren(
    ...edits.map(({ name, meaning, costs }) => {
      const id = `edit-${name}`;
      const slider = element("input", { id, type: "range", min: -MOST, max: MOST, step: 0.25, value: 0, title: `To the right: ${meaning}.` });
      slider.dataset.name = name;
      slider.dataset.costs = JSON.stringify(costs);
      const label = element("label", { htmlFor: id, textContent: name.replaceAll("_", " ") });
      const value = element("output", { htmlFor: id });
      const cost = element("span", { className: "hint cost" });
      return element("p", { className: "control" }, label, value, slider, cost);
    }),
  );
}

/** The edits as the API takes them: "smile=1.5,pitch=-1". */
export function editOf() {
  return sliders()
    .filter(({ value }) => Number(value))
    .map(({ dataset, value }) => `${dataset.name}=${value}`)
    .join(",");
}

/** Set the sliders to such edits; those that are not named to 0. */
export function setEdits(text) {
  const wanted = new Map((text ?? "").split(",").map((part) => part.split("=")));
  for (const slider of sliders()) slider.value = Number(wanted.get(slider.dataset.name)) || 0;
  if (wanted.size && editOf()) document.getElementById("edits").open = true;
}

/** Show the strengths beside the sliders, and what the nearest measured edit did. */
export function showEditValues() {
  for (const slider of sliders()) {
    const strength = Number(slider.value);
    const [output, cost] = ["output", ".cost"].map((selector) => slider.parentElement.querySelector(selector));
    output.textContent = strength > 0 ? `+${slider.value}` : slider.value;
    const measured = Object.entries(JSON.parse(slider.dataset.costs)).filter(([at]) => Number(at) * strength > 0);
    measured.sort(([a], [b]) => Math.abs(a - strength) - Math.abs(b - strength));
    cost.textContent = measured.length ? `At ${measured[0][0]}: ${measured[0][1]}` : "";
  }
}
