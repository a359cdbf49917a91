"""Every dataset format and command that the training notes of ICEdit, Kontext, SD inpainting and DreamBooth
name, each once through the command line on the bundled tiny models. Precomputed data: `test_precomputed.py`.
"""

from __future__ import annotations

import io
import json

import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.models import lora, tiny
from comfyui_diptych.training.data.sample import to_pil
from comfyui_diptych.training.tiny import shapes
from PIL import Image
from safetensors.torch import load_file

QUICK = {
    "resolution": 64,
    "max_sequence_length": 24,
    "mixed_precision": "no",
    "base_dtype": "float32",
    "cache_dtype": "float32",
    "log_with": ["none"],
    "sample_steps": 1,
    "sample_count": 1,
    "max_steps": 2,
}
REWARD = {
    "group_size": 2,
    "micro_batch": 2,
    "groups_per_update": 2,
    "rank": 4,
    "gradient_checkpointing": False,
}
LORAS = tiny.folder() / "loras"


@pytest.fixture(scope="module")
def world():
    """Four edits of the shapes world."""
    return list(shapes.edit_pairs(5, 4, "train", size=64))


@pytest.fixture(scope="module")
def root(world, tmp_path_factory):
    """The four as PNG files, a folder for each format."""
    root = tmp_path_factory.mktemp("notes")
    for name in ("pairs", "images", "masks", "dog", "captions"):
        (root / name).mkdir()
    rows = []
    for number, pair in enumerate(world):
        to_pil(pair.source).save(root / "pairs" / f"{number}_source.png")
        to_pil(pair.target).save(root / "pairs" / f"{number}_target.png")
        (root / "pairs" / f"{number}.txt").write_text(pair.instruction)
        to_pil(pair.target).save(root / "images" / f"train_{number:06d}.png")
        Image.fromarray((pair.mask * 255).byte().numpy()).save(root / "masks" / f"train_{number:06d}.png")
        to_pil(pair.target).resize((80, 64)).save(root / "dog" / f"photo {number}.jpg")
        to_pil(pair.target).save(root / "captions" / f"image{number}.png")
        (root / "captions" / f"image{number}.txt").write_text(pair.caption)
        rows.append(
            {
                "prompt": pair.caption,
                "image": f"images/train_{number:06d}.png",
                "mask": f"masks/train_{number:06d}.png",
            }
        )
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def magicbrush(world, tmp_path_factory):
    """As osunlp/MagicBrush lies on the hub: data/train-*.parquet and data/dev-*.parquet."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("MagicBrush")
    features = datasets.Features(
        {
            "img_id": datasets.Value("string"),
            "turn_index": datasets.Value("int32"),
            "source_img": datasets.Image(),
            "mask_img": datasets.Image(),
            "instruction": datasets.Value("string"),
            "target_img": datasets.Image(),
        }
    )
    (folder / "data").mkdir()
    for split, some in (("train", world[:2]), ("dev", world[2:])):
        rows = [
            {
                "img_id": str(number),
                "turn_index": 1,
                "source_img": to_pil(pair.source).resize((128, 128)),
                "mask_img": to_pil(pair.source).resize((128, 128)),
                "instruction": pair.instruction,
                "target_img": to_pil(pair.target).resize((128, 128)),
            }
            for number, pair in enumerate(some)
        ]
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
        table.save_to_disk(str(folder.parent / "saved" / split))
    (folder.parent / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "dev"]}')
    return folder


@pytest.fixture(scope="module")
def omniedit(world, tmp_path_factory):
    """As prepare.sh leaves OmniEdit: parquet/*.parquet, images as bytes, written without `datasets`."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("parquet")
    for shard in range(2):
        rows = []
        for number, pair in enumerate(world[2 * shard : 2 * shard + 2]):
            rows.append(
                {
                    "omni_edit_id": f"task_{shard}_{number}",
                    "task": ("swap", "removal")[number],
                    "src_img": {"bytes": png(pair.source), "path": None},
                    "edited_img": {"bytes": png(pair.target), "path": "edited.png"},
                    "edited_prompt_list": [pair.instruction, pair.instruction + " please"],
                    "width": 64,
                    "height": 64,
                    "sc_score_1": 9,
                    "o_score": 8.5,
                }
            )
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"train-{shard:05d}-of-00002.parquet")
    return folder


def png(image):
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def command(name, recipe, output, **options):
    argv = [name, recipe]
    for key, value in {**QUICK, "output_dir": str(output), **options}.items():
        argv += ["--set", f"{key}={json.dumps(value)}"]
    assert cli.main(argv) == 0
    return output


def model(task):
    return str(tiny.folder() / task)


def moved(file):
    """The header of a LoRA file that changes something."""
    weights = lora.read(file)
    assert any(module.dense().abs().max() > 0 for module in weights.modules.values())
    return weights.info


# ------------------------------------------------------------- icedit.md


@pytest.mark.parametrize("kind", ["magicbrush", "saved", "omniedit", "omniedit_task", "both"])
def test_icedit_trains_on_its_data_sets(kind, magicbrush, omniedit, tmp_path):
    """EditDataset, OminiDataset and EditDataset_with_Omini, with the values of normal_lora.yaml."""
    data = {
        "magicbrush": [f"magicbrush:{magicbrush}"],
        "saved": [f"magicbrush:{magicbrush.parent / 'saved'}"],
        "omniedit": [f"omniedit:{omniedit}/*.parquet"],
        "omniedit_task": [f"omniedit:{omniedit}?task=swap"],
        "both": [f"magicbrush:{magicbrush}@1", f"omniedit:{omniedit}/*.parquet@5"],
    }[kind]
    options = {"batch_size": 2, "prompt_drop": 0.1, "rank": 32, "optimizer": "prodigy", "lr": 1}
    if kind != "both":
        options |= {"max_steps": 1, "rank": 4, "optimizer": "adamw", "lr": 1e-3}
    out = command(
        "train", "icedit", tmp_path / "out", model=model("fill"), data=data, sample_every=0, **options
    )
    info = moved(out / "icedit.safetensors")
    assert info.rank == options["rank"] and info.base == model("fill")
    rows = {"omniedit_task": 2}.get(kind, 4)
    listed = [
        line for file in (out / "cache").glob("rows-*/*.jsonl") for line in file.read_text().splitlines()
    ]
    prompts = {json.loads(line)["prompt"] for line in listed}
    assert all(prompt.startswith("A diptych with two side-by-side images") for prompt in prompts)
    assert len({json.loads(line)["key"] for line in listed}) == (8 if kind == "both" else rows)


def test_icedit_moe_trains_and_edits(omniedit, tmp_path, capsys):
    """moe_lora.yaml, then inference_moe.py: 28 steps at guidance 50 become 2 here."""
    data = [f"omniedit:{omniedit}/*.parquet"]
    options = {
        "model": model("fill"),
        "data": data,
        "optimizer": "adamw",
        "lr": 1e-3,
        "rank": 4,
        "max_steps": 1,
    }
    out = command("train", "icedit_moe", tmp_path / "out", sample_every=1, **options)
    assert (out / "samples" / "step_00000001.png").is_file()
    for file in (out / "icedit_moe.safetensors", LORAS / "icedit_moe.safetensors"):
        capsys.readouterr()
        edit(tmp_path, "--lora", str(file), "--guidance", "50", "--steps", "2", "--seed", "42")
        assert "experts" in capsys.readouterr().out


def test_inference_with_the_plain_lora(tmp_path, capsys):
    """inference.py: an image of another width, the edited half comes back at the size of the image."""
    source = Image.new("RGB", (96, 64), "blue")
    source.save(tmp_path / "in.png")
    argv = (
        "--lora",
        f"{LORAS / 'icedit.safetensors'}:1.0",
        "--guidance",
        "50",
        "--steps",
        "2",
        "--seed",
        "42",
    )
    edited = edit(tmp_path, *argv, image=str(tmp_path / "in.png"))
    assert edited.size == (96, 64) and "rank 32" in capsys.readouterr().out


def edit(folder, *argv, image=None):
    out = folder / "edited.png"
    assert cli.main(["edit", *([image] if image else []), "make it red", *argv, "-o", str(out)]) == 0
    return Image.open(out)


# ------------------------------------------------------------- flux-kontext.md


def test_kontext_trains_on_pairs_and_edits(root, tmp_path):
    options = {"model": model("kontext"), "data": [f"pairs:{root / 'pairs'}"], "bucket_step": 16, "rank": 4}
    out = command(
        "train", "kontext", tmp_path / "out", sample_every=0, accumulation=1, lr_warmup=0, **options
    )
    moved(out / "kontext.safetensors")
    edited = edit(tmp_path, "--engine", "kontext", "--lora", str(out / "kontext.safetensors"), "--steps", "2")
    assert edited.size == (64, 64)


# ------------------------------------------------------------- flux-fill-and-sd15-inpainting.md


@pytest.mark.parametrize("task", ["sd_inpaint", "fill"])
def test_prompt_image_mask_rows_train(task, root, tmp_path):
    recipe = {"sd_inpaint": "sd_inpaint_dreambooth", "fill": "icedit"}[task]
    options = {"optimizer": "adamw", "lr": 1e-3, "rank": 4, "batch_size": 2, "layout": "auto"}
    if task == "sd_inpaint":
        options["class_images"] = ""
    data = [f"jsonl:{root / 'train.jsonl'}"]
    out = command("train", recipe, tmp_path / "out", model=model(task), data=data, sample_every=0, **options)
    moved(out / f"{recipe}.safetensors")


@pytest.mark.parametrize("task", ["sd_inpaint", "fill"])
@pytest.mark.parametrize("preset", ["fast", "dance"])
def test_prompt_image_mask_rows_are_improved_by_reward(task, preset, root, tmp_path):
    options = {**REWARD, "task": task, "model": model(task), "rewards": ["keep_l1", "jpeg_size=0.2"]}
    if task == "sd_inpaint":
        options |= {"rollout_guidance": 2.5, "sample_guidance": 2.5, "shared_noise": False}
    data = [f"jsonl:{root / 'train.jsonl'}"]
    out = command(
        "grpo",
        f"grpo_{preset}",
        tmp_path / "out",
        data=data,
        rollout_steps=10,
        max_steps=1,
        window="random:0-9",
        window_size=2,
        **options,
    )
    assert moved(out / f"grpo_{preset}.safetensors").reward


@pytest.mark.parametrize("kind", ["images", "jsonl"])
def test_data_without_finished_images_says_so_by_itself(kind, root, tmp_path, capsys):
    """Sources with instructions: nothing is taken for the target image, with no option to be set for it."""
    from comfyui_diptych.training.data.sources import open_source

    data = f"images:{root / 'pairs'}?edit=true"
    if kind == "jsonl":
        rows = [{"prompt": "make it red", "image": str(root / "pairs" / f"{n}_source.png")} for n in range(4)]
        (tmp_path / "s.jsonl").write_text(
            "\n".join(json.dumps(row | {"source": row["image"]}) for row in rows)
        )
        data = f"jsonl:{tmp_path / 's.jsonl'}"
    sample = open_source(data)[0]
    assert sample.source is sample.target
    options = {**REWARD, "task": "kontext", "model": model("kontext"), "data": [data], "max_steps": 1}
    out = command("grpo", "grpo_fast", tmp_path / "out", rewards=["jpeg_size", "shapes"], **options)
    assert moved(out / "grpo_fast.safetensors").reward
    argv = [f"--set={key}={json.dumps(value)}" for key, value in (QUICK | options).items()]
    argv += [f"--set=output_dir={tmp_path / 'two'}", "--set=rewards=[jpeg_size]", "--set=data_rows=2"]
    capsys.readouterr()
    assert cli.main(["grpo", "grpo_fast", *argv]) == 2
    assert "rows of the data have none" in capsys.readouterr().err


def test_a_row_offers_what_the_notes_data_set_returns(root):
    from comfyui_diptych.training.data.sources import open_source

    row = open_source(f"jsonl:{root / 'train.jsonl'}")[1]
    image, mask = row.image.movedim(-1, 0) * 2 - 1, row.mask[None]
    assert image.shape == (3, 64, 64) and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.allclose(row.masked_image.movedim(-1, 0) * 2 - 1, image * (1 - mask), atol=1e-6)
    assert row.image_pil.size == row.mask_pil.size == (64, 64) and row.mask_pil.mode == "L"
    assert row.image_path == root / "images/train_000001.png" and row.mask_path.name == "train_000001.png"


# ------------------------------------------------------------- outpainting.md


def test_dreambooth_with_prior_preservation(root, tmp_path):
    """train_dreambooth_inpaint_lora.py: one prompt for a folder of images, class images made by the model."""
    data = [f"images:{root / 'dog'}?prompt=a photo of sks dog"]
    options = {
        "class_images": f"{tmp_path / 'class'}?prompt=a photo of dog&count=3@1.0",
        "mask_variants": 2,
        "batch_size": 1,
        "gradient_checkpointing": True,
    }
    out = command(
        "train",
        "sd_inpaint_dreambooth",
        tmp_path / "out",
        model=model("sd_inpaint"),
        data=data,
        sample_every=2,
        sample_guidance=2.5,
        **options,
    )
    assert len(list((tmp_path / "class").glob("*.png"))) == 3
    moved(out / "sd_inpaint_dreambooth.safetensors")
    lines = [json.loads(line) for file in (out / "cache").glob("rows-*/*.jsonl") for line in file.open()]
    assert {(line["prompt"], line["prior"]) for line in lines} == {
        ("a photo of sks dog", False),
        ("a photo of dog", True),
    }
    assert (out / "samples" / "step_00000002.png").is_file()


def test_dreambooth_of_the_whole_model_and_its_text_encoder(root, tmp_path):
    """train_dreambooth_inpaint.py: the pipeline it saves is an inpainting one."""
    from diffusers import StableDiffusionInpaintPipeline

    data = [f"images:{root / 'dog'}?prompt=a photo of sks dog"]
    options = {"method": "full", "train_text_encoder": True, "class_images": "", "lr": 2e-6, "max_steps": 1}
    out = command(
        "train",
        "sd_inpaint_dreambooth",
        tmp_path / "out",
        model=model("sd_inpaint"),
        data=data,
        sample_every=0,
        batch_size=1,
        **options,
    )
    (index,) = out.rglob("model_index.json")
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(index.parent)
    assert pipeline.unet.config.in_channels == 9
    before = load_file(tiny.folder() / "sd_inpaint" / "text_encoder" / "model.safetensors")
    after = pipeline.text_encoder.state_dict()
    assert any(not torch.equal(after[name], before[name].float()) for name in after if name in before)


def test_a_folder_of_images_with_captions_trains_inpainting(root, tmp_path):
    """glid-3-xl's image_train_inpaint.py reads image1.png beside image1.txt."""
    data, options = [f"images:{root / 'captions'}"], {"class_images": "", "rank": 4, "max_steps": 1}
    out = command(
        "train",
        "sd_inpaint_dreambooth",
        tmp_path / "out",
        model=model("sd_inpaint"),
        data=data,
        sample_every=0,
        **options,
    )
    moved(out / "sd_inpaint_dreambooth.safetensors")


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("drop_text_prob", "prompt_drop"),
        ("learning_rate", "lr"),
        ("instance_data_dir", r"images:FOLDER\?prompt=WORDS"),
        ("with_prior_preservation", "class_images"),
        ("use_8bit_adam", "optimizer=adamw8bit"),
    ],
)
def test_an_option_by_another_trainers_name_says_ours(theirs, ours, capsys):
    import re

    assert cli.main(["train", "icedit", "--set", f"{theirs}=1"]) == 2
    assert re.search(f"unknown option '{theirs}'.*{ours}", capsys.readouterr().err)
