// A shared workflow whose nodes have replacements, by a user's clicks: {workflow, becomes: ids of ours}.
module.exports = async (page, task, { load, execute }) => {
  await load(page, task.workflow);
  await page.getByRole("button", { name: "View details" }).first().click({ timeout: 120000 });
  await page.getByRole("button", { name: "Replace All" }).first().click({ timeout: 120000 });
  await page.waitForFunction(
    (ids) => ids.every((id) => window.app.graph._nodes.some(({ type }) => type === id)),
    task.becomes, { timeout: 120000 });
  const missing = await page.evaluate(() => window.app.graph._nodes
    .map(({ type }) => type).filter((type) => !window.LiteGraph.registered_node_types[type]));
  return { missing, outcome: await execute(page) };
};
