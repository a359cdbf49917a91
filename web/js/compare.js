// The slider of Before and After. Nodes 2.0 draws core's IMAGECOMPARE widget once it has a value; on the
// canvas that widget is only a line of text, so there it is drawn here.

import { app } from "../../../scripts/app.js";
import { address, kind, register } from "./outputs.js";

const MARGIN = 10;

function slider(node) {
  return node.widgets?.find((widget) => widget.type === "imagecompare");
}

function loaded(urls) {
  return urls.map((url) => {
    const image = new Image();
    image.onload = () => app.canvas?.setDirty(true);
    image.src = url;
    return image;
  });
}

// Where an image of this shape stands in the widget's box, [left, top, width, height], whole and centred.
function fitted(image, [left, top, width, height]) {
  const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight);
  const size = [image.naturalWidth * scale, image.naturalHeight * scale];
  return [left + (width - size[0]) / 2, top + (height - size[1]) / 2, ...size];
}

function paint(state, context, box) {
  const [before, after] = ["before", "after"].map((side) => state[side][state.index % state[side].length]);
  if (!before?.naturalWidth || !after?.naturalWidth) return;
  const place = fitted(after, box), edge = place[0] + place[2] * state.at;
  context.drawImage(after, ...place);
  context.save();
  context.beginPath();
  context.rect(place[0], place[1], edge - place[0], place[3]);
  context.clip();
  context.drawImage(before, ...place);
  context.restore();
  context.fillStyle = "#fff";
  context.fillRect(edge - 1, place[1], 2, place[3]);
  if (Math.max(state.before.length, state.after.length) > 1) {
    context.font = "11px sans-serif";
    context.textAlign = "left";
    context.fillText(`${state.index + 1} / ${Math.max(state.before.length, state.after.length)}`, place[0] + 6, place[1] + 16);
  }
  state.place = place;
}

function create(node) {
  const widget = slider(node);
  if (!widget) return;
  const state = (node.diptychCompare = { before: [], after: [], index: 0, at: 0.5, place: null });
  widget.options = { ...widget.options, serialize: false };  // a picture to look at is no input of the run
  node.setSize([Math.max(node.size[0], 320), Math.max(node.size[1], 340)]);
  widget.computeLayoutSize = () => ({ minHeight: 120, minWidth: 120 });
  widget.draw = (context, owner, width, y) =>
    paint(state, context, [MARGIN, y, width - 2 * MARGIN, (widget.computedHeight ?? 200) - MARGIN]);
  const inside = ([x, y]) => state.place && x >= state.place[0] && x <= state.place[0] + state.place[2]
    && y >= state.place[1] && y <= state.place[1] + state.place[3];
  node.onMouseMove = function (event, position) {
    if (!inside(position)) return;
    state.at = (position[0] - state.place[0]) / state.place[2];
    app.canvas?.setDirty(true);
  };
  node.onMouseDown = function (event, position) {  // a click shows the next of a batch
    const count = Math.max(state.before.length, state.after.length);
    if (count > 1 && inside(position)) state.index = (state.index + 1) % count;
  };
}

function show(node, output) {
  const widget = slider(node);
  if (!widget || !output.a_images || !output.b_images) return;
  const [before, after] = [output.a_images.map(address), output.b_images.map(address)];
  const state = node.diptychCompare;
  Object.assign(state, { before: loaded(before), after: loaded(after), index: 0 });
  widget.value = { beforeImages: before, afterImages: after };
  widget.callback?.(widget.value);
}

register("Compare", (node) => kind(node) === "DiptychCompare", create, show);
