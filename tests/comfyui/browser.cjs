// Drives ComfyUI's page for test_browser.py: `node browser.cjs TASK`, TASK as JSON; prints one JSON line.
// Every task: {do, playwright, chromium, url, nodes: ids that must be registered}.
//   do "run": {workflow, vue, screenshot}: load it, run it, report what a user would see.
//   do "measure": {workflows: {name: file}, screenshots}: the boxes of every node in both renderers, with
//   the previews and texts that a run would leave, at zoom 1.
//   others: `browser_NAME.cjs`, a function (page, task, {load, execute}).
const fs = require("fs");

const task = JSON.parse(process.argv[2]);
const { chromium } = require(task.playwright);
const WAIT = { timeout: 300000 };

async function main() {
  const browser = await chromium.launch({
    executablePath: task.chromium, headless: true, args: ["--no-sandbox", "--disable-gpu"],
  });
  const viewport = task.screenshots ? { width: 4200, height: 2200 } : { width: 1600, height: 900 };
  const page = await browser.newPage({ viewport });
  const problems = [];
  page.on("pageerror", (error) => problems.push(String(error.stack || error)));
  await page.goto(task.url, { waitUntil: "domcontentloaded", timeout: 300000 });
  await page.waitForFunction(
    (nodes) => window.app?.graph && nodes.every((node) => window.LiteGraph?.registered_node_types[node]),
    task.nodes, WAIT);
  const act = { measure: measureAll, run }[task.do] ?? require(`./browser_${task.do}.cjs`);
  const answer = await act(page, task, { load, execute });
  console.log(JSON.stringify({ ...answer, problems }));
  await browser.close();
}

// Load a workflow, a file or a graph, in one of the two renderers, and see all of it.
async function load(page, file, vue) {
  await page.evaluate((on) => window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", on), !!vue);
  const workflow = typeof file === "string" ? JSON.parse(fs.readFileSync(file, "utf8")) : file;
  await page.evaluate((graph) => window.app.loadGraphData(graph), workflow);
  await page.waitForFunction(
    ([count, dom]) => window.app.graph._nodes.length === count
      && (!dom || document.querySelectorAll("[data-node-id]").length >= count),
    [workflow.nodes.length, !!vue], WAIT);
  await page.evaluate(() => {  // the whole graph in view: images load only where they are drawn
    const boxes = window.app.graph._nodes.map((node) => node.getBounding());
    const left = Math.min(...boxes.map((b) => b[0])), top = Math.min(...boxes.map((b) => b[1]));
    const right = Math.max(...boxes.map((b) => b[0] + b[2])), bottom = Math.max(...boxes.map((b) => b[1] + b[3]));
    window.app.canvas.ds.fitToBounds([left, top, right - left, bottom - top], { zoom: 0.97 });
    window.app.canvas.setDirty(true, true);
  });
}

// Queue what is loaded and wait for its end: "success", or what went wrong.
async function execute(page) {
  return page.evaluate(() => new Promise((resolve) => {
    const api = window.app.api;
    api.addEventListener("execution_success", () => resolve("success"));
    api.addEventListener("execution_error", (event) => resolve(event.detail.exception_message));
    api.addEventListener("execution_interrupted", () => resolve("interrupted"));
    window.app.queuePrompt(0, 1).then(() => {
      const errors = window.app.lastNodeErrors;
      if (errors && Object.keys(errors).length) resolve("the prompt was refused: " + JSON.stringify(errors));
    });
  }));
}

async function run(page) {
  await load(page, task.workflow, task.vue);
  const seen = await page.evaluate(() => window.app.graph._nodes.map((node) => ({
    type: node.type, missing: !window.LiteGraph.registered_node_types[node.type], errors: !!node.has_errors,
  })));
  const outcome = await execute(page);
  const shown = () => {  // drawn on the canvas, or in Nodes 2.0 by the page
    const drawn = window.app.graph._nodes.flatMap((node) => node.imgs ?? []);
    return [...drawn, ...document.querySelectorAll("[data-node-id] img")];
  };
  await page.waitForFunction(`(${shown})().length && (${shown})().every((image) => image.complete)`, null, WAIT);
  const images = await page.evaluate(`(${shown})().map((image) => image.naturalHeight)`);
  if (task.screenshot) {
    await page.waitForTimeout(1000);
    await page.screenshot({ path: task.screenshot, type: "jpeg", quality: 80 });
  }
  const text = await page.evaluate(() => document.body.innerText);
  return { seen, outcome, images, missingDialog: /missing node/i.test(text) };
}

async function measureAll(page) {
  const measured = {};
  for (const renderer of ["litegraph", "vue"]) {
    for (const [name, file] of Object.entries(task.workflows)) {
      const workflow = JSON.parse(fs.readFileSync(file, "utf8"));
      delete workflow.extra.linearMode;  // an app's nodes are behind it
      await load(page, workflow, renderer === "vue");
      await page.evaluate(pretendToHaveRun);
      let before, boxes = null;
      do {
        before = boxes;
        await page.waitForTimeout(150);
        boxes = await page.evaluate(measure);
      } while (JSON.stringify(before) !== JSON.stringify(boxes));
      (measured[name] ??= {})[renderer] = boxes;
      if (task.screenshots) await page.screenshot({ path: `${task.screenshots}/${name}_${renderer}.png` });
    }
  }
  return { measured };
}

// What a run would leave on the nodes: images, texts, the line under the Early Filter Sampler.
function pretendToHaveRun() {
  const { app } = window, images = [{ filename: "example.png", subfolder: "", type: "input" }];
  const text = ["one line\nand another\n".repeat(10)];
  const ui = {
    PreviewAny: { text: ["one line\nand another"] }, SaveImage: { images: images }, PreviewImage: { images: images },
    DiptychRewardScore: { images, text }, DiptychEditScore: { images, text }, DiptychGRPOLoraLoader: { text },
    DiptychTrainLora: { images: [...images, ...images], text },
    DiptychTrainGRPO: { images: [...images, ...images], text },
    DiptychCompare: { a_images: images, b_images: images },
    DiptychTokenInspector: { images, text }, DiptychShapeWalk: { images, text }, DiptychSchedulePlot: { images, text },
  };
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [60, 60];
  for (const { id, type } of app.graph._nodes) {
    const node = String(id);
    if (ui[type]) {
      app.api.dispatchCustomEvent("executed", { node, display_node: node, prompt_id: "none", output: ui[type] });
    }
    if (type === "DiptychEarlyFilterSampler") {
      app.api.dispatchCustomEvent("progress_text", { nodeId: node, text: "kept seed 2\n32 model evaluations" });
    }
  }
  app.canvas.setDirty(true, true);
}

// {nodes: {id: {type, box}}, groups: {title: box}}, boxes [left, top, width, height] in the graph's units.
function measure() {
  const { graph, canvas } = window.app, nodes = {}, groups = {};
  const origin = document.querySelector("canvas#graph-canvas, canvas").getBoundingClientRect();
  for (const node of graph._nodes) {
    const element = document.querySelector(`[data-node-id="${node.id}"]`);
    let box = [...node.getBounding()];
    if (element) {  // Nodes 2.0: as large as what it holds
      const parts = [element, ...element.querySelectorAll("*")].filter((e) => getComputedStyle(e).position !== "absolute");
      const outer = element.getBoundingClientRect();
      const bottom = Math.max(...parts.map((e) => e.getBoundingClientRect()).filter((r) => r.height).map((r) => r.bottom));
      const { scale, offset } = canvas.ds;
      box = [(outer.left - origin.left) / scale - offset[0], (outer.top - origin.top) / scale - offset[1],
        outer.width / scale, (bottom - outer.top) / scale];
    }
    nodes[node.id] = { type: node.type, box };
  }
  for (const group of graph._groups) groups[group.title] = [...group._bounding];
  return { nodes, groups };
}

main().catch((error) => { console.error(error); process.exit(1); });
