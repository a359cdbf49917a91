// Before and After in one renderer: {vue, workflow}. Where the mouse is, the two images meet.
module.exports = async (page, task, { load, execute }) => {
  await load(page, task.workflow, task.vue);
  const outcome = await execute(page);
  const node = () => window.app.graph._nodes.find((one) => one.type === "DiptychCompare");
  const value = await page.evaluate(`(${node})().widgets?.[0]?.value`);
  const sent = await page.evaluate(async () => (await window.app.graphToPrompt()).output);
  const inputs = Object.values(sent).find((one) => one.class_type === "DiptychCompare").inputs;
  if (task.screenshot) await page.screenshot({ path: task.screenshot });
  return { outcome, value, inputs, ...await (task.vue ? elements(page) : drawn(page, node)) };
};

// Nodes 2.0: core's widget, two images and the share of the upper one that is cut off.
async function elements(page) {
  const view = page.getByTestId("image-compare-viewport");
  await view.waitFor();
  const box = await view.boundingBox();
  const cuts = [];
  for (const share of [0.25, 0.75]) {
    await page.mouse.move(box.x + box.width * share, box.y + box.height / 2);
    await page.waitForTimeout(200);
    cuts.push(await view.locator("img").last().evaluate((image) => image.style.clipPath));
  }
  return { count: await view.locator("img").count(), cuts };
}

// The canvas: the pixels left and right of the middle, with the line at either end.
async function drawn(page, node) {
  await page.waitForFunction(`(${node})().diptychCompare?.place`);
  const pixels = [];
  for (const share of [0.02, 0.98]) {
    pixels.push(await page.evaluate(async ([find, at]) => {
      const one = eval(find)(), { canvas } = window.app, [left, top, width, height] = one.diptychCompare.place;
      one.onMouseMove({}, [left + width * at, top + height / 2]);
      canvas.draw(true, true);
      const { scale, offset } = canvas.ds, ratio = window.devicePixelRatio;
      const x = (one.pos[0] + left + width / 2 + offset[0]) * scale * ratio;
      const y = (one.pos[1] + top + height / 2 + offset[1]) * scale * ratio;
      return [...canvas.canvas.getContext("2d").getImageData(Math.round(x), Math.round(y), 1, 1).data.slice(0, 3)];
    }, [`(${node})`, share]));
  }
  return { pixels };
}
