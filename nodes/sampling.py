"""Schedule and sampler nodes: SIGMAS shifted for the real token count, and the flow-match step rules."""

from __future__ import annotations

from ..samplers.rules import DEFAULT_ETA, RULES, resolve_eta
from ..samplers.schedule import sigmas, token_count
from . import widgets
from .widgets import choice, integer, number, socket


class DiptychFlowMatchScheduler:
    """FLUX's schedule, shifted for the size that is really denoised."""

    DISPLAY_NAME = "Flow-Match Scheduler"
    DESCRIPTION = (
        "The sigmas of FLUX's reference pipelines: evenly spaced, then shifted by the number of tokens of "
        "the latent that is really denoised (a diptych counts as a whole)."
    )
    CATEGORY = "diptych/sampling"
    RETURN_TYPES = ("SIGMAS",)
    RETURN_NAMES = ("sigmas",)
    OUTPUT_TOOLTIPS = (
        "steps + 1 noise levels, falling to 0. For SamplerCustomAdvanced, used there as they are.",
    )
    FUNCTION = "schedule"
    SEARCH_ALIASES = ["flux scheduler", "sigmas", "dynamic shift", "time shift", "flow match euler discrete"]

    @classmethod
    def INPUT_TYPES(cls):
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "steps": integer(28, 1, 10000)("Model evaluations. ICEdit and FLUX use 28 to 50."),
                "denoise": number(1.0, 0.0, 1.0, step=0.01)(
                    "Below 1 the run starts part of the way down, from the latent with some noise; the "
                    "number of steps stays the same, as in ComfyUI's own schedulers."
                ),
                "shift_mode": choice(["dynamic", "fixed", "none"], "dynamic", advanced=True)(
                    "dynamic: from the latent's token count, as FLUX was trained (without a latent, the "
                    "model's own shift). fixed: the value below. none: evenly spaced."
                ),
                "shift": number(3.0, 0.01, 100.0, step=0.01, advanced=True)(
                    "Only for shift_mode fixed: s in s*t/(1+(s-1)*t), as in SD3 and DanceGRPO (3). "
                    "ModelSamplingFlux counts in logarithms: its 1.15 is 3.16 here."
                ),
            },
            "optional": {
                "latent": socket("LATENT")(
                    "The latent that goes into the sampler: its size sets the dynamic shift."
                ),
                "model": socket("MODEL")(
                    "Instead of a latent: takes the shift this model carries (ModelSamplingFlux, "
                    "ModelSamplingSD3). Beside a latent it is only checked to be a flow model."
                ),
            },
        }

    def schedule(self, steps, denoise=1.0, shift_mode="dynamic", shift=3.0, latent=None, model=None):
        """SIGMAS [steps + 1]. Raises ValueError for a model that is no flow, and for nothing to shift by."""
        if model is not None:
            from ..samplers.comfy import model_shift, require_flow

            require_flow(model.get_model_object("model_sampling"), self.DISPLAY_NAME)
        if shift_mode == "none":
            return (sigmas(steps, denoise=denoise),)
        if shift_mode == "fixed":
            return (sigmas(steps, shift=shift, denoise=denoise),)
        if latent is not None:
            return (sigmas(steps, seq_len=_latent_tokens(latent), denoise=denoise),)
        if model is None:
            raise ValueError(
                "shift_mode is dynamic but neither latent nor model is connected: connect the latent that is "
                "sampled, or choose shift_mode fixed."
            )
        return (sigmas(steps, shift=model_shift(model), denoise=denoise),)


def _latent_tokens(latent: dict) -> int:
    shape = tuple(latent["samples"].shape)
    if len(shape) != 4:
        raise ValueError(
            f"latent has shape {shape} but an image's is [batch, channels, height, width]: for video "
            "latents choose shift_mode fixed, or connect the model."
        )
    return token_count(*shape[-2:])


class DiptychFlowMatchEulerSampler:
    """Euler for flow models, with the SDE rules that reward training uses."""

    DISPLAY_NAME = "Flow-Match Euler Sampler"
    DESCRIPTION = (
        "Euler sampler for FLUX and other flow models. ode equals core euler; the SDE rules add noise as "
        "GRPO training does, in all steps or in a window of them. The last step never leaves noise in the "
        "image."
    )
    CATEGORY = "diptych/sampling"
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    OUTPUT_TOOLTIPS = ("For SamplerCustom and SamplerCustomAdvanced.",)
    FUNCTION = "build"
    SEARCH_ALIASES = ["euler", "sde sampler", "grpo sampler", "flow-grpo", "dancegrpo", "cps", "ancestral"]

    @classmethod
    def INPUT_TYPES(cls):
        """The table of inputs, as ComfyUI's schema has it."""
        defaults = ", ".join(f"{rule} {eta:g}" for rule, eta in DEFAULT_ETA.items() if rule != "ode")
        return {
            "required": {
                "rule": choice(RULES, "ode")(
                    "ode: deterministic, the same as euler. rf_ancestral: the right amount of noise at any "
                    "step count, best for variety. flow, dance, cps: as in Flow-GRPO, DanceGRPO, FlowCPS."
                ),
                "eta": widgets.eta()(
                    f"Noise of the SDE rules. auto: the rule's own value ({defaults}); 0: none."
                ),
                "window_start": integer(0, 0, 10000, advanced=True)(
                    "First step (from 0) that adds noise; the steps before it are ode."
                ),
                "window_end": integer(10000, 0, 10000, advanced=True)(
                    "The steps from this one on are ode again; 10000 is to the end."
                ),
                "sde_seed": widgets.seed(advanced=True)(
                    "Picks another path from the same starting noise. The SDE noise depends on this and on "
                    "the run's own seed, so it can stay at 0."
                ),
            }
        }

    def build(self, rule="ode", eta=-1.0, window_start=0, window_end=10000, sde_seed=0):
        """The SAMPLER. Raises ValueError for a window that ends before it starts."""
        eta = resolve_eta(rule, None if eta < 0 else eta)
        if window_end < window_start:
            raise ValueError(f"window_end is {window_end} but window_start is {window_start}: end it later.")
        from ..samplers.comfy import flow_match_sampler

        return (flow_match_sampler(rule, eta, (window_start, window_end), sde_seed),)


NODES = [DiptychFlowMatchScheduler, DiptychFlowMatchEulerSampler]
