"""ControlNet Inpaint: the hint as a ControlNet sees it, core's chain and AliMama node, the shell's half."""

from __future__ import annotations

import torch
from torch import nn

from . import case
from .sd_inpaint import CFG, NEGATIVE, PROMPT, slanted
from .two_hosts import SEED, assert_same_image, folder, random_image


class Adapter(nn.Module):
    """A diffusers ControlNetModel behind the call that ComfyUI's ControlNet makes; keeps the hints it saw."""

    def __init__(self, net):
        super().__init__()
        self.net, self.dtype, self.hints = net, torch.float32, []

    def forward(self, x, hint, timesteps, context, **_):
        self.hints.append(hint.clone())
        down, middle = self.net(
            x, timesteps, encoder_hidden_states=context, controlnet_cond=hint, return_dict=False
        )
        return {"middle": [middle], "output": list(down)}


class Plain:
    """A four-channel UNet of random weights with the tiny model's VAE and text, and a ControlNet for it."""

    def __init__(self, host):
        import comfy.controlnet
        import comfy.model_management as management
        from diffusers import ControlNetModel, UNet2DConditionModel

        tiny = folder(host, "sd_inpaint")
        torch.manual_seed(3)
        with torch.inference_mode(False), torch.no_grad():
            config = UNet2DConditionModel.load_config(str(tiny / "unet"))
            self.unet = UNet2DConditionModel.from_config({**config, "in_channels": 4}).eval()
            self.net = ControlNetModel.from_unet(
                self.unet, conditioning_embedding_out_channels=(8, 16, 16, 32)
            )
            for parameter in self.net.eval().parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(std=0.2)
            path = host.base / "plain_sd"
            self.unet.save_pretrained(path / "unet")
            (path / "vae").mkdir(exist_ok=True)
            (path / "vae" / "config.json").write_bytes((tiny / "vae" / "config.json").read_bytes())
            self.model = host.pack("models.tiny.comfy").load_unet(path)
        self.adapter = Adapter(self.net)
        self.control = comfy.controlnet.ControlNet(self.adapter, load_device=management.get_torch_device())
        _, self.clip, self.vae = host.nodes["DiptychTinyModelLoader"]().load(which="sd_inpaint")


class Chain:
    """A graph with all of it."""

    def __init__(self, host, mask):
        self.plain = plain = Plain(host)
        self.graph = host.graph()
        given = self.graph.given
        self.model, self.vae, self.control = given(plain.model), given(plain.vae), given(plain.control)
        clip = given(plain.clip)
        words = [self.graph.add("CLIPTextEncode", clip=clip, text=text)[0] for text in (PROMPT, NEGATIVE)]
        self.image, self.mask = given(random_image(1, 64, 96)), given(mask)
        self.words = {"positive": words[0], "negative": words[1]}

    def ours(self, **widgets):
        inputs = {"control_net": self.control, "vae": self.vae, "image": self.image, "mask": self.mask}
        return self.graph.add("DiptychControlNetInpaint", **self.words, **inputs, **widgets)

    def sample(self, positive, negative, latent, denoise=0.6):
        # not core's `ddim`, which noises known latents with other noise than the rest
        settings = {"seed": SEED, "steps": int(5 * denoise), "cfg": CFG, "sampler_name": "euler"}
        return self.graph.add(
            "KSampler",
            model=self.model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            scheduler="ddim_uniform",
            denoise=denoise,
            **settings,
        )[0]


@case(each=lambda: ["inpaint_only", "global_harmonious"])
def it_equals_cores_chain_with_a_hint_made_by_hand(host, mode):
    mask = slanted()
    chain = Chain(host, mask)
    made = chain.ours(mode=mode, strength=0.8)
    ours = chain.sample(made[0], made[1], made[2], 1.0)
    add = chain.graph.add
    hint = chain.graph.given(torch.where(mask[..., None] > 0.5, -1.0, random_image(1, 64, 96)))
    control = add(
        "ControlNetApplyAdvanced", **chain.words, control_net=chain.control, image=hint, strength=0.8
    )
    latent = add("VAEEncode", pixels=chain.image, vae=chain.vae)[0]
    if mode == "inpaint_only":
        cells = torch.nn.functional.max_pool2d(mask[:, None], 10, stride=8, padding=1)[:, 0]
        latent = add("SetLatentNoiseMask", samples=latent, mask=chain.graph.given(cells))[0]
    theirs = chain.sample(control[0], control[1], latent, 1.0)
    kept = host.run(chain.graph.keep(ours=ours, theirs=theirs, source=made[2])).kept
    torch.testing.assert_close(
        kept["ours"]["samples"], kept["theirs"]["samples"], rtol=0, atol=host.within(1e-5)
    )
    seen = chain.plain.adapter.hints[0]
    assert seen.min() == -1 and bool((seen[:1].movedim(1, -1)[mask > 0].cpu() == -1).all())
    torch.testing.assert_close(
        seen[0].movedim(0, -1)[mask[0] == 0].cpu(), random_image(1, 64, 96)[mask == 0], rtol=0, atol=0
    )
    known = kept["source"]["noise_mask"][:, 0] == 0 if mode == "inpaint_only" else None
    difference = (kept["ours"]["samples"] - kept["source"]["samples"]).abs().amax(dim=1)
    assert difference.max() > 0.1
    if known is not None:
        assert difference[known].max() <= host.within(1e-5)


@case(each=lambda: ["nothing", "blur"])
def it_equals_the_shells_half(host, prefill):
    mask = slanted()
    chain = Chain(host, mask)
    made = chain.ours(prefill="none" if prefill == "nothing" else prefill)
    latent = chain.sample(made[0], made[1], made[2])
    decoded = chain.graph.add("VAEDecode", samples=latent, vae=chain.vae)[0]
    finished = chain.graph.add(
        "ImageCompositeMasked",
        destination=made[3],
        source=decoded,
        mask=made[4],
        x=0,
        y=0,
        resize_source=False,
    )[0]
    kept = host.run(chain.graph.keep(image=decoded, finished=finished)).kept

    blend, sd = host.pack("models.sd_blend"), host.pack("models.sd_inpaint")
    control, editing = host.pack("models.control_inpaint"), host.pack("models.editing")
    tiny = sd.SDInpaint.load(folder(host, "sd_inpaint"), torch.float32, "cpu")
    config = {**tiny.scheduler_config, "set_alpha_to_one": True}
    denoiser = blend.SDBlend(
        chain.plain.unet,
        tiny.vae,
        tiny.tokenizer,
        tiny.text_encoder,
        controlnet=chain.plain.net,
        scheduler_config=config,
    )
    image = random_image(1, 64, 96)
    options = {"negative": NEGATIVE, "cfg": CFG, "strength": 0.6}
    if prefill != "nothing":
        options["filled"] = host.pack("models.outpaint").fill(image, mask, prefill)
    sampling = editing.Sampling(steps=5, seed=SEED)
    shell = blend.inpaint_blend(denoiser, image, mask, PROMPT, sampling=sampling, **options)
    assert_same_image(host, kept["image"], shell)
    assert_same_image(host, kept["finished"], control.composite(shell, image, mask))
    far = torch.nn.functional.max_pool2d(mask[:, None], 13, stride=1, padding=6)[:, 0] == 0
    assert (kept["finished"][far] - image[far]).abs().max() <= host.within(1e-6)


@case
def inpaint_only_with_lama_starts_from_what_lama_fills_in(host):
    import folder_paths

    inpainters = host.pack("models.outpaint.inpainters")
    file = host.base / "models" / "inpaint" / "big-lama.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    folder_paths.filename_list_cache.clear()

    class Network:
        """In the place of a LaMa file: paints everything one colour."""

        def to(self, device):
            return self

        def __call__(self, image, mask):
            return torch.full_like(image, 0.25)

    load, inpainters._load_lama = inpainters._load_lama, lambda path: Network()
    try:
        mask = slanted()
        chain = Chain(host, mask)
        made = chain.ours(prefill="lama", lama_file="inpaint/big-lama.pt")
        kept = host.run(chain.graph.keep(latent=made[2], image=made[3])).kept
    finally:
        inpainters._load_lama = load
        file.unlink()
        folder_paths.filename_list_cache.clear()
    image = random_image(1, 64, 96)
    with torch.inference_mode():
        expected = chain.plain.vae.encode(torch.where(mask[..., None] > 0, 0.25, image))
    torch.testing.assert_close(kept["latent"]["samples"], expected)
    torch.testing.assert_close(kept["image"], image)  # the composite still takes the image itself


class Recorder:
    """A control_net with a channel for a mask, as core makes of AliMama's file; keeps what it gets."""

    concat_mask = True

    def copy(self):
        return Recorder()

    def set_cond_hint(self, hint, strength, percents, vae=None, extra_concat=()):
        self.given = (hint, strength, percents, vae, list(extra_concat))
        return self

    def set_previous_controlnet(self, other):
        self.previous = other
        return self


@case
def a_controlnet_with_a_mask_channel_is_told_as_cores_alimama_node_tells_it(host):
    image, mask = random_image(1, 64, 96), slanted()
    _, clip, vae = host.nodes["DiptychTinyModelLoader"]().load("fill")
    (text,) = host.nodes["CLIPTextEncode"]().encode(clip, PROMPT)
    with torch.inference_mode():
        made = host.nodes["DiptychControlNetInpaint"]().condition(
            text, text, Recorder(), vae, image, mask, strength=0.9, start_percent=0.1, end_percent=0.8
        )
        core = host.nodes["ControlNetInpaintingAliMamaApply"]
        function = getattr(core, "execute", None) or core().apply_inpaint_controlnet
        theirs = function(text, text, Recorder(), vae, image, mask, 0.9, 0.1, 0.8)
    theirs = getattr(theirs, "args", None) or getattr(theirs, "result", None) or theirs
    ours, core_given = made[0][0][1]["control"].given, theirs[0][0][1]["control"].given
    torch.testing.assert_close(ours[0], core_given[0])
    torch.testing.assert_close(ours[4][0], core_given[4][0])
    assert ours[1:4] == core_given[1:4] and len(ours[4]) == 1
    assert made[2]["samples"].shape == (1, 16, 8, 12)  # FLUX's latents, put back too
    assert made[2]["noise_mask"].shape == (1, 1, 8, 12)


@case(each=lambda: ["an empty mask", "a range the wrong way", "lama without a file"])
def what_cannot_work_is_one_sentence(host, wrong):
    chain = Chain(host, slanted() * 0 if wrong == "an empty mask" else slanted())
    widgets = {
        "an empty mask": {},
        "a range the wrong way": {"start_percent": 0.6, "end_percent": 0.5},
        "lama without a file": {"prefill": "lama"},
    }[wrong]
    error = host.run(chain.graph.keep(made=chain.ours(**widgets)[0]), may_fail=True).error
    expected = {
        "an empty mask": "mask is empty",
        "a range the wrong way": "start_percent is 0.6 and end_percent 0.5",
        "lama without a file": "fill 'lama' needs a LaMa file",
    }
    assert expected[wrong] in error, error
