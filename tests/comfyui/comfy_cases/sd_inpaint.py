"""SD Inpaint Conditioner: core's chain where masks lie on the grid, diffusers' pipeline, the shell's half."""

from __future__ import annotations

import torch

from . import case
from .two_hosts import SEED, assert_same_image, folder, posterior_mode, random_image

PROMPT, NEGATIVE, CFG = "a red circle", "blue", 3.0
RULES = ("max", "nearest", "bilinear", "area")


def slanted(height: int = 64, width: int = 96) -> torch.Tensor:
    """A mask whose edge meets the cells everywhere."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (columns > 30 + rows // 3).float()[None]


def on_the_grid() -> torch.Tensor:
    mask = torch.zeros(1, 64, 96)
    mask[:, 8:40, 24:72] = 1
    return mask


class Chain:
    """A graph with the tiny model, its prompts, an image and a mask."""

    def __init__(self, host, mask):
        self.graph = host.graph()
        self.model, self.clip, self.vae, *_ = self.graph.add("DiptychTinyModelLoader", which="sd_inpaint")
        words = [
            self.graph.add("CLIPTextEncode", clip=self.clip, text=text)[0] for text in (PROMPT, NEGATIVE)
        ]
        self.image, self.mask = self.graph.given(random_image(1, 64, 96)), self.graph.given(mask)
        self.shared = {"positive": words[0], "negative": words[1], "vae": self.vae, "mask": self.mask}

    def ours(self, **widgets):
        return self.graph.add("DiptychSDInpaintConditioner", image=self.image, **self.shared, **widgets)

    def sample(self, conditioned, *, scheduler="simple", steps=4, model=None, **denoise):
        settings = {"seed": SEED, "steps": steps, "cfg": CFG, "sampler_name": "ddim", "scheduler": scheduler}
        return self.graph.add(
            "KSampler",
            model=model or self.model,
            positive=conditioned[0],
            negative=conditioned[1],
            latent_image=conditioned[2],
            **settings,
            **denoise,
        )[0]

    def decode(self, latent):
        return self.graph.add("VAEDecode", samples=latent, vae=self.vae)[0]


@case(each=lambda: [f"{rule}, noise mask {on}" for rule in RULES for on in ("on", "off")])
def it_equals_cores_chain_where_the_mask_lies_on_the_grid(host, setting):
    rule, masked = setting.split(",")[0], setting.endswith("on")
    chain = Chain(host, on_the_grid())
    core = chain.graph.add("InpaintModelConditioning", pixels=chain.image, noise_mask=masked, **chain.shared)
    ours = chain.ours(mask_resize=rule, noise_mask=masked, model=chain.model)
    theirs, result = chain.sample(core), chain.sample(ours, denoise=ours[3])
    kept = host.run(chain.graph.keep(core=theirs, ours=result, values=ours[0], theirs=core[0])).kept
    torch.testing.assert_close(
        kept["values"][0][1]["concat_latent_image"], kept["theirs"][0][1]["concat_latent_image"]
    )
    assert (kept["core"]["samples"] - kept["ours"]["samples"]).abs().max() <= host.within(1e-5)
    assert ("noise_mask" in kept["ours"]) == masked


def pipeline(host, spacing: str):
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

    pipe = StableDiffusionInpaintPipeline.from_pretrained(
        str(folder(host, "sd_inpaint")), torch_dtype=torch.float32
    )
    # ComfyUI's schedules end at no noise at all
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing=spacing, set_alpha_to_one=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# strength: (ComfyUI's scheduler, diffusers' spacing, where sampling starts)
WAYS = {"1.0": ("simple", "trailing", "noise"), "0.6": ("ddim_uniform", "leading", "image")}


@case(each=lambda: WAYS)
def it_equals_stable_diffusion_inpaint_pipeline(host, strength):
    scheduler, spacing, start = WAYS[strength]
    chain = Chain(host, slanted())
    ours = chain.ours(mask_resize="nearest", strength=float(strength), start=start)
    steps = int(
        5 * float(strength)
    )  # core's KSampler counts the steps that are taken, diffusers those of 1.0
    latent = chain.sample(ours, scheduler=scheduler, steps=steps, denoise=ours[3])
    image = host.run(chain.graph.keep(image=chain.decode(latent))).kept["image"]
    with posterior_mode(), torch.no_grad():
        theirs = pipeline(host, spacing)(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            image=random_image(1, 64, 96).movedim(-1, 1),
            mask_image=slanted()[:, None],
            height=64,
            width=96,
            num_inference_steps=5,
            guidance_scale=CFG,
            strength=float(strength),
            generator=torch.Generator().manual_seed(SEED),
            output_type="pt",
        )
    assert_same_image(host, image, theirs.images.movedim(1, -1))


@case(each=lambda: [f"{rule} at {strength}" for rule in RULES for strength in WAYS] + ["soft at 0.6"])
def it_equals_the_shells_half(host, setting):
    rule, _, strength = setting.partition(" at ")
    scheduler, spacing, start = WAYS[strength]
    soft = rule == "soft"
    mask = slanted() * 0.8 if soft else slanted()
    chain = Chain(host, mask)
    how = {"mask_resize": "area" if soft else rule, "edge": "soft" if soft else "hard", "threshold": 0.4}
    ours = chain.ours(strength=float(strength), start=start, model=chain.model, **how)
    steps = int(5 * float(strength))
    latent = chain.sample(ours, scheduler=scheduler, steps=steps, model=ours[4], denoise=ours[3])
    image = host.run(chain.graph.keep(image=chain.decode(latent))).kept["image"]

    editing, sd = host.pack("models.editing"), host.pack("models.sd_inpaint")
    denoiser = sd.SDInpaint.load(folder(host, "sd_inpaint"), torch.float32, "cpu")
    denoiser.scheduler_config.update(timestep_spacing=spacing, set_alpha_to_one=True)
    shell = editing.inpaint_sd(
        denoiser,
        random_image(1, 64, 96),
        mask,
        PROMPT,
        negative=NEGATIVE,
        cfg=CFG,
        rule=sd.MaskRule(how["mask_resize"], how["threshold"], soft),
        strength=float(strength),
        sampling=editing.Sampling(steps=5, seed=SEED),
    )
    assert_same_image(host, image, shell)


@case
def a_soft_mask_reaches_the_unet_and_leaves_the_other_model_alone(host):
    mask = (torch.arange(96) / 95).expand(1, 64, 96)
    node, loader = host.nodes["DiptychSDInpaintConditioner"](), host.nodes["DiptychTinyModelLoader"]()
    with torch.inference_mode():
        model, clip, vae = loader.load("sd_inpaint")
        (text,) = host.nodes["CLIPTextEncode"]().encode(clip, PROMPT)
        inputs = {
            "positive": text,
            "negative": text,
            "vae": vae,
            "image": random_image(1, 64, 96),
            "mask": mask,
        }
        made = node.condition(model=model, edge="soft", mask_resize="area", **inputs)
        seen = {}
        for name, sampled in (("soft", made[4]), ("plain", model)):
            watched = sampled.clone()
            watched.set_model_unet_function_wrapper(
                lambda apply, given, name=name: (
                    seen.__setitem__(name, given["c"]["c_concat"].clone()),
                    apply(given["input"], given["timestep"], **given["c"]),
                )[1]
            )
            host.nodes["KSampler"]().sample(
                watched, 1, 1, 1.0, "euler", "simple", made[0], made[1], made[2], 1.0
            )
    cells = torch.nn.functional.avg_pool2d(mask[:, None], 8)
    torch.testing.assert_close(seen["soft"][:1, :1].cpu(), cells)
    assert torch.equal(seen["plain"][:1, :1].cpu(), cells.round())
    assert torch.equal(seen["soft"][:, 1:], seen["plain"][:, 1:])


@case(each=lambda: ["a plain model", "soft without a model", "an empty mask", "a FLUX VAE"])
def what_cannot_work_is_one_sentence(host, wrong):
    mask = torch.zeros(1, 64, 96) if wrong == "an empty mask" else slanted()
    chain, widgets = Chain(host, mask), {}
    other = chain.graph.add("DiptychTinyModelLoader", which="kontext")
    if wrong == "a plain model":
        widgets["model"] = other[0]
    if wrong == "soft without a model":
        widgets["edge"] = "soft"
    if wrong == "a FLUX VAE":
        chain.shared["vae"] = other[2]
    error = host.run(chain.graph.keep(made=chain.ours(**widgets)[0]), may_fail=True).error
    expected = {
        "a plain model": "model has no channel for a mask",
        "soft without a model": "edge is soft but model is not connected",
        "an empty mask": "mask is nowhere 0.5 or more",
        "a FLUX VAE": "vae makes latents of 16 channels but Stable Diffusion takes 4",
    }
    assert expected[wrong] in error, error
