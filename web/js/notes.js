// Opens this pack's templates in the language of the page: notes, titles of nodes and groups, what a subgraph's
// slots and an app's inputs are called. `web/notes/LANGUAGE.json` has them by their English text, {notes, titles}.
// A graph without one of our notes, word for word, is left alone: it is the user's own.

import { app } from "../../../scripts/app.js";
import { language } from "./language.js";

async function texts() {
  const answer = await fetch(new URL(`../notes/${language()}.json`, import.meta.url));
  return answer.ok ? answer.json() : { notes: {}, titles: {} };
}

const isNote = (node) => ["Note", "MarkdownNote"].includes(node.type);

/** Replaces holder[key] by its translation, if there is one; `fallback` is the English text where the key is empty. */
function translate(holder, key, table, fallback) {
  const text = holder[key] ?? fallback;
  if (Object.hasOwn(table, text)) holder[key] = table[text];
}

app.registerExtension({
  name: "comfyuidiptych.Notes",
  async beforeConfigureGraph(workflow) {
    const subgraphs = workflow.definitions?.subgraphs ?? [], graphs = [workflow, ...subgraphs];
    const nodes = graphs.flatMap((graph) => graph.nodes ?? []);
    if (language() === "en" || !nodes.some(isNote)) return;
    const { notes, titles } = await texts();
    const ours = nodes.filter((node) => isNote(node) && Object.hasOwn(notes, node.widgets_values?.[0]));
    if (!ours.length) return;
    for (const note of ours) translate(note.widgets_values, 0, notes);
    for (const titled of [...nodes, ...graphs.flatMap((graph) => graph.groups ?? [])]) translate(titled, "title", titles);
    const named = nodes.filter((node) => subgraphs.some((graph) => graph.id === node.type));
    for (const holder of [...subgraphs, ...named]) {
      for (const slot of [...(holder.inputs ?? []), ...(holder.outputs ?? [])]) translate(slot, "label", titles, slot.name);
    }
    for (const [, , shown] of workflow.extra?.linearData?.inputs ?? []) translate(shown ?? {}, "description", titles);
  },
});
