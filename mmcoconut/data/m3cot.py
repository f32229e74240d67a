"""Load M3CoT, multiple-choice questions with a long rationale: `<split>.jsonl` and `images/`, or the Hub's copy.

The rationale is one text; its sentences are the steps. The answer, a letter, becomes the text of its choice. Paper:
https://arxiv.org/abs/2405.16473
"""

import json
import os
import string
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import Example, check_split
from mmcoconut.data.hub import from_published, read_published
from mmcoconut.data.json_steps import read_rows
from mmcoconut.data.public import (
    FindImages,
    check_not_beside_path,
    check_source,
    choice_of_letter,
    from_rows,
    image_under,
    no_images,
    numbered,
    optional_text,
    sample_puzzles,
    save_picture,
    sentences,
    text_of,
    texts_of,
    with_context,
)


FILES = {"train": "train", "validation": "dev", "test": "test"}


def _image(row: Mapping[str, Any], row_id: str, *, image_root: str | os.PathLike) -> list[dict]:
    return image_under(image_root, f"{text_of(row, 'id', row_id)}.png", row_id)


def _examples(row: Mapping[str, Any], row_id: str, *, images: FindImages) -> Iterator[Example]:
    choices = texts_of(row, "choices", row_id)
    yield Example(
        images=images(row, row_id),
        question=with_context(text_of(row, "question", row_id), optional_text(row, "context", row_id)),
        choices=choices,
        steps=sentences(text_of(row, "rationale", row_id)),
        answers=[choice_of_letter(text_of(row, "answer", row_id), "answer", choices, row_id)],
        row_id=row_id,
    )


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` arrow mazes per split as JSON Lines with their pictures; return the options for `load`."""
    folder = Path(folder)
    for split, name in FILES.items():
        lines = []
        for index, puzzle in enumerate(sample_puzzles(split, num_rows=num_rows, seed=seed)):
            row = {"id": f"sample-{name}-{index}", "split": name, "context": "", "question": puzzle["question"]}
            row |= {"choices": puzzle["choices"], "rationale": " ".join(puzzle["steps"])}
            row["answer"] = string.ascii_uppercase[puzzle["choices"].index(puzzle["answer"])]
            save_picture(folder / "images" / f"{row['id']}.png", puzzle["picture"])
            lines.append(json.dumps(row))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"folder": str(folder)}


def load(
    *,
    split: str,
    folder: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    path: str | os.PathLike | None = None,
    images_required: bool = True,
) -> Dataset:
    """Load the rows of a split: one picture, the context after the question, the choices, the rationale's sentences.

    folder: holds `train.jsonl`, `dev.jsonl` and `test.jsonl`. image_root: holds `<id>.png`; by default `images` in
        the folder.
    path: instead of these, a Hub id such as `LightChen2333/M3CoT`, or a folder as `hub.read_published` reads it.
    images_required: False reads no pictures and gives every row an empty list.
    """
    check_split("m3cot", split)
    check_source("m3cot", folder=folder, path=path)
    check_not_beside_path("m3cot", path, image_root=image_root)
    if path is not None:
        examples, images = partial(_examples, images=no_images), "required" if images_required else "none"
        return from_published(read_published(path, split), path, split, examples=examples, images=images)
    image_root = Path(folder) / "images" if image_root is None else image_root
    images = partial(_image, image_root=image_root) if images_required else no_images
    file = Path(folder) / f"{FILES[split]}.jsonl"
    return from_rows(numbered(read_rows(file), file.name), partial(_examples, images=images), source=file)
