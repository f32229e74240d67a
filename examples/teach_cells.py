"""Teach a vision tower and a projector to show a pretrained language model the cells of a maze as words.

    python examples/teach_cells.py weights/maze_tower weights/smollm2 weights/smollm2_mazes

Each cell is one patch of the picture. Its image token is trained towards the sum of the embeddings of the words for
the cell: its color, its arrow, its name and, if it is the start, ` marked`. The language model is not trained and does
not run, so this takes minutes on one core. It writes a checkpoint for `model:` of a recipe, and says how much of the
variance of these sums the image tokens explain on mazes that were not trained on.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil, set_seed

from mmcoconut.build import from_backbones, processor_from_backbones
from mmcoconut.build.gguf import load_tokenizer
from mmcoconut.data.arrow_mazes import Maze, cell_name, draw, generate
from mmcoconut.errors import UsageError, run_command
from mmcoconut.progress import progress


NUM_ROWS = {"train": 2400, "test": 200}
BATCH_SIZE = 64
LEARNING_RATE = 1e-3  # the highest of one cycle


def words_of(maze: Maze, index: int) -> list[str]:
    """Return the words for a cell, by its number row by row.

    >>> words_of(Maze(colors=("red",), arrows=("up",), start=(0, 0), grid_size=1), 0)
    [' red', ' up', 'A1', ' marked']
    """
    cell = divmod(index, maze.grid_size)
    words = [f" {maze.color_at(cell)}", f" {maze.arrow_at(cell)}", cell_name(cell)]
    return words + [" marked"] * (cell == maze.start)


def read_mazes(split: str, *, model, tokenizer, image_processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels (N, 3, side, side) and the sums of embeddings (N, cells, D) that their image tokens should be."""
    mazes = [maze for maze, _ in generate(split, num_rows=NUM_ROWS[split], seed=0)]
    pixels = image_processor(images=[draw(maze) for maze in mazes], return_tensors="pt").pixel_values
    embeddings = model.get_input_embeddings().weight.detach()
    sums = {}
    for maze in mazes:
        for index in range(maze.grid_size**2):
            words = "".join(words_of(maze, index))
            if words not in sums:
                sums[words] = embeddings[tokenizer(words, add_special_tokens=False).input_ids].sum(0)
    targets = [[sums["".join(words_of(maze, index))] for index in range(maze.grid_size**2)] for maze in mazes]
    return pixels, torch.stack([torch.stack(cells) for cells in targets])


def image_tokens(model, pixels: torch.Tensor) -> torch.Tensor:
    """Return the image tokens (N, cells, D) of pixels (N, 3, side, side)."""
    return torch.stack(model.get_image_features(pixel_values=pixels).pooler_output)


def unexplained(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the share of the targets' variance, both (N, cells, D), that tokens do not explain."""
    return (tokens - targets).pow(2).mean() / targets.var(dim=(0, 1)).mean()


def teach(model, pixels: torch.Tensor, targets: torch.Tensor, *, updates: int) -> None:
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    optimizer = torch.optim.AdamW([parameter for part in parts for parameter in part.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=updates)
    for _ in progress(range(updates), desc="teach", unit="updates"):
        rows = torch.randint(len(pixels), (BATCH_SIZE,))
        loss = unexplained(image_tokens(model, pixels[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vision", help="folder of a vision tower with a patch per cell, made by real_weights.py")
    parser.add_argument("text", help="folder or Hub id of a language model")
    parser.add_argument("folder", type=Path, help="made; must not exist yet")
    parser.add_argument("--updates", type=int, default=1000, help="of 64 mazes each")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if arguments.folder.exists():
        raise UsageError(f"{arguments.folder} exists already: delete it, or name another folder.")
    set_seed(0)
    tokenizer = load_tokenizer(arguments.text, None)
    tokenizer.chat_template = None
    model = from_backbones(arguments.vision, arguments.text, tokenizer=tokenizer, thought_norm="embedding")
    image_processor = CLIPImageProcessorPil.from_pretrained(arguments.vision)
    read = {"model": model, "tokenizer": tokenizer, "image_processor": image_processor}
    teach(model, *read_mazes("train", **read), updates=arguments.updates)
    with torch.no_grad():
        pixels, targets = read_mazes("test", **read)
        explained = 1 - unexplained(image_tokens(model, pixels), targets).item()
    processor = processor_from_backbones(
        arguments.vision,
        config=model.config,
        tokenizer=tokenizer,
        image_processor=image_processor,
        chat_template="plain",
        markers="start",
    )
    model.save_pretrained(arguments.folder)
    processor.save_pretrained(arguments.folder)
    print(f"explained variance on {len(pixels)} other mazes: {explained:.4f}; written to {arguments.folder}")


if __name__ == "__main__":
    run_command(main)
