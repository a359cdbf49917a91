"""Where an image sits in a panel: sizes FLUX can take, and boxes that can be undone.

Integers only, no tensors. `fit` decides the panel's size and which part of the source fills which part of the
panel; `models/diptych.py` moves the pixels.
"""

from __future__ import annotations

from typing import NamedTuple

POLICIES = ("stretch", "crop", "pad")
AUTO_POLICIES = ("auto", *POLICIES)
STRETCHED, CROPPED = 1.05, 1.10  # auto: the most that an aspect is stretched, and the most that is cropped
MULTIPLE = 16
MAX_PANEL = 2**25  # pixels of one panel, 33 megapixels: a diptych of two is 0.8 GB

# Width, height: the 17 sizes FLUX.1 Kontext was trained on (published with the model; also in diffusers).
KONTEXT_SIZES = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """The rows of a tensor that it covers."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """The columns of a tensor that it covers."""
        return slice(self.left, self.left + self.width)

    def scaled(self, from_size: tuple[int, int], to_size: tuple[int, int]) -> Box:
        """The same rectangle after the canvas went from one (height, width) to another."""
        fy, fx = to_size[0] / from_size[0], to_size[1] / from_size[1]
        top, left = round(self.top * fy), round(self.left * fx)
        bottom, right = round((self.top + self.height) * fy), round((self.left + self.width) * fx)
        return Box(top, left, max(bottom - top, 1), max(right - left, 1))


class Fit(NamedTuple):
    """`shown` (source pixels) is resized to `filled` (panel pixels) on a panel of `panel` (height, width).

    `policy` is the one of `POLICIES` that was followed.
    """

    panel: tuple[int, int]
    shown: Box
    filled: Box
    policy: str = "stretch"


def said(value: object) -> str:
    """A value as an error quotes it, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_choice(name: str, value: str, choices) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {said(value)}: choose one of {', '.join(map(str, choices))}.")


def check_whole(name: str, value: int, low: int, high: int) -> None:
    """Raise ValueError unless `value` is a whole number from `low` to `high`."""
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {said(value)}: use a whole number from {low} to {high}.")


def distortion(source: tuple[int, int], panel: tuple[int, int]) -> float:
    """By what factor (1 or more) stretching a source to a panel changes its aspect."""
    ratio = (source[1] * panel[0]) / (source[0] * panel[1])
    return max(ratio, 1 / ratio)


def resolve(policy: str, source: tuple[int, int], panel: tuple[int, int], masked: bool = False) -> str:
    """The policy itself, or for `auto`: stretch up to 5 % of the aspect, crop up to 10 %, else pad.

    `masked`: there is a mask, of which cropping might lose a part, so pad instead.

    The nearest of Kontext's sizes differs by up to 8.5 %, unless the source is wider or taller than all.
    """
    check_choice("policy", policy, AUTO_POLICIES)
    if policy != "auto":
        return policy
    factor = distortion(source, panel)
    return "stretch" if factor <= STRETCHED else "crop" if factor <= CROPPED and not masked else "pad"


def check_panel(source: tuple[int, int], fit: Fit) -> Fit:
    """The fit itself. Raises ValueError, before memory is taken, if its panel is beyond `MAX_PANEL`."""
    height, width = fit.panel
    if height * width > MAX_PANEL:
        raise ValueError(
            f"the {source[1]}x{source[0]} image needs a panel of {width}x{height}, but a panel has at most"
            f" {MAX_PANEL // 10**6} megapixels: use a smaller panel_width, or crop or resize the image."
        )
    return fit


def snap(length: float, rounding: str = "nearest", multiple: int = MULTIPLE) -> int:
    """The multiple that is `nearest`, not above (`down`) or not below (`up`); at least the first."""
    units = length / multiple
    whole = {"nearest": round(units), "down": int(units), "up": -int(-units // 1)}[rounding]
    return max(whole, 1) * multiple


def _inside(outer: tuple[int, int], inner: tuple[int, int]) -> Box:
    """A centred box of size `inner`."""
    return Box((outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2, *inner)


def place(source: tuple[int, int], panel: tuple[int, int], policy: str, masked: bool = False) -> Fit:
    """Fit a source of (height, width) to a panel of given size.

    `stretch` changes the aspect, `crop` loses borders of the source, `pad` leaves borders in the panel; for
    `auto` see `resolve`. Raises ValueError for another policy.
    """
    policy = resolve(policy, source, panel, masked)
    whole_source, whole_panel = Box(0, 0, *source), Box(0, 0, *panel)
    scales = [p / s for p, s in zip(panel, source, strict=True)]
    if policy == "crop":
        scale = max(scales)
        size = tuple(min(s, max(round(p / scale), 1)) for p, s in zip(panel, source, strict=True))
        return Fit(panel, _inside(source, size), whole_panel, policy)
    if policy == "pad":
        scale = min(scales)
        size = tuple(min(p, max(round(s * scale), 1)) for p, s in zip(panel, source, strict=True))
        return Fit(panel, whole_source, _inside(panel, size), policy)
    return Fit(panel, whole_source, whole_panel, policy)


def keep_scale(source: tuple[int, int], policy: str, masked: bool = False, multiple: int = MULTIPLE) -> Fit:
    """Fit without resampling where the policy allows it; `multiple` is 16 for FLUX, 8 for Stable Diffusion.

    `crop` takes the largest multiple of it inside the source and `pad` the smallest around it, both at scale
    1; `stretch` resizes to the nearest, which is no resampling only if the source already divides by it. A
    shorter side cannot be cropped and is padded.
    """
    policy = resolve(policy, source, tuple(snap(side, multiple=multiple) for side in source), masked)
    rounding = {"stretch": "nearest", "crop": "down", "pad": "up"}[policy]
    panel = tuple(snap(side, rounding, multiple) for side in source)
    if policy == "stretch":
        return place(source, panel, policy)
    size = tuple(min(pair) for pair in zip(source, panel, strict=True))
    return Fit(panel, _inside(source, size), _inside(panel, size), policy)


def fit_width(source: tuple[int, int], width: int, policy: str, masked: bool = False) -> Fit:
    """Fit to a panel of the given width (a multiple of 16); the height follows from the aspect.

    The height is the nearest multiple of 16, for `pad` the next one, so that padding is only below and above.
    Raises ValueError for a width that is no multiple of 16, or a policy not known.
    """
    if not isinstance(width, int) or width < MULTIPLE or width % MULTIPLE:
        near = snap(width) if isinstance(width, int) else 512
        raise ValueError(
            f"panel_width is {said(width)}: use a multiple of {MULTIPLE} such as {said(near)},"
            " or 0 to keep the size."
        )
    height = round(source[0] * width / source[1])
    policy = resolve(policy, source, (snap(height), width), masked)
    return place(source, (snap(height, "up" if policy == "pad" else "nearest"), width), policy)


def kontext_size(source: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) among Kontext's 17 whose aspect is nearest (diffusers' FluxKontextPipeline)."""
    aspect = source[1] / source[0]
    _, width, height = min((abs(aspect - w / h), w, h) for w, h in KONTEXT_SIZES)
    return height, width


def area_size(source: tuple[int, int], megapixels: float) -> tuple[int, int]:
    """The (height, width) of about `megapixels` (2**20 pixels), multiples of 16, nearest to the aspect.

    Raises ValueError for an area outside 0..32.
    """
    if not 0 < megapixels <= MAX_PANEL / 2**20:
        raise ValueError(f"megapixels is {megapixels}: use a number above 0 up to 32, such as 1.0.")
    scale = (megapixels * 2**20 / (source[0] * source[1])) ** 0.5
    return snap(source[0] * scale), snap(source[1] * scale)
