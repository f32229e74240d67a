"""Load questions with written steps from JSON or JSON Lines: `{"image", "question", "steps", "answer"}` per row.

This is the format of the A-OKVQA files made for Coconut. There the question includes the choices and the answer is
the index of the right one: both are kept unchanged. Optional fields: `choices`, a list; `answers`, all accepted
answers, with repetitions; and for objectives `boxes`, the region of the picture for each step, and
`helper_image`, a picture that shows the path to the answer.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import SPLITS, Example, arrow_mazes, check_fractions, check_split, nearest, split_of, to_dataset
from mmcoconut.data.images import resolve_image_path
from mmcoconut.errors import UsageError


OPTIONAL_FIELDS = ("image", "choices", "answers", "boxes", "helper_image")
FIELDS = ("question", "steps", "answer", *OPTIONAL_FIELDS)

LARGEST_WHOLE = 2**53  # from here on a float represents several integers

# Half of a UTF-16 pair: JSON can encode it ("\ud83d"), text files and tokenizers cannot.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def field_error(row_id: str, field: str, found: Any, remedy: str) -> UsageError:
    return UsageError(f"{row_id}, field {field!r}: found {repr(found)[:100]}; {remedy}")


def _parse(text: str, file: Path, *, first_line: int, last: bool) -> Any:
    """Call `json.loads`; an error names the position in the file, and says if the file seems to be truncated."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{file}, line {first_line + error.lineno - 1}, character {error.colno}"
        text = text.rstrip()
        cut = last and (error.pos >= len(text) or text[-1] not in "]}" or error.msg.startswith("Unterminated"))
        if cut:
            remedy = "it looks truncated: copy or download the file again"
        else:
            remedy = "write one JSON list, or JSON Lines with one whole object per line"
        raise UsageError(f"{at}: not valid JSON ({error.msg}); {remedy}") from error


def read_text(file: Path) -> str:
    if not file.is_file():
        raise UsageError(f"{file}: there is no such file; correct the path in the data set's options, or the split")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file}, byte {error.start}: not UTF-8 ({error.reason}); save it as UTF-8, or download it again if the "
            "file looks truncated there"
        ) from error
    if not text.strip():
        raise UsageError(f"{file}: the file is empty; copy or download it again")
    return text


def _whole_object(text: str) -> dict | None:
    """Return the object that a whole file holds, over several lines or in one; None for anything else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _check_is_no_table_of_rows(file: Path, rows: list) -> None:
    """Refuse one object around the rows: `{"data": [...]}`, or `{"0": {...}, "1": {...}}`."""
    if len(rows) != 1 or rows[0].keys() & set(FIELDS):
        return
    lists = [key for key, value in rows[0].items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists:
        raise UsageError(
            f"{file}: found one object with the keys {sorted(rows[0])}, and rows in {lists[0]!r}; write that list as "
            "the whole file"
        )
    if all(isinstance(value, dict) for value in rows[0].values()):
        keys = ", ".join(repr(key) for key in list(rows[0])[:3])
        raise UsageError(f"{file}: found one object with a row for each of {keys} ...; write a list of its values")


def read_rows(file: str | os.PathLike) -> list[dict]:
    """Read the objects of a JSON list or of JSON Lines, distinguished by the first character."""
    file = Path(file)
    text = read_text(file)
    if text.lstrip().startswith("["):
        rows = _parse(text, file, first_line=1, last=True)
    elif (whole := _whole_object(text)) is not None:
        rows = [whole]
    else:
        # Not splitlines(): it also splits at characters that may be inside a JSON string.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [_parse(line, file, first_line=number, last=number == lines[-1][0]) for number, line in lines]
    if not rows:
        raise UsageError(f"{file}: the list holds no rows; write at least one")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UsageError(f"{file} row {index}: found {repr(row)[:100]}; write an object with the fields {FIELDS}")
    return rows


def field_of(row: Mapping[str, Any], field: str, row_id: str) -> Any:
    if field not in row:
        raise field_error(row_id, field, sorted(row), "the field is missing among these; add it")
    return row[field]


def check_text(value: Any, field: str, row_id: str) -> str:
    """Return `value` unchanged if it is non-empty text."""
    if not isinstance(value, str):
        raise field_error(row_id, field, value, f"write a string, not {type(value).__name__}")
    if not value.strip():
        raise field_error(row_id, field, value, "it is empty; write the text, or remove the row")
    if LONE_SURROGATE.search(value):
        raise field_error(row_id, field, value, "it holds half of a surrogate pair; write the whole character")
    return value


def check_list(value: Any, field: str, row_id: str) -> list:
    if not isinstance(value, list):
        raise field_error(row_id, field, value, f"write a list, [] when there are none, not {type(value).__name__}")
    return value


def answer_text(value: Any, field: str, row_id: str) -> str:
    """Return a string unchanged, and a number as a string, without a decimal point if it is whole: 3.0 is "3"."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise field_error(row_id, field, value, f"write a string or a number, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise field_error(row_id, field, value, "write a finite number or a string")
    if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_WHOLE:
        value = int(value)
    return check_text(str(value), field, row_id)


def check_among(answer: str, choices: list[str], *, choices_field: str, row_id: str) -> None:
    if choices and answer not in choices:
        remedy = f"it is none of the {choices_field} {choices}; write one of them, word for word"
        raise field_error(row_id, "answer", answer, remedy)


def existing_image(image_root: str | os.PathLike, relative: Any, row_id: str, field: str = "image") -> dict:
    """Return the `images` item of an existing file under `image_root`; it is not decoded."""
    path = resolve_image_path(image_root, check_text(relative, field, row_id), row_id, field)
    if not os.path.isfile(path):
        remedy = f"there is no file {str(path)!r}; correct the path or image_root, or put the file there"
        raise field_error(row_id, field, relative, remedy)
    return {"bytes": None, "path": str(path)}


def _check_spelling(row: Mapping[str, Any], row_id: str) -> None:
    """Refuse a misspelt field, which would be ignored, or reported as missing: `images` for `image`."""
    given = row.keys() | ({"answer"} if "answers" in row else set())  # `answers` alone will do
    for field in sorted(row.keys() - set(FIELDS)):
        close = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.8)
        if close and close[0] not in given:
            raise field_error(row_id, field, row[field], f"no such field; did you mean {close[0]!r}? Rename it")


def _images(row: Mapping[str, Any], image_root: str | os.PathLike | None, row_id: str) -> list[dict]:
    image = row.get("image")
    if image is None:
        return []
    if not isinstance(image, (str, list)):
        raise field_error(row_id, "image", image, "write a path, a list of paths, or null for no picture")
    if image_root is None:
        remedy = "give the option image_root, or images_required: false for text only"
        raise field_error(row_id, "image", image, remedy)
    return [existing_image(image_root, path, row_id) for path in ([image] if isinstance(image, str) else image)]


def _helper_image(row: Mapping[str, Any], image_root: str | os.PathLike | None, row_id: str) -> dict | None:
    helper = row.get("helper_image")
    if helper is None:
        return None
    if not isinstance(helper, str):
        raise field_error(row_id, "helper_image", helper, "write the path of one picture, or null for none")
    if image_root is None:
        remedy = "give the option image_root, or images_required: false for text only"
        raise field_error(row_id, "helper_image", helper, remedy)
    return existing_image(image_root, helper, row_id, "helper_image")


def _boxes(row: Mapping[str, Any], images: list[dict], row_id: str) -> list:
    boxes = [] if row.get("boxes") is None else check_list(row["boxes"], "boxes", row_id)
    if boxes and not images:
        raise field_error(row_id, "boxes", boxes, "the row has no picture for them; give `image`")
    for box in boxes:
        if box is None:
            continue
        for value in check_list(box, "boxes", row_id):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise field_error(row_id, "boxes", box, "write four numbers, [left, top, right, bottom], or null")
    return boxes


def _answers(row: Mapping[str, Any], row_id: str) -> list[str]:
    """Return `answers` with `answer`, the target, first; with `answers` alone, its first is the target.

    Repeated answers are kept, because metrics count how many people gave each.
    """
    if row.get("answers") is None:
        return [answer_text(field_of(row, "answer", row_id), "answer", row_id)]
    accepted = [answer_text(value, "answers", row_id) for value in check_list(row["answers"], "answers", row_id)]
    if "answer" in row:
        target = answer_text(row["answer"], "answer", row_id)
        if target in accepted:
            accepted.remove(target)
        accepted.insert(0, target)
    if not accepted:
        raise field_error(row_id, "answers", row["answers"], "write at least one answer")
    return accepted


def _example(row: Mapping[str, Any], images: list[dict], row_id: str, **fields) -> Example:
    choices = [] if row.get("choices") is None else check_list(row["choices"], "choices", row_id)
    choices = [answer_text(choice, "choices", row_id) for choice in choices]
    answers = _answers(row, row_id)
    check_among(answers[0], choices, choices_field="choices", row_id=row_id)
    return Example(
        images=images,
        question=check_text(field_of(row, "question", row_id), "question", row_id),
        choices=choices,
        steps=[check_text(s, "steps", row_id) for s in check_list(field_of(row, "steps", row_id), "steps", row_id)],
        answers=answers,
        row_id=row_id,
        **fields,
    )


def _file_of_split(
    file: str | os.PathLike | Mapping[str, str], split: str, fractions: Sequence[float] | None = None
) -> Path:
    if fractions is not None:
        check_split("json_steps", split)
        check_fractions(fractions)
        if isinstance(file, Mapping) or "{split}" in str(file):
            raise UsageError(
                f"the option file is {file!r}, which has a file for each split, and fractions is {list(fractions)}, "
                "which divides one file: remove fractions, or name one file"
            )
        return Path(file)
    if isinstance(file, Mapping):
        if split not in file:
            raise UsageError(f"the option file has no entry for split {split!r}; {nearest(split, file)}")
        return Path(file[split])
    if "{split}" not in str(file):
        # One file for every split would validate on the training rows.
        raise UsageError(
            f"the option file is {str(file)!r} for every split; write {{split}} in it for the split's name, "
            f"map splits to files: {{{split!r}: {str(file)!r}}}; or divide the file with fractions: [0.8, 0.1, 0.1]"
        )
    return Path(str(file).replace("{split}", split))


def _read_example(row: dict, row_id: str, *, image_root: str | None, images_required: bool) -> Example:
    _check_spelling(row, row_id)
    if not images_required:
        return _example(row, [], row_id)
    images = _images(row, image_root, row_id)
    helper, boxes = _helper_image(row, image_root, row_id), _boxes(row, images, row_id)
    return _example(row, images, row_id, boxes=boxes, helper_image=helper)


def _identity(row: Mapping[str, Any]) -> bytes:
    """Return what determines a row's split: its first picture's path, which is in no other split, or its question."""
    image = row.get("image")
    first = image[0] if isinstance(image, list) and image else image
    return str(first or row["question"]).encode()


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` arrow mazes per split as `<split>.json` with pictures, boxes and helper images; return the
    options for `load`."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = []
        mazes = arrow_mazes.load(split=split, num_rows=num_rows, seed=seed, helper_image=True)
        for index, row in enumerate(mazes):
            name, helper = f"{split}_{index:04d}.png", f"{split}_{index:04d}_way.png"
            (folder / "images" / name).write_bytes(row["images"][0]["bytes"])
            (folder / "images" / helper).write_bytes(row["helper_image"]["bytes"])
            texts = {"question": row["question"], "steps": row["steps"], "answer": row["answers"][0]}
            rows.append({"image": name, **texts, "boxes": row["boxes"], "helper_image": helper})
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return {"file": str(folder / "{split}.json"), "image_root": str(folder / "images")}


def load(
    *,
    split: str,
    file: str | os.PathLike | Mapping[str, str],
    image_root: str | os.PathLike | None = None,
    images_required: bool = True,
    fractions: Sequence[float] | None = None,
) -> Dataset:
    """Load the rows of a split's file.

    file: a path with `{split}` in it, a mapping from split to path, or one path with fractions.
    fractions: parts of train, validation and test into which one file is divided, by the hash of a row's picture path
        (of its question without a picture); use the same for every split.
    image_root: the folder of relative `image` paths; may contain `{split}` too.
    images_required: True checks that every named picture exists, and that at least one row names one (a row without
        `image` is a text row); False reads no pictures and gives every row an empty list.
    """
    if image_root is not None and not images_required:
        raise UsageError(
            f"images_required is False, so no picture would be read from image_root {str(image_root)!r}: remove one"
        )
    file = _file_of_split(file, split, fractions)
    rows = read_rows(file)
    _check_is_no_table_of_rows(file, rows)
    if image_root is not None:
        image_root = str(image_root).replace("{split}", split)
    if images_required and not any(row.get("image") for row in rows):
        raise UsageError(
            f"{file}: none of its {len(rows)} rows has a picture in the field 'image' (row 0 has {sorted(rows[0])}); "
            "correct the field's name, or set images_required: false for text only"
        )
    named = [(f"{file.name} row {index}", row) for index, row in enumerate(rows)]
    options = {"image_root": image_root, "images_required": images_required}
    examples = [(_read_example(row, row_id, **options), row) for row_id, row in named]  # every row is checked
    found = [row for row, source in examples if fractions is None or split_of(_identity(source), fractions) == split]
    if not found:
        raise UsageError(
            f"{file}: split {split!r} gets none of its {len(rows)} rows at fractions {list(fractions)}; raise its "
            "fraction, or add rows"
        )
    return to_dataset(found)
