"""Load Flickr30k: five captions per picture, from `results.csv`, Karpathy's `dataset_flickr30k.json`, a JSON object
`{"image.jpg": ["caption", ...]}`, the Hub, or the output of `python -m mmcoconut.prepare_flickr30k`.

A picture is in one split with all its captions: the split given by the source, else by the hash of its file
name. There are no questions and no steps. Paper: https://aclanthology.org/Q14-1006
"""

import csv
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import SPLITS, Example, check_fractions, check_split, split_of
from mmcoconut.data.hub import from_published, published_splits, read_published
from mmcoconut.data.json_steps import field_error, read_text
from mmcoconut.data.public import (
    FindImages,
    check_not_beside_path,
    check_source,
    from_rows,
    image_under,
    no_images,
    objects_in,
    read_object,
    sample_puzzles,
    save_picture,
    text_of,
    texts_of,
)


FRACTIONS = (0.94, 0.03, 0.03)  # about Karpathy's 29,000, 1,014 and 1,000 pictures
GIVEN_SPLITS = {"train": "train", "restval": "train", "val": "validation", "validation": "validation", "test": "test"}
QUESTION = "Describe the image."

# One line of the published file, 2199200615.jpg's last, lacks the second bar; so it may be left out.
BARS = re.compile(r"(?P<filename>[^|]+)\|\s*\d+\s*\|?\s*(?P<caption>.*)")
NAME_COLUMNS, CAPTION_COLUMNS = ("image", "image_name", "filename"), ("caption", "comment", "raw")


def _bar_lines(text: str, file: Path) -> Iterator[tuple[str, dict]]:
    """Parse `file name| number| caption`, which is not CSV, because captions hold quotes."""
    for index, line in enumerate(text.strip().split("\n")[1:]):
        row_id, found = f"{file.name} row {index}", BARS.fullmatch(line.strip())
        if found is None:
            raise field_error(row_id, "comment", line, "write `file name| number| caption`")
        yield row_id, {"filename": found["filename"], "captions": [found["caption"]]}


def _captions(cell: Any, row_id: str) -> list:
    """Parse the column `raw`, which holds the captions of a picture as one JSON list."""
    try:
        return json.loads(cell)
    except (json.JSONDecodeError, TypeError) as error:
        raise field_error(row_id, "raw", cell, 'write a JSON list of captions, ["...", "..."]') from error


def _comma_lines(text: str, file: Path) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames
    names = [next((c for c in known if c in columns), None) for known in (NAME_COLUMNS, CAPTION_COLUMNS)]
    if None in names:
        known = f"one of {', '.join(NAME_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}"
        raise ValueError(f"{file}: found the columns {columns}; there must be {known}")
    for index, row in enumerate(reader):
        row_id = f"{file.name} row {index}"
        if None in row:
            raise field_error(row_id, names[1], row, 'more cells than columns; write captions with commas in "quotes"')
        cell = row[names[1]]
        captions = _captions(cell, row_id) if names[1] == "raw" else [cell]
        yield row_id, {"filename": row[names[0]], "captions": captions, "split": row.get("split")}


def _table(file: Path) -> Iterator[tuple[str, dict]]:
    """Read a table as one row per picture, named and ordered by its first line."""
    text = read_text(file)
    lines = _bar_lines(text, file) if "|" in text.split("\n", 1)[0] else _comma_lines(text, file)
    pictures = {}
    for row_id, row in _one_split_each(lines):
        captions = texts_of(row, "captions", row_id)
        pictures.setdefault(row["filename"], (row_id, {**row, "captions": []}))[1]["captions"] += captions
    yield from pictures.values()


def _karpathy(content: Mapping[str, Any], file: Path) -> Iterator[tuple[str, dict]]:
    for index, row in enumerate(objects_in(content, "images", file.name)):
        row_id = f"{file.name} row {index}"
        captions = [text_of(sentence, "raw", row_id) for sentence in objects_in(row, "sentences", row_id)]
        yield row_id, {**row, "split": text_of(row, "split", row_id), "captions": captions}


def _json(file: Path) -> Iterator[tuple[str, dict]]:
    """Read Karpathy's file, recognized by its list `images`, or a mapping from file names to captions."""
    content = read_object(file)
    if "images" in content:
        yield from _karpathy(content, file)
        return
    for index, (name, captions) in enumerate(content.items()):
        row_id = f"{file.name} row {index}"
        texts_of(content, name, row_id)
        yield row_id, {"filename": name, "captions": captions}


def _one_split_each(named: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, dict]]:
    splits = {}
    for row_id, row in named:
        name, split = text_of(row, "filename", row_id), row.get("split")
        if splits.setdefault(name, split) != split:
            remedy = f"{name} is in {splits[name]!r} before; give each picture one split"
            raise field_error(row_id, "split", split, remedy)
        yield row_id, row


def captions_of(file: Path) -> Iterator[tuple[str, dict]]:
    """Read the pictures of a file of captions: a name for errors, and `filename`, `captions`, and `split` if the file
    has one."""
    return _one_split_each(_json(file)) if file.suffix == ".json" else _table(file)


def split_of_picture(row: Mapping[str, Any], row_id: str, fractions: Sequence[float]) -> str:
    """Return the split that the source gives a picture, else that of its file name's hash."""
    given = row.get("split")
    if given is None:
        return split_of(text_of(row, "filename", row_id).encode(), fractions)
    if given not in GIVEN_SPLITS:
        raise field_error(row_id, "split", given, f"write one of {', '.join(GIVEN_SPLITS)}")
    return GIVEN_SPLITS[given]


def _in_split(row: Mapping[str, Any], row_id: str, *, split: str, fractions: Sequence[float]) -> bool:
    return split_of_picture(row, row_id, fractions) == split


def _image(row: Mapping[str, Any], row_id: str, *, image_root: str | os.PathLike | None) -> list[dict]:
    return image_under(image_root, text_of(row, "filename", row_id), row_id)


def _examples(
    row: Mapping[str, Any],
    row_id: str,
    *,
    images: FindImages,
    in_split: Callable[[Mapping[str, Any], str], bool],
    question: str,
    row_per_caption: bool,
) -> Iterator[Example]:
    captions = [caption.strip() for caption in texts_of(row, "captions" if "captions" in row else "caption", row_id)]
    found = images(row, row_id)
    if not in_split(row, row_id):
        return
    for index, caption in enumerate(captions if row_per_caption else captions[:1]):
        answers = [caption, *captions[:index], *captions[index + 1 :]]
        name = f"{row_id} caption {index}" if row_per_caption else row_id
        yield Example(images=found, question=question, choices=[], steps=[], answers=answers, row_id=name)


def _published(path: str | os.PathLike, split: str, *, examples: Callable, fractions: Sequence[float]) -> Dataset:
    """Load a repository of one split, which holds all pictures; divide them like those of a table."""
    names = published_splits(path)
    divided = len(names) > 1
    in_split = (lambda row, row_id: True) if divided else partial(_in_split, split=split, fractions=fractions)
    name = split if divided else names[0]
    examples = partial(examples, images=no_images, in_split=in_split)
    return from_published(read_published(path, name), path, name, examples=examples)


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` arrow mazes per split into one `results.csv`, two captions each; return the options."""
    folder, lines = Path(folder), ["image_name| comment_number| comment"]
    for split in SPLITS:
        names = (f"{number}.jpg" for number in itertools.count(1))
        names = (name for name in names if split_of(name.encode(), FRACTIONS) == split)
        for name, puzzle in zip(names, sample_puzzles(split, num_rows=num_rows, seed=seed), strict=False):
            save_picture(folder / "images" / name, puzzle["picture"])
            lines += [f"{name}| {number}| {step}" for number, step in enumerate(puzzle["steps"])]
    (folder / "results.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"file": str(folder / "results.csv"), "image_root": str(folder / "images")}


def load(
    *,
    split: str,
    file: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    path: str | os.PathLike | None = None,
    fractions: Sequence[float] = FRACTIONS,
    question: str = QUESTION,
    row_per_caption: bool | Mapping[str, bool] = False,
) -> Dataset:
    """Load the rows of a split: one picture and its captions as accepted answers.

    file: `results.csv` with bars, a table with commas and a header (`image,caption`, or `filename,raw,split`),
        Karpathy's JSON, or `{"image.jpg": ["caption", ...]}` in a .json; one file for all splits. image_root: holds
        the pictures that it names.
    path: instead of them, a Hub id such as `lmms-lab/flickr30k`, or a folder as `hub.read_published` takes it, such
        as `mmcoconut.prepare_flickr30k` writes it.
    fractions: parts of train, validation and test if the source has no splits; use the same for every split.
    question: the question of every row.
    row_per_caption: one row per caption, which is then the training target; by default one row per picture, and the
        target is its first caption. May be a mapping, as {train: true}, for some splits.
    """
    check_split("flickr30k", split)
    check_source("flickr30k", file=file, path=path)
    check_not_beside_path("flickr30k", path, image_root=image_root)
    check_fractions(fractions)
    if isinstance(row_per_caption, Mapping):
        row_per_caption = row_per_caption.get(split, False)
    examples = partial(_examples, question=question, row_per_caption=row_per_caption)
    if path is not None:
        return _published(path, split, examples=examples, fractions=fractions)
    file = Path(file)
    named = captions_of(file)
    in_split = partial(_in_split, split=split, fractions=fractions)
    images = partial(_image, image_root=image_root)
    return from_rows(named, partial(examples, images=images, in_split=in_split), source=file)
