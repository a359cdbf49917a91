"""The three bugs of the system's first design stay dead; each check is tried on a model that has the bug."""

from __future__ import annotations

import inspect

import pytest
import torch
from comfyui_diptych.models import multimodal as mm
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

REQUIRED = inspect.Parameter.empty
TIMES = torch.tensor([700, 300])


def draws(model, seed: int = 0):
    """Fixed noise, times and no dropout for two rows, so that only the condition is left to matter."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, *model.latent_shape, generator=generator)
    return {"noise": noise, "timesteps": TIMES, "drop": torch.zeros(2, dtype=torch.bool)}


# 1: the text encoder was called without its mask


def mask_is_required(encoder) -> bool:
    parameters = inspect.signature(encoder.forward).parameters
    if any(parameters[name].default is not REQUIRED for name in ("input_ids", "attention_mask")):
        return False
    for arguments in ((), (None,), (torch.ones(1, 3),), (torch.zeros(1, 5, dtype=torch.long),)):
        try:
            encoder(torch.tensor([[2, 9, 9, 3, 0]]), *arguments)
        except (TypeError, ValueError):
            continue
        return False
    return True


@torch.no_grad()
def padding_is_invisible(encoder) -> bool:
    ids = torch.tensor([[2, 9, 12, 3]])
    bare = encoder(ids, torch.ones_like(ids))
    padded = torch.cat([ids, torch.tensor([[0, 7, 5]])], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    return torch.allclose(encoder(padded, mask), bare, atol=1e-5)


class EncoderWithoutMask(mm.TextEncoder):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, torch.ones_like(input_ids))


def test_the_text_encoder_cannot_do_without_its_mask(model):
    old = EncoderWithoutMask(model.text_encoder.bert, 16)
    assert mask_is_required(model.text_encoder) and padding_is_invisible(model.text_encoder)
    assert not mask_is_required(old) and not padding_is_invisible(old)


@torch.no_grad()
def test_what_else_is_in_the_batch_does_not_change_a_text(shared):
    alone = shared.encode_text("a red circle")
    beside = shared.encode_text(["a red circle", "a small red circle at the top left"])[:1]
    assert torch.allclose(alone, beside, atol=1e-5)


# 2: trained without the condition, sampled with it


def conditions_seen(diffusion, run) -> list[torch.Tensor]:
    """What the denoiser was told in each call of a run."""
    seen = []
    hook = diffusion.unet.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2].detach()))
    run()
    hook.remove()
    return seen


def both_pass_the_condition(diffusion) -> bool:
    text = torch.randn(2, diffusion.condition_dim)
    latents = torch.randn(2, *diffusion.latent_shape)
    trained = conditions_seen(diffusion, lambda: diffusion.loss(text, latents, **draws(diffusion)))
    sampled = conditions_seen(diffusion, lambda: diffusion.sample(text, 2, cfg=1.0))
    return all(torch.equal(seen, text) for seen in trained + sampled) and len(trained + sampled) == 3


def loss_depends_on_the_text(diffusion) -> bool:
    one, other = torch.randn(2, 2, diffusion.condition_dim)
    latents = torch.randn(2, *diffusion.latent_shape)
    losses = [diffusion.loss(text, latents, **draws(diffusion)) for text in (one, other)]
    return bool(losses[0] != losses[1])


class TrainedWithoutText(mm.LatentDiffusionUNet):
    def loss(self, condition, latents, **kwargs):
        return super().loss(torch.zeros_like(condition), latents, **kwargs)


class SampledWithoutText(mm.LatentDiffusionUNet):
    def sample(self, condition, num_inference_steps=50, **kwargs):
        return super().sample(torch.zeros_like(condition), num_inference_steps, **kwargs)


def diffusion_like(kind, architecture):
    torch.manual_seed(1)
    return kind(4, 7, 16, unet=architecture.unet)


def test_loss_and_sampling_both_tell_the_denoiser_the_text(architecture):
    ours = diffusion_like(mm.LatentDiffusionUNet, architecture)
    assert both_pass_the_condition(ours) and loss_depends_on_the_text(ours)
    old = diffusion_like(TrainedWithoutText, architecture)
    assert not both_pass_the_condition(old) and not loss_depends_on_the_text(old)
    assert not both_pass_the_condition(diffusion_like(SampledWithoutText, architecture))


def test_loss_and_sampling_share_one_signature():
    loss, sample, predict = (
        inspect.signature(getattr(mm.LatentDiffusionUNet, name)).parameters
        for name in ("loss", "sample", "predict")
    )
    assert list(loss)[1] == list(sample)[1] == list(predict)[3] == "condition"
    assert loss["condition"].default is sample["condition"].default is REQUIRED
    assert all(predict[name].default is REQUIRED for name in ("latents", "timesteps", "condition"))


@pytest.mark.parametrize("condition", [None, torch.zeros(1, 16), torch.zeros(2, 8)])
def test_no_prediction_without_a_text_for_every_row(shared, condition):
    with pytest.raises(ValueError, match="give one text embedding each"):
        shared.latent_diffusion.predict(torch.zeros(2, 4, 7, 7), TIMES, condition)


def test_dropped_rows_learn_the_null_vector_and_only_they(model):
    diffusion = model.latent_diffusion
    text = torch.randn(2, 16, requires_grad=True)
    arguments = draws(diffusion) | {"drop": torch.tensor([True, False])}
    seen = conditions_seen(diffusion, lambda: diffusion.loss(text, torch.randn(2, 4, 7, 7), **arguments))[0]
    assert torch.equal(seen, torch.stack([diffusion.null_condition.detach(), text[1].detach()]))
    diffusion.loss(text, torch.randn(2, 4, 7, 7), **arguments).backward()
    assert diffusion.null_condition.grad.abs().sum() > 0
    assert text.grad[0].abs().sum() == 0 and text.grad[1].abs().sum() > 0


def test_a_tenth_of_the_rows_drops_out_in_training_and_none_afterwards(model):
    diffusion, rows = model.latent_diffusion, 2000
    text, latents = torch.ones(rows, 16), torch.zeros(rows, 4, 7, 7)
    diffusion.unet, told = nn.Identity(), []  # only what it is told counts here
    diffusion.unet.forward = lambda x, t, condition: told.append(condition) or x
    torch.manual_seed(0)
    for training, low, high in ((True, 0.08, 0.12), (False, 0, 0)):
        diffusion.train(training).loss(text, latents)
        dropped = (told[-1] == diffusion.null_condition).all(dim=1).float().mean()
        assert low <= dropped <= high


# 3: the condition never entered the network


def blocks_that_hear_the_text(unet) -> list[bool]:
    """For each residual block: is d(output)/d(text) non-zero through this block's own modulation alone?"""
    from diffusers.models.resnet import ResnetBlock2D

    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 7, 7, generator=generator)
    heard = []
    for chosen in blocks:
        hooks = [
            block.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1].detach()))
            for block in blocks
            if block is not chosen
        ]
        text = torch.randn(2, 16, generator=generator, requires_grad=True)
        unet(latents, TIMES, text).square().sum().backward()
        heard.append(text.grad is not None and bool((text.grad.abs().sum(dim=1) > 0).all()))
        for hook in hooks:
            hook.remove()
    return heard


def swapped_text_changes_the_image(unet) -> bool:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 7, 7, generator=generator)
    text = torch.randn(2, 16, generator=generator)
    difference = unet(latents, TIMES, text) - unet(latents, TIMES, text.flip(0))
    return bool(difference.abs().mean() > 1e-3)


class DeafUNet(mm.ConditionalUNet2D):
    """The old network: it saw the noisy input and the time."""

    def forward(self, latents, timesteps, condition):
        return super().forward(latents, timesteps, torch.zeros_like(condition))


class DeafBlock(nn.Module):
    """One block that is told the time but not the text."""

    def __init__(self, block, unet):
        super().__init__()
        self.block, self.time = block, lambda: unet.time_embedding(unet.time_waves(TIMES))

    def forward(self, h, film):
        return self.block(h, self.time())


@pytest.mark.parametrize(("attention", "count"), [("middle", 5), ("widest", 6)])
def test_the_text_reaches_every_residual_block(attention, count):
    sizes = {"latent_channels": 4, "condition_dim": 16, "widths": (16, 16, 32), "time_width": 32}
    torch.manual_seed(0)
    unet = mm.ConditionalUNet2D(**sizes, blocks=1, attention=attention)
    assert blocks_that_hear_the_text(unet) == [True] * count
    assert swapped_text_changes_the_image(unet)
    old = DeafUNet(**sizes, blocks=1, attention=attention)
    assert blocks_that_hear_the_text(old) == [False] * count
    assert not swapped_text_changes_the_image(old)
    unet.up[0] = DeafBlock(unet.up[0], unet)
    assert sum(blocks_that_hear_the_text(unet)) == count - 1


@torch.no_grad()
def test_without_scale_and_shift_text_and_time_change_nothing(shared):
    from diffusers.models.resnet import ResnetBlock2D

    unet = mm.ConditionalUNet2D(4, 16, **shared.architecture.unet)
    for block in (m for m in unet.modules() if isinstance(m, ResnetBlock2D)):
        block.time_emb_proj.weight.zero_()
        block.time_emb_proj.bias.zero_()
    latents = torch.randn(2, 4, 7, 7)
    one = unet(latents, torch.tensor([1, 2]), torch.randn(2, 16))
    assert torch.equal(one, unet(latents, torch.tensor([500, 900]), torch.randn(2, 16)))


def test_a_swapped_text_changes_the_generated_image(shared):
    text = shared.encode_text(["a red circle", "a blue square"])
    noise = torch.randn(1, 4, 7, 7).expand(2, -1, -1, -1)
    images = shared.generate_image_from_text(text, 3, noise=noise)
    assert (images[0] - images[1]).abs().max() > 1e-3
    swapped = shared.generate_image_from_text(text.flip(0), 3, noise=noise)
    assert torch.allclose(swapped, images.flip(0), atol=1e-5)


def test_the_diffusion_loss_of_the_model_depends_on_the_pairing(shared, images, captions):
    image, text = shared.encode_image(images)[:2], shared.encode_text(captions)[:2]
    arguments = draws(shared.latent_diffusion)
    paired = shared.compute_diffusion_loss(image, text, **arguments)
    assert paired != shared.compute_diffusion_loss(image, text.flip(0), **arguments)
    assert paired != shared.compute_diffusion_loss(image.flip(0), text, **arguments)
