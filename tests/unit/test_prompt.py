"""The prompt is the reference's, word for word, once."""

from __future__ import annotations

import pytest
from comfyui_diptych.models.diptych import ICEDIT_TEMPLATE, build, format_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import rand

REFERENCE = (
    "A diptych with two side-by-side images of the same scene. On the right, the scene is exactly the same as"
    " on the left but make the hat red"
)


def test_the_prompt_is_the_reference():
    assert format_prompt("make the hat red") == REFERENCE
    assert build(rand(1, 16, 16, 3), "make the hat red").prompt == REFERENCE
    assert ICEDIT_TEMPLATE.format(instruction="make the hat red") == REFERENCE


@pytest.mark.parametrize(
    "typed",
    [
        REFERENCE,
        REFERENCE.lower(),
        "  " + REFERENCE.replace(" ", "   ").replace("make   the   hat   red", "make the hat red") + " ",
        REFERENCE.replace("scene. On", "scene.\nOn").upper().replace("MAKE THE HAT RED", "make the hat red"),
    ],
)
def test_a_typed_prefix_is_not_doubled(typed):
    assert format_prompt(typed) == REFERENCE


def test_a_diptych_sentence_of_ones_own_is_kept():
    own = "A diptych with two side-by-side photos. On the right the cat sleeps"
    assert format_prompt(own) == own


@pytest.mark.parametrize(
    "side, first, second",
    [
        ("left", "On the left", "on the right"),
        ("top", "On the top", "on the bottom"),
        ("bottom", "bottom", "top"),
    ],
)
def test_the_words_follow_the_side(side, first, second):
    prompt = format_prompt("turn left, then right", side=side)
    assert first in prompt and f"as on the {second.split()[-1]} but turn left, then right" in prompt
    assert ("side-by-side" in prompt) == (side == "left")
    assert format_prompt(prompt, side=side) == prompt


def test_own_templates_take_the_sides_and_leave_other_braces():
    template = "{source} is before, {edited} is after ({arrangement}): {instruction} {0} {}"
    assert (
        format_prompt("{edited}", template, side="top")
        == "bottom is before, top is after (stacked): {edited} {0} {}"
    )


def test_keeping_the_rest_is_said_once():
    once = format_prompt("a red hat", keep_rest=True)
    assert once.endswith("but a red hat, with other regions the same as on the left")
    assert format_prompt(once, keep_rest=True) == once


@pytest.mark.parametrize("nothing", [None, "", "  \n"])
def test_no_instruction_is_no_prompt(nothing):
    assert format_prompt(nothing) == ""


def test_a_template_without_a_place_is_one_clear_sentence():
    with pytest.raises(ValueError, match="{instruction}"):
        format_prompt("x", "a cat")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.sampled_from(["right", "left", "bottom", "top"]), st.booleans())
def test_formatting_a_prompt_again_changes_nothing(words, side, keep_rest):
    once = format_prompt(words, side=side, keep_rest=keep_rest)
    assert format_prompt(once, side=side, keep_rest=keep_rest) == once
