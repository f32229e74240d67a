"""Read images as upright RGB, and assign them to texts.

Paths, URLs and base64 are decoded here, because transformers' `load_image` clips 16 bits to white and drops
transparency. Training, evaluation, `processor(images=…)`, pipelines and the demo all read images here.
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
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from transformers.image_utils import is_valid_image


# Pillow's limit for decompression bombs; a program that lifts Pillow's limit does not lift this one.
MAX_IMAGE_PIXELS = 89_478_485
# Only these formats are tried: Pillow's others run programs (EPS) or are never photographs.
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
REMEDY = "replace the image"
KINDS = "a path, a URL (http://, https://, data:), base64 text of a file, a PIL image, an array or a tensor"
URL_TIMEOUT = 60  # seconds without an answer
LONGEST_TEXT_SHOWN = 500  # characters; longer text is base64 and not a path
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow's decoders raise on damaged bytes.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
REASONS = (  # the first match is used
    (TOO_LARGE, "{error} Over the limit of {limit} pixels: make the picture smaller, or "),
    (UnidentifiedImageError, f"is not a picture in any of the formats {', '.join(READABLE_FORMATS)}; "),
    (FileNotFoundError, "there is no such file; "),
    ((IsADirectoryError, NotADirectoryError, PermissionError), "cannot be opened ({error.strerror}); "),
    (DAMAGE, "is damaged, cut short or of a rare kind ({error}); "),
)


class UnreadableImageError(ValueError):
    """An image cannot be read; the message names the image and the remedy."""


@contextmanager
def _named(where: str, remedy: str) -> Iterator[None]:
    """Add the image's name and the remedy to what Pillow raises inside the block."""
    try:
        yield
    except (*TOO_LARGE, *DAMAGE) as error:
        reason = next(text for kinds, text in REASONS if isinstance(error, kinds))
        reason = reason.format(error=error, limit=MAX_IMAGE_PIXELS)
        raise UnreadableImageError(f"{where}: {reason}{remedy}") from error


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Return the high byte of each pixel, because Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"mode {image.mode} with values from {values.min()} to {values.max()}, not 0 to {0xFFFF}")
    shades = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:  # the value that a PNG declares transparent
        shades[values == image.info["transparency"]] = 0xFF
    return Image.fromarray(shades)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a copy as RGB, upright, transparency over white; raise ValueError if white is unknown (32 bits)."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("mode F (floats) does not say which value is white: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_file(path: str | os.PathLike, where: str, remedy: str = REMEDY) -> BinaryIO:
    """Open the file of an image; raise UnreadableImageError if that fails."""
    with _named(where, remedy):
        return open(path, "rb")


def decode_image(source: BinaryIO, where: str, remedy: str = REMEDY) -> Image.Image:
    """Decode an image file as upright RGB, at most MAX_IMAGE_PIXELS; of an animation, the first frame.

    Raise UnreadableImageError, which names the image by `where`, such as its path, and the remedy.
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
            raise Image.DecompressionBombError(f"{image.width} x {image.height} = {pixels} pixels.")
        return to_rgb(image)


def _read_text(text: str) -> Image.Image:
    """Read the image at a URL or in base64 text."""
    where = f"image {text if len(text) <= LONGEST_TEXT_SHOWN else f'{text[:60]}… ({len(text)} characters)'}"
    is_url = text.startswith(("http://", "https://", "data:"))
    try:
        if is_url:
            request = urllib.request.Request(text, headers={"User-Agent": "mmcoconut"})  # some hosts refuse Python's
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
                content = response.read()
        else:
            content = base64.b64decode("".join(text.split()), validate=True)
    except (OSError, HTTPException, ValueError) as error:
        missing = "there is no such file, and it is no base64 text;"
        problem = f"cannot be fetched ({error}); check the address, or" if is_url else missing
        raise UnreadableImageError(f"{where}: {problem} give {KINDS}") from error
    if is_url:
        return decode_image(io.BytesIO(content), where)
    return decode_image(io.BytesIO(content), f"{where} (no such file, so it was read as base64 text)", f"give {KINDS}")


def _read_array(image):
    """Return an array or tensor of one image as the image processor takes it, or as RGB."""
    kind, shape = str(image.dtype).removeprefix("torch."), tuple(image.shape)
    is_whole = kind in ("uint8", "uint16", "bool")
    ends = {2: (1,), 3: shape[::-2]}.get(image.ndim, ())  # channels last or first
    channels = 3 if 3 in ends else next((end for end in ends if end in (1, 2, 4)), None)
    if channels is None or (channels in (2, 4) and not is_whole):
        remedy = "(height, width), or with 1 or 3 channels last or first; in uint8, uint16 or bool also alpha"
        raise UnreadableImageError(f"array of shape {shape} and type {kind}: is no image; give {remedy}")
    if not is_whole:
        return image[:, :, None] if image.ndim == 2 else image
    if channels == 3 and kind == "uint8":
        return image
    values = np.asarray(image)
    if values.ndim == 3 and shape[-1] != channels:
        values = np.moveaxis(values, 0, -1)  # (height, width, channels)
    if kind != "uint8":
        values = (values >> 8 if kind == "uint16" else values * 255).astype(np.uint8)
    return to_rgb(Image.fromarray(values.reshape(values.shape[:2]) if channels == 1 else values))


def read_images(image):
    """Read a path, an http(s) or data: URL, base64 text of a file, a PIL image, an array or a tensor.

    Return an RGB PIL image, upright, 16-bit greys by their high byte, transparency over white; arrays and tensors of
    floats or of three channels as they are. Raise UnreadableImageError, which names the image, if that fails.
    """
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "")
        with _named(f"image file {name}" if name else f"PIL image of mode {image.mode}", REMEDY):
            return to_rgb(image)
    if isinstance(image, os.PathLike) or (isinstance(image, str) and os.path.exists(image)):
        where = f"image file {os.fspath(image)}"
        with open_file(image, where) as source:
            return decode_image(source, where)
    if isinstance(image, str):
        return _read_text(image)
    if not is_valid_image(image):
        raise UnreadableImageError(f"image of type {type(image).__name__}: is none that can be read; give {KINDS}")
    return _read_array(image)


def _are_several(images) -> bool:
    return isinstance(images, (list, tuple)) or (is_valid_image(images) and getattr(images, "ndim", 0) == 4)


def flat_images(images) -> list:
    """Read an image, or all in nested lists, tuples and arrays, into one flat list; see `read_images`."""
    if _are_several(images):
        return [image for group in images for image in flat_images(group)]
    return [read_images(images)]


def images_of_each(images, num_texts: int, shares: Sequence[int] = ()) -> list[list]:
    """Return images as one list per text: nested lists unchanged, a flat list split, or all for a single text.

    shares: how many images of a flat list each text takes, if known. Other totals raise ValueError.
    """
    if images is None:
        return [[] for _ in range(num_texts)]
    images = list(images) if _are_several(images) else [images]
    if images and all(isinstance(image, (list, tuple)) for image in images):
        groups = [list(group) for group in images]
    elif sum(shares) == len(images):
        groups = [images[end - share : end] for end, share in zip(accumulate(shares), shares)]
    else:
        groups = [images] if num_texts == 1 else [[image] for image in images]
    if len(groups) != num_texts:
        remedy = "give one image per text, or a list of images for each text ([[a, b], [], [c]])"
        raise ValueError(f"{len(groups)} images for {num_texts} texts: {remedy}.")
    return groups


def makes_tiles(image_processor) -> bool:
    """Return True if this image processor can cut a picture into tiles."""
    return "crop_to_patches" in image_processor.valid_kwargs.__annotations__
