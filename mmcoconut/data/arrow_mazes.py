"""Pictures of coloured grids with an arrow in every cell: which colour is reached after following a few arrows?

The data set is generated, so it needs no download, and its steps are certain: each names one cell of the path,
from the marked start to the cell whose colour is asked for. The grid is a torus: an arrow that leaves at one edge
enters at the opposite one.
"""

import functools
import io
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont

from mmcoconut.data import SPLITS, Example, rows_of_split, split_of, to_dataset
from mmcoconut.errors import UsageError


# The first six, the default, are near the corners of the RGB cube; none is near the arrows' black or the mark's white.
PALETTE = {
    "red": (230, 20, 20),
    "green": (0, 170, 40),
    "blue": (30, 80, 255),
    "yellow": (255, 220, 0),
    "pink": (255, 40, 220),
    "cyan": (0, 215, 225),
    "orange": (255, 130, 0),
    "purple": (125, 0, 190),
}
DIRECTIONS = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}  # (rows, columns)

NUM_ROWS = {"train": 15_000, "validation": 500, "test": 500}
FRACTIONS = (0.8, 0.1, 0.1)  # of all possible grids, by hash; rows are drawn within a split's part

MAX_GRID_SIZE = 26  # columns are named by letters
MIN_CELL_SIZE = 8  # pixels; below, the four arrows are no longer distinct next to the mark
GREY = (128, 128, 128)  # of a cell off the path
PATH_SCALE = 8  # how many times larger `draw_path` shows the picture

Cell = tuple[int, int]  # (row, column), from 0 at the top left


def cell_name(cell: Cell) -> str:
    """Return `"B3"` for row 2, column 1: the column's letter and the row's number from 1."""
    row, column = cell
    return f"{chr(ord('A') + column)}{row + 1}"


@dataclass(frozen=True)
class Maze:
    """A grid of colours and arrows, both row by row by name, and the marked start cell."""

    colors: tuple[str, ...]
    arrows: tuple[str, ...]
    start: Cell
    grid_size: int

    def color_at(self, cell: Cell) -> str:
        return self.colors[cell[0] * self.grid_size + cell[1]]

    def arrow_at(self, cell: Cell) -> str:
        return self.arrows[cell[0] * self.grid_size + cell[1]]

    def path(self, hops: int) -> list[Cell]:
        """Return the cells visited while following `hops` arrows: the start, then one cell per hop."""
        cells = [self.start]
        for _ in range(hops):
            down, right = DIRECTIONS[self.arrow_at(cells[-1])]
            row = (cells[-1][0] + down) % self.grid_size
            column = (cells[-1][1] + right) % self.grid_size
            cells.append((row, column))
        return cells

    def layout(self) -> bytes:
        """Return the grid without its mark, as bytes: it determines the split, so that no grid is in two splits."""
        return " ".join((str(self.grid_size), *self.colors, *self.arrows)).encode()


def _mark_widths(cell_size: int) -> tuple[int, int, int]:
    """Return the pixels of the start mark's white ring, of the black ring inside it, and of the gap to the arrow."""
    return max(1, cell_size // 8), max(1, cell_size // 16), cell_size // 16


@functools.cache
def _arrow_mask(arrow: str, size: int) -> np.ndarray:
    """Return a mask (size, size) of the arrow: a triangle over a thin shaft, so one half of the square is darker."""
    y, x = np.indices((size, size))
    off_axis = np.abs(x - (size - 1) / 2)
    head = (y < size // 2) & (off_axis <= y + 0.5)
    shaft = (y >= size // 2) & (off_axis <= size / 8)
    return np.rot90(head | shaft, k=-list(DIRECTIONS).index(arrow))


@functools.lru_cache(maxsize=1024)
def _tile(color: str, arrow: str, *, marked: bool, cell_size: int) -> Image.Image:
    white, black, gap = _mark_widths(cell_size)
    ring = white + black
    margin = ring + gap
    pixels = np.full((cell_size, cell_size, 3), PALETTE[color], dtype=np.uint8)
    if marked:
        pixels[:] = 255
        pixels[white:-white, white:-white] = 0
        pixels[ring:-ring, ring:-ring] = PALETTE[color]
    pixels[margin:-margin, margin:-margin][_arrow_mask(arrow, cell_size - 2 * margin)] = 0
    return Image.fromarray(pixels)


def draw(maze: Maze, cell_size: int = 16) -> Image.Image:
    """Draw a maze, `grid_size * cell_size` pixels square; the start has a white and black frame."""
    if cell_size < MIN_CELL_SIZE:
        raise UsageError(f"cell_size is {cell_size} pixels and an arrow needs {MIN_CELL_SIZE}; raise cell_size")
    side = maze.grid_size * cell_size
    picture = Image.new("RGB", (side, side))
    for row in range(maze.grid_size):
        for column in range(maze.grid_size):
            cell = (row, column)
            tile = _tile(maze.color_at(cell), maze.arrow_at(cell), marked=cell == maze.start, cell_size=cell_size)
            picture.paste(tile, (column * cell_size, row * cell_size))
    return picture


def _draw_hop(canvas: ImageDraw.ImageDraw, maze: Maze, *, cells: tuple[Cell, Cell], side: int) -> None:
    """Draw a line from one cell to the next; a hop over the edge of the torus is drawn as two lines."""
    down, right = DIRECTIONS[maze.arrow_at(cells[0])]
    for (row, column), sign in zip(cells, (1, -1), strict=True):
        x, y = (column + 0.5) * side, (row + 0.5) * side
        line = (x, y, x + sign * right * side, y + sign * down * side)
        canvas.line(line, fill="black", width=side // 12)
        canvas.line(line, fill="white", width=side // 24)


def draw_path(maze: Maze, hops: int, cell_size: int = 16) -> Image.Image:
    """Draw the picture `PATH_SCALE` times larger, for reports: the path is a line, and each cell on it shows the
    numbers of the hops that reach it (0 is the start)."""
    side = cell_size * PATH_SCALE
    picture = draw(maze, cell_size)
    picture = picture.resize((picture.width * PATH_SCALE, picture.height * PATH_SCALE), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(picture)
    cells = maze.path(hops)
    for pair in zip(cells, cells[1:], strict=False):
        _draw_hop(canvas, maze, cells=pair, side=side)
    font = ImageFont.load_default(size=side // 4)
    for cell in set(cells):
        label = ",".join(str(hop) for hop, passed in enumerate(cells) if passed == cell)
        corner = ((cell[1] + 0.04) * side, (cell[0] + 0.04) * side)
        canvas.text(corner, label, fill="white", font=font, stroke_width=side // 32, stroke_fill="black")
    return picture


def draw_way(maze: Maze, hops: int, cell_size: int = 16) -> Image.Image:
    """Draw the picture of a maze with only the cells of the path, the others grey: a helper image."""
    picture = draw(maze, cell_size)
    way = set(maze.path(hops))
    for row in range(maze.grid_size):
        for column in range(maze.grid_size):
            if (row, column) not in way:
                picture.paste(GREY, box_of((row, column), cell_size))
    return picture


def box_of(cell: Cell, cell_size: int) -> tuple[int, int, int, int]:
    """Return a cell's left, top, right and bottom in pixels of the picture.

    >>> box_of((2, 1), 16)
    (16, 32, 32, 48)
    """
    row, column = cell
    return column * cell_size, row * cell_size, (column + 1) * cell_size, (row + 1) * cell_size


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)  # a third of the default's time, for these few pixels
    return buffer.getvalue()


def _check_shape(grid_size: int, num_colors: int, *, min_hops: int, max_hops: int) -> None:
    if not 1 <= grid_size <= MAX_GRID_SIZE:
        raise UsageError(f"grid_size is {grid_size}; choose 1 to {MAX_GRID_SIZE}, columns being named by letters")
    if not 2 <= num_colors <= len(PALETTE):
        raise UsageError(f"num_colors is {num_colors}; choose 2 to {len(PALETTE)}, the colors in PALETTE")
    if not 1 <= min_hops <= max_hops:
        raise UsageError(f"min_hops is {min_hops} and max_hops is {max_hops}; choose 1 <= min_hops <= max_hops")


def _too_small(num_rows: int, split: str, *, puzzles: int) -> UsageError:
    share = FRACTIONS[SPLITS.index(split)]
    return UsageError(
        f"num_rows is {num_rows} for split {split!r}, whose {share:.0%} of all {puzzles} puzzles is too few to draw "
        "that many different ones (half of them can be drawn); lower num_rows, or raise grid_size or num_colors"
    )


def _random_maze(rng: random.Random, grid_size: int, num_colors: int) -> Maze:
    # Only random() is promised to give the same numbers in every version of Python.
    cells = grid_size * grid_size
    colors, arrows = tuple(PALETTE), tuple(DIRECTIONS)
    return Maze(
        colors=tuple(colors[int(rng.random() * num_colors)] for _ in range(cells)),
        arrows=tuple(arrows[int(rng.random() * len(arrows))] for _ in range(cells)),
        start=divmod(int(rng.random() * cells), grid_size),
        grid_size=grid_size,
    )


def generate(
    split: str,
    *,
    num_rows: int | Mapping[str, int] = NUM_ROWS,
    seed: int = 0,
    grid_size: int = 3,
    num_colors: int = 6,
    min_hops: int = 1,
    max_hops: int = 3,
) -> Iterator[tuple[Maze, int]]:
    """Yield the puzzles of a split, `(maze, hops)`, in the order of `load`'s rows.

    Mazes are drawn at random and kept if the hash of their grid falls in this split's part, so two splits never
    share a grid, whatever their seeds; within a split no puzzle is repeated. More rows continue the same list.
    """
    num_rows = rows_of_split("arrow_mazes", num_rows, split)
    _check_shape(grid_size, num_colors, min_hops=min_hops, max_hops=max_hops)
    share = FRACTIONS[SPLITS.index(split)]
    puzzles = (num_colors * len(DIRECTIONS)) ** (grid_size**2) * grid_size**2 * (max_hops - min_hops + 1)
    if 2 * num_rows > share * puzzles:
        raise _too_small(num_rows, split, puzzles=puzzles)
    rng = random.Random(f"arrow_mazes {split} {seed}")
    seen = set()
    for _ in range(1000 + int(20 * num_rows / share)):  # enough, unless a tiny space left this split without grids
        maze = _random_maze(rng, grid_size, num_colors)
        hops = min_hops + int(rng.random() * (max_hops - min_hops + 1))
        if split_of(maze.layout(), FRACTIONS) != split or (maze, hops) in seen:
            continue
        seen.add((maze, hops))
        yield maze, hops
        if len(seen) == num_rows:
            return
    raise _too_small(num_rows, split, puzzles=puzzles)


def question_of(hops: int, start: str = "the marked cell") -> str:
    """Return the question about a maze whose path has `hops` arrows."""
    arrows = "arrow" if hops == 1 else "arrows"
    return f"Start at {start} and follow {hops} {arrows}. Which color do you stand on?"


def in_words(maze: Maze) -> str:
    """Return a maze as text, one line per cell: its name, the cell its arrow leads to, and its color.

    >>> print(in_words(Maze(colors=("red",), arrows=("up",), start=(0, 0), grid_size=1)))
    A1>A1 red
    """
    cells = [divmod(index, maze.grid_size) for index in range(maze.grid_size**2)]
    next_cells = [replace(maze, start=cell).path(1)[1] for cell in cells]
    lines = [
        f"{cell_name(cell)}>{cell_name(next_cell)} {maze.color_at(cell)}"
        for cell, next_cell in zip(cells, next_cells, strict=True)
    ]
    return "\n".join(lines)


def _text_example(maze: Maze, hops: int, *, row_id: str) -> Example:
    cells = maze.path(hops)
    return Example(
        images=[],
        question=f"{in_words(maze)}\n{question_of(hops, cell_name(maze.start))}",
        choices=[],
        steps=[cell_name(cell) for cell in cells],
        answers=[maze.color_at(cells[-1])],
        row_id=row_id,
    )


def _example(
    maze: Maze, hops: int, *, cell_size: int = 16, helper_image: bool = False, as_text: bool = False, row_id: str
) -> Example:
    if as_text:
        return _text_example(maze, hops, row_id=row_id)
    cells = maze.path(hops)
    helper = {"bytes": png_bytes(draw_way(maze, hops, cell_size)), "path": None} if helper_image else None
    return Example(
        images=[{"bytes": png_bytes(draw(maze, cell_size)), "path": None}],
        question=question_of(hops),
        choices=[],
        steps=[cell_name(cell) for cell in cells],
        answers=[maze.color_at(cells[-1])],
        row_id=row_id,
        boxes=[list(box_of(cell, cell_size)) for cell in cells],
        helper_image=helper,
    )


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Return the options for `num_rows` rows per split; no file is written, because the data set needs none."""
    return {"num_rows": num_rows, "seed": seed, "helper_image": True}


def load(
    *,
    split: str,
    num_rows: int | Mapping[str, int] = NUM_ROWS,
    seed: int = 0,
    grid_size: int = 3,
    num_colors: int = 6,
    min_hops: int = 1,
    max_hops: int = 3,
    cell_size: int = 16,
    helper_image: bool = False,
    as_text: bool = False,
) -> Dataset:
    """Load the rows of a split: one picture, an open question, hops + 1 steps (the visited cells), the colour's
    name; and the box of each step's cell.

    num_rows: for every split, or a mapping by split. min_hops, max_hops: range of the uniform number of arrows.
    cell_size: pixels of a cell's side. helper_image: add a picture of only the path's cells (`draw_way`).
    as_text: no picture; the maze is written before the question (`in_words`).
    """
    if as_text and helper_image:
        raise UsageError("helper_image is true and as_text is true, which draws no pictures. Remove one of them.")
    puzzles = generate(
        split,
        num_rows=num_rows,
        seed=seed,
        grid_size=grid_size,
        num_colors=num_colors,
        min_hops=min_hops,
        max_hops=max_hops,
    )
    return to_dataset(
        _example(
            maze,
            hops,
            cell_size=cell_size,
            helper_image=helper_image,
            as_text=as_text,
            row_id=f"arrow_mazes {split} row {index}",
        )
        for index, (maze, hops) in enumerate(puzzles)
    )
