// What the pack's widgets share: they show what a run left on a node, also when its workflow opens again.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { language } from "./language.js";

/** The address of an image that a node's answer names: {filename, subfolder, type}. */
export function address(image) {
  return api.apiURL(`/view?${new URLSearchParams(image)}`);
}

/** A text in the language of the page. */
export function said(english, chinese) {
  return language().startsWith("zh") ? chinese : english;
}

/** The node of a key in the page's table of outputs: "7", or inside a subgraph "its-id:7". */
function located(locator) {
  const [id, ...inside] = String(locator).split(":").reverse();
  const root = app.rootGraph ?? app.graph;
  const graph = inside.length ? root?.subgraphs?.get(inside.reverse().join(":")) : root;
  return graph?.getNodeById(Number(id));
}

/**
 * Registers an extension. wants(node): is it one of ours? create(node): as it appears on the canvas.
 * show(node, output): after a run, with what the node's Python returned as `ui`.
 */
export function register(name, wants, create, show) {
  app.registerExtension({
    name: `comfyuidiptych.${name}`,
    nodeCreated(node) {
      if (!wants(node)) return;
      create(node);
      const before = node.onExecuted;
      node.onExecuted = function (output) {
        before?.apply(this, arguments);
        show(node, output ?? {});
      };
    },
    onNodeOutputsUpdated(outputs) {
      for (const [locator, output] of Object.entries(outputs ?? {})) {
        const node = located(locator);
        if (node && wants(node)) show(node, output ?? {});
      }
    },
  });
}

/** The id of a node's class, "DiptychBuilder". */
export function kind(node) {
  return node.comfyClass ?? node.type;
}

/** Rules for classes of the pack's own, in a sheet of its own: the page's document stays as it is. */
export function style(rules) {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(rules);
  document.adoptedStyleSheets.push(sheet);
}
