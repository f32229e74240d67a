"""Read an image as upright RGB: the one way in for training, evaluation, `processor(images=…)`, pipelines and demo.

Paths, URLs, base64 and PIL images are decoded here and not by transformers, whose loaders clip 16 bits to white and
drop transparency. Arrays and tensors of three channels hold pixels already, and stay as they are; greys, alpha and 16
bits in them are read as in files. Behind that: which images belong to which text, and the tiles that image processors
cut.
"""

import base64
import io
import os
import struct
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from transformers.image_utils import is_valid_image


# Where Pillow starts to warn of a decompression bomb (256 MiB of 24-bit pixels). Fixed here, so that a program that
# lifts Pillow's limit does not lift this one.
MAX_IMAGE_PIXELS = 89_478_485

# Only these are tried: other formats of Pillow run programs (EPS) or are never photographs.
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

REMEDY = "replace the image"
KINDS = "a path, a URL (http://, https://, data:), base64 text of a file, a PIL image, an array or a tensor"
ARRAY_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
URL_PREFIXES = ("http://", "https://", "data:")
URL_TIMEOUT = 60  # seconds without an answer
LONGEST_TEXT_SHOWN = 500  # characters; longer text is base64 and not a path

# What Pillow's decoders raise on damaged bytes.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class UnreadableImageError(ValueError):
    """An image cannot be read; the message names the image and the remedy."""


@contextmanager
def _named(where: str, remedy: str) -> Iterator[None]:
    """Give what Pillow raises inside the block the image's name and the remedy."""
    try:
        yield
    except UnreadableImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(
            f"{where}: {error} The limit here is {MAX_IMAGE_PIXELS} pixels; make the picture smaller, or {remedy}"
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"{where}: is not a picture in any of the formats {', '.join(READABLE_FORMATS)}; {remedy}"
        ) from error
    except DAMAGE as error:
        raise UnreadableImageError(f"{where}: is damaged, cut short or of a rare kind ({error}); {remedy}") from error


def _check_whole_files_only() -> None:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, so Pillow fills the missing part of a cut picture with "
            "grey; set it to False"
        )


def _check_pixels(image: Image.Image, where: str, remedy: str) -> None:
    pixels = image.width * image.height
    if pixels > MAX_IMAGE_PIXELS:
        raise UnreadableImageError(
            f"{where}: {image.width} x {image.height} = {pixels} pixels, over the limit of {MAX_IMAGE_PIXELS}; "
            f"make the picture smaller, or {remedy}"
        )


def _from_16_bits(image: Image.Image) -> Image.Image:
    """The high byte of each pixel: Pillow's own conversion clips at 255, which turns most of the picture white."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"mode {image.mode} with values from {low} to {high}, and 16 bits end at {0xFFFF}")
    shades = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:  # the one value that a PNG declares transparent
        shades[values == image.info["transparency"]] = 0xFF
    return Image.fromarray(shades)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB, upright as the camera meant it, transparency over white; the given one stays as it is.

    Raises:
        ValueError: mode F, or integers beyond 16 bits: nothing says which value is white.
    """
    image.load()  # a PNG's orientation may stand behind its pixels
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # transposing copies, also what stands upright
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("mode F (floats) does not say which value is white: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _from_16_bits(image).convert("RGB")
    if not image.has_transparency_data:
        is_ready = image.mode == "RGB" and not isinstance(image, ImageFile.ImageFile)  # which would hold its file
        return image if is_ready else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def open_file(path: str | os.PathLike, where: str, remedy: str = REMEDY) -> BinaryIO:
    """Open the file of an image.

    Raises:
        UnreadableImageError: there is no such file, or it may not be read.
    """
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise UnreadableImageError(f"{where}: there is no such file; {remedy}") from error
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UnreadableImageError(f"{where}: cannot be opened ({error.strerror}); {remedy}") from error


def decode_image(source: BinaryIO, where: str, remedy: str = REMEDY) -> Image.Image:
    """Decode the bytes of an image file as upright RGB; of an animation, the first frame.

    Args:
        where: what the image is called in an error, such as its path.
        remedy: what an error says that its reader can do.

    Raises:
        UnreadableImageError: empty, cut short, no picture, over MAX_IMAGE_PIXELS by its header (before any pixel is
            decoded), or of a kind that has no white.
    """
    _check_whole_files_only()
    if source.seek(0, os.SEEK_END) == 0:
        raise UnreadableImageError(f"{where}: is empty (0 bytes); {remedy}")
    source.seek(0)
    with _named(where, remedy):
        image = Image.open(source, formats=READABLE_FORMATS)  # the header only
        _check_pixels(image, where, remedy)
        return to_rgb(image)


def _shown(text: str) -> str:
    """Text for a message: short text whole, the beginning of base64."""
    return text if len(text) <= LONGEST_TEXT_SHOWN else f"{text[:60]}… ({len(text)} characters)"


def _download(url: str) -> BinaryIO:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mmcoconut"})  # some hosts refuse Python's own
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
            return io.BytesIO(response.read())
    except (OSError, HTTPException, ValueError) as error:
        raise UnreadableImageError(
            f"image {_shown(url)}: cannot be fetched ({error}); check the address, or give {KINDS}"
        ) from error


def _from_base64(text: str) -> BinaryIO:
    try:
        return io.BytesIO(base64.b64decode("".join(text.split()), validate=True))
    except ValueError as error:
        raise UnreadableImageError(
            f"image {_shown(text)}: there is no such file, and it is no base64 text; give {KINDS}"
        ) from error


def _read_text(text: str) -> Image.Image:
    """Read what a URL, the path of a file that is there, or base64 text says."""
    if text.startswith(URL_PREFIXES):
        return decode_image(_download(text), f"image {_shown(text)}")
    if os.path.exists(text):
        return _read_file(text)
    where = f"image {_shown(text)} (no such file, so it was read as base64 text)"
    return decode_image(_from_base64(text), where, f"give {KINDS}")


def _read_file(path: str | os.PathLike) -> Image.Image:
    where = f"image file {os.fspath(path)}"
    with open_file(path, where) as source:
        return decode_image(source, where)


def _read_pil(image: Image.Image) -> Image.Image:
    name = image.filename if isinstance(image, ImageFile.ImageFile) else ""
    with _named(f"image file {name}" if name else f"PIL image of mode {image.mode}", REMEDY):
        return to_rgb(image)


def _channels_of(image) -> int | None:
    """Return how many channels an array has, in front or behind as transformers takes them; None if unclear."""
    if image.ndim == 2:
        return 1
    if image.ndim != 3:
        return None
    ends = (image.shape[0], image.shape[-1])
    return 3 if 3 in ends else next((end for end in reversed(ends) if end in ARRAY_MODES), None)


def _read_array(image):
    """Return an array of one image, or a list of images for one of four dimensions.

    Raises:
        UnreadableImageError: a shape that is no image's; alpha that is not of 8 or 16 bits.
    """
    if image.ndim == 4:
        return [_read_array(one) for one in image]
    channels, kind = _channels_of(image), str(image.dtype).removeprefix("torch.")
    is_whole = kind in ("uint8", "uint16", "bool")
    if channels is None or (channels in (2, 4) and not is_whole):
        raise UnreadableImageError(
            f"array of shape {tuple(image.shape)} and type {kind}: is no image; give (height, width), (height, width, "
            "channels) or (channels, height, width) with 1 or 3 channels, or of uint8, uint16 or bool with alpha too"
        )
    if not is_whole:
        return image[:, :, None] if image.ndim == 2 else image
    if channels == 3 and kind == "uint8":
        return image
    values = np.asarray(image)
    values = values >> 8 if kind == "uint16" else values * np.uint8(255 if kind == "bool" else 1)
    if values.ndim == 3 and values.shape[-1] != channels:
        values = values.transpose(1, 2, 0)  # (height, width, channels)
    values = np.ascontiguousarray(values[..., 0] if channels == 1 and values.ndim == 3 else values, dtype=np.uint8)
    return to_rgb(Image.frombytes(ARRAY_MODES[channels], values.shape[1::-1], values.tobytes()))


def read_images(images):
    """Read an image, or every image in nested lists; lists stay lists.

    Args:
        images: a path, an http(s) or data: URL, base64 text of a file, a PIL image, an array, a tensor, or lists and
            tuples of them.

    Returns:
        RGB PIL images in their places, upright, 16-bit greys by their high byte, transparency over white. Arrays and
        tensors of three channels stay as they are; those of uint8, uint16 or bool with one channel, alpha or 16 bits
        are read as a file of them is. Four dimensions are a list of images.

    Raises:
        UnreadableImageError: an image that is missing, damaged or of another type, by its name and with the remedy.
    """
    if isinstance(images, (list, tuple)):
        return [read_images(image) for image in images]
    if isinstance(images, Image.Image):
        return _read_pil(images)
    if isinstance(images, str):
        return _read_text(images)
    if isinstance(images, os.PathLike):
        return _read_file(images)
    if not is_valid_image(images):
        raise UnreadableImageError(f"image of type {type(images).__name__}: is none that can be read; give {KINDS}")
    return _read_array(images)


def _flat(images) -> Iterator:
    if not isinstance(images, list):
        yield images
        return
    for image in images:
        yield from _flat(image)


def flat_images(images) -> list:
    """Read images as `read_images` does, into one flat list; a four-dimensional array is several images."""
    return list(_flat(read_images(images)))


def shared_out(images: Sequence, shares: Sequence[int]) -> list[list]:
    """Images in lists of so many each.

    Raises:
        ValueError: there are more images, or fewer.
    """
    if len(images) != sum(shares):
        raise ValueError(
            f"The {len(shares)} texts have {sum(shares)} image tokens ({', '.join(map(str, shares))}) and "
            f"{len(images)} images are given: give one image for each."
        )
    ends = [sum(shares[: number + 1]) for number in range(len(shares))]
    return [list(images[end - share : end]) for end, share in zip(ends, shares)]


def images_of_each(images, texts: Sequence, shares: Sequence[int] | None = None) -> list[list]:
    """Images as one list a text: nested lists as they are, a flat list one a text, or all for a single text.

    shares: how many of a flat list each text is to have, for texts that say so.

    Raises:
        ValueError: a flat list whose length differs from the number of texts, or nested lists of another number.
    """
    if images is None:
        return [[] for _ in texts]
    if is_valid_image(images) and not isinstance(images, Image.Image) and images.ndim == 4:
        images = list(images)
    nested = isinstance(images, (list, tuple)) and all(isinstance(image, (list, tuple)) for image in images)
    flat = list(images) if isinstance(images, (list, tuple)) else [images]
    if not nested and len(texts) == 1:
        return [flat]
    if not nested and shares is not None:
        return shared_out(flat, shares)
    if len(flat) != len(texts):
        raise ValueError(
            f"{len(flat)} images for {len(texts)} texts: give one image a text, or a list of images for each text "
            "([[a, b], [], [c]])."
        )
    return [list(group) for group in flat] if nested else [[image] for image in flat]


def makes_tiles(image_processor) -> bool:
    """Return True if this image processor can cut a picture into tiles."""
    return "crop_to_patches" in image_processor.valid_kwargs.__annotations__


def set_tiles(image_processor, *, image_size: int | None, min_tiles: int | None, max_tiles: int | None) -> None:
    """Switch tiles on where the image processor can make them, with the given side and numbers or its own.

    Raises:
        ValueError: a setting for an image processor without tiles; more tiles at least than at most.
    """
    settings = {"min_patches": min_tiles, "max_patches": max_tiles}
    settings["size"] = None if image_size is None else {"height": image_size, "width": image_size}
    given = {name: value for name, value in settings.items() if value is not None}
    if not makes_tiles(image_processor):
        if given:
            raise ValueError(
                f"{type(image_processor).__name__} cuts no tiles, so image_size={image_size}, min_tiles={min_tiles} "
                f"and max_tiles={max_tiles} have no effect: leave them out, or set up its own sizes and give it."
            )
        return
    image_processor.crop_to_patches = True
    for name, value in given.items():
        setattr(image_processor, name, value)
    if not 1 <= image_processor.min_patches <= image_processor.max_patches:
        raise ValueError(
            f"At least {image_processor.min_patches} and at most {image_processor.max_patches} tiles: set min_tiles "
            "and max_tiles so that 1 <= min_tiles <= max_tiles."
        )


def without_thumbnails(inputs: dict) -> dict:
    """pixel_values, a list of tiles, and num_tiles, a list, without the last tile of every image that has several."""
    kept, counts, first = [], [], 0
    for number in inputs["num_tiles"]:
        last = first + max(1, number - 1)
        kept, counts = [*kept, *inputs["pixel_values"][first:last]], [*counts, last - first]
        first += number
    return {**inputs, "pixel_values": kept, "num_tiles": counts}
