"""The tiny model loader gives ComfyUI's own objects, equal to the diffusers modules they come from."""

from __future__ import annotations

import torch

from . import case

PROMPT = "make the red circle blue"


def folder(host, which: str):
    return host.pack("models.tiny").folder() / which


def load(host, which: str):
    with torch.inference_mode():
        return host.nodes["DiptychTinyModelLoader"]().load(which)


def families():
    return ["fill", "kontext"]


def latents():
    return ["fill", "sd_inpaint"]


@case(each=families)
def it_gives_comfyuis_own_objects(host, which):
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sd

    model, clip, vae = load(host, which)
    assert type(model) is comfy.model_patcher.ModelPatcher
    assert type(model.model) is comfy.model_base.Flux
    assert type(clip) is comfy.sd.CLIP and type(clip.clone()) is comfy.sd.CLIP
    assert type(vae) is comfy.sd.VAE
    channels = model.model.diffusion_model.img_in.weight.shape[1]
    assert channels == {"fill": 384, "kontext": 64}[which]


@case(each=families)
def one_prediction_equals_the_diffusers_transformer(host, which):
    from diffusers import FluxTransformer2DModel
    from einops import rearrange

    model, clip, vae = load(host, which)
    reference = FluxTransformer2DModel.from_pretrained(folder(host, which) / "transformer").float()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, model.model.diffusion_model.img_in.weight.shape[1] // 4, 8, 16, generator=generator)
    text = torch.randn(2, 9, reference.config.joint_attention_dim, generator=generator)
    pooled = torch.randn(2, reference.config.pooled_projection_dim, generator=generator)
    sigma, guidance = torch.tensor([0.3, 0.8]), torch.tensor([30.0, 2.5])
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    with torch.no_grad():
        ours = model.model.diffusion_model(x, sigma, text, pooled, guidance)
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        theirs = reference(tokens, text, pooled, sigma, ids, torch.zeros(9, 3), guidance, return_dict=False)[
            0
        ]
    theirs = rearrange(theirs, "b (h w) (c p q) -> b c (h p) (w q)", h=4, p=2, q=2)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@case(each=latents)
def the_vae_equals_diffusers_posterior_mode_and_decoder(host, which):
    from diffusers import AutoencoderKL

    _, _, vae = load(host, which)
    reference = AutoencoderKL.from_pretrained(folder(host, which) / "vae").float()
    image = torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = vae.encode(image)
        mode = reference.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mode()
        decoded = reference.decode(mode).sample.movedim(1, -1).clamp(-1, 1) / 2 + 0.5
    assert latents.shape == (2, reference.config.latent_channels, 8, 12)
    assert (latents - mode).abs().max() < host.within(1e-5)
    assert (vae.decode(mode) - decoded).abs().max() < host.within(1e-5)
    assert vae.decode_tiled(mode, tile_x=8, tile_y=8, overlap=2).shape == (2, 64, 96, 3)


@case
def odd_images_and_alpha_are_cropped_as_by_any_vae(host):
    _, _, vae = load(host, "fill")
    assert vae.encode(torch.rand(1, 67, 93, 3)).shape == (1, 16, 8, 11)
    encode = host.nodes["VAEEncode"]()
    assert encode.encode(vae, torch.rand(1, 64, 64, 4))[0]["samples"].shape == (1, 16, 8, 8)


@case
def the_latent_format_uses_the_vaes_own_numbers(host):
    import json

    model, _, _ = load(host, "kontext")
    config = json.loads((folder(host, "kontext") / "vae" / "config.json").read_text(encoding="utf-8"))
    latents = torch.randn(1, 16, 4, 4)
    expected = (latents - (config["shift_factor"] or 0)) * config["scaling_factor"]
    torch.testing.assert_close(model.model.process_latent_in(latents), expected)
    torch.testing.assert_close(model.model.process_latent_out(expected), latents)


@case
def previews_show_the_images_colours(host):
    import latent_preview

    model, _, vae = load(host, "fill")
    colours = torch.rand(1, 4, 8, 3, generator=torch.Generator().manual_seed(5))
    image = colours.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    x0 = model.model.process_latent_in(vae.encode(image))
    previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
    image = previewer.decode_latent_to_preview(x0)
    assert image.size == (16, 8)
    seen = torch.tensor(list(image.getdata())).float().view(8, 16, 3)[::2, ::2]
    correlation = torch.corrcoef(torch.stack([seen.flatten(), colours.flatten()]))[0, 1]
    assert correlation > 0.3, f"correlation of preview and image is {correlation:.2f}"


@case
def a_prompt_encodes_as_in_diffusers(host):
    text = host.pack("models.flux_text")
    comfy_text = host.pack("models.tiny.comfy_text")
    parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    reference = text.FluxText(*(comfy_text._load(folder(host, "fill"), part) for part in parts))
    _, clip, _ = load(host, "fill")
    for prompt in (PROMPT, "", "a " * 600, "an unknownword, (twice"):
        (sequence, extra), *_ = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        expected = reference.encode(prompt)
        torch.testing.assert_close(sequence, expected.tokens, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(extra["pooled_output"], expected.pooled, atol=1e-6, rtol=1e-5)


@case
def weights_in_a_prompt_scale_the_move_away_from_the_empty_prompt(host):
    _, clip, _ = load(host, "fill")

    def encode(prompt):
        return clip.encode_from_tokens(clip.tokenize(prompt))

    plain, empty = encode("make the red circle blue"), encode("")
    weighted = encode("make the (red:1.5) circle blue")
    changed = (weighted - plain).abs().amax(dim=-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [2]
    torch.testing.assert_close(weighted[0, 2], empty[0, 2] + 1.5 * (plain[0, 2] - empty[0, 2]))
    assert torch.equal(encode("make the (red:1.0) circle blue"), plain)
    words = [word for _, word in clip.tokenizer.untokenize(clip.tokenize("red circle")["l"][0])]
    assert [word.removesuffix("</w>") for word in words[1:3]] == ["red", "circle"]


@case
def text_and_guidance_nodes_take_the_clip(host):
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="fill")
    text = graph.add("CLIPTextEncodeFlux", clip=loader[1], clip_l="red", t5xxl=PROMPT, guidance=30.0)
    last_layer = graph.add("CLIPSetLastLayer", clip=loader[1], stop_at_clip_layer=-2)
    plain = graph.add(
        "FluxGuidance",
        conditioning=graph.add("CLIPTextEncode", clip=last_layer[0], text=PROMPT)[0],
        guidance=30.0,
    )
    kept = host.run(graph.keep(both=text[0], plain=plain[0])).kept
    assert kept["both"][0][1]["guidance"] == kept["plain"][0][1]["guidance"] == 30.0
    torch.testing.assert_close(kept["both"][0][0], kept["plain"][0][0])
    assert not torch.equal(kept["both"][0][1]["pooled_output"], kept["plain"][0][1]["pooled_output"])


@case
def one_sd_prediction_equals_the_diffusers_unet_with_mask_and_masked_image(host):
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

    pipe = StableDiffusionInpaintPipeline.from_pretrained(
        folder(host, "sd_inpaint"), torch_dtype=torch.float32
    )
    assert isinstance(pipe.scheduler, DDIMScheduler)
    model, clip, vae = load(host, "sd_inpaint")
    image, mask = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    embedding = clip.encode_from_tokens(clip.tokenize(PROMPT))
    with torch.no_grad():
        expected = pipe.encode_prompt(PROMPT, torch.device("cpu"), 1, False)[0]
        torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=1e-5)
        masked = vae.encode(image * (1 - mask[..., None]) + 0.5 * mask[..., None])
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        step = 601
        acp = pipe.scheduler.alphas_cumprod[step]
        sigma = ((1 - acp) / acp).sqrt()
        concat = model.model.concat_cond(
            concat_mask=mask[:, None], concat_latent_image=masked, noise=x, device=torch.device("cpu")
        )
        small = mask[:, None, ::8, ::8]
        joined = torch.cat([x, small, masked * pipe.vae.config.scaling_factor], dim=1)
        epsilon = pipe.unet(joined, step, encoder_hidden_states=expected).sample
        noisy = x * (1 + sigma**2).sqrt()  # ComfyUI scales it back to unit variance before the model
        x0 = model.model.apply_model(noisy, sigma[None], c_concat=concat, c_crossattn=embedding)
    torch.testing.assert_close((noisy - x0) / sigma, epsilon, atol=1e-4, rtol=1e-4)


@case
def the_sd_model_fills_with_cores_own_nodes(host):
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="sd_inpaint")
    demo = graph.add("DiptychDemoImage", example=4)
    text = [graph.add("CLIPTextEncode", clip=loader[1], text=words)[0] for words in (demo[4], "")]
    inpaint = graph.add(
        "InpaintModelConditioning",
        positive=text[0],
        negative=text[1],
        vae=loader[2],
        pixels=demo[0],
        mask=demo[2],
        noise_mask=True,
    )
    latent = graph.add(
        "KSampler",
        model=loader[0],
        positive=inpaint[0],
        negative=inpaint[1],
        latent_image=inpaint[2],
        seed=1,
        steps=4,
        cfg=3.0,
        sampler_name="ddim",
        scheduler="ddim_uniform",
    )
    kept = host.run(graph.keep(image=graph.add("VAEDecode", samples=latent[0], vae=loader[2])[0])).kept
    assert kept["image"].shape == (1, 64, 64, 3) and kept["image"].std() > 0.01
