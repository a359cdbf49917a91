// Shows the options of this pack's menus in the language of the page: ComfyUI translates names and tooltips by
// itself, options not. Only what is displayed changes; widgets and saved workflows keep the values.
// Pages from before ComfyUI 0.8 ask for no labels: there the menus of the canvas show the values.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { language } from "./language.js";
import { kind } from "./outputs.js";

let texts = {};  // what the packs' locales/ hold: {language: {nodeDefs: {node: {inputs: {input: {options}}}}}}

app.registerExtension({
  name: "comfyuidiptych.Options",
  async init() {
    const answer = await api.fetchApi("/i18n");
    if (answer.ok) texts = await answer.json();
  },
  nodeCreated(node) {
    if (language() === "en" || !kind(node)?.startsWith("Diptych")) return;
    const inputs = texts[language()]?.nodeDefs?.[kind(node)]?.inputs ?? {};
    for (const widget of node.widgets ?? []) {
      const options = inputs[widget.name]?.options;
      if (options) widget.options.getOptionLabel = (value) => options[value] ?? value ?? "";
    }
  },
});
