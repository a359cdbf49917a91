// Opens ComfyUI's page, loads a workflow, runs it, and reports what a user would see, as one JSON line.
// node browser.cjs '{"playwright": ..., "chromium": ..., "url": ..., "workflow": ..., "screenshot": ..., "nodes": [...]}'
const fs = require("fs");

const task = JSON.parse(process.argv[2]);
const { chromium } = require(task.playwright);

async function main() {
  const browser = await chromium.launch({
    executablePath: task.chromium, headless: true, args: ["--no-sandbox", "--disable-gpu"],
  });
  const page = await browser.newPage({ viewport: { width: 1600, height: 900 } });
  const problems = [];
  page.on("pageerror", (error) => problems.push(String(error.stack || error)));
  await page.goto(task.url, { waitUntil: "domcontentloaded", timeout: 300000 });
  await page.waitForFunction(
    (nodes) => window.app?.graph && nodes.every((node) => window.LiteGraph?.registered_node_types[node]),
    task.nodes, { timeout: 300000 });

  const workflow = JSON.parse(fs.readFileSync(task.workflow, "utf8"));
  await page.evaluate((graph) => window.app.loadGraphData(graph), workflow);
  await page.evaluate(() => {  // the whole graph in view: pictures load only where they are drawn
    const boxes = window.app.graph._nodes.map((node) => node.getBounding());
    const left = Math.min(...boxes.map((b) => b[0])), top = Math.min(...boxes.map((b) => b[1]));
    const right = Math.max(...boxes.map((b) => b[0] + b[2])), bottom = Math.max(...boxes.map((b) => b[1] + b[3]));
    window.app.canvas.ds.fitToBounds([left, top, right - left, bottom - top], { zoom: 0.97 });
    window.app.canvas.setDirty(true, true);
  });
  const seen = await page.evaluate(() => window.app.graph._nodes.map((node) => ({
    type: node.type, missing: !window.LiteGraph.registered_node_types[node.type], errors: !!node.has_errors,
  })));

  const outcome = await page.evaluate(() => new Promise((resolve) => {
    const api = window.app.api;
    api.addEventListener("execution_success", () => resolve("success"));
    api.addEventListener("execution_error", (event) => resolve(event.detail.exception_message));
    window.app.queuePrompt(0, 1).then(() => {
      const errors = window.app.lastNodeErrors;
      if (errors && Object.keys(errors).length) resolve("the prompt was refused: " + JSON.stringify(errors));
    });
  }));
  await page.waitForFunction(
    () => window.app.graph._nodes.some((node) => node.imgs?.length && node.imgs.every((image) => image.complete)),
    null, { timeout: 300000 });
  const pictures = await page.evaluate(
    () => window.app.graph._nodes.flatMap((node) => node.imgs ?? []).map((image) => image.naturalHeight));

  if (task.screenshot) {
    await page.waitForTimeout(1000);
    await page.screenshot({ path: task.screenshot, type: "jpeg", quality: 80 });
  }
  const text = await page.evaluate(() => document.body.innerText);
  console.log(JSON.stringify({ seen, outcome, pictures, problems, missingDialog: /missing node/i.test(text) }));
  await browser.close();
}

main().catch((error) => { console.error(error); process.exit(1); });
