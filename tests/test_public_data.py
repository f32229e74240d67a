"""Holds the loaders of public data sets to the published formats, written here by hand, and to errors that help."""

import io
import json
import os
import re
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from mmcoconut import data
from mmcoconut.data import flickr30k, gsm8k_aug, hub
from mmcoconut.data.images import open_images
from mmcoconut.data.public import sentences


TEXT_ONLY = ("gsm8k_aug", "prosqa")
WITHOUT_STEPS = ("flickr30k", "llava_instruct", "path_vqa", "vqa_rad", "vqav2")
WITH_STEPS = ("aokvqa", "m3cot", "scienceqa", *TEXT_ONLY)
PUBLIC = (*WITHOUT_STEPS, *WITH_STEPS)

# As published, but for long texts; row 0 and row 1 differ in their ids only.
AOKVQA = {
    "split": "train",
    "image_id": 299207,
    "question_id": "22MexNkBPpdZGX6sxbxVBH",
    "question": "What is the man by the bags awaiting?",
    "choices": ["skateboarder", "train", "delivery", "cab"],
    "correct_choice_idx": 3,
    "direct_answers": ["ride", "ride", "bus", "taxi", "travelling", "traffic", "taxi", "cab", "cab", "taxi"],
    "difficult_direct_answer": False,
    "rationales": ["A train would not be there. He waits for a cab.", "He has bags.", "He waits for a taxi."],
}
SCIENCEQA = {
    "question": "Which of these states is farthest north?",
    "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
    "answer": 0,
    "hint": "",
    "image": "image.png",
    "task": "closed choice",
    "grade": "grade2",
    "subject": "social science",
    "topic": "geography",
    "category": "Geography",
    "skill": "Read a map: cardinal directions",
    "lecture": "Maps have four cardinal directions.\nNorth is up.",
    "solution": "West Virginia is farthest north.",
    "split": "train",
}
VQAV2 = {
    "image_id": 458752,
    "question_id": 458752000,
    "question": "What is this photo taken looking through?",
    "question_type": "what is this",
    "answer_type": "other",
    "multiple_choice_answer": "net",
    "answers": [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(["window", *["net"] * 7, "mesh", "net"], start=1)
    ],
}
PATH_VQA = {"question": "where are liver stem cells located?", "answer": "in the canals of hering"}
M3COT = {
    "id": "physical-commonsense-1426",
    "category": "physical-commonsense",
    "image_id": "COCO_train2014_000000000009",
    "question": "Which object can be used to hold salt?",
    "choices": ["(1)", "(2)", "(3)"],
    "context": "Four objects are on a table.",
    "answer": "B",
    "rationale": "Salt is fine. It needs a shaker.\nObject (2) is one.",
    "split": "train",
    "domain": "commonsense",
    "topic": "physical-commonsense",
}
KARPATHY = {
    "sentids": [0, 1],
    "imgid": 0,
    "sentences": [
        {"tokens": ["two", "guys"], "raw": "Two guys , outside .", "imgid": 0, "sentid": 0},
        {"tokens": ["two", "men"], "raw": "Two men .", "imgid": 0, "sentid": 1},
    ],
    "split": "train",
    "filename": "1000092795.jpg",
}
LLAVA = {
    "id": "000000033471",
    "image": "000000033471.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
        {"from": "gpt", "value": "The bus is white and red."},
        {"from": "human", "value": "What is on its back?"},
        {"from": "gpt", "value": "An advertisement."},
    ],
}
GSM8K_AUG = "How many eggs are left?||<<16-3-4=9>> <<9*2=18>> #### 18"
PROSQA = {
    "question": "Every lempus is a yumpus. Tom is a lempus. Is Tom a yumpus or gorpus?",
    "answer": "Tom is a yumpus.",
    "steps": ["Tom is a lempus.", "Every lempus is a yumpus."],
    "idx_to_symbol": ["Tom", "lempus", "yumpus", "gorpus"],
    "edges": [[0, 1], [1, 2]],
    "root": 0,
    "target": 2,
    "neg_target": 3,
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def picture(shade=0):
    return Image.fromarray(np.random.default_rng(shade).integers(0, 256, (6, 8, 3), dtype=np.uint8))


def png(shade=0):
    buffer = io.BytesIO()
    picture(shade).save(buffer, format="PNG")
    return buffer.getvalue()


def put(folder, name, content):
    """Writes text, or anything else as JSON, or a picture for a name without content; returns the path."""
    file = Path(folder) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        picture().save(file)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def error_of(call, *parts):
    """Runs `call`, which must raise ValueError with every part in its message."""
    with pytest.raises(ValueError) as caught:
        call()
    for part in parts:
        assert str(part) in str(caught.value), f"{part!r} is not in {caught.value}"


def changed(row, changes):
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


# Writers of the published files from rows: each returns the options


def write_aokvqa(folder, rows, split="train"):
    put(folder, f"coco/{split}2017/000000299207.jpg", None)
    put(folder, f"aokvqa_v1p0_{split}.json", rows)
    return {"folder": folder, "image_root": folder / "coco"}


def write_scienceqa(folder, rows, split="train"):
    put(folder, f"images/{split}/1/image.png", None)
    put(folder, f"images/{split}/2/image.png", None)
    problems = {str(number): row for number, row in enumerate(rows, start=1)}
    put(folder, "problems.json", json.dumps(problems, indent=2))
    put(folder, "pid_splits.json", {"train": [], "val": [], "test": [], split: list(problems), "minitest": []})
    return {"folder": folder}


def write_vqav2(folder, rows, split="train2014"):
    put(folder, f"coco/{split}/COCO_{split}_000000458752.jpg", None)
    fields = ("image_id", "question", "question_id")
    rows = [{**row, "question_id": row.get("question_id", 0) + number} for number, row in enumerate(rows)]
    questions = [{key: value for key, value in row.items() if key in fields} for row in rows]
    annotations = [{key: value for key, value in row.items() if key != "question"} for row in rows]
    put(folder, f"v2_OpenEnded_mscoco_{split}_questions.json", {"info": {}, "questions": questions})
    put(folder, f"v2_mscoco_{split}_annotations.json", {"info": {}, "annotations": annotations[::-1]})
    return {"folder": folder, "image_root": folder / "coco"}


def write_m3cot(folder, rows, split="train"):
    put(folder, f"images/{M3COT['id']}.png", None)
    put(folder, f"{split}.jsonl", "\n".join(json.dumps(row) for row in rows))
    return {"folder": folder}


def write_flickr30k(folder, rows):
    put(folder, "images/1000092795.jpg", None)
    file = put(folder, "dataset_flickr30k.json", {"images": rows, "dataset": "flickr30k"})
    return {"file": file, "image_root": folder / "images"}


def write_llava_instruct(folder, rows):
    put(folder, "train2017/000000033471.jpg", None)
    file = put(folder, "llava_instruct_150k.json", rows)
    return {"file": file, "image_root": folder / "train2017", "fractions": [1, 0, 0]}


def write_gsm8k_aug(folder, rows):
    put(folder, "train.txt", "\n".join(rows) + "\n")
    return {"folder": folder}


def write_prosqa(folder, rows):
    put(folder, "prosqa_train.json", rows)
    return {"folder": folder}


def write_published(folder, rows, split="train"):
    """Parquet, as the Hub keeps it; a row without a picture of its own gets one, and None is kept as null."""
    columns = {key: [row.get(key) for row in rows] for key in {key: None for row in rows for key in row}}
    columns["image"] = [row.get("image", {"bytes": png(), "path": None}) for row in rows]
    file = Path(folder) / "data" / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return {"path": folder}


PUBLISHED = {
    "aokvqa": (write_aokvqa, AOKVQA),
    "scienceqa": (write_scienceqa, SCIENCEQA),
    "vqav2": (write_vqav2, VQAV2),
    "path_vqa": (write_published, PATH_VQA),
    "vqa_rad": (write_published, PATH_VQA),
    "m3cot": (write_m3cot, M3COT),
    "flickr30k": (write_flickr30k, KARPATHY),
    "llava_instruct": (write_llava_instruct, LLAVA),
    "gsm8k_aug": (write_gsm8k_aug, GSM8K_AUG),
    "prosqa": (write_prosqa, PROSQA),
}


def load(name, folder, rows, **options):
    return data.load_examples(name, split="train", **{**PUBLISHED[name][0](folder, rows), **options})


# Samples


@pytest.mark.parametrize("name", PUBLIC)
def test_every_loader_reads_its_own_sample_in_every_split(name, tmp_path):
    options = data.loader_of(name).write_sample(tmp_path, num_rows=3, seed=5)
    seen = set()
    for split in data.SPLITS:
        dataset = data.load_examples(name, split=split, **options)
        assert dataset.features == data.FEATURES and len(dataset) == len(set(dataset["row_id"])) == 3
        for row in dataset:
            pictures = open_images(row)
            assert [image.size for image in pictures] == ([] if name in TEXT_ONLY else [(48, 48)])
            assert bool(row["steps"]) == (name in WITH_STEPS)
            assert not row["choices"] or row["answers"][0] in row["choices"]
            seen.add((row["question"], *(image.tobytes() for image in pictures)))
    assert len(seen) == 9  # nothing is in two splits


@pytest.mark.parametrize("name", PUBLIC)
def test_samples_depend_on_the_seed_alone(name, tmp_path):
    def rows(folder, seed):
        options = data.loader_of(name).write_sample(tmp_path / folder, num_rows=4, seed=seed)
        dataset = data.load_examples(name, split="test", **options)
        return [(row["question"], row["answers"], [i.tobytes() for i in open_images(row)]) for row in dataset]

    assert rows("a", 1) == rows("b", 1) != rows("c", 2)


# The published rows


def example_of(row, folder):
    """Question, choices, steps, answers, row_id, and the pictures' paths below the folder."""
    row["images"] = [os.path.relpath(item["path"], folder.resolve()) for item in row["images"]]
    return row


EXPECTED = {
    "aokvqa": {
        "images": ["coco/train2017/000000299207.jpg"],
        "question": AOKVQA["question"],
        "choices": AOKVQA["choices"],
        "steps": ["A train would not be there.", "He waits for a cab."],
        "answers": ["cab"],
        "row_id": "aokvqa_v1p0_train.json row 0",
        "history": [],
    },
    "scienceqa": {
        "images": ["images/train/1/image.png"],
        "question": SCIENCEQA["question"],
        "choices": SCIENCEQA["choices"],
        "steps": [SCIENCEQA["lecture"], SCIENCEQA["solution"]],
        "answers": ["West Virginia"],
        "row_id": "problems.json problem 1",
        "history": [],
    },
    "vqav2": {
        "images": ["coco/train2014/COCO_train2014_000000458752.jpg"],
        "question": VQAV2["question"],
        "choices": [],
        "steps": [],
        "answers": ["net", "window", "net", "net", "net", "net", "net", "net", "mesh", "net"],
        "row_id": "v2_OpenEnded_mscoco_train2014_questions.json row 0",
        "history": [],
    },
    "m3cot": {
        "images": ["images/physical-commonsense-1426.png"],
        "question": "Which object can be used to hold salt?\nContext: Four objects are on a table.",
        "choices": ["(1)", "(2)", "(3)"],
        "steps": ["Salt is fine.", "It needs a shaker.", "Object (2) is one."],
        "answers": ["(2)"],
        "row_id": "train.jsonl row 0",
        "history": [],
    },
    "flickr30k": {
        "images": ["images/1000092795.jpg"],
        "question": "Describe the image.",
        "choices": [],
        "steps": [],
        "answers": ["Two guys , outside .", "Two men ."],
        "row_id": "dataset_flickr30k.json row 0",
        "history": [],
    },
    "llava_instruct": {
        "images": ["train2017/000000033471.jpg"],
        "question": "What is on its back?",
        "choices": [],
        "steps": [],
        "answers": ["An advertisement."],
        "row_id": "llava_instruct_150k.json row 0",
        "history": [{"question": "What are the colors of the bus?", "answer": "The bus is white and red."}],
    },
    "gsm8k_aug": {
        "images": [],
        "question": "How many eggs are left?",
        "choices": [],
        "steps": ["<<16-3-4=9>>", "<<9*2=18>>"],
        "answers": ["18"],
        "row_id": "train.txt row 0",
        "history": [],
    },
    "prosqa": {
        "images": [],
        "question": PROSQA["question"],
        "choices": [],
        "steps": PROSQA["steps"],
        "answers": ["Tom is a yumpus."],
        "row_id": "prosqa_train.json row 0",
        "history": [],
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_published_row_becomes_this_example(name, tmp_path):
    dataset = load(name, tmp_path, [PUBLISHED[name][1]])
    assert dataset.features == data.FEATURES
    assert [example_of(row, tmp_path) for row in dataset] == [EXPECTED[name]]


HUB_ROWS = {
    "aokvqa": {**AOKVQA, "direct_answers": str(AOKVQA["direct_answers"])},  # a text there
    "scienceqa": {**SCIENCEQA, "image": {"bytes": png(), "path": "image.png"}},
    "vqav2": VQAV2,
    "m3cot": M3COT,
    "flickr30k": {"caption": ["Two guys , outside .", "Two men ."], "filename": "a.jpg", "split": "train"},
}


@pytest.mark.parametrize("name", HUB_ROWS)
@pytest.mark.parametrize("arrow", [False, True])
def test_the_copy_with_pictures_in_a_column_gives_the_same_example(name, arrow, tmp_path):
    options = write_published(tmp_path / "hub", [HUB_ROWS[name]])
    if arrow:
        DatasetDict({"train": datasets.load_dataset(str(tmp_path / "hub"), split="train")}).save_to_disk(
            tmp_path / "s"
        )
        options = {"path": tmp_path / "s"}
    dataset = data.load_examples(name, split="train", **options)
    assert dataset.features == data.FEATURES
    expected = {**EXPECTED[name], "row_id": f"{options['path'].name} train row 0", "images": [png()]}
    assert [{**row, "images": [item["bytes"] for item in row["images"]]} for row in dataset] == [expected]


@pytest.mark.parametrize("name", ["path_vqa", "vqa_rad"])
def test_a_medical_row_becomes_this_example(name, tmp_path):
    (row,) = load(name, tmp_path / "p", [PATH_VQA])
    assert open_images(row)[0].tobytes() == picture().tobytes()
    assert (row["question"], row["answers"]) == (PATH_VQA["question"], ["in the canals of hering"])
    assert (row["choices"], row["steps"], row["row_id"]) == ([], [], "p train row 0")


def test_validation_and_test_files_have_their_own_names(tmp_path):
    for write, row, name, file_split, split in (
        (write_aokvqa, AOKVQA, "aokvqa", "val", "validation"),
        (write_scienceqa, SCIENCEQA, "scienceqa", "val", "validation"),
        (write_vqav2, VQAV2, "vqav2", "val2014", "validation"),
        (write_m3cot, M3COT, "m3cot", "dev", "validation"),
        (write_m3cot, M3COT, "m3cot", "test", "test"),
    ):
        (row,) = data.load_examples(name, split=split, **write(tmp_path / f"{name}{split}", [row], file_split))
        assert len(open_images(row)) == 1


# Options


@pytest.mark.parametrize("rationale, steps", [(0, EXPECTED["aokvqa"]["steps"]), (2, ["He waits for a taxi."])])
def test_one_of_the_alternative_rationales_is_taken(rationale, steps, tmp_path):
    assert load("aokvqa", tmp_path, [AOKVQA], rationale=rationale)["steps"][0] == steps


def test_direct_answers_are_all_ten_with_the_most_frequent_first(tmp_path):
    (row,) = load("aokvqa", tmp_path, [AOKVQA], task="direct_answer")
    assert row["answers"] == ["taxi", "ride", "ride", "bus", "travelling", "traffic", "taxi", "cab", "cab", "taxi"]
    assert row["choices"] == []


@pytest.mark.parametrize("name", ["aokvqa", "flickr30k", "m3cot", "scienceqa", "vqav2"])
def test_a_folder_of_pictures_beside_a_published_data_set_is_refused(name):
    call = partial(data.load_examples, name, split="train", path="user/data", image_root="coco")
    error_of(call, f"{name}: the option image_root is 'coco'", "path='user/data'", "remove one of them")


def test_a_configuration_of_original_files_is_refused(tmp_path):
    options = {"folder": tmp_path, "config": "ScienceQA-IMG"}
    error_of(lambda: data.load_examples("scienceqa", split="train", **options), "option config is 'ScienceQA-IMG'")


def test_difficult_questions_are_left_out_only_when_asked(tmp_path):
    rows = [changed(AOKVQA, {"difficult_direct_answer": True}), AOKVQA]
    for options in (write_aokvqa(tmp_path / "a", rows), write_published(tmp_path / "b", rows)):
        everything = data.load_examples("aokvqa", split="train", **options)
        kept = data.load_examples("aokvqa", split="train", skip_difficult=True, **options)
        assert len(everything) == 2 and kept[0] == everything[1] and len(kept) == 1
        assert kept["row_id"][0].endswith("row 1")


@pytest.mark.parametrize("published", [False, True])
def test_scienceqa_has_rows_of_text_and_steps_of_two_fields(published, tmp_path):
    text_row = changed(SCIENCEQA, {"image": None, "hint": "Look up.", "lecture": ""})
    rows = [text_row, SCIENCEQA, text_row]
    if published:
        rows = [{**row, "image": row["image"] and {"bytes": png(), "path": None}} for row in rows]
        options = write_published(tmp_path, rows)
    else:
        options = write_scienceqa(tmp_path, rows)
    dataset = data.load_examples("scienceqa", split="train", **options)
    assert [len(open_images(row)) for row in dataset] == [0, 1, 0]
    assert dataset["question"][0] == "Which of these states is farthest north?\nContext: Look up."
    assert dataset["steps"][0] == ["West Virginia is farthest north."]
    cut = data.load_examples("scienceqa", split="train", split_sentences=True, **options)
    assert cut["steps"][1] == [
        "Maps have four cardinal directions.",
        "North is up.",
        "West Virginia is farthest north.",
    ]
    text = data.load_examples("scienceqa", split="train", images_required=False, **options)
    assert text["images"][:] == [[], [], []]


@pytest.mark.parametrize("name", ["aokvqa", "m3cot", "vqav2", "llava_instruct", "scienceqa"])
def test_without_required_pictures_none_is_looked_for(name, tmp_path):
    options = PUBLISHED[name][0](tmp_path, [PUBLISHED[name][1]]) | {"images_required": False}
    for file in tmp_path.rglob("*.[jp][pn]g"):
        file.unlink()
    options.pop("image_root", None)
    assert data.load_examples(name, split="train", **options)["images"][:] == [[]]
    if name != "llava_instruct":
        path = write_published(tmp_path / "hub", [HUB_ROWS[name]])["path"]
        assert data.load_examples(name, split="train", path=path, images_required=False)["images"][:] == [[]]


def test_a_caption_can_be_a_row(tmp_path):
    dataset = load("flickr30k", tmp_path, [KARPATHY], row_per_caption=True, question="What is shown?")
    assert dataset["answers"][:] == [["Two guys , outside .", "Two men ."], ["Two men .", "Two guys , outside ."]]
    assert [name[-9:] for name in dataset["row_id"]] == ["caption 0", "caption 1"]
    assert set(dataset["question"]) == {"What is shown?"}


TABLES = {
    "results.csv": 'image_name| comment_number| comment\na.jpg| 0| A "big" dog , alone .\na.jpg| 4   A dog runs .\n',
    "captions.txt": 'image,caption\na.jpg,"A ""big"" dog , alone ."\na.jpg,A dog runs .\n',
    "annotations.csv": 'raw,sentids,split,filename,img_id\n"[""A \\""big\\"" dog , alone ."", ""A dog runs .""]"'
    ',"[0, 1]",train,a.jpg,0\n',
    "captions.json": '{"a.jpg": ["A \\"big\\" dog , alone .", "A dog runs ."]}',
}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_of_captions_gives_one_row_a_picture(name, tmp_path):
    put(tmp_path, "a.jpg", None)
    file = put(tmp_path, name, TABLES[name])
    (row,) = data.load_examples("flickr30k", split="train", file=file, image_root=tmp_path, fractions=[1, 0, 0])
    assert row["answers"] == ['A "big" dog , alone .', "A dog runs ."]
    assert row["row_id"] == f"{name} row 0" and len(open_images(row)) == 1


@pytest.mark.parametrize(
    "conversation, question",
    [
        (["<image>\nWhat is it?", "A bus."], "What is it?"),
        (["What is it?\n<image>", "A bus.", "Why?", "It is long."], "What is it?"),
        (["What does <image> show?", "A bus.", "Why?", "It is long."], "What does show?"),
        (["See <image>\nWhat is it?", "A bus."], "See\nWhat is it?"),
    ],
)
def test_the_first_turn_alone_is_the_row_and_its_mark_goes(conversation, question, tmp_path):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(conversation)]
    (row,) = load("llava_instruct", tmp_path, [{**LLAVA, "conversations": turns}], max_turns=1)
    assert (row["question"], row["answers"], row["history"]) == (question, ["A bus."], [])


@pytest.mark.parametrize(
    "max_turns, history, last",
    [
        (None, [("Which?", "A bus."), ("Why?", "It is long.")], ("Sure?", "Yes.")),
        (2, [("Which?", "A bus.")], ("Why?", "It is long.")),
    ],
)
def test_the_last_turn_is_the_row_and_the_earlier_ones_its_history(max_turns, history, last, tmp_path):
    texts = ["Welcome!", "<image>Which?", "A bus.", "Why?", "It is long.", "Sure?", "Yes."]
    turns = [{"from": ("gpt", "human")[i % 2], "value": value} for i, value in enumerate(texts)]
    (row,) = load("llava_instruct", tmp_path, [{**LLAVA, "conversations": turns}], max_turns=max_turns)
    assert data.history_of(row) == tuple(history)
    assert (row["question"], row["answers"]) == (last[0], [last[1]])


def test_chat_messages_give_the_example_of_the_same_conversation(tmp_path):
    (expected,) = load("llava_instruct", tmp_path, [LLAVA])
    speakers = ("user", "assistant")
    texts = [turn["value"] for turn in LLAVA["conversations"]]
    plain = [{"role": speakers[i % 2], "content": text} for i, text in enumerate(texts)]
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in plain]
    text = {"type": "text", "text": texts[0].removeprefix("<image>\n"), "index": None}
    parts[0]["content"] = [text, {"type": "image", "text": None, "index": 0}]
    for messages in (plain, parts):
        assert [*load("llava_instruct", tmp_path, [{"images": [LLAVA["image"]], "messages": messages}])] == [expected]


def test_several_pictures_belong_to_the_first_question(tmp_path):
    put(tmp_path, "train2017/b.jpg", None)
    messages = [{"role": "user", "content": "<image> <image> Which is older?"}, {"role": "assistant", "content": "b"}]
    (row,) = load("llava_instruct", tmp_path, [{"images": [LLAVA["image"], "b.jpg"], "messages": messages}])
    assert (row["question"], len(open_images(row))) == ("Which is older?", 2)


def test_conversations_without_a_picture_are_text_rows(tmp_path):
    turns = [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    (row,) = load("llava_instruct", tmp_path, [{"id": "wgByO4Y_0", "conversations": turns}])
    assert (row["question"], row["answers"], row["images"]) == ("2 + 2?", ["4"], [])


def test_a_line_without_equations_has_no_steps(tmp_path):
    assert load("gsm8k_aug", tmp_path, [GSM8K_AUG, "What was the price?|| #### 26"])["steps"][1] == []


@pytest.mark.parametrize(
    "row",
    [
        {"question": "How many eggs are left?", "steps": ["<<16-3-4=9>>", "<<9*2=18>>"], "answer": "18"},
        {"question": "How many eggs are left?", "cot": "<<16-3-4=9>> <<9*2=18>>", "answer": "18"},
        {"question": "How many eggs are left?", "cot": ["<<16-3-4=9>>", "<<9*2=18>>"], "answer": 18},
    ],
)
def test_arithmetic_in_other_copies_gives_the_same_example(row, tmp_path):
    Dataset.from_list([row]).to_parquet(tmp_path / "train.parquet")
    (found,) = data.load_examples("gsm8k_aug", split="train", path=tmp_path)
    assert {**found, "row_id": "train.txt row 0"} == EXPECTED["gsm8k_aug"]


def test_arithmetic_in_the_json_of_coconut_gives_the_same_example(tmp_path):
    row = {"question": "How many eggs are left?", "steps": ["<<16-3-4=9>>", "<<9*2=18>>"], "answer": "18"}
    put(tmp_path, "gsm_valid.json", [row])
    (found,) = data.load_examples("gsm8k_aug", split="validation", folder=tmp_path)
    assert {**found, "row_id": "train.txt row 0"} == EXPECTED["gsm8k_aug"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("no capital. he says so.", ["no capital.", "he says so."]),
        (
            "Mr. Bean, e.g. here, at 3.5 m. He (St. Paul) vs. x.",
            ["Mr. Bean, e.g. here, at 3.5 m.", "He (St. Paul) vs. x."],
        ),
        ('He said "stop." Then (he left.) All fine.', ['He said "stop."', "Then (he left.)", "All fine."]),
        ("A line\nanother  line\n\n1. first\n2. second", ["A line", "another line", "1. first", "2. second"]),
        ("Wait... what?! Yes.", ["Wait...", "what?!", "Yes."]),
        ("one", ["one"]),
        ("", []),
    ],
)
def test_sentences_are_cut_and_nothing_is_lost(text, expected):
    assert sentences(text) == expected
    assert " ".join(sentences(text)) == " ".join(text.split())


# Wrong files: the second row is bad, and is named in every split's error

ANSWER = {"answer": "net", "answer_confidence": "yes", "answer_id": 1}
HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}


def says(part):
    """Two messages, of which the first consists of a picture and a part."""
    content = [{"type": "image"}, part]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "A bus."}]


MESSAGES = {"conversations": ..., "image": ..., "images": ["000000033471.jpg"]}
MESSAGES |= {"messages": says({"type": "text", "text": "What?"})}
BAD_ROWS = [
    ("aokvqa", {"question": ...}, "question", "the field is missing among these; add it"),
    ("aokvqa", {"question": " "}, "question", "it is empty"),
    ("aokvqa", {"choices": []}, "choices", "the list is empty; write at least one text"),
    ("aokvqa", {"choices": "a, b"}, "choices", "write a list"),
    ("aokvqa", {"choices": ["a", 2]}, "choices", "found 2; write a string, not int"),
    ("aokvqa", {"correct_choice_idx": ...}, "correct_choice_idx", "the field is missing among these; add it"),
    ("aokvqa", {"correct_choice_idx": 4}, "correct_choice_idx", "found 4; write the index of one of the 4 choices"),
    ("aokvqa", {"correct_choice_idx": -1}, "correct_choice_idx", "found -1; write the index"),
    ("aokvqa", {"correct_choice_idx": True}, "correct_choice_idx", "found True; write a whole number, not bool"),
    ("aokvqa", {"rationales": []}, "rationales", "the list is empty"),
    ("aokvqa", {"rationales": "He waits."}, "rationales", "write a list"),
    ("aokvqa", {"image_id": "299207"}, "image_id", "found '299207'; write a whole number, not str"),
    ("aokvqa", {"image_id": 1}, "image", "found 'train2017/000000000001.jpg'; there is no file"),
    ("scienceqa", {"question": 3}, "question", "found 3; write a string"),
    ("scienceqa", {"choices": None}, "choices", "write a list"),
    ("scienceqa", {"answer": "A"}, "answer", "found 'A'; write a whole number"),
    ("scienceqa", {"answer": 9}, "answer", "found 9; write the index of one of the 4 choices"),
    ("scienceqa", {"lecture": ...}, "lecture", "the field is missing among these; add it"),
    ("scienceqa", {"solution": ["a"]}, "solution", "found ['a']; write a string"),
    ("scienceqa", {"hint": 1}, "hint", "found 1; write a string"),
    ("scienceqa", {"image": "gone.png"}, "image", "found 'train/2/gone.png'; there is no file"),
    ("scienceqa", {"image": "../1/image.png"}, "image", "write a path relative to the image root"),
    ("vqav2", {"question": None}, "question", "found None; write a string"),
    ("vqav2", {"image_id": 1}, "image", "COCO_train2014_000000000001.jpg'; there is no file"),
    ("m3cot", {"answer": "D"}, "answer", "found 'D'; write the letter of one of the 3 choices, A to C"),
    ("m3cot", {"answer": "AB"}, "answer", "found 'AB'; write the letter"),
    ("m3cot", {"answer": 1}, "answer", "found 1; write a string"),
    ("m3cot", {"rationale": ""}, "rationale", "it is empty"),
    ("m3cot", {"context": ...}, "context", "the field is missing among these; add it"),
    ("m3cot", {"choices": []}, "choices", "the list is empty"),
    ("m3cot", {"id": "gone"}, "image", "found 'gone.png'; there is no file"),
    ("m3cot", {"id": "../x"}, "image", "write a path relative to the image root"),
    ("flickr30k", {"sentences": []}, "sentences", "the list holds no rows"),
    ("flickr30k", {"sentences": [{"tokens": ["a"]}]}, "raw", "the field is missing among these; add it"),
    ("flickr30k", {"sentences": [{"raw": " "}]}, "raw", "it is empty"),
    ("flickr30k", {"split": "dev", "filename": "2.jpg"}, "image", "there is no file"),
    ("flickr30k", {"split": "val"}, "split", "1000092795.jpg is in 'train' before; give each picture one split"),
    ("flickr30k", {"split": ...}, "split", "the field is missing among these; add it"),
    ("flickr30k", {"filename": ...}, "filename", "the field is missing among these; add it"),
    ("llava_instruct", {"conversations": []}, "conversations", "the list holds no rows"),
    ("llava_instruct", {"conversations": [HUMAN]}, "conversations", "found ['human']; the turns must alternate"),
    ("llava_instruct", {"conversations": [HUMAN, HUMAN]}, "conversations", "must alternate between human and gpt"),
    ("llava_instruct", {"conversations": [{"from": "human"}, GPT]}, "value", "the field is missing among these"),
    ("llava_instruct", {"conversations": [HUMAN, {**GPT, "value": ""}]}, "value", "it is empty"),
    (
        "llava_instruct",
        {"conversations": [{**HUMAN, "value": "What?"}, GPT]},
        "conversations",
        "1 picture(s), so mark 1 in its first",
    ),
    ("llava_instruct", {"conversations": [{**HUMAN, "value": "<image>"}, GPT]}, "conversations", "it is empty"),
    ("llava_instruct", {"image": None}, "conversations", "has 0 picture(s), so mark 0 in its first question"),
    ("llava_instruct", {"conversations": [HUMAN, GPT, GPT]}, "conversations", "alternate between human and gpt"),
    (
        "llava_instruct",
        {"conversations": [HUMAN, GPT, {**HUMAN, "value": "?"}]},
        "conversations",
        "found ['human', 'g",
    ),
    (
        "llava_instruct",
        {"conversations": [HUMAN, GPT] * 2},
        "conversations",
        "write <image> in the first question only",
    ),
    ("llava_instruct", {"messages": []}, "conversations", "give one of conversations, messages among these"),
    ("llava_instruct", {**MESSAGES, "images": ["000000033471.jpg"] * 2}, "messages", "has 2 picture(s), so mark 2"),
    ("llava_instruct", {**MESSAGES, "images": "000000033471.jpg"}, "images", "write a list"),
    ("llava_instruct", {**MESSAGES, "images": [3]}, "images", "found 3; write a string, not int"),
    ("llava_instruct", {**MESSAGES, "messages": [{"role": "system", "content": "x"}]}, "messages", "['system']; the"),
    ("llava_instruct", {**MESSAGES, "messages": says({"type": "video"})}, "content", "one of image, text"),
    ("llava_instruct", {**MESSAGES, "messages": says("What?")}, "content", "found 'What?'; write an object"),
    ("llava_instruct", {**MESSAGES, "messages": says({"type": "text"})}, "text", "the field is missing among these"),
    ("llava_instruct", {"image": "gone.jpg"}, "image", "found 'gone.jpg'; there is no file"),
    ("llava_instruct", {"image": "/etc/a.jpg"}, "image", "write a path relative to the image root"),
    ("llava_instruct", {"image": ["a.jpg"]}, "image", "write a string, not list"),
    ("path_vqa", {"question": ""}, "question", "it is empty"),
    ("path_vqa", {"answer": None}, "answer", "found None; write a string or a number"),
    ("path_vqa", {"image": None}, "image", "found None; write the picture's bytes into the column"),
    ("path_vqa", {"image": {"bytes": None, "path": "/etc/a.png"}}, "image", "climbs with '..'"),
    ("prosqa", {"steps": "Tom."}, "steps", "write a list"),
    ("prosqa", {"answer": ...}, "answer", "the field is missing among these; add it"),
]
NAMES = {"scienceqa": "problems.json problem 2", "vqav2": "v2_OpenEnded_mscoco_train2014_questions.json row 1"}


@pytest.mark.parametrize("name, changes, field, found", BAD_ROWS)
def test_a_bad_row_is_refused_by_its_name_field_and_remedy(name, changes, field, found, tmp_path):
    row = PUBLISHED[name][1]
    parts = (NAMES.get(name, "row 1"), f"field '{field}'", found)
    error_of(lambda: load(name, tmp_path, [row, changed(row, changes)]), *parts)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"direct_answers": "ride, bus"}, ("'direct_answers'", "found 'ride, bus'; write a list of answers")),
        (
            {"direct_answers": "['blue' 'blue' 'arrow']"},
            ("'direct_answers'", "found \"['blue' 'blue' 'arrow']\"; it has 3 strings for 1 answers"),
        ),
        (
            {"direct_answers": "['blue', 'blue' 'arrow']"},
            ("'direct_answers'", "it has 3 strings for 2 answers; write commas between them"),
        ),
        ({"direct_answers": "['blue'\n 'blue']"}, ("'direct_answers'", "it has 2 strings for 1 answers")),
        ({"direct_answers": "{[]: 1}"}, ("'direct_answers'", "write a list of answers")),
        ({"direct_answers": "[" * 500}, ("'direct_answers'", "write a list of answers")),
        ({"direct_answers": "['blue', 2]"}, ("'direct_answers'", "found 2; write a string")),
        ({"direct_answers": "'blue'"}, ("'direct_answers'", "write a list")),
        ({"direct_answers": []}, ("'direct_answers'", "the list is empty")),
        ({"direct_answers": ["ride", ""]}, ("'direct_answers'", "found ''; it is empty")),
        ({"difficult_direct_answer": "no"}, ("'difficult_direct_answer'", "found 'no'; write true or false")),
    ],
)
def test_bad_direct_answers_are_refused(changes, parts, tmp_path):
    options = {"task": "direct_answer", "skip_difficult": True}
    error_of(lambda: load("aokvqa", tmp_path, [AOKVQA, changed(AOKVQA, changes)], **options), "json row 1", *parts)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"answers": []}, ("annotations.json row 0", "'answers'", "the list holds no rows")),
        ({"answers": ["net"]}, ("annotations.json row 0 answers row 0", "found 'net'; write an object")),
        ({"answers": [{**ANSWER, "answer": ""}]}, ("annotations.json row 0", "'answer'", "it is empty")),
        ({"answers": ...}, ("annotations.json row 0", "'answers'", "the field is missing")),
    ],
)
def test_bad_annotations_are_refused_by_their_own_row(changes, parts, tmp_path):
    error_of(lambda: load("vqav2", tmp_path, [VQAV2, changed(VQAV2, changes)]), *parts)  # annotations are reversed


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"question_id": 7}, ("questions.json row 0", "'question_id'", "no annotation with this id", "one download")),
        (
            {"image_id": 7},
            ("questions.json row 0", "'image_id'", "found 458752; its annotation has 7", "one download"),
        ),
    ],
)
def test_questions_and_annotations_that_do_not_match_are_refused(changes, parts, tmp_path):
    options = write_vqav2(tmp_path, [VQAV2])
    put(tmp_path, "v2_mscoco_train2014_annotations.json", {"annotations": [{**VQAV2, **changes}]})
    error_of(lambda: data.load_examples("vqav2", split="train", **options), *parts)


@pytest.mark.parametrize("pid", ["3", 1, None, ["1"]])
def test_a_split_that_names_no_problem_is_refused(pid, tmp_path):
    options = write_scienceqa(tmp_path, [SCIENCEQA])
    put(tmp_path, "pid_splits.json", {"train": ["1", pid]})
    parts = ("pid_splits.json", "'train'", f"found {pid!r}", "no object of this name", "one download")
    error_of(lambda: data.load_examples("scienceqa", split="train", **options), *parts)
    error_of(lambda: data.load_examples("scienceqa", split="test", **options), "pid_splits.json", "'test'", "missing")


@pytest.mark.parametrize(
    "line, field",
    [
        ("How many? <<1=1>> #### 1", "question"),
        ("How many?||<<1=1>>||<<2=2>> #### 1", "question"),
        ("How many?||<<1=1>> 1", "answer"),
        ("How many?||<<1=1>> #### 1 #### 2", "answer"),
    ],
)
def test_a_bad_line_of_equations_is_refused(line, field, tmp_path):
    error_of(lambda: load("gsm8k_aug", tmp_path, [GSM8K_AUG, line]), "train.txt row 1", f"'{field}'", gsm8k_aug.LINE)


def test_a_line_without_an_answer_or_question_is_refused(tmp_path):
    error_of(
        lambda: load("gsm8k_aug", tmp_path, ["Why?||<<1=1>> #### "]), "train.txt row 0", "'answer'", "it is empty"
    )
    error_of(lambda: load("gsm8k_aug", tmp_path, ["||<<1=1>> #### 1"]), "train.txt row 0", "'question'", "it is empty")


BAD_TABLES = [
    ("image_name| comment_number| comment\na.jpg 0 A dog .\n", ("t.csv row 0", "'comment'", "write `file name|")),
    ("image_name| comment_number| comment\na.jpg| 0|\n", ("t.csv row 0", "'captions'", "it is empty")),
    ("image,caption\na.jpg,A dog , alone .\n", ("t.csv row 0", "'caption'", 'captions with commas in "quotes"')),
    ("image,caption\na.jpg\n", ("t.csv row 0", "'captions'", "found None; write a string")),
    ("picture,caption\na.jpg,A dog .\n", ("t.csv", "['picture', 'caption']", "one of image, image_name, filename")),
    ("filename,raw\na.jpg,A dog .\n", ("t.csv row 0", "'raw'", "write a JSON list of captions")),
    ("filename,raw\na.jpg,3\n", ("t.csv row 0", "'captions'", "write a list")),
    (
        "filename,caption,split\na.jpg,A dog .,train\na.jpg,A dog .,test\n",
        ("t.csv row 1", "'split'", "a.jpg is in 'train' before; give each picture one split"),
    ),
    ("filename,caption,split\na.jpg,A dog .,dev\n", ("t.csv row 0", "'split'", "found 'dev'; write one of train")),
    ("filename,caption\ngone.jpg,A dog .\n", ("t.csv row 0", "'image'", "there is no file")),
    ("filename,caption\n", ("t.csv", "leave out every row")),
]


@pytest.mark.parametrize("text, parts", BAD_TABLES)
def test_a_bad_table_of_captions_is_refused(text, parts, tmp_path):
    put(tmp_path, "a.jpg", None)
    file = put(tmp_path, "t.csv", text)
    options = {"file": file, "image_root": tmp_path, "fractions": [1, 0, 0]}
    error_of(lambda: data.load_examples("flickr30k", split="train", **options), *parts)


FILES = {
    "aokvqa": "aokvqa_v1p0_train.json",
    "scienceqa": "problems.json",
    "vqav2": "v2_mscoco_train2014_annotations.json",
    "m3cot": "train.jsonl",
    "flickr30k": "dataset_flickr30k.json",
    "llava_instruct": "llava_instruct_150k.json",
    "prosqa": "prosqa_train.json",
}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_empty_or_cut_file_is_refused(name, tmp_path):
    options = PUBLISHED[name][0](tmp_path, [PUBLISHED[name][1]] * 2)
    file = tmp_path / FILES[name]
    text = file.read_text()
    for content, remedy in ((text[: len(text) // 3], "truncated"), ("", "file is empty")):
        file.write_text(content)
        error_of(lambda: data.load_examples(name, split="train", **options), file, remedy)
    file.unlink()
    error_of(lambda: data.load_examples(name, split="train", **options), file, "there is no such file")


@pytest.mark.parametrize("name", ["scienceqa", "vqav2", "flickr30k"])
def test_a_file_that_is_no_object_is_refused(name, tmp_path):
    options = PUBLISHED[name][0](tmp_path, [PUBLISHED[name][1]])
    put(tmp_path, FILES[name], "[1, 2]")
    error_of(
        lambda: data.load_examples(name, split="train", **options), FILES[name], "found [1, 2]", "one JSON object"
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_an_unknown_split_is_answered_with_the_nearest(name, tmp_path):
    options = PUBLISHED[name][0](tmp_path, [PUBLISHED[name][1]])
    error_of(lambda: data.load_examples(name, split="tests", **options), "'tests'", "did you mean 'test'")


@pytest.mark.parametrize("name", ["aokvqa", "scienceqa", "vqav2", "m3cot", "flickr30k", "gsm8k_aug"])
def test_exactly_one_source_is_asked_for(name):
    error_of(lambda: data.load_examples(name, split="train"), name, "no source", "path")
    source = "file" if name == "flickr30k" else "folder"
    options = {source: "a", "path": "b"}
    error_of(lambda: data.load_examples(name, split="train", **options), name, f"['{source}', 'path']", "give one")


@pytest.mark.parametrize("name", ["aokvqa", "vqav2", "flickr30k", "llava_instruct"])
def test_pictures_are_never_lost_without_a_word(name, tmp_path):
    parts = ("row 0", "'image'", "give the option image_root")
    error_of(lambda: load(name, tmp_path, [PUBLISHED[name][1]], image_root=None), *parts)


@pytest.mark.parametrize(
    "name, options, parts",
    [
        ("aokvqa", {"task": "direct"}, ("'direct'", "did you mean 'direct_answer'")),
        ("aokvqa", {"rationale": 3}, ("row 0", "'rationales'", "rationale is 3 and these are 3", "from 0")),
        ("aokvqa", {"rationale": -1}, ("rationale is -1",)),
        ("flickr30k", {"fractions": [1, 1, 0]}, ("[1, 1, 0]", "3 numbers", "add up to 1")),
        ("llava_instruct", {"fractions": [0.5, 0.5]}, ("[0.5, 0.5]", "3 numbers")),
        ("llava_instruct", {"fractions": [0, 1, 0]}, ("llava_instruct_150k.json", "leave out every row", "change")),
        ("path_vqa", {"validation_fraction": 0}, ("validation_fraction is 0", "between 0 and 1")),
        ("path_vqa", {"validation_fraction": 1.0}, ("validation_fraction is 1.0", "between 0 and 1")),
    ],
)
def test_bad_options_are_refused_with_the_remedy(name, options, parts, tmp_path):
    error_of(lambda: load(name, tmp_path, [PUBLISHED[name][1]], **options), *parts)


# Splits by picture


def pictures_of(name, **options):
    found = {split: data.load_examples(name, split=split, **options) for split in data.SPLITS}
    return found, {
        split: {item["bytes"] or item["path"] for row in part for item in row["images"]}
        for split, part in found.items()
    }


def assert_disjoint(pictures, count):
    assert all(pictures.values())
    assert sum(len(part) for part in pictures.values()) == len(set.union(*pictures.values())) == count


@pytest.mark.parametrize("row_per_caption", [False, True])
def test_captions_of_a_picture_share_its_split(row_per_caption, tmp_path):
    lines = ["image_name| comment_number| comment"]
    for caption in range(3):  # the captions of a picture are far apart
        for number in range(60):
            put(tmp_path, f"{number}.png", "not decoded")
            lines.append(f"{number}.png| {caption}| Caption {caption} of {number} .")
    options = {"file": put(tmp_path, "results.csv", "\n".join(lines)), "image_root": tmp_path}
    options |= {"fractions": [0.5, 0.25, 0.25], "row_per_caption": row_per_caption}
    found, pictures = pictures_of("flickr30k", **options)
    assert_disjoint(pictures, 60)
    assert sum(len(part) for part in found.values()) == (180 if row_per_caption else 60)
    for part in found.values():
        for row in part:
            number = Path(row["images"][0]["path"]).stem
            assert sorted(row["answers"]) == [f"Caption {caption} of {number} ." for caption in range(3)]


@pytest.mark.parametrize("given", [False, True])
def test_a_repository_of_one_split_is_divided_by_picture(given, tmp_path):
    rows = [{"caption": [f"Number {n} ."], "filename": f"{n}.jpg", "split": "val" if n else "test"} for n in range(40)]
    rows = [{**row, "image": {"bytes": png(n), "path": None}} for n, row in enumerate(rows)]
    rows = rows if given else [changed(row, {"split": ...}) for row in rows]
    options = write_published(tmp_path, rows, "test") | {"fractions": [0.5, 0.25, 0.25]}
    if given:
        assert len(data.load_examples("flickr30k", split="validation", **options)) == 39
        error_of(lambda: data.load_examples("flickr30k", split="train", **options), "test", "leave out every row")
        return
    found, pictures = pictures_of("flickr30k", **options)
    assert_disjoint(pictures, 40)
    for part in found.values():  # each row has its own picture
        for row in part:
            number = int(re.search(r"\d+", row["answers"][0])[0])
            assert open_images(row)[0].tobytes() == picture(number).tobytes()
            assert row["row_id"] == f"{tmp_path.name} test row {number}"


def test_conversations_about_a_picture_share_its_split(tmp_path):
    rows = []
    for number in range(120):
        name = put(tmp_path, f"{number // 2}.jpg", "not decoded")
        rows.append({**LLAVA, "id": str(number), "image": os.path.basename(name)})
    options = {"file": put(tmp_path, "l.json", rows), "image_root": tmp_path, "fractions": [0.5, 0.25, 0.25]}
    found, pictures = pictures_of("llava_instruct", **options)
    assert_disjoint(pictures, 60)
    assert sum(len(part) for part in found.values()) == 120


def test_a_validation_split_is_taken_from_train_by_picture(tmp_path):
    rows = [{**PATH_VQA, "question": f"{n}?", "image": {"bytes": png(n // 2), "path": None}} for n in range(80)]
    write_published(tmp_path, rows)
    test = [{**PATH_VQA, "image": {"bytes": png(1000), "path": None}}]
    options = write_published(tmp_path, test, "test") | {"validation_fraction": 0.3}
    found, pictures = pictures_of("vqa_rad", **options)
    assert_disjoint(pictures, 41)
    assert len(found["train"]) + len(found["validation"]) == 80
    assert pictures["validation"] == {
        c for c in map(png, range(40)) if data.split_of(c, (0.7, 0.3, 0)) == "validation"
    }
    for row in found["validation"]:
        assert row["images"][0]["bytes"] == png(int(row["question"][:-1]) // 2)
    error_of(lambda: data.load_examples("vqa_rad", split="validation", path=tmp_path), "'validation'", "test, train")


# Pictures in a column


def test_pictures_of_a_column_are_not_copied_or_decoded(tmp_path, monkeypatch):
    noise = [np.random.default_rng(n).bytes(1_000_000) for n in range(10)]
    rows = [{**PATH_VQA, "image": {"bytes": content, "path": None}} for content in noise]
    Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False)).save_to_disk(tmp_path / "s" / "train")
    put(tmp_path, "s/dataset_dict.json", {"splits": ["train"]})
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("opened a picture"))
    before = pa.total_allocated_bytes()
    dataset = data.load_examples("path_vqa", split="train", path=tmp_path / "s")
    assert pa.total_allocated_bytes() - before < 1_000_000
    assert dataset[7]["images"] == [{"bytes": noise[7], "path": None}]


def test_rows_of_a_column_can_be_selected_extended_and_checked(tmp_path):
    rows = [{**PATH_VQA, "image": {"bytes": content, "path": None}} for content in (png(1), png(2)[:50], png(3))]
    dataset = load("path_vqa", tmp_path, rows)
    kept, errors = data.drop_unreadable(dataset)
    assert len(errors) == 1 and "train row 1" in errors[0]
    kept = kept.add_column("index", [5, 6])
    assert [(row["index"], open_images(row)[0].tobytes()) for row in kept] == [
        (5, picture(1).tobytes()),
        (6, picture(3).tobytes()),
    ]


def test_a_folder_of_pictures_with_a_table_is_read_in_place(tmp_path):
    put(tmp_path, "train/a.png", None)
    put(tmp_path, "train/metadata.jsonl", json.dumps({"file_name": "a.png", **PATH_VQA}))
    (row,) = data.load_examples("path_vqa", split="train", path=tmp_path)
    assert open_images(row)[0].tobytes() == picture().tobytes()
    assert os.path.samefile(row["images"][0]["path"], tmp_path / "train" / "a.png")


def test_a_column_that_names_a_file_outside_its_folder_is_refused(tmp_path):
    put(tmp_path, "secret.png", None)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("secret.png", "p/../secret.png", "p/link.png"):
        rows = [{**PATH_VQA, "image": {"bytes": None, "path": str(tmp_path / name)}}]
        options = write_published(tmp_path / "p", rows)
        error_of(
            lambda o=options: data.load_examples("path_vqa", split="train", **o), "train row 0", "climbs with '..'"
        )


@pytest.mark.parametrize(
    "write, parts",
    [
        (lambda folder: None, ("there is no such folder", "a folder or a Hub id")),
        (
            lambda folder: Dataset.from_list([PATH_VQA]).save_to_disk(folder),
            ("one split without its name", "DatasetDict"),
        ),
        (lambda folder: write_published(folder, [PATH_VQA], "tests"), ("no split 'test'", "did you mean 'tests'")),
        (
            lambda folder: DatasetDict({"test": Dataset.from_list([PATH_VQA])}).save_to_disk(folder),
            ("found ['answer', 'question']", "'image'", "no such column"),
        ),
    ],
)
def test_a_folder_that_holds_no_such_data_set_is_refused(write, parts, tmp_path):
    write(tmp_path / "p")
    error_of(lambda: data.load_examples("path_vqa", split="test", path=str(tmp_path / "p")), "p", *parts)


@pytest.mark.parametrize("error", [DatasetNotFoundError("…"), ConnectionError("…")])
def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(hub, "get_dataset_split_names", fail)
    error_of(lambda: data.load_examples("path_vqa", split="test", path="nowhere"), "nowhere", "option path", "Hub")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_the_validation_split_is_known_by_its_usual_names(name, tmp_path):
    for split in (name, "train"):
        write_published(tmp_path, [{**PATH_VQA, "question": split}], split)
    assert data.load_examples("path_vqa", split="validation", path=tmp_path)["question"][:] == [name]


def test_the_published_fractions_are_about_karpathys():
    assert [round(31_014 * fraction, -3) for fraction in flickr30k.FRACTIONS] == [29_000, 1_000, 1_000]
    data.check_fractions(flickr30k.FRACTIONS)
