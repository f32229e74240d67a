"""Shared code of the loaders of public data sets: splits, JSON, sentences as steps, and made-up rows."""

import json
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from mmcoconut.data import Example, arrow_mazes, to_dataset
from mmcoconut.data.json_steps import check_list, check_text, existing_image, field_error, field_of, read_text
from mmcoconut.errors import UsageError


# Words before a full stop that does not end a sentence. A rule, not a parser: "George W. Bush" is cut in two.
ABBREVIATION = re.compile(r"(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|St|Fig|vs|approx|e\.g|i\.e)\.$", re.IGNORECASE)
LIST_NUMBER = re.compile(r"^\(?(?:\d+|[A-Za-z])[.)]$")  # "1." or "a)" alone
BREAK = re.compile(r"\n+|(?<=[.!?])\s+|(?<=[.!?][\"')\]”’])\s+")

# A loader's own function: yields the examples of a row (none drops the row), given the row and its name.
Examples = Callable[[Mapping[str, Any], str], Iterable[Example]]

# Returns the `images` of a row, given the same two arguments.
FindImages = Callable[[Mapping[str, Any], str], list[dict]]


# Options


def check_source(dataset: str, **options: Any) -> None:
    """Check that exactly one of `options`, such as a folder of the original files or a Hub id, gives the source."""
    given = [option for option, value in options.items() if value is not None]
    if len(given) != 1:
        raise UsageError(f"{dataset} was given {given or 'no source'}; give one of the options {', '.join(options)}")


def check_not_beside_path(dataset: str, path: Any, **options: Any) -> None:
    """Refuse options about files on disk together with `path`, whose data set has its own."""
    for option, value in options.items():
        if path is not None and value is not None:
            raise UsageError(
                f"{dataset}: the option {option} is {value!r}, and the data set at path={str(path)!r} has its own; "
                "remove one of them"
            )


# Files


def read_object(file: Path) -> dict:
    """Read the single JSON object in `file`."""
    text = read_text(file)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{file}, line {error.lineno}, character {error.colno}: not valid JSON ({error.msg}); it may be "
            "truncated: copy or download the file again"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{file}: found {repr(content)[:100]}; the file must hold one JSON object, as published")
    return content


def objects_in(content: Mapping[str, Any], field: str, where: str) -> list[dict]:
    """Return the list of objects in a field of a JSON file; `where` names the file."""
    rows = check_list(field_of(content, field, where), field, where)
    if not rows:
        raise field_error(where, field, rows, "the list holds no rows; copy or download the file again")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UsageError(f"{where} {field} row {index}: found {repr(row)[:100]}; write an object")
    return rows


def numbered(rows: Iterable[dict], name: str) -> Iterator[tuple[str, dict]]:
    """Yield rows with their names for error messages, `"<name> row 3"`, counted from 0."""
    return ((f"{name} row {index}", row) for index, row in enumerate(rows))


def from_rows(named: Iterable[tuple[str, dict]], examples: Examples, *, source: str | os.PathLike) -> Dataset:
    """Make a data set of all examples of the rows; `source` is their common name in errors."""
    found = [example for row_id, row in named for example in examples(row, row_id)]
    return to_dataset(not_empty(found, str(source)))


def not_empty(found: list, name: str) -> list:
    if not found:
        raise UsageError(f"{name}: the options leave out every row of this split; change them")
    return found


# Fields


def text_of(row: Mapping[str, Any], field: str, row_id: str) -> str:
    return check_text(field_of(row, field, row_id), field, row_id)


def optional_text(row: Mapping[str, Any], field: str, row_id: str) -> str:
    """Return the text of a field that may be null or empty (`""`); the field itself must exist."""
    value = field_of(row, field, row_id)
    return "" if value is None or value == "" else check_text(value, field, row_id).strip()


def texts_of(row: Mapping[str, Any], field: str, row_id: str) -> list[str]:
    """Return a list with at least one text."""
    values = check_list(field_of(row, field, row_id), field, row_id)
    if not values:
        raise field_error(row_id, field, values, "the list is empty; write at least one text")
    return [check_text(value, field, row_id) for value in values]


def integer_of(row: Mapping[str, Any], field: str, row_id: str) -> int:
    value = field_of(row, field, row_id)
    if isinstance(value, bool) or not isinstance(value, int):
        raise field_error(row_id, field, value, f"write a whole number, not {type(value).__name__}")
    return value


def choice_at(row: Mapping[str, Any], field: str, choices: list[str], row_id: str) -> str:
    """Return the choice whose index, from 0, is in a field."""
    index = integer_of(row, field, row_id)
    if not 0 <= index < len(choices):
        raise field_error(row_id, field, index, f"write the index of one of the {len(choices)} choices, from 0")
    return choices[index]


def choice_of_letter(letter: str, field: str, choices: list[str], row_id: str) -> str:
    """Return the choice that a capital letter names, A for the first."""
    letters = string.ascii_uppercase[: len(choices)]
    if len(letter) != 1 or letter not in letters:
        remedy = f"write the letter of one of the {len(choices)} choices, {letters[0]} to {letters[-1]}"
        raise field_error(row_id, field, letter, remedy)
    return choices[letters.index(letter)]


def lettered(text: str, mark: str) -> list[str]:
    """Return the texts after the marks of A, B, C and so on, in this order, each up to the next mark.

    mark: a regular expression with `{}` for the letter; the first missing letter ends the list.

    >>> lettered("(A) red (B) blue, (A) or so", r"\\({}\\)")
    ['red', 'blue, (A) or so']
    """
    marks, begin = [], 0
    for letter in string.ascii_uppercase:
        found = re.compile(mark.format(letter)).search(text, begin)
        if found is None:
            break
        marks.append(found)
        begin = found.end()
    ends = [found.start() for found in marks[1:]] + [len(text)]
    return [text[found.end() : end].strip() for found, end in zip(marks, ends)]


def check_choices(choices: list[str], field: str, found: Any, row_id: str) -> list[str]:
    """Return `choices` if there are at least two and none is empty."""
    if len(choices) < 2 or not all(choices):
        raise field_error(row_id, field, found, f"read the options {choices} there; write two or more, as published")
    return choices


def image_under(image_root: str | os.PathLike | None, relative: str, row_id: str) -> list[dict]:
    """Return the `images` of a row with one existing picture below `image_root`; it is not decoded."""
    if image_root is None:
        remedy = "give the option image_root, or images_required: false for text only"
        raise field_error(row_id, "image", relative, remedy)
    return [existing_image(image_root, relative, row_id)]


def no_images(row: Mapping[str, Any], row_id: str) -> list[dict]:
    """Return no pictures: for text only, and for rows whose pictures `hub.from_published` adds."""
    return []


def most_frequent_first(answers: Sequence[str]) -> list[str]:
    """Return the answers with the most frequent (the first such) first, as the training target; repetitions are kept
    for metrics that count them."""
    target, _ = Counter(answers).most_common(1)[0]
    rest = list(answers)
    rest.remove(target)
    return [target, *rest]


def with_context(question: str, context: str) -> str:
    return f"{question}\nContext: {context}" if context else question


def sentences(text: str) -> list[str]:
    """Split a text into steps if the data has none: at line breaks and after `.`, `!` and `?` before a space, but not
    after a few abbreviations and list numbers. Joined with spaces they give the text again, with single spaces."""
    found = []
    for piece in BREAK.split(text.strip()):
        piece = " ".join(piece.split())
        if found and (ABBREVIATION.search(found[-1]) or LIST_NUMBER.match(found[-1])):
            found[-1] += f" {piece}"
        elif piece:
            found.append(piece)
    return found


# Made-up rows


def sample_puzzles(split: str, *, num_rows: int, seed: int) -> Iterator[dict]:
    """Yield arrow mazes of one arrow for `write_sample`: picture, question, four choices, two sentences, the answer.

    No picture is in two splits."""
    for maze, hops in arrow_mazes.generate(split, num_rows=num_rows, seed=seed, max_hops=1):
        start, end = maze.path(hops)
        answer = maze.color_at(end)
        yield {
            "picture": arrow_mazes.draw(maze),
            "question": "What is the color of the cell that the arrow in the marked cell leads to?",
            "choices": sorted({answer, *[color for color in arrow_mazes.PALETTE if color != answer][:3]}),
            "steps": [
                f"The arrow in {arrow_mazes.cell_name(start)} leads to {arrow_mazes.cell_name(end)}.",
                f"The color of {arrow_mazes.cell_name(end)} is {answer}.",
            ],
            "answer": answer,
        }


def save_picture(file: Path, picture: Image.Image) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def save_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
