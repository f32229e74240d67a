"""Cache the features of a frozen vision tower for a run's pictures on disk, for all epochs and runs.

    <cache>/<fingerprint>/description.json        tower, image processor, layers, precision of the features
                         /<name>.safetensors      SHA-256 of a picture's file → its features (tiles, patches, W)

The fingerprint is a hash of the description, so other towers or settings never use these features. A shard is
written completely or not at all: a stopped run loses the pictures of one shard.

Shapes: I images or tiles, patches of one, W width of the layers that the projector reads.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path

import torch
import transformers
from datasets import Dataset, config
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from mmcoconut.compat_mmcoconut import whole_tensor
from mmcoconut.data.images import content_keys, open_images
from mmcoconut.images_mmcoconut import makes_tiles
from mmcoconut.progress import progress
from mmcoconut.vlm_mmcoconut import ThinkingVLM


logger = logging.getLogger("mmcoconut")

DEFAULT_CACHE = Path(config.HF_DATASETS_CACHE, "mmcoconut_image_features")
DESCRIPTION_FILE = "description.json"
SHARD = ".safetensors"
PARTIAL = ".partial"
SHARD_PICTURES, SHARD_BYTES = 256, 2**28
OPEN_SHARDS = 256


def hash_of(module: nn.Module) -> str:
    """Return the SHA-256 of a module's weights, with names and types; under FSDP2 call this in every process."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = whole_tensor(tensor).cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def description_of(model, processor, mixed_precision: str) -> dict:
    """Return everything that the features of a picture depend on, other than the picture."""
    tower = model.vision_tower
    vision_config = json.loads(tower.config.to_json_string())
    vision_config.pop("_name_or_path", None)  # the same weights may have several paths
    return {
        "weights": hash_of(tower),
        "vision_config": vision_config,
        "attn_implementation": tower.config._attn_implementation,
        "vision_feature_layer": model.config.vision_feature_layer,
        "vision_last_norm": model.config.vision_last_norm,
        "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
        "image_processor": json.loads(processor.image_processor.to_json_string()),
        "use_thumbnail": processor.use_thumbnail,
        "mixed_precision": mixed_precision,
        "transformers": transformers.__version__,
    }


def fingerprint(description: Mapping) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


@lru_cache(maxsize=OPEN_SHARDS)
def open_shard(path: Path):
    """Open a shard, memory-mapped and kept open; each process opens its own.

    Raises:
        ValueError: the file is truncated or no shard.
    """
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a complete file of image features ({path.stat().st_size} bytes; {error}). Delete it, and "
            "its features are computed again."
        ) from error


class ImageFeatures:
    """Features of pictures by the content of their files, read on demand from a folder of shards.

    Args:
        folder: folder of one fingerprint.
        tower_hash: `hash_of` the tower that computed them.
        tiled: True if a picture may have several tiles, so batches count them.
    """

    def __init__(self, folder: Path, *, tower_hash: str, tiled: bool):
        self.folder, self.tower_hash, self.tiled = folder, tower_hash, tiled
        self.shards: dict[str, Path] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look for new shards."""
        known = {*self.shards.values()}
        for path in sorted({*self.folder.glob(f"*{SHARD}")} - known):
            self.shards |= dict.fromkeys(open_shard(path).keys(), path)

    def __contains__(self, key: str) -> bool:
        return key in self.shards

    def of_rows(self, rows: Sequence[Mapping]) -> tuple[dict, list[list[int]]]:
        """Return the features of all rows' images in order, and the tiles of each image of each row.

        Returns:
            image_features (I, patches, W), and num_tiles (images,) if pictures have tiles; {} without pictures.

        Raises:
            ValueError: the features of a picture are missing.
        """
        found, tiles = [], []
        for row in rows:
            keys = content_keys(row)
            if any(key not in self for key in keys):
                raise ValueError(
                    f"{row['row_id']}: {self.folder} lacks the features of a picture. Rows outside the "
                    "run's splits need precompute_image_features: false."
                )
            of_row = [open_shard(self.shards[key]).get_tensor(key) for key in keys]  # (tiles, patches, W) each
            tiles.append([len(features) for features in of_row])
            found += of_row
        if not found:
            return {}, tiles
        counts = {"num_tiles": torch.tensor(sum(tiles, []))} if self.tiled else {}
        return {"image_features": torch.cat(found), **counts}, tiles

    def check_tower(self, model) -> None:
        """Raise if the weights of the model's tower are not those that computed the features."""
        if hash_of(model.vision_tower) != self.tower_hash:
            raise ValueError(
                "The checkpoint's vision tower differs from the recipe's, which computed the features in "
                f"{self.folder}. Resume without precompute_image_features."
            )


def check_frozen(model) -> None:
    """Refuse a trained tower, whose features would be outdated, and a VLM's own class, which reads pixels."""
    if isinstance(model, ThinkingVLM):
        raise ValueError(
            f"precompute_image_features needs a composed model, and this is a {type(model).__name__}. "
            "Remove this key, or convert an InternVL or LLaVA with `python -m mmcoconut.convert_vlm … --to composed`."
        )
    trained = [name for name, parameter in model.vision_tower.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"precompute_image_features needs a frozen vision tower, and {len(trained)} of its parameters are trained "
            f"({trained[0]}, …). Add vision_tower to `freeze`, keep `lora` out of it, or remove this key."
        )


@contextmanager
def tower_in_place(trainer) -> Iterator[None]:
    """Within this context the tower is in evaluation mode and on the run's device; models are sharded later."""
    tower, device = trainer.model.vision_tower.eval(), trainer.model.vision_tower.device
    tower.to(trainer.args.device)
    yield
    tower.to(device)


@contextmanager
def one_run_at_a_time(folder: Path, accelerator) -> Iterator[None]:
    """Make runs that share a folder fill it one after the other, with all processes of a run together."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock") if accelerator.is_main_process else nullcontext():
        for path in folder.glob(f"*{PARTIAL}") if accelerator.is_main_process else ():  # of a stopped run
            path.unlink()
        accelerator.wait_for_everyone()
        yield
        accelerator.wait_for_everyone()


def distinct_pictures(datasets: Sequence[Dataset], *, silent: bool) -> dict[str, tuple[int, int, int]]:
    """Return the first location of each distinct picture by key: data set, row, number within the row."""
    places = {}
    with progress(total=sum(map(len, datasets)), desc="reading pictures", silent=silent) as bar:
        for number, rows in enumerate(datasets):
            for index, row in enumerate(rows.select_columns(["images", "row_id"])):
                for position, key in enumerate(content_keys(row)):
                    places.setdefault(key, (number, index, position))
                bar.update()
    return places


def load_pixels(pictures, *, datasets: Sequence[Dataset], processor) -> tuple[list[str], torch.Tensor, list[int]]:
    """Return keys, pixels (I, channels, height, width) and numbers of tiles of pictures (key, location)."""
    groups = []
    for _, (number, index, position) in pictures:
        row = datasets[number][index]
        groups.append(open_images({"images": [row["images"][position]], "row_id": row["row_id"]}))
    inputs, tiles = processor.encode_images(groups, return_tensors="pt")
    return [key for key, _ in pictures], inputs["pixel_values"], [count for [count] in tiles]


@torch.no_grad()
def run_tower(model, pixel_values: torch.Tensor, *, batch_size: int, accelerator) -> torch.Tensor:
    """Return features (I, patches, W) in the tower's own precision, as training's forward pass would compute them."""
    tower = model.vision_tower
    parts = pixel_values.to(tower.dtype).split(batch_size)
    with accelerator.autocast():
        features = [model.get_vision_features(part.to(tower.device)) for part in parts]
    return torch.cat(features).to(tower.dtype).cpu()


def write_shard(folder: Path, features: Mapping[str, torch.Tensor]) -> None:
    """Write a shard completely or not at all, named by its first picture."""
    path = folder / f"{next(iter(features))}{SHARD}"
    save_file(dict(features), path.with_suffix(PARTIAL))
    path.with_suffix(PARTIAL).replace(path)


def write_features(batches: Iterable, folder: Path, *, bar) -> None:
    """Write shards of batches (keys, features (I, patches, W), tiles of each picture)."""
    shard, num_bytes = {}, 0
    for keys, features, tiles in batches:
        for key, of_picture in zip(keys, features.split(tiles)):
            shard[key] = of_picture.clone()  # a shard's tensors may not share memory
            num_bytes += of_picture.nbytes
        bar.update(len(keys))
        if len(shard) >= SHARD_PICTURES or num_bytes >= SHARD_BYTES:
            write_shard(folder, shard)
            shard, num_bytes = {}, 0
    if shard:
        write_shard(folder, shard)


def compute_features(trainer, datasets: Sequence[Dataset], pictures: list[tuple], folder: Path) -> None:
    """Compute and write the features of this process's pictures."""
    args, batch_size = trainer.args, trainer.args.per_device_eval_batch_size
    load = partial(load_pixels, datasets=datasets, processor=trainer.processing_class)
    apart = torch.Generator()  # keeps the run's random draws, of rows and dropout, as without features
    loader = DataLoader(
        pictures, batch_size, collate_fn=load, num_workers=args.dataloader_num_workers, generator=apart
    )
    run = partial(run_tower, trainer.model, batch_size=batch_size, accelerator=trainer.accelerator)
    silent = args.disable_tqdm or not trainer.is_local_process_zero()
    with progress(total=len(pictures), unit="pictures", desc="image features", silent=silent) as bar:
        write_features(((keys, run(pixels), tiles) for keys, pixels, tiles in loader), folder, bar=bar)


def fill_cache(trainer, datasets: Sequence[Dataset], cache: str | Path) -> tuple[ImageFeatures, dict]:
    """Fill the cache; return the features and the location of each picture, before completeness is checked."""
    accelerator, processor = trainer.accelerator, trainer.processing_class
    description = description_of(trainer.model, processor, accelerator.mixed_precision)
    folder = Path(cache, fingerprint(description))
    pictures = distinct_pictures(datasets, silent=trainer.args.disable_tqdm or not trainer.is_local_process_zero())
    with one_run_at_a_time(folder, accelerator):
        tiled = makes_tiles(processor.image_processor)
        features = ImageFeatures(folder, tower_hash=description["weights"], tiled=tiled)
        missing = [(key, place) for key, place in pictures.items() if key not in features]
        if trainer.is_world_process_zero():
            (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            logger.info("image features: %d of %d pictures to compute, %s", len(missing), len(pictures), folder)
        accelerator.wait_for_everyone()  # nobody writes until all know what is missing
        compute_features(trainer, datasets, missing[accelerator.process_index :: accelerator.num_processes], folder)
    features.refresh()
    return features, pictures


def precompute_image_features(trainer, datasets: Sequence[Dataset], cache: str | Path) -> ImageFeatures:
    """Return the features of all pictures of the data sets; each process computes its part of those not cached.

    Args:
        trainer: a CurriculumTrainer before training.
        cache: a folder that runs may share, also concurrently.

    Raises:
        ValueError: the tower is trained; the processes do not share the folder.
    """
    check_frozen(trainer.model)
    with tower_in_place(trainer):
        features, pictures = fill_cache(trainer, datasets, cache)
    absent = pictures.keys() - features.shards.keys()
    if absent:
        raise ValueError(
            f"Features of {len(absent)} pictures are missing from {features.folder}, because other processes wrote "
            "them elsewhere. Set image_features_cache to a folder that all machines share."
        )
    return features
