// Drives the page of `diptych web` for test_in_browser.py: `node browser.cjs TASK`, TASK as JSON {playwright,
// chromium, url, parts, image, instruction, steps, folder, screenshot, canvasShot}; prints one JSON line of
// what a visitor would see.
const path = require("path");

const task = JSON.parse(process.argv[2]);
const { chromium } = require(task.playwright);
const WAIT = { timeout: 600000 };  // a hang, not slowness: machines differ
const seen = {}, problems = [], strangers = new Set();
let page;

const show = (name) => page.getByRole("tab", { name, exact: true }).click(WAIT);
const press = (id) => page.locator(`#${id}`).click(WAIT);
const write = (id, text) => page.locator(`#${id} textarea, #${id} input`).first().fill(text, WAIT);
const step = (name) => process.stderr.write(`${name}\n`);

// The two images under a slider, once they are others than before.
async function slid(id, before = "") {
  const wait = `(() => {
    const images = [...document.querySelectorAll("#${id} img[src]")];  // loaded when they come into view
    const now = images.map((image) => image.src).join(" ");
    return images.length >= 2 && now !== ${JSON.stringify(before)} ? now : "";
  })()`;
  return (await page.waitForFunction(wait, null, WAIT)).jsonValue();
}

async function pixels(address) {
  return page.evaluate(async (src) => {
    const image = await createImageBitmap(await (await fetch(src)).blob());
    const canvas = new OffscreenCanvas(image.width, image.height), pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    return [image.width, image.height, [...pen.getImageData(0, 0, image.width, image.height).data]];
  }, address);
}

async function upload(id, file) {
  await page.locator(`#${id} input[type=file]`).first().setInputFiles(file, WAIT);
  await page.locator(`#${id} img`).first().waitFor(WAIT);
}

// What a note in the corner says, once it says this.
const toast = async (words) => (await page.waitForFunction(
  (part) => [...document.querySelectorAll(".toast-body")].map((e) => e.innerText).find((t) => t.includes(part)),
  words, WAIT)).jsonValue();
const enter = (id, value) => page.locator(`#${id} input[type=number]`).first().fill(String(value), WAIT);
const both = async (id) => Promise.all((await slid(id)).split(" ").slice(0, 2).map(pixels));

async function drag(from, to) {
  await page.mouse.move(...from);
  await page.mouse.down();
  await page.mouse.move((from[0] + to[0]) / 2, (from[1] + to[1]) / 2, { steps: 4 });
  await page.mouse.move(...to, { steps: 4 });
  await page.mouse.up();
}

async function middle(id) {
  const box = await page.locator(id).first().boundingBox();
  return [box.x + box.width / 2, box.y + box.height / 2, box];
}

async function editing() {
  await upload("edit-image", task.image);
  await write("edit-instruction", task.instruction);
  await enter("edit-steps", task.steps);
  await press("edit-run");
  seen.edit = await both("edit-slider");
  seen.report = await page.locator("#edit-report").innerText();

  const clip = () => page.evaluate(() => [...document.querySelectorAll("#edit-slider img")].map(
    (image) => getComputedStyle(image).clipPath + image.getAttribute("style")).join("|"));
  const [x, y, box] = await middle("#edit-slider .slider-wrap"), before = await clip();
  await drag([x, y], [x - box.width / 5, y]);
  seen.sliderMoved = (await clip()) !== before;
  if (task.screenshot) {
    const clip = { x: 0, y: 0, width: 1300, height: 1100 };
    await page.screenshot({ path: task.screenshot, type: "jpeg", quality: 80, clip });
  }

  await write("edit-instruction", "  ");
  await press("edit-run");
  seen.error = await toast("instruction");
  await page.locator(".toast-close").first().click(WAIT);

  await write("edit-instruction", task.instruction);
  await enter("edit-steps", 100);
  await press("edit-run");
  const running = () => /[2-9]\/100 steps/.test(document.querySelector("#edit-slider").innerText);
  await page.waitForFunction(running, null, WAIT);
  seen.progress = (await page.locator("#edit-slider").innerText()).replace(/\s+/g, " ");
  await press("edit-stop");
  seen.stopped = await toast("stopping at");
}

async function examples() {
  const before = await slid("edit-slider");
  await page.locator("#edit-examples tbody tr").nth(1).click(WAIT);
  await slid("edit-slider", before);
  seen.example = await page.locator("#edit-instruction textarea").inputValue();
}

const show_paint = () => show("Fill and outpaint");

async function filling() {
  await show_paint();
  await page.locator("#fill-image canvas").first().waitFor(WAIT);  // the editor takes an image from then on
  await page.locator("#fill-image input[type=file]").first().setInputFiles(task.image, WAIT);
  await page.waitForTimeout(1500);  // the editor fits the image to its frame
  const [x, y] = await middle("#fill-image canvas");
  await drag([x + 20, y + 20], [x + 90, y + 90]);
  await page.waitForTimeout(500);
  await write("fill-prompt", "a green background");
  await enter("fill-steps", task.steps);
  await press("fill-run");
  seen.fill = await both("fill-slider");
}

async function outpainting() {
  await show("Outpaint");
  await upload("outpaint-image", task.image);
  await write("outpaint-prompt", "a green background");
  await enter("outpaint-steps", task.steps);
  await press("outpaint-run");
  seen.outpaint = await both("outpaint-slider");
}

// A job waits behind another tab's and is taken out of the queue; the other goes on.
async function waiting() {
  const before = await slid("outpaint-slider");
  await show("Edit");
  await upload("edit-image", task.image);
  await write("edit-instruction", task.instruction);
  await enter("edit-steps", 100);
  await press("edit-run");
  const steps = () => Number((/(\d+)\/100 steps/.exec(document.querySelector("#edit-slider").innerText) || [0, 0])[1]);
  const reached = (n) => page.waitForFunction(`(${steps})() >= ${n}`, null, WAIT);
  await reached(1);
  await show_paint();
  await press("outpaint-run");
  await page.waitForFunction(() => /queue/.test(document.querySelector("#outpaint-slider").innerText), null, WAIT);
  await press("outpaint-stop");
  await show("Edit");
  const then = await page.evaluate(steps);
  await reached(then + 2);
  await press("edit-stop");
  await toast("stopping at");
  await page.waitForTimeout(3000);
  await show_paint();
  seen.takenOut = (await slid("outpaint-slider")) === before;
}

const readout = () => page.locator("#canvas-view .readout").innerText();
const shown = (now) => page.waitForFunction(
  (old) => { const n = document.querySelector("#canvas-view canvas").dataset.shown; return n && n !== old && n; },
  now, WAIT).then((handle) => handle.jsonValue());

async function canvas() {
  await show("Canvas");
  await upload("canvas-image", task.image);
  await press("canvas-begin");
  let number = await shown("");
  await write("canvas-prompt", "a green background");
  await enter("canvas-steps", task.steps);
  await page.waitForTimeout(500);
  seen.boxes = [await readout()];
  const [x, y, frame] = await middle("#canvas-view canvas");
  const zoom = Number(/zoom ([\d.]+)/.exec(seen.boxes[0])[1]);
  const half = frame.x + frame.width / 2 + 16 * zoom;  // of box and image together, from 0 to 96
  await drag([half, y], [half - 16 * zoom, y]);
  seen.boxes.push(await readout());
  await press("canvas-run");
  number = await shown(number);
  await page.locator("#canvas-view canvas").focus();
  for (const key of ["ArrowLeft", "ArrowUp", "ArrowUp"]) await page.keyboard.press(key);
  seen.boxes.push(await readout());
  await press("canvas-run");
  number = await shown(number);
  seen.twice = await exported("twice.png", "");
  if (task.canvasShot) await page.screenshot({ path: task.canvasShot, type: "jpeg", quality: 80 });

  await drag([frame.x + 15, frame.y + 15], [frame.x + 75, frame.y + 45]);
  await page.mouse.move(x, y);
  await page.mouse.wheel(0, 400);
  await page.waitForTimeout(300);
  seen.boxes.push(await readout());
  await press("canvas-undo");
  number = await shown(number);
  seen.boxes.push(await readout());
  seen.undone = await exported("undone.png", seen.twice);
}

// Saves what Export offers under a name in the task's folder; `old` is the address of the one before.
async function exported(name, old) {
  await press("canvas-export");
  const address = await (await page.waitForFunction(
    (before) => { const a = document.querySelector("#canvas-file a[href]"); return a && a.href !== before && a.href; },
    old, WAIT)).jsonValue();
  const [download] = await Promise.all([
    page.waitForEvent("download", WAIT), page.locator("#canvas-file a[href]").first().click(WAIT)]);
  await download.saveAs(path.join(task.folder, name));
  return address;
}

async function words() {
  await show("Generate and caption");
  await write("generate-prompt", "a red dinosaur circle");
  await enter("generate-count", 2);
  await enter("generate-steps", task.steps);
  await press("generate-run");
  seen.remark = await toast("not known");
  await page.waitForFunction(
    () => [...document.querySelectorAll("#generate-images img")].filter((i) => i.naturalWidth).length >= 2,
    null, WAIT);
  seen.generated = await page.evaluate(
    () => [...document.querySelectorAll("#generate-images img")].map((image) => image.naturalWidth));
  await upload("caption-image", task.image);
  await press("caption-run");
  await page.waitForFunction(() => document.querySelector("#caption-text textarea").value, null, WAIT);
  seen.caption = await page.locator("#caption-text textarea").inputValue();
}

async function main() {
  const browser = await chromium.launch({
    executablePath: task.chromium, headless: true, args: ["--no-sandbox", "--disable-gpu"],
  });
  const context = await browser.newContext({ viewport: { width: 1300, height: 1500 }, acceptDownloads: true });
  page = await context.newPage();
  page.setDefaultTimeout(WAIT.timeout);
  page.on("pageerror", (error) => problems.push(String(error.stack || error)));
  page.on("request", (request) => {
    const host = new URL(request.url()).host;
    if (/^http/.test(request.url()) && host !== new URL(task.url).host) strangers.add(host);
  });
  await page.goto(task.url, { waitUntil: "domcontentloaded", ...WAIT });
  await page.locator("#edit-run").waitFor(WAIT);
  for (const part of task.parts) { step(part); await parts[part](); }
  console.log(JSON.stringify({ ...seen, problems, strangers: [...strangers] }));
  await browser.close();
}

const parts = { editing, examples, show_paint, filling, outpainting, waiting, canvas, words };
main().catch(async (error) => {
  process.stderr.write(`${error.stack || error}\n${JSON.stringify({ seen: Object.keys(seen), problems })}\n`);
  if (page && task.folder) await page.screenshot({ path: path.join(task.folder, "failed.png") }).catch(() => {});
  process.exit(1);
});
