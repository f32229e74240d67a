"""Load PathVQA and VQA-RAD, medical questions published on the Hub as parquet with `image`, `question` and `answer`.

There are no steps. VQA-RAD has no validation split, and its train and test share pictures as published. Papers:
https://arxiv.org/abs/2003.10286 (PathVQA), https://www.nature.com/articles/sdata2018251 (VQA-RAD)
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

from mmcoconut.data import SPLITS, Example, check_split, split_of
from mmcoconut.data.hub import from_published, read_published, rows_name, save_published
from mmcoconut.data.json_steps import answer_text, field_error, field_of
from mmcoconut.data.public import sample_puzzles, text_of
from mmcoconut.errors import UsageError


def _examples(row: Mapping[str, Any], row_id: str) -> Iterator[Example]:
    yield Example(
        images=[],
        question=text_of(row, "question", row_id),
        choices=[],
        steps=[],
        answers=[answer_text(field_of(row, "answer", row_id), "answer", row_id)],
        row_id=row_id,
    )


def _part(dataset: Dataset, split: str, *, validation_fraction: float, name: str) -> set[int]:
    """Return the rows of the published train split that are in `split`, by the hash of their pictures' bytes."""
    if not 0 < validation_fraction < 1:
        raise UsageError(f"the option validation_fraction is {validation_fraction}; choose a number between 0 and 1")
    rows = set()
    for index, row in enumerate(dataset.select_columns(["image"])):
        if not row["image"] or row["image"]["bytes"] is None:
            remedy = "validation_fraction needs the picture's bytes in the column; write them, or leave the option out"
            raise field_error(f"{name} row {index}", "image", row["image"], remedy)
        if split_of(row["image"]["bytes"], (1 - validation_fraction, validation_fraction, 0)) == split:
            rows.add(index)
    return rows


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` arrow mazes per split as parquet files; return the options for `load`."""
    for split in SPLITS:
        puzzles = sample_puzzles(split, num_rows=num_rows, seed=seed)
        rows = [{"image": p["picture"], "question": p["question"], "answer": p["answer"]} for p in puzzles]
        save_published(folder, split, rows)
    return {"path": str(folder)}


def load(*, split: str, path: str | os.PathLike, validation_fraction: float | None = None) -> Dataset:
    """Load the rows of a split: one picture, an open question, one answer.

    path: a Hub id such as `flaviagiammarino/path-vqa` or `flaviagiammarino/vqa-rad`, or a folder as
        `hub.read_published` takes it.
    validation_fraction: use this part of the published train split's pictures as validation and the others as
        train, instead of a published validation split; use the same for every split, or pictures are shared.
    """
    check_split("this data set", split)
    if validation_fraction is None or split == "test":
        return from_published(read_published(path, split), path, split, examples=_examples)
    dataset = read_published(path, "train")
    rows = _part(dataset, split, validation_fraction=validation_fraction, name=rows_name(path, "train"))
    return from_published(dataset, path, "train", examples=_examples, rows=rows)
