"""The Early Filter Sampler and the reward nodes in ComfyUI's own sampling machinery."""

from __future__ import annotations

import torch

from . import case
from .sampling import RULES, Bench

REWARD = {"name": "jpeg_size", "weight": -1.0}


class Contest(Bench):
    """`Bench` with a judge that likes images which need many bytes."""

    def __init__(self, host, **options):
        super().__init__(host, **{"height": 8, "width": 8, "batch": 1, "steps": 5, **options})
        self.vae = self.graph.add("DiptychTinyModelLoader", which="fill")[2]
        self.reward = self.graph.add("DiptychReward", **REWARD)[0]

    def best(self, **inputs):
        defaults = {"reward": self.reward, "vae": self.vae, "candidates": 3, "judge_steps": 2}
        return self.graph.add("DiptychEarlyFilterSampler", **{**defaults, **inputs})[0]

    def plain(self, name, seed, **inputs):
        noise = self.graph.add("RandomNoise", noise_seed=seed)[0]
        return self.sample(name, self.sampler(**inputs), noise=noise)


SETTINGS = {
    "plain": {},
    "cfg": {"cfg": 3.0},
    "noise_mask": {"masked": True},
    "denoise": {"denoise": 0.6},
    "batch": {"batch": 2},
}


@case(each=lambda: SETTINGS)
def one_candidate_is_the_plain_sampler_bit_for_bit(host, setting):
    contest = Contest(host, **SETTINGS[setting])
    for rule in ("ode", "flow"):
        contest.sample(f"{rule}_ours", contest.best(candidates=1, rule=rule))
        contest.sample(f"{rule}_plain", contest.sampler(rule=rule))
    got = contest.run()
    for rule in ("ode", "flow"):
        assert torch.equal(got[f"{rule}_ours"], got[f"{rule}_plain"])
        assert torch.equal(got[f"{rule}_ours_x0"], got[f"{rule}_plain_x0"])


@case(each=lambda: [f"{setting}, {rule}" for setting in SETTINGS for rule in ("ode", "flow")])
def the_best_is_the_plain_samplers_image_of_its_seed(host, setting):
    """Seeds 11, 12, 13 compete; the kept latent of every sample is one of the three plain ones."""
    setting, _, rule = setting.partition(", ")
    contest = Contest(host, **SETTINGS[setting])
    contest.sample("one_by_one", contest.best(rule=rule))
    contest.sample("together", contest.best(rule=rule, together=3))
    contest.sample("all", contest.best(rule=rule, keep=3))
    for seed in (11, 12, 13):
        contest.plain(f"seed {seed}", seed, rule=rule)
    got = contest.run()
    plain = torch.stack([got[f"seed {seed}"] for seed in (11, 12, 13)])
    batch = plain.shape[1]
    everyone = got["all"].view(3, batch, *plain.shape[2:])
    for sample in range(batch):
        distance = (plain[:, sample] - got["one_by_one"][sample]).flatten(1).abs().amax(1)
        assert distance.min() < 1e-5, distance
        torch.testing.assert_close(got["together"][sample], got["one_by_one"][sample], rtol=0, atol=2e-4)
        kept = [
            int((plain[:, sample] - everyone[rank, sample]).flatten(1).abs().amax(1).argmin())
            for rank in range(3)
        ]
        assert sorted(kept) == [0, 1, 2] and kept[0] == int(distance.argmin())


@case
def the_judge_prefers_what_the_reward_prefers(host):
    """Judged at the last step, the kept image is the best of the finished ones."""
    contest = Contest(host)
    best = contest.sample("best", contest.best(judge_steps=5))
    images = {"best": contest.graph.add("VAEDecode", samples=best, vae=contest.vae)[0]}
    for seed in (11, 12, 13):
        latent = contest.plain(f"seed {seed}", seed)
        images[f"seed {seed}"] = contest.graph.add("VAEDecode", samples=latent, vae=contest.vae)[0]
    scores = {
        name: contest.graph.add("DiptychRewardScore", images=image, reward=contest.reward)[0]
        for name, image in images.items()
    }
    contest.graph.keep(**{f"score {name}": score for name, score in scores.items()})
    contest.run()
    best, *others = (contest.kept[f"score {name}"] for name in images)
    assert best == min(others)


@case
def every_step_shows_all_candidates_and_then_the_best(host):
    import comfy.utils

    seen = []

    def hook(value, total, preview, **_):
        if total == 5:
            seen.append((value, preview[1].size))

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        contest = Contest(host)
        contest.sample("end", contest.best())
        contest.run()
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert [value for value, _ in seen] == [1, 2, 2, 3, 4, 5]
    # three candidates in a grid of two by two, then one image
    assert seen[0][1] == seen[1][1] and seen[2][1] == seen[5][1]
    assert seen[0][1][0] == 2 * seen[5][1][0] or seen[0][1][0] == seen[5][1][0]  # previews are capped


@case
def an_interrupt_stops_between_two_starts(host):
    import comfy.model_management

    contest = Contest(host)
    module = host.pack("samplers.comfy_early_filter")
    calls, predict = [], module.comfy.model_management.throw_exception_if_processing_interrupted

    def counted():
        calls.append(1)
        if len(calls) == 2:
            comfy.model_management.interrupt_current_processing()
        predict()

    comfy.model_management.throw_exception_if_processing_interrupted = counted
    try:
        contest.sample("end", contest.best())
        contest.run(may_fail=True)
    finally:
        comfy.model_management.throw_exception_if_processing_interrupted = predict
        comfy.model_management.interrupt_current_processing(False)
    assert contest.result.message("execution_interrupted") is not None


@case
def starts_without_noise_are_refused_in_one_sentence(host):
    contest = Contest(host)
    contest.sample("end", contest.best(), noise=contest.graph.add("DisableNoise")[0])
    contest.run(may_fail=True)
    assert "connect RandomNoise instead of DisableNoise" in contest.result.error


@case
def more_judging_than_steps_is_refused(host):
    contest = Contest(host)
    contest.sample("end", contest.best(judge_steps=6))
    contest.run(may_fail=True)
    assert "judging after 6 steps does not fit a schedule of 5: choose 1 to 5" in contest.result.error


@case(each=lambda: RULES)
def every_rule_ends_without_noise(host, rule):
    contest = Contest(host)
    contest.sample("end", contest.best(rule=rule))
    got = contest.run()
    torch.testing.assert_close(got["end"], got["end_x0"], rtol=0, atol=1e-5)


@case
def a_reward_may_come_after_another_and_judges_a_batch(host):
    graph = host.graph()
    demo = [graph.add("DiptychDemoImage", example=example) for example in (3, 4)]
    images = graph.add("ImageBatch", image1=demo[0][0], image2=demo[0][3])[0]
    shapes = graph.add("DiptychReward", name="shapes", weight=1.0)[0]
    both = graph.add("DiptychReward", name="keep_l1", weight=0.5, also=shapes)[0]
    node = graph.add(
        "DiptychRewardScore",
        images=images,
        reward=both,
        source=demo[0][0],
        mask=demo[0][2],
        prompt=demo[0][1],
    )
    kept = host.run(
        graph.keep(best=node[0], report=node[1], sorted=node[2], sheet=node[3], target=demo[0][3])
    ).kept
    assert torch.equal(kept["sorted"][0], kept["target"][0])
    assert kept["best"] > 0 and "shapes" in kept["report"] and kept["sheet"].ndim == 4
