"""Figures, not a race: how well the tiny multimodal model reads and draws scenes of one shape.

    python benchmarks/multimodal_tiny.py [MODEL ...] [--sheet OUT.png] [--threads 1]

MODEL is a folder that `diptych train multimodal_tiny` wrote (default: the bundled one); with several, one
per training seed, each figure is their mean and standard deviation. `train`: 400 of the 1,434 scenes of the
training split; `held out`: all 180 scenes of the split `test`, whose captions no training or choice saw.

Right means that the checker of the shapes world reads the ground, the shape, its colour, its size and its
place as the caption says, and nothing else. The chance control judges the images by
each other's captions.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from comfyui_diptych.models import tiny
from comfyui_diptych.models.multimodal import GenerativeMultimodalModel
from comfyui_diptych.training.evaluate.plots import contact_sheet
from comfyui_diptych.training.tiny.shapes import read, render_many
from comfyui_diptych.training.tiny.shapes.scenes import COLOURS, KINDS, SIZES, codes, single_scenes
from PIL import Image

SPLITS = {"train": "train", "held out": "test"}
LIMIT = 400
SEED = 16
STEPS = (5, 10, 20, 50)
PENALTY = 1.3
SHORT = 2  # images for each short prompt


def right(images: torch.Tensor, scenes) -> float:
    """Share of IMAGE [N,H,W,3] that show their scene."""
    return read(images).matches(scenes).float().mean().item()


def figures(model, split: str) -> Iterator[tuple[str, float]]:
    """Names and values, in 0..1, of everything that is measured on one split."""
    scenes = single_scenes(0, SPLITS[split])[:LIMIT]
    images = render_many(scenes, model.architecture.image_size)
    captions = [scene.caption for scene in scenes]
    embeddings = model.encode_image(images)
    count = len(captions)

    said = model.generate_text_from_image(embeddings)
    yield "caption, greedy, word for word", sum(map(str.__eq__, said, captions)) / count
    drawn = model.generate_from_image(images, 3, repetition_penalty=PENALTY, seed=SEED)
    exact = sum(text == caption for texts, caption in zip(drawn, captions, strict=True) for text in texts)
    yield f"caption, three sampled, repetition penalty {PENALTY}", exact / (3 * count)
    likest = model.similarity(images, captions).argmax(dim=1)
    yield "retrieval, the image's own caption first", (likest == torch.arange(count)).float().mean().item()

    decoder = model.image_decoder
    decoded = model.decode(decoder.get_latent_from_embedding(embeddings))
    yield "image -> embedding -> image right (the ceiling)", right(decoded, scenes)
    yield "text -> image, direct decoder", right(model.generate_from_text(captions, 1, False), scenes)
    for steps in STEPS:
        made = model.generate_from_text(captions, 1, True, steps, SEED)
        yield f"text -> image, diffusion, {steps} steps", right(made, scenes)
    reading = read(made)
    background, template, colour = codes(scenes)
    filled = template > 0
    yield "of these (last steps): ground", (reading.background == background).float().mean().item()
    yield "of these: shape, size and place", (reading.template == template).all(1).float().mean().item()
    yield "of these: colour at its place", (reading.colour == colour)[filled].float().mean().item()
    yield "of these: by another's caption (chance)", right(made, scenes[1:] + scenes[:1])
    yield (
        f"text -> image, diffusion, {STEPS[-1]} steps, cfg 1",
        right(model.generate_from_text(captions, 1, True, STEPS[-1], SEED, cfg=1.0), scenes),
    )


def short_prompts(model) -> float:
    """Share of images for `a SIZE COLOUR KIND` that show one such shape, on any ground at any place."""
    asked = [(size, colour, kind) for size in SIZES for colour in COLOURS for kind in KINDS]
    made = model.generate_from_text([f"a {' '.join(words)}" for words in asked], SHORT, True, 20, SEED)
    reading = read(made)
    found = 0
    for row in range(len(made)):
        shapes = reading.scene(row).shapes
        size, colour, kind = asked[row // SHORT]
        whole = not (reading.template[row] < 0).any() and len(shapes) == 1
        found += whole and (shapes[0].size, shapes[0].colour, shapes[0].kind) == (size, colour, kind)
    return found / len(made)


def sheet(model, rows: int = 4) -> Image.Image:
    """Held-out scenes, what each half of the model makes of them, and what short prompts give."""
    scenes = single_scenes(0, SPLITS["held out"])[:rows]
    captions = [scene.caption for scene in scenes]
    images = render_many(scenes, model.architecture.image_size)
    decoded = model.decode(model.image_decoder.get_latent_from_embedding(model.encode_image(images)))
    direct = model.generate_from_text(captions, 1, False)
    drawn = [model.generate_from_text(captions, 1, True, steps, SEED) for steps in (5, 50)]
    columns = [images, decoded, direct, *drawn]
    said = model.generate_text_from_image(model.encode_image(images))
    whole = [([column[row] for column in columns], f"reads: {said[row]}") for row in range(rows)]
    short = ["a small red circle", "a large blue cross", "a yellow triangle at the top left"]
    free = model.generate_from_text(short, len(columns), True, 20, SEED).split(len(columns))
    headings = ["image", "decoded", "text, direct", "5 steps", "50 steps"]
    parts = [(list(images), f"asked: {prompt}") for prompt, images in zip(short, free, strict=True)]
    return contact_sheet(whole + parts, headings, side=112, columns=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="*", help="folders of save_pretrained")
    parser.add_argument("--sheet", type=Path, help="draw examples of the first model instead")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folders = [Path(name) for name in options.model] or [tiny.folder() / "multimodal"]
    if options.sheet:
        sheet(GenerativeMultimodalModel.from_pretrained(folders[0])).save(options.sheet)
        return
    table: dict[str, dict[str, list[float]]] = {}
    for folder in folders:
        model = GenerativeMultimodalModel.from_pretrained(folder)
        for split in SPLITS:
            for name, value in figures(model, split):
                table.setdefault(name, {}).setdefault(split, []).append(value)
        table.setdefault("short prompts, diffusion, 20 steps", {}).setdefault("any", []).append(
            short_prompts(model)
        )
    print(f"{len(folders)} model(s), diffusion with cfg 2 unless said")
    for name, splits in table.items():
        parts = [f"{split} {shown(values)}" for split, values in splits.items()]
        print(f"{name:58s} {'   '.join(parts)}")


def shown(values: list[float]) -> str:
    """Per cent, with the deviation where there are several."""
    mean = f"{100 * statistics.fmean(values):5.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
