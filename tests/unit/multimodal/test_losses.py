"""The losses against closed forms; which part learns from which of them."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_diptych.models import multimodal as mm
from comfyui_diptych.models.multimodal.losses import same_captions

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def test_equal_captions_are_found():
    same = same_captions(["a", "b", "a"])
    assert same.tolist() == [[True, False, True], [False, True, False], [True, False, True]]


@pytest.mark.parametrize("copies", [1, 3])
def test_contrastive_loss_of_orthogonal_captions(copies):
    """Rows in 4 groups of k equal captions, embeddings e_group: log(k e^s + B - k) - s."""
    embeddings = torch.eye(4).repeat_interleave(copies, dim=0)
    rows, scale = 4 * copies, 3.0
    same = same_captions([str(i // copies) for i in range(rows)])
    expected = math.log(copies * math.exp(scale) + rows - copies) - scale
    found = mm.contrastive_loss(2 * embeddings, 5 * embeddings, scale, same)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_contrastive_loss_of_equal_embeddings_is_the_logarithm_of_the_batch():
    ones = torch.ones(6, 8)
    assert mm.contrastive_loss(ones, ones, 10.0).item() == pytest.approx(math.log(6), abs=1e-6)


def test_images_of_one_caption_are_not_pushed_apart():
    """Two perfect groups at a large scale: soft targets leave no gradient, hard ones do."""
    angles = torch.tensor([0.0, 0.0, 1.5, 1.5])
    text = torch.stack([angles.cos(), angles.sin()], dim=1)
    for same, at_rest in ((same_captions(["a", "a", "b", "b"]), True), (None, False)):
        image = (text + torch.tensor([[0.0, 0.02], [0.02, 0.0], [0.0, 0.0], [0.0, 0.0]])).requires_grad_()
        learned = text.clone().requires_grad_()
        mm.contrastive_loss(image, learned, 100.0, same).backward()
        assert (learned.grad[:2].abs().max() < 0.2) == at_rest


def test_contrastive_loss_is_symmetric_and_unchanged_by_order():
    image, text = torch.randn(2, 5, 8)
    same = same_captions(list("aabcb"))
    loss = mm.contrastive_loss(image, text, 7.0, same)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(loss, mm.contrastive_loss(text, image, 7.0, same))
    assert torch.allclose(
        loss, mm.contrastive_loss(image[order], text[order], 7.0, same[order][:, order]), atol=1e-6
    )


def test_reconstruction_loss_weighs_the_foreground():
    target = torch.zeros(1, 3, 2, 2)
    predicted = torch.zeros(1, 3, 2, 2)
    predicted[..., 0, 0], predicted[..., 1, 1] = 1.0, 2.0
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert mm.reconstruction_loss(predicted, target).item() == pytest.approx(5 / 4)
    assert mm.reconstruction_loss(predicted, target, mask, 5.0).item() == pytest.approx((5 * 1 + 4) / 8)
    assert mm.reconstruction_loss(predicted, target, mask, 1.0).item() == pytest.approx(5 / 4)


def test_the_foreground_is_what_differs_from_the_ground():
    pixels = torch.full((2, 3, 6, 6), -0.4)
    pixels[1] = 0.8
    pixels[0, 0, 1:3, 1:3] = 0.1  # 0.25 of the range away
    pixels[1, 2, 4:, 4:] = 0.5  # 0.15 away
    mask = mm.foreground(pixels)
    assert mask.shape == (2, 1, 6, 6)
    assert mask[0, 0].nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert mask[1].sum() == 0
    assert mm.foreground(pixels, 0.1)[1].sum() == 4


def test_caption_loss_counts_tokens_and_not_padding():
    logits = torch.full((2, 3, 4), -50.0)
    ids = torch.tensor([[1, 2, 3], [0, 3, 3]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    logits.scatter_(2, ids[..., None], 50.0)
    assert mm.caption_loss(logits, ids, mask).item() == pytest.approx(0, abs=1e-6)
    logits[1, 2] = torch.tensor([50.0, 0, 0, 0])  # wrong, but on padding
    assert mm.caption_loss(logits, ids, mask).item() == pytest.approx(0, abs=1e-6)
    logits[1, 1] = 0  # no idea: log 4 on one of five tokens
    assert mm.caption_loss(logits, ids, mask).item() == pytest.approx(math.log(4) / 5, abs=1e-6)


def test_the_loss_asks_for_the_velocity_of_normalised_latents(model):
    """sqrt(a) noise - sqrt(1 - a) data: a denoiser that knows it has loss 0, one of zeros its mean square."""
    diffusion = model.latent_diffusion
    latents, noise = torch.randn(2, 2, 4, 7, 7)
    clean = (latents - diffusion.latent_mean) / diffusion.latent_std
    times = torch.tensor([650, 20])
    a = diffusion.scheduler.alphas_cumprod[times][:, None, None, None]
    told = {}

    def knows(x, t, _):
        told["x"], told["t"] = x, t
        return a.sqrt() * noise - (1 - a).sqrt() * clean

    diffusion.unet.forward = knows
    draws = {"noise": noise, "timesteps": times}
    assert diffusion.loss(torch.zeros(2, 16), latents, **draws).item() < 1e-10
    assert torch.allclose(told["x"], a.sqrt() * clean + (1 - a).sqrt() * noise, atol=1e-5)
    assert torch.equal(told["t"], times)
    diffusion.unet.forward = lambda x, t, _: torch.zeros_like(x)
    found = diffusion.loss(torch.zeros(2, 16), latents, **draws)
    assert found.item() == pytest.approx((a.sqrt() * noise - (1 - a).sqrt() * clean).square().mean().item())


def test_statistics_make_latents_standard_and_are_undone(model):
    diffusion = model.latent_diffusion
    latents = torch.randn(400, 4, 7, 7) * torch.tensor([1.0, 2, 3, 0.1])[:, None, None] + 5
    diffusion.update_statistics(latents)
    normal = diffusion.normalise(latents)
    assert torch.allclose(normal.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(normal.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(diffusion.denormalise(normal), latents, atol=1e-4)
    before = diffusion.latent_mean.clone()
    diffusion.update_statistics(latents + 10, momentum=0.1)
    assert torch.allclose(diffusion.latent_mean, before + 1, atol=1e-4)


def test_statistics_come_from_the_latents_of_images(model):
    images = torch.rand(40, 28, 28, 3)
    model.update_latent_statistics(images)
    latents = model.image_decoder.get_latent_from_embedding(model.encode_image(images))
    assert model.latent_diffusion.normalise(latents).mean(dim=(0, 2, 3)).abs().max() < 1e-4


def learning(model, stage: str, losses) -> set[str]:
    """The parts of the model that a sum of losses reaches."""
    model.zero_grad()
    sum(loss for loss in losses if loss is not None).backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    return {name.partition(".")[0] for name in reached}


def test_each_stage_teaches_its_parts_and_no_weight_is_forgotten(model, images, captions):
    model.train()
    pairs = model.pairs(images, captions, even_ground=True)
    align = {"image_encoder", "image_decoder", "text_encoder", "text_decoder", "log_scale"}
    drop = torch.tensor([True, False, False])
    losses = model(pairs, "align")
    assert losses.diffusion is None
    assert learning(model, "align", losses) == align
    losses = model(pairs, "diffuse", drop=drop)
    assert losses[:3] == (None, None, None)
    assert learning(model, "diffuse", losses) == {"latent_diffusion"}
    losses = model(pairs, drop=drop)
    assert learning(model, "joint", losses) == align | {"latent_diffusion"}
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert not idle


def test_latents_get_no_gradient_from_the_diffusion_and_the_text_does(shared):
    image, text = (torch.randn(3, 16, requires_grad=True) for _ in range(2))
    loss = shared.compute_diffusion_loss(image, text, timesteps=torch.tensor([100, 500, 900]))
    of_image, of_text = torch.autograd.grad(loss, (image, text), allow_unused=True)
    assert of_image is None
    assert of_text.abs().sum() > 0


def test_a_few_steps_make_every_loss_smaller(model, images, captions):
    model.train()
    pairs = model.pairs(images, captions, even_ground=True)
    draws = {
        "noise": torch.randn(3, 4, 7, 7, generator=torch.Generator().manual_seed(0)),
        "timesteps": torch.tensor([200, 500, 800]),
        "drop": torch.tensor([False, False, True]),
    }
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    first = model(pairs, **draws)
    for _ in range(12):
        optimizer.zero_grad()
        sum(model(pairs, **draws)).backward()
        optimizer.step()
    last = model(pairs, **draws)
    for name in mm.Losses._fields:
        assert getattr(last, name) < 0.9 * getattr(first, name), name
