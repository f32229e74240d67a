"""Read images as upright RGB, share them out to texts, and cut them into tiles.

Paths, URLs, base64 and PIL images are decoded here and not by transformers, whose loaders clip 16 bits to white and
drop transparency. Training, evaluation, `processor(images=…)`, pipelines and the demo all read images here.
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
from itertools import accumulate
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from transformers.image_utils import is_valid_image


# Where Pillow starts to warn of a decompression bomb; a program that lifts Pillow's limit does not lift this one.
MAX_IMAGE_PIXELS = 89_478_485
# Only these are tried: other formats of Pillow run programs (EPS) or are never photographs.
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
REMEDY = "replace the image"
KINDS = "a path, a URL (http://, https://, data:), base64 text of a file, a PIL image, an array or a tensor"
URL_TIMEOUT = 60  # seconds without an answer
LONGEST_TEXT_SHOWN = 500  # characters; longer text is base64 and not a path
# What Pillow raises on images that are too large, and its decoders on damaged bytes.
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class UnreadableImageError(ValueError):
    """An image cannot be read; the message names the image and the remedy."""


def _reason(error: Exception) -> str:
    if isinstance(error, TOO_LARGE):
        return f"{error} The limit here is {MAX_IMAGE_PIXELS} pixels; make the picture smaller, or "
    if isinstance(error, UnidentifiedImageError):
        return f"is not a picture in any of the formats {', '.join(READABLE_FORMATS)}; "
    if isinstance(error, FileNotFoundError):
        return "there is no such file; "
    if isinstance(error, (IsADirectoryError, NotADirectoryError, PermissionError)):
        return f"cannot be opened ({error.strerror}); "
    return f"is damaged, cut short or of a rare kind ({error}); "


@contextmanager
def _named(where: str, remedy: str) -> Iterator[None]:
    """Add the image's name and the remedy to what Pillow raises inside the block."""
    try:
        yield
    except (*TOO_LARGE, *DAMAGE) as error:
        raise UnreadableImageError(f"{where}: {_reason(error)}{remedy}") from error


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Return the high byte of each pixel, because Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"mode {image.mode} with values from {low} to {high}, and 16 bits end at {0xFFFF}")
    shades = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:  # the one value that a PNG declares transparent
        shades[values == image.info["transparency"]] = 0xFF
    return Image.fromarray(shades)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB, upright as the camera meant it, transparency over white; the given one is not changed.

    Mode F and integers beyond 16 bits raise ValueError: nothing says which value is white.
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
    """Open the file of an image; raise UnreadableImageError if there is none, or it may not be read."""
    with _named(where, remedy):
        return open(path, "rb")


def decode_image(source: BinaryIO, where: str, remedy: str = REMEDY) -> Image.Image:
    """Decode the bytes of an image file as upright RGB; of an animation, the first frame.

    UnreadableImageError names the image by `where`, such as its path, with the remedy: it is empty, cut short, no
    picture, has more than MAX_IMAGE_PIXELS by its header (before any pixel is decoded), or no white.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, so cut pictures are filled up; set it to False")
    if source.seek(0, os.SEEK_END) == 0:
        raise UnreadableImageError(f"{where}: is empty (0 bytes); {remedy}")
    source.seek(0)
    with _named(where, remedy):
        image = Image.open(source, formats=READABLE_FORMATS)  # the header only
        pixels = image.width * image.height
        if pixels > MAX_IMAGE_PIXELS:
            size = f"{image.width} x {image.height} = {pixels} pixels"
            raise Image.DecompressionBombError(f"{size}, over the limit of {MAX_IMAGE_PIXELS}.")
        return to_rgb(image)


def _read_file(path: str | os.PathLike) -> Image.Image:
    where = f"image file {os.fspath(path)}"
    with open_file(path, where) as source:
        return decode_image(source, where)


def _download(url: str, where: str) -> BinaryIO:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mmcoconut"})  # some hosts refuse Python's own
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
            return io.BytesIO(response.read())
    except (OSError, HTTPException, ValueError) as error:
        remedy = f"check the address, or give {KINDS}"
        raise UnreadableImageError(f"{where}: cannot be fetched ({error}); {remedy}") from error


def _read_text(text: str) -> Image.Image:
    """Read the image at a URL, in a file that exists, or in base64 text."""
    where = f"image {text if len(text) <= LONGEST_TEXT_SHOWN else f'{text[:60]}… ({len(text)} characters)'}"
    if text.startswith(("http://", "https://", "data:")):
        return decode_image(_download(text, where), where)
    if os.path.exists(text):
        return _read_file(text)
    try:
        decoded = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        missing = "there is no such file, and it is no base64 text"
        raise UnreadableImageError(f"{where}: {missing}; give {KINDS}") from error
    where = f"{where} (no such file, so it was read as base64 text)"
    return decode_image(io.BytesIO(decoded), where, f"give {KINDS}")


def _channels_of(image) -> int | None:
    """Return how many channels an array has, in front or behind as transformers takes them; None if unclear."""
    if image.ndim == 2:
        return 1
    if image.ndim != 3:
        return None
    ends = (image.shape[-1], image.shape[0])
    return 3 if 3 in ends else next((end for end in ends if end in (1, 2, 4)), None)


def _read_array(image):
    """Return an array of one image, or a list of images for one of four dimensions."""
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
    if values.ndim == 3 and values.shape[-1] != channels:
        values = values.transpose(1, 2, 0)  # (height, width, channels)
    values = values[..., 0] if channels == 1 and values.ndim == 3 else values
    if values.ndim == 3 and kind != "uint8":
        values = (values >> 8 if kind == "uint16" else values * 255).astype(np.uint8)
    return to_rgb(Image.fromarray(values))


def read_images(image):
    """Read a path, an http(s) or data: URL, base64 text of a file, a PIL image, an array or a tensor.

    Returns an RGB PIL image, upright, 16-bit greys by their high byte, transparency over white. Arrays and tensors of
    three channels stay as they are; those of uint8, uint16 or bool with one channel, alpha or 16 bits are read as a
    file of them is. Four dimensions give a list. UnreadableImageError names an image that cannot be read.
    """
    if isinstance(image, Image.Image):
        name = image.filename if isinstance(image, ImageFile.ImageFile) else ""
        with _named(f"image file {name}" if name else f"PIL image of mode {image.mode}", REMEDY):
            return to_rgb(image)
    if isinstance(image, str):
        return _read_text(image)
    if isinstance(image, os.PathLike):
        return _read_file(image)
    if not is_valid_image(image):
        raise UnreadableImageError(f"image of type {type(image).__name__}: is none that can be read; give {KINDS}")
    return _read_array(image)


def flat_images(images) -> list:
    """Read an image, or all in nested lists and tuples, into one flat list; see `read_images`."""
    if isinstance(images, (list, tuple)):
        return [image for group in images for image in flat_images(group)]
    found = read_images(images)
    return found if isinstance(found, list) else [found]


def images_of_each(images, num_texts: int, shares: Sequence[int] = ()) -> list[list]:
    """Return images as one list per text: nested lists as they are, a flat list one each, or all for a single text.

    shares: how many of a flat list each text takes, for texts that say so. Other numbers raise ValueError.
    """
    if images is None:
        return [[] for _ in range(num_texts)]
    if is_valid_image(images) and not isinstance(images, Image.Image) and images.ndim == 4:
        images = list(images)
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if images and all(isinstance(image, (list, tuple)) for image in images):
        groups = [list(group) for group in images]
    elif sum(shares) == len(images):
        groups = [images[end - share : end] for end, share in zip(accumulate(shares), shares)]
    else:
        groups = [images] if num_texts == 1 else [[image] for image in images]
    if len(groups) != num_texts:
        remedy = "give one image a text, or a list of images for each text ([[a, b], [], [c]])"
        raise ValueError(f"{len(groups)} images for {num_texts} texts: {remedy}.")
    return groups


def makes_tiles(image_processor) -> bool:
    """Return True if this image processor can cut a picture into tiles."""
    return "crop_to_patches" in image_processor.valid_kwargs.__annotations__


def without_thumbnails(tiles: Sequence, num_tiles: Sequence[int]) -> tuple[list, list[int]]:
    """Return tiles, and their number per image, without the last tile of every image that has several."""
    kept, counts = [], [max(1, number - 1) for number in num_tiles]
    for end, number, count in zip(accumulate(num_tiles), num_tiles, counts):
        kept += tiles[end - number : end - number + count]
    return kept, counts
