"""Inpainting models of 8 and 9 channels made from 4: exact at the first step, trained by the one trainer."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from comfyui_diptych.models.glid.model import Glid
from comfyui_diptych.models.sd_inpaint import SDInpaint
from comfyui_diptych.training import recipes
from comfyui_diptych.training import trainer as sft
from comfyui_diptych.training.runtime import checkpoint
from comfyui_diptych.training.tasks import initial
from comfyui_diptych.training.tasks.families import make_task
from safetensors.torch import load_file
from toys import INPAINT, TRAIN

CHANNELS = {"glid": 8, "sd_inpaint": 9}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, sd_inpaint_pipeline):
    """The folder of a text-to-image pipeline of four channels."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(4)
    unet = UNet2DConditionModel.from_config({**sd_inpaint_pipeline.unet.config, "in_channels": 4}).eval()
    parts = {**sd_inpaint_pipeline.components, "unet": unet}
    parts.pop("image_encoder", None)
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("plain") / "sd"
    pipeline.save_pretrained(folder)
    return folder


def config(task, model, output, **options):
    values = {**TRAIN, "task": task, "model": str(model), "data": INPAINT, "output_dir": str(output)}
    return recipes.from_dict({**values, "method": "full", **options})


def prepared(c):
    trainer = sft.Trainer(c)
    trainer.prepare()
    return trainer


@pytest.mark.parametrize("task", CHANNELS)
def test_at_the_first_step_a_widened_model_is_the_one_of_four_channels(task, plain, tmp_path):
    from diffusers import UNet2DConditionModel

    trainer = prepared(config(task, plain, tmp_path))
    unet = UNet2DConditionModel.from_pretrained(plain, subfolder="unet")
    assert trainer.task.module.config.in_channels == CHANNELS[task]
    batch, noise, _ = trainer._batch()
    assert batch["masked_latents"].abs().max() > 0.1
    with torch.no_grad():
        wanted = unet(noise, 500, encoder_hidden_states=batch["tokens"]).sample
        found = trainer.task.predict(noise, 500, batch, 1.0)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_inputs_for_the_same_thing_keep_their_weights(sd_inpaint_pipeline):
    nine = sd_inpaint_pipeline.unet
    eight = initial.with_image(copy.deepcopy(nine), 8)
    weight = nine.conv_in.weight
    assert torch.equal(eight.conv_in.weight, weight[:, [0, 1, 2, 3, 5, 6, 7, 8]])
    assert eight.config.in_channels == 8 and torch.equal(eight.conv_in.bias, nine.conv_in.bias)
    back = initial.with_image(eight, 9).conv_in.weight
    assert not back[:, 4].any() and torch.equal(back[:, 5:], weight[:, 5:])
    assert initial.with_image(nine, 9) is nine
    odd = copy.deepcopy(nine)
    odd.register_to_config(in_channels=5)
    with pytest.raises(ValueError, match="5 channels: start from one of 4, 8"):
        initial.with_image(odd, 9)


def test_only_full_training_widens(plain, tmp_path):
    with pytest.raises(ValueError, match=r"4 input channels where SD inpainting has 9.*method: full"):
        make_task(config("sd_inpaint", plain, tmp_path, method="lora"))


def test_glid_sees_the_known_latents_and_exact_zeros_elsewhere(plain, tmp_path):
    trainer = prepared(config("glid", plain, tmp_path, mask_kinds=["half"]))
    batch, _, _ = trainer._batch()
    features = trainer.task.condition(batch, 1.0).features
    hidden = torch.nn.functional.max_pool2d(batch["mask"].float(), 8).bool().expand_as(features)
    assert features.shape[1] == 4 and not features[hidden].any()
    assert torch.equal(features[~hidden], batch["masked_latents"][~hidden])


@pytest.mark.parametrize("task, loads", [("glid", Glid), ("sd_inpaint", SDInpaint)])
def test_twenty_steps_learn_two_images_and_leave_a_folder_of_the_new_kind(task, loads, plain, tmp_path):
    seen = []
    options = {"data": ["shapes:2?size=32&task=inpaint"], "max_steps": 20, "batch_size": 8, "lr": 1e-2}
    c = config(task, plain, tmp_path, prompt_drop=0.0, save_every=20, **options)
    trainer = sft.Trainer(c, on_report=lambda r: seen.append(r.loss))
    folder = trainer.run()
    assert sum(seen[-4:]) < 0.7 * sum(seen[:4])
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == trainer.task.pipeline
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert unet["conv_in.weight"].shape[1] == CHANNELS[task]
    batch, noise, _ = trainer._batch()
    again = prepared(config(task, folder, tmp_path / "again", **options))
    with torch.no_grad():
        one, two = (t.task.predict(noise, 300, batch, 1.0) for t in (trainer, again))
    assert torch.allclose(one, two, atol=1e-5)
    assert loads.load(folder, torch.float32, "cpu").unet.config.in_channels == CHANNELS[task]


def test_a_glid_lora_changes_adapters_alone(plain, tmp_path):
    folder = sft.Trainer(config("glid", plain, tmp_path / "base", max_steps=1)).run()
    trainer = sft.Trainer(
        config("glid", folder, tmp_path / "lora", method="lora", sample_every=4, sample_steps=2)
    )
    path = trainer.run()
    base = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    for name, parameter in trainer.task.module.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter.data, base[name.replace(".base_layer", "")]), name
    trained = checkpoint.read_tensors(
        checkpoint.folders(tmp_path / "lora/checkpoints")[-1], "trained.safetensors"
    )
    assert trained and all("lora_" in name for name in trained)
    assert all(key.startswith("lora_unet_") for key in load_file(path))
    assert list((tmp_path / "lora/samples").glob("*.png"))


def test_sd15_gets_its_128_lora_modules():
    """Of rank 4 they are 797,184 numbers, and every one has a name of kohya's."""
    from comfyui_diptych.training.tasks import adapters
    from comfyui_diptych.training.tasks.sd_inpaint import SDInpaintTask
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=9, cross_attention_dim=768)
        c = recipes.from_dict({"task": "sd_inpaint", "rank": 4})
        adapters.add_lora(unet, SDInpaintTask.target_modules, c)
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert len(trained) == 2 * 128 and sum(p.numel() for p in trained) == 797_184


@pytest.mark.parametrize(
    "name, task, kinds", [("inpaint", "sd_inpaint", "outpaint_sides"), ("glid", "glid", "glid")]
)
def test_the_recipes_are_the_general_trainers(name, task, kinds):
    c = recipes.load(name)
    assert type(c) is recipes.TrainConfig and (c.task, c.method) == (task, "full")
    assert kinds in c.mask_kinds and c.prompt_drop == 0.198
