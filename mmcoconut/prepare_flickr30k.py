"""Turn Flickr30k's pictures and captions into a data set on disk: `python -m mmcoconut.prepare_flickr30k --file …`.

A row is a picture with all its captions: `image` (its bytes), `filename`, `caption`, `split`; the splits are the
same as in the loader. `dataset: flickr30k` with `dataset_options: {path: <output_dir>}` reads it. Pictures are
collected in <output_dir>.partial, where a stopped run resumes; <output_dir> appears when all are in it.
"""

import hashlib
import io
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from tqdm.std import tqdm
from transformers.hf_argparser import HfArg

from mmcoconut.arguments.recipes import read_arguments
from mmcoconut.data import SPLITS, check_fractions
from mmcoconut.data.flickr30k import FRACTIONS, captions_of, split_of_picture
from mmcoconut.data.images import open_images, resolve_image_path
from mmcoconut.errors import RecipeError, run_command
from mmcoconut.images_mmcoconut import UnreadableImageError
from mmcoconut.progress import progress
from mmcoconut.records import changed_settings, markdown_table, read_json, write_json


logger = logging.getLogger("mmcoconut")

TEXT = Value("string")
FEATURES = Features({"image": Image(), "filename": TEXT, "caption": List(TEXT), "split": TEXT})
SHARD_SIZE = 500  # pictures: lost by a stopped run, and held in memory
SETTINGS_FILE = "preparation.json"
JPEG_QUALITY = 95
SOURCES = """
Flickr30k is not downloaded here. Put beside each other, and name with --image_root and --file:
  flickr30k-images/         1000092795.jpg and the other pictures, which are given on request at
                            https://shannon.cs.illinois.edu/DenotationGraph/
  dataset_flickr30k.json    captions and splits, from https://cs.stanford.edu/people/karpathy/deepimagesent/; or
                            results.csv (image_name| comment_number| comment), a table with the columns image,caption,
                            or {"1000092795.jpg": ["caption", ...], ...} in a .json
"""


@dataclass
class PreparationArguments:
    """Options of the preparation."""

    file: str | None = HfArg(default=None, help="Captions: results.csv, a table, dataset_flickr30k.json or a .json.")
    image_root: str | None = HfArg(default=None, help="Folder of the pictures that `file` names.")
    output_dir: str = HfArg(default="data/flickr30k", help="Output folder.")
    max_image_size: int | None = HfArg(default=None, help="Maximum side; larger pictures become JPEGs of it.")
    fractions: list[float] = HfArg(
        default_factory=lambda: list(FRACTIONS), help="Parts of train, validation and test, if `file` has no splits."
    )
    unreadable_images: str = HfArg(
        default="error", help="`error`, or `skip` to drop and count missing and damaged pictures."
    )


def parse_arguments(argv: list[str]) -> PreparationArguments:
    """Parse the command line; RecipeError lists all problems."""
    arguments = read_arguments(argv, PreparationArguments, "python -m mmcoconut.prepare_flickr30k --file … [--key …]")
    problems = [(name, None, "name it") for name in ("file", "image_root") if getattr(arguments, name) is None]
    if arguments.max_image_size is not None and arguments.max_image_size < 1:
        problems.append(("max_image_size", arguments.max_image_size, "give at least 1, or leave it out"))
    if problems:
        raise RecipeError("command line", problems)
    check_fractions(arguments.fractions)
    return arguments


def check_sources(arguments: PreparationArguments) -> None:
    """Check that both sources exist; ValueError names the missing one and where it is published."""
    if not Path(arguments.file).is_file():
        raise ValueError(f"--file {arguments.file}: no such file.{SOURCES}")
    if not Path(arguments.image_root).is_dir():
        raise ValueError(f"--image_root {arguments.image_root}: no such folder.{SOURCES}")


def settings_of(arguments: PreparationArguments) -> dict:
    """Return everything that the data set depends on; a hash detects a changed file of captions."""
    settings = {key: value for key, value in asdict(arguments).items() if key != "output_dir"}
    return {**settings, "sha256_of_file": hashlib.sha256(Path(arguments.file).read_bytes()).hexdigest()}


def check_folder(folder: Path, settings: dict) -> bool:
    """Return True if the folder was made, wholly or partly, with these settings; ValueError for other content."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / SETTINGS_FILE).exists():
        raise ValueError(f"{folder} is not empty and was not made by this command. Set another --output_dir.")
    changes = changed_settings(read_json(folder / SETTINGS_FILE), settings)
    if changes:
        raise ValueError(f"{folder} was made with other options ({changes}). Delete it, or set another --output_dir.")
    return True


def pictures_by_split(arguments: PreparationArguments) -> dict[str, list[tuple[str, dict]]]:
    """Return the pictures named by the captions, each with its name for errors, in the order of the file."""
    pictures = {split: [] for split in SPLITS}
    for row_id, row in captions_of(Path(arguments.file)):
        pictures[split_of_picture(row, row_id, arguments.fractions)].append((row_id, row))
    return pictures


def picture_bytes(path: Path, row_id: str, max_image_size: int | None) -> bytes:
    """Return the file unchanged, or as a JPEG of the maximum size; it is decoded in either case."""
    (picture,) = open_images({"images": [{"bytes": None, "path": str(path)}], "row_id": row_id})
    if max_image_size is None or max(picture.size) <= max_image_size:
        return path.read_bytes()
    picture.thumbnail((max_image_size, max_image_size))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=JPEG_QUALITY)
    return content.getvalue()


def rows_of(pictures: Iterable[tuple[str, dict]], split: str, arguments: PreparationArguments) -> list[dict]:
    """Return the rows of the readable pictures of a split.

    Raises:
        ValueError: a missing or damaged picture, unless `unreadable_images` is `skip`.
    """
    rows = []
    for row_id, row in pictures:
        name = row["filename"]
        path = resolve_image_path(arguments.image_root, name, row_id)
        try:
            content = picture_bytes(path, row_id, arguments.max_image_size)
        except UnreadableImageError as error:
            if arguments.unreadable_images != "skip":
                raise ValueError(f"{error}; in this command, with --unreadable_images skip") from error
            logger.warning("left out: %s", error)
            continue
        image = {"bytes": content, "path": name}
        rows.append({"image": image, "filename": name, "caption": row["captions"], "split": split})
    return rows


def counted(pictures: Iterable[tuple[str, dict]], bar: tqdm) -> Iterator[tuple[str, dict]]:
    for picture in pictures:
        yield picture
        bar.update()


def write_shard(folder: Path, rows: list[dict]) -> None:
    """Write rows to disk, under their final name only when complete; no rows make an empty folder."""
    unfinished = folder.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    if rows:
        columns = {name: [row[name] for row in rows] for name in FEATURES}
        Dataset.from_dict(columns, features=FEATURES).save_to_disk(unfinished)
    unfinished.rename(folder)


def write_shards(
    partial: Path, pictures: Mapping[str, list], arguments: PreparationArguments
) -> dict[str, list[Path]]:
    """Write the shards of every split, except those that exist."""
    shards = {split: [] for split in pictures}
    disable_progress_bars()  # of `datasets`: one per shard
    with progress(desc="preparing", unit="pictures", total=sum(map(len, pictures.values()))) as bar:
        for split, named in pictures.items():
            for start in range(0, len(named), SHARD_SIZE):
                part, folder = named[start : start + SHARD_SIZE], partial / f"{split}-{start:06d}"
                if folder.exists():
                    bar.update(len(part))
                else:
                    write_shard(folder, rows_of(counted(part, bar), split, arguments))
                shards[split].append(folder)
    enable_progress_bars()
    return shards


def join_shards(shards: Mapping[str, list[Path]], partial: Path, output_dir: Path, settings: dict) -> None:
    """Write `output_dir` from all shards at once; meanwhile the pictures are on disk twice."""
    parts = {split: [load_from_disk(folder) for folder in shards[split] if any(folder.iterdir())] for split in shards}
    splits = {split: concatenate_datasets(found) for split, found in parts.items() if found}
    if not splits:
        raise ValueError(f"None of the pictures is in {settings['image_root']}: correct --image_root.{SOURCES}")
    whole = partial / "whole"
    DatasetDict(splits).save_to_disk(whole)
    write_json(whole / SETTINGS_FILE, settings)
    whole.replace(output_dir)


def counts_of(output_dir: Path, pictures: Mapping[str, list]) -> dict[str, dict[str, int]]:
    """Return per split: existing pictures and captions, and named pictures that were skipped."""
    counts, prepared = {}, load_from_disk(output_dir)
    for split, named in pictures.items():
        captions = [len(texts) for texts in prepared[split]["caption"]] if split in prepared else []
        left_out = len(named) - len(captions)
        counts[split] = {"pictures": len(captions), "captions": sum(captions), "left out": left_out}
    return counts


def table_of(counts: Mapping[str, Mapping[str, int]]) -> str:
    rows = ([split, *map(str, numbers.values())] for split, numbers in counts.items())
    return markdown_table(["split", *next(iter(counts.values()))], rows)


def main(argv: list[str] | None = None) -> dict:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    check_sources(arguments)
    output_dir = Path(arguments.output_dir)
    partial = output_dir.with_name(f"{output_dir.name}.partial")
    settings = settings_of(arguments)
    pictures = pictures_by_split(arguments)
    if not check_folder(output_dir, settings):
        check_folder(partial, settings)
        partial.mkdir(parents=True, exist_ok=True)
        write_json(partial / SETTINGS_FILE, settings)
        join_shards(write_shards(partial, pictures, arguments), partial, output_dir, settings)
    if check_folder(partial, settings):
        shutil.rmtree(partial)
    counts = counts_of(output_dir, pictures)
    print(table_of(counts))
    print(f"written to {output_dir}; read it with dataset: flickr30k, dataset_options: {{path: {output_dir}}}")
    return counts


if __name__ == "__main__":
    run_command(main, name="prepare")
