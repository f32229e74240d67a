"""Load conversations about pictures: LLaVA-Instruct's JSON, and the chat messages of later data sets.

    {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, …]}
    {"images": […], "messages": [{"role": "user" | "assistant", "content": a text, or parts with a type}, …]}

The pictures belong to the first question and precede it, wherever they are marked. The last turn of a
conversation is the row's question and answer, the turns before it are its `history`. The file has no splits, so all
conversations about a picture are in one split, by the hash of its name.
Paper: https://arxiv.org/abs/2304.08485
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import SPLITS, Example, check_fractions, check_split, nearest, split_of
from mmcoconut.data.json_steps import answer_text, check_list, check_text, field_error, field_of, read_rows
from mmcoconut.data.public import (
    from_rows,
    image_under,
    numbered,
    objects_in,
    sample_puzzles,
    save_json,
    save_picture,
    text_of,
)
from mmcoconut.errors import UsageError


FRACTIONS = (0.98, 0.01, 0.01)  # train, validation, test
IMAGE_MARK = "<image>"
# By field of the turns: the two speakers, the field of the speaker, and the field of the text.
FORMATS = {
    "conversations": (("human", "gpt"), "from", "value"),
    "messages": (("user", "assistant"), "role", "content"),
}
PART_TYPES = ("image", "text")
SAMPLE_TURNS = 3


def _part(part: Any, field: str, row_id: str) -> str:
    """Return the text of a part of a message, or the mark of a picture."""
    kind = part.get("type") if isinstance(part, Mapping) else part
    if kind not in PART_TYPES:
        remedy = f"write an object whose type is one of {', '.join(PART_TYPES)}; {nearest(str(kind), PART_TYPES)}"
        raise field_error(row_id, field, part, remedy)
    return f"{IMAGE_MARK}\n" if kind == "image" else text_of(part, "text", row_id)


def _text(turn: Mapping[str, Any], field: str, row_id: str) -> str:
    """Return the text of a turn, with a mark for each picture."""
    content = field_of(turn, field, row_id)
    if field == "content" and isinstance(content, list):
        content = "".join(_part(part, field, row_id) for part in content)
    return check_text(content, field, row_id)


def _turns(row: Mapping[str, Any], row_id: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the field of the turns, and each question with its answer; answers before a question are dropped."""
    named = [field for field in FORMATS if field in row]
    if len(named) != 1:
        raise field_error(row_id, "conversations", sorted(row), f"give one of {', '.join(FORMATS)} among these")
    [name] = named
    speakers, who, said = FORMATS[name]
    turns = objects_in(row, name, row_id)
    found = [text_of(turn, who, row_id) for turn in turns]
    start = 1 if found[0] == speakers[1] else 0
    pairs = len(found[start:]) // 2
    if pairs == 0 or found[start:] != [*speakers] * pairs:
        remedy = f"the turns must alternate between {' and '.join(speakers)}"
        raise field_error(row_id, name, found, remedy)
    texts = [_text(turn, said, row_id) for turn in turns[start:]]
    return name, list(zip(texts[::2], texts[1::2]))


def _unmarked(marked: str, field: str, row_id: str) -> str:
    """Return a question without its marks and the spaces before them."""
    return check_text(re.sub(rf"[^\S\n]*{IMAGE_MARK}", "", marked).strip(), field, row_id)


def _first_question(marked: str, num_images: int, field: str, row_id: str) -> str:
    """Return the first question without its marks; it must have one mark per picture."""
    if marked.count(IMAGE_MARK) != num_images:
        remedy = f"the row has {num_images} picture(s), so mark {num_images} in its first question ({IMAGE_MARK})"
        raise field_error(row_id, field, marked, remedy)
    return _unmarked(marked, field, row_id)


def _check_unmarked(turns: Sequence[tuple[str, str]], field: str, row_id: str) -> None:
    """Check that pictures are marked in the first question only."""
    for text in [*itertools.chain(*turns)][1:]:
        if IMAGE_MARK in text:
            raise field_error(row_id, field, text, f"write {IMAGE_MARK} in the first question only")


def _pictures(row: Mapping[str, Any], name: str, row_id: str) -> list[str]:
    """Return the paths of a row's pictures."""
    if name == "conversations":
        return [] if row.get("image") is None else [text_of(row, "image", row_id)]
    return [check_text(path, "images", row_id) for path in check_list(row.get("images", []), "images", row_id)]


def _examples(
    row: Mapping[str, Any],
    row_id: str,
    *,
    split: str,
    fractions: Sequence[float],
    image_root: str | os.PathLike | None,
    images_required: bool,
    max_turns: int | None,
) -> Iterator[Example]:
    name, turns = _turns(row, row_id)
    _check_unmarked(turns, name, row_id)
    pictures = _pictures(row, name, row_id)
    first = _first_question(turns[0][0], len(pictures), name, row_id)
    turns = [(first, turns[0][1]), *turns[1:]][:max_turns]
    identity = pictures[0] if pictures else answer_text(field_of(row, "id", row_id), "id", row_id)
    images = [item for path in pictures if images_required for item in image_under(image_root, path, row_id)]
    if split_of(identity.encode(), fractions) == split:
        *history, (question, answer) = turns
        yield Example(
            images=images,
            question=question,
            choices=[],
            steps=[],
            answers=[answer],
            row_id=row_id,
            history=[{"question": asked, "answer": answered} for asked, answered in history],
        )


def _sample_turns(puzzle: Mapping[str, Any]) -> list[tuple[str, str]]:
    first, second = puzzle["steps"]
    return [(f"{IMAGE_MARK}\n{puzzle['question']}", puzzle["answer"]), ("Why?", first), ("And then?", second)]


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` arrow mazes per split as conversations of one to three turns; return the options for `load`."""
    folder, rows = Path(folder), []
    for split in SPLITS:
        names = (f"{number:012}.jpg" for number in itertools.count(1))
        names = (name for name in names if split_of(name.encode(), FRACTIONS) == split)
        for name, puzzle in zip(names, sample_puzzles(split, num_rows=num_rows, seed=seed), strict=False):
            save_picture(folder / "images" / name, puzzle["picture"])
            texts = itertools.chain(*_sample_turns(puzzle)[: 1 + len(rows) % SAMPLE_TURNS])
            turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
            rows.append({"id": Path(name).stem, "image": name, "conversations": turns})
    save_json(folder / "llava_instruct_150k.json", rows)
    return {"file": str(folder / "llava_instruct_150k.json"), "image_root": str(folder / "images")}


def load(
    *,
    split: str,
    file: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    fractions: Sequence[float] = FRACTIONS,
    images_required: bool = True,
    max_turns: int | None = None,
) -> Dataset:
    """Load the rows of a split: zero, one or several pictures, and the turns of a conversation.

    file: such as `llava_instruct_150k.json`; one file for all splits. image_root: folder of its pictures,
        for that file COCO's `train2017`.
    fractions: parts of train, validation and test; use the same for every split.
    images_required: False reads no pictures and gives every row an empty list.
    max_turns: maximum number of first turns per conversation; default: all.
    """
    check_split("llava_instruct", split)
    check_fractions(fractions)
    if max_turns is not None and max_turns < 1:
        raise UsageError(f"the option max_turns is {max_turns}; give 1 or more, or leave it out for all turns")
    examples = partial(_examples, split=split, fractions=fractions, max_turns=max_turns)
    examples = partial(examples, image_root=image_root, images_required=images_required)
    file = Path(file)
    return from_rows(numbered(read_rows(file), file.name), examples, source=file)
