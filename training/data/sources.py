"""`open_source`: from a line of text to samples, whatever the layout on disk; and the weighted mix.

The layouts themselves: `hub.py` (HF datasets), `files.py` (folder of pairs, JSONL), `precomputed.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...models.geometry import check_whole
from ..runtime.fingerprints import stamp
from .sample import Sample

KINDS = ("pairs", "images", "jsonl", "captions", "magicbrush", "omniedit", "precomputed", "shapes")
_SPEC = re.compile(
    r"(?P<kind>\w+):(?P<where>.*?)(\?(?P<options>\w+=.*?))?(@(?P<weight>\d*\.?\d+))?", re.DOTALL
)


class Source(Protocol):
    """A map from 0..len-1 to samples; also a torch Dataset by shape."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises `sample.BrokenSample` when that example cannot be read."""

    def name(self, index: int) -> str:
        """What a person would call this example (a file name, a row number)."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data or the options that choose from it change; stable between runs."""


class Mix:
    """Several sources in fixed shares.

    An epoch is as long as it takes to see every example of every source at least once at those shares;
    examples of the other sources repeat. Index -> example is fixed, so that caches, shuffles and resumes
    need no knowledge of the mix.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None):
        """`weights` need not sum to 1; without them every source counts by its length."""
        lengths = np.array([len(source) for source in sources])
        shares = np.asarray(weights if weights is not None else lengths, dtype=float)
        if len(shares) != len(lengths) or (shares <= 0).any():
            raise ValueError(
                f"weights {list(shares)} for {len(lengths)} sources: give one positive weight per source"
            )
        shares = shares / shares.sum()
        total = (lengths / shares).max()
        self.counts = np.maximum(np.rint(total * shares).astype(int), lengths).tolist()
        self.sources, self._ends = list(sources), np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, index: int) -> tuple[Source, int]:
        """The source of an index and the example's index there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[which - 1]) if which else 0
        return self.sources[which], (index - start) % len(self.sources[which])

    def __getitem__(self, index: int) -> Sample:
        source, inner = self.where(index)
        return source[inner]

    def name(self, index: int) -> str:
        """As its source calls it."""
        source, inner = self.where(index)
        return source.name(inner)

    @property
    def fingerprint(self) -> str:
        """Of the shares and of every source."""
        return stamp(self.counts, *(source.fingerprint for source in self.sources))


class Shapes:
    """The synthetic world as a source: `n` edits of one split, drawn when asked for.

    With `task` "inpaint" a sample is a caption and its image, with "single" the same of one shape alone; with
    "edit" an instruction with source and target; with "base" what a Fill model knows before it learns
    instructions (`shapes.canvases`), with holes.
    """

    def __init__(self, n: int, split: str = "train", seed: int = 0, size: int = 64, task: str = "edit"):
        from ..tiny import shapes

        if task not in ("edit", "inpaint", "single", "base"):
            raise ValueError(f"shapes task is {task!r}: use 'edit', 'inpaint', 'single' or 'base'")
        check_whole("the count", n, 1, 1_000_000)  # of them are drawn at once, a kilobyte each
        check_whole("size", size, 16, 1024)
        if task == "single":
            self._edits = shapes.single_scenes(seed, split)[:n]
            if len(self._edits) < n:
                raise ValueError(f"the count is {n} of the {len(self._edits)} scenes of one shape in {split}")
        else:
            self._edits = list(shapes.random_edits(seed, n, split))
        self._render, self._masks = shapes.render, shapes.place_masks
        self._size, self._task, self._split, self._seed = size, task, split, seed
        self.fingerprint = stamp("shapes", n, split, seed, size, task)

    def __len__(self) -> int:
        return len(self._edits)

    def name(self, index: int) -> str:
        """The split and the number of the edit."""
        return f"shapes {self._split}[{index}]"

    def __getitem__(self, index: int) -> Sample:
        edit = self._edits[index]
        if self._task == "single":
            image, words = self._render(edit, self._size), edit.caption
            return Sample(words, target=image, caption=words, name=self.name(index))
        if self._task == "base":
            return self._base(index, edit)
        target = self._render(edit.target, self._size)
        common = {
            "target": target,
            "caption": edit.target.caption,
            "name": self.name(index),
            "task": edit.operation,
        }
        if self._task == "inpaint":
            return Sample(edit.target.caption, **common)
        mask = self._masks([edit.places], self._size)[0]
        return Sample(edit.instruction, source=self._render(edit.source, self._size), mask=mask, **common)

    def _base(self, index: int, edit: Any) -> Sample:
        from ..tiny.shapes.canvases import base_canvas

        canvas = base_canvas(f"{self._seed} {self.name(index)}", edit)
        return Sample(
            canvas.prompt,
            target=self._render(canvas.image, self._size),
            source=self._render(canvas.left, self._size) if canvas.left else None,
            mask=self._masks([canvas.holes], self._size)[0],
            caption=canvas.image.caption,
            name=self.name(index),
            literal=True,
        )


def split_spec(spec: str) -> tuple[str, str, float | None]:
    """A spec's kind, location with options, and weight (None where none is written). Raises ValueError."""
    match = _SPEC.fullmatch(spec)
    if not match or match["kind"] not in (*KINDS, "folder"):
        raise ValueError(f"data source {spec!r}: write KIND:LOCATION with KIND one of {', '.join(KINDS)}")
    where = match["where"] + ("?" + match["options"] if match["options"] else "")
    return match["kind"], where, float(match["weight"]) if match["weight"] else None


def open_source(spec: str | Source | Sequence, seed: int = 0) -> Source:
    """Open one source, or a mix when given a list.

    Args:
        spec: "KIND:LOCATION?option=value&option=value@WEIGHT", options and weight optional; or a Source; or
        a list.
            pairs:FOLDER                        name_source.png, name_target.png, name.txt (and name_mask.png)
            images:FOLDER?edit=true             name.png and name.txt (edit: the words are instructions)
            images:FOLDER?prompt=WORDS          images that share one prompt (where they have no name.txt)
            jsonl:FILE                          one {"prompt", "image", "mask"} per line, or a .csv table
            captions:ID_OR_PATH?image=image&text=text&split=train  images and what they show
            magicbrush:ID_OR_PATH?crop=false    columns source_img, target_img, instruction
            omniedit:ID_PATH_OR_GLOB?task=swap  columns src_img, edited_img, edited_prompt_list, task
            precomputed:FILE.json               Flux Fill embeddings and latents
            shapes:N?split=train&seed=0&size=64&task=edit  (or inpaint, single, base)
        seed: fixes what a source chooses (the wording among several), by content, not by position.

    Raises:
        ValueError: unknown kind or option, a missing column, an empty folder.
        FileNotFoundError: the location does not exist.
    """
    if not isinstance(spec, (str, Path)):
        if not isinstance(spec, Sequence):
            return spec
        if not spec:
            raise ValueError("no data source is given: set data to, for example, pairs:FOLDER")
        opened = [_open(part, seed) for part in spec]
        if len(opened) == 1:
            return opened[0][0]
        weights = [weight for _, weight in opened]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError(
                f"only some of the sources {list(spec)} have a weight: write @WEIGHT behind all or none"
            )
        return Mix([source for source, _ in opened], None if None in weights else weights)
    return _open(spec, seed)[0]


def _open(spec: str | Source, seed: int) -> tuple[Source, float | None]:
    if not isinstance(spec, (str, Path)):
        return spec, None
    kind, location, weight = split_spec(str(spec))
    where, _, listed = (
        location.partition("?") if _SPEC.fullmatch(str(spec))["options"] else (location, "", "")
    )
    options = dict(pair.partition("=")[::2] for pair in listed.split("&") if pair)
    try:
        source = _build(kind, where, options, seed)
    except TypeError as error:
        raise ValueError(
            f"data source {str(spec)!r} has an option that {kind} does not know ({error})"
        ) from None
    except ValueError as error:
        if kind != "shapes":
            raise
        raise ValueError(
            f"data source {str(spec)!r}: write shapes:COUNT, all numbers whole ({error})"
        ) from None
    if not len(source):
        raise ValueError(f"data source {str(spec)!r} holds no examples: check the location and the options")
    return source, weight


def _build(kind: str, where: str, options: dict[str, str], seed: int) -> Source:
    if kind == "shapes":
        numbers = {key: int(options.pop(key)) for key in ("seed", "size") if key in options}
        return Shapes(int(where), **numbers, **options)
    if kind == "captions":
        from .hub import Captions

        return Captions(where, seed=seed, **options)
    if kind == "magicbrush":
        from .hub import MagicBrush

        return MagicBrush(where, **options)
    if kind == "omniedit":
        from .hub import OmniEdit

        return OmniEdit(where, seed=seed, **options)
    if kind == "jsonl":
        from .files import JsonLines

        return JsonLines(where, **options)
    if kind == "precomputed":
        from .precomputed import Precomputed

        return Precomputed(where, **options)
    from .files import Images, Pairs

    return (Images if kind == "images" else Pairs)(where, **options)
