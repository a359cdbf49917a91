// Opens this pack's templates in the language of the page: the text of a note, titles of nodes and groups.
// `web/notes/LANGUAGE.json` has them by their English text, {notes, titles}. A graph without one of our notes,
// word for word, is left alone: it is the user's own.

import { app } from "../../../scripts/app.js";
import { language } from "./language.js";

async function texts() {
  const answer = await fetch(new URL(`../notes/${language()}.json`, import.meta.url));
  return answer.ok ? answer.json() : { notes: {}, titles: {} };
}

const isNote = (node) => ["Note", "MarkdownNote"].includes(node.type);

app.registerExtension({
  name: "ComfyUI-Diptych.Notes",
  async beforeConfigureGraph(workflow) {
    const graphs = [workflow, ...(workflow.definitions?.subgraphs ?? [])];
    const nodes = graphs.flatMap((graph) => graph.nodes ?? []);
    if (language() === "en" || !nodes.some(isNote)) return;
    const { notes, titles } = await texts();
    const ours = nodes.filter((node) => isNote(node) && Object.hasOwn(notes, node.widgets_values?.[0]));
    if (!ours.length) return;
    for (const note of ours) note.widgets_values = [notes[note.widgets_values[0]]];
    for (const titled of [...nodes, ...graphs.flatMap((graph) => graph.groups ?? [])]) {
      if (Object.hasOwn(titles, titled.title)) titled.title = titles[titled.title];
    }
  },
});
