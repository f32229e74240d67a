"""Load a trained maze model as any user would, ask it about three mazes, and draw each with its answer and true path.

    python examples/answer_mazes.py outputs/quickstart [--num_latents 2]

Nothing of the repository's model code is imported: AutoModel and AutoProcessor run the code that was saved beside the
weights. The mazes come from the installed package, from the test split, which training never saw.
"""

import argparse
from pathlib import Path

import yaml
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoProcessor

from mmcoconut.data.arrow_mazes import cell_name, draw, draw_path, generate, question_of


MARGIN = 44
HOPS = (1, 3, 6)


def picture_of(maze, hops: int, answer: str) -> Image.Image:
    """The maze with its true path drawn in, and under it the model's answer beside the true one."""
    path = draw_path(maze, hops)
    gold = maze.color_at(maze.path(hops)[-1])
    picture = Image.new("RGB", (path.width, path.height + MARGIN), "white")
    picture.paste(path)
    text = f"{hops} hops: model says {answer!r}, true is {gold!r}"
    ImageDraw.Draw(picture).text((8, path.height + 8), text, fill="black", font_size=18)
    return picture


def maze_of(hops: int, options: dict):
    """The first test maze of so many hops, of the kind that the checkpoint was trained on."""
    kind = {name: value for name, value in options.items() if name not in ("num_rows", "min_hops", "max_hops")}
    return next(generate("test", num_rows=1, min_hops=hops, max_hops=hops, **kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num_latents", type=int, help="thoughts; default: as many as at the end of training")
    arguments = parser.parse_args()

    model = AutoModel.from_pretrained(arguments.checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(arguments.checkpoint, trust_remote_code=True)
    options = yaml.safe_load((arguments.checkpoint / "recipe.yaml").read_text())["dataset_options"]
    mazes = [maze_of(hops, options) for hops in HOPS]
    inputs = processor(
        images=[draw(maze) for maze, _ in mazes],
        text=[question_of(hops) for _, hops in mazes],
        num_latents=arguments.num_latents,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=8)
    answers = processor.decode_answers(tokens, inputs)
    for (maze, hops), answer in zip(mazes, answers):
        file = arguments.checkpoint / f"answer_{hops}_hops.png"
        picture_of(maze, hops, answer).save(file)
        draw(maze).save(arguments.checkpoint / f"maze_{hops}_hops.png")
        print(f"{hops} hops, path {' '.join(map(cell_name, maze.path(hops)))}: model says {answer!r} -> {file}")
    image = arguments.checkpoint / f"maze_{HOPS[1]}_hops.png"
    print(f'Ask it yourself: mmcoconut ask {arguments.checkpoint} --image {image} "{question_of(HOPS[1])}"')


if __name__ == "__main__":
    main()
