"""The shapes world: small images with exact ground truth, their edits, and a checker that reads them back.

Every edit pair comes with the instruction, the caption of the result and the mask of the quadrants it
touches, so that an editing model can be trained and scored on a CPU without any data set or judge model.

Not for natural images: nothing here generalises beyond this world.
"""

from .check import Report, check, check_many, edit_success, places_match, read
from .edits import OPERATIONS, Edit, EditPair, edit_pairs, random_edits
from .scenes import (
    COLOURS,
    KINDS,
    PLACES,
    SIZES,
    SPLITS,
    Scene,
    Shape,
    codes,
    place_masks,
    random_scene,
    render,
    render_codes,
    render_many,
    single_scenes,
)

__all__ = [
    "COLOURS",
    "KINDS",
    "OPERATIONS",
    "PLACES",
    "SIZES",
    "SPLITS",
    "Edit",
    "EditPair",
    "Report",
    "Scene",
    "Shape",
    "check",
    "check_many",
    "codes",
    "edit_pairs",
    "edit_success",
    "place_masks",
    "places_match",
    "random_edits",
    "random_scene",
    "read",
    "render",
    "render_codes",
    "render_many",
    "single_scenes",
]
