"""Holds the loaders of benchmarks to the published formats, written here by hand, and to errors that help."""

import json
import shutil

import datasets
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from test_public_data import error_of, picture, png

from mmcoconut import data
from mmcoconut.data import hub, mmstar, public, vstar
from mmcoconut.data.images import open_images


ROWS = 5  # of a sample; MMVP's pairs make it 6


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path_factory):
    """What `datasets` prepares of parquet files goes into a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def sample(name, folder, num_rows=ROWS, seed=0):
    return data.loader_of(name).write_sample(folder, num_rows=num_rows, seed=seed)


def write_rows(file, rows, images=("image",)):
    """Rows with the bytes of pictures, or None, in `images`, as a parquet file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    dataset = Dataset.from_dict({name: columns[name] for name in images}, Features({name: Image() for name in images}))
    for key in columns.keys() - {*images}:
        dataset = dataset.add_column(key, columns[key])
    dataset.to_parquet(file)


# Samples and splits


@pytest.mark.parametrize("name", data.TEST_ONLY)
def test_a_benchmark_reads_its_own_sample(name, tmp_path):
    dataset = data.load_examples(name, split="test", **sample(name, tmp_path))
    assert len(dataset) == len(set(dataset["row_id"])) == (6 if name == "mmvp" else ROWS)
    label = "pair" if name == "mmvp" else "category"
    assert dataset.features == {**data.FEATURES, label: Value("string")}
    for row in dataset:
        assert len(row["choices"]) > 1 and row["answers"][0] in row["choices"] and row["steps"] == []
        assert "(A)" not in row["question"] and "Options" not in row["question"] and row[label]
    sizes = [[image.size for image in open_images(row)] for row in dataset]
    of_one, of_two = [(48, 48)], [(48, 48)] * 2
    assert sizes == ([of_one] * 3 + [of_two] * 2 if name == "blink" else [of_one] * len(dataset))


@pytest.mark.parametrize("name", data.TEST_ONLY)
def test_samples_depend_on_the_seed_alone(name, tmp_path):
    def rows(folder, seed):
        dataset = data.load_examples(name, split="test", **sample(name, tmp_path / folder, num_rows=2, seed=seed))
        return [(row["answers"], [image.tobytes() for image in open_images(row)]) for row in dataset]

    assert rows("a", 1) == rows("b", 1) != rows("c", 2)


@pytest.mark.parametrize("name", data.TEST_ONLY)
def test_a_benchmark_has_no_split_to_train_on(name, tmp_path):
    options = sample(name, tmp_path, num_rows=2)
    for split in ("train", "validation"):
        error_of(
            lambda split=split: data.load_examples(name, split=split, **options),
            *(f"{name} has no split {split!r}", "benchmark", "'test'", "train and validate on another data set"),
        )
    error_of(lambda: data.load_examples(name, split="tset", **options), "'tset'", "did you mean 'test'")


# MMStar


MMSTAR = {
    "index": 0,
    "question": "Which option describe the relation?\nOptions: A: The cat, a grey one, is on it., B: It is 3, 4, "
    "C: nan, D: nan",
    "answer": "B",
    "category": "instance reasoning",
    "l2_category": "cross-instance relation reasoning",
    "image": png(),
}


def mmstar_rows(folder, **changes):
    write_rows(folder / "mmstar.parquet", [{**MMSTAR, **changes}])
    return data.load_examples("mmstar", split="test", path=folder)


def test_a_published_row_of_mmstar(tmp_path):
    (row,) = mmstar_rows(tmp_path / "m")
    assert row["question"] == "Which option describe the relation?"
    assert row["choices"] == ["The cat, a grey one, is on it.", "It is 3, 4"]
    assert (row["answers"], row["category"], row["row_id"]) == (["It is 3, 4"], "instance reasoning", "m val row 0")
    assert open_images(row)[0].tobytes() == picture().tobytes()


@pytest.mark.parametrize(
    ("text", "question", "choices"),
    [
        ("Is it day?\nOptions: A: Yes\nB: No", "Is it day?", ["Yes", "No"]),
        ("Is it day?\nOptions: A:Yes,B:No", "Is it day?", ["Yes", "No"]),
        ("Is it day?\nOptions: A. Yes, B. No", "Is it day?", ["Yes", "No"]),
        (
            "Hint: Please answer the question and provide the correct option letter, e.g., A, B.\n"
            "Question: How many men: <image 1>?\nChoices:\n(A) 10\n(B) 15",
            "How many men: ?",
            ["10", "15"],
        ),
        ("<image 1> Which one?\n(A) the first (A) of them\n(B) the second", "Which one?", None),
        ("Is it day? Options: A: Yes, sir, B: No", "Is it day?", ["Yes, sir", "No"]),
        ("Is it day? Options: A. Yes B. No", "Is it day?", ["Yes", "No"]),
        ("Is it day?\nOptions: (A) Yes (B) No", "Is it day?", ["Yes", "No"]),
        ("How many options: 3 or 4? Choices: (A) 3 (B) 4", "How many options: 3 or 4?", ["3", "4"]),
        ("<image 1> Is it day? (A) Yes (B) No", "Is it day?", ["Yes", "No"]),
    ],
)
def test_both_layouts_of_options_become_choices(text, question, choices, tmp_path):
    (row,) = mmstar_rows(tmp_path, question=text)
    assert row["question"] == question
    assert row["choices"] == (choices or ["the first (A) of them", "the second"])


def test_an_option_nan_stays_where_it_is_the_answer(tmp_path):
    (row,) = mmstar_rows(tmp_path, answer="C")
    assert row["choices"][2:] == ["nan", "nan"] and row["answers"] == ["nan"]


def test_results_may_be_broken_down_by_the_finer_category(tmp_path):
    options = sample("mmstar", tmp_path)
    rows = data.load_examples("mmstar", split="test", categories="l2_category", **options)
    assert set(rows["category"]) == {fine for _, fine in mmstar.CATEGORIES_OF_SAMPLE}
    error_of(
        lambda: data.load_examples("mmstar", split="test", categories="l2", **options), "'l2'", "category, l2_category"
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"question": "Which one?"}, ("row 0", "'question'", "no line `Options:`")),
        ({"question": "Which one?\nOptions: A: one"}, ("'question'", "['one']", "two or more")),
        ({"answer": "E"}, ("row 0", "'answer'", "'E'", "A to D")),
        ({"category": ""}, ("row 0", "'category'", "empty")),
    ],
)
def test_rows_of_mmstar_that_cannot_be_read_name_field_and_remedy(changes, parts, tmp_path):
    error_of(lambda: mmstar_rows(tmp_path, **changes), *parts)


def test_a_benchmark_of_several_splits_gives_the_one_called_val(tmp_path):
    for split in ("val", "test"):
        write_rows(tmp_path / "b" / f"{split}-00000-of-00001.parquet", [{**MMSTAR, "category": split}])
    assert hub.read_benchmark(tmp_path / "b")["category"] == ["val"]
    (tmp_path / "b" / "val-00000-of-00001.parquet").rename(tmp_path / "b" / "train-00000-of-00001.parquet")
    error_of(lambda: hub.read_benchmark(tmp_path / "b"), "train, test", "none called val")


# MMVP


CSV = """Index,Question,Options,Correct Answer
1,Are the butterfly's wings closer to being open or closed?,(a) Open (b) Closed,(a)
2,Are the butterfly's wings closer to being open or closed?,(a) Open (b) Closed,(b)
3,"In the picture, is it a cat?",(a) Yes (it is) (b) No,(b)
4,"In the picture, is it a cat?",(a) Yes (it is) (b) No,(a)
"""


def write_mmvp(folder, text=CSV):
    (folder / "MMVP Images").mkdir(parents=True)
    for number in range(1, 5):
        Pictures.new("RGB", (8, 8), (60 * number, 0, 0)).save(folder / "MMVP Images" / f"{number}.jpg")
    (folder / "Questions.csv").write_text(text, encoding="utf-8")
    return {"folder": folder}


def test_published_rows_of_mmvp_are_pairs(tmp_path):
    rows = [*data.load_examples("mmvp", split="test", **write_mmvp(tmp_path))]
    assert [row["pair"] for row in rows] == ["1", "1", "2", "2"]
    assert [row["answers"] for row in rows] == [["Open"], ["Closed"], ["No"], ["Yes (it is)"]]
    assert rows[2]["choices"] == ["Yes (it is)", "No"] and rows[2]["question"] == "In the picture, is it a cat?"
    assert [row["row_id"] for row in rows] == [f"Questions.csv row {index}" for index in range(4)]
    red = [open_images(row)[0].getpixel((4, 4))[0] for row in rows]
    assert red == sorted(red) and len(set(red)) == 4


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("Options", "Choices", ("Questions.csv", "'Choices'", "Index, Question, Options, Correct Answer")),
        ("3,", "three,", ("row 2", "'Index'", "'three'", "from 1")),
        ("(it is) (b) No,(b)", "(it is),(b)", ("row 2", "'Options'", "two or more")),
        ("(b)\n3", "(c)\n3", ("row 1", "'Correct Answer'", "'C'", "A to B")),
        ("4,", "9,", ("row 3", "'image'", "9.jpg", "no file")),
    ],
)
def test_rows_of_mmvp_that_cannot_be_read_name_field_and_remedy(old, new, parts, tmp_path):
    assert old in CSV
    options = write_mmvp(tmp_path, CSV.replace(old, new, 1))
    error_of(lambda: data.load_examples("mmvp", split="test", **options), *parts)


# V*Bench


VSTAR = {
    "image": "direct_attributes/sa_4690.jpg",
    "text": "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
    "Answer with the option's letter from the given choices directly.",
    "category": "direct_attributes",
    "label": "C",
    "question_id": "0",
}
ANNOTATION = {
    "target_object": ["glove"],
    "bbox": [[564, 142, 155, 157]],
    "question": "What is the material of the glove?",
    "options": [f"The material of the glove is {name}." for name in ("kevlar", "cotton", "rubber", "leather")],
}


def write_vstar(folder, row=VSTAR, annotation=ANNOTATION, name="sa_4690"):
    for kind in vstar.KINDS:
        public.save_picture(folder / kind / f"{name}.jpg", picture())
        public.save_json(folder / kind / f"{name}.json", annotation)
    (folder / "test_questions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return {"folder": folder}


def test_a_published_row_of_vstar(tmp_path):
    (row,) = data.load_examples("vstar", split="test", **write_vstar(tmp_path))
    assert row["question"] == "What is the material of the glove?"
    assert row["choices"] == ["rubber", "cotton", "kevlar", "leather"] and row["answers"] == ["kevlar"]
    assert (row["category"], row["row_id"]) == ("direct_attributes", "test_questions.jsonl row 0")
    assert row["images"] == [{"bytes": None, "path": str(tmp_path.resolve() / VSTAR["image"])}]


def test_annotations_show_their_options_in_an_order_that_does_not_tell_the_answer(tmp_path):
    for number in range(40):
        write_vstar(tmp_path, name=f"sa_{number}")
    load = {"split": "test", "source": "annotations", "folder": tmp_path}
    rows = [*data.load_examples("vstar", **load)]
    assert [row["category"] for row in rows] == [kind for kind in vstar.KINDS for _ in range(40)]
    for row in rows:
        assert row["answers"] == ANNOTATION["options"][:1] and {*row["choices"]} == {*ANNOTATION["options"]}
    places = [row["choices"].index(row["answers"][0]) for row in rows]
    assert {places.count(place) for place in range(4)} <= {*range(10, 31)}  # 20 each, were they even
    for kind in vstar.KINDS:  # the same order whatever else is there
        for file in (tmp_path / kind).glob("sa_1*"):
            file.unlink()
    order = {row["row_id"]: row["choices"] for row in rows}
    assert all(order[row["row_id"]] == row["choices"] for row in data.load_examples("vstar", **load))


def test_options_of_vstar_that_cannot_be_read_name_field_and_remedy(tmp_path):
    def load(folder, **options):
        return lambda: data.load_examples("vstar", split="test", folder=folder, **options)

    error_of(load(tmp_path, source="both"), "'both'", "annotations, questions")
    error_of(load(tmp_path), "test_questions.jsonl", "no such file")
    error_of(load(tmp_path, source="annotations"), "direct_attributes", "no *.json file", "relative_position")
    write_vstar(tmp_path / "a", {**VSTAR, "text": "What is it?"})
    error_of(load(tmp_path / "a"), "row 0", "'text'", "begins with (A)")
    write_vstar(tmp_path / "b", {**VSTAR, "label": "E"})
    error_of(load(tmp_path / "b"), "row 0", "'label'", "'E'", "A to D")
    (tmp_path / "b" / VSTAR["image"]).unlink()
    error_of(load(tmp_path / "b", source="annotations"), "sa_4690.json", "no picture of the same name")
    write_vstar(tmp_path / "c", annotation={**ANNOTATION, "options": ["one"]})
    error_of(load(tmp_path / "c", source="annotations"), "sa_4690.json", "'options'", "two or more")


# BLINK


BLINK = {
    "idx": "val_Jigsaw_1",
    "sub_task": "Jigsaw",
    "question": "Which image is the missing part?",
    "image_1": png(),
    "image_2": None,
    "image_3": png(),
    "image_4": None,
    "choices": ["the second image", "the third image"],
    "answer": "(B)",
    "prompt": "Given the first image, which image is the missing part? Select from the following choices.\n"
    "(A) the second image\n(B) the third image",
    "explanation": "",
}


def blink_rows(folder, **changes):
    write_rows(folder / "Jigsaw" / "val-00000-of-00001.parquet", [{**BLINK, **changes}], hub_columns())
    return data.load_examples("blink", split="test", path=folder, tasks=["Jigsaw"])


def hub_columns():
    return tuple(name for name in BLINK if name.startswith("image_"))


def test_a_published_row_of_blink(tmp_path):
    (row,) = blink_rows(tmp_path)
    assert row["question"] == "Given the first image, which image is the missing part?"
    assert row["choices"] == BLINK["choices"] and row["answers"] == ["the third image"]
    assert (row["category"], row["row_id"]) == ("Jigsaw", "Jigsaw Jigsaw val row 0")
    assert [item["bytes"] for item in row["images"]] == [png()] * 2


def test_pictures_of_several_columns_stay_in_their_rows_and_order(tmp_path):
    rows = []
    for number, present in enumerate(("1000", "1011", "1111", "1100")):
        shown = {
            f"image_{place}": png((40 * number, 60 * place, 0)) if flag == "1" else None
            for place, flag in enumerate(present, start=1)
        }
        rows.append({**BLINK, **shown})
    write_rows(tmp_path / "Jigsaw" / "val-00000-of-00001.parquet", rows, hub_columns())
    found = data.load_examples("blink", split="test", path=tmp_path, tasks=["Jigsaw"])
    assert [[item["bytes"] for item in row["images"]] for row in found] == [
        [row[name] for name in hub_columns() if row[name] is not None] for row in rows
    ]


def test_tasks_are_configurations_of_the_hubs_copy(tmp_path):
    sample("blink", tmp_path / "rows")
    shutil.move(tmp_path / "rows" / "Counting", tmp_path / "hub" / "one")
    shutil.move(tmp_path / "rows" / "Jigsaw", tmp_path / "hub" / "two")
    configs = [
        {"config_name": task, "data_files": [{"split": "val", "path": f"{folder}/val-*"}]}
        for task, folder in (("Counting", "one"), ("Jigsaw", "two"))
    ]
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    rows = data.load_examples("blink", split="test", path=tmp_path / "hub", tasks=["Jigsaw", "Counting", "Jigsaw"])
    assert rows["category"] == ["Jigsaw"] * 2 + ["Counting"] * 3


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"answer": "hidden"}, ("row 0", "'answer'", "'hidden'", "A to B")),
        ({"choices": ["one"]}, ("row 0", "'choices'", "two or more")),
        ({"image_1": None}, ("row 0", "'image_1'", "None", "write the picture's bytes")),
    ],
)
def test_rows_of_blink_that_cannot_be_read_name_field_and_remedy(changes, parts, tmp_path):
    error_of(lambda: blink_rows(tmp_path, **changes), *parts)


@pytest.mark.parametrize(
    ("tasks", "parts"),
    [("Jigsaw", ("'Jigsaw'", "write a list")), ([], ("[]", "all 14")), (["Jigsw"], ("did you mean 'Jigsaw'",))],
)
def test_unknown_tasks_are_refused(tasks, parts, tmp_path):
    error_of(lambda: data.load_examples("blink", split="test", path=tmp_path, tasks=tasks), *parts)
