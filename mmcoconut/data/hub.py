"""Read data sets published with pictures in a column `image`: from the Hub, from a folder of parquet files, or from
`save_to_disk`. The pictures stay undecoded and, in memory-mapped files, on disk."""

import os
import re
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetInfo,
    Features,
    Image,
    get_dataset_config_names,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)

from mmcoconut.data import FEATURES, nearest, to_dataset
from mmcoconut.data.arrow_mazes import png_bytes
from mmcoconut.data.json_steps import existing_image, field_error
from mmcoconut.data.public import Examples, not_empty
from mmcoconut.errors import UsageError


IMAGE_COLUMN = re.compile(r"image(_\d+)?")
PUBLISHED_NAMES = {"validation": ("validation", "valid", "val", "dev")}  # of our splits; the others have one name


def published_splits(path: str | os.PathLike, config: str | None = None) -> list[str]:
    """Return the names of the splits at `path`, without loading them; ValueError where there is nothing to load."""
    path = str(path)
    if path.startswith((".", "/", "~")) and not os.path.isdir(path):
        raise UsageError(f"{path}: there is no such folder; give the option path a folder or a Hub id")
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        return list(load_from_disk(path))
    if os.path.isfile(os.path.join(path, "state.json")):
        raise UsageError(f"{path}: holds one split without its name; save a datasets.DatasetDict there")
    try:
        return get_dataset_split_names(path, config)
    except (FileNotFoundError, ConnectionError) as error:
        remedy = "correct the option path, or download the data set where there is a network and give its folder"
        raise UsageError(f"{path}: there is no such folder here, and the Hub does not give it; {remedy}") from error
    except ValueError as error:
        known = [] if config is None else get_dataset_config_names(path)
        if config in (None, *known):
            raise
        raise UsageError(
            f"{path}: has no configuration {config!r}: download it, or choose others. {nearest(config, known)}"
        ) from error


def _read(path: str | os.PathLike, name: str, config: str | None) -> Dataset:
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        dataset = load_from_disk(str(path))[name]
    else:
        dataset = load_dataset(str(path), config, split=name)
    for column in dataset.column_names:
        if IMAGE_COLUMN.fullmatch(column):
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


def read_published(path: str | os.PathLike, split: str, *, config: str | None = None) -> Dataset:
    """Read one split of the data set at `path`, its pictures undecoded; `config` is for repositories with several."""
    names = published_splits(path, config)
    known = [name for name in PUBLISHED_NAMES.get(split, (split,)) if name in names]
    if not known:
        raise UsageError(f"{path}: has no split {split!r}; {nearest(split, names)}")
    return _read(path, known[0], config)


def read_benchmark(path: str | os.PathLike, *, config: str | None = None) -> Dataset:
    """Read the rows of a benchmark at `path`, undecoded: its validation split, or its only split.

    Benchmarks call the rows with published answers `val`; a bare parquet file, without the Hub's README, is one
    split, which `datasets` calls train.

    Raises:
        UsageError: several splits without a validation split.
    """
    names = published_splits(path, config)
    known = [name for name in PUBLISHED_NAMES["validation"] if name in names] or (names if len(names) == 1 else [])
    if not known:
        raise UsageError(f"{path}: has the splits {', '.join(names)} and none called val; give the published folder")
    return _read(path, known[0], config)


def rows_name(path: str | os.PathLike, split: str) -> str:
    """Return the name of the rows for error messages: the Hub id, or the folder's last name, and the split."""
    return f"{Path(path).name if os.path.isdir(path) else path} {split}"


def _check_pictures(
    pictures: pa.Table, name: str, row_ids: Sequence[str], path: str | os.PathLike, *, required: bool
) -> None:
    """Check that a row without bytes names a file inside the folder `path`."""
    column = pictures[name]
    for index in np.flatnonzero(pc.struct_field(column, "bytes").is_null()):
        item = column[int(index)].as_py()
        if item is not None and item["path"] and os.path.isdir(path):
            relative = os.path.relpath(os.path.realpath(item["path"]), os.path.realpath(path))
            existing_image(path, relative, row_ids[index], name)
        elif item is not None or required:
            remedy = "write the picture's bytes into the column, with datasets.Image and to_parquet or save_to_disk"
            raise field_error(row_ids[index], name, item, remedy)


def _lists(columns: Sequence[pa.StructArray]) -> pa.ListArray:
    """Return one list per row: the pictures in its columns, in order, without nulls."""
    valid = np.stack([column.is_valid().to_numpy(zero_copy_only=False) for column in columns], axis=1)
    offsets = pa.array(np.concatenate([np.zeros(1, np.int32), np.cumsum(valid.sum(axis=1), dtype=np.int32)]))
    rows, numbers = np.nonzero(valid)
    if len(columns) == 1:  # not copied where no row is null
        pictures = columns[0].drop_null()
    else:
        pictures = pa.concat_arrays(columns).take(pa.array(numbers * len(valid) + rows))
    return pa.ListArray.from_arrays(offsets, pictures, type=FEATURES.arrow_schema.field("images").type)


def _with_images(dataset: Dataset, pictures: pa.Table) -> Dataset:
    table = dataset.with_format("arrow")[:]
    lists = pa.chunked_array([_lists(batch.columns) for batch in pictures.to_batches()])
    table = table.set_column(table.column_names.index("images"), "images", lists)
    return Dataset(table, info=DatasetInfo(features=dataset.features))


def from_published(
    dataset: Dataset,
    path: str | os.PathLike,
    split: str,
    *,
    examples: Examples,
    rows: Container[int] | None = None,
    images: str = "required",
    columns: Sequence[str] = ("image",),
) -> Dataset:
    """Make a data set of the examples of `rows` (all by default) from `read_published`, with their pictures.

    images: "required", "optional" (a null is a text row), or "none" for text only.
    columns: hold the pictures, one each; nulls in any but the first are always allowed.
    """
    found = [name for name in columns if name in dataset.column_names]
    texts = dataset.remove_columns(found)
    numbered = ((index, row) for index, row in enumerate(texts) if rows is None or index in rows)
    name = rows_name(path, split)
    made = [(index, e) for index, row in numbered for e in examples(row, f"{name} row {index}")]
    indices = [index for index, _ in not_empty(made, name)]
    converted = to_dataset(example for _, example in made)
    if images == "none":
        return converted
    if columns[0] not in found:
        raise field_error(name, columns[0], sorted(dataset.column_names), "no such column among these; rename it")
    kept = dataset if indices == list(range(len(dataset))) else dataset.select(indices)
    pictures = kept.select_columns(found).with_format("arrow")[:]
    for column in found:
        required = images == "required" and column == columns[0]
        _check_pictures(pictures, column, converted["row_id"], path, required=required)
    return _with_images(converted, pictures)


def save_published(
    folder: str | os.PathLike,
    split: str,
    rows: list[dict],
    *,
    columns: Sequence[str] = ("image",),
    below: str = "data",
) -> None:
    """Write rows with PIL pictures (or None) in `columns` as the Hub stores them: a parquet file with the PNG bytes in
    the folder `below`."""
    content = {key: [row[key] for row in rows] for key in rows[0]}
    for name in columns:
        pictures = content[name]
        content[name] = [None if p is None else {"bytes": png_bytes(p), "path": None} for p in pictures]
    fixed = Features({name: Image(decode=False) for name in columns})
    dataset = Dataset.from_dict({name: content.pop(name) for name in columns}, features=fixed)
    for key, values in content.items():
        dataset = dataset.add_column(key, values)
    dataset = dataset.cast(Features({**dataset.features, **{name: Image() for name in columns}}))
    file = Path(folder) / below / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(file)
