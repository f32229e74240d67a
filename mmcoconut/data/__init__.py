"""One schema for all data sets: a row has pictures, a question, reasoning steps and accepted answers."""

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


# Modules by name, imported on first use, so unused data sets cost nothing.
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
    "pointer_chasing": "mmcoconut.data.pointer_chasing",
    "prosqa": "mmcoconut.data.prosqa",
    "puzzlevqa": "mmcoconut.data.puzzlevqa",
    "scienceqa": "mmcoconut.data.scienceqa",
    "vqa_rad": "mmcoconut.data.hub_vqa",
    "vqav2": "mmcoconut.data.vqav2",
    "vstar": "mmcoconut.data.vstar",
}
# Benchmarks that are published only for evaluation: they have the split `test` and no other.
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
# Columns that objectives and metrics read; only data sets with such values have them.
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
    choices: the options in the order shown; empty for an open question.
    steps: the written reasoning, one thought each; may be empty.
    answers: every accepted answer; the first one is the training target.
    row_id: the source of the row for error messages: `"train.json row 17"`, counted from 0.
    history: for a conversation the turns before the question, `{"question": ..., "answer": ...}` each, which share the
        pictures; the other fields are its last turn, which has no steps.
    boxes: per written step its region in the first picture, [left, top, right, bottom] in pixels from the upper left
        corner, or None; empty if nothing is known.
    helper_image: a picture that shows the path to the answer, for training only; stored like images, or None.
    category: the kind of question, in benchmarks with categories; results are also reported per category.
    pair: the same text in both rows of a pair, which is right if both answers are (`pair_accuracy`).
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
                f"{self.row_id}, field 'steps': found {self.steps!r} after {len(self.history)} earlier turns; a "
                "conversation has no steps: write them into the answers, or remove the earlier turns"
            )


def check_boxes(boxes: Sequence[Sequence[float] | None], steps: Sequence[str], row_id: str) -> None:
    """Check that there is one box or None per step, and that each box is valid.

    Raises:
        ValueError: another number of boxes than of steps; a box without four ordered numbers, or below 0.
    """
    if len(boxes) != len(steps):
        raise UsageError(
            f"{row_id}, field 'boxes': found {len(boxes)} for {len(steps)} steps; give one per step, null where "
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
    """Refuse every split but `test` of a benchmark; `published` is the publishers' name of these rows.

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
    """Return the number of rows requested for a split of a generated data set: one number, or one per split."""
    check_split(dataset, split)
    if isinstance(num_rows, Mapping):
        if split not in num_rows:
            raise UsageError(f"num_rows has no entry for split {split!r}, only {sorted(num_rows)}; add it")
        num_rows = num_rows[split]
    if num_rows < 1:
        raise UsageError(f"num_rows is {num_rows} for split {split!r}; ask for at least 1")
    return num_rows


def split_of(content: bytes, fractions: Sequence[float]) -> str:
    """Return the split of `content`, independent of the rest of the data: its SHA-256 as a number in [0, 1), cut at
    the running sums of `fractions` (train, validation, test)."""
    position = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
    if position < fractions[0]:
        return "train"
    return "validation" if position < fractions[0] + fractions[1] else "test"


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise UsageError unless these are fractions of train, validation and test that add up to 1."""
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or not math.isclose(sum(fractions), 1):
        raise UsageError(
            f"the option fractions is {list(fractions)}; write {len(SPLITS)} numbers, for {', '.join(SPLITS)}, that "
            "add up to 1"
        )


def to_dataset(examples: Iterable[Example]) -> Dataset:
    """Return a `datasets.Dataset` with `FEATURES`, and those OPTIONAL_FEATURES that any example has."""
    rows = [asdict(example) for example in examples]
    optional = {name: kind for name, kind in OPTIONAL_FEATURES.items() if any(row[name] for row in rows)}
    features = Features({**FEATURES, **optional})
    return Dataset.from_dict({column: [row[column] for row in rows] for column in features}, features=features)


def without_pictures(rows: Dataset) -> Dataset:
    """Return rows with only their texts, which are cheap to read."""
    return rows.remove_columns([name for name in ABOUT_PICTURES if name in rows.column_names])


def question_text(row: Mapping[str, Any]) -> str:
    """Return the text that the model reads: the question, followed by the choices if there are any."""
    if not row["choices"]:
        return row["question"]
    return f"{row['question']}\nChoices: {', '.join(row['choices'])}"


def history_of(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return question and answer of each turn before the row's own; the field may be missing in rows made by hand."""
    return tuple((turn["question"], turn["answer"]) for turn in row.get("history", ()))


def image_counts(rows: Dataset) -> list[int]:
    """Count the pictures of each row without reading them."""
    tables = rows.select_columns(["images"]).with_format("arrow").iter(batch_size=1000)
    return [count for table in tables for count in pc.list_value_length(table["images"]).to_pylist()]


def drop_unreadable(dataset: Dataset) -> tuple[Dataset, list[str]]:
    """Return the rows whose pictures can all be read, and one message for each row left out.

    Decodes every picture once. This implements the policy "skip", which the caller chooses and reports; under the
    policy "error" this is not called, and `open_images` stops the run.
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
    """Return the module of data set `name`: `load(*, split, **options)`, and `write_sample(folder, *, num_rows, seed)`
    that writes a few made-up rows in the data set's own format and returns the options that load them."""
    if name not in DATASETS:
        raise UsageError(f"no data set is called {name!r}; {nearest(name, DATASETS)}")
    return importlib.import_module(DATASETS[name])


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Return the options of data set `name`: the arguments of its `load`, without `split`."""
    parameters = inspect.signature(loader_of(name).load).parameters
    return {key: parameter for key, parameter in parameters.items() if key != "split"}


def load_examples(name: str, *, split: str, **options) -> Dataset:
    """Load a split of data set `name`, with `FEATURES`; the options are those of the data set's `load`."""
    parameters = options_of(name)
    unknown = [option for option in options if option not in parameters]
    if unknown:
        hints = "; ".join(f"{option!r}: {nearest(option, parameters)}" for option in unknown)
        raise UsageError(f"data set {name!r} has no option {hints}; remove it, or correct its name")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise UsageError(f"data set {name!r} needs the option {option!r}; found {sorted(options)}; add it")
    return loader_of(name).load(split=split, **options)
