"""PowerPaint in the shell: a text encoder extended as PowerPaint extends its own, blended by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.commands import images
from comfyui_diptych.models import editing, powerpaint
from comfyui_diptych.models.sd_inpaint import SDInpaint
from safetensors.torch import save_file


@pytest.fixture
def power(sd_inpaint_pipeline, tmp_path):
    """(folder of a PowerPaint with other weights than the pipeline's, its UNet, its encoder, the tokens)"""
    torch.manual_seed(1)
    unet, encoder = copy.deepcopy(sd_inpaint_pipeline.unet), copy.deepcopy(sd_inpaint_pipeline.text_encoder)
    with torch.no_grad():
        for parameter in (*unet.parameters(), *encoder.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    width = encoder.config.hidden_size
    tokens = {token: torch.randn(10, width) * 0.5 for token in powerpaint.TOKENS}
    state = {
        f"text_model.{name.removeprefix('text_model.')}": tensor.clone()  # as transformers 4 named them
        for name, tensor in encoder.state_dict().items()
    }
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    prefix = next(name for name in state if name.endswith("token_embedding.weight")).removesuffix("weight")
    state[f"{prefix}wrapped.weight"] = state.pop(f"{prefix}weight")
    state |= {f"{prefix}trainable_embeddings.{token}": vectors for token, vectors in tokens.items()}
    for name in (powerpaint.UNET, powerpaint.ENCODER):
        (tmp_path / name).parent.mkdir()
    save_file(unet.state_dict(), tmp_path / powerpaint.UNET)
    save_file(state, tmp_path / powerpaint.ENCODER)
    return tmp_path, unet, encoder, tokens


@pytest.fixture
def model(sd_inpaint_pipeline, tmp_path_factory):
    """A fresh copy of the pipeline in a folder, for it is changed in place."""
    folder = tmp_path_factory.mktemp("sd")
    sd_inpaint_pipeline.save_pretrained(folder)
    return folder


def by_hand(pipeline, encoder, tokens, text: str) -> torch.Tensor:
    """The text's embedding: each placeholder's vectors put where ten dummies stood, then the encoder."""
    tokenizer, limit = pipeline.tokenizer, pipeline.tokenizer.model_max_length
    table = encoder.get_input_embeddings().weight
    rows = []
    for word in text.split():
        ids = tokenizer(word, add_special_tokens=False).input_ids
        rows += list(tokens[word]) if word in tokens else [table[number] for number in ids]
    special = tokenizer("make").input_ids
    rows = [table[special[0]], *rows[: limit - 2], table[special[-1]]]
    rows += [table[tokenizer.pad_token_id]] * (limit - len(rows))
    extended = copy.deepcopy(encoder)
    extended.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.stack(rows)))
    return extended(torch.arange(limit)[None])[0]


@pytest.mark.parametrize(
    ("task", "fitting"), [("remove", 1.0), ("shape", 1.0), ("shape", 0.3), ("text", 1.0)]
)
def test_embeddings_are_the_blend_made_by_hand(power, model, sd_inpaint_pipeline, task, fitting):
    folder, unet, encoder, tokens = power
    denoiser = SDInpaint.load(model, torch.float32, "cpu")
    powerpaint.load_onto(denoiser, folder)
    assert all(torch.equal(a, b) for a, b in zip(denoiser.unet.parameters(), unet.parameters(), strict=True))
    made = powerpaint.encode(denoiser, task, "cat", "dog", fitting)
    for found, pair in zip(made, powerpaint.prompts(task, "cat", "dog"), strict=True):
        first, second = (by_hand(sd_inpaint_pipeline, encoder, tokens, text) for text in pair)
        torch.testing.assert_close(
            found.tokens, fitting * first + (1 - fitting) * second, atol=1e-6, rtol=1e-5
        )
    if task == "shape":
        other = powerpaint.encode(denoiser, task, "cat", "dog", 1 - fitting)
        assert (other[0].tokens - made[0].tokens).abs().max() > 1e-3


def test_the_command_paints_with_it(power, model, tmp_path, random_image, capsys):
    folder, *_ = power
    photo, mask = random_image(1, 48, 64), torch.zeros(48, 64, 3)
    mask[20:40, 30:60] = 1
    images.to_pil(photo[0]).save(tmp_path / "photo.png")
    images.to_pil(mask).save(tmp_path / "mask.png")
    fixed = [
        "--mask",
        tmp_path / "mask.png",
        "--blend",
        0,
        "--keep-colours",
        "--steps",
        2,
        "--dtype",
        "float32",
    ]
    fixed += ["--device", "cpu", "--model", model, "-o", tmp_path / "out.png"]
    words = ["inpaint", tmp_path / "photo.png", "", *fixed, "--powerpaint", folder, "--task", "remove"]
    assert cli.main([str(word) for word in words]) == 0
    denoiser = SDInpaint.load(model, torch.float32, "cpu")
    powerpaint.load_onto(denoiser, folder)
    prompt, negative = powerpaint.encode(denoiser, "remove", "")
    image = images.load_image(tmp_path / "photo.png")
    sampling = editing.Sampling(steps=2)
    expected = editing.inpaint_sd(
        denoiser, image, mask[None, ..., 0], prompt, negative=negative, sampling=sampling
    )
    made = images.load_image(tmp_path / "out.png")
    assert float((made - torch.where(mask > 0, expected, image)).abs().max()) <= 1.01 / 255

    for more, message in (
        (["--task", "remove"], "--task needs --powerpaint"),
        (["--powerpaint", folder, "--fitting", "0.5"], "--fitting needs --task"),
        (["--powerpaint", tmp_path / "unet", "--task", "text"], "has no unet/unet.safetensors"),
        (["--powerpaint", folder], "the prompt is empty"),
    ):
        assert cli.main([str(word) for word in ["inpaint", tmp_path / "photo.png", "", *fixed, *more]]) == 2
        assert message in capsys.readouterr().err
