"""One schema for every data set: a row is a few pictures, a question, its reasoning steps and its accepted answers."""

import difflib
import hashlib
import importlib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Image, List, Value

from mmcoconut.data.images import open_images
from mmcoconut.errors import UsageError
from mmcoconut.images_mmcoconut import UnreadableImageError


# Modules by name, imported on first use: a data set costs nothing to those who use another one.
DATASETS = {
    "aokvqa": "mmcoconut.data.aokvqa",
    "arrow_mazes": "mmcoconut.data.arrow_mazes",
    "blink": "mmcoconut.data.blink",
    "flickr30k": "mmcoconut.data.flickr30k",
    "graph_paths": "mmcoconut.data.graph_paths",
    "gsm8k_aug": "mmcoconut.data.gsm8k_aug",
    "json_steps": "mmcoconut.data.json_steps",
    "llava_instruct": "mmcoconut.data.llava_instruct",
    "m3cot": "mmcoconut.data.m3cot",
    "mmstar": "mmcoconut.data.mmstar",
    "mmvp": "mmcoconut.data.mmvp",
    "path_vqa": "mmcoconut.data.hub_vqa",
    "prosqa": "mmcoconut.data.prosqa",
    "puzzlevqa": "mmcoconut.data.puzzlevqa",
    "scienceqa": "mmcoconut.data.scienceqa",
    "vqa_rad": "mmcoconut.data.hub_vqa",
    "vqav2": "mmcoconut.data.vqav2",
    "vstar": "mmcoconut.data.vstar",
}
# Benchmarks that are published for evaluation alone: they have the split `test` and no other.
TEST_ONLY = ("blink", "mmstar", "mmvp", "vstar")

SPLITS = ("train", "validation", "test")

FEATURES = Features(
    {
        "images": List(Image(decode=False)),
        "question": Value("string"),
        "choices": List(Value("string")),
        "steps": List(Value("string")),
        "answers": List(Value("string")),
        "row_id": Value("string"),
        "history": List({"question": Value("string"), "answer": Value("string")}),
    }
)
# What objectives and metrics read of a row; only the data sets that have some have the column.
OPTIONAL_FEATURES = Features(
    {
        "boxes": List(List(Value("float64"))),
        "helper_image": Image(decode=False),
        "category": Value("string"),
        "pair": Value("string"),
    }
)
ABOUT_PICTURES = ("images", "boxes", "helper_image")


@dataclass
class Example:
    """One row of every data set.

    images: `{"bytes": ..., "path": ...}` each, as in `datasets.Image(decode=False)`: none, one or several, decoded
        only when `open_images` is called.
    question: what is asked, without the choices when `choices` holds them.
    choices: the options in the order shown; empty when the question is open.
    steps: the written reasoning, one thought each; may be empty.
    answers: every accepted answer; the first one is the training target.
    row_id: where the row comes from, for error messages: `"train.json row 17"`, counted from 0.
    history: of a conversation the turns before the question, `{"question": ..., "answer": ...}` each, to which the
        pictures and all answers are given; the other fields are its last turn, which has no steps.
    boxes: of each written step the part of the first picture that it is about, [left, top, right, bottom] in pixels
        from its upper left corner, or None; no boxes at all where nothing is known.
    helper_image: a picture that shows the way to the answer, for training alone; stored as images are, or None.
    category: the kind of question, in benchmarks that name it; results are also given for each kind.
    pair: the same text in the two rows of a pair, which counts as right where both answers are (`pair_accuracy`).
    """

    images: list[dict]
    question: str
    choices: list[str]
    steps: list[str]
    answers: list[str]
    row_id: str
    history: list[dict] = field(default_factory=list)
    boxes: list[list[float] | None] = field(default_factory=list)
    helper_image: dict | None = None
    category: str = ""
    pair: str = ""

    def __post_init__(self):
        if self.boxes:
            check_boxes(self.boxes, self.steps, self.row_id)
        if not self.answers or not all(answer.strip() for answer in self.answers):
            raise UsageError(
                f"{self.row_id}, field 'answers': found {self.answers!r}; give at least one answer and no empty ones"
            )
        for turn in self.history:
            if turn.keys() != {"question", "answer"} or not all(text.strip() for text in turn.values()):
                raise UsageError(f"{self.row_id}, field 'history': found {turn!r}; give a question and an answer each")
        if self.history and self.steps:
            raise UsageError(
                f"{self.row_id}, field 'steps': found {self.steps!r} behind {len(self.history)} earlier turns; a "
                "conversation has no steps: write them into the answers, or leave the earlier turns out"
            )


def check_boxes(boxes: Sequence[Sequence[float] | None], steps: Sequence[str], row_id: str) -> None:
    """Check that each step has a box or None, and that a box is one.

    Raises:
        ValueError: another number of boxes than of steps; a box without four numbers in their order, or below 0.
    """
    if len(boxes) != len(steps):
        raise UsageError(
            f"{row_id}, field 'boxes': found {len(boxes)} for {len(steps)} steps; give one for each step, null where "
            "there is none, or leave the field out"
        )
    for number, box in enumerate(boxes):
        if box is None:
            continue
        is_box = len(box) == 4 and 0 <= box[0] < box[2] < math.inf and 0 <= box[1] < box[3] < math.inf
        if not is_box:
            raise UsageError(
                f"{row_id}, field 'boxes': found {list(box)!r} for step {number}; write [left, top, right, bottom] in "
                "pixels of the first picture, from 0, with left < right and top < bottom"
            )


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the end of an error message about an unknown name: the nearest valid one, then all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(str(name), valid, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid are: {', '.join(valid)}"


def check_split(dataset: str, split: str) -> None:
    if split not in SPLITS:
        raise UsageError(f"{dataset} has no split {split!r}; {nearest(split, SPLITS)}")


def check_test_only(dataset: str, split: str, *, published: str) -> None:
    """Refuse every split but `test` of a benchmark; `published` is what its publishers call these rows.

    Raises:
        UsageError: another split.
    """
    check_split(dataset, split)
    if split != "test":
        raise UsageError(
            f"{dataset} has no split {split!r}: it is a benchmark, whose published rows ({published}) are the split "
            "'test'; ask for that one, and train and validate on another data set"
        )


def rows_of_split(dataset: str, num_rows: int | Mapping[str, int], split: str) -> int:
    """How many rows of a split a generated data set is asked for: a number for every split, or one for each."""
    check_split(dataset, split)
    if isinstance(num_rows, Mapping):
        if split not in num_rows:
            raise UsageError(f"num_rows has no entry for split {split!r}, only {sorted(num_rows)}; add it")
        num_rows = num_rows[split]
    if num_rows < 1:
        raise UsageError(f"num_rows is {num_rows} for split {split!r}; ask for at least 1")
    return num_rows


def split_of(content: bytes, fractions: Sequence[float]) -> str:
    """The split `content` belongs to, whatever else is in the data set: its SHA-256 as a number in [0, 1), cut at the
    running sums of `fractions` (train, validation, test)."""
    position = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
    if position < fractions[0]:
        return "train"
    return "validation" if position < fractions[0] + fractions[1] else "test"


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise UsageError unless these are parts of train, validation and test that add up to 1."""
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or not math.isclose(sum(fractions), 1):
        raise UsageError(
            f"the option fractions is {list(fractions)}; write {len(SPLITS)} numbers, for {', '.join(SPLITS)}, that "
            "add up to 1"
        )


def to_dataset(examples: Iterable[Example]) -> Dataset:
    """A `datasets.Dataset` with `FEATURES` from examples, and those of OPTIONAL_FEATURES that any of them has."""
    rows = [asdict(example) for example in examples]
    optional = {name: kind for name, kind in OPTIONAL_FEATURES.items() if any(row[name] for row in rows)}
    features = Features({**FEATURES, **optional})
    return Dataset.from_dict({column: [row[column] for row in rows] for column in features}, features=features)


def without_pictures(rows: Dataset) -> Dataset:
    """Return rows with what is asked, written and answered alone, which costs little to read."""
    return rows.remove_columns([name for name in ABOUT_PICTURES if name in rows.column_names])


def question_text(row: Mapping[str, Any]) -> str:
    """Return what the model reads: the question, and under it the choices if there are any."""
    if not row["choices"]:
        return row["question"]
    return f"{row['question']}\nChoices: {', '.join(row['choices'])}"


def history_of(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Question and answer of each turn before the row's own; rows made by hand may do without the field."""
    return tuple((turn["question"], turn["answer"]) for turn in row.get("history", ()))


def image_counts(rows: Dataset) -> list[int]:
    """Count the pictures of each row, without reading one."""
    tables = rows.select_columns(["images"]).with_format("arrow").iter(batch_size=1000)
    return [count for table in tables for count in pc.list_value_length(table["images"]).to_pylist()]


def drop_unreadable(dataset: Dataset) -> tuple[Dataset, list[str]]:
    """Return the rows whose pictures can all be read, and one message for each row left out.

    Decodes every picture once. This is the policy "skip", for the caller to choose and to report; under the policy
    "error" nobody calls this and `open_images` stops the run.
    """
    kept, errors = [], []
    for index, row in enumerate(dataset):
        try:
            open_images(row)
        except UnreadableImageError as error:
            errors.append(str(error))
        else:
            kept.append(index)
    return (dataset.select(kept) if errors else dataset), errors


def loader_of(name: str) -> ModuleType:
    """The module of data set `name`: it has `load(*, split, **options)` and `write_sample(folder, *, num_rows, seed)`,
    which writes a few made-up rows in the data set's own format and returns the options that load them."""
    if name not in DATASETS:
        raise UsageError(f"no data set is called {name!r}; {nearest(name, DATASETS)}")
    return importlib.import_module(DATASETS[name])


def load_examples(name: str, *, split: str, **options) -> Dataset:
    """Split `split` of data set `name`, with `FEATURES`; the options are those of the data set's `load`."""
    load = loader_of(name).load
    parameters = {key: value for key, value in inspect.signature(load).parameters.items() if key != "split"}
    for option in options:
        if option not in parameters:
            raise UsageError(
                f"data set {name!r} has no option {option!r}; {nearest(option, parameters)}; remove it, in a recipe "
                "with a `base` that sets it by null"
            )
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise UsageError(f"data set {name!r} needs the option {option!r}; found {sorted(options)}; add it")
    return load(split=split, **options)
