"""Plot the results of mmcoconut/audit/thoughts.py: attention over an image, probes and geometry.

Every plotting function returns a PIL image. Colours differ by brightness or are from Okabe and Ito's palette, so they
are safe for colour-blind readers.

Shapes: N thoughts, K targets, I images of a row, P features of an image, C channels, H height, W width in pixels.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mmcoconut.audit.thoughts import COLLAPSED_COSINE, load_extra
from mmcoconut.configuration_mmcoconut import PREFIX_PROJECTORS
from mmcoconut.data.image_grids import picture_grid


MIN_SIDE = 240  # pixels of a heat map's shorter side
MIN_NUMBER_CELL = 28  # pixels of the smallest cell with a number
# The picture is faded to white so far that dark heat is visible on any of its colours, by brightness alone.
FADE = 0.6
HEAT = np.array([60.0, 0.0, 110.0])  # indigo
OPACITY = 0.8  # of the hottest cell
GAP = 8  # pixels between heat maps, and around captions
FONT_SIZE = 15

DOTS_PER_INCH = 100  # figures are 8 inches, so 800 pixels, wide
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
BASELINES = ("shuffled labels", "majority class")


def why_no_map(projector_type: str, num_features: int) -> str | None:
    """Return why attention to an image's features cannot be drawn on it; None if it can."""
    if projector_type in PREFIX_PROJECTORS:
        return f"{projector_type} makes {num_features} features of the whole picture, which lie nowhere on it"
    if picture_grid(num_features) is None:
        return f"{num_features} image features make no square, so it is not known where on the picture they lie"
    return None


def grid_of(weights: torch.Tensor) -> np.ndarray:
    """Return weights (P,) as a grid (rows, columns), without the class token's.

    Raises:
        ValueError: features that make no square.
    """
    grid = picture_grid(len(weights))
    if grid is None:
        raise ValueError(
            f"{len(weights)} image features make no square, with or without a class token, so it is not known where "
            "they lie: leave the heat map out where picture_grid gives None."
        )
    rows, columns = grid
    return weights[len(weights) - rows * columns :].reshape(rows, columns).float().cpu().numpy()


def pixels_of(picture: torch.Tensor) -> np.ndarray:
    """Return normalised pixels (C, H, W) as (H, W, 3) in 0 … 255: the minimum becomes 0, the maximum 255.

    This inverts an image processor's normalisation up to brightness and a slight tint, without its parameters.
    """
    picture = picture.detach().float().cpu()
    low, high = picture.min(), picture.max()
    picture = 255 * (picture - low) / (high - low).clamp(min=1e-12)  # (C, H, W)
    return picture.expand(3, -1, -1).permute(1, 2, 0).numpy()


def enlarge(pixels: np.ndarray, min_side: int) -> np.ndarray:
    """Enlarge (H, W, 3) by the smallest integer that makes both sides at least `min_side`; nearest neighbour."""
    factor = -(-min_side // min(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def write_numbers(picture: Image.Image, grid: np.ndarray) -> None:
    """Write each cell's weight in percent into its centre, unless cells are too small to read."""
    height, width = picture.height / grid.shape[0], picture.width / grid.shape[1]
    if min(height, width) < MIN_NUMBER_CELL:
        return
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=FONT_SIZE)
    for (row, column), weight in np.ndenumerate(grid):
        middle = ((column + 0.5) * width, (row + 0.5) * height)
        style = {"fill": "black", "stroke_fill": "white", "stroke_width": 2}
        canvas.text(middle, f"{100 * weight:.0f}", font=font, anchor="mm", **style)


def heat_map(picture: torch.Tensor, weights: torch.Tensor, *, top: float | None = None) -> Image.Image:
    """Draw features' weights (P,) as translucent cells over the faded picture (C, H, W) as the model saw it.

    The number in a cell is its weight in percent, if it fits. `top` is the weight of the strongest colour, by default
    the maximum; use one value for maps to be compared. A class token has no location and is left out.

    Raises:
        ValueError: features that make no square, see `picture_grid`.
    """
    grid = grid_of(weights)  # (rows, columns)
    return blend(pixels_of(picture), grid, float(grid.max()) if top is None else top)


def blend(pixels: np.ndarray, grid: np.ndarray, top: float) -> Image.Image:
    """Blend a grid (rows, columns) of weights over faded pixels (H, W, 3) in 0 … 255, as in `heat_map`."""
    pixels = enlarge(pixels, MIN_SIDE)  # (H, W, 3)
    height, width = pixels.shape[:2]
    rows = np.arange(height) * grid.shape[0] // height  # (H,), the cell of each line
    columns = np.arange(width) * grid.shape[1] // width  # (W,)
    opacity = OPACITY * np.clip(grid / max(top, 1e-12), 0, 1)[rows][:, columns, None]  # (H, W, 1)
    faded = pixels + FADE * (255 - pixels)
    blended = Image.fromarray((faded * (1 - opacity) + HEAT * opacity).round().astype(np.uint8))
    write_numbers(blended, grid)
    return blended


def wrap(text: str, font, width: int) -> str:
    """Wrap text at spaces into lines of at most `width` pixels; a longer word gets a separate line."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def heat_maps(pixel_values: torch.Tensor, maps: torch.Tensor) -> list[Image.Image]:
    """Draw a row's N heat maps with one colour scale, over the first of several images.

    Args:
        pixel_values (I, C, H, W): the images of one row.
        maps (N, I · P): attention to their features in reading order, from `Readings.image_map`.

    Raises:
        ValueError: the features are no multiple of the images, or make no square.
    """
    if len(pixel_values) == 0 or maps.shape[1] % len(pixel_values):
        raise ValueError(
            f"{maps.shape[1]} image features for {len(pixel_values)} images: give the pixels of only this row's "
            "images, at least one."
        )
    maps = maps[:, : maps.shape[1] // len(pixel_values)]  # (N, P)
    top = max(float(grid_of(weights).max()) for weights in maps)
    return [heat_map(pixel_values[0], weights, top=top) for weights in maps]


def thought_strip(pixel_values: torch.Tensor, maps: torch.Tensor, captions: Sequence[str]) -> Image.Image:
    """Draw `heat_maps` side by side, with their N captions wrapped beneath.

    Raises:
        ValueError: the numbers of maps and captions differ or are 0; as in `heat_maps`.
    """
    if len(maps) != len(captions) or len(maps) == 0:
        raise ValueError(f"{len(maps)} maps for {len(captions)} captions: give one each, and at least one.")
    return side_by_side(heat_maps(pixel_values, maps), captions)


def side_by_side(panels: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Place panels of one size in a row on white, each with its caption beneath."""
    font = ImageFont.load_default(size=FONT_SIZE)
    width, height = panels[0].size
    captions = [wrap(caption, font, width) for caption in captions]
    measure = ImageDraw.Draw(panels[0])
    margin = max(measure.multiline_textbbox((0, 0), caption, font=font)[3] for caption in captions)
    strip = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height + math.ceil(margin) + 2 * GAP), "white")
    canvas = ImageDraw.Draw(strip)
    for number, (panel, caption) in enumerate(zip(panels, captions)):
        left = number * (width + GAP)
        strip.paste(panel, (left, 0))
        canvas.multiline_text((left, height + GAP), caption, fill="black", font=font)
    return strip


def stacked(panels: Sequence[Image.Image]) -> Image.Image:
    """Stack panels vertically on white."""
    height = sum(panel.height + GAP for panel in panels) - GAP
    stack, top = Image.new("RGB", (max(panel.width for panel in panels), height), "white"), 0
    for panel in panels:
        stack.paste(panel, (0, top))
        top += panel.height + GAP
    return stack


def new_figure(height: float):
    """Return a matplotlib figure 8 inches wide, without pyplot's global state."""
    figure = load_extra("matplotlib.figure").Figure(figsize=(8, height), dpi=DOTS_PER_INCH, layout="constrained")
    load_extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def rendered(figure) -> Image.Image:
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def cell_text(share: float | None, interval: Sequence[float] | None) -> str:
    """Return `"92"`, with the 95 % interval under it if there is one; a dash for a refused cell."""
    if share is None:
        return "–"
    bounds = f"\n{100 * interval[0]:.0f}–{100 * interval[1]:.0f}" if interval is not None else ""
    return f"{100 * share:.0f}{bounds}"


def probe_figure(result: dict) -> Image.Image:
    """Plot the held-out accuracy in percent of every thought × target of `linear_probe`, above two baselines.

    Small numbers are 95 % intervals; the shuffled baseline is the mean over thoughts. Refused targets are grey, with
    their reasons under the plot.
    """
    num_thoughts, names = len(result["accuracy"]), result["targets"]
    shuffled = [mean_of_known(column) for column in zip(*result["shuffled"])]
    shares = [*result["accuracy"], shuffled, result["majority"]]
    intervals = [*result["interval"], *[[None] * len(names)] * len(BASELINES)]
    refused = [f"{name}: {reason}" for name, reason in zip(names, result["reasons"]) if reason is not None]

    figure = new_figure(1.4 + 0.45 * len(shares) + 0.2 * len(refused))
    axes = figure.add_subplot(facecolor="lightgrey")
    values = np.array([[np.nan if share is None else share for share in row] for row in shares])
    colours = axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = cell_text(shares[row][column], intervals[row][column] if len(names) <= 10 else None)
        dark = value < 0.5  # False for nan, whose cell is light
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.axhline(num_thoughts - 0.5, color="white", linewidth=4)
    axes.set_xticks(range(len(names)), names, rotation=0 if len(names) <= 8 else 45)
    axes.set_yticks(range(len(shares)), [*(f"thought {number + 1}" for number in range(num_thoughts)), *BASELINES])
    axes.set_title("What a linear probe reads in each thought: held-out accuracy, %")
    axes.set_xlabel("\n".join(refused), loc="left", fontsize=9)
    figure.colorbar(colours, ax=axes)
    return rendered(figure)


def plot_by_thought(axes, title: str, values: Sequence[float], **style) -> None:
    """Plot one line over thought numbers, counted from 1."""
    axes.errorbar(range(1, len(values) + 1), values, color=BLUE, marker="o", capsize=3, **style)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("thought")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def geometry_figure(result: dict) -> Image.Image:
    """Plot the four measures of `geometry` over the thoughts: norm, both cosines, effective rank."""
    figure = new_figure(6)
    ((norm, across), (rank, to_next)) = figure.subplots(2, 2)
    plot_by_thought(norm, "Norm (mean ± std over rows)", result["norm_mean"], yerr=result["norm_std"])
    mean, std = result["embedding_norm_mean"], result["embedding_norm_std"]
    norm.axhline(mean, color=ORANGE, linestyle="--", label="token embeddings")
    norm.axhspan(mean - std, mean + std, color=ORANGE, alpha=0.2)
    norm.set_ylim(bottom=0)
    norm.legend(fontsize=9)

    plot_by_thought(across, "Cosine between rows, same thought", result["cosine_across_rows"])
    across.axhline(COLLAPSED_COSINE, color=GREY, linestyle=":", label=f"collapsed above {COLLAPSED_COSINE}")
    across.set_ylim(min(0.0, *result["cosine_across_rows"]) - 0.05, 1.05)
    across.legend(fontsize=9)

    plot_by_thought(rank, "Effective rank over rows", result["effective_rank"])
    rank.set_ylim(0, 1.15 * max(1.0, *result["effective_rank"]))
    plot_by_thought(to_next, "Cosine to the next thought", result["cosine_to_next"])
    to_next.set_ylim(-1.05, 1.05)
    return rendered(figure)
