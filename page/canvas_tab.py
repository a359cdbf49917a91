"""The Canvas tab: a canvas without an edge that is moved and zoomed, a box that is painted, undo, export."""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from ..models import pixels
from ..models.image_files import to_pil
from ..models.outpaint.store import Region
from . import examples, models, painting
from .backend import Backend, read_image, save_png
from .canvas import Canvas, first_box
from .handlers import on_run, quick
from .tabs import buttons, image_file, model_menu, numbers

SHOWN = 2048  # px: larger canvases are sent to the page reduced
LOSSLESS = 512 * 512  # px up to which the page gets the exact pixels
TEMPLATE = """<div class="frame">
<canvas tabindex="0" aria-label="canvas"></canvas><div class="readout"></div></div>
<div class="help">Drag the box to move it, its corner to resize it, the ground to move the canvas; wheel
to zoom, double click to fit. Arrow keys move the box, with Shift by its own size.</div>"""
CSS = """.frame { position: relative; height: 480px; }
canvas { width: 100%; height: 100%; display: block; touch-action: none; border-radius: 6px; cursor: grab; }
.readout { position: absolute; left: 8px; bottom: 8px; padding: 2px 8px; border-radius: 4px; color: #222;
  background: #ffffffcc; font-size: 12px; }
.help { font-size: 12px; opacity: 0.7; padding-top: 4px; }"""
_numbers = itertools.count(1)


def view_of(canvas: Canvas, box: Region | None = None) -> dict[str, Any]:
    """What the page shows of a canvas. box: the new one, to begin with."""
    bounds, number = canvas.bounds, next(_numbers)
    view: dict[str, Any] = {"image": None, "bounds": None, "number": number}
    if box is not None:
        view |= {"box": box._asdict(), "at": number}
    if bounds is None:
        return view
    image, unknown, _ = canvas.store.export()
    shown = torch.cat([image, 1 - unknown[..., None]], dim=-1)
    scale = min(1.0, SHOWN / max(bounds.width, bounds.height))
    if scale < 1:
        shown = pixels.resize_image(
            shown, max(int(bounds.height * scale), 1), max(int(bounds.width * scale), 1)
        )
    data, exact = io.BytesIO(), shown.shape[1] * shown.shape[2] <= LOSSLESS
    to_pil(shown[0]).save(data, "WEBP", lossless=exact, quality=90)
    address = "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
    return {**view, "image": address, "bounds": list(bounds)}


def canvas_tab(backend: Backend) -> None:
    """Left what to paint, right the canvas."""
    with gr.Row():
        with gr.Column(scale=1):
            image = image_file("Image to begin with", "canvas-image", 200)
            with gr.Row():
                begin = gr.Button("Begin with the image", size="sm", elem_id="canvas-begin")
                example = gr.Button("Run an example", size="sm", elem_id="canvas-example")
            words = gr.Textbox(label="What the box shows", elem_id="canvas-prompt")
            model = model_menu(backend, models.PAINT, "canvas")
            seed, steps = numbers("canvas")
            repaint = gr.Checkbox(label="Repaint all of the box, known parts too", elem_id="canvas-repaint")
            run, stop = buttons("canvas", "Paint the box")
            with gr.Row():
                undo = gr.Button("Undo", size="sm", elem_id="canvas-undo")
                export = gr.Button("Export", size="sm", elem_id="canvas-export")
            file = gr.File(
                label="Everything that is known", interactive=False, height=110, elem_id="canvas-file"
            )
        with gr.Column(scale=2):
            viewer = gr.HTML(
                value={"x": 0, "y": 0, "width": 64, "height": 64},
                view={},
                html_template=TEMPLATE,
                css_template=CSS,
                js_on_load=(Path(__file__).parent / "viewer.js").read_text(encoding="utf-8"),
                elem_id="canvas-view",
            )

    def shown(canvas: Canvas) -> Any:
        return gr.HTML(view=view_of(canvas))

    def begin_with(who: str, image: Tensor, label: str) -> Any:
        canvas, edge = backend.canvas(who), painting.natural_size(backend, label)
        canvas.write(image, 0, 0, "start over")
        box = first_box(canvas.bounds, edge)
        return gr.HTML(value=box._asdict(), view=view_of(canvas, box))

    def begun(who: str, path: str | None, label: str) -> Any:
        return begin_with(who, read_image(path), label)

    def begun_with_example(who: str, label: str) -> Any:
        image, words = examples.start()
        return begin_with(who, image, label), words

    def painted(job, who: str, *values: Any) -> Any:
        painting.canvas_box(backend, job, backend.canvas(who), *values)
        return shown(backend.canvas(who))

    def undone(who: str) -> Any:
        backend.canvas(who).undo()
        return shown(backend.canvas(who))

    def exported(who: str) -> str:
        image, unknown, _ = backend.canvas(who).store.export()
        whole = image if not unknown.any() else torch.cat([image, 1 - unknown[..., None]], dim=-1)
        return save_png(whole, backend.folder, "canvas.png")

    private = {"queue": False, "api_visibility": "private"}
    begin.click(quick(backend, begun), [image, model], viewer, **private)
    undo.click(quick(backend, undone), None, viewer, **private)
    export.click(quick(backend, exported), None, file, **private)
    inputs = [viewer, repaint, words, model, seed, steps]
    shown_example = example.click(quick(backend, begun_with_example), [model], [viewer, words], **private)
    triggers = [run.click, words.submit, shown_example.success]
    on_run(backend, triggers, stop, painted, "painting", inputs, viewer)
