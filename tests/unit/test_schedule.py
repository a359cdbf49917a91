"""Sigma schedules: length, ends, shift and denoise, against closed forms and published figures."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_diptych.nodes.sampling import DiptychFlowMatchScheduler
from comfyui_diptych.samplers.schedule import dynamic_mu, sigmas, token_count
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.one_of(st.none(), st.integers(16, 20000)))
def test_a_schedule_falls_from_one_to_zero(steps, seq_len):
    schedule = sigmas(steps, seq_len=seq_len)
    assert schedule.shape == (steps + 1,)
    assert schedule.dtype == torch.float32 and schedule.device.type == "cpu"
    assert schedule[0] == 1.0 and schedule[-1] == 0.0
    assert (schedule.diff() < 0).all()


def test_mu_runs_through_the_two_published_points():
    assert dynamic_mu(256) == pytest.approx(0.5)
    assert dynamic_mu(4096) == pytest.approx(1.15)


@pytest.mark.parametrize(
    ("width", "height", "mu", "middle"), [(1024, 512, 0.803, 0.691), (2048, 1024, 1.843, 0.863)]
)
def test_a_diptych_counts_as_a_whole(width, height, mu, middle):
    tokens = token_count(height // 8, width // 8)
    assert dynamic_mu(tokens) == pytest.approx(mu, abs=1e-3)
    assert sigmas(2, seq_len=tokens)[1].item() == pytest.approx(middle, abs=1e-3)


def test_tokens_of_odd_latents_are_padded_up():
    assert token_count(95, 128) == 48 * 64
    assert token_count(1, 1) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(0.05, 50))
def test_a_fixed_shift_multiplies_the_odds(steps, shift):
    plain, shifted = sigmas(steps)[1:-1].double(), sigmas(steps, shift=shift)[1:-1].double()
    torch.testing.assert_close(shifted / (1 - shifted), shift * plain / (1 - plain), rtol=1e-4, atol=1e-5)


def test_dynamic_shift_is_the_fixed_shift_of_its_exponential():
    torch.testing.assert_close(sigmas(28, seq_len=2048), sigmas(28, shift=math.exp(dynamic_mu(2048))))


def test_no_shift_is_evenly_spaced():
    torch.testing.assert_close(sigmas(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.floats(0.02, 1.0))
def test_denoise_keeps_the_last_steps_of_a_longer_schedule(steps, denoise):
    part, whole = sigmas(steps, seq_len=1024, denoise=denoise), sigmas(int(steps / denoise), seq_len=1024)
    assert len(part) == steps + 1
    assert torch.equal(part, whole[-(steps + 1) :])


def test_denoise_zero_has_nothing_to_run():
    assert sigmas(20, denoise=0.0).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 4, "shift": 0.0}, "shift is 0"),
        ({"steps": 4, "shift": 3.0, "seq_len": 256}, "both given"),
        ({"steps": 4, "denoise": 1.5}, "denoise is 1.5"),
        ({"steps": 4, "denoise": -0.1}, "denoise is -0.1"),
        ({"steps": 4, "seq_len": 0}, "seq_len is 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        sigmas(**arguments)


def test_the_node_counts_the_tokens_of_its_latent():
    latent = {"samples": torch.zeros(2, 16, 64, 127)}
    (schedule,) = DiptychFlowMatchScheduler().schedule(28, latent=latent)
    assert torch.equal(schedule, sigmas(28, seq_len=32 * 64))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({}, "neither latent nor model"), ({"latent": {"samples": torch.zeros(1, 16, 4, 8, 8)}}, "video")],
)
def test_the_node_says_what_it_lacks(arguments, words):
    with pytest.raises(ValueError, match=words):
        DiptychFlowMatchScheduler().schedule(28, **arguments)
