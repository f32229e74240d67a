"""The same file gives the same pixels by every way in, and they are what was worked out by hand."""

import base64
import functools
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import IMAGE_SIZE, tiny_model, tiny_processor
from transformers import pipeline

from mmcoconut.data.images import open_images
from mmcoconut.demo.one_question import row_of
from mmcoconut.evaluation.answering import Answerer
from mmcoconut.images_mmcoconut import UnreadableImageError, flat_images, read_images
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.curriculum import Curriculum


QUESTION = "What colour is the left square?"
HEIGHT, WIDTH = 12, IMAGE_SIZE
COLUMNS = np.arange(WIDTH)
RAMP = np.linspace(0, 0xFFFF, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
GREY = (np.arange(HEIGHT * WIDTH) % 256).astype(np.uint8).reshape(HEIGHT, WIDTH)
COLOR = np.stack([GREY, 255 - GREY, np.roll(GREY, 5)], axis=-1)
ALPHA = np.broadcast_to(np.where(COLUMNS % 2, 255, 0), (HEIGHT, WIDTH)).astype(np.uint8)
INK = np.dstack([COLOR, np.zeros_like(GREY)])  # cyan, magenta, yellow, and no black


def grey(values) -> np.ndarray:
    """One channel as three."""
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


def over_white(pixels: np.ndarray) -> np.ndarray:
    """RGB where ALPHA is opaque, white where it is transparent."""
    return np.where(ALPHA[..., None] == 255, pixels, 255).astype(np.uint8)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def palette_image() -> Image.Image:
    """Odd columns in colour 1; even ones in colour 0, which its file declares transparent."""
    image = Image.fromarray(np.broadcast_to(COLUMNS % 2, (HEIGHT, WIDTH)).astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    return image


def jpeg_pixels() -> np.ndarray:
    """COLOR as a JPEG keeps it."""
    file = io.BytesIO()
    Image.fromarray(COLOR).save(file, "JPEG", quality=95)
    return np.asarray(Image.open(file))


# A camera held on its side stores rows that are turned: orientation 6 says, turn them clockwise by 90 degrees.
TURNED = np.ascontiguousarray(np.rot90(COLOR))
IN_COLOR = Image.fromarray(COLOR)
FILES = {  # the image, how it is saved, the pixels to be read
    "RGB": (IN_COLOR, "a.png", {}, COLOR),
    "phone": (Image.fromarray(TURNED), "a.png", {"exif": exif(6)}, COLOR),
    "phone JPEG": (IN_COLOR, "a.jpg", {"exif": exif(6), "quality": 95}, np.rot90(jpeg_pixels(), -1)),
    "mirrored TIFF": (Image.fromarray(COLOR[:, ::-1].copy()), "a.tiff", {"exif": exif(2)}, COLOR),
    "16 bits": (Image.fromarray(RAMP), "a.png", {}, grey(RAMP // 256)),
    "16 bits turned": (Image.fromarray(np.rot90(RAMP).copy()), "a.png", {"exif": exif(6)}, grey(RAMP // 256)),
    "16 bits PGM": (Image.fromarray(RAMP), "a.pgm", {}, grey(RAMP // 256)),
    "16 bits TIFF": (Image.fromarray(RAMP), "a.tiff", {}, grey(RAMP // 256)),
    "16 bits big-endian": (
        Image.frombytes("I;16B", RAMP.shape[::-1], RAMP.astype(">u2").tobytes()),
        "a.tiff",
        {},
        grey(RAMP // 256),
    ),
    "16 bits transparent": (
        Image.fromarray(RAMP),
        "a.png",
        {"transparency": 0},
        grey(np.where(RAMP == 0, 255, RAMP // 256)),
    ),
    "32 bits": (Image.fromarray(RAMP.astype(np.int32)), "a.tiff", {}, grey(RAMP // 256)),
    "palette": (
        palette_image(),
        "a.png",
        {},
        np.where((COLUMNS % 2)[None, :, None], [40, 50, 60], [10, 20, 30]).repeat(HEIGHT, axis=0).astype(np.uint8),
    ),
    "palette transparent": (
        palette_image(),
        "a.png",
        {"transparency": 0},
        over_white(np.broadcast_to([40, 50, 60], COLOR.shape)),
    ),
    "RGBA": (Image.fromarray(np.dstack([COLOR, ALPHA])), "a.png", {}, over_white(COLOR)),
    "RGBA WebP": (Image.fromarray(np.dstack([COLOR, ALPHA])), "a.webp", {"lossless": True}, over_white(COLOR)),
    "half transparent": (
        Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 255, 51)),
        "a.png",
        {},
        np.broadcast_to(np.array([204, 204, 255], np.uint8), COLOR.shape),
    ),
    "LA": (Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "a.png", {}, over_white(grey(GREY))),
    "L": (Image.fromarray(GREY), "a.png", {}, grey(GREY)),
    "L transparent": (Image.fromarray(GREY), "a.png", {"transparency": 7}, grey(np.where(GREY == 7, 255, GREY))),
    "1": (Image.fromarray(ALPHA > 0), "a.png", {}, grey(ALPHA)),
    "CMYK": (Image.fromarray(INK, "CMYK"), "a.tiff", {}, 255 - COLOR),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def processor(model):
    return tiny_processor(model)


@pytest.fixture(scope="module")
def pipe(model, processor):
    return pipeline("image-text-to-text", model=model, processor=processor)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A folder, and the address at which this machine serves it."""
    folder = tmp_path_factory.mktemp("served")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def pixels_of(processor, pixels: np.ndarray) -> torch.Tensor:
    """What the image processor makes of pixels (height, width, 3)."""
    return processor.image_processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]


def row_about(path, **item) -> dict:
    """A row of a data set."""
    images = [{"bytes": None, "path": str(path), **item}]
    return {
        "row_id": "r",
        "index": 0,
        "images": images,
        "question": QUESTION,
        "choices": [],
        "steps": ["red"],
        "answers": ["red"],
    }


def chat(**image) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": QUESTION}]}]


def read_by(pipe, **inputs) -> torch.Tensor:
    """The pixels that reach the model when a pipeline is asked."""
    seen = []
    hook = pipe.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.extend(args))
    pipe(**inputs, max_new_tokens=1)
    hook.remove()
    [pixels] = seen
    return pixels


def from_chat(processor, **image) -> torch.Tensor:
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(chat(**image), **options)["pixel_values"]


def from_a_chat(processor, image) -> torch.Tensor:
    return from_chat(processor, image=image)


def from_rendered_text(processor, images) -> torch.Tensor:
    text = processor.apply_chat_template(chat(), add_generation_prompt=True)
    return processor(images=images, text=text, rendered=True, return_tensors="pt")["pixel_values"]


def asked(processor, images, **kwargs) -> torch.Tensor:
    return processor(images=images, text=QUESTION, return_tensors="pt", **kwargs)["pixel_values"]


def encoded(path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def data_url(path) -> str:
    return f"data:image/png;base64,{encoded(path)}"


WAYS = {
    "training": lambda pipe, path: CurriculumCollator(Curriculum(), pipe.processor)([row_about(path)])["pixel_values"],
    "training on bytes": lambda pipe, path: CurriculumCollator(Curriculum(), pipe.processor)(
        [row_about(None, bytes=path.read_bytes())]
    )["pixel_values"],
    "evaluation": lambda pipe, path: Answerer(pipe.model, pipe.processor).inputs([row_about(path)])["pixel_values"],
    "demo": lambda pipe, path: Answerer(pipe.model, pipe.processor).inputs([row_of(QUESTION, str(path))])[
        "pixel_values"
    ],
    "path": lambda pipe, path: asked(pipe.processor, path),
    "path as text": lambda pipe, path: asked(pipe.processor, [str(path)]),
    "PIL": lambda pipe, path: asked(pipe.processor, [[Image.open(path)]]),
    "base64": lambda pipe, path: asked(pipe.processor, encoded(path)),
    "data URL": lambda pipe, path: asked(pipe.processor, data_url(path)),
    "rendered path": lambda pipe, path: from_rendered_text(pipe.processor, str(path)),
    "rendered PIL": lambda pipe, path: from_rendered_text(pipe.processor, [Image.open(path)]),
    "chat with image": lambda pipe, path: from_chat(pipe.processor, image=Image.open(path)),
    "chat with path": lambda pipe, path: from_chat(pipe.processor, path=str(path)),
    "chat with url": lambda pipe, path: from_chat(pipe.processor, url=data_url(path)),
    "chat with base64": lambda pipe, path: from_chat(pipe.processor, base64=encoded(path)),
    "pipeline with image": lambda pipe, path: read_by(pipe, text=chat(image=Image.open(path))),
    "pipeline with path": lambda pipe, path: read_by(pipe, text=chat(path=str(path))),
    "pipeline with url": lambda pipe, path: read_by(pipe, text=chat(url=str(path))),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_way_in_reads_the_pixels_that_were_worked_out_by_hand(kind, pipe, tmp_path):
    image, name, options, expected = FILES[kind]
    image.save(tmp_path / name, **options)
    assert np.array_equal(read_images(tmp_path / name), expected)
    expected = pixels_of(pipe.processor, expected)
    for way, read in WAYS.items():
        assert torch.equal(read(pipe, tmp_path / name), expected), way


@pytest.mark.parametrize("kind", ["RGB", "phone", "phone JPEG", "palette", "L", "1", "CMYK"])
def test_images_beside_a_pipelines_text_are_read_alike_where_transformers_keeps_them_whole(kind, pipe, tmp_path):
    image, name, options, expected = FILES[kind]
    image.save(tmp_path / name, **options)
    pixels = read_by(pipe, images=str(tmp_path / name), text=QUESTION)
    assert torch.equal(pixels, pixels_of(pipe.processor, expected))


@pytest.mark.parametrize("kind", ["RGB", "phone", "16 bits", "RGBA"])
@pytest.mark.parametrize("way", [asked, from_rendered_text, from_a_chat])
def test_urls_are_read_as_files_are(kind, way, processor, server):
    folder, address = server
    image, name, options, expected = FILES[kind]
    image.save(folder / name, **options)
    assert torch.equal(way(processor, f"{address}/{name}"), pixels_of(processor, expected))


# What is no readable image


def a_missing_path(folder):
    return folder / "gone.png", ("gone.png", "there is no such file", "replace the image")


def a_missing_path_as_text(folder):
    return str(folder / "gone.png"), ("gone.png", "there is no such file", "give a path, a URL")


def a_missing_path_that_could_be_base64(folder):
    return "pictures/cat", ("image pictures/cat (no such file", "is not a picture", "give a path, a URL")


def a_folder(folder):
    return str(folder), (str(folder), "cannot be opened")


def a_text_file(folder):
    (folder / "notes.png").write_text("I am text")
    return str(folder / "notes.png"), ("notes.png", "is not a picture", "PNG, JPEG")


def a_cut_file(folder):
    Image.effect_noise((64, 64), 99).save(folder / "a.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:1200])
    return Image.open(folder / "cut.png"), ("cut.png", "is damaged, cut short")


def cut_base64(folder):
    Image.effect_noise((64, 64), 99).save(folder / "a.png")
    return encoded(folder / "a.png")[:1200], ("iVBOR", "(1200 characters)", "is damaged, cut short")


def a_refused_url(folder):
    return "http://127.0.0.1:9/a.png", ("http://127.0.0.1:9/a.png", "cannot be fetched", "check the address")


def a_url_of_nobody(folder):
    return "http://", ("http://", "cannot be fetched", "check the address")


def a_data_url_without_data(folder):
    return "data:image/png;base64", ("data:image/png;base64", "cannot be fetched")


def a_data_url_of_a_text(folder):
    return "data:image/png;base64,SGVsbG8h", ("data:image/png;base64,SGVsbG8h", "is not a picture")


def a_file_of_floats(folder):
    Image.new("F", (4, 4), 0.5).save(folder / "a.tiff")
    return folder / "a.tiff", ("a.tiff", "mode F (floats)", "save it with 8 or 16 bits")


def floats(folder):
    return Image.new("F", (4, 4), 0.5), ("PIL image of mode F", "save it with 8 or 16 bits")


def integers_beyond_16_bits(folder):
    return Image.new("I", (4, 4), 70000), ("PIL image of mode I", "from 70000 to 70000", "65535")


def a_number(folder):
    return 7, ("type int", "give a path, a URL")


UNREADABLE = [
    a_missing_path,
    a_missing_path_as_text,
    a_missing_path_that_could_be_base64,
    a_folder,
    a_text_file,
    a_cut_file,
    cut_base64,
    a_refused_url,
    a_url_of_nobody,
    a_data_url_without_data,
    a_data_url_of_a_text,
    a_file_of_floats,
    floats,
    integers_beyond_16_bits,
    a_number,
]


@pytest.mark.parametrize("way", [asked, from_rendered_text, from_a_chat])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_image_that_cannot_be_read_is_refused_by_name_with_the_remedy(kind, way, processor, tmp_path):
    image, parts = kind(tmp_path)
    with pytest.raises(UnreadableImageError) as caught:
        way(processor, image)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_missing_page_names_address_and_status(processor, server):
    with pytest.raises(UnreadableImageError, match=r"/gone\.png: cannot be fetched \(HTTP Error 404"):
        asked(processor, f"{server[1]}/gone.png")


def test_a_row_says_which_row_and_how_to_leave_it_out(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"^r: image file .*gone\.png: .*`unreadable_images: skip`"):
        open_images(row_about(tmp_path / "gone.png"))


# Lists, arrays, and what is given


def test_nested_and_flat_lists_mix_paths_text_and_pil_images(processor, tmp_path):
    images = [Image.fromarray(np.roll(COLOR, shift, axis=0)) for shift in range(3)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    mixed = [tmp_path / "0.png", str(tmp_path / "1.png"), images[2]]
    three, one = [QUESTION] * 3, {"text": QUESTION, "return_tensors": "pt"}
    several = {"text": three, "return_tensors": "pt", "padding": True}
    expected = processor(images=images, **several)
    for given in (mixed, tuple(mixed), [[image] for image in mixed]):
        assert torch.equal(processor(images=given, **several)["pixel_values"], expected["pixel_values"])
    uneven = processor(images=[mixed[:2], [], mixed[2:]], **several)
    assert torch.equal(uneven["pixel_values"], expected["pixel_values"])
    assert (uneven["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [8, 0, 4]
    assert torch.equal(processor(images=mixed, **one)["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("convert", [np.array, torch.tensor])
def test_arrays_and_tensors_are_read_as_the_image_processor_takes_them(convert, processor):
    expected = pixels_of(processor, COLOR)
    last, first, stack = convert(COLOR), convert(COLOR.transpose(2, 0, 1)), convert(np.stack([COLOR, COLOR]))
    for image in (last, [first], [[last]]):
        assert torch.equal(asked(processor, image), expected)
    assert torch.equal(asked(processor, stack), torch.cat([expected] * 2))
    assert read_images(last) is last


ARRAYS = {  # as arrays of (height, width) or (height, width, channels), and the pixels to be read
    "grey": (GREY, grey(GREY)),
    "one channel": (GREY[..., None], grey(GREY)),
    "16 bits": (RAMP, grey(RAMP // 256)),
    "16 bits in color": (COLOR.astype(np.uint16) * 256 + 7, COLOR),
    "black and white": (ALPHA > 0, grey(ALPHA)),
    "grey with alpha": (np.dstack([GREY, ALPHA]), over_white(grey(GREY))),
    "color with alpha": (np.dstack([COLOR, ALPHA]), over_white(COLOR)),
}


@pytest.mark.parametrize("convert", [np.array, torch.tensor])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_greys_alpha_and_16_bits_are_read_as_their_files_are(kind, convert, processor):
    array, expected = ARRAYS[kind]
    arrays = [array] if array.ndim == 2 else [array, np.ascontiguousarray(array.transpose(2, 0, 1))]
    for image in arrays:
        assert np.array_equal(read_images(convert(image)), expected)
        assert torch.equal(asked(processor, convert(image)), pixels_of(processor, expected))


def test_an_array_of_several_images_goes_round_to_several_texts(processor):
    stack = np.stack([COLOR, 255 - COLOR])
    several = {"text": [QUESTION, QUESTION], "return_tensors": "pt"}
    expected = processor(images=[Image.fromarray(image) for image in stack], **several)
    assert torch.equal(processor(images=stack, **several)["pixel_values"], expected["pixel_values"])
    assert torch.equal(asked(processor, stack), expected["pixel_values"])


@pytest.mark.parametrize("shape", [(4,), (5, 6, 7), (1, 1, 3, 4, 4)])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_an_array_that_is_no_image_is_refused_by_its_shape(shape, kind, processor):
    with pytest.raises(UnreadableImageError, match=r"of shape \(.* and type (float32|uint8): is no image; give"):
        asked(processor, np.zeros(shape, kind))
    with pytest.raises(UnreadableImageError, match=r"of shape \(8, 8, 4\) and type float32"):
        asked(processor, np.zeros((8, 8, 4), np.float32))


@pytest.mark.parametrize("kind", FILES)
def test_a_pil_image_stays_as_it_is_and_is_read_once_as_twice(kind, tmp_path):
    image, name, options, expected = FILES[kind]
    image.save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as opened:
        opened.load()
        before = (opened.mode, opened.size, opened.tobytes(), dict(opened.getexif()))
        once = read_images(opened)
        assert (opened.mode, opened.size, opened.tobytes(), dict(opened.getexif())) == before
    assert np.array_equal(once, expected)
    assert flat_images([[once], []]) == [once]


def test_what_is_read_from_a_file_needs_the_file_no_more(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    image = read_images(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").unlink()
    assert type(image) is Image.Image and image.getpixel((3, 3)) == (255, 0, 0)
