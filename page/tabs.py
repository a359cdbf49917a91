"""The tabs of the page, but for the canvas: what stands where, and which work a button starts."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from ..commands import outpaint
from . import editing, examples, models, painting, wording
from .backend import Backend, both
from .handlers import on_run

HEIGHT = 360
EXAMPLES = "Examples: a click runs one"


def image_file(label: str, name: str, height: int = HEIGHT) -> gr.Image:
    """An image to upload, as its file: the pack's own reader opens it, with its limits and its sentences."""
    image = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=height,
        elem_id=name,
    )
    # Not a subclass: Gradio writes a .pyi file beside its source. That it was uploaded is checked before.
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def model_menu(backend: Backend, engines: tuple[str, ...], name: str) -> gr.Dropdown:
    """The menu of models of these engines."""
    labels = backend.offer.labels(engines)
    first = labels[0] if labels else None
    return gr.Dropdown(labels, value=first, label="Engine and model", elem_id=f"{name}-model")


def numbers(name: str) -> tuple[gr.Number, gr.Slider]:
    """Seed and steps."""
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id=f"{name}-seed")
        steps = gr.Slider(0, 100, 0, step=1, label="Steps (0: default)", elem_id=f"{name}-steps")
    return seed, steps


def buttons(name: str, run: str) -> tuple[gr.Button, gr.Button]:
    """The button that starts, and Stop."""
    with gr.Row():
        start = gr.Button(run, variant="primary", elem_id=f"{name}-run")
        stop = gr.Button("Stop", variant="stop", elem_id=f"{name}-stop")
    return start, stop


def slider(name: str, label: str) -> gr.ImageSlider:
    """Before and after, one over the other."""
    return gr.ImageSlider(
        label=label, format="png", image_mode=None, type="filepath", interactive=False,
        height=HEIGHT + 60, max_height=HEIGHT + 60, elem_id=f"{name}-slider",
    )  # fmt: skip


def edit_tab(backend: Backend) -> None:
    """An image, an instruction, both images under a slider."""
    with gr.Row():
        with gr.Column():
            image = image_file("Image", "edit-image")
            words = gr.Textbox(
                label="Instruction", placeholder="make the sky orange", elem_id="edit-instruction"
            )
            model = model_menu(backend, models.EDIT, "edit")
            with gr.Row():
                lora = gr.Dropdown(
                    _loras(backend, model.value), value=models.AS_TRAINED, label="LoRA", elem_id="edit-lora"
                )
                strength = gr.Slider(0, 2, 1, step=0.05, label="LoRA strength", elem_id="edit-strength")
            best = gr.Slider(1, editing.MOST, 1, step=1, label="Best of", elem_id="edit-best")
            seed, steps = numbers("edit")
            run, stop = buttons("edit", "Edit")
        with gr.Column():
            result = slider("edit", "Before and after")
            report = gr.Markdown(elem_id="edit-report")
            again = gr.Button("Take the result as the image", size="sm", elem_id="edit-again")
    inputs = [image, words, model, lora, strength, best, seed, steps]
    shown = gr.Examples(
        examples.edits(backend.folder), [image, words], label=EXAMPLES, elem_id="edit-examples"
    )

    def work(job, _, *values: Any):
        before, after, said = editing.run(backend, job, *values)
        return both(before, after), said

    triggers = [run.click, words.submit, shown.load_input_event.then]
    on_run(backend, triggers, stop, work, "editing", inputs, [result, report])
    model.change(
        lambda label: gr.Dropdown(_loras(backend, label), value=models.AS_TRAINED),
        model, lora, queue=False, api_visibility="private",
    )  # fmt: skip
    again.click(lambda pair: pair and pair[1], result, image, queue=False, api_visibility="private")


def _loras(backend: Backend, label: Any) -> list[str]:
    return backend.offer.lora_names(backend.offer.model(label, models.EDIT)) if label else [models.AS_TRAINED]


def fill_tab(backend: Backend) -> None:
    """A mask drawn over an image, and what is to be there."""
    with gr.Row():
        with gr.Column():
            drawn = gr.ImageEditor(
                label="Image: paint over what is to change",
                type="filepath",
                image_mode="RGBA",
                sources=["upload", "clipboard"],
                brush=gr.Brush(colors=["#ff3860"], color_mode="fixed", default_size=12),
                eraser=gr.Eraser(default_size=12),
                transforms=(),
                layers=False,
                height=HEIGHT + 120,
                elem_id="fill-image",
            )
            words = gr.Textbox(label="What the image shows there", elem_id="fill-prompt")
            model = model_menu(backend, models.PAINT, "fill")
            seed, steps = numbers("fill")
            run, stop = buttons("fill", "Fill")
        with gr.Column():
            result = slider("fill", "Before and after")
    shown = gr.Examples(examples.fills(backend.folder), [drawn, words], label=EXAMPLES)

    def work(job, _, value: Any, *others: Any):
        value = value or {}
        mask = drawn_mask(value.get("layers") or [])
        return both(*painting.fill(backend, job, value.get("background"), mask, *others))

    triggers = [run.click, words.submit, shown.load_input_event.then]
    on_run(backend, triggers, stop, work, "filling", [drawn, words, model, seed, steps], result)


def drawn_mask(layers: list[str]) -> Tensor | None:
    """MASK [1,H,W] of what was painted on the layers, 1 where anything opaque is; None without layers."""
    from PIL import Image

    mask = None
    for path in layers:
        with Image.open(path) as layer:
            alpha = torch.from_numpy(np.array(layer.convert("RGBA"))[..., 3] >= 128).float()[None]
        mask = alpha if mask is None or mask.shape != alpha.shape else torch.maximum(mask, alpha)
    return mask


def outpaint_tab(backend: Backend) -> None:
    """Amounts per side."""
    with gr.Row():
        with gr.Column():
            image = image_file("Image", "outpaint-image")
            words = gr.Textbox(label="What the whole finished image shows", elem_id="outpaint-prompt")
            with gr.Row():
                sides = [
                    gr.Textbox(
                        label=f"{side.capitalize()} (px or %)", value="50%" if side == "right" else "",
                        elem_id=f"outpaint-{side}", min_width=90,
                    )
                    for side in outpaint.SIDES
                ]  # fmt: skip
            method = gr.Dropdown(
                list(outpaint.METHODS), value="direct", label="Method", elem_id="outpaint-method"
            )
            model = model_menu(backend, models.PAINT, "outpaint")
            seed, steps = numbers("outpaint")
            run, stop = buttons("outpaint", "Outpaint")
        with gr.Column():
            result = slider("outpaint", "Before and after")
            again = gr.Button("Take the result as the image", size="sm", elem_id="outpaint-again")
    fields = [image, words, *sides]
    shown = gr.Examples(examples.outpaints(backend.folder), fields, label=EXAMPLES)

    def work(job, _, path, prompt, left, top, right, bottom, *others: Any):
        amounts = dict(zip(outpaint.SIDES, (left, top, right, bottom), strict=True))
        return both(*painting.extend(backend, job, path, prompt, amounts, *others))

    triggers = [run.click, words.submit, shown.load_input_event.then]
    on_run(backend, triggers, stop, work, "outpainting", [*fields, method, model, seed, steps], result)
    again.click(lambda pair: pair and pair[1], result, image, queue=False, api_visibility="private")


def words_tab(backend: Backend) -> None:
    """Text to image and image to text."""
    model = model_menu(backend, models.WORDS, "words")
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Text", elem_id="generate-prompt")
            with gr.Row():
                count = gr.Slider(1, wording.MOST, 4, step=1, label="Images", elem_id="generate-count")
                cfg = gr.Slider(0, 10, 2, step=0.1, label="Guidance (1: off)", elem_id="generate-cfg")
            with gr.Row():
                steps = gr.Slider(1, 200, 50, step=1, label="Steps", elem_id="generate-steps")
                seed = gr.Number(42, label="Seed", precision=0, minimum=0, elem_id="generate-seed")
            run, stop = buttons("generate", "Generate")
            made = gr.Gallery(label="Images", format="png", columns=4, height=260, elem_id="generate-images")
        with gr.Column():
            image = image_file("Image", "caption-image", 220)
            with gr.Row():
                captions = gr.Slider(1, wording.MOST, 1, step=1, label="Captions", elem_id="caption-count")
                heat = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest)")
            look, halt = buttons("caption", "Caption")
            said = gr.Textbox(label="Captions", lines=4, interactive=False, elem_id="caption-text")
    texts = gr.Examples(examples.TEXTS, [prompt], label=EXAMPLES)
    images = gr.Examples(examples.images(backend.folder), [image], label=EXAMPLES)

    def generate(job, _, *values: Any):
        made = wording.generate(backend, job, *values, remark=gr.Info)
        return [both(one[None], one[None])[0] for one in made]

    def caption(job, _, *values: Any):
        return "\n".join(wording.caption(backend, job, *values))

    on_run(
        backend, [run.click, prompt.submit, texts.load_input_event.then], stop, generate, "generating",
        [prompt, model, count, steps, cfg, seed], made,
    )  # fmt: skip
    on_run(
        backend, [look.click, images.load_input_event.then], halt, caption, "captioning",
        [image, model, captions, heat, seed], said,
    )  # fmt: skip
