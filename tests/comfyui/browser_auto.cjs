// A training node saved while its widgets were numbers, in one renderer: {vue, workflow, type, presets}.
// What its widgets say, what a run would be told, and the node's words on auto for each preset.
module.exports = async (page, task, { load }) => {
  await load(page, task.workflow, task.vue);
  const find = `window.app.graph._nodes.find((one) => one.type === "${task.type}")`;
  const values = await page.evaluate(`Object.fromEntries(${find}.widgets.map((one) => [one.name, one.value]))`);
  const sent = await page.evaluate(async () => Object.values((await window.app.graphToPrompt()).output));
  const words = {};
  for (const preset of task.presets) {
    words[preset] = await page.evaluate(`(() => {
      const node = ${find}, widget = node.widgets.find((one) => one.name === "preset");
      widget.value = "${preset}";
      widget.callback?.(widget.value);
      return node.diptychNote.textContent;
    })()`);
  }
  return { values, sent: sent.find((one) => one.class_type === task.type).inputs, words };
};
