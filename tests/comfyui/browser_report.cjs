// The report on a node, in one renderer: {vue, workflow, type}. What it says, and whether it can be seen.
module.exports = async (page, task, { load, execute }) => {
  await load(page, task.workflow, task.vue);
  const find = `window.app.graph._nodes.find((one) => one.type === "${task.type}")`;
  const saved = () => page.evaluate(`${find}.serialize().widgets_values ?? []`);
  const before = await saved();
  const outcome = await execute(page);
  await page.waitForFunction(`${find}.diptychReport.textContent`);
  await page.evaluate(() => window.app.canvas.draw(true, true));
  await page.waitForTimeout(500);
  const seen = await page.evaluate(`(() => {
    const box = ${find}.diptychReport, { width, height } = box.getBoundingClientRect();
    return { text: box.textContent, visible: box.isConnected && width > 50 && height > 20 };
  })()`);
  if (task.screenshot) await page.screenshot({ path: task.screenshot });
  await load(page, await page.evaluate(() => window.app.graph.serialize()), task.vue);
  return { outcome, before, after: await saved(), ...seen };
};
