// The canvas without an edge in the page: drag to move it, wheel to zoom, drag the box or its corner.
// `props.view` is {image: data URL or null, bounds: [x, y, w, h] or null, number: of this view, and to begin
// anew box, at: another number}; `props.value` is the box, {x, y, width, height}.
const SNAP = 16, LARGEST = 2048, CORNER = 14;
const surface = element.querySelector("canvas");
const readout = element.querySelector(".readout");
const view = { x: 0, y: 0, zoom: 4 };
let box = { x: 0, y: 0, width: 64, height: 64, ...(props.value || {}) };
let image = null, grip = null, fitted = null;

const snap = (value) => Math.round(value / SNAP) * SNAP;
const limit = (value, low, high) => Math.min(Math.max(value, low), high);
const toScreen = (x, y) => [(x - view.x) * view.zoom, (y - view.y) * view.zoom];
const bounds = () => (props.view && props.view.bounds) || null;

function draw() {
  const ratio = window.devicePixelRatio || 1, { clientWidth: width, clientHeight: height } = surface;
  if (!width) return;
  if (surface.width !== Math.round(width * ratio)) surface.width = Math.round(width * ratio);
  if (surface.height !== Math.round(height * ratio)) surface.height = Math.round(height * ratio);
  const pen = surface.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.fillStyle = "#e8e8ea";
  pen.fillRect(0, 0, width, height);
  grid(pen, width, height);
  const around = bounds();
  if (image && around) {
    pen.imageSmoothingEnabled = view.zoom < 2;
    pen.drawImage(image, ...toScreen(around[0], around[1]), around[2] * view.zoom, around[3] * view.zoom);
  }
  const [left, top] = toScreen(box.x, box.y);
  pen.strokeStyle = "#ff3860";
  pen.lineWidth = 2;
  pen.strokeRect(left, top, box.width * view.zoom, box.height * view.zoom);
  pen.fillStyle = "#ff3860";
  pen.fillRect(left + box.width * view.zoom - 6, top + box.height * view.zoom - 6, 12, 12);
  readout.textContent = `box at ${box.x}, ${box.y}; ${box.width} x ${box.height} px; zoom ${view.zoom.toPrecision(2)}`;
}

function grid(pen, width, height) {
  let step = SNAP;
  while (step * view.zoom < 24) step *= 2;
  pen.strokeStyle = "#d4d4d8";
  pen.lineWidth = 1;
  pen.beginPath();
  for (let x = Math.ceil(view.x / step) * step; x < view.x + width / view.zoom; x += step) {
    const at = Math.round((x - view.x) * view.zoom) + 0.5;
    pen.moveTo(at, 0); pen.lineTo(at, height);
  }
  for (let y = Math.ceil(view.y / step) * step; y < view.y + height / view.zoom; y += step) {
    const at = Math.round((y - view.y) * view.zoom) + 0.5;
    pen.moveTo(0, at); pen.lineTo(width, at);
  }
  pen.stroke();
}

function fit() {
  const { clientWidth: width, clientHeight: height } = surface;
  if (!width) return;
  const around = bounds() || [box.x, box.y, box.width, box.height];
  const left = Math.min(around[0], box.x), top = Math.min(around[1], box.y);
  const right = Math.max(around[0] + around[2], box.x + box.width);
  const bottom = Math.max(around[1] + around[3], box.y + box.height);
  view.zoom = limit(0.7 * Math.min(width / (right - left), height / (bottom - top)), 0.02, 16);
  view.x = (left + right - width / view.zoom) / 2;
  view.y = (top + bottom - height / view.zoom) / 2;
  draw();
}

function show() {
  const now = props.view || {};
  if (now.at && fitted !== now.at) {
    fitted = now.at;
    if (now.box) box = { ...now.box };
    tell();
    fit();
  }
  if (!now.image) { image = null; draw(); return; }
  const next = new Image();
  next.onload = () => { image = next; draw(); surface.dataset.shown = String(now.number); };
  next.src = now.image;
}

function tell() {
  const old = props.value || {};
  if (Object.keys(box).some((name) => old[name] !== box[name])) props.value = { ...box };
}

function where(event) {
  const frame = surface.getBoundingClientRect();
  return [event.clientX - frame.left, event.clientY - frame.top];
}

surface.addEventListener("pointerdown", (event) => {
  const [px, py] = where(event), x = view.x + px / view.zoom, y = view.y + py / view.zoom;
  const [right, bottom] = toScreen(box.x + box.width, box.y + box.height);
  const inside = x >= box.x && x <= box.x + box.width && y >= box.y && y <= box.y + box.height;
  const corner = Math.abs(px - right) < CORNER && Math.abs(py - bottom) < CORNER;
  grip = { what: corner ? "size" : inside ? "box" : "view", x, y, px, py, box: { ...box }, view: { ...view } };
  surface.setPointerCapture(event.pointerId);
  event.preventDefault();
});
surface.addEventListener("pointermove", (event) => {
  if (!grip) return;
  const [px, py] = where(event), dx = (px - grip.px) / view.zoom, dy = (py - grip.py) / view.zoom;
  if (grip.what === "view") {
    view.x = grip.view.x - dx;
    view.y = grip.view.y - dy;
  } else if (grip.what === "box") {
    box.x = snap(grip.box.x + dx);
    box.y = snap(grip.box.y + dy);
  } else {
    box.width = limit(snap(grip.box.width + dx), SNAP, LARGEST);
    box.height = limit(snap(grip.box.height + dy), SNAP, LARGEST);
  }
  draw();
});
for (const name of ["pointerup", "pointercancel"]) {
  surface.addEventListener(name, () => { grip = null; tell(); });
}
surface.addEventListener("wheel", (event) => {
  const [px, py] = where(event), before = view.zoom;
  view.zoom = limit(before * Math.exp(-event.deltaY / 500), 0.02, 32);
  view.x += px / before - px / view.zoom;
  view.y += py / before - py / view.zoom;
  draw();
  event.preventDefault();
}, { passive: false });
surface.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step) return;
  const far = event.shiftKey ? 1 : SNAP;
  box.x += step[0] * (event.shiftKey ? box.width : far);
  box.y += step[1] * (event.shiftKey ? box.height : far);
  tell();
  draw();
  event.preventDefault();
});
surface.addEventListener("dblclick", fit);
watch("view", show);
let sized = false;
new ResizeObserver(() => {  // a tab that was hidden has no size at first
  if (!sized && surface.clientWidth) { sized = true; fit(); } else draw();
}).observe(surface);
show();
