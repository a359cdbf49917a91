// Mask Packer: the mask with its tokens of 16 x 16 pixels; hovering one shows its pixels, and its 256
// values in the order of the channels.

import { address, kind, register, said, style } from "./outputs.js";

const NAME = "diptych_mask", TOKEN = 16, HEIGHT = 190;

style(`
.${NAME} { box-sizing: border-box; width: 100%; height: ${HEIGHT}px; padding: 4px; overflow: hidden; display: grid;
  grid-template: 1fr auto / 2fr 1fr 1fr; gap: 6px; font: 11px/1.3 sans-serif; color: var(--input-text, #ddd); }
.${NAME} canvas { width: 100%; height: 100%; min-height: 0; object-fit: contain; object-position: left top;
  image-rendering: pixelated; }
.${NAME} div { grid-column: 1 / -1; min-height: 2.6em; }`);

/**
 * Which of a token's 256 channels holds its pixel (y, x): within a latent cell of 8 x 8 pixels row by row,
 * the token's 2 x 2 cells innermost.
 */
export function channel(y, x) {
  return ((y % 8) * 8 + (x % 8)) * 4 + Math.floor(y / 8) * 2 + Math.floor(x / 8);
}

/** {pixels, channels}: a token's 256 values in 0..1, row by row and by channel, of a mask's pixels. */
function read({ data, width }, row, column) {
  const pixels = new Array(256), channels = new Array(256);
  for (let y = 0; y < TOKEN; y++) {
    for (let x = 0; x < TOKEN; x++) {
      const value = data[4 * ((row * TOKEN + y) * width + column * TOKEN + x)] / 255;
      pixels[y * TOKEN + x] = channels[channel(y, x)] = value;
    }
  }
  return { pixels, channels };
}

function fill(canvas, values) {
  canvas.width = canvas.height = TOKEN;
  const image = new ImageData(TOKEN, TOKEN);
  values.forEach((value, index) => image.data.set([255 * value, 255 * value, 255 * value, 255], 4 * index));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// The mask, enlarged where it is small, with its tokens and the one that is looked at.
function draw(state) {
  const { mask, bitmap, source } = state, scale = Math.max(1, Math.floor(512 / source.width));
  mask.width = source.width * scale;
  mask.height = source.height * scale;
  const context = mask.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(bitmap, 0, 0, mask.width, mask.height);
  const side = TOKEN * scale;
  context.strokeStyle = "rgba(90, 150, 230, 0.5)";
  context.beginPath();
  for (let x = side; x < mask.width; x += side) context.rect(x, 0, 0, mask.height);
  for (let y = side; y < mask.height; y += side) context.rect(0, y, mask.width, 0);
  context.stroke();
  context.strokeStyle = "#ff9a3c";
  context.lineWidth = Math.max(2, scale);
  context.strokeRect(state.column * side, state.row * side, side, side);
}

function look(state, row, column) {
  Object.assign(state, { row, column, ...read(state.source, row, column) });
  draw(state);
  fill(state.canvases[1], state.pixels);
  fill(state.canvases[2], state.channels);
  const token = row * (state.source.width / TOKEN) + column;
  const painted = state.pixels.filter((value) => value >= 0.5).length;
  const [top, left] = [row * TOKEN, column * TOKEN];
  const many = state.urls.length > 1 ? `${state.index + 1} / ${state.urls.length}: ` : "";
  state.caption.textContent = many + said(
    `token ${token}, rows ${top} to ${top + 15}, columns ${left} to ${left + 15}: ${painted} of 256 repainted. `
      + "Its pixels, and its channels 0 to 255 row by row.",
    `token ${token}，行 ${top} 至 ${top + 15}，列 ${left} 至 ${left + 15}：256 个值中 ${painted} 个重绘。`
      + "中为其像素，右为通道 0 至 255（逐行）。");
}

async function open(state, index) {
  const image = new Image();
  image.src = state.urls[index];
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  Object.assign(state, { index, bitmap: image, source: context.getImageData(0, 0, canvas.width, canvas.height) });
  look(state, 0, 0);
}

/** The token below a mouse event on the mask, which is drawn whole in the upper left of its element. */
function under(state, event) {
  const { mask, source } = state, box = mask.getBoundingClientRect();
  const scale = Math.min(box.width / source.width, box.height / source.height);
  const row = Math.floor((event.clientY - box.top) / scale / TOKEN);
  const column = Math.floor((event.clientX - box.left) / scale / TOKEN);
  return row >= 0 && column >= 0 && row < source.height / TOKEN && column < source.width / TOKEN ? [row, column] : null;
}

function create(node) {
  const box = document.createElement("div"), caption = document.createElement("div");
  const canvases = [0, 1, 2].map(() => document.createElement("canvas"));
  box.className = NAME;
  caption.textContent = said("The mask's tokens come here when it has run.", "运行后在此显示遮罩的 token。");
  box.append(...canvases, caption);
  const state = (node.diptychMask = { mask: canvases[0], canvases, caption, urls: [], index: 0 });
  state.mask.addEventListener("pointermove", (event) => {
    const token = state.source && under(state, event);
    if (token) look(state, ...token);
  });
  state.mask.addEventListener("click", () => {  // the next of a batch
    if (state.urls.length > 1) open(state, (state.index + 1) % state.urls.length);
  });
  const widget = node.addDOMWidget(NAME, NAME, box, {
    serialize: false, getMinHeight: () => HEIGHT, getMaxHeight: () => HEIGHT, getValue: () => "", setValue: () => {},
  });
  widget.serialize = false;
}

function show(node, output) {
  if (!node.diptychMask || !output.diptych_masks?.length) return;
  node.diptychMask.urls = output.diptych_masks.map(address);
  open(node.diptychMask, 0);
}

register("Mask", (node) => kind(node) === "DiptychMaskPacker", create, show);
