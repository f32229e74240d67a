"""Draw how a trained model thinks its way through a maze: an animated GIF with one frame per thought.

    python examples/animate_maze.py outputs/quickstart docs/thinking.gif [--hops 5 --index 7]

On the left, the cells that the thoughts have been about so far, as the logit lens reads them; on the right, where the
last of these thoughts looks in the picture. The maze is from the test split, which training never saw, and the model
answers it here: nothing is drawn that it did not compute.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmcoconut.arguments.recipes import read_recipe
from mmcoconut.data import arrow_mazes
from mmcoconut.demo.one_question import Asker, row_of
from mmcoconut.evaluation.answering import load_checkpoint
from mmcoconut.records import RECIPE_FILE


SIDE, MARGIN, LINE = 288, 16, 26
STILL, LAST = 1100, 3500  # milliseconds of a frame, and of the last one


def maze_of(options: dict, hops: int, index: int):
    """Return a test maze with so many hops, of the kind that the checkpoint was trained on."""
    kind = {name: value for name, value in options.items() if name in ("seed", "grid_size", "num_colors")}
    mazes = arrow_mazes.generate("test", num_rows=index + 1, min_hops=hops, max_hops=hops, **kind)
    return next(islice(mazes, index, None))


def walked(maze, cells: list[str]) -> Image.Image:
    """Return the maze with these cells numbered in order; what is no cell's name is left out."""
    picture = arrow_mazes.draw(maze).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=20)
    names = {
        arrow_mazes.cell_name((row, column)): (row, column)
        for row in range(maze.grid_size)
        for column in range(maze.grid_size)
    }
    for name in dict.fromkeys(cell for cell in cells if cell in names):
        label = ",".join(str(number) for number, cell in enumerate(cells, start=1) if cell == name)
        left, top, _, _ = arrow_mazes.box_of(names[name], SIDE // maze.grid_size)
        canvas.text((left + 8, top + 4), label, fill="white", font=font, stroke_width=3, stroke_fill="black")
    return picture


def frame(maze, cells: list[str], looks: Image.Image, lines: list[str]) -> Image.Image:
    """Return one frame: what has been thought, where the last thought looks, and lines of text under them."""
    picture = Image.new("RGB", (2 * SIDE + 3 * MARGIN, SIDE + 2 * MARGIN + len(lines) * LINE), "white")
    picture.paste(walked(maze, cells), (MARGIN, MARGIN))
    picture.paste(looks.resize((SIDE, SIDE), Image.Resampling.NEAREST), (SIDE + 2 * MARGIN, MARGIN))
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    for number, line in enumerate(lines):
        canvas.text((MARGIN, SIDE + 1.4 * MARGIN + number * LINE), line, fill="black", font=font)
    return picture


def frames_of(maze, hops: int, asked, look) -> list[Image.Image]:
    """Return a frame for the question, one for each thought that is about a cell, and one for the answer."""
    plain = arrow_mazes.draw(maze)
    question = arrow_mazes.question_of(hops)
    cells, frames = [], [frame(maze, [], plain, [question, ""])]
    for number, thought in enumerate(look.thoughts, start=1):
        text, probability = thought.tokens[0]
        cells.append(text.strip())
        said = f"thought {number}: {cells[-1]} ({probability:.0%})"
        frames.append(frame(maze, cells, thought.heat_map or plain, [question, said]))
    gold = maze.color_at(maze.path(hops)[-1])
    verdict = "right" if asked.said == gold else f"wrong, it is {gold}"
    return [*frames, frame(maze, cells, plain, [question, f"wrote: {asked.output.strip()!r} ({verdict})"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("file", type=Path)
    parser.add_argument("--hops", type=int, default=5)
    parser.add_argument("--index", type=int, default=7, help="which of the test mazes with so many hops")
    arguments = parser.parse_args()
    model, processor = load_checkpoint(arguments.checkpoint)
    recipe = read_recipe(Path(arguments.checkpoint, RECIPE_FILE))
    asker = Asker(model, processor, max_new_tokens=recipe["max_new_tokens"])
    maze, _ = maze_of(recipe["dataset_options"], arguments.hops, arguments.index)
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder, "maze.png")
        arrow_mazes.draw(maze, recipe["dataset_options"].get("cell_size", 16)).save(drawn)
        asked = asker.ask(row_of(arrow_mazes.question_of(arguments.hops), str(drawn)), processor.num_latents)
        frames = frames_of(maze, arguments.hops, asked, asker.look(asked))
    durations = [2 * STILL, *[STILL] * (len(frames) - 2), LAST]
    frames = [picture.quantize(64) for picture in frames]
    frames[0].save(arguments.file, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    print(f"{asked.said!r}, {arguments.file}, {arguments.file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
