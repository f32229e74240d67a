"""Load ScienceQA as published: `problems.json`, `pid_splits.json` and `images/`, or the Hub's copy.

About half of the problems have no picture; they are text rows. A problem's lecture and its solution are its two steps,
either may be missing. Paper: https://arxiv.org/abs/2209.09513
"""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import SPLITS, Example, check_split
from mmcoconut.data.hub import from_published, read_published
from mmcoconut.data.json_steps import check_list, field_error, field_of
from mmcoconut.data.public import (
    FindImages,
    check_not_beside_path,
    check_source,
    choice_at,
    from_rows,
    image_under,
    no_images,
    optional_text,
    read_object,
    sample_puzzles,
    save_json,
    save_picture,
    sentences,
    text_of,
    texts_of,
    with_context,
)
from mmcoconut.errors import UsageError


FILES = {"train": "train", "validation": "val", "test": "test"}
STEP_FIELDS = ("lecture", "solution")


def _problems(folder: Path, split: str) -> Iterator[tuple[str, dict]]:
    """Yield the problems of a split, in the order of `pid_splits.json`, each with its name, and its id as `pid`."""
    file = folder / "problems.json"
    problems = read_object(file)
    ids = read_object(folder / "pid_splits.json")
    for pid in check_list(field_of(ids, FILES[split], "pid_splits.json"), FILES[split], "pid_splits.json"):
        if not isinstance(pid, str) or not isinstance(problems.get(pid), dict):
            remedy = f"{file} has no object of this name; take both files from one download"
            raise field_error("pid_splits.json", FILES[split], pid, remedy)
        yield f"{file.name} problem {pid}", {**problems[pid], "pid": pid}


def _image(row: Mapping[str, Any], row_id: str, *, image_root: str | os.PathLike, split: str) -> list[dict]:
    name = optional_text(row, "image", row_id)
    return image_under(image_root, f"{FILES[split]}/{row['pid']}/{name}", row_id) if name else []


def _examples(row: Mapping[str, Any], row_id: str, *, images: FindImages, split_sentences: bool) -> Iterator[Example]:
    choices = texts_of(row, "choices", row_id)
    steps = [text for field in STEP_FIELDS if (text := optional_text(row, field, row_id))]
    yield Example(
        images=images(row, row_id),
        question=with_context(text_of(row, "question", row_id), optional_text(row, "hint", row_id)),
        choices=choices,
        steps=[sentence for step in steps for sentence in sentences(step)] if split_sentences else steps,
        answers=[choice_at(row, "answer", choices, row_id)],
        row_id=row_id,
    )


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` arrow mazes per split as the published files; return the options for `load`."""
    folder = Path(folder)
    problems, ids = {}, {name: [] for name in FILES.values()}
    for split in SPLITS:
        for puzzle in sample_puzzles(split, num_rows=num_rows, seed=seed):
            pid = str(len(problems) + 1)
            save_picture(folder / "images" / FILES[split] / pid / "image.png", puzzle["picture"])
            ids[FILES[split]].append(pid)
            problems[pid] = _sample_problem(puzzle, FILES[split])
    save_json(folder / "problems.json", problems)
    save_json(folder / "pid_splits.json", ids)
    return {"folder": str(folder)}


def _sample_problem(puzzle: Mapping[str, Any], split: str) -> dict:
    lecture, solution = puzzle["steps"]
    return {
        "question": puzzle["question"],
        "choices": puzzle["choices"],
        "answer": puzzle["choices"].index(puzzle["answer"]),
        "hint": "",
        "image": "image.png",
        "lecture": lecture,
        "solution": solution,
        "split": split,
    }


def load(
    *,
    split: str,
    folder: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    path: str | os.PathLike | None = None,
    config: str | None = None,
    split_sentences: bool = False,
    images_required: bool = True,
) -> Dataset:
    """Load the rows of a split: one picture or none, the hint after the question, the choices, lecture and solution.

    folder: holds `problems.json` and `pid_splits.json`. image_root: holds `<split>/<problem>/image.png`; by default
        `images` in the folder.
    path: instead of these, a Hub id such as `derek-thomas/ScienceQA`, or a folder as `hub.read_published` reads it;
        config: for repositories with several, such as `ScienceQA-IMG` of `lmms-lab/ScienceQA`.
    split_sentences: make each sentence of lecture and solution a step.
    images_required: True requires the pictures that problems name; False reads none and gives only text rows.
    """
    check_split("scienceqa", split)
    check_source("scienceqa", folder=folder, path=path)
    check_not_beside_path("scienceqa", path, image_root=image_root)
    if config is not None and path is None:
        raise UsageError(f"scienceqa: the option config is {config!r}, and only path has several; remove it")
    examples = partial(_examples, images=no_images, split_sentences=split_sentences)
    if path is not None:
        images = "optional" if images_required else "none"
        dataset = read_published(path, split, config=config)
        return from_published(dataset, path, split, examples=examples, images=images)
    if images_required:
        image_root = Path(folder) / "images" if image_root is None else image_root
        examples = partial(examples, images=partial(_image, image_root=image_root, split=split))
    return from_rows(_problems(Path(folder), split), examples, source=folder)
