"""Heat maps of each thought's attention, over the pictures of a row."""

from collections.abc import Mapping

import numpy as np

from mmcoconut.audit.thought_pictures import blend, heat_maps, stacked, why_no_map
from mmcoconut.audit.thoughts import Readings
from mmcoconut.data.image_grids import counts_of, on_picture, views_of
from mmcoconut.data.images import open_images
from mmcoconut.models import is_composed


LONGEST_SIDE = 480  # pixels of a picture under a map


def maps_of(model, processor, row: Mapping, inputs: Mapping, readings: Readings) -> tuple[list | None, str | None]:
    """Return each thought's heat map over the pictures of a row that was read alone, or the reason for none.

    For a composed model with several pictures only the first is drawn.

    row: of `mmcoconut.data`. inputs: of the model for this row.
    """
    if not row["images"]:
        return None, "the question has no picture"
    maps = readings.image_map(0)  # (N, I · P)
    if is_composed(model.config):
        pixels = inputs["pixel_values"]
        reason = why_no_map(model.config.projector_type, maps.shape[1] // len(pixels))
        return (None, reason) if reason is not None else (heat_maps(pixels, maps), None)
    pictures = open_images(row)
    counts = counts_of(model, processor, pictures, maps.shape[1])
    grids, start = [], 0
    for picture, count, views in zip(pictures, counts, views_of(model, processor, pictures, counts)):
        if isinstance(views, str):
            return None, views
        shown = picture.convert("RGB")
        shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        weights = maps[:, start : start + count].numpy()  # (N, P)
        grids.append((np.asarray(shown, dtype=float), [on_picture(each, views) for each in weights]))
        start += count
    top = max(grid.max() for _, of_thoughts in grids for grid in of_thoughts)
    thoughts = range(len(maps))
    return [stacked([blend(pixels, of_thoughts[j], top) for pixels, of_thoughts in grids]) for j in thoughts], None
