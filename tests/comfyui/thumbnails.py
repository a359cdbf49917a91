"""Make the thumbnails of example workflows out of what their own runs paint.

    COMFYUI/.venv/bin/python tests/comfyui/thumbnails.py COMFYUI [TEMPLATE ...]

Run by ComfyUI's interpreter. Workflows that run on downloaded models run on the tiny ones, on an image of
their world, and ask for an edit of the same kind. ComfyUI's page puts a badge over the top left corner
(117 x 28 of 256 px, measured in 0.33), so images begin below it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

SIDE, BAND, GAP = 480, 66, 8
GROUND, INK = (45, 47, 52), (245, 245, 245)
DEMO, SPLIT, PASTE, DECODE = "DiptychDemoImage", "DiptychSplit", "DiptychPasteBack", "VAEDecode"
BEFORE = (DEMO, 0)


@dataclass(frozen=True)
class Picture:
    """One thumbnail: rows of sockets (class or title of a node, output), and what to set for the run.

    A third number in a socket is that of the image in its batch.
    """

    rows: list[list[tuple]] = field(default_factory=lambda: [[BEFORE, (SPLIT, 0)]])
    demo: tuple[int, str] | None = None  # example and operation in the place of Load Image
    inputs: dict[str, dict] = field(default_factory=dict)  # node -> its inputs; a tuple is a socket
    arrow: bool = True
    of: str = ""  # another template that is run instead


EDIT, FILLED, PASTED = (Picture([[BEFORE, (result, 0)]]) for result in (SPLIT, DECODE, PASTE))
WIDER = Picture([[BEFORE], [(PASTE, 0)]])
CAPTION = (DEMO, 4)


def inpaint(example: int, *, prompt: str = "CLIPTextEncode", **more: dict) -> Picture:
    """A painted mask is filled, nothing is added on the right; `prompt` names the node of the prompt."""
    sampler = {"seed": 5, "cfg": 2.5, "steps": 16, "sampler_name": "ddim", "scheduler": "simple"}
    inputs = {"DiptychOutpaintCanvas": {"right": 0}, prompt: {}, "KSampler": sampler, **more}
    inputs[prompt] = {"prompt" if prompt == "DiptychPowerPaintPrompt" else "text": CAPTION}
    return Picture([[BEFORE, (PASTE, 0)]], (example, "recolour"), inputs)


WHOLE = "Prompt: the whole image"
PICTURES: dict[str, Picture] = {
    "Edit by instruction - FLUX": replace(EDIT, demo=(5, "replace")),
    "Edit with MoE-LoRA - FLUX": replace(EDIT, demo=(8, "remove")),
    "Edit with a reward LoRA - FLUX": replace(EDIT, demo=(4, "background")),
    "Outpaint - FLUX Fill": Picture(
        [[BEFORE], [("DiptychOutpaint", 0)]],
        (1, "recolour"),
        {"DiptychOutpaint": {"left": 32, "right": 32}, "CLIPTextEncode": {"text": "a green background"}},
    ),
    "Inpaint - SD 1.5": inpaint(11, prompt=WHOLE),
    "Inpaint - SD 1.5 with ControlNet": inpaint(
        3,
        prompt=WHOLE,
        DiptychControlNetInpaint={"strength": 0.0},  # there is no tiny ControlNet
    ),
    "Inpaint - any SD 1.5 finetune": inpaint(10, prompt=WHOLE),
    "Inpaint - PowerPaint": inpaint(7, prompt="DiptychPowerPaintPrompt"),
    "Two references - FLUX Kontext": Picture(
        [[("First image", 0), ("Second image", 0)], [(SPLIT, 0)]],
        (1, "add"),
        {
            "Second image": {"example": 12, "operation": "add"},
            "Instruction": {"text": "put a small green cross at the bottom left"},
            "RandomNoise": {"noise_seed": 1},
            "DiptychFlowMatchScheduler": {"steps": 16},
        },
        arrow=False,
    ),
    "Fill a mask - tiny": EDIT,
    "Fill a mask - tiny SD": FILLED,
    "Repair a detail - tiny": PASTED,
    "Edit by instruction - tiny": EDIT,
    "Edit with Kontext - tiny": EDIT,
    "Edit with a reward LoRA - tiny": Picture([[BEFORE], [("13", 0), ("24", 0)]], arrow=False),
    "Best of six - tiny": Picture([[BEFORE], [("17", 0), ("20", 0)]], arrow=False),
    "Judge edits - tiny": Picture([[("DiptychRewardScore", 3)]]),
    "See what models see - tiny": Picture([[("DiptychTokenInspector", 0)]]),
    "Outpaint step by step - tiny": WIDER,
    "Outpaint - tiny glid": WIDER,
    "Outpaint - glid": replace(
        WIDER,
        of="Outpaint - tiny glid",
        inputs={
            "What the window shows": {
                "text": "a yellow background with a large red cross at the bottom left and a large green "
                "square at the bottom right"
            }
        },
    ),
    "Outpaint in one node - tiny": Picture([[(DEMO, 3), ("DiptychOutpaint", 0)]]),
    "Panorama - tiny": WIDER,
    "Infinite zoom - tiny": Picture([[("Export", 1)]]),
    "Text to image - tiny": Picture(
        [[("DiptychTextToImage", 0, n) for n in row] for row in ((0, 2), (4, 6))], arrow=False
    ),
    "Image to caption to image - tiny": Picture(
        [[BEFORE], [("DiptychTextToImage", 0, n) for n in range(4)]], arrow=False
    ),
    "Best of N by similarity - tiny": Picture(
        [
            [("DiptychTextToImage", 0, n) for n in range(4)],
            [("DiptychMultimodalScore", 0, n) for n in (0, 1)],
        ],
        arrow=False,
    ),
}


def find(graph: dict, prompt: dict, name: str) -> str:
    """The id of the last node in the prompt that has this id, title or class."""
    titles = {str(node["id"]): node.get("title") for node in graph["nodes"]}
    return [key for key, node in prompt.items() if name in (key, node["class_type"], titles.get(key))][-1]


def prepared(host, name: str, picture: Picture) -> tuple[dict, dict]:
    """(graph, prompt) of a template, on the tiny models where it names others."""
    from comfy_cases import powerpaint, workflow, workflows

    graph, prompt = workflow(name), workflows.convert(host, name)
    workflows.TinyControlNet.host = host
    host.nodes["TestTinyControlNet"] = workflows.TinyControlNet
    if picture.demo:
        workflows.placeholders(host, prompt)
        if "PowerPaint" in name:  # words that say nothing: the tiny model learnt none
            powerpaint.write_embeddings(host, 64, scale=0.0)
        prompt = workflows.swapped(host, prompt, few={})
        example, operation = picture.demo
        loads = [key for key, node in prompt.items() if node["class_type"] == "LoadImage"]
        for key in loads:
            prompt[key] = {
                "class_type": DEMO,
                "inputs": {"example": example, "operation": operation, "size": 64},
            }
        for node in prompt.values():
            for key, value in node["inputs"].items():
                if isinstance(value, list) and value[0] in loads:
                    node["inputs"][key] = [value[0], {0: 0, 1: 2}[value[1]]]
        for node in prompt.values():
            if "instruction" in node["inputs"]:
                node["inputs"]["instruction"] = [loads[0], 1]
    for where, inputs in picture.inputs.items():
        linked = {
            k: [find(graph, prompt, v[0]), v[1]] if isinstance(v, tuple) else v for k, v in inputs.items()
        }
        prompt[find(graph, prompt, where)]["inputs"].update(linked)
    return graph, prompt


def paint(host, name: str, picture: Picture) -> list[list]:
    """The images of a template's run as PIL images, in rows."""
    graph, prompt = prepared(host, picture.of or name, picture)
    host.executor = None  # what an earlier run kept is not kept again
    places = {f"{i} {j}": place for i, row in enumerate(picture.rows) for j, place in enumerate(row)}
    for label, (where, slot, *_) in places.items():
        value = {"value": [find(graph, prompt, where), slot], "name": label}
        prompt[f"keep {label}"] = {"class_type": "TestKeepValue", "inputs": value}
    kept = host.run(prompt).kept
    return [
        [image(kept[f"{i} {j}"], *place[2:]) for j, place in enumerate(row)]
        for i, row in enumerate(picture.rows)
    ]


def image(tensor, number: int = 0):
    """An image of a batch as a PIL image."""
    from PIL import Image

    pixels = tensor[number].detach().cpu().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.numpy())


def compose(rows: list[list], arrow: bool):
    """A square of rows of images below the band of the badge; an arrow leads from the first to the second."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (SIDE, SIDE), GROUND)
    room = SIDE - BAND - GAP * len(rows)
    wanted = [(SIDE - GAP * (len(row) + 1)) / sum(i.width / i.height for i in row) for row in rows]
    tallest = wanted if sum(wanted) <= room else [min(h, share(wanted, h, room)) for h in wanted]
    heights = [int(height) for height in tallest]
    middle = (SIDE - sum(heights) - GAP * (len(rows) - 1)) // 2
    y, boxes = max(BAND, middle), []
    for row, height in zip(rows, heights, strict=True):
        widths = [round(i.width * height / i.height) for i in row]
        x = (SIDE - sum(widths) - GAP * (len(row) - 1)) // 2
        for one, width in zip(row, widths, strict=True):
            canvas.paste(one.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (x, y))
            boxes.append((x, y, width, height))
            x += width + GAP
        y += height + GAP
    if arrow and len(boxes) > 1:
        draw_arrow(ImageDraw.Draw(canvas), *boxes[:2], down=len(rows[0]) == 1)
    return canvas


def share(wanted: list[float], height: float, room: float) -> float:
    """The largest height of a row when all rows together have `room`: every row is cut to the same."""
    return room / len(wanted) if height > room / len(wanted) else height


def draw_arrow(draw, a: tuple, b: tuple, down: bool) -> None:
    """A small disc with an arrow on the seam of two images."""
    x, y = (SIDE // 2, a[1] + a[3] + GAP // 2) if down else (a[0] + a[2] + GAP // 2, a[1] + a[3] // 2)
    draw.ellipse((x - 15, y - 15, x + 15, y + 15), fill=INK)
    points = [(-6, -4), (6, -4), (0, 7)] if down else [(-4, -6), (-4, 6), (7, 0)]
    draw.polygon([(x + dx, y + dy) for dx, dy in points], fill=GROUND)


def main() -> None:
    comfyui, *names = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent))
    import comfy_cases
    import comfy_host
    import finding

    out = Path(os.environ.get("DIPTYCH_THUMBNAILS", comfy_cases.ROOT / "example_workflows"))
    with tempfile.TemporaryDirectory() as folder:
        base = finding.make_base(Path(folder) / "base", Path(comfyui))
        host = comfy_host.Host(Path(comfyui), base, [])
        comfy_cases.load_all()
        for name in names or PICTURES:
            picture = PICTURES[name]
            thumbnail = compose(paint(host, name, picture), picture.arrow)
            thumbnail.save(out / f"{name}.jpg", quality=88)
            print(name, flush=True)


if __name__ == "__main__":
    main()
