"""Load PuzzleVQA: abstract visual puzzles in JSON Lines, one file per kind, with their pictures.

The files have no splits. A row is in train, validation or test by the hash of its picture's bytes, so
puzzles that share a picture (the data has some, with other options) are always in the same split. Paper:
https://arxiv.org/abs/2403.13315
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import SPLITS, Example, arrow_mazes, check_fractions, nearest, split_of, to_dataset
from mmcoconut.data.arrow_mazes import PALETTE, cell_name
from mmcoconut.data.json_steps import (
    answer_text,
    check_among,
    check_list,
    check_text,
    existing_image,
    field_error,
    field_of,
    read_rows,
)
from mmcoconut.errors import UsageError


FRACTIONS = (0.8, 0.1, 0.1)  # train, validation, test
STEP_FIELDS = ("caption", "explanation", "deduction")


def _files(folder: Path, kinds: Sequence[str] | None) -> list[Path]:
    found = {path.stem: path for path in sorted(folder.glob("*.json"))}
    if not found:
        raise UsageError(f"{folder}: no *.json file in it; give the folder with one file per kind")
    if kinds is None:
        return list(found.values())
    if isinstance(kinds, str) or not kinds:
        raise UsageError(f"the option kinds is {kinds!r}; write a list of kinds, or leave it out for all")
    for kind in kinds:
        if kind not in found:
            raise UsageError(f"{folder}: no kind {kind!r}; {nearest(kind, found)}")
    return [found[kind] for kind in dict.fromkeys(kinds)]


def _check_split(split: str, fractions: Sequence[float]) -> None:
    if split not in SPLITS:
        raise UsageError(f"puzzlevqa has no split {split!r}; {nearest(split, SPLITS)}")
    check_fractions(fractions)


def _example(row: Mapping[str, Any], image: dict, row_id: str) -> Example:
    options = check_list(field_of(row, "options", row_id), "options", row_id)
    if not options:
        raise field_error(row_id, "options", options, "write the options of the puzzle")
    choices = [answer_text(option, "options", row_id) for option in options]
    answer = answer_text(field_of(row, "answer", row_id), "answer", row_id)
    check_among(answer, choices, choices_field="options", row_id=row_id)
    return Example(
        images=[image],
        question=check_text(field_of(row, "question", row_id), "question", row_id),
        choices=choices,
        steps=[check_text(field_of(row, field, row_id), field, row_id) for field in STEP_FIELDS],
        answers=[answer],
        row_id=row_id,
    )


def _examples(file: Path, split: str, *, fractions: Sequence[float]) -> Iterator[Example]:
    """Yield the file's rows in `split`; every row is checked, so an invalid one stops each split alike."""
    for index, row in enumerate(read_rows(file)):
        row_id = f"{file.name} row {index}"
        image = existing_image(file.parent, field_of(row, "image", row_id), row_id)
        example = _example(row, image, row_id)
        if split_of(Path(image["path"]).read_bytes(), fractions) == split:
            yield example


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write arrow mazes as puzzles of the kind `arrow_maze` until every split has `num_rows`; return the options."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    counts, lines = dict.fromkeys(SPLITS, 0), []
    for maze, hops in arrow_mazes.generate("train", num_rows=1000 * num_rows, seed=seed, max_hops=1):
        picture = arrow_mazes.png_bytes(arrow_mazes.draw(maze))
        split = split_of(picture, FRACTIONS)
        if counts[split] == num_rows:
            continue
        counts[split] += 1
        name = f"images/arrow_maze_{len(lines):04d}.png"
        (folder / name).write_bytes(picture)
        lines.append(json.dumps({"image": name, **_sample_puzzle(maze, hops)}))
        if min(counts.values()) == num_rows:
            break
    (folder / "arrow_maze.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"folder": str(folder)}


def _sample_puzzle(maze: Any, hops: int) -> dict:
    start, *_, end = maze.path(hops)
    answer = maze.color_at(end)
    return {
        "question": "What is the color of the cell that the arrow in the marked cell leads to?",
        "options": sorted({answer, *[color for color in PALETTE if color != answer][:3]}),
        "answer": answer,
        "caption": f"The marked cell is {cell_name(start)}.",
        "explanation": f"Its arrow points {maze.arrow_at(start)}, which leads to {cell_name(end)}.",
        "deduction": f"The color of {cell_name(end)} is {answer}.",
    }


def load(
    *,
    split: str,
    folder: str | os.PathLike,
    kinds: Sequence[str] | None = None,
    fractions: Sequence[float] = FRACTIONS,
) -> Dataset:
    """Load the rows of a split: one picture, the options as choices, three steps (caption, explanation, deduction).

    folder: holds `<kind>.json` and their pictures.
    kinds: names of files without `.json`; all by default.
    fractions: parts of train, validation and test; use the same for every split, or pictures are shared.
    """
    _check_split(split, fractions)
    files = _files(Path(folder), kinds)
    examples = [example for file in files for example in _examples(file, split, fractions=fractions)]
    if not examples:
        raise UsageError(
            f"{folder}: split {split!r} gets none of the rows at fractions {list(fractions)}; raise its fraction, or "
            "add kinds"
        )
    return to_dataset(examples)
