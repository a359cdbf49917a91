// A blueprint as a user gets it: searched by a word, put on the canvas, wired to an image, run.
// task: {word, vue, values: {input: value}, source: {type, values}, links: {input: slot of the source}}
module.exports = async (page, task, { execute }) => {
  await page.evaluate(async (on) => {
    const { app } = window;
    await app.extensionManager.setting.set("Comfy.VueNodes.Enabled", on);
    await app.loadGraphData({ nodes: [], links: [], version: 0.4, extra: {} });
    Object.assign(app.canvas.ds, { scale: 1, offset: [0, 0] });
  }, task.vue);
  const canvas = page.locator("#graph-canvas");
  await canvas.dblclick({ position: { x: 700, y: 450 } });
  await page.locator("input[type=text]:visible").last().waitFor({ timeout: 60000 });
  await page.keyboard.type(task.word, { delay: 20 });
  await page.waitForFunction((name) => document.body.innerText.includes(name), task.name, { timeout: 60000 });
  const found = await page.evaluate(() => document.body.innerText);
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => window.app.graph._nodes.some((node) => node.subgraph), null, { timeout: 60000 });
  const widgets = await page.evaluate(({ values, source, links }) => {
    const { app, LiteGraph } = window, node = app.graph._nodes[0];
    const given = LiteGraph.createNode(source.type), save = LiteGraph.createNode("SaveImage");
    [given, save].forEach((other) => app.graph.add(other));
    given.pos = [node.pos[0] - 500, node.pos[1]];
    save.pos = [node.pos[0] + 500, node.pos[1]];
    const set = (which, all) => Object.entries(all).forEach(([name, value]) => {
      const widget = which.widgets.find((one) => one.name === name);
      widget.value = value;
      widget.callback?.(value);
    });
    set(given, source.values);
    set(node, values);
    for (const [name, slot] of Object.entries(links)) {
      given.connect(slot, node, node.inputs.findIndex((input) => input.name === name));
    }
    node.connect(0, save, 0);
    return node.widgets.map((widget) => widget.label || widget.name);
  }, task);
  const saved = page.evaluate(() => new Promise((resolve) => {
    window.app.api.addEventListener("executed", ({ detail }) => {
      if (detail.output?.images) resolve(detail.output.images[0].filename);
    });
  }));
  const outcome = await execute(page);
  return { found, widgets, outcome, image: outcome === "success" ? await saved : null };
};
