// Widgets that stand on "auto": numbers that workflows saved before they did are shown as what they mean,
// and the training nodes say in words what auto is for the recipe and the base model that are chosen.

import { app } from "../../../scripts/app.js";

const widgets = new Map();  // of a node's class: {input: its options}

/** "auto" where a value is the number that used to stand for it; every number as text. */
function readable(value, unset) {
  if (typeof value === "number" || (typeof value === "string" && value.trim() && !isNaN(value))) {
    return Number(value) === unset ? "auto" : String(value);
  }
  return value;
}

function read(node) {
  for (const widget of node.widgets ?? []) {
    const meant = widgets.get(node.comfyClass)?.[widget.name]?.automatic;
    if (meant) widget.value = readable(widget.value, meant.unset);
  }
}

function tell(node) {
  const value = (name) => node.widgets?.find((widget) => widget.name === name)?.value;
  const meant = widgets.get(node.comfyClass)?.base_model?.meant?.[value("base_model")];
  const words = meant?.[value("preset") ?? value("recipe")];
  if (node.diptychNote) node.diptychNote.textContent = words ? `auto: ${words}` : "";
}

app.registerExtension({
  name: "comfyuidiptych.Auto",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!String(nodeData.name).startsWith("Diptych")) return;
    const inputs = { ...nodeData.input?.required, ...nodeData.input?.optional };
    widgets.set(nodeData.name, Object.fromEntries(Object.entries(inputs).map(([name, spec]) => [name, spec[1] ?? {}])));
  },
  nodeCreated(node) {
    const options = widgets.get(node.comfyClass);
    if (!options) return;
    const configured = node.onConfigure;
    node.onConfigure = function () {
      configured?.apply(this, arguments);
      read(this);
      tell(this);
    };
    if (!options.base_model?.meant) return;
    for (const widget of node.widgets.filter(({ name }) => ["base_model", "preset", "recipe"].includes(name))) {
      const chosen = widget.callback;
      widget.callback = function () {
        const answer = chosen?.apply(this, arguments);
        tell(node);
        return answer;
      };
    }
    queueMicrotask(() => tell(node));  // when every extension has had its turn
  },
});
