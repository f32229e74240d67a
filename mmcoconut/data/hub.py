"""Reads data sets published with pictures in a column `image`: from the Hub, from a folder of parquet files, or from
`save_to_disk`. The pictures stay where they are, undecoded and, if their file is memory-mapped, on disk."""

import os
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, Image, get_dataset_split_names, load_dataset, load_from_disk

from mmcoconut.data import FEATURES, nearest, to_dataset
from mmcoconut.data.arrow_mazes import png_bytes
from mmcoconut.data.json_steps import existing_image, field_error
from mmcoconut.data.public import Examples, not_empty
from mmcoconut.errors import UsageError


PUBLISHED_NAMES = {"validation": ("validation", "valid", "val", "dev")}  # of our splits; the others have one


def published_splits(path: str | os.PathLike, config: str | None = None) -> list[str]:
    """The names of the splits at `path`, without loading them; ValueError where there is nothing to load."""
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


def read_published(path: str | os.PathLike, split: str, *, config: str | None = None) -> Dataset:
    """One split of the data set at `path`, its pictures undecoded; `config` is for repositories that hold several."""
    names = published_splits(path, config)
    known = [name for name in PUBLISHED_NAMES.get(split, (split,)) if name in names]
    if not known:
        raise UsageError(f"{path}: has no split {split!r}; {nearest(split, names)}")
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        dataset = load_from_disk(str(path))[known[0]]
    else:
        dataset = load_dataset(str(path), config, split=known[0])
    return dataset.cast_column("image", Image(decode=False)) if "image" in dataset.column_names else dataset


def rows_name(path: str | os.PathLike, split: str) -> str:
    """Return what error messages call the rows: the Hub id, or the folder's last name, and the split."""
    return f"{Path(path).name if os.path.isdir(path) else path} {split}"


def _check_pictures(column: pa.ChunkedArray, row_ids: Sequence[str], path: str | os.PathLike, *, required: bool):
    """A row may do without its bytes only when the file it names lies inside the folder `path`."""
    for index in np.flatnonzero(pc.struct_field(column, "bytes").is_null()):
        item = column[int(index)].as_py()
        if item is not None and item["path"] and os.path.isdir(path):
            relative = os.path.relpath(os.path.realpath(item["path"]), os.path.realpath(path))
            existing_image(path, relative, row_ids[index])
        elif item is not None or required:
            remedy = "write the picture's bytes into the column, with datasets.Image and to_parquet or save_to_disk"
            raise field_error(row_ids[index], "image", item, remedy)


def _lists(pictures: pa.StructArray) -> pa.ListArray:
    """One list a row: of its picture, or empty where that is null."""
    ends = np.cumsum(pictures.is_valid().to_numpy(zero_copy_only=False), dtype=np.int32)
    offsets = pa.array(np.concatenate([np.zeros(1, np.int32), ends]))
    return pa.ListArray.from_arrays(offsets, pictures.drop_null(), type=FEATURES.arrow_schema.field("images").type)


def _with_images(dataset: Dataset, images: pa.ChunkedArray) -> Dataset:
    table = dataset.with_format("arrow")[:]
    lists = pa.chunked_array([_lists(chunk) for chunk in images.chunks])
    table = table.set_column(table.column_names.index("images"), "images", lists)
    return Dataset(table, info=DatasetInfo(features=FEATURES))


def from_published(
    dataset: Dataset,
    path: str | os.PathLike,
    split: str,
    *,
    examples: Examples,
    rows: Container[int] | None = None,
    images: str = "required",
) -> Dataset:
    """A data set of the examples of `rows` (all by default) of what `read_published` gave, with their pictures.

    images: "required", "optional" (a null is a text row), or "none" for text only.
    """
    texts = dataset.remove_columns("image") if "image" in dataset.column_names else dataset
    numbered = ((index, row) for index, row in enumerate(texts) if rows is None or index in rows)
    name = rows_name(path, split)
    found = [(index, e) for index, row in numbered for e in examples(row, f"{name} row {index}")]
    indices = [index for index, _ in not_empty(found, name)]
    converted = to_dataset(example for _, example in found)
    if images == "none":
        return converted
    if "image" not in dataset.column_names:
        raise field_error(name, "image", sorted(dataset.column_names), "no such column among these; rename it")
    kept = dataset if indices == list(range(len(dataset))) else dataset.select(indices)
    pictures = kept.with_format("arrow")[:]["image"]
    _check_pictures(pictures, converted["row_id"], path, required=images == "required")
    return _with_images(converted, pictures)


def save_published(folder: str | os.PathLike, split: str, rows: list[dict]) -> None:
    """Writes rows with a PIL picture in `image` as the Hub stores them: a parquet file that holds the PNG bytes."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns["image"] = [{"bytes": png_bytes(picture), "path": None} for picture in columns["image"]]
    dataset = Dataset.from_dict(columns).cast_column("image", Image(decode=False))
    dataset = dataset.cast(Features({**dataset.features, "image": Image()}))
    file = Path(folder) / "data" / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(file)
