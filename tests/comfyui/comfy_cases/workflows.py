"""Every example workflow opens without a missing node, names its files, and runs in the real executor."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from . import SkipCase, case, glid, workflow, workflow_names

# Where a loader looks for its files, and which of the tiny loader's outputs takes its place.
LOADERS = {
    "UNETLoader": {"unet_name": "diffusion_models"},
    "DualCLIPLoader": {"clip_name1": "text_encoders", "clip_name2": "text_encoders"},
    "CLIPLoader": {"clip_name": "text_encoders"},
    "VAELoader": {"vae_name": "vae"},
    "CheckpointLoaderSimple": {"ckpt_name": "checkpoints"},
    "ControlNetLoader": {"control_net_name": "controlnet"},
    "DiptychEditModelLoader": {
        "unet_name": "diffusion_models",
        "clip_name1": "text_encoders",
        "clip_name2": "text_encoders",
        "vae_name": "vae",
    },
}
SLOTS = {"UNETLoader": 0, "DualCLIPLoader": 1, "CLIPLoader": 1, "VAELoader": 2, "CheckpointLoaderSimple": 0}
TINY = {"clip_name1": "auto", "clip_name2": "auto", "vae_name": "auto"}
LORAS = {"DiptychGRPOLoraLoader": "lora", "LoraLoaderModelOnly": "lora_name"}
BUNDLED = "diptych tiny demo/"
SD_NODES = {"DiptychSDInpaintConditioner", "DiptychControlNetInpaint"}
SIDE = 64
FEW = {
    "steps": 2,
    "judge_steps": 1,
    "candidates": 2,
    "updates": 1,
    "group_size": 2,
    "groups": 1,
    "preview_every": 0,
}


def convert(host, name: str) -> dict:
    import workflow as convert_module

    schemas = {cls: definition.INPUT_TYPES() for cls, definition in host.nodes.items() if _plain(definition)}
    return convert_module.to_api(workflow(name), schemas)


def _plain(definition) -> bool:
    return hasattr(definition, "INPUT_TYPES")


def files(prompt: dict) -> dict[str, str]:
    """The model files a prompt asks for, with the folder each belongs in."""
    found = {}
    for node in prompt.values():
        for key, folder in LOADERS.get(node["class_type"], {}).items():
            if (name := node["inputs"][key]) != "auto" and "(bundled)" not in name:
                found[name] = folder
        lora = node["inputs"].get(LORAS.get(node["class_type"]), BUNDLED)
        if not lora.startswith(BUNDLED):
            found[lora] = "loras"
    return found


def placeholders(host, prompt: dict) -> None:
    """Empty files where the models would be, and a tiny LoRA under each LoRA's name."""
    import folder_paths

    for name, folder in files(prompt).items():
        path = host.base / "models" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if folder == "loras":
            shutil.copy(tiny_lora(host, moe="moe" in name), path)
        else:
            path.touch()
    if any(node["class_type"] == "DiptychPowerPaintPrompt" for node in prompt.values()):
        from .powerpaint import write_embeddings

        write_embeddings(host, 64)
    folder_paths.filename_list_cache.clear()


def tiny_lora(host, *, moe: bool) -> Path:
    folder = host.pack("models.tiny").folder() / "loras"
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    match = [path for path in found if ("moe" in path.stem) == moe]
    if not match:
        raise SkipCase(f"no bundled tiny LoRA in {folder}")
    return match[0]


def swapped(host, prompt: dict, few: dict = FEW) -> dict:
    """The same prompt on the tiny model, on small images, in a `few` steps (glid's sampler takes four)."""
    used = {node["class_type"] for node in prompt.values()}
    slots = {key: SLOTS[node["class_type"]] for key, node in prompt.items() if node["class_type"] in SLOTS}
    small = {key: node for key, node in prompt.items() if key not in slots}
    for node in small.values():
        if node["class_type"] == "ControlNetLoader":
            node.update(class_type="TestTinyControlNet", inputs={})
        inputs = node["inputs"]
        for key, value in inputs.items():
            if isinstance(value, list) and value[0] in slots:
                inputs[key] = ["tiny", slots[value[0]] + value[1]]
        inputs.update({key: value for key, value in few.items() if key in inputs})
        if node["class_type"] == "DiptychEditModelLoader" and "(bundled)" not in inputs["unet_name"]:
            which = "kontext" if "kontext" in inputs["unet_name"] else "fill"
            inputs.update(TINY, unet_name=f"tiny {which} (bundled)")
        if inputs.get("panel_width", 0) > SIDE:
            inputs["panel_width"] = SIDE
        if few and node["class_type"] == "DiptychGlidSampler":
            inputs["steps"] = 4
        if node["class_type"] == "DiptychTiledSampler":
            inputs.update(window=SIDE, stride=SIDE // 2)
        if node["class_type"] == "DiptychContextCrop":
            inputs["size"] = min(inputs["size"], SIDE)
        if "size_policy" in inputs:
            inputs["size_policy"] = "keep"
    if slots and "DiptychGlidConditioner" in used:
        for slot, value in enumerate(glid.load(host)):
            graph = host.graph()
            node, _ = graph.given(value)
            small[f"glid {slot}"] = graph.prompt[node]
        for node in small.values():
            for key, value in node["inputs"].items():
                if isinstance(value, list) and value[0] == "tiny":
                    node["inputs"][key] = [f"glid {value[1]}", 0]
    elif slots:
        which = "kontext" if "DiptychKontextConditioner" in used else "fill"
        which = "sd_inpaint" if used & SD_NODES else which
        small["tiny"] = {"class_type": "DiptychTinyModelLoader", "inputs": {"which": which}}
    return small


class TinyControlNet:
    """Test-only node: a ControlNet of random weights for the tiny Stable Diffusion model."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONTROL_NET",), "make", "test"

    def make(self):
        from .control_inpaint import Plain

        return (Plain(self.host).control,)


def small_example(host) -> None:
    """ComfyUI's example image at the tiny model's size."""
    from PIL import Image

    path = host.base / "input" / "example.png"
    with Image.open(path) as image:
        small = image.convert("RGB").resize((SIDE, SIDE))
    small.save(path)


@case(each=workflow_names)
def it_opens_without_a_missing_node_and_validates(host, name):
    import workflow as convert_module

    subgraphs = convert_module.subgraphs(workflow(name))
    known = set(host.nodes) | {"Note", "MarkdownNote"} | set(subgraphs)
    nodes = [node for graph in (workflow(name), *subgraphs.values()) for node in graph["nodes"]]
    assert [node["type"] for node in nodes if node["type"] not in known] == []
    prompt = convert(host, name)
    placeholders(host, prompt)
    valid, error, _, node_errors = host.validate(prompt)
    assert valid, (error, node_errors)


@case(each=workflow_names)
def its_note_names_every_file_it_needs(host, name):
    import workflow as convert_module

    text = convert_module.notes(workflow(name))
    assert text, "no note"
    for file, folder in files(convert(host, name)).items():
        assert file in text and folder in text, f"{folder}/{file} is not in the note"


@case(each=workflow_names)
def it_runs_changes_no_input_and_is_cached_after(host, name):
    from fingerprint import watch

    prompt = convert(host, name)
    placeholders(host, prompt)
    small_example(host)
    TinyControlNet.host = host
    host.nodes["TestTinyControlNet"] = TinyControlNet
    prompt = swapped(host, prompt)
    changed: list[str] = []
    with watch({node: host.nodes[node] for node in host.pack_nodes}, changed):
        first = host.run(prompt)
    assert changed == [], changed
    ran = {prompt[key]["class_type"] for key in first.executed}
    assert ran == {node["class_type"] for node in prompt.values()}
    images = [image for output in first.outputs.values() for image in output.get("images", [])]
    assert images
    if "DiptychCanvasStore" in ran:  # the first run made the files that the node looks at
        host.run(prompt)
    if host.caches:
        assert host.run(prompt).executed == []
    assert torch.is_inference_mode_enabled() is False


@case(each=lambda: ["Edit by instruction - tiny", "Edit with Kontext - tiny", "Fill a mask - tiny"])
def the_demo_as_shipped_makes_the_edit_it_asks_for(host, name):
    if not host.pack("models.tiny").card().get("trained"):
        raise SkipCase("the bundled tiny models are not trained yet")
    prompt = convert(host, name)
    number = {node["class_type"]: key for key, node in prompt.items()}
    demo = number["DiptychDemoImage"]
    judged = {"edited": [number["DiptychSplit"], 0], "source": [demo, 0], "instruction": [demo, 1]}
    prompt["judge"] = {"class_type": "DiptychEditScore", "inputs": {**judged, "expected": [demo, 3]}}
    prompt["keep"] = {"class_type": "TestKeepValue", "inputs": {"value": ["judge", 3], "name": "success"}}
    assert host.run(prompt).kept["success"] == 1.0


@case
def the_sd_demo_as_shipped_fills_in_what_its_caption_says(host):
    if not host.pack("models.tiny").card().get("trained"):
        raise SkipCase("the bundled tiny models are not trained yet")
    prompt = convert(host, "Fill a mask - tiny SD")
    number = {node["class_type"]: key for key, node in prompt.items()}
    demo = number["DiptychDemoImage"]
    kept = {"filled": [number["VAEDecode"], 0], "image": [demo, 0], "mask": [demo, 2], "expected": [demo, 3]}
    for key, value in kept.items():
        prompt[f"keep {key}"] = {"class_type": "TestKeepValue", "inputs": {"value": value, "name": key}}
    seen = host.run(prompt).kept
    hole = seen["mask"] > 0
    filled, image, expected = (seen[key].float()[hole] for key in ("filled", "image", "expected"))
    wrong = ((filled - expected).abs().amax(dim=-1) > 0.25).float().mean()
    asked = ((image - expected).abs().amax(dim=-1) > 0.25).float().mean()
    assert wrong < 0.3 * asked, (wrong, asked)


WIDE = {"Outpaint step by step - tiny": 96, "Outpaint - tiny glid": 96, "Panorama - tiny": 192}


@case(each=lambda: [*WIDE, "Repair a detail - tiny"])
def what_an_outpaint_does_not_repaint_is_the_image_itself(host, name):
    prompt = convert(host, name)
    number = {node["class_type"]: key for key, node in prompt.items()}
    kept = {"image": [number["DiptychDemoImage"], 0], "finished": [number["DiptychPasteBack"], 0]}
    if name == "Repair a detail - tiny":
        kept["mask"] = [number["DiptychDemoImage"], 2]
    for key, value in kept.items():
        prompt[f"keep {key}"] = {"class_type": "TestKeepValue", "inputs": {"value": value, "name": key}}
    run = host.run(prompt)
    image, finished = run.kept["image"], run.kept["finished"]
    height, width = image.shape[1:3]
    if name in WIDE:
        assert tuple(finished.shape[1:3]) == (64, WIDE[name])
        known = torch.ones(1, height, width, dtype=torch.bool)
    else:
        assert finished.shape == image.shape == (1, 128, 128, 3)
        known = run.kept["mask"] == 0
        assert not torch.equal(finished, image)
    assert torch.equal(finished[:, :height, :width][known], image[known])


@case
def the_glid_demo_as_shipped_paints_what_its_prompt_says(host):
    prompt = convert(host, "Outpaint - tiny glid")
    number = {node["class_type"]: key for key, node in prompt.items()}
    value = {"value": [number["DiptychPasteBack"], 0], "name": "finished"}
    prompt["keep"] = {"class_type": "TestKeepValue", "inputs": value}
    window = host.run(prompt).kept["finished"][:, :, -SIDE:].cpu().float()
    shapes = host.pack("training.tiny.shapes")
    asked = [node["inputs"].get("text") for node in prompt.values()]
    blue, red = (
        shapes.Shape("circle", "blue", "large", "top right"),
        shapes.Shape("cross", "red", "large", "bottom left"),
    )
    scene = shapes.Scene("yellow", (blue, red))
    assert scene.caption in asked and shapes.read(window).matches([scene]).tolist() == [True]


@case
def an_infinite_zoom_keeps_every_image_that_it_zooms_out_of(host):
    prompt = convert(host, "Infinite zoom - tiny")
    number = {node["class_type"]: key for key, node in prompt.items()}
    stores = [key for key, node in prompt.items() if node["class_type"] == "DiptychCanvasStore"]
    places = {"image": [number["DiptychDemoImage"], 3]} | {f"store {i}": [k, 1] for i, k in enumerate(stores)}
    for name, value in places.items():
        prompt[f"keep {name}"] = {"class_type": "TestKeepValue", "inputs": {"value": value, "name": name}}
    kept = host.run(prompt).kept
    images = [kept["image"], *(kept[f"store {i}"] for i in range(len(stores)))]
    assert [image.shape[1] for image in images] == [64, 64, 128, 256, 256]
    assert torch.equal(images[1], (images[0] * 255).round() / 255)
    assert torch.equal(images[4], images[3])
    for inner, outer in zip(images[1:3], images[2:4], strict=True):
        edge = (outer.shape[1] - inner.shape[1]) // 2
        assert torch.equal(outer[:, edge:-edge, edge:-edge], inner)
        assert float((outer[:, :edge] - inner.mean()).abs().mean()) > 0.01


@case
def the_reward_trained_lora_mends_the_edit_that_its_workflow_shows(host):
    prompt = convert(host, "Edit with a reward LoRA - tiny")
    number = {node["class_type"]: key for key, node in prompt.items()}
    demo = number["DiptychDemoImage"]
    splits = [key for key, node in prompt.items() if node["class_type"] == "DiptychSplit"]
    for key in splits:
        judged = {"edited": [key, 0], "source": [demo, 0], "instruction": [demo, 1], "expected": [demo, 3]}
        prompt[f"judge {key}"] = {"class_type": "DiptychEditScore", "inputs": judged}
        prompt[f"keep {key}"] = {
            "class_type": "TestKeepValue",
            "inputs": {"value": [f"judge {key}", 3], "name": key},
        }
    kept = host.run(prompt).kept
    assert [kept[key] for key in sorted(splits, key=int)] == [0.0, 1.0]


@case
def best_of_six_mends_the_edit_that_one_start_gets_wrong(host):
    prompt = convert(host, "Best of six - tiny")
    number = {node["class_type"]: key for key, node in prompt.items()}
    demo = number["DiptychDemoImage"]
    splits = sorted((k for k, node in prompt.items() if node["class_type"] == "DiptychSplit"), key=int)
    for key in splits:
        judged = {"edited": [key, 0], "source": [demo, 0], "expected": [demo, 3]}
        prompt[f"judge {key}"] = {"class_type": "DiptychEditScore", "inputs": judged}
        kept = {"value": [f"judge {key}", 3], "name": key}
        prompt[f"keep {key}"] = {"class_type": "TestKeepValue", "inputs": kept}
    kept = host.run(prompt).kept
    assert [kept[key] for key in splits] == [0.0, 1.0]  # one sample, best of six


@case
def eight_edits_of_the_score_template_have_eight_different_scores(host):
    prompt = convert(host, "Judge edits - tiny")
    node = next(key for key, node in prompt.items() if node["class_type"] == "DiptychRewardScore")
    for name, slot in (("best", 0), ("report", 1)):
        kept = {"value": [node, slot], "name": name}
        prompt[f"keep {name}"] = {"class_type": "TestKeepValue", "inputs": kept}
    run = host.run(prompt)
    places = [line.split(": ")[1].split(",") for line in run.kept["report"].splitlines()[:8]]
    totals = [float(place[0]) for place in places]
    assert len(set(totals)) == 8 and totals == sorted(totals, reverse=True) and run.kept["best"] > 0
    assert len({place[1] for place in places}) > 2 and "nan" not in run.kept["report"]
    assert run.outputs[node]["images"], "the node shows no sheet"
