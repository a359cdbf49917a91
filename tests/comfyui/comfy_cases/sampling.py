"""The scheduler and sampler nodes in ComfyUI's own sampling machinery, beside its own `euler`."""

from __future__ import annotations

import torch

from . import case

RULES = ("flow", "dance", "cps", "rf_ancestral")
SIZES = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 8,
    "context_in_dim": 8,
    "hidden_size": 48,
    "mlp_ratio": 4.0,
    "num_heads": 3,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}


class RandomFlux:
    """Test-only node: a FLUX of random weights, two conditionings, and a latent."""

    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {"height": ("INT", {}), "width": ("INT", {}), "batch": ("INT", {})},
            "optional": {"masked": ("BOOLEAN", {"default": False})},
        }
    )
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT")
    FUNCTION, CATEGORY = "make", "test"

    def make(self, height, width, batch, masked=False):
        import comfy.ldm.flux.model
        import comfy.model_management
        import comfy.model_patcher
        import comfy.supported_models

        known = {"image_model", *comfy.ldm.flux.model.FluxParams.__dataclass_fields__}
        config = comfy.supported_models.Flux({key: SIZES[key] for key in SIZES if key in known})
        config.set_inference_dtype(torch.float32, None)
        generator = torch.Generator().manual_seed(3)
        with torch.inference_mode(False), torch.no_grad():
            model = config.get_model({}, "")
            for parameter in model.diffusion_model.parameters():
                spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)

        def condition():
            pooled = torch.randn(1, 8, generator=generator)
            return [[torch.randn(1, 5, 8, generator=generator), {"pooled_output": pooled, "guidance": 2.5}]]

        latent = {"samples": torch.randn(batch, 16, height, width, generator=generator)}
        if masked:
            mask = torch.zeros(1, height * 8, width * 8)
            mask[:, :, width * 4 :] = 1
            latent["noise_mask"] = mask
        patcher = comfy.model_patcher.ModelPatcher(
            model,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )
        return patcher, condition(), condition(), latent


class Bench:
    """A graph around `RandomFlux`, to which each case adds schedules and samplers."""

    def __init__(
        self, host, *, height=8, width=16, batch=2, masked=False, cfg=1.0, steps=6, seed=11, **options
    ):
        host.nodes["TestRandomFlux"] = RandomFlux
        self.host, self.graph, self.kept = host, host.graph(), {}
        add = self.graph.add
        self.model, positive, negative, self.latent, *_ = add(
            "TestRandomFlux", height=height, width=width, batch=batch, masked=masked
        )
        self.guider = add("CFGGuider", model=self.model, positive=positive, negative=negative, cfg=cfg)[0]
        self.noise = add("RandomNoise", noise_seed=seed)[0]
        self.sigmas = self.schedule(steps=steps, latent=self.latent, **options)

    def schedule(self, **inputs):
        defaults = {"steps": 6, "denoise": 1.0, "shift_mode": "dynamic", "shift": 3.0}
        return self.graph.add("DiptychFlowMatchScheduler", **{**defaults, **inputs})[0]

    def sampler(self, **inputs):
        defaults = {"rule": "ode", "eta": -1.0, "window_start": 0, "window_end": 10000, "sde_seed": 0}
        return self.graph.add("DiptychFlowMatchEulerSampler", **{**defaults, **inputs})[0]

    def euler(self):
        return self.graph.add("KSamplerSelect", sampler_name="euler")[0]

    def sample(self, name, sampler, **inputs):
        """Sample and keep both outputs as `name` and `name_x0`; returns the latent."""
        defaults = {
            "noise": self.noise,
            "guider": self.guider,
            "sigmas": self.sigmas,
            "latent_image": self.latent,
        }
        latent, x0, *_ = self.graph.add("SamplerCustomAdvanced", sampler=sampler, **{**defaults, **inputs})
        self.graph.keep(**{name: latent, f"{name}_x0": x0})
        return latent

    def run(self, **options):
        self.result = self.host.run(self.graph, **options)
        self.kept = self.result.kept
        return {
            name: value["samples"]
            for name, value in self.kept.items()
            if isinstance(value, dict) and "samples" in value
        }


SETTINGS = {
    "plain": {},
    "cfg": {"cfg": 3.0},
    "noise_mask": {"masked": True},
    "denoise": {"denoise": 0.6},
    "odd_size": {"height": 7, "width": 9},
}


@case(each=lambda: SETTINGS)
def ode_equals_core_euler_bit_for_bit(host, setting):
    bench = Bench(host, **SETTINGS[setting])
    bench.sample("ours", bench.sampler())
    bench.sample("theirs", bench.euler())
    got = bench.run()
    assert torch.isfinite(got["ours"]).all()
    assert torch.equal(got["ours"], got["theirs"])
    assert torch.equal(got["ours_x0"], got["theirs_x0"])


@case(each=lambda: RULES)
def without_noise_or_outside_its_window_a_rule_is_euler(host, rule):
    bench = Bench(host)
    bench.sample("euler", bench.euler())
    bench.sample("eta_zero", bench.sampler(rule=rule, eta=0.0))
    bench.sample("no_window", bench.sampler(rule=rule, window_end=0))
    bench.sample("window", bench.sampler(rule=rule, window_start=1, window_end=2))
    got = bench.run()
    assert torch.equal(got["euler"], got["eta_zero"])
    assert torch.equal(got["euler"], got["no_window"])
    assert not torch.equal(got["euler"], got["window"])


@case(each=lambda: RULES)
def seeds_decide_the_noise(host, rule):
    bench = Bench(host)
    other_noise = bench.graph.add("RandomNoise", noise_seed=12)[0]
    start = bench.graph.add("DisableNoise")[0]
    bench.sample("first", bench.sampler(rule=rule))
    bench.sample("second", bench.sampler(rule=rule, sde_seed=1))
    bench.sample("other_run", bench.sampler(rule=rule), noise=other_noise)
    bench.sample("no_start_noise", bench.sampler(rule=rule), noise=start)
    first = bench.run()
    bench.host.executor = None
    again = bench.run()
    assert torch.equal(first["first"], again["first"])
    names = ["first", "second", "other_run", "no_start_noise"]
    for i, name in enumerate(names):
        assert all(not torch.equal(first[name], first[other]) for other in names[:i])


@case(each=lambda: RULES)
def the_last_step_leaves_no_noise(host, rule):
    bench = Bench(host)
    bench.sample("end", bench.sampler(rule=rule))
    got = bench.run()
    torch.testing.assert_close(got["end"], got["end_x0"], rtol=0, atol=1e-5)


@case(each=lambda: RULES)
def the_kept_part_of_a_noise_mask_comes_back_unchanged(host, rule):
    bench = Bench(host, masked=True)
    bench.graph.keep(source=bench.latent)
    bench.sample("end", bench.sampler(rule=rule))
    got = bench.run()
    torch.testing.assert_close(got["end"][..., :7], got["source"][..., :7], rtol=0, atol=5e-6)
    assert (got["end"][..., 9:] - got["source"][..., 9:]).abs().mean() > 0.1


@case
def a_schedule_may_be_split_between_samplers(host):
    bench = Bench(host)
    no_noise = bench.graph.add("DisableNoise")[0]
    high, low, *_ = bench.graph.add("SplitSigmas", sigmas=bench.sigmas, step=3)
    for rule in ("ode", *RULES):
        half = bench.sample(f"{rule}_half", bench.sampler(rule=rule), sigmas=high)
        bench.sample(rule, bench.sampler(), sigmas=low, latent_image=half, noise=no_noise)
        bench.sample(f"{rule}_whole", bench.sampler(rule=rule, window_end=3))
    got = bench.run()
    for rule in ("ode", *RULES):
        torch.testing.assert_close(got[rule], got[f"{rule}_whole"], rtol=0, atol=2e-4)


class _Analytic:
    """Stands where ComfyUI's model does: x0 of a made-up velocity field."""

    def __init__(self, sampling):
        self.inner_model = self
        self.model_sampling = sampling

    @staticmethod
    def velocity(x, sigma):
        return torch.sin(2 * x + sigma)

    def __call__(self, x, sigma, **extra_args):
        sigma = sigma.view(-1, 1, 1, 1)
        return x - sigma * self.velocity(x, sigma)


@case(each=lambda: ("ode", *RULES))
def both_loops_walk_one_path(host, rule):
    """The sampler function inside ComfyUI and the loop outside it, from the same seeds."""
    import comfy.model_sampling

    flow_match, gaussian = host.pack("samplers.flow_match"), host.pack("samplers.gaussian")
    sigmas = host.pack("samplers.schedule").sigmas(8, seq_len=64)
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    sampler = host.pack("samplers.comfy").flow_match_sampler(rule, None, (1, 6), 0)
    model = _Analytic(comfy.model_sampling.CONST())
    ours = sampler.sampler_function(model, x, sigmas, {"seed": 5}, disable=True, **sampler.extra_options)
    generator = torch.Generator().manual_seed(gaussian.sde_seed(5))
    outside = flow_match.sample(_Analytic.velocity, x, sigmas, rule=rule, window=(1, 6), generator=generator)
    torch.testing.assert_close(ours, outside, rtol=0, atol=2e-5)


@case
def every_step_reports_progress_and_a_preview(host):
    import comfy.utils

    seen = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, **_: seen.append((value, total, preview))
    )
    try:
        bench = Bench(host, steps=4)
        bench.sample("end", bench.sampler(rule="flow"))
        bench.run()
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    steps = [(value, total) for value, total, _ in seen if total == 4]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(preview is not None for _, total, preview in seen if total == 4)


@case
def an_interrupt_stops_between_steps(host):
    import comfy.model_management
    import comfy.utils

    seen = []

    def hook(value, total, preview, **_):
        seen.append(value)
        if value == 2:
            comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        bench = Bench(host, steps=6)
        bench.sample("end", bench.sampler(rule="rf_ancestral"))
        bench.run(may_fail=True)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    assert bench.result.message("execution_interrupted") is not None
    assert max(seen) == 2


@case
def a_model_that_is_no_flow_is_refused(host):
    for wanted in ("Sampler", "Scheduler"):
        bench = Bench(host)
        other = bench.graph.add("ModelSamplingDiscrete", model=bench.model, sampling="eps", zsnr=False)[0]
        if wanted == "Sampler":
            guider = bench.graph.add("BasicGuider", model=other, conditioning=[bench.model[0], 1])[0]
            bench.sample("end", bench.sampler(), guider=guider)
        else:
            bench.graph.keep(sigmas=bench.schedule(model=other))
        bench.run(may_fail=True)
        assert "needs a flow-matching model" in bench.result.error
        assert "EPS" in bench.result.error


@case
def what_a_rule_cannot_do_is_refused_in_one_sentence(host):
    refused = {
        "window_end is 2 but window_start is 4": {"rule": "flow", "window_start": 4, "window_end": 2},
        "eta is 1.5": {"rule": "cps", "eta": 1.5},
        "window starts at step 9": {"rule": "flow", "window_start": 9},
    }
    for words, settings in refused.items():
        bench = Bench(host)
        bench.sample("end", bench.sampler(**settings))
        bench.run(may_fail=True)
        assert words in bench.result.error, bench.result.error


@case
def the_schedule_counts_the_latents_tokens(host):
    schedule = host.pack("samplers.schedule")
    bench = Bench(host, height=7, width=16, steps=10)
    bench.graph.keep(
        latent=bench.sigmas,
        fixed=bench.schedule(steps=10, shift_mode="fixed", shift=2.0),
        none=bench.schedule(steps=10, shift_mode="none"),
        part=bench.schedule(steps=10, latent=bench.latent, denoise=0.5),
        nothing=bench.schedule(steps=10, latent=bench.latent, denoise=0.0),
    )
    bench.run()
    kept = bench.kept
    assert torch.equal(kept["latent"], schedule.sigmas(10, seq_len=4 * 8))
    assert torch.equal(kept["fixed"], schedule.sigmas(10, shift=2.0))
    assert torch.equal(kept["none"], schedule.sigmas(10))
    assert torch.equal(kept["part"], schedule.sigmas(10, seq_len=4 * 8, denoise=0.5))
    assert len(kept["nothing"]) == 0


@case
def without_a_latent_the_schedule_takes_the_models_own_shift(host):
    bench = Bench(host)
    shifted = bench.graph.add(
        "ModelSamplingFlux", model=bench.model, max_shift=1.15, base_shift=0.5, width=1024, height=512
    )[0]
    core = {
        name: bench.graph.add("BasicScheduler", model=model, scheduler="simple", steps=20, denoise=1.0)[0]
        for name, model in (("default", bench.model), ("flux", shifted))
    }
    bench.graph.keep(
        default=bench.schedule(steps=20, model=bench.model),
        flux=bench.schedule(steps=20, model=shifted),
        core_default=core["default"],
        core_flux=core["flux"],
        real=bench.schedule(steps=20, model=shifted, latent=bench.latent),
    )
    bench.run()
    for name in ("default", "flux"):
        torch.testing.assert_close(bench.kept[name], bench.kept[f"core_{name}"], rtol=0, atol=1e-5)
    assert not torch.equal(bench.kept["real"], bench.kept["flux"])


@case
def without_latent_and_model_a_dynamic_shift_is_refused(host):
    bench = Bench(host)
    bench.graph.keep(sigmas=bench.schedule())
    bench.run(may_fail=True)
    assert "neither latent nor model is connected" in bench.result.error


@case
def the_same_graph_is_not_sampled_twice(host):
    bench = Bench(host)
    bench.sample("end", bench.sampler(rule="flow"))
    bench.run()
    bench.run()
    assert not host.caches or bench.result.executed == []
