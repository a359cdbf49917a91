// Mask Packer in one renderer: {vue, workflow, tokens: [[row, column]]}. The 256 values the node tells of
// each token that the mouse is over.
module.exports = async (page, task, { load, execute }) => {
  await load(page, task.workflow, task.vue);
  const find = 'window.app.graph._nodes.find((one) => one.type === "DiptychMaskPacker")';
  const outcome = await execute(page);
  await page.waitForFunction(`${find}.diptychMask.channels`);
  await page.evaluate(() => window.app.canvas.draw(true, true));
  await page.waitForTimeout(500);
  const seen = [];
  for (const [row, column] of task.tokens) {
    const place = await page.evaluate(`(() => {
      const { mask, source } = ${find}.diptychMask, box = mask.getBoundingClientRect();
      const scale = Math.min(box.width / source.width, box.height / source.height);
      return [box.left + ${16 * column + 8} * scale, box.top + ${16 * row + 8} * scale];
    })()`);
    await page.mouse.move(...place, { steps: 3 });
    await page.waitForTimeout(200);
    seen.push(await page.evaluate(`(() => {
      const { row, column, channels, pixels, caption } = ${find}.diptychMask;
      return { row, column, channels, pixels, caption: caption.textContent };
    })()`));
  }
  if (task.screenshot) await page.screenshot({ path: task.screenshot });
  return { outcome, seen };
};
