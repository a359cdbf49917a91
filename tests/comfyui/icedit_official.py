"""Workflows as users of ICEdit-ComfyUI-official share them, on the tiny models: a prompt, and a saved page.

Its three nodes by their ids, inputs and outputs; around them core's nodes, as in that pack's own example.
"""

from __future__ import annotations

SENTENCE = (
    "A diptych with two side-by-side images of the same scene. "
    "On the right, the scene is the same as on the left but "
)
EDIT = "make the circle red"
WIDTH, HEIGHT, STEPS = 512, 256, 2


def ends(positive: list, negative: list, latent: list) -> dict:
    """What stands behind the conditioning: a sampler, a decoder, the right panel as a file."""
    sampling = {"add_noise": "enable", "noise_seed": 5, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler"}
    sampling |= {"scheduler": "simple", "start_at_step": 0, "end_at_step": 1000}
    links = {"model": ["model", 0], "positive": positive, "negative": negative, "latent_image": latent}
    return {
        "model": {"class_type": "DiptychTinyModelLoader", "inputs": {"which": "fill"}},
        "sampler": {
            "class_type": "KSamplerAdvanced",
            "inputs": {**sampling, "return_with_leftover_noise": "disable", **links},
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["model", 2]}},
        "crop": {
            "class_type": "ImageCrop",
            "inputs": {"image": ["decode", 0], "width": WIDTH, "height": HEIGHT, "x": WIDTH, "y": 0},
        },
        "guidance": {
            "class_type": "FluxGuidance",
            "inputs": {"conditioning": ["words", 0], "guidance": 50.0},
        },
        "zero": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["words", 0]}},
    }


def saved(image: list, name: str) -> dict:
    return {"class_type": "SaveImage", "inputs": {"images": image, "filename_prefix": name}}


def theirs(file: str, name: str, connected: bool) -> dict:
    """Their three nodes; `connected`: the file comes through core's Load Image."""
    prompt = ends(["condition", 0], ["condition", 1], ["condition", 2])
    image = {"image": "None", "image_input": ["load", 0]} if connected else {"image": file}
    if connected:
        prompt["load"] = {"class_type": "LoadImage", "inputs": {"image": file}}
    words = {"editText": EDIT, "clip": ["model", 1]}
    inputs = {"In_context": ["guidance", 0], "negative": ["zero", 0], "vae": ["model", 2]}
    inputs |= {"diptych": ["diptych", 0], "maskDiptych": ["diptych", 1]}
    return prompt | {
        "diptych": {"class_type": "DiptychCreate", "inputs": image},
        "words": {"class_type": "InContextEditInstruction", "inputs": words},
        "condition": {"class_type": "ICEFConditioning", "inputs": inputs},
        "save": saved(["crop", 0], name),
        "whole": saved(["diptych", 0], f"{name}_diptych"),
    }


def core(file: str, name: str) -> dict:
    """The same by core's nodes alone."""
    prompt = ends(["condition", 0], ["condition", 1], ["condition", 2])
    stitch = {"image1": ["load", 0], "image2": ["load", 0], "direction": "right", "match_image_size": True}
    solid = {"value": 0.0, "width": 2 * WIDTH, "height": HEIGHT}
    parts = {"destination": ["left", 0], "source": ["right", 0], "x": WIDTH, "y": 0, "operation": "add"}
    inputs = {"positive": ["guidance", 0], "negative": ["zero", 0], "vae": ["model", 2]}
    inputs |= {"pixels": ["diptych", 0], "mask": ["mask", 0], "noise_mask": True}
    words = {"text": SENTENCE + EDIT, "clip": ["model", 1]}
    return prompt | {
        "load": {"class_type": "LoadImage", "inputs": {"image": file}},
        "diptych": {
            "class_type": "ImageStitch",
            "inputs": {**stitch, "spacing_width": 0, "spacing_color": "white"},
        },
        "left": {"class_type": "SolidMask", "inputs": solid},
        "right": {"class_type": "SolidMask", "inputs": {**solid, "value": 1.0, "width": WIDTH}},
        "mask": {"class_type": "MaskComposite", "inputs": parts},
        "words": {"class_type": "CLIPTextEncode", "inputs": words},
        "condition": {"class_type": "InpaintModelConditioning", "inputs": inputs},
        "save": saved(["crop", 0], name),
        "whole": saved(["diptych", 0], f"{name}_diptych"),
    }


def node(number: int, kind: str, values: list, inputs: list, outputs: list, mode: int = 0) -> dict:
    """A node of a saved workflow. inputs: (name, type, link or None); outputs: (name, type, links)."""
    return {
        "id": number,
        "type": kind,
        "mode": mode,
        "pos": [number % 6 * 400, number // 6 * 500],
        "size": [300, 300],
        "flags": {},
        "order": number,
        "inputs": [{"name": name, "type": kind, "link": link} for name, kind, link in inputs],
        "outputs": [{"name": name, "type": kind, "links": links} for name, kind, links in outputs],
        "properties": {"Node name for S&R": kind},
        "widgets_values": values,
    }


def page(file: str) -> dict:
    """As the page saved it, with a bypassed node of a third pack (ComfyUI-Easy-Use) that theirs has too."""
    C = "CONDITIONING"
    sampler = ["enable", 5, "fixed", STEPS, 1, "euler", "simple", 0, 1000, "disable"]
    condition_in = [("In_context", C, 6), ("negative", C, 7), ("vae", "VAE", 8)]
    condition_in += [("diptych", "IMAGE", 9), ("maskDiptych", "MASK", 10)]
    condition_out = [("In_context", C, [11]), ("negative", C, [12]), ("latent", "LATENT", [13])]
    sampled = [
        ("model", "MODEL", 1),
        ("positive", C, 11),
        ("negative", C, 12),
        ("latent_image", "LATENT", 13),
    ]
    made = [("diptych", "IMAGE", [9]), ("maskDiptych", "MASK", [10])]
    nodes = [
        node(
            1,
            "DiptychTinyModelLoader",
            ["fill"],
            [],
            [("model", "MODEL", [1]), ("clip", "CLIP", [2]), ("vae", "VAE", [8, 15])],
        ),
        node(2, "DiptychCreate", [file, "image"], [], made),
        node(3, "InContextEditInstruction", [EDIT], [("clip", "CLIP", 2)], [("In_context", C, [3])]),
        node(4, "easy cleanGpuUsed", [], [("anything", "*", 3)], [("output", "*", [4, 5])], mode=4),
        node(5, "FluxGuidance", [50], [("conditioning", C, 4)], [(C, C, [6])]),
        node(6, "ConditioningZeroOut", [], [("conditioning", C, 5)], [(C, C, [7])]),
        node(7, "ICEFConditioning", [], condition_in, condition_out),
        node(8, "KSamplerAdvanced", sampler, sampled, [("LATENT", "LATENT", [14])]),
        node(
            9,
            "VAEDecode",
            [],
            [("samples", "LATENT", 14), ("vae", "VAE", 15)],
            [("IMAGE", "IMAGE", [16])],
        ),
        node(10, "PreviewImage", [], [("images", "IMAGE", 16)], []),
    ]
    ends_of = {}
    for each in nodes:
        for slot, output in enumerate(each["outputs"]):
            for link in output["links"]:
                ends_of.setdefault(link, [None] * 5)[:3] = [link, each["id"], slot]
        for slot, entry in enumerate(each["inputs"]):
            ends_of.setdefault(entry["link"], [None] * 5)[3:] = [each["id"], slot]
    kinds = {entry["link"]: entry["type"] for each in nodes for entry in each["inputs"]}
    links = [[*ends_of[link], kinds[link]] for link in sorted(ends_of)]
    return {
        "nodes": nodes,
        "links": links,
        "groups": [],
        "version": 0.4,
        "last_node_id": 10,
        "last_link_id": 16,
    }
