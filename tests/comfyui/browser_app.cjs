// A template that opens as an app: what it offers, and what its own Run button brings up.
// task: {workflow, name}
const fs = require("fs");

module.exports = async (page, task) => {
  const workflow = JSON.parse(fs.readFileSync(task.workflow, "utf8"));
  await page.evaluate(([graph, name]) => window.app.loadGraphData(graph, true, true, name, { openSource: "template" }),
    [workflow, task.name]);
  const widgets = page.getByTestId("app-mode-widget-item");
  await widgets.first().waitFor({ timeout: 120000 });
  const skip = page.getByText("Skip", { exact: true });  // the tour of apps, once
  await skip.click({ timeout: 15000 }).catch(() => {});
  const labels = await page.getByTestId("builder-widget-label").allTextContents();
  const outcome = page.evaluate(() => new Promise((resolve) => {
    window.app.api.addEventListener("execution_success", () => resolve("success"));
    window.app.api.addEventListener("execution_error", (event) => resolve(event.detail.exception_message));
    setTimeout(() => resolve(`nothing ran: ${document.body.innerText.slice(-600)}`), 120000);
  }));
  await page.getByRole("button", { name: "Run", exact: true }).last().click();
  const answer = { labels: labels.map((label) => label.trim()), outcome: await outcome };
  if (answer.outcome !== "success") return answer;
  const image = page.getByTestId("linear-image-output").last();
  await image.waitFor({ timeout: 60000 });
  const width = await page.waitForFunction(() => {
    const shown = [...document.querySelectorAll("[data-testid=linear-image-output]")];
    return Math.max(...shown.map((one) => one.naturalWidth || 0));
  }, null, { timeout: 60000 });
  return { ...answer, width: await width.jsonValue() };
};
