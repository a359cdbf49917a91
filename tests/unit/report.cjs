// Opens a file in a headless browser and reports what a person would meet there, as JSON on stdout.
const { playwright, chromium: path, file } = JSON.parse(process.argv[2]);
const { chromium } = require(playwright);

(async () => {
  const browser = await chromium.launch({ executablePath: path, args: ['--no-sandbox'] });
  const page = await browser.newPage();
  const seen = { console: [], requests: [] };
  page.on('console', (message) => seen.console.push(`${message.type()}: ${message.text()}`));
  page.on('pageerror', (error) => seen.console.push(String(error)));
  page.on('request', (request) => seen.requests.push(request.url().slice(0, 40)));
  await page.goto(`file://${file}`);
  seen.title = await page.title();
  seen.text = await page.evaluate(() => document.body.innerText);
  seen.points = await page.$$eval('svg.curve', (all) => all.map((svg) => {
    const frame = svg.getBoundingClientRect();
    const dots = [...svg.querySelectorAll('circle')].map((dot) => dot.getBoundingClientRect());
    const inside = dots.filter((d) => d.left >= frame.left && d.right <= frame.right && d.top >= frame.top && d.bottom <= frame.bottom);
    return [svg.getAttribute('aria-label'), dots.length, inside.length];
  }));
  seen.images = await page.$$eval('img', (all) => all.map((image) => image.naturalWidth));
  await browser.close();
  console.log(JSON.stringify(seen));
})();
