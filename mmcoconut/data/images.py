"""Open the pictures of a row as RGB, or raise an error with row, file and remedy."""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image

from mmcoconut.errors import UsageError
from mmcoconut.images_mmcoconut import (
    DAMAGE,
    READABLE_FORMATS,
    TOO_LARGE,
    UnreadableImageError,
    decode_image,
    open_file,
)


REMEDY = "replace the file, or drop such rows with `unreadable_images: skip` in the recipe"
HELPER_REMEDY = "replace the file, or leave the field out"
TURNED = (5, 6, 7, 8)  # EXIF orientations that are rotated by 90°


def _open_source(item: Mapping[str, Any], where: str) -> BinaryIO:
    if item["bytes"] is not None:
        return io.BytesIO(item["bytes"])
    if item["path"] is None:
        raise UnreadableImageError(f"{where}: has neither bytes nor a path; {REMEDY}")
    return open_file(item["path"], where, REMEDY)


def resolve_image_path(image_root: str | os.PathLike, relative: str, row_id: str, field: str = "image") -> Path:
    """Return the absolute path of `relative` under `image_root`.

    Raises ValueError if it leaves the root: an untrusted data file must not choose which files are read.
    """
    root = Path(os.path.realpath(image_root))
    where = f"{row_id}, field {field!r}: found {relative!r}"
    remedy = f"write a path relative to the image root {str(root)!r} and keep the file inside it"
    if not relative.strip() or "\0" in relative:
        raise UsageError(f"{where}, which is not a file name; {remedy}")
    if Path(relative).is_absolute():
        raise UsageError(f"{where}, an absolute path; {remedy}")
    if ".." in Path(relative).parts:
        raise UsageError(f"{where}, which climbs with '..'; {remedy}")
    path = Path(os.path.realpath(root / relative))
    if not path.is_relative_to(root):
        raise UsageError(f"{where}, a link to {str(path)!r} outside the image root; {remedy}")
    return path


def _named_items(row: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the stored pictures of a row, each with its name for messages."""
    for number, item in enumerate(row["images"]):
        yield item, f"{row['row_id']}: image file {item['path'] or f'{number} (bytes in the data set)'}"


def content_keys(row: Mapping[str, Any]) -> list[str]:
    """Return the SHA-256 of each stored picture of a row: equal pictures have equal keys, in any location."""
    keys = []
    for item, where in _named_items(row):
        with _open_source(item, where) as source:
            keys.append(hashlib.sha256(source.read()).hexdigest())
    return keys


def _size_of(source: BinaryIO, where: str) -> tuple[int, int]:
    try:
        image = Image.open(source, formats=READABLE_FORMATS)
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in TURNED
    except (*TOO_LARGE, *DAMAGE):  # which decoding reports
        return decode_image(source, where, REMEDY).size
    return image.size[::-1] if turned else image.size


def image_sizes(row: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Return (width, height) in pixels of each picture of a row, upright, from the headers of their files.

    Only a PNG is decoded, because its orientation may follow its pixels.

    Raises:
        UnreadableImageError: as in `open_images`.
    """
    sizes = []
    for item, where in _named_items(row):
        with _open_source(item, where) as source:
            sizes.append(_size_of(source, where))
    return tuple(sizes)


def open_helper_image(row: Mapping[str, Any]) -> Image.Image:
    """Open the helper image of a row that has one, as `open_images` does."""
    item = row["helper_image"]
    where = f"{row['row_id']}, field 'helper_image': image file {item['path'] or '(bytes in the data set)'}"
    with _open_source(item, where) as source:
        return decode_image(source, where, HELPER_REMEDY)


def open_images(row: Mapping[str, Any]) -> list[Image.Image]:
    """Open the pictures of a row, decoded, RGB, in order; an unreadable picture is never replaced.

    The processor reads images in the same way (images_mmcoconut.py).

    Raises:
        UnreadableImageError: as in `decode_image`, with row and file.
    """
    images = []
    for item, where in _named_items(row):
        with _open_source(item, where) as source:
            images.append(decode_image(source, where, REMEDY))
    return images
