"""Images, masks and widget values of every kind, and the one demand on a node: a result or a sentence."""

from __future__ import annotations

import math

import torch
from comfyui_diptych.models import diptych as dp
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
VALUES = ("uniform", "zeros", "ones", "faint", "wild", "nan", "inf", "one pixel")
side_lengths = st.one_of(st.integers(1, 70), st.sampled_from([1, 15, 16, 17, 32, 64]))
policies = st.sampled_from(dp.geometry.AUTO_POLICIES)


def filled(shape, values, dtype, seed):
    """A tensor of a shape with values of a kind."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.rand(shape, generator=generator)
    if values == "zeros" or values == "one pixel":
        tensor = torch.zeros(shape)
    elif values == "ones":
        tensor = torch.ones(shape)
    elif values == "faint":
        tensor = tensor * 0.45
    elif values == "wild":
        tensor = tensor * 6 - 3
    if tensor.numel() and values in ("nan", "inf", "one pixel"):
        at = int(torch.randint(tensor.numel(), (1,), generator=generator))
        tensor.view(-1)[at] = {"nan": math.nan, "inf": -math.inf, "one pixel": 1.0}[values]
    if dtype.is_floating_point or dtype.is_complex:
        return tensor.to(dtype)
    return (tensor.nan_to_num(0, 0, 0).clamp(0, 1) * 255).to(dtype)


@st.composite
def images(draw, odd=True):
    batch, height, width = draw(st.integers(1, 3)), draw(side_lengths), draw(side_lengths)
    shape = (batch, height, width, draw(st.sampled_from([3, 3, 3, 1, 4])))
    values, dtype = "uniform", torch.float32
    if odd and draw(st.integers(0, 3)) == 0:
        values, dtype = draw(st.sampled_from(VALUES)), draw(st.sampled_from((*FLOATS, torch.uint8)))
        shape = draw(st.sampled_from([shape, shape[1:], shape[:3], (0, *shape[1:]), (*shape[:3], 2)]))
    return filled(shape, values, dtype, draw(st.integers(0, 9)))


@st.composite
def masks(draw, odd=True):
    batch, height, width = draw(st.integers(1, 3)), draw(side_lengths), draw(side_lengths)
    shape, dtype = (batch, height, width), torch.float32
    values = draw(st.sampled_from(["uniform", "one pixel", "zeros"]))
    if odd and draw(st.integers(0, 3)) == 0:
        values = draw(st.sampled_from(VALUES))
        dtype = draw(st.sampled_from((*FLOATS, torch.uint8, torch.bool, torch.int64, torch.complex64)))
        shape = draw(
            st.sampled_from(
                [shape, shape[1:], (batch, 1, height, width), (*shape, 1), (*shape, 3), (0, 8, 8)]
            )
        )
    return filled(shape, values, dtype, draw(st.integers(0, 9)))


extreme = st.one_of(
    st.integers(-5, 600),
    st.sampled_from([-(2**40), 2**40, 2**64, math.nan, math.inf, 0.5, None, "x", True, [1]]),
)


def copies(inputs):
    return {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}


def tried(function, **inputs):
    """The node's outputs, or None where it answered with a sentence; no input may have changed."""
    before = copies(inputs)
    try:
        return function(**inputs)
    except ValueError as error:
        text = str(error)
        assert type(error) is ValueError and 10 < len(text) < 500 and "\n" not in text, text
        return None
    finally:
        for key, value in before.items():
            assert torch.equal(value.nan_to_num(7, 8, 9), inputs[key].nan_to_num(7, 8, 9)), key


def widgets(draw, **choices):
    """Some of the widgets, each with a usual value or now and then with an extreme one."""
    return {
        name: draw(extreme) if draw(st.integers(0, 9)) == 0 else draw(usual)
        for name, usual in choices.items()
        if draw(st.booleans())
    }
