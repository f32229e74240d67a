"""The prepared data set holds what the loader reads from the captions, by picture, also if it was made in pieces."""

import json
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from mmcoconut import data, prepare_flickr30k
from mmcoconut.data.images import open_images
from mmcoconut.errors import RecipeError
from mmcoconut.prepare_flickr30k import main


NUM_PICTURES = 24
NAMES = [f"{number}.jpg" for number in range(NUM_PICTURES)]
FRACTIONS = [0.5, 0.25, 0.25]
GIVEN = ["train", "restval", "val", "test"]


def caption(name: str, number: int) -> str:
    return f'Caption {number} of "{name}" , a dog .'


def karpathy() -> str:
    rows = [
        {"filename": name, "split": GIVEN[i % 4], "sentences": [{"raw": caption(name, n)} for n in range(3)]}
        for i, name in enumerate(NAMES)
    ]
    return json.dumps({"images": rows, "dataset": "flickr30k"})


def lines(head: str, line) -> str:
    """A table in which the captions of a picture are far apart."""
    return "\n".join([head, *(line(name, number) for number in range(3) for name in NAMES)])


def in_quotes(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


FILES = {
    "results.csv": lambda: lines(
        "image_name| comment_number| comment", lambda name, number: f"{name}| {number}| {caption(name, number)}"
    ),
    "captions.csv": lambda: lines("image,caption", lambda name, number: f"{name},{in_quotes(caption(name, number))}"),
    "dataset_flickr30k.json": karpathy,
    "captions.json": lambda: json.dumps({name: [caption(name, number) for number in range(3)] for name in NAMES}),
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare_flickr30k, "SHARD_SIZE", 4)


@pytest.fixture
def image_root(tmp_path) -> Path:
    root = tmp_path / "flickr30k-images"
    root.mkdir()
    for number, name in enumerate(NAMES):
        quarters = np.random.default_rng(number).integers(256, size=(2, 2), dtype=np.uint8)
        Image.fromarray(quarters).resize((30 + number, 20), Image.Resampling.BICUBIC).save(root / name, quality=95)
    return root


@pytest.fixture
def prepare(tmp_path, image_root):
    """The command with these captions; the folder that it makes."""

    def run(file: str = "captions.json", *options: str, output_dir: str = "flickr30k") -> Path:
        (tmp_path / file).write_text(FILES[file](), encoding="utf-8")
        command = ["--file", str(tmp_path / file), "--image_root", str(image_root)]
        command += ["--output_dir", str(tmp_path / output_dir), "--fractions", *map(str, FRACTIONS), *options]
        main(command)
        return tmp_path / output_dir

    return run


def rows_of(folder: Path) -> dict[str, list[dict]]:
    loaded = datasets.load_from_disk(folder)
    undecoded = {split: rows.cast_column("image", datasets.Image(decode=False)) for split, rows in loaded.items()}
    return {split: rows[:] for split, rows in undecoded.items()}


def without(row: dict, *fields: str) -> dict:
    return {field: value for field, value in row.items() if field not in fields}


@pytest.mark.parametrize("row_per_caption", [False, True])
@pytest.mark.parametrize("file", FILES)
def test_prepared_rows_equal_those_of_the_file(file, row_per_caption, prepare, tmp_path, image_root):
    folder = prepare(file)
    source = {"file": tmp_path / file, "image_root": image_root, "fractions": FRACTIONS}
    seen = []
    for split in data.SPLITS:
        options = {"split": split, "row_per_caption": row_per_caption}
        direct = data.load_examples("flickr30k", **options, **source)
        prepared = data.load_examples("flickr30k", **options, path=str(folder))
        assert prepared.features == direct.features
        for row, expected in zip(prepared, direct, strict=True):
            assert without(row, "images", "row_id") == without(expected, "images", "row_id")
            (image,), (file_of_image,) = row["images"], expected["images"]
            assert image["bytes"] == Path(file_of_image["path"]).read_bytes()
            assert image["path"] == Path(file_of_image["path"]).name
            assert re.fullmatch(rf"flickr30k {split} row \d+( caption [012])?", row["row_id"])
        seen += [row["images"][0]["path"] for row in prepared.select(range(0, len(prepared), 1 + 2 * row_per_caption))]
    assert sorted(seen) == sorted(NAMES)  # every picture, in one split only, whatever its captions


@pytest.mark.parametrize("file", FILES)
def test_no_picture_is_in_two_splits(file, prepare):
    splits = {split: rows["filename"] for split, rows in rows_of(prepare(file)).items()}
    assert list(splits) == list(data.SPLITS) and all(splits.values())
    assert sorted(name for names in splits.values() for name in names) == sorted(NAMES)
    if file == "dataset_flickr30k.json":
        assert splits["validation"] == NAMES[2::4] and splits["test"] == NAMES[3::4]
    else:
        assert splits == {
            split: [name for name in NAMES if data.split_of(name.encode(), FRACTIONS) == split]
            for split in data.SPLITS
        }


@pytest.mark.parametrize("killed_after", [0, 5, 9, 23])
def test_a_stopped_preparation_goes_on_to_the_same_data_set(killed_after, prepare, monkeypatch, tmp_path):
    whole = rows_of(prepare(output_dir="whole"))
    read, picture_bytes = [], prepare_flickr30k.picture_bytes

    def interrupted(path, *arguments):
        if len(read) == killed_after:
            raise KeyboardInterrupt
        read.append(path.name)
        return picture_bytes(path, *arguments)

    monkeypatch.setattr(prepare_flickr30k, "picture_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert not (tmp_path / "flickr30k").exists()
    killed_after, finished = -1, sum(len(rows["filename"]) for rows in shards_of(tmp_path / "flickr30k.partial"))
    assert len(read) - 4 < finished <= len(read)
    first, read = read, []
    folder = prepare()
    assert len(read) == NUM_PICTURES - finished and len({*first, *read}) == NUM_PICTURES
    assert rows_of(folder) == whole
    assert not (tmp_path / "flickr30k.partial").exists()


def shards_of(partial: Path) -> list[dict]:
    return [datasets.load_from_disk(shard)[:] for shard in sorted(partial.glob("*-??????"))]


@pytest.mark.parametrize(
    ("function", "cut"),
    [("save_to_disk", "validation-000000.new"), ("save_to_disk", "validation"), ("replace", "out")],
)
def test_a_preparation_stopped_while_it_writes_goes_on(function, cut, prepare, monkeypatch, tmp_path):
    """A shard, a split of the whole, or the last moment: the folder has its name, and its parts are still there."""
    whole = rows_of(prepare(output_dir="whole"))
    owner = Path if function == "replace" else datasets.Dataset
    write = getattr(owner, function)

    def cut_short(self, target, *arguments, **options):
        write(self, target, *arguments, **options)
        if Path(target).name == cut:
            for file in Path(target).glob("*.arrow"):
                file.write_bytes(b"half of it")
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, function, cut_short)
        prepare(output_dir="out")
    assert (tmp_path / "out.partial").exists()
    assert rows_of(prepare(output_dir="out")) == whole
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_preparation_reads_no_picture_again(prepare, monkeypatch, capsys):
    prepare("dataset_flickr30k.json")
    table = capsys.readouterr().out
    assert "| train | 12 | 36 | 0 |\n| validation | 6 | 18 | 0 |\n| test | 6 | 18 | 0 |" in table
    monkeypatch.setattr(prepare_flickr30k, "picture_bytes", None)
    prepare("dataset_flickr30k.json")
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("partly", [False, True])
def test_a_folder_made_with_other_options_is_refused_with_their_names(partly, prepare, tmp_path):
    folder = prepare()
    if partly:
        folder.rename(tmp_path / "flickr30k.partial")
    message = "max_image_size was None and is 9.*Delete it, or set another --output_dir"
    with pytest.raises(ValueError, match=message):
        prepare("captions.json", "--max_image_size", "9")
    with pytest.raises(ValueError, match="file was '.*captions.json' and is '.*results.csv'; sha256_of_file was"):
        prepare("results.csv")


def test_a_folder_of_something_else_is_left_alone(prepare, tmp_path):
    (tmp_path / "flickr30k").mkdir()
    (tmp_path / "flickr30k" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="flickr30k is not empty and was not made by this command"):
        prepare()
    assert [file.name for file in (tmp_path / "flickr30k").iterdir()] == ["thesis.tex"]


def test_larger_pictures_are_made_smaller_and_others_stay(prepare, image_root):
    rows = rows_of(prepare("captions.json", "--max_image_size", "40"))
    for split in rows.values():
        for image, name in zip(split["image"], split["filename"], strict=True):
            (picture,) = open_images({"images": [image], "row_id": name})
            (original,) = open_images({"images": [{"bytes": None, "path": image_root / name}], "row_id": name})
            if original.width <= 40:
                assert image["bytes"] == (image_root / name).read_bytes()
                continue
            assert picture.size == (40, round(20 * 40 / original.width))
            difference = np.asarray(picture, int) - np.asarray(original.resize(picture.size), int)
            assert np.abs(difference).mean() < 4  # of another picture, tens
    assert sum(len(split["filename"]) for split in rows.values()) == NUM_PICTURES


@pytest.mark.parametrize(
    ("content", "message"), [(None, "there is no such file"), (b"", "is empty"), (b"no picture", "is not a picture")]
)
def test_a_picture_that_cannot_be_read_is_an_error_or_left_out_and_counted(
    content, message, prepare, image_root, tmp_path, capsys
):
    name = NAMES[2]
    (image_root / name).unlink() if content is None else (image_root / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"row 2: image file .*{name}: {message}.*--unreadable_images skip"):
        prepare("dataset_flickr30k.json")
    folder = prepare("dataset_flickr30k.json", "--unreadable_images", "skip", output_dir="skipped")
    assert "| validation | 5 | 15 | 1 |" in capsys.readouterr().out
    assert rows_of(folder)["validation"]["filename"] == NAMES[6::4]


def test_a_wrong_folder_of_pictures_makes_no_empty_data_set(prepare, image_root, tmp_path):
    for name in NAMES:
        (image_root / name).unlink()
    with pytest.raises(ValueError, match="None of the pictures is in .*flickr30k-images: correct --image_root"):
        prepare("captions.json", "--unreadable_images", "skip")
    assert not (tmp_path / "flickr30k").exists()


def test_splits_without_pictures_are_not_made_up(prepare, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "GIVEN", ["val"] * 4)
    folder = prepare("dataset_flickr30k.json")
    assert "| train | 0 | 0 | 0 |\n| validation | 24 | 72 | 0 |" in capsys.readouterr().out
    assert len(data.load_examples("flickr30k", split="validation", path=str(folder))) == NUM_PICTURES
    with pytest.raises(ValueError, match="leave out every row of this split"):
        data.load_examples("flickr30k", split="train", path=str(folder))


def test_a_shard_without_readable_pictures_is_not_in_the_way(prepare, image_root):
    for name in NAMES[3::4][:4]:  # the first shard of the test pictures
        (image_root / name).unlink()
    folder = prepare("dataset_flickr30k.json", "--unreadable_images", "skip")
    assert rows_of(folder)["test"]["filename"] == NAMES[3::4][4:]


@pytest.mark.parametrize("lost", ["file", "image_root"])
def test_what_is_missing_is_named_with_where_it_is_published(lost, tmp_path, image_root):
    given = {"file": tmp_path / "captions.json", "image_root": image_root}
    given["file"].write_text(FILES["captions.json"]())
    given[lost] = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=f"--{lost} {tmp_path / 'nowhere'}: no such") as error:
        main([word for key, value in given.items() for word in (f"--{key}", str(value))])
    for part in (
        "shannon.cs.illinois.edu/DenotationGraph",
        "cs.stanford.edu/people/karpathy/deepimagesent",
        "1000092795.jpg",
    ):
        assert part in str(error.value)


def test_everything_wrong_with_the_command_line_is_said_at_once():
    with pytest.raises(RecipeError) as error:
        main(["--max_image_size", "0"])
    assert [problem[0] for problem in error.value.problems] == ["file", "image_root", "max_image_size"]
    with pytest.raises(ValueError, match="3 numbers, for train, validation, test, that add up to 1"):
        main(["--file", "a", "--image_root", "b", "--fractions", "0.5", "0.6", "0.1"])


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"0.jpg": "a dog"}, ("captions.json row 0", "'0.jpg'", "found 'a dog'; write a list")),
        ({"0.jpg": ["a dog"], "1.jpg": []}, ("captions.json row 1", "'1.jpg'", "the list is empty")),
        ({"0.jpg": ["a dog", " "]}, ("captions.json row 0", "'0.jpg'", "it is empty")),
        ({"": ["a dog"]}, ("captions.json row 0", "'filename'", "it is empty")),
        ({"../0.jpg": ["a dog"]}, ("captions.json row 0", "climbs with '..'")),
    ],
)
def test_captions_by_file_name_that_cannot_be_read_are_refused(content, parts, tmp_path, image_root):
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        main(["--file", str(file), "--image_root", str(image_root), "--output_dir", str(tmp_path / "out")])
    assert [part for part in parts if part not in str(error.value)] == []
    assert not (tmp_path / "out").exists()
