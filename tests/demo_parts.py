"""Tiny checkpoints and examples for the tests of the demo."""

from pathlib import Path

from tiny import tiny_processor

from mmcoconut.data import load_examples
from mmcoconut.demo.one_question import Asker, read_examples, write_examples


NUM_LATENTS = 3
NEW_TOKENS = 4


def tiny_examples(folder: Path, num_rows: int = 4) -> list[dict]:
    """Small mazes, written to a folder and read from it as the page does."""
    write_examples(folder, load_examples("arrow_mazes", split="test", num_rows=num_rows, cell_size=8))
    return read_examples(folder)


def asker_of(model, examples=(), **options) -> Asker:
    processor = tiny_processor(model, markers="start", num_latents=NUM_LATENTS)
    return Asker(model, processor, examples, max_new_tokens=NEW_TOKENS, **options)


def by_name(variants) -> dict:
    return {variant.name: variant for variant in [*variants.replaced, *variants.one_replaced, *variants.counted]}


def path_of(example: dict) -> str:
    """The file of an example's picture."""
    return example["images"][0]["path"]
