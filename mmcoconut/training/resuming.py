"""Compare a checkpoint's run with the run that resumes from it, before anything is written.

The course of a run is everything that determines its updates and evaluations: its recipe, the training and
evaluation rows, the rows per update. Each checkpoint saves it in course.json.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml
from accelerate.utils import broadcast_object_list

from mmcoconut.arguments.choices import DATA_PATHS, FOLDERS
from mmcoconut.arguments.fields import TYPES, default_of
from mmcoconut.arguments.recipe_files import RecipeLoader
from mmcoconut.arguments.recipes import recipe_text, save_recipe
from mmcoconut.data import OPTIONAL_FEATURES
from mmcoconut.errors import UsageError
from mmcoconut.models import load_processor
from mmcoconut.objectives.registry import make_objectives
from mmcoconut.records import COURSE_FILE, RECIPE_FILE, read_json
from mmcoconut.training.checkpoints import choose_checkpoint


logger = logging.getLogger("mmcoconut")

ROWS_AT_A_TIME = 1000
# Keys that change neither the updates nor the evaluations, except for rounding and dropout's random draws.
HARMLESS = ("output_dir", "smoke_test", "do_train", "do_eval", "do_predict", "license", "test_split", "use_cpu")
HARMLESS += ("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter")
HARMLESS += ("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to")
HARMLESS += ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "debug")
HARMLESS += ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size")
HARMLESS += ("eval_accumulation_steps", "eval_use_gather_object", "eval_do_concat_batches", "skip_memory_metrics")
HARMLESS += ("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node")
HARMLESS += ("enable_jit_checkpoint", "push_to_hub", "hub_private_repo", "hub_model_id", "hub_strategy")
HARMLESS += ("hub_always_push", "hub_revision", "dataloader_num_workers", "dataloader_pin_memory")
HARMLESS += ("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "torch_empty_cache_steps")
HARMLESS += ("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing")
HARMLESS += ("gradient_checkpointing_kwargs", "checkpointed_passes", "defer_weight_gradients", "attn_implementation")
HARMLESS += ("torch_compile", "torch_compile_backend", "torch_compile_mode", "image_features_cache")
HARMLESS += ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph")
HARMLESS += ("ddp_backend", "ddp_timeout", "log_gradient_cosine")
# Harmless if the rows are the same.
NAME_ROWS = ("dataset", "dataset_options", "max_train_samples", "max_eval_samples", "unreadable_images")
# Harmless if their product with the number of devices is the same.
SPLIT_BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps")
ROWS_PER_UPDATE = "rows per update"
LENGTHS = ("num_train_epochs", "max_steps")


class Change(NamedTuple):
    """A setting that differs between a checkpoint's run and the current run; `key` is its key in a recipe."""

    key: str
    name: str
    before: object
    now: object

    def __str__(self) -> str:
        return f"{self.name}: {said(self.before)} in the checkpoint, {said(self.now)} now"


def said(value) -> str:
    return "not set" if value is None else str(value) if isinstance(value, Rows) else repr(value)


class Rows(NamedTuple):
    """The number of rows of a split, and a fingerprint of their content."""

    number: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.number} rows with fingerprint {self.fingerprint[:12]}"


def picture_mark(picture: Mapping) -> str:
    """Return an identifier of a picture: a hash of its bytes, or its file name, since folders may move."""
    if picture["bytes"] is None:
        return Path(picture["path"]).name
    return hashlib.sha256(picture["bytes"]).hexdigest()


def fingerprint(dataset, fields: Collection[str] = ()) -> Rows:
    """Return the number of rows and a SHA-256 of their texts and pictures, in order.

    Picture files are identified by file name; `row_id`, which may hold a path, is left out.

    fields: fields of OPTIONAL_FEATURES that are read.
    """
    left_out = {"row_id", "index", *OPTIONAL_FEATURES} - {*fields}
    digest = hashlib.sha256()
    for rows in dataset.iter(ROWS_AT_A_TIME):
        images = [[picture_mark(picture) for picture in pictures] for pictures in rows["images"]]
        columns = {name: values for name, values in rows.items() if name not in left_out}
        if "helper_image" in columns:
            marks = [picture and picture_mark(picture) for picture in columns["helper_image"]]
            columns["helper_image"] = marks
        digest.update(json.dumps({**columns, "images": images}, sort_keys=True).encode())
    return Rows(len(dataset), digest.hexdigest())


def recipe_of(arguments) -> dict:
    """Return the recipe in the form of recipe.yaml."""
    return yaml.load(recipe_text(*arguments), RecipeLoader)


def course_of(arguments, splits: Mapping) -> dict:
    """Return the course of a run with these arguments and splits `train` and `eval`, in JSON types."""
    _, _, curriculum_args, run_args = arguments
    fields = {field for objective in make_objectives(curriculum_args.objectives) for field in objective.fields}
    return {
        "recipe": recipe_of(arguments),
        "rows": {name: fingerprint(splits[name], fields)._asdict() for name in ("train", "eval")},
        "processes": run_args.world_size,
        ROWS_PER_UPDATE: run_args.train_batch_size * run_args.gradient_accumulation_steps * run_args.world_size,
    }


def recorded_course(checkpoint: Path) -> dict:
    """Return the course saved in a checkpoint; for earlier versions the recipe in the run's folder, if any."""
    record, recipe = checkpoint / COURSE_FILE, checkpoint.parent / RECIPE_FILE
    if record.is_file():
        return read_json(record)["course"]
    if recipe.is_file():
        return {"recipe": yaml.load(recipe.read_text(encoding="utf-8"), RecipeLoader)}
    return {}


def changes_in(before: Mapping, now: Mapping, *, key: str = "", path: str = "") -> Iterator[Change]:
    """Yield the differences between two recipes, per entry in mappings; keys that this version lacks are left out."""
    for name in {**before, **now}:
        old, new = (values.get(name, None if path else default_of(name)) for values in (before, now))
        if old == new or not (path or name in TYPES):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changes_in(old, new, key=key or name, path=f"{path}{name}.")
        else:
            yield Change(key or name, f"{path}{name}", old, new)


def changed_rows(before: Mapping, now: Mapping) -> list[Change]:
    """Return the splits that differ; a split that an earlier version did not record counts as equal."""
    names = {"train": "training rows", "eval": "evaluation rows"}
    pairs = [(name, before["rows"][name], now["rows"][name]) for name in names if "rows" in before]
    return [Change("rows", names[name], Rows(**old), Rows(**new)) for name, old, new in pairs if old != new]


def changed_batches(before: Mapping, now: Mapping) -> list[Change]:
    """Return the differences in rows per update and in the number of processes."""
    keys = [key for key in (ROWS_PER_UPDATE, "processes") if key in before]
    return [Change(key, key, before[key], now[key]) for key in keys if before[key] != now[key]]


def constant_rate(recipe: Mapping) -> bool:
    """Return True if the learning rate does not depend on the length of the run."""
    warmup = recipe.get("warmup_steps", 0)  # below 1 it is a fraction of the length
    kind = recipe.get("lr_scheduler_type")
    return kind == "constant" or (kind == "constant_with_warmup" and (not warmup or warmup >= 1))


def lengthens(change: Change, recipe: Mapping) -> bool:
    """Return True if a change only makes a run longer and leaves its earlier updates unchanged."""
    of_epochs = recipe.get("max_steps", default_of("max_steps")) < 0
    if change.key == "num_train_epochs" and not of_epochs:
        return True  # max_steps decides
    return constant_rate(recipe) and 0 < change.before < change.now


def splits_alike(recipe: Mapping) -> bool:
    """Return True if the loss of an update does not depend on how its rows are split into batches."""
    terms = recipe.get("align_weight") or recipe.get("objectives")  # means over batches
    return recipe.get("objective") == "supervised" and not terms


def sort_changes(before: Mapping, now: Mapping) -> tuple[list[Change], list[Change]]:
    """Return the changes to refuse, and the changes to adopt because they do not affect the course."""
    recipe, rows, batches = now["recipe"], changed_rows(before, now), changed_batches(before, now)
    same_rows = "rows" in before and not rows
    same_batches = ROWS_PER_UPDATE in before and splits_alike(recipe)
    same_batches = same_batches and all(change.key != ROWS_PER_UPDATE for change in batches)

    def is_harmless(change: Change) -> bool:
        if change.key in NAME_ROWS:
            return same_rows
        if change.key in (*SPLIT_BATCHES, "processes"):
            return same_batches
        if change.key in LENGTHS:
            return lengthens(change, recipe)
        return change.key in HARMLESS

    changes = [*rows, *batches, *changes_in(before["recipe"], recipe)]
    refused = [change for change in changes if not is_harmless(change)]
    return refused, [change for change in changes if change not in refused]


def remedy_for(checkpoint: Path) -> str:
    remedy = "Set them as the checkpoint has them"
    if (checkpoint / "config.json").is_file():
        remedy += f", or start another run from its weights: --model {checkpoint} and another --output_dir"
    return f"{remedy}."


def check_course(checkpoint: Path, course: Mapping) -> None:
    """Refuse to resume a run with another course; log adopted changes, and what cannot be compared.

    Raises:
        ValueError: lists every setting that differs, with both values.
    """
    before = recorded_course(checkpoint)
    if not before:
        logger.warning("%s does not record how it was trained: nothing can be compared", checkpoint)
        return
    if "rows" not in before:
        logger.warning("%s was saved by an earlier version: its rows and devices cannot be compared", checkpoint)
    refused, adopted = sort_changes(before, json.loads(json.dumps(course)))
    if refused:
        lines = [f"{checkpoint} was trained with other settings than this run", *map(str, refused)]
        raise UsageError("\n  - ".join(lines) + f"\n{remedy_for(checkpoint)}")
    adopted = [change for change in adopted if change.key != "output_dir"]
    if adopted:
        logger.info("resuming from %s with changes: %s", checkpoint, "; ".join(map(str, adopted)))


def check_tokenizer(checkpoint: Path, tokenizer) -> None:
    """Refuse a tokenizer whose ids differ from the checkpoint's.

    Raises:
        ValueError: names one of the tokens.
    """
    saved = load_processor(str(checkpoint)).tokenizer.get_vocab()
    present = tokenizer.get_vocab()
    changed = sorted(token for token in saved.keys() | present.keys() if saved.get(token) != present.get(token))
    if changed:
        token = changed[0]
        raise UsageError(
            f"The tokenizer differs from that of {checkpoint} in {len(changed)} tokens, such as {token!r}: its id is "
            f"{saved.get(token)} there and {present.get(token)} now. Set `tokenizer` as in the original run."
        )


def agree(choose: Callable[[], Path], run_args) -> Path:
    """Return the choice of process 0 in all processes; a ValueError there is raised in all."""
    outcome = [None, None]
    if run_args.process_index == 0:
        try:
            outcome = [choose(), None]
        except ValueError as error:
            outcome = [None, str(error)]
    chosen, message = broadcast_object_list(outcome)
    if message is not None:
        raise UsageError(message)
    return chosen


def read_paths(arguments) -> dict[str, str]:
    """Return the folders and files that a run reads, by key."""
    model_args, data_args, _, _ = arguments
    paths = {key: getattr(model_args, key) for key in FOLDERS if hasattr(model_args, key)}
    paths["image_features_cache"] = data_args.image_features_cache
    for key in DATA_PATHS:
        option = data_args.dataset_options.get(key)
        options = option if isinstance(option, Mapping) else {"": option}
        paths |= {f"dataset_options.{key}.{split}".rstrip("."): path for split, path in options.items()}
    return {key: str(path) for key, path in paths.items() if path is not None}


def check_output(arguments) -> Path | None:
    """Return the checkpoint to resume from, if any; nothing is written yet.

    Raises:
        ValueError: the folder holds an earlier run and no option decides what to do with it; no complete checkpoint; a
            folder that --overwrite must not delete.
    """
    run_args = arguments[-1]
    folder, resume = Path(run_args.output_dir), run_args.resume_from_checkpoint
    if resume:
        return agree(lambda: choose_checkpoint(folder, resume), run_args)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not run_args.overwrite:
        raise UsageError(
            f"{folder} holds an earlier run. Set --resume_from_checkpoint true to resume it, --overwrite true to "
            "delete it, or another --output_dir."
        )
    if not (folder / RECIPE_FILE).exists():
        raise UsageError(f"{folder} holds no {RECIPE_FILE}, so no run of this script: --overwrite does not delete it.")
    for key, path in read_paths(arguments).items():
        if Path(path).resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"--overwrite would delete {path}, which `{key}` reads: set another --output_dir.")
    return None


def prepare_output(arguments) -> None:
    """Delete the run to overwrite, and write recipe.yaml; call this once nothing else can be refused.

    The old recipe.yaml remains until the new one replaces it, so a run killed in between can be repeated.
    """
    run_args = arguments[-1]
    folder = Path(run_args.output_dir)
    with run_args.main_process_first(desc="preparing the output folder"):
        if run_args.process_index == 0:
            overwritten = run_args.overwrite and not run_args.smoke_test and folder.exists()
            for path in folder.iterdir() if overwritten else ():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != RECIPE_FILE:
                    path.unlink()
            save_recipe(folder / RECIPE_FILE, *arguments)
