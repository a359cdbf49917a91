// The pack in the page's language: {workflow, vue}. What each node calls itself, its inputs, options and outputs;
// the notes and titles of the workflow as it opened; in Nodes 2.0 the words in the page; what is sent to be run.
module.exports = async (page, task, { load }) => {
  await load(page, task.workflow, task.vue);
  const nodes = await page.evaluate((types) => Object.fromEntries(types.map((type) => {
    const node = window.LiteGraph.createNode(type), definition = node.constructor.nodeData;
    const menus = (node.widgets ?? []).filter((widget) => widget.type === "combo");
    return [type, {
      title: node.title, category: definition.category, description: definition.description,
      inputs: Object.fromEntries((node.inputs ?? []).map((slot) => [slot.name, slot.localized_name])),
      widgets: Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.label])),
      outputs: (node.outputs ?? []).map((slot) => slot.localized_name),
      options: Object.fromEntries(menus.map((widget) => [widget.name, Object.fromEntries(
        widget.options.values.map((value) => [value, widget.options.getOptionLabel?.(value) ?? value]))])),
      shown: Object.fromEntries(menus.map((widget) => [widget.name, [widget.value, widget._displayValue]])),
    }];
  })), task.nodes);
  const text = await page.evaluate(() => [...document.querySelectorAll("[data-node-id]")].map((e) => e.innerText).join("\n"));
  const sent = await page.evaluate(async () => (await window.app.graphToPrompt()).output);
  const opened = await page.evaluate(() => ({
    notes: window.app.graph._nodes.filter((node) => node.type === "MarkdownNote").map((node) => node.widgets[0].value),
    titles: [...window.app.graph._nodes, ...window.app.graph._groups].map((titled) => titled.title),
  }));
  return { nodes, ...opened, text, sent };
};
