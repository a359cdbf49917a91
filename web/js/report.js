// The report of a node as text in the node, in both renderers: of every node of the pack that returns one, or captions.

import { app } from "../../../scripts/app.js";
import { kind, register, said, style } from "./outputs.js";

const NAME = "diptych_report";
const HEIGHT = 90;  // pixels; on the canvas the least: there a box takes what the node has to spare

style(`
.${NAME} { box-sizing: border-box; width: 100%; height: 100%; min-height: ${HEIGHT}px; overflow: auto;
  padding: 4px 8px; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; user-select: text;
  font: 11px/1.4 ui-monospace, monospace; color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #222); }
.${NAME}_note { opacity: 0.7; }
.${NAME}_text:empty::before { content: attr(data-empty); opacity: 0.5; }
[data-node-id] .${NAME} { max-height: ${HEIGHT}px; }`);

function wants(node) {
  return String(kind(node)).startsWith("Diptych") && !!node.outputs?.some((slot) => ["report", "captions"].includes(slot.name));
}

function create(node) {
  const box = document.createElement("div"), note = document.createElement("div"), text = document.createElement("div");
  box.className = NAME;
  box.append(note, text);
  note.className = `${NAME}_note`;
  text.className = `${NAME}_text`;
  text.dataset.empty = said("The report comes here when it has run.", "运行后在此显示报告。");
  box.dataset.captureWheel = "true";  // the wheel scrolls the text, it does not zoom the canvas
  box.addEventListener("wheel", (event) => {
    if (box.scrollHeight > box.clientHeight) event.stopPropagation();
  });
  const widget = node.addDOMWidget(NAME, NAME, box, {
    serialize: false, getMinHeight: () => HEIGHT, getValue: () => text.textContent, setValue: () => {},
  });
  widget.serialize = false;  // no value of the workflow either
  Object.assign(node, { diptychReport: text, diptychNote: note });
}

function show(node, output) {
  if (!node.diptychReport || !output.text) return;
  node.diptychReport.textContent = [output.text].flat().join("\n");
  app.canvas?.setDirty(true, true);
}

register("Report", wants, create, show);
