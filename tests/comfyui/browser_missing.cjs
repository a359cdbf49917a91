// do "missing" of browser.cjs: {workflows: {name: {file, offers: ["NAME\nFOLDER\nDownload"]}}}: opens each as the
// template page does and answers with what its list of missing models does not offer, {name: [offer]}.
const fs = require("fs");

module.exports = async function missing(page, task) {
  const lacks = {};
  for (const [name, { file, offers }] of Object.entries(task.workflows)) {
    const workflow = JSON.parse(fs.readFileSync(file, "utf8"));
    await page.evaluate(([graph, title]) => window.app.loadGraphData(graph, true, true, title), [workflow, name]);
    const details = page.getByText("View details").first();
    const listed = () => page.evaluate((all) => all.filter((offer) => !document.body.innerText.includes(offer)), offers);
    for (let tries = 0; tries < 60 && (lacks[name] = await listed()).length; tries++) {
      if (await details.isVisible()) await details.click();
      await page.waitForTimeout(500);
    }
  }
  return { lacks };
};
