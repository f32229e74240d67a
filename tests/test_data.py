"""Holds the data layer to its schema, and to errors that name the row, the file or field, and the remedy."""

import hashlib
import io
import json
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from mmcoconut import data, images_mmcoconut
from mmcoconut.data import arrow_mazes, json_steps
from mmcoconut.data.images import image_sizes, open_helper_image, open_images, resolve_image_path
from mmcoconut.data.scoring import score
from mmcoconut.images_mmcoconut import MAX_IMAGE_PIXELS, UnreadableImageError


OWN = ("arrow_mazes", "json_steps", "puzzlevqa")  # the others are held in test_public_data.py
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ROW = {"image": "a.png", "question": "Which?", "steps": ["Look.", "Think."], "answer": "2"}
PUZZLE = {
    "image": "images/a.png",
    "question": "Which number is missing?",
    "options": [1, 2, 3],
    "answer": "2",
    "caption": "A grid.",
    "explanation": "It counts.",
    "deduction": "It is 2.",
}


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def noise(width=40, height=30):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row_of(*contents, row_id="train.json row 17"):
    return {"images": [{"bytes": content, "path": None} for content in contents], "row_id": row_id}


def row_at(*paths, row_id="train.json row 17"):
    return {"images": [{"bytes": None, "path": str(path)} for path in paths], "row_id": row_id}


def png_header(width, height):
    """A PNG that promises a size and ends where the pixels begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 1000) + b"IDAT"


def error_of(call, *parts, kind=ValueError):
    """Runs `call`, which must raise `kind` with every part in its message."""
    with pytest.raises(kind) as caught:
        call()
    for part in parts:
        assert str(part) in str(caught.value), f"{part!r} is not in {caught.value}"
    return str(caught.value)


# The one schema


def example(**changes):
    fields = {"images": [], "question": "Q?", "choices": [], "steps": [], "answers": ["a"], "row_id": "x.json row 3"}
    return data.Example(**{**fields, **changes})


def test_features_keep_none_one_and_several_images_undecoded():
    items = [{"bytes": b"not decoded", "path": None}, {"bytes": None, "path": "/not/opened.png"}]
    dataset = data.to_dataset([example(images=items[:count]) for count in range(3)])
    assert dataset.features == data.FEATURES
    assert [row["images"] for row in dataset] == [[], items[:1], items]


@pytest.mark.parametrize("answers", [[], [""], ["a", "  "]])
def test_an_example_has_an_answer_and_no_empty_ones(answers):
    error_of(lambda: example(answers=answers), "x.json row 3", "'answers'", repr(answers), "give at least one")


def test_question_text_adds_the_choices_in_one_fixed_format():
    assert data.question_text({"question": "Q?", "choices": []}) == "Q?"
    assert data.question_text({"question": "Q?", "choices": ["a", "b", "c"]}) == "Q?\nChoices: a, b, c"


@pytest.mark.parametrize(
    "call, parts",
    [
        (lambda: data.load_examples("arow_mazes", split="train"), ("'arow_mazes'", "did you mean 'arrow_mazes'")),
        (lambda: data.load_examples("zzz", split="train"), ("'zzz'", "aokvqa, arrow_mazes, blink")),
        (
            lambda: data.load_examples("arrow_mazes", split="train", grid_sise=3),
            ("'grid_sise'", "did you mean 'grid_size'"),
        ),
        (lambda: data.load_examples("json_steps", split="train"), ("'json_steps'", "'file'", "add it")),
        (lambda: data.load_examples("arrow_mazes", split="trian"), ("'trian'", "did you mean 'train'")),
        (lambda: data.load_examples("puzzlevqa", split="tests", folder="x"), ("'tests'", "did you mean 'test'")),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_valid_one(call, parts):
    error_of(call, *parts)


@pytest.mark.parametrize("name", OWN)
def test_every_data_set_reads_its_own_sample_in_every_split(name, tmp_path):
    options = data.loader_of(name).write_sample(tmp_path, num_rows=3, seed=5)
    for split in data.SPLITS:
        dataset = data.load_examples(name, split=split, **options)
        optional = {key: kind for key, kind in data.OPTIONAL_FEATURES.items() if key in dataset.features}
        assert dataset.features == {**data.FEATURES, **optional} and len(dataset) == 3
        assert len(set(dataset["row_id"])) == 3
        for row in dataset:
            assert [image.size for image in open_images(row)] == [(48, 48)]
            assert row["steps"] and row["answers"][0]
            assert not row["choices"] or row["answers"][0] in row["choices"]


@pytest.mark.parametrize("name", OWN)
def test_samples_depend_on_the_seed_alone(name, tmp_path):
    def questions(folder, seed):
        options = data.loader_of(name).write_sample(tmp_path / folder, num_rows=4, seed=seed)
        rows = data.load_examples(name, split="test", **options)
        return [(open_images(row)[0].tobytes(), row["steps"], row["answers"]) for row in rows]

    assert questions("a", 1) == questions("b", 1) != questions("c", 2)


def test_drop_unreadable_leaves_out_bad_rows_and_reports_each(tmp_path):
    good = {"bytes": encoded(noise()), "path": None}
    bad = {"bytes": encoded(noise())[:700], "path": None}
    missing = {"bytes": None, "path": str(tmp_path / "gone.png")}
    items = [[good], [bad], [], [good, missing], [good, good]]
    dataset = data.to_dataset(example(images=item, row_id=f"x.json row {i}") for i, item in enumerate(items))
    kept, errors = data.drop_unreadable(dataset)
    assert kept["row_id"] == ["x.json row 0", "x.json row 2", "x.json row 4"]
    assert kept.features == data.FEATURES
    assert len(errors) == 2 and "x.json row 1" in errors[0] and "x.json row 3" in errors[1]
    assert "gone.png" in errors[1] and "no such file" in errors[1]


def test_drop_unreadable_keeps_a_good_data_set_whole():
    dataset = data.load_examples("arrow_mazes", split="test", num_rows=5)
    kept, errors = data.drop_unreadable(dataset)
    assert kept is dataset and errors == []


# Pictures


def test_several_images_open_in_order_from_bytes_and_from_files(tmp_path):
    (tmp_path / "b.png").write_bytes(encoded(Image.new("RGB", (2, 3), (9, 8, 7))))
    row = {"row_id": "r", "images": row_of(encoded(noise()))["images"] + row_at(tmp_path / "b.png")["images"]}
    first, second = open_images(row)
    assert first.tobytes() == noise().tobytes()
    assert (second.mode, second.size, second.getpixel((1, 2))) == ("RGB", (2, 3), (9, 8, 7))


def test_a_row_without_images_opens_to_an_empty_list():
    assert open_images(row_of()) == []


def test_an_opened_image_outlives_its_file(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(noise()))
    (image,) = open_images(row_at(tmp_path / "a.png"))
    (tmp_path / "a.png").unlink()
    assert image.tobytes() == noise().tobytes()


def test_a_missing_file_is_refused_by_row_and_path(tmp_path):
    path = tmp_path / "gone.png"
    error_of(lambda: open_images(row_at(path)), "train.json row 17", path, "replace", kind=UnreadableImageError)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    error_of(lambda: open_images(row_at(tmp_path)), "row 17", tmp_path, "replace", kind=UnreadableImageError)


def test_an_item_without_bytes_or_path_is_refused():
    row = {"row_id": "x row 4", "images": [{"bytes": None, "path": None}]}
    error_of(lambda: open_images(row), "x row 4", "neither bytes nor a path", kind=UnreadableImageError)


@pytest.mark.parametrize(
    "content, found",
    [
        (b"", "empty (0 bytes)"),
        (b"hello, I am text", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (encoded(noise())[:1000], "cut short"),
        (encoded(noise(), "JPEG")[:1000], "cut short"),
        (encoded(noise())[:300] + b"\0" * 900 + encoded(noise())[1200:], "damaged"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "mode F"),
    ],
)
@pytest.mark.parametrize("from_file", [True, False])
def test_bad_pictures_are_refused_by_row_file_and_remedy(content, found, from_file, tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    row = row_at(path) if from_file else row_of(content)
    name = path if from_file else "image file 0 (bytes"
    error_of(
        lambda: open_images(row),
        "train.json row 17",
        name,
        found,
        "unreadable_images: skip",
        kind=UnreadableImageError,
    )


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow's, for TIFF
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_a_cut_picture_is_never_filled_up(format):
    whole = encoded(noise(), format)
    expected = open_images(row_of(whole))[0].tobytes()
    outcomes = Counter()
    for length in range(1, len(whole), max(1, len(whole) // 60)):
        try:
            (image,) = open_images(row_of(whole[:length]))
        except UnreadableImageError:
            outcomes["refused"] += 1
        else:  # only bytes behind the last pixel are gone
            assert image.tobytes() == expected, f"{format} cut to {length} of {len(whole)} bytes"
    assert outcomes["refused"] > 40


def test_pillows_filling_of_cut_pictures_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    error_of(lambda: open_images(row_of(encoded(noise()))), "LOAD_TRUNCATED_IMAGES is True", "set it to False")


@pytest.mark.parametrize("width, height", [(MAX_IMAGE_PIXELS + 1, 1), (10_000, 9_000), (60_000, 60_000)])
@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_from_its_header_with_both_numbers(width, height, pillow_limit, action, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    monkeypatch.setattr(images_mmcoconut, "to_rgb", lambda image: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        error_of(
            lambda: open_images(row_of(png_header(width, height))),
            "train.json row 17",
            width * height,
            MAX_IMAGE_PIXELS,
            "make the picture smaller",
            kind=UnreadableImageError,
        )


def test_the_limit_itself_is_allowed_and_one_pixel_more_is_not(monkeypatch):
    monkeypatch.setattr(images_mmcoconut, "MAX_IMAGE_PIXELS", 40 * 30)
    assert len(open_images(row_of(encoded(noise(40, 30))))) == 1
    error_of(lambda: open_images(row_of(encoded(noise(1201, 1)))), "1201 x 1 = 1201 pixels", "limit of 1200")


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (1, 1), (0, 0)), (255, 255, 255)),
        (Image.new("L", (1, 1), 77), (77, 77, 77)),
        (Image.new("1", (1, 1), 1), (255, 255, 255)),
        (Image.new("RGB", (1, 1), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE), (1, 2, 3)),
        (Image.fromarray(np.array([[0]], dtype=np.uint16)), (0, 0, 0)),
        (Image.fromarray(np.array([[0x8000]], dtype=np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.array([[0xFFFF]], dtype=np.uint16)), (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb_with_transparency_over_white(image, expected):
    (opened,) = open_images(row_of(encoded(image)))
    assert opened.mode == "RGB"
    assert opened.getpixel((0, 0)) == expected


def test_palette_transparency_lies_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    (opened,) = open_images(row_of(encoded(image, transparency=0)))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (40, 50, 60)]


def test_cmyk_becomes_rgb():
    (opened,) = open_images(row_of(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")))
    assert opened.mode == "RGB" and min(opened.getpixel((4, 4))) > 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[9, 9, 9], [99, 99, 99], [199, 199, 199]]], np.uint8)
    stored = {  # how a camera held that way stores the upright picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (opened,) = open_images(row_of(encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)))
    assert np.array_equal(np.asarray(opened), upright)
    assert image_sizes(row_of(encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif))) == ((3, 2),)


def test_sizes_are_read_without_decoding_and_what_cannot_be_read_is_named(monkeypatch):
    whole, cut = encoded(noise(40, 30), "JPEG"), encoded(noise(), "JPEG")[:1000]
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
        assert image_sizes(row_of(whole, whole)) == ((40, 30), (40, 30))
        assert image_sizes(row_of()) == ()
        assert len(image_sizes(row_of(cut))) == 1
    for content in (b"", b"hello, I am text", png_header(60_000, 60_000)):
        error_of(lambda content=content: image_sizes(row_of(content)), "train.json row 17", kind=UnreadableImageError)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    (opened,) = open_images(row_of(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    assert opened.getpixel((0, 0)) == (255, 0, 0)


def test_an_image_path_resolves_inside_its_root(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert resolve_image_path(tmp_path, "a/b.png", "r") == tmp_path.resolve() / "a" / "b.png"
    assert resolve_image_path(tmp_path, "link/b.png", "r") == tmp_path.resolve() / "real" / "b.png"
    assert resolve_image_path(tmp_path / "link", "b.png", "r") == tmp_path.resolve() / "real" / "b.png"


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../b.png", "a/../../b.png", "a/../b.png", "out/b.png", "", " ", "\0"]
)
def test_an_image_path_that_leaves_its_root_is_refused(path, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "b.png").write_bytes(encoded(noise()))
    (root / "out").symlink_to(outside)
    error_of(
        lambda: resolve_image_path(root, path, "train.json row 17"),
        "train.json row 17",
        "'image'",
        repr(path),
        "write a path relative to the image root",
    )


def test_a_link_to_a_sibling_whose_name_only_begins_like_the_root_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root_secret").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path / "root_secret")
    error_of(lambda: resolve_image_path(tmp_path / "root", "out/b.png", "x row 1"), "x row 1", "root_secret")


# JSON with steps


@pytest.fixture
def load_rows(tmp_path):
    """Writes rows (or raw text) as a JSON file beside a picture `a.png` and loads them."""
    (tmp_path / "a.png").write_bytes(encoded(noise()))
    (tmp_path / "b.png").write_bytes(encoded(noise(5, 5)))

    def load(rows, **options):
        text = rows if isinstance(rows, str) else json.dumps(rows)
        (tmp_path / "train.json").write_text(text, encoding="utf-8")
        options = {"file": str(tmp_path / "{split}.json"), "image_root": str(tmp_path), **options}
        return data.load_examples("json_steps", split="train", **options)

    return load


def test_a_json_list_and_json_lines_load_alike(load_rows, tmp_path):
    rows = [ROW, {**ROW, "question": "A line\u2028separator?"}, {**ROW, "answer": 3, "steps": []}]
    expected = load_rows(rows)[:]
    assert expected == {
        "images": [[{"bytes": None, "path": str(tmp_path.resolve() / "a.png")}]] * 3,
        "question": ["Which?", "A line\u2028separator?", "Which?"],
        "choices": [[]] * 3,
        "steps": [["Look.", "Think."], ["Look.", "Think."], []],
        "answers": [["2"], ["2"], ["3"]],
        "row_id": ["train.json row 0", "train.json row 1", "train.json row 2"],
        "history": [[]] * 3,
    }
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert load_rows(lines)[:] == expected
    assert load_rows("\ufeff\n" + lines.replace("\n", "\r\n\r\n") + "\r\n")[:] == expected


@pytest.mark.parametrize(
    "changes, count",
    [({}, 1), ({"image": None}, 0), ({"image": []}, 0), ({"image": ["a.png", "b.png"]}, 2)],
)
def test_a_row_has_none_one_or_several_images(changes, count, load_rows):
    dataset = load_rows([ROW, {**ROW, **changes}])
    assert len(open_images(dataset[1])) == count


def test_an_absent_image_is_a_text_row(load_rows):
    text_row = {key: value for key, value in ROW.items() if key != "image"}
    assert [len(row["images"]) for row in load_rows([ROW, text_row])] == [1, 0]


def test_text_only_reads_no_picture(load_rows):
    dataset = load_rows([{**ROW, "image": "/content/drive/gone.jpg"}], images_required=False, image_root=None)
    assert dataset["images"][:] == [[]]


@pytest.mark.parametrize(
    "changes, answers",
    [
        ({"answer": 7}, ["7"]),
        ({"answer": 2.5}, ["2.5"]),
        ({"answer": 3.0}, ["3"]),
        ({"answer": -0.0}, ["0"]),
        ({"answer": 1e3}, ["1000"]),
        ({"answer": 1e300}, ["1e+300"]),
        ({"answer": "3.0"}, ["3.0"]),
        ({"answer": "red", "answers": ["blue", "red", 4]}, ["red", "blue", "4"]),
        ({"answer": "yes", "answers": ["no", *["yes"] * 9]}, ["yes", "no", *["yes"] * 8]),
        ({"answer": "no", "answers": ["yes", "yes"]}, ["no", "yes", "yes"]),
        ({"answers": None}, ["2"]),
        ({"answers": []}, ["2"]),
        ({"answer": "1", "choices": [1, "2"]}, ["1"]),
        ({"answer": 2, "choices": [1.0, 2.0]}, ["2"]),
    ],
)
def test_answers_are_strings_as_given_with_the_target_first(changes, answers, load_rows):
    assert load_rows([{**ROW, **changes}])["answers"][0] == answers


def test_rows_have_boxes_and_a_helper_image_where_they_say_so(load_rows, tmp_path):
    boxes = [[0, 0, 4.5, 8], None]
    rows = load_rows([{**ROW, "boxes": boxes, "helper_image": "b.png"}, ROW])
    assert rows["boxes"][:] == [boxes, []]
    assert rows[0]["helper_image"] == {"bytes": None, "path": str(tmp_path.resolve() / "b.png")}
    assert rows[1]["helper_image"] is None and open_helper_image(rows[0]).size == (5, 5)
    assert data.without_pictures(rows).column_names == [name for name in data.FEATURES if name != "images"]
    assert "boxes" not in load_rows([ROW]).features
    text = load_rows([{**ROW, "boxes": boxes, "helper_image": "b.png"}], images_required=False, image_root=None)
    assert text.features == data.FEATURES


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"boxes": [[0, 0, 4, 4]]}, ("'boxes'", "found 1 for 2 steps", "null where")),
        ({"boxes": [[0, 0, 4, 4], [4, 0, 4, 4]]}, ("'boxes'", "[4, 0, 4, 4]", "step 1", "left < right")),
        ({"boxes": [[0, -1, 4, 4], None]}, ("'boxes'", "[0, -1, 4, 4]", "step 0", "from 0")),
        ({"boxes": [[0, 0, 4], None]}, ("'boxes'", "[0, 0, 4]", "[left, top, right, bottom]")),
        ({"boxes": [[0, 0, "4", 4], None]}, ("'boxes'", "'4'", "four numbers")),
        ({"boxes": [{"x": 1}, None]}, ("'boxes'", "{'x': 1}", "write a list")),
        ({"boxes": "all"}, ("'boxes'", "'all'", "write a list")),
        ({"boxes": [[0, 0, 4, 4], None], "image": None}, ("'boxes'", "no picture")),
        ({"helper_image": ["b.png"]}, ("'helper_image'", "['b.png']", "the path of one picture")),
        ({"helper_image": "gone.png"}, ("'helper_image'", "'gone.png'", "there is no file")),
        ({"helper_image": "../b.png"}, ("'helper_image'", "'../b.png'", "climbs")),
        ({"helper_images": "b.png"}, ("'helper_images'", "did you mean 'helper_image'")),
    ],
)
def test_boxes_and_helper_images_that_cannot_be_are_refused(changes, parts, load_rows):
    error_of(lambda: load_rows([ROW, {**ROW, **changes}]), "train.json row 1", *parts)


def test_a_helper_image_that_cannot_be_read_is_named(tmp_path):
    row = {"helper_image": {"bytes": b"hello, I am text", "path": None}, "row_id": "train.json row 17"}
    error_of(lambda: open_helper_image(row), "train.json row 17, field 'helper_image'", "leave the field out")


def test_mazes_know_where_each_step_is_and_show_the_way_when_asked():
    options = {"num_rows": 4, "seed": 3, "cell_size": 8}
    rows, plain = (arrow_mazes.load(split="train", helper_image=flag, **options) for flag in (True, False))
    for row, same, (maze, hops) in zip(rows, plain, arrow_mazes.generate("train", num_rows=4, seed=3), strict=True):
        assert "helper_image" not in same and same["images"] == row["images"] and same["boxes"] == row["boxes"]
        picture, helper = np.asarray(open_images(row)[0]), np.asarray(open_helper_image(row))
        shown = np.zeros(helper.shape[:2], dtype=bool)
        for step, (left, top, right, bottom) in zip(row["steps"], row["boxes"], strict=True):
            assert step == arrow_mazes.cell_name((int(top) // 8, int(left) // 8)) and right - left == bottom - top == 8
            shown[int(top) : int(bottom), int(left) : int(right)] = True
        assert shown.sum() == 64 * len(set(maze.path(hops)))
        assert np.array_equal(helper[shown], picture[shown]) and (helper[~shown] == 128).all()


def test_answers_alone_will_do(load_rows):
    row = {key: value for key, value in ROW.items() if key != "answer"}
    assert load_rows([{**row, "answers": ["dog", "puppy", "dog"], "answer_id": 3}])["answers"][0] == [
        "dog",
        "puppy",
        "dog",
    ]


@pytest.mark.parametrize("metric", ["vqa_accuracy", "aokvqa_da"])
def test_an_answer_that_nine_of_ten_people_gave_is_fully_right(metric, load_rows):
    rows = list(load_rows([{**ROW, "answer": "yes", "answers": ["yes"] * 9 + ["no"]}]))
    assert score(metric, ["### yes"], ["yes"], rows=rows)["scores"] == [1.0]


BAD_FIELDS = [
    ({"question": ...}, "question", "the field is missing among these; add it"),
    ({"steps": ...}, "steps", "the field is missing among these; add it"),
    ({"answer": ...}, "answer", "the field is missing among these; add it"),
    ({"answer": ..., "anwser": "2"}, "anwser", "did you mean 'answer'? Rename it"),
    ({"steps": ..., "step": []}, "step", "did you mean 'steps'? Rename it"),
    ({"answer": ..., "answers": []}, "answers", "write at least one answer"),
    ({"question": 3}, "question", "found 3; write a string, not int"),
    ({"question": " "}, "question", "found ' '; it is empty; write the text, or remove the row"),
    ({"question": "\ud83d"}, "question", "half of a surrogate pair; write the whole character"),
    ({"answer": ""}, "answer", "found ''; it is empty"),
    ({"answer": None}, "answer", "found None; write a string or a number, not NoneType"),
    ({"answer": True}, "answer", "found True; write a string or a number, not bool"),
    ({"answer": ["2"]}, "answer", "found ['2']; write a string or a number, not list"),
    ({"answer": float("nan")}, "answer", "found nan; write a finite number"),
    ({"answers": "red"}, "answers", "found 'red'; write a list"),
    ({"answers": ["red", ""]}, "answers", "found ''; it is empty"),
    ({"steps": "Look."}, "steps", "found 'Look.'; write a list, [] when there are none, not str"),
    ({"steps": None}, "steps", "found None; write a list"),
    ({"steps": ["Look.", 2]}, "steps", "found 2; write a string, not int"),
    ({"steps": ["Look.", ""]}, "steps", "found ''; it is empty"),
    ({"choices": "a, b"}, "choices", "found 'a, b'; write a list"),
    ({"choices": ["a", None]}, "choices", "found None; write a string or a number"),
    ({"choices": ["a", "b"]}, "answer", "found '2'; it is none of the choices ['a', 'b']; write one of them"),
    ({"image": 5}, "image", "found 5; write a path, a list of paths, or null"),
    ({"image": ["a.png", 5]}, "image", "found 5; write a string, not int"),
    ({"image": ""}, "image", "found ''; it is empty"),
    ({"image": "gone.png"}, "image", "found 'gone.png'; there is no file"),
    ({"image": "."}, "image", "found '.'; there is no file"),
    ({"image": "../a.png"}, "image", "write a path relative to the image root"),
    ({"image": "/a.png"}, "image", "write a path relative to the image root"),
    ({"image": ..., "images": ["a.png"]}, "images", "did you mean 'image'? Rename it"),
    ({"choice": ["2"]}, "choice", "did you mean 'choices'? Rename it"),
]


@pytest.mark.parametrize("changes, field, found", BAD_FIELDS)
def test_a_bad_field_is_refused_by_file_row_field_and_remedy(changes, field, found, load_rows):
    row = {key: value for key, value in {**ROW, **changes}.items() if value is not ...}
    error_of(lambda: load_rows([ROW, ROW, row]), "train.json row 2", f"field '{field}'", found)


def test_a_row_that_is_no_object_is_refused(load_rows):
    error_of(lambda: load_rows([ROW, ["a"]]), "train.json row 1", "found ['a']", "write an object with the fields")
    error_of(lambda: load_rows("17\n"), "train.json row 0", "found 17", "write an object with the fields")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "whole, said",
    [
        (
            {"version": 1, "data": [ROW, ROW]},
            ("keys ['data', 'version']", "rows in 'data'; write that list as the whole file"),
        ),
        ({"0": ROW, "1": ROW}, ("a row for each of '0', '1'", "write a list of its values")),
    ],
)
def test_one_object_around_the_rows_is_refused_with_its_keys(whole, said, indent, load_rows):
    error_of(lambda: load_rows(json.dumps(whole, indent=indent)), "train.json", *said)


def test_one_row_may_be_the_whole_file(load_rows):
    assert load_rows(json.dumps(ROW, indent=2))["answers"] == load_rows([ROW])["answers"]


@pytest.mark.parametrize(
    "text, remedy", [("", "copy or download"), (" \n", "copy or download"), ("[]", "at least one")]
)
def test_an_empty_file_is_refused(text, remedy, load_rows, tmp_path):
    error_of(lambda: load_rows(text), tmp_path / "train.json", remedy)


@pytest.mark.parametrize("lines", [False, True])
def test_a_file_cut_anywhere_is_refused_with_its_place(lines, load_rows, tmp_path):
    rows = [ROW, {**ROW, "answer": 3, "image": None, "question": "caf\u00e9?"}]
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=2)
    start = len(json.dumps(ROW)) + 2 if lines else 1
    for length in range(start, len(text)):
        found = error_of(lambda length=length: load_rows(text[:length]), tmp_path / "train.json", "it looks truncated")
        assert re.search(r"line \d+, character \d+: not valid JSON", found)
    if lines:
        error_of(lambda: load_rows(text[:-3]), "line 2, character")


def test_a_file_cut_inside_a_character_is_refused(load_rows, tmp_path):
    load_rows([ROW])
    (tmp_path / "train.json").write_bytes('[{"question": "caf\u00e9'.encode()[:-1])
    file = {"train": str(tmp_path / "train.json")}
    error_of(
        lambda: json_steps.load(split="train", file=file), tmp_path / "train.json", "byte 18", "UTF-8", "truncated"
    )


def test_a_broken_line_in_the_middle_is_not_called_truncated(load_rows):
    text = f'{json.dumps(ROW)}\n{{"image": \n{json.dumps(ROW)}'
    message = error_of(lambda: load_rows(text), "train.json, line 2, character", "one whole object per line")
    assert "truncated" not in message


def test_a_missing_file_and_split_are_refused(load_rows, tmp_path):
    error_of(lambda: load_rows([ROW], file="gone_{split}.json"), "gone_train.json", "no such file", "correct the path")
    error_of(lambda: load_rows([ROW], file={"trian": "x"}), "split 'train'", "did you mean 'trian'")


def test_one_file_for_every_split_is_refused(load_rows, tmp_path):
    file = str(tmp_path / "train.json")
    error_of(lambda: load_rows([ROW], file=file), file, "{split}", f"{{'train': '{file}'}}")
    assert len(load_rows([ROW], file={"train": file})) == 1


def test_images_are_never_lost_without_a_word(load_rows):
    rows = [{**{key: value for key, value in ROW.items() if key != "image"}, "picture": "a.png"}]
    error_of(lambda: load_rows(rows), "train.json", "'image'", "'picture'", "images_required: false")
    error_of(lambda: load_rows([ROW], image_root=None), "train.json row 0", "'image'", "give the option image_root")


def test_a_file_is_checked_without_decoding_its_pictures(load_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("opened a picture"))
    assert len(load_rows([ROW])) == 1


# Arrow mazes


def read_maze(picture, grid_size):
    """Colour name, arrow and mark of each cell, from the pixels alone."""
    side = picture.width // grid_size
    cells, start = {}, []
    for row in range(grid_size):
        for column in range(grid_size):
            pixels = np.asarray(picture.crop((column * side, row * side, (column + 1) * side, (row + 1) * side)))
            flat = [tuple(int(value) for value in pixel) for pixel in pixels.reshape(-1, 3)]
            (color,) = set(flat) - {(0, 0, 0), (255, 255, 255)}
            name = next(name for name, value in arrow_mazes.PALETTE.items() if value == color)
            edge = side // 4
            inner = pixels[edge:-edge, edge:-edge].sum(-1) == 0
            half = inner.shape[0] // 2
            up_down = int(inner[:half].sum()) - int(inner[-half:].sum())
            left_right = int(inner[:, :half].sum()) - int(inner[:, -half:].sum())
            arrow = ("up" if up_down > 0 else "down") if up_down else ("left" if left_right > 0 else "right")
            cells[row, column] = (name, arrow)
            start += [(row, column)] if (255, 255, 255) in flat else []
    (start,) = start
    return cells, start


def walk(cells, start, hops, grid_size):
    """Names of the cells stood on, the start first, and the last one's colour, one arrow at a time."""
    row, column = start
    names = ["ABCDEFGHIJKLMNOPQRSTUVWXYZ"[column] + str(row + 1)]
    for _ in range(hops):
        arrow = cells[row, column][1]
        if arrow == "up":
            row = grid_size - 1 if row == 0 else row - 1
        elif arrow == "down":
            row = 0 if row == grid_size - 1 else row + 1
        elif arrow == "left":
            column = grid_size - 1 if column == 0 else column - 1
        else:
            column = 0 if column == grid_size - 1 else column + 1
        names.append("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[column] + str(row + 1))
    return names, cells[row, column][0]


@pytest.mark.parametrize(
    "grid_size, num_colors, max_hops, cell_size", [(3, 6, 3, 16), (2, 2, 5, 8), (5, 8, 9, 12), (4, 6, 4, 33)]
)
def test_steps_and_answer_are_what_a_second_walker_reads_off_the_picture(grid_size, num_colors, max_hops, cell_size):
    options = {"grid_size": grid_size, "num_colors": num_colors, "max_hops": max_hops, "cell_size": cell_size}
    for row in data.load_examples("arrow_mazes", split="train", num_rows=80, **options):
        hops = int(re.search(r"follow (\d+) arrow", row["question"])[1])
        (picture,) = open_images(row)
        assert picture.size == (grid_size * cell_size, grid_size * cell_size)
        cells, start = read_maze(picture, grid_size)
        steps, color = walk(cells, start, hops, grid_size)
        assert (row["steps"], row["answers"], row["choices"]) == (steps, [color], [])


def test_a_known_maze_walks_over_the_edges():
    arrows = ("left", "up", "down", "right", "down", "up", "up", "right", "right")
    colors = ("red", "green", "blue", "yellow", "pink", "cyan", "red", "green", "blue")
    maze = arrow_mazes.Maze(colors=colors, arrows=arrows, start=(0, 0), grid_size=3)
    assert maze.path(3) == [(0, 0), (0, 2), (1, 2), (0, 2)]
    assert [arrow_mazes.cell_name(cell) for cell in maze.path(2)] == ["A1", "C1", "C2"]
    assert read_maze(arrow_mazes.draw(maze), 3)[0][1, 2] == ("cyan", "up")


def test_questions_count_arrows_in_english():
    rows = data.load_examples("arrow_mazes", split="train", num_rows=50)
    assert set(rows["question"]) == {
        "Start at the marked cell and follow 1 arrow. Which color do you stand on?",
        "Start at the marked cell and follow 2 arrows. Which color do you stand on?",
        "Start at the marked cell and follow 3 arrows. Which color do you stand on?",
    }
    assert rows[17]["row_id"] == "arrow_mazes train row 17"


def test_one_file_is_divided_by_picture_and_without_pictures_by_question(tmp_path):
    rows = [
        {"image": f"{index // 2}.png" if index < 40 else None, "question": f"Q{index}?", "steps": [], "answer": "a"}
        for index in range(80)
    ]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    options = {"file": str(tmp_path / "all.json"), "images_required": False, "fractions": [0.5, 0.25, 0.25]}
    splits = {split: json_steps.load(split=split, **options)["question"] for split in ("train", "validation", "test")}
    assert sorted(sum(map(list, splits.values()), [])) == sorted(row["question"] for row in rows)
    assert all(10 <= len(questions) <= 50 for questions in splits.values())
    for questions in splits.values():
        assert all(f"Q{index ^ 1}?" in questions for index in range(40) if f"Q{index}?" in questions)
    with pytest.raises(ValueError, match="split 'test' gets none of its 80 rows at fractions"):
        json_steps.load(split="test", **options | {"fractions": [0.5, 0.5, 0.0]})
    with pytest.raises(ValueError, match="add up to 1"):
        json_steps.load(split="test", **options | {"fractions": [0.5, 0.6, 0.0]})
    with pytest.raises(ValueError, match="remove fractions, or name one file"):
        json_steps.load(split="test", **options | {"file": "{split}.json"})


def test_mazes_as_text_are_the_same_mazes_and_say_all_that_an_answer_needs():
    """The way is walked through the lines of the question alone."""
    options = {"split": "train", "num_rows": 30, "seed": 3, "max_hops": 4}
    rows, drawn = (
        data.load_examples("arrow_mazes", as_text=True, **options),
        data.load_examples("arrow_mazes", **options),
    )
    assert (
        rows["steps"] == drawn["steps"] and rows["answers"] == drawn["answers"] and rows["row_id"] == drawn["row_id"]
    )
    for row in rows:
        *lines, question = row["question"].splitlines()
        cells = {line[:2]: line[3:].split(" ") for line in lines}
        start, hops = re.fullmatch(
            r"Start at (..) and follow (\d) arrows?. Which color do you stand on\?", question
        ).groups()
        way = [start]
        for _ in range(int(hops)):
            way.append(cells[way[-1]][0])
        assert row["images"] == [] and row["steps"] == way and row["answers"] == [cells[way[-1]][1]]
    with pytest.raises(ValueError, match="helper_image is true and as_text is true"):
        data.load_examples("arrow_mazes", as_text=True, helper_image=True, **options)


def test_mazes_depend_on_the_seed_alone_and_more_rows_continue_the_list():
    few = data.load_examples("arrow_mazes", split="train", num_rows=30, seed=3)
    many = data.load_examples("arrow_mazes", split="train", num_rows=60, seed=3)
    assert few[:] == many[:30]
    assert few["images"][:] != data.load_examples("arrow_mazes", split="train", num_rows=30, seed=4)["images"][:]


def test_mazes_are_the_same_on_every_machine():
    content = repr(list(arrow_mazes.generate("train", num_rows=100)))
    pixels = b"".join(arrow_mazes.draw(maze).tobytes() for maze, _ in arrow_mazes.generate("train", num_rows=100))
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "d75c1d6b2a09fcf0"
    assert hashlib.sha256(pixels).hexdigest()[:16] == "200204d97b5c830c"


def test_mazes_of_different_splits_share_no_puzzle():
    # Few possible mazes and different seeds: drawn without splitting, these would collide thousands of times.
    options = {"grid_size": 2, "num_colors": 2, "max_hops": 3}
    grids, pictures = {}, {}
    for seed, split in enumerate(data.SPLITS):
        puzzles = list(arrow_mazes.generate(split, num_rows=2000, seed=seed, **options))
        assert len(puzzles) == len(set(puzzles)) == 2000
        grids[split] = {(maze.colors, maze.arrows) for maze, _ in puzzles}
        pictures[split] = {(arrow_mazes.draw(maze, 8).tobytes(), hops) for maze, hops in puzzles}
        assert len(pictures[split]) == 2000
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not grids[one] & grids[other]
        assert not pictures[one] & pictures[other]


def test_a_row_of_the_data_set_is_the_puzzle_generated_at_its_place():
    options = {"num_rows": {"train": 20, "test": 5}, "seed": 9, "max_hops": 4}
    rows = data.load_examples("arrow_mazes", split="test", **options)
    for row, (maze, hops) in zip(rows, arrow_mazes.generate("test", **options), strict=True):
        assert open_images(row)[0].tobytes() == arrow_mazes.draw(maze).tobytes()
        assert len(row["steps"]) == hops + 1


def test_hops_are_uniform():
    counts = Counter(hops for _, hops in arrow_mazes.generate("train", num_rows=6000, min_hops=2, max_hops=5))
    assert sorted(counts) == [2, 3, 4, 5]
    # Four standard deviations of a binomial count with p = 1/4.
    assert max(abs(count - 1500) for count in counts.values()) < 4 * (6000 * 0.25 * 0.75) ** 0.5


def test_an_arrow_is_read_by_a_linear_map_also_on_colors_it_has_not_seen():
    def patches(colors):
        tiles = [
            (np.asarray(arrow_mazes._tile(color, arrow, marked=marked, cell_size=16)).ravel() / 255, index)
            for color in colors
            for index, arrow in enumerate(arrow_mazes.DIRECTIONS)
            for marked in (False, True)
        ]
        return np.stack([tile for tile, _ in tiles]), np.array([index for _, index in tiles])

    colors = list(arrow_mazes.PALETTE)
    for unseen in colors:
        x, y = patches([color for color in colors if color != unseen])
        weights = np.linalg.lstsq(x, np.eye(4)[y], rcond=1e-6)[0]
        x, y = patches([unseen])
        assert np.array_equal((x @ weights).argmax(-1), y), unseen


def test_colors_are_far_from_each_other_and_from_black_and_white():
    values = [*arrow_mazes.PALETTE.values(), (0, 0, 0), (255, 255, 255)]
    distances = [np.linalg.norm(np.subtract(a, b)) for i, a in enumerate(values) for b in values[:i]]
    assert min(distances) > 80


def test_draw_path_shows_the_same_maze_larger_with_the_way_on_it():
    maze, hops = next(arrow_mazes.generate("train", num_rows=1, min_hops=3))
    plain = arrow_mazes.draw(maze)
    plain = plain.resize((plain.width * arrow_mazes.PATH_SCALE,) * 2, Image.Resampling.NEAREST)
    drawn = arrow_mazes.draw_path(maze, hops)
    changed = np.any(np.asarray(plain) != np.asarray(drawn), axis=-1)
    side = drawn.width // 3
    cells = {(row, column) for row in range(3) for column in range(3)}
    touched = {
        (r, c)
        for r, c in cells
        if changed[r * side + 8 : r * side + side - 8, c * side + 8 : c * side + side - 8].any()
    }
    assert touched == set(maze.path(hops))


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"num_rows": 0}, ("num_rows is 0", "at least 1")),
        ({"num_rows": {"test": 5}}, ("'train'", "['test']", "add it")),
        ({"grid_size": 0}, ("grid_size is 0", "1 to 26")),
        ({"grid_size": 27}, ("grid_size is 27", "1 to 26")),
        ({"num_colors": 9}, ("num_colors is 9", "2 to 8")),
        ({"num_colors": 1}, ("num_colors is 1", "2 to 8")),
        ({"min_hops": 4}, ("min_hops is 4", "max_hops is 3", "min_hops <= max_hops")),
        ({"min_hops": 0}, ("min_hops is 0", "1 <=")),
        ({"cell_size": 7}, ("cell_size is 7", "8", "raise cell_size")),
        ({"grid_size": 1, "num_rows": 40}, ("num_rows is 40", "72 puzzles", "raise grid_size")),
    ],
)
def test_impossible_mazes_are_refused_with_both_numbers(options, parts):
    options = {"num_rows": 5, **options}
    error_of(lambda: data.load_examples("arrow_mazes", split="train", **options), *parts)


def test_a_split_that_got_no_grid_of_a_tiny_space_is_refused():
    def generate(split):
        return list(arrow_mazes.generate(split, num_rows=1, grid_size=1, num_colors=2, max_hops=3))

    empty = {"validation", "test"} - {
        data.split_of(arrow_mazes.Maze((color,), (arrow,), (0, 0), 1).layout(), arrow_mazes.FRACTIONS)
        for color in ("red", "green")
        for arrow in arrow_mazes.DIRECTIONS
    }
    assert empty
    for split in empty:
        error_of(lambda split=split: generate(split), "num_rows is 1", split, "24 puzzles", "raise grid_size")


# PuzzleVQA


@pytest.fixture
def load_puzzles(tmp_path):
    """Writes puzzles of the kind `venn` beside a picture and loads them, all in the split `train`."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(noise()))

    def load(rows, **options):
        (tmp_path / "venn.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        options = {"folder": str(tmp_path), "split": "train", "fractions": [1, 0, 0], **options}
        return data.load_examples("puzzlevqa", **options)

    return load


@pytest.mark.parametrize("options, answer", [([1, 2], "2"), (["1", "2"], 2), (["1", "2"], "2"), ([1, 2], 2)])
def test_numbers_and_strings_meet_in_options_and_answer(options, answer, load_puzzles):
    row = load_puzzles([{**PUZZLE, "options": options, "answer": answer}])[0]
    assert (row["choices"], row["answers"]) == (["1", "2"], ["2"])
    assert row["steps"] == ["A grid.", "It counts.", "It is 2."]
    assert row["row_id"] == "venn.json row 0"


@pytest.mark.parametrize(
    "changes, field, found",
    [
        ({"answer": 9}, "answer", "found '9'; it is none of the options ['1', '2', '3']; write one of them"),
        ({"answer": None}, "answer", "found None; write a string or a number"),
        ({"options": []}, "options", "found []; write the options"),
        ({"options": "1, 2"}, "options", "found '1, 2'; write a list"),
        ({"caption": ...}, "caption", "the field is missing among these; add it"),
        ({"deduction": ""}, "deduction", "found ''; it is empty"),
        ({"question": 4}, "question", "found 4; write a string"),
        ({"image": "images/gone.png"}, "image", "found 'images/gone.png'; there is no file"),
        ({"image": "../a.png"}, "image", "write a path relative to the image root"),
    ],
)
def test_a_bad_puzzle_is_refused_by_file_row_field_and_remedy(changes, field, found, load_puzzles):
    row = {key: value for key, value in {**PUZZLE, **changes}.items() if value is not ...}
    for split in data.SPLITS:
        error_of(lambda split=split: load_puzzles([PUZZLE, row], split=split), "venn.json row 1", f"'{field}'", found)


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"kinds": ["ven"]}, ("'ven'", "did you mean 'venn'")),
        ({"kinds": "venn"}, ("'venn'", "write a list")),
        ({"kinds": []}, ("[]", "write a list")),
        ({"fractions": [0.8, 0.1]}, ("[0.8, 0.1]", "3 numbers", "add up to 1")),
        ({"fractions": [0.8, 0.1, 0.2]}, ("[0.8, 0.1, 0.2]", "add up to 1")),
        ({"fractions": [1.5, -0.5, 0]}, ("[1.5, -0.5, 0]", "add up to 1")),
        ({"split": "test"}, ("'test'", "none of the rows", "raise its fraction")),
        ({"folder": "no/such/folder"}, ("no/such/folder", "no *.json", "give the folder")),
    ],
)
def test_bad_puzzle_options_are_refused_with_the_remedy(options, parts, load_puzzles):
    error_of(lambda: load_puzzles([PUZZLE], **options), *parts)


def test_puzzles_that_share_a_picture_share_a_split(tmp_path):
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(200):
        name = f"images/{index}.png"
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (2, 2), (index // 2, 0, 0))))
        rows.append({**PUZZLE, "image": name})
    (tmp_path / "venn.json").write_text("\n".join(json.dumps(row) for row in rows))
    found = {split: data.load_examples("puzzlevqa", split=split, folder=tmp_path) for split in data.SPLITS}
    colors = {split: {open_images(row)[0].getpixel((0, 0))[0] for row in found[split]} for split in found}
    assert sum(len(part) for part in found.values()) == 200
    assert sum(len(part) for part in colors.values()) == len(set.union(*colors.values())) == 100


# Real data


def real(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the shared data {name} is not beside this repository")
    return path


def test_real_puzzlevqa_divides_into_disjoint_whole_splits():
    folder = real("puzzlevqa")
    found = {split: data.load_examples("puzzlevqa", split=split, folder=folder) for split in data.SPLITS}
    assert sum(len(part) for part in found.values()) == 800
    assert {split: len(part) for split, part in found.items()} == {"train": 650, "validation": 74, "test": 76}
    contents = {
        split: {Path(row["images"][0]["path"]).read_bytes() for row in part.select_columns("images")}
        for split, part in found.items()
    }
    assert sum(len(part) for part in contents.values()) == len(set.union(*contents.values())) == 781
    for part in found.values():
        assert all(row["answers"][0] in row["choices"] and len(row["steps"]) == 3 for row in part)
    kind = data.load_examples("puzzlevqa", split="test", folder=folder, kinds=["venn"])
    assert set(kind["row_id"]) == {row_id for row_id in found["test"]["row_id"] if row_id.startswith("venn.json")}


def test_real_puzzlevqa_pictures_open():
    kept, errors = data.drop_unreadable(data.load_examples("puzzlevqa", split="test", folder=real("puzzlevqa")))
    assert errors == []
    assert {open_images(row)[0].size for row in kept.select(range(10))} == {(512, 512)}


def test_real_aokvqa_loads_as_text_with_its_choices_in_the_question():
    file = {"validation": str(real("aokvqa") / "aokvqa_validation.json")}
    dataset = data.load_examples("json_steps", split="validation", file=file, images_required=False)
    assert len(dataset) == 1145
    choices = "The choices are 0 : toothpick, 1 : food, 2 : popsicle stick, 3 : cigarette"
    assert dataset[0]["question"] == f"What is in the motorcyclist's mouth? {choices}"
    assert (dataset[0]["answers"], dataset[0]["choices"], dataset[0]["images"]) == (["3"], [], [])
    assert {len(steps) for steps in dataset["steps"]} == {3}
    assert dataset[-1]["row_id"] == "aokvqa_validation.json row 1144"


def test_real_aokvqa_with_pictures_names_the_first_one_that_is_not_here(tmp_path):
    file = {"validation": str(real("aokvqa") / "aokvqa_validation.json")}
    error_of(
        lambda: data.load_examples("json_steps", split="validation", file=file, image_root=os.fspath(tmp_path)),
        "aokvqa_validation.json row 0",
        "'image'",
        "/content/drive/MyDrive/images",
        "write a path relative to the image root",
    )
