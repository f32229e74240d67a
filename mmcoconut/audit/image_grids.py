"""Where on a picture the features of its image lie, for each way in which a vision-language model cuts pictures.

A model's own processor says it: by the number of patches that it hands on, by what stands between the placeholders of
an image, or by their number alone. Where none of these tells, there is a reason in the place of a map.

Shapes: N thoughts, I images of a row, P features of an image, R rows and C columns of a grid over a picture.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from PIL import Image

from mmcoconut.audit.thought_pictures import blend, heat_maps, picture_grid, stacked, why_no_map
from mmcoconut.audit.thoughts import Readings
from mmcoconut.data.images import open_images
from mmcoconut.models import is_composed


LONGEST_SIDE = 480  # pixels of a picture under a map
# How a tile's place is written in front of its features (SmolVLM, Idefics 3, LFM2-VL).
PLACE_OF_TILE = re.compile(r"row_(\d+)_col_(\d+)")
# Shapes (width, height) of pictures that have as many features as any other, where these make a square.
NARROW = ((64, 256), (256, 64))
# Parts of a tower that make features of the whole picture.
MIXES_PLACES = re.compile("Perceiver|QFormer|Resampler")


@dataclass(frozen=True)
class View:
    """Features that lie in rows on a picture, or on a part of it, in reading order.

    first: the number of the first among the P of the image. step: from the start of a row to the next one's.
    top, left, height, width: of the part, in shares of the picture's height and width; beyond it where it was padded.
    """

    first: int
    rows: int
    columns: int
    step: int
    top: float = 0.0
    left: float = 0.0
    height: float = 1.0
    width: float = 1.0


def on_picture(weights: np.ndarray, views: Sequence[View]) -> np.ndarray:
    """Weights (P,) as a grid (R, C) over the picture, as fine as the finest view; what lies in no view is left out.

    Each feature's weight is shared out among the cells whose middle it covers.
    """
    rows = max(1, max(round(view.rows / view.height) for view in views))
    columns = max(1, max(round(view.columns / view.width) for view in views))
    grid = np.zeros((rows, columns))
    for view in views:
        row = np.floor(((np.arange(rows) + 0.5) / rows - view.top) / view.height * view.rows).astype(int)  # (R,)
        column = np.floor(((np.arange(columns) + 0.5) / columns - view.left) / view.width * view.columns).astype(int)
        cells = np.ix_((row >= 0) & (row < view.rows), (column >= 0) & (column < view.columns))
        numbers = view.first + (row * view.step)[cells[0]] + column[cells[1]]  # (r, c)
        covered = np.bincount(numbers.ravel(), minlength=len(weights)).clip(min=1)  # (P,)
        grid[cells] += (weights / covered)[numbers]
    return grid


def rows_and_columns(count: int, ratio: float) -> tuple[int, int]:
    """Rows and columns of so many cells whose columns / rows is nearest to a ratio."""
    pairs = [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]
    return min(pairs, key=lambda pair: abs(math.log(pair[1] / pair[0] / ratio)))


def tiles(first: int, layout: tuple[int, int], side: int, num_features: int, extent=(1.0, 1.0)) -> list[View]:
    """Views of tiles of side × side features, the last of num_features each, in rows over an extent of the picture."""
    rows, columns = layout
    size = {"height": extent[0] / rows, "width": extent[1] / columns}
    starts = [first + (number + 1) * num_features - side * side for number in range(rows * columns)]
    return [
        View(
            start,
            side,
            side,
            side,
            top=number // columns * size["height"],
            left=number % columns * size["width"],
            **size,
        )
        for number, start in enumerate(starts)
    ]


def of_patches(num_features: int, rows: int, columns: int) -> list[View] | str:
    """The grid of a picture of patches (rows, columns), of which k × k at a time became a feature."""
    side = math.isqrt(rows * columns // num_features)
    rows, columns = rows // max(side, 1), columns // max(side, 1)
    if rows * columns != num_features:
        return f"{num_features} features do not fit the {rows} × {columns} patches that its processor speaks of"
    return [View(0, rows, columns, columns)]


def of_runs(runs: Sequence[int], before: Sequence[str], gaps: Sequence[tuple], ratio: float) -> list[View] | str:
    """The grid of features in several runs, by the text before each and the ids between them.

    ratio: of the picture's width to its height.
    """
    first = [sum(runs[:number]) for number in range(len(runs))]
    places = [[int(n) for n in found[-1]] if (found := PLACE_OF_TILE.findall(text)) else None for text in before]
    if any(places):
        layout = [max(place[axis] for place in places if place) for axis in (0, 1)]
        views = []
        for start, count, place in zip(first, runs, places):
            side = math.isqrt(count)
            if side * side != count:
                return f"a tile has {count} features, which make no square"
            row, column = place or (1, 1)
            rows, columns = layout if place else (1, 1)
            where = {"top": (row - 1) / rows, "left": (column - 1) / columns, "height": 1 / rows, "width": 1 / columns}
            views.append(View(start, side, side, side, **where))
        return views
    side = math.isqrt(runs[0])
    if {*runs} == {side * side} and "global" in before[-1].lower():  # behind tiles that are only numbered (Aya Vision)
        layout = rows_and_columns(len(runs) - 1, ratio)
        return [*tiles(0, layout, side, runs[0]), *tiles(first[-1], (1, 1), side, runs[0])]
    if len({*runs}) == len({*gaps}) == 1 and len(gaps[0]) == 1:  # one token ends each row
        return [View(0, len(runs), runs[0], runs[0])]
    return f"its features stand in {len(runs)} groups, and what is between them does not say where these lie"


def runs_of(ids: Sequence[int], image_id: int) -> list[int]:
    """How many placeholders stand in each run of them."""
    return [len([*group]) for is_image, group in groupby(ids, key=lambda token: token == image_id) if is_image]


def part_seen(image_processor, size: tuple[int, int]) -> dict:
    """The part of a picture (height, width) that a processor keeps, as fields of a View."""
    height, width = size
    if getattr(image_processor, "background_color", None) is not None:  # it pads to a square
        side = max(height, width)
        seen = side / height, side / width
    elif getattr(image_processor, "do_center_crop", False) and (short := image_processor.size.get("shortest_edge")):
        crop, scale = image_processor.crop_size, short / min(height, width)
        seen = crop["height"] / (scale * height), crop["width"] / (scale * width)
    else:
        return {}
    return {"top": (1 - seen[0]) / 2, "left": (1 - seen[1]) / 2, "height": seen[0], "width": seen[1]}


def of_one_run(model, processor, count: int, size: tuple[int, int]) -> list[View] | str:
    """The grid of features that nothing divides, of a picture (height, width).

    LLaVA-NeXT and its kin have features of the whole picture, then of its parts, put together without their padding,
    with a feature at the end of each row.
    """
    image_processor, ratio = processor.image_processor, size[1] / size[0]
    if getattr(model.base_model, "image_newline", None) is not None:
        tower = model.config.vision_config
        side = tower.image_size // tower.patch_size
        whole = View(0, side, side, side)
        if count <= side * side + 1:
            return [whole]
        rows, step = rows_and_columns(count - side * side, ratio)
        return [whole, View(side * side, rows, step - 1, step)]
    per_tile = getattr(processor, "image_seq_length", None)
    if per_tile and count > per_tile:
        side, num_tiles = math.isqrt(per_tile), count // per_tile - 1  # the last is the whole picture
        layout = rows_and_columns(num_tiles, ratio)
        return [*tiles(0, layout, side, per_tile), *tiles(num_tiles * per_tile, (1, 1), side, per_tile)]
    grid = picture_grid(count)
    if grid is None:
        return f"{count} image features make no square, so it is not known where on the picture they lie"
    _, [narrow] = processor.encode_images([[Image.new("RGB", shape) for shape in NARROW]], return_tensors="pt")
    if {runs_of(ids, model.config.image_token_id)[0] for ids in narrow} != {count}:
        return "the number of features changes with a picture's shape, and nothing says how many are in a row"
    rows, columns = grid
    return [View(count - rows * columns, rows, columns, columns, **part_seen(image_processor, size))]


def of_cross_attention(processor, tensors: Mapping, index: int, count: int, size: tuple[int, int]) -> list[View]:
    """The grid of tiles that are looked at beside the text, on a canvas that the picture does not fill (mllama)."""
    mask, (height, width) = tensors["aspect_ratio_mask"][0, index], size
    per_tile, pixels = count // len(mask), processor.image_processor.size["height"]
    rows, columns = rows_and_columns(int(mask.sum()), width / height)
    room = [min(max(size[axis], pixels), (rows, columns)[axis] * pixels) for axis in (0, 1)]
    scale = min(room[0] / height, room[1] / width)
    extent = rows * pixels / (scale * height), columns * pixels / (scale * width)
    return tiles(0, (rows, columns), math.isqrt(per_tile), per_tile, extent)


def views_of(model, processor, pictures: Sequence[Image.Image], counts: Sequence[int] | None = None) -> list:
    """For each picture of a prompt the views of its features, or the reason why it is not known where these lie.

    model, processor: a vision-language model in its own class. counts: of features, where they are no placeholders.
    """
    mixing = [name for module in model.modules() if MIXES_PLACES.search(name := type(module).__name__)]
    if mixing:
        return [f"its {mixing[0]} makes features of the whole picture, which lie nowhere on it"] * len(pictures)
    tensors, [handles] = processor.encode_images([list(pictures)], return_tensors="pt")
    image_id, found = model.config.image_token_id, []
    for index, (picture, ids) in enumerate(zip(pictures, handles)):
        size = picture.height, picture.width
        groups = [(is_image, tuple(group)) for is_image, group in groupby(ids, key=lambda token: token == image_id)]
        runs = runs_of(ids, image_id)
        count = sum(runs)
        if "aspect_ratio_mask" in tensors:
            found.append(of_cross_attention(processor, tensors, index, counts[index], size))
        elif "image_grid_thw" in tensors:
            found.append(of_patches(count, *tensors["image_grid_thw"][index, 1:].tolist()))
        elif "image_position_ids" in tensors:
            columns, rows = (tensors["image_position_ids"][index].amax(dim=0) + 1).tolist()
            found.append(of_patches(count, rows, columns))
        elif len(runs) > 1:
            numbers = [number for number, (is_image, _) in enumerate(groups) if is_image]
            before = [processor.tokenizer.decode(groups[number - 1][1]) if number else "" for number in numbers]
            gaps = [groups[number - 1][1] for number in numbers[1:]]
            found.append(of_runs(runs, before, gaps, picture.width / picture.height))
        else:
            found.append(of_one_run(model, processor, count, size))
    return found


def counts_of(model, processor, pictures: Sequence[Image.Image], num_features: int) -> list[int]:
    """How many of a row's features each of its pictures has: its placeholders, or as many as every other."""
    _, [handles] = processor.encode_images([list(pictures)], return_tensors="pt")
    counts = [ids.count(model.config.image_token_id) for ids in handles]
    return counts if sum(counts) == num_features else [num_features // len(pictures)] * len(pictures)


def maps_of(model, processor, row: Mapping, inputs: Mapping, readings: Readings) -> tuple[list | None, str | None]:
    """A heat map of each thought of a row that was read alone, over its pictures; or why there are none.

    Of a composed model with several pictures the first is drawn.

    row: of `mmcoconut.data`. inputs: what was read.
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
