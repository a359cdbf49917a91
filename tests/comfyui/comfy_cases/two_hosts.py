"""One image on two hosts: the graph equals diffusers on the same weights, prompt, noise and schedule."""

from __future__ import annotations

import contextlib

import torch

from . import case

PROMPT = "make the red circle blue"
SEED = 7
TOLERANCE = 1e-4  # of the decoded image, values 0..1; about 3e-6 is usual
SIZES = ["64x128", "96x64", "64x64 batch 2"]


def parse(size: str) -> tuple[int, int, int]:
    """(batch, height, width)"""
    shape, _, batch = size.partition(" batch ")
    height, width = map(int, shape.split("x"))
    return int(batch or 1), height, width


def random_image(batch: int, height: int, width: int) -> torch.Tensor:
    """Coloured tiles, the same for the same size."""
    tiles = torch.rand(
        batch, height // 16, width // 16, 3, generator=torch.Generator().manual_seed(height + width)
    )
    return tiles.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)


def right_half(batch: int, height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(batch, height, width)
    mask[..., width // 2 :] = 1
    return mask


def noise(batch: int, height: int, width: int) -> torch.Tensor:
    """What ComfyUI's RandomNoise starts from, by its rule: one CPU generator, spatial latents."""
    return torch.randn(batch, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(SEED))


def folder(host, which: str):
    return host.pack("models.tiny").folder() / which


def text(graph, clip, guidance: float, prompt: str = PROMPT):
    encoded = graph.add("CLIPTextEncode", clip=clip, text=prompt)
    return graph.add("FluxGuidance", conditioning=encoded[0], guidance=guidance)[0]


def sample(graph, model, conditioning, latent, *, steps: int = 4, sampler=None, **schedule):
    """Nodes that denoise; returns the latent's reference."""
    sampler = sampler or graph.add("DiptychFlowMatchEulerSampler")[0]
    sigmas = graph.add("DiptychFlowMatchScheduler", latent=latent, steps=steps, **schedule)
    return graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=SEED)[0],
        guider=graph.add("BasicGuider", model=model, conditioning=conditioning)[0],
        sampler=sampler,
        sigmas=sigmas[0],
        latent_image=latent,
    )[0]


def fill_graph(host, image, mask, *, prompt: str = PROMPT, guidance: float = 30.0):
    """(graph, reference to the decoded image) of the pack's Fill chain"""
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="fill")
    positive = text(graph, loader[1], guidance, prompt)
    fill = graph.add(
        "DiptychFluxFillConditioner",
        positive=positive,
        negative=positive,
        vae=loader[2],
        image=graph.given(image),
        mask=graph.given(mask),
        model=loader[0],
    )
    latent = sample(graph, loader[0], fill[0], fill[2])
    return graph, graph.add("VAEDecode", samples=latent, vae=loader[2])[0]


def kontext_graph(host, image, *, others=(), guidance: float = 2.5):
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="kontext")
    more = {f"image_{number}": graph.given(other) for number, other in enumerate(others, start=2)}
    kontext = graph.add(
        "DiptychKontextConditioner",
        conditioning=text(graph, loader[1], guidance),
        vae=loader[2],
        image=graph.given(image),
        size_policy="keep",
        **more,
    )
    latent = sample(graph, loader[0], kontext[0], kontext[1])
    return graph, graph.add("VAEDecode", samples=latent, vae=loader[2])[0]


def denoise(host, denoiser, condition, start: torch.Tensor, steps: int = 4) -> torch.Tensor:
    """The pack's own loop on a diffusers denoiser."""
    schedule = host.pack("samplers.schedule")
    flow_match = host.pack("samplers.flow_match")
    sigmas = schedule.sigmas(steps, seq_len=schedule.token_count(*start.shape[-2:]))
    with torch.no_grad():
        result = flow_match.sample(lambda x, sigma: denoiser.velocity(x, sigma, condition), start, sigmas)
        return denoiser.decode(result)


@contextlib.contextmanager
def posterior_mode():
    """FluxFillPipeline samples the VAE posterior; ComfyUI and this pack take its mode."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    original = Posterior.sample
    Posterior.sample = lambda self, generator=None: self.mode()
    try:
        yield
    finally:
        Posterior.sample = original


def pipeline(host, which: str):
    import diffusers

    cls = {"fill": diffusers.FluxFillPipeline, "kontext": diffusers.FluxKontextPipeline}[which]
    loaded = cls.from_pretrained(str(folder(host, which)), torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def run_pipeline(pipe, start: torch.Tensor, image: torch.Tensor, **inputs) -> torch.Tensor:
    batch, height, width = image.shape[:3]
    packed = pipe._pack_latents(start, batch, *start.shape[1:])
    with posterior_mode(), torch.no_grad():
        result = pipe(
            prompt=[PROMPT] * batch,
            image=image.movedim(-1, 1),
            height=height,
            width=width,
            num_inference_steps=4,
            max_sequence_length=min(512, pipe.tokenizer_2.model_max_length),
            latents=packed,
            output_type="pt",
            **inputs,
        )
    return result.images.movedim(1, -1)


def assert_same_image(host, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    assert difference <= host.within(TOLERANCE), f"the images differ by up to {difference:.2e}"
    assert ours.std() > 0.01, "a blank image proves nothing"


@case(each=lambda: SIZES)
def the_fill_graph_equals_flux_fill_pipeline(host, size):
    image, mask = random_image(*parse(size)), right_half(*parse(size))
    graph, decoded = fill_graph(host, image, mask)
    ours = host.run(graph.keep(image=decoded)).kept["image"]
    pipe = pipeline(host, "fill")
    theirs = run_pipeline(pipe, noise(*parse(size)), image, mask_image=mask[:, None], guidance_scale=30.0)
    assert_same_image(host, ours, theirs)


@case(each=lambda: SIZES)
def the_fill_graph_equals_the_packs_own_loop_on_diffusers(host, size):
    image, mask = random_image(*parse(size)), right_half(*parse(size))
    graph, decoded = fill_graph(host, image, mask)
    ours = host.run(graph.keep(image=decoded)).kept["image"]
    fill = host.pack("models.flux_fill").FluxFill.load(folder(host, "fill"), torch.float32, "cpu")
    condition = fill.condition(fill.encode_text(PROMPT), image, mask, guidance=30.0)
    assert_same_image(host, ours, denoise(host, fill, condition, noise(*parse(size))))


@case(each=lambda: SIZES)
def the_kontext_graph_equals_flux_kontext_pipeline(host, size):
    batch, height, width = parse(size)
    image = random_image(batch, height, width)
    graph, decoded = kontext_graph(host, image)
    ours = host.run(graph.keep(image=decoded)).kept["image"]
    pipe = pipeline(host, "kontext")
    extra = {"guidance_scale": 2.5, "max_area": height * width, "_auto_resize": False}
    assert_same_image(host, ours, run_pipeline(pipe, noise(*parse(size)), image, **extra))


@case(each=lambda: ["one reference", "two references", "three references"])
def the_kontext_graph_equals_the_packs_own_loop_on_diffusers(host, references):
    count = ["one reference", "two references", "three references"].index(references) + 1
    images = [random_image(1, 64, 64), random_image(1, 32, 64), random_image(1, 48, 48)][:count]
    graph, decoded = kontext_graph(host, images[0], others=images[1:])
    ours = host.run(graph.keep(image=decoded)).kept["image"]
    kontext = host.pack("models.flux_kontext").FluxKontext.load(folder(host, "kontext"), torch.float32, "cpu")
    condition = kontext.condition(kontext.encode_text(PROMPT), images, guidance=2.5)
    assert_same_image(host, ours, denoise(host, kontext, condition, noise(1, 64, 64)))


@case
def an_instruction_edit_equals_the_packs_own_loop_from_builder_to_split(host):
    diptych = host.pack("models.diptych")
    source = random_image(1, 64, 64)
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="fill")
    built = graph.add("DiptychBuilder", image=graph.given(source), instruction=PROMPT, panel_width=0)
    encoded = graph.add("CLIPTextEncode", clip=loader[1], text=built[2])
    positive = graph.add("FluxGuidance", conditioning=encoded[0], guidance=50.0)[0]
    fill = graph.add(
        "DiptychFluxFillConditioner",
        positive=positive,
        negative=positive,
        vae=loader[2],
        image=built[0],
        mask=built[1],
    )
    decoded = graph.add("VAEDecode", samples=sample(graph, loader[0], fill[0], fill[2]), vae=loader[2])
    halves = graph.add("DiptychSplit", image=decoded[0], layout=built[3])
    ours = host.run(graph.keep(edited=halves[0], panel=halves[1])).kept

    fill = host.pack("models.flux_fill").FluxFill.load(folder(host, "fill"), torch.float32, "cpu")
    made = diptych.build(source, PROMPT, panel_width=None)
    condition = fill.condition(fill.encode_text(made.prompt), made.image, made.mask, guidance=50.0)
    edited, panel = diptych.split(denoise(host, fill, condition, noise(1, 64, 128)), made.layout)
    assert_same_image(host, ours["edited"], edited)
    assert_same_image(host, ours["panel"], panel)
