"""Manners in the executor: errors in a sentence, interrupts between steps, previews, every rule."""

from __future__ import annotations

import torch

from . import SkipCase, case
from .two_hosts import fill_graph, random_image, right_half, sample, text


def kontext_chain(host, *, steps: int, rule: str = "ode", **sampler):
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="kontext")
    kontext = graph.add(
        "DiptychKontextConditioner",
        conditioning=text(graph, loader[1], 2.5),
        vae=loader[2],
        image=graph.given(random_image(1, 64, 64)),
        size_policy="keep",
    )
    node = graph.add("DiptychFlowMatchEulerSampler", rule=rule, **sampler)[0]
    latent = sample(graph, loader[0], kontext[0], kontext[1], steps=steps, sampler=node)
    return graph.keep(latent=latent)


@case
def an_interrupt_stops_between_two_steps(host):
    import comfy.model_management
    import comfy.utils

    steps: list[int] = []

    def progress(value, total, preview, **_):
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total == 20:
            steps.append(value)
        if steps and steps[-1] == 2:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(progress)
    try:
        run = host.run(kontext_chain(host, steps=20), may_fail=True)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    assert run.message("execution_interrupted"), run.messages
    assert steps in ([1, 2], [0, 1, 2]) and "latent" not in run.kept


@case
def every_step_shows_a_preview(host):
    import comfy.utils

    previews: list = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: previews.append(preview))
    try:
        host.run(kontext_chain(host, steps=3))
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    images = [preview for preview in previews if preview is not None]
    assert len(images) == 3 and all(kind == "JPEG" for kind, *_ in images)


@case(each=lambda: ["ode", "flow", "dance", "cps", "rf_ancestral"])
def every_rule_samples_and_repeats_itself(host, rule):
    first = host.run(kontext_chain(host, steps=3, rule=rule)).kept["latent"]["samples"]
    host.executor = None
    again = host.run(kontext_chain(host, steps=3, rule=rule)).kept["latent"]["samples"]
    assert torch.isfinite(first).all() and torch.equal(first, again)


@case
def a_model_that_is_not_fill_is_refused_before_anything_is_encoded(host):
    graph = host.graph()
    fill, kontext = (graph.add("DiptychTinyModelLoader", which=which) for which in ("fill", "kontext"))
    positive = text(graph, fill[1], 30.0)
    inputs = {"positive": positive, "negative": positive, "vae": fill[2]}
    image, mask = graph.given(random_image(1, 64, 64)), graph.given(right_half(1, 64, 64))
    node = graph.add("DiptychFluxFillConditioner", image=image, mask=mask, model=kontext[0], **inputs)
    run = host.run(graph.keep(latent=node[2]), may_fail=True)
    assert "64 input channels" in run.error and "Fill" in run.error


@case
def an_unfitting_size_fails_with_one_sentence(host):
    graph, decoded = fill_graph(host, random_image(1, 64, 64), torch.zeros(1, 3, 4, 64, 64))
    run = host.run(graph.keep(image=decoded), may_fail=True)
    assert run.message("execution_error")["exception_type"].endswith("ValueError")
    assert "mask" in run.error and "\n" not in run.error.strip()


@case
def the_models_are_loaded_once_and_shared(host):
    if not host.caches:
        raise SkipCase("nothing is shared where nothing is cached")
    graph = host.graph()
    one, two = (graph.add("DiptychTinyModelLoader", which="fill") for _ in range(2))
    kept = host.run(graph.keep(one=one[0], two=two[0])).kept
    assert kept["one"] is kept["two"]
