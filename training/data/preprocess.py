"""From a `Sample` to what a model sees as pixels: one size, the diptych, the mask, the prompt. No encoding.

`Preprocessor` does it to one sample, `Corpus` to every row of a configuration's data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ...models.geometry import CROPPED, STRETCHED, distortion
from ..runtime.fingerprints import stamp
from ..runtime.random_streams import row_generator
from . import buckets, masks
from .files import ClassImages
from .sample import BrokenSample, Sample, fit
from .sources import Mix, open_source


@dataclass(frozen=True)
class Preprocessed:
    """Pixels float32 [3,H,W] in -1..1; mask [1,H,W] of 0 and 1 or None; reference pixels or None;
    touched [1,H,W], where the edit is, if the loss asks for it; edited [h,w], the row's own mask at the size
    of one panel, of which nothing is encoded; the prompt; whether it is [source | edit];
    whether it shows a target image, not the source in its place."""

    pixels: Tensor
    prompt: str
    mask: Tensor | None = None
    reference: Tensor | None = None
    touched: Tensor | None = None
    edited: Tensor | None = None
    weight: float = 1.0
    prior: bool = False
    diptych: bool = False
    target: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, of the whole diptych."""
        return tuple(self.pixels.shape[-2:])

    @property
    def encoded_parts(self) -> list[Tensor]:
        """What the content key of the latents covers."""
        return [part for part in (self.pixels, self.mask, self.reference, self.touched) if part is not None]


def _model_pixels(image: Tensor) -> Tensor:
    """[H,W,3] in 0..1 to [3,H,W] in -1..1."""
    return (image.movedim(-1, 0) * 2 - 1).contiguous()


class Preprocessor:
    """Applies a configuration's sizing, layout, masks and prompt template to samples."""

    def __init__(self, config, default_template: str):
        self.config = config
        self.template = config.prompt_template or default_template
        if "{instruction}" not in self.template:
            raise ValueError(f"prompt_template is {self.template[:60]!r}: it must contain {{instruction}}")
        self.sizes = [(config.resolution, config.resolution)]
        if config.sizing == "buckets":
            self.sizes = buckets.bucket_sizes(config.resolution**2, multiple=config.bucket_step)
        self.squash = config.sizing == "squash"
        self.captioned = config.task == "multimodal"  # an image and what it shows: no edit, no hole
        self._bent: dict[str, float] = {}  # images whose aspect is far from that of their size, and how far

    def is_diptych(self, sample: Sample) -> bool:
        """Whether source and target go side by side. Raises ValueError if they should but there is no
        source."""
        if self.config.task != "fill" or self.config.layout == "inpaint":
            return False
        if sample.encoded is not None:
            return sample.encoded.diptych or self.config.layout == "diptych"
        if self.config.layout == "diptych" and sample.source is None:
            raise ValueError("layout is diptych but the row has no source image: use layout inpaint or auto")
        return sample.source is not None

    def variants(self, sample: Sample) -> int:
        """How many random masks the row gets: none is drawn where the mask is given or not used."""
        if self.captioned or self.is_diptych(sample) or self.config.task == "kontext":
            return 1
        return 1 if sample.mask is not None else self.config.mask_variants

    def prompt(self, sample: Sample) -> str:
        """The row's prompt, in the template if it is an instruction; or the caption, if that is asked."""
        if self.captioned:
            return sample.caption or sample.prompt
        edit = self.config.task == "kontext" or self.is_diptych(sample)
        return (
            self.template.replace("{instruction}", sample.prompt)
            if edit and not sample.literal
            else sample.prompt
        )

    def report(self) -> str:
        """What sizing did to images whose aspect it does not keep; "" if there was none."""
        if not self._bent:
            return ""
        name, factor = max(self._bent.items(), key=lambda item: item[1])
        if self.squash:
            return (
                f"{len(self._bent)} images were stretched by more than 5 % of their aspect, most of all "
                f"{name} (by {factor - 1:.0%}): sizing=buckets keeps it"
            )
        return (
            f"{len(self._bent)} images lost more than a tenth of a side by cropping, most of all {name} "
            f"({1 - 1 / factor:.0%}): crop them to what matters"
        )

    def _fitted(self, sample: Sample) -> Sample:
        """The sample at the size of nearest aspect. Raises BrokenSample if nothing of its mask is left."""
        frame = tuple(sample.target.shape[:2])
        size = self.sizes[buckets.nearest(*frame, self.sizes)]
        factor = distortion(frame, size)
        if factor > (STRETCHED if self.squash else CROPPED):
            self._bent[sample.name] = factor
        fitted = fit(sample, size, policy="stretch" if self.squash else "crop")
        if sample.mask is not None and bool(sample.mask.any()) and not bool(fitted.mask.any()):
            raise BrokenSample(
                sample.name, "its mask lies wholly in the borders that are cropped: use sizing=squash"
            )
        return fitted

    def __call__(self, sample: Sample, generator: Generator) -> Preprocessed:
        """`generator` draws the random mask of rows that have none. Raises BrokenSample."""
        finished = sample.source is not sample.target
        sample = self._fitted(sample)
        size = tuple(sample.target.shape[:2])
        pixels, mask, reference, touched = _model_pixels(sample.target), None, None, None
        if self.is_diptych(sample):
            repaint = sample.mask if sample.mask is not None and self.config.edit_masks else torch.ones(size)
            pixels = torch.cat([_model_pixels(sample.source), pixels], dim=-1)
            mask = torch.cat([torch.zeros(size), repaint], dim=-1)[None]
        elif self.config.task == "kontext":
            reference = _model_pixels(sample.source) if sample.source is not None else None
        elif not self.captioned:
            drawn = (
                masks.draw(self.config.mask_kinds, *size, generator=generator)
                if sample.mask is None
                else sample.mask
            )
            mask = drawn[None]
        if self.config.edit_loss_weight:
            panel = torch.zeros(size) if sample.mask is None else sample.mask
            touched = torch.nn.functional.pad(panel, (pixels.shape[-1] - size[1], 0))[None]
        return Preprocessed(
            pixels,
            self.prompt(sample),
            mask,
            reference,
            touched,
            sample.mask,
            sample.weight,
            sample.prior,
            self.is_diptych(sample),
            finished,
        )


class Corpus:
    """The rows of a configuration's data, preprocessed; for caching and for training without a cache."""

    def __init__(self, config, template: str, specs: list[str] | None = None, limit: int = 0):
        """specs: other sources than the configuration's (sample images), without class images. limit: only
        the first rows, 0 = all.

        Raises ValueError or FileNotFoundError for sources that cannot be opened.
        """
        self.config, self.limit = config, limit
        self.source = open_source(list(config.data if specs is None else specs), config.seed)
        if specs is None and config.prior is not None:
            prior = config.prior
            self.source = Mix([self.source, ClassImages(prior.folder, prior.prompt, prior.count)])
        self.preprocessor = Preprocessor(config, template)
        self.stamp = stamp(self.source.fingerprint, *self._options())

    def _options(self) -> list[object]:
        """What else a row's pixels, masks and prompt depend on; "entries 3": what an entry says."""
        c = self.config
        sizing = (
            c.task,
            c.layout,
            c.resolution,
            c.sizing,
            c.bucket_step,
            c.mask_kinds,
            c.mask_variants,
            c.seed,
        )
        more = ["touched"] if c.edit_loss_weight else []
        return [sizing, self.preprocessor.template, c.vae_sample, c.edit_masks, "entries 3", *more]

    def places(self) -> dict[int, int]:
        """Each index and the first one that is the same example (a mix repeats examples)."""
        first: dict[str, int] = {}
        count = min(self.limit or len(self.source), len(self.source))
        return {i: first.setdefault(self.source.name(i), i) for i in range(count)}

    def read(self, index: int) -> list[Preprocessed] | Sample:
        """All mask variants of a row, or the sample itself where it is precomputed. Raises BrokenSample."""
        return self.preprocess(self.source[index])

    def preprocess(self, sample: Sample) -> list[Preprocessed] | Sample:
        """The same of a sample that was read already."""
        if sample.encoded is not None:
            self._check_precomputed(sample)
            return sample
        seeds = [f"mask {sample.name} {variant}" for variant in range(self.preprocessor.variants(sample))]
        return [self.preprocessor(sample, row_generator(self.config.seed, 0, text)) for text in seeds]

    def _check_precomputed(self, sample: Sample) -> None:
        """Raise ValueError for what a row without images cannot do."""
        c = self.config
        if c.task != "fill":
            raise ValueError(f"{sample.name} is encoded for FLUX Fill, the task is {c.task}: set task=fill")
        if c.edit_loss_weight or c.text_lengths:
            raise ValueError(
                "edit_loss_weight and text_lengths need images and prompts, which precomputed data has "
                "not: leave them out"
            )
        if c.needs_targets and sample.encoded.latents is None:
            raise ValueError(
                f"{sample.name} has no latents_path, the target image that supervised training learns: "
                "train on it by reward (diptych grpo), or encode it again with diptych precompute --targets"
            )
