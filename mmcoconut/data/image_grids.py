"""Locate the features of an image on the picture, for every way in which models cut pictures.

The model's own processor determines it: by the number of patches it returns, by the tokens between the placeholders
of an image, or by their number. If none of these suffices, a reason is returned in place of a map.

Shapes: N thoughts, I images of a row, P features of an image, R rows and C columns of a grid over a picture.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
from PIL import Image

from mmcoconut.configuration_mmcoconut import PREFIX_PROJECTORS
from mmcoconut.models import is_composed


# How a tile's position is written before its features (SmolVLM, Idefics 3, LFM2-VL).
PLACE_OF_TILE = re.compile(r"row_(\d+)_col_(\d+)")
# Shapes (width, height) of pictures with the same number of features as any other, if those form a square.
NARROW = ((64, 256), (256, 64))
# Modules of a tower that compute features of the whole picture.
MIXES_PLACES = re.compile("Perceiver|QFormer|Resampler")


@dataclass(frozen=True)
class View:
    """Features that lie in rows on a picture, or on a part of it, in reading order.

    first: index of the first feature among the P of the image. step: from the start of a row to the start of the next.
    top, left, height, width: of the part, as fractions of the picture's height and width; beyond 0 to 1 if padded.
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
    """Return weights (P,) as a grid (R, C) on the picture, as fine as the finest view; others are left out.

    Each feature's weight is distributed over the cells whose centre it covers.
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


def picture_grid(num_features: int) -> tuple[int, int] | None:
    """Return (rows, columns) of features in reading order if they form a square, also after a class token, else None.

    >>> picture_grid(9), picture_grid(50), picture_grid(12)
    ((3, 3), (7, 7), None)
    """
    for patches in (num_features, num_features - 1):
        side = math.isqrt(max(patches, 0))
        if side > 0 and side * side == patches:
            return side, side
    return None


def rows_and_columns(count: int, ratio: float) -> tuple[int, int]:
    """Return rows and columns of `count` cells whose columns / rows is nearest to a ratio."""
    pairs = [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]
    return min(pairs, key=lambda pair: abs(math.log(pair[1] / pair[0] / ratio)))


def tiles(first: int, layout: tuple[int, int], side: int, num_features: int, extent=(1.0, 1.0)) -> list[View]:
    """Return views of tiles of side × side features, the last of num_features each, in rows over an extent."""
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
    """Return the grid of a picture of patches (rows, columns), of which k × k at a time became a feature."""
    side = math.isqrt(rows * columns // num_features)
    rows, columns = rows // max(side, 1), columns // max(side, 1)
    if rows * columns != num_features:
        return f"{num_features} features do not fit the {rows} × {columns} patches of its processor"
    return [View(0, rows, columns, columns)]


def of_runs(runs: Sequence[int], before: Sequence[str], gaps: Sequence[tuple], ratio: float) -> list[View] | str:
    """Return the grid of features in several runs, given the text before each run and the ids between them.

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
                return f"a tile has {count} features, which do not form a square"
            row, column = place or (1, 1)
            rows, columns = layout if place else (1, 1)
            where = {"top": (row - 1) / rows, "left": (column - 1) / columns, "height": 1 / rows, "width": 1 / columns}
            views.append(View(start, side, side, side, **where))
        return views
    side = math.isqrt(runs[0])
    if {*runs} == {side * side} and "global" in before[-1].lower():  # after tiles that are only numbered (Aya Vision)
        layout = rows_and_columns(len(runs) - 1, ratio)
        return [*tiles(0, layout, side, runs[0]), *tiles(first[-1], (1, 1), side, runs[0])]
    if len({*runs}) == len({*gaps}) == 1 and len(gaps[0]) == 1:  # one token ends each row
        return [View(0, len(runs), runs[0], runs[0])]
    return f"its features are in {len(runs)} groups, and the tokens between them do not give their positions"


def runs_of(ids: Sequence[int], image_id: int) -> list[int]:
    """Return the number of placeholders in each run."""
    return [len([*group]) for is_image, group in groupby(ids, key=lambda token: token == image_id) if is_image]


def part_seen(image_processor, size: tuple[int, int]) -> dict:
    """Return the part of a picture (height, width) that a processor keeps, as fields of a View."""
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


def of_cross_attention(processor, tensors: Mapping, index: int, count: int, size: tuple[int, int]) -> list[View]:
    """Return the grid of tiles in cross-attention, on a canvas that the picture does not fill (mllama)."""
    mask, (height, width) = tensors["aspect_ratio_mask"][0, index], size
    per_tile, pixels = count // len(mask), processor.image_processor.size["height"]
    rows, columns = rows_and_columns(int(mask.sum()), width / height)
    room = [min(max(size[axis], pixels), (rows, columns)[axis] * pixels) for axis in (0, 1)]
    scale = min(room[0] / height, room[1] / width)
    extent = rows * pixels / (scale * height), columns * pixels / (scale * width)
    return tiles(0, (rows, columns), math.isqrt(per_tile), per_tile, extent)


def of_tiles(processor, num_tiles: int, size: tuple[int, int]) -> list[View] | str:
    """Return the grids of a picture (height, width) that a composed model's processor cuts into num_tiles tiles."""
    per_tile = processor.image_seq_length
    grid = picture_grid(per_tile)
    if grid is None:
        return f"{per_tile} image features do not form a square, so their positions on the picture are unknown"
    side, image_processor = grid[0], processor.image_processor
    if num_tiles == 1:
        return [View(per_tile - side * side, side, side, side, **part_seen(image_processor, size))]
    cut = num_tiles - processor.use_thumbnail
    views = tiles(0, rows_and_columns(cut, size[1] / size[0]), side, per_tile)
    return views + (tiles(cut * per_tile, (1, 1), side, per_tile) if processor.use_thumbnail else [])


@dataclass(frozen=True)
class FeatureLayout:
    """The layout of image features in a model; its processor adds the details per picture.

    image_token_id: of their placeholders. composed: True for a model of parts. nowhere: reason why features have no
    position on a picture, or None. newline_side: patches per side, for a tower whose rows end with a feature.
    """

    image_token_id: int
    composed: bool = True
    nowhere: str | None = None
    newline_side: int | None = None

    @classmethod
    def of(cls, model) -> "FeatureLayout":
        """Read the layout from a model, with or without adapters."""
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        composed, nowhere, side = is_composed(model.config), None, None
        mixing = [name for module in model.modules() if MIXES_PLACES.search(name := type(module).__name__)]
        if composed and model.config.projector_type in PREFIX_PROJECTORS:
            mixing = [model.config.projector_type]
        if mixing:
            nowhere = f"its {mixing[0]} computes features of the whole picture, which have no position on it"
        if not composed and getattr(model.base_model, "image_newline", None) is not None:
            tower = model.config.vision_config
            side = tower.image_size // tower.patch_size
        return cls(model.config.image_token_id, composed, nowhere, side)

    def views(self, processor, pictures: Sequence[Image.Image], counts: Sequence[int] | None = None) -> list:
        """Return per picture of a prompt the views of its features, or the reason why their positions are unknown.

        counts: number of features, if they have no placeholders.
        """
        if self.nowhere is not None:
            return [self.nowhere] * len(pictures)
        tensors, [handles] = processor.encode_images([list(pictures)], return_tensors="pt")
        return [
            of_tiles(processor, handle, (picture.height, picture.width))
            if self.composed
            else self._of_picture(processor, tensors, handle, index, picture, counts)
            for index, (picture, handle) in enumerate(zip(pictures, handles))
        ]

    def _of_picture(self, processor, tensors: Mapping, ids: Sequence[int], index: int, picture, counts) -> list | str:
        """Return the views of a picture in a vision-language model's own class, given its placeholder ids."""
        size = picture.height, picture.width
        groups = [(is_image, tuple(group)) for is_image, group in groupby(ids, key=lambda i: i == self.image_token_id)]
        runs = runs_of(ids, self.image_token_id)
        count = sum(runs)
        if "aspect_ratio_mask" in tensors:
            return of_cross_attention(processor, tensors, index, counts[index], size)
        if "image_grid_thw" in tensors:
            return of_patches(count, *tensors["image_grid_thw"][index, 1:].tolist())
        if "image_position_ids" in tensors:
            columns, rows = (tensors["image_position_ids"][index].amax(dim=0) + 1).tolist()
            return of_patches(count, rows, columns)
        if len(runs) > 1:
            numbers = [number for number, (is_image, _) in enumerate(groups) if is_image]
            before = [processor.tokenizer.decode(groups[number - 1][1]) if number else "" for number in numbers]
            gaps = [groups[number - 1][1] for number in numbers[1:]]
            return of_runs(runs, before, gaps, picture.width / picture.height)
        return self._of_one_run(processor, count, size)

    def _of_one_run(self, processor, count: int, size: tuple[int, int]) -> list[View] | str:
        """Return the grid of features without separators, for a picture (height, width).

        LLaVA-NeXT and similar models have features of the whole picture, then of its parts, joined without padding and
        with a feature at the end of each row.
        """
        image_processor, ratio = processor.image_processor, size[1] / size[0]
        if self.newline_side is not None:
            side = self.newline_side
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
            return f"{count} image features do not form a square, so their positions on the picture are unknown"
        _, [narrow] = processor.encode_images([[Image.new("RGB", shape) for shape in NARROW]], return_tensors="pt")
        if {runs_of(ids, self.image_token_id)[0] for ids in narrow} != {count}:
            return "the number of features changes with a picture's shape, and the number per row is unknown"
        rows, columns = grid
        return [View(count - rows * columns, rows, columns, columns, **part_seen(image_processor, size))]


def views_of(model, processor, pictures: Sequence[Image.Image], counts: Sequence[int] | None = None) -> list:
    """Return `FeatureLayout.views` of a model."""
    return FeatureLayout.of(model).views(processor, pictures, counts)


@lru_cache(maxsize=1024)
def views_of_sizes(layout: FeatureLayout, processor, sizes: tuple[tuple[int, int], ...]) -> list:
    """Return `FeatureLayout.views` for pictures of these (width, height), cached per list of sizes."""
    return layout.views(processor, [Image.new("RGB", size) for size in sizes])


def features_under(box: Sequence[float], views: Sequence[View], size: tuple[int, int]) -> np.ndarray:
    """Return the fraction of a box under each feature (P,), adding up to 1; all 0 if no feature sees the box.

    box: left, top, right, bottom in pixels of a picture of size (width, height).

    >>> grid = [View(0, 2, 2, 2)]
    >>> features_under((8, 0, 16, 4), grid, (16, 16)).tolist(), features_under((4, 6, 12, 14), grid, (16, 16)).tolist()
    ([0.0, 1.0, 0.0, 0.0], [0.125, 0.125, 0.375, 0.375])
    """
    left, right = (side / size[0] for side in box[::2])
    top, bottom = (side / size[1] for side in box[1::2])
    weights = np.zeros(max(view.first + (view.rows - 1) * view.step + view.columns for view in views))
    for view in views:
        down = overlaps(view.top + np.arange(view.rows + 1) / view.rows * view.height, top, bottom)  # (R,)
        across = overlaps(view.left + np.arange(view.columns + 1) / view.columns * view.width, left, right)  # (C,)
        numbers = view.first + np.arange(view.rows)[:, None] * view.step + np.arange(view.columns)  # (R, C)
        weights[numbers] += np.outer(down, across)
    return weights / max(weights.sum(), np.finfo(float).tiny)


def overlaps(edges: np.ndarray, start: float, end: float) -> np.ndarray:
    """Return the length of start … end between each edge and the next, (R,), for edges (R + 1,)."""
    return (np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)).clip(min=0)


def counts_of(model, processor, pictures: Sequence[Image.Image], num_features: int) -> list[int]:
    """Return the number of features per picture of a row: its placeholders, or an equal share."""
    _, [handles] = processor.encode_images([list(pictures)], return_tensors="pt")
    counts = [ids.count(model.config.image_token_id) for ids in handles]
    return counts if sum(counts) == num_features else [num_features // len(pictures)] * len(pictures)
