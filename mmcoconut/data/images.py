"""Opens the pictures of a row as RGB, or says which row and which file cannot be read and what to do about it."""

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError


# Where Pillow starts to warn of a decompression bomb (256 MiB of 24-bit pixels). Fixed here, so that a program that
# lifts Pillow's limit does not lift this one.
MAX_IMAGE_PIXELS = 89_478_485

# Only these are tried: other formats of Pillow run programs (EPS) or are never photographs.
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

REMEDY = "replace the file, or leave such rows out with `unreadable_images: skip` in the recipe"

# What Pillow's decoders raise on damaged bytes.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class UnreadableImageError(ValueError):
    """A picture of a row cannot be read; the message names the row, the file and the remedy."""


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Gives what Pillow raises inside the block the row and the file."""
    try:
        yield
    except UnreadableImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(
            f"{where}: {error} The limit here is {MAX_IMAGE_PIXELS} pixels; make the picture smaller, or {REMEDY}"
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"{where}: is not a picture in any of the formats {', '.join(READABLE_FORMATS)}; {REMEDY}"
        ) from error
    except DAMAGE as error:
        raise UnreadableImageError(f"{where}: is damaged, cut short or of a rare kind ({error}); {REMEDY}") from error


def _check_whole_files_only() -> None:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, so Pillow fills the missing part of a cut picture with "
            "grey; set it to False"
        )


def _check_pixels(image: Image.Image, where: str) -> None:
    pixels = image.width * image.height
    if pixels > MAX_IMAGE_PIXELS:
        raise UnreadableImageError(
            f"{where}: {image.width} x {image.height} = {pixels} pixels, over the limit of {MAX_IMAGE_PIXELS}; "
            f"make the picture smaller, or {REMEDY}"
        )


def _from_16_bits(image: Image.Image) -> Image.Image:
    """The high byte of each pixel: Pillow's own conversion may clip at 255, which turns most of the picture white."""
    low, high = image.getextrema()
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"mode {image.mode} with values from {low} to {high}, and 16 bits end at {0xFFFF}")
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB upright as the camera meant it, transparency over white; of an animation, the first frame."""
    ImageOps.exif_transpose(image, in_place=True)  # else it copies also what stands upright
    if image.mode == "F":
        raise ValueError("mode F (floats) does not say which value is white")
    if image.mode.startswith("I"):
        return _from_16_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _open_source(item: Mapping[str, Any], where: str) -> BinaryIO:
    if item["bytes"] is not None:
        return io.BytesIO(item["bytes"])
    if item["path"] is None:
        raise UnreadableImageError(f"{where}: has neither bytes nor a path; {REMEDY}")
    try:
        return open(item["path"], "rb")
    except FileNotFoundError as error:
        raise UnreadableImageError(f"{where}: there is no such file; {REMEDY}") from error
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UnreadableImageError(f"{where}: cannot be opened ({error.strerror}); {REMEDY}") from error


def _decode(source: BinaryIO, where: str) -> Image.Image:
    if source.seek(0, os.SEEK_END) == 0:
        raise UnreadableImageError(f"{where}: is empty (0 bytes); {REMEDY}")
    source.seek(0)
    with _named(where):
        image = Image.open(source, formats=READABLE_FORMATS)  # the header only
        _check_pixels(image, where)
        return _to_rgb(image)


def resolve_image_path(image_root: str | os.PathLike, relative: str, row_id: str) -> Path:
    """The absolute path of `relative` under `image_root`.

    Raises ValueError when it leaves the root: a data file from elsewhere must not choose which files are read.
    """
    root = Path(os.path.realpath(image_root))
    where = f"{row_id}, field 'image': found {relative!r}"
    remedy = f"write a path relative to the image root {str(root)!r} and keep the file inside it"
    if not relative.strip() or "\0" in relative:
        raise ValueError(f"{where}, which is no file name; {remedy}")
    if Path(relative).is_absolute():
        raise ValueError(f"{where}, an absolute path; {remedy}")
    if ".." in Path(relative).parts:
        raise ValueError(f"{where}, which climbs with '..'; {remedy}")
    path = Path(os.path.realpath(root / relative))
    if not path.is_relative_to(root):
        raise ValueError(f"{where}, a link to {str(path)!r} outside the image root; {remedy}")
    return path


def _named_items(row: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The pictures of a row as they are stored, each with its name for messages."""
    for number, item in enumerate(row["images"]):
        yield item, f"{row['row_id']}: image file {item['path'] or f'{number} (bytes in the data set)'}"


def content_keys(row: Mapping[str, Any]) -> list[str]:
    """SHA-256 of each picture of a row, as it is stored: equal pictures have equal keys, wherever they lie."""
    keys = []
    for item, where in _named_items(row):
        with _open_source(item, where) as source:
            keys.append(hashlib.sha256(source.read()).hexdigest())
    return keys


def open_images(row: Mapping[str, Any]) -> list[Image.Image]:
    """The pictures of a row, decoded, RGB, in order; nothing is ever put in the place of one that cannot be read.

    16-bit greys keep their high byte, EXIF orientation is applied, transparency lies over white. Raises
    UnreadableImageError for a file that is missing, empty, cut short, no picture, or over MAX_IMAGE_PIXELS by its
    header, before any pixel is decoded.
    """
    _check_whole_files_only()
    images = []
    for item, where in _named_items(row):
        with _open_source(item, where) as source:
            images.append(_decode(source, where))
    return images
