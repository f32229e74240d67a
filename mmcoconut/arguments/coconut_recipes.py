"""Translate a YAML file of facebookresearch/coconut (args/*.yaml) to a recipe with mmcoconut's keys."""

from pathlib import Path

from transformers.utils import logging

from mmcoconut.arguments.recipe_files import scalar
from mmcoconut.errors import RecipeError


logger = logging.get_logger(__name__)

COCONUT_RENAMED = {
    "model_id": "text_model",
    "clip_id": "vision_model",
    "vision_model_id": "vision_model",
    "load_model_path": "model",
    "batch_size_training": "per_device_train_batch_size",
    "lr": "learning_rate",
    "resume": "start_epoch",
}
BACKBONES = ("text_model", "vision_model")
COCONUT_MODES = ("coconut", "cot", "no_thoughts", "no_cot")
COCONUT_OTHERS = ("num_epochs", "save_path", "name", "only_eval", "save_only_improve")
COCONUT_FILES = {"train_path": "train", "val_path": "validation"}
COCONUT_KEYS = {*COCONUT_RENAMED, *COCONUT_MODES, *COCONUT_OTHERS, *COCONUT_FILES, "image_root"}
# Defaults of the original's script.
COCONUT_HABITS = {"eval_strategy": "epoch", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
COCONUT_HABITS |= {"new_token_init": "<<"}
COCONUT_VISION = {"vision_model": "openai/clip-vit-base-patch32", "vision_model_type": "clip_vision_model"}


def _coconut_settings(old: dict):
    """Yield (old key, new key, value) for the old keys."""
    for key, new in COCONUT_RENAMED.items():
        if key in old and not ("load_model_path" in old and new in BACKBONES):
            yield key, new, old[key]
    yield from ((mode, "mode", mode) for mode in COCONUT_MODES if old.get(mode))
    if "num_epochs" in old:
        yield "num_epochs", "num_train_epochs", old["num_epochs"] - old.get("resume", 0)
    if "name" in old:
        yield "name", "run_name", str(old["name"])
    if "save_path" in old:
        yield "save_path", "output_dir", str(Path(str(old["save_path"]), str(old.get("name", ""))))
    files = {split: old[key] for key, split in COCONUT_FILES.items() if key in old}
    options = ({"file": files} if files else {}) | {key: old[key] for key in ["image_root"] if key in old}
    if options:
        yield "val_path", "dataset", "json_steps"
        yield "val_path", "dataset_options", options
    if old.get("only_eval"):
        yield from (("only_eval", "do_train", False), ("only_eval", "do_eval", True))
    if "save_only_improve" in old:
        yield "save_only_improve", "save_strategy", "no" if old["save_only_improve"] else "epoch"
    if old.get("debug"):
        yield from (("debug", "max_train_samples", 32), ("debug", "max_eval_samples", 32))


def _add_coconut_habits(new: dict, old: dict) -> None:
    """Add defaults of the original's script; the recipe's own keys take precedence."""
    for key, value in COCONUT_HABITS.items():
        new.setdefault(key, value)
    new.setdefault("max_new_tokens", 64 if "gsm" in str(old.get("val_path")) else 128)
    if not new.keys() & {"model", "vlm", "vision_model", "vision_config"}:
        logger.warning(f"this Coconut recipe names no vision tower: using {COCONUT_VISION['vision_model']}")
        new |= COCONUT_VISION
    if "gpt2" in str(new.get("text_model")):
        new.setdefault("text_model_type", "gpt2")
    if "image_root" not in old and "dataset_options" in new:
        new["dataset_options"]["images_required"] = False


def _add_sources(sources: dict[str, str], old: dict) -> None:
    """Record the file of each old key as the file of the new key."""
    names = [(old_key, key) for old_key, key, _ in _coconut_settings(old) if key != "dataset_options"]
    names += [(key, f"dataset_options.file.{split}") for key, split in COCONUT_FILES.items()]
    for old_key, key in [*names, ("image_root", "dataset_options.image_root")]:
        if old_key in sources:
            sources.setdefault(key, sources[old_key])


def translate_coconut_keys(
    values: dict, problems: list[tuple] | None = None, sources: dict[str, str] | None = None
) -> dict:
    """Translate a YAML file of facebookresearch/coconut (args/*.yaml) to a recipe; return other recipes unchanged.

    | old key | becomes |
    |---|---|
    | model_id; clip_id or vision_model_id | text_model; vision_model (without: openai/clip-vit-base-patch32) |
    | load_model_path | model, instead of the backbones; "None" is none |
    | coconut, cot, no_thoughts, no_cot | mode: the one that is true |
    | train_path, val_path; image_root | dataset: json_steps, dataset_options.file; .image_root |
    | num_epochs, resume | num_train_epochs = num_epochs - resume, start_epoch = resume |
    | batch_size_training, lr | per_device_train_batch_size, learning_rate |
    | save_path, name | output_dir = save_path/name, run_name = name |
    | save_only_improve | true: save_strategy no (the best of each stage is always kept); false: save_strategy epoch |
    | only_eval | true: do_train false, do_eval true |
    | debug | true: max_train_samples and max_eval_samples 32 |

    All other keys keep their names. model_id adds the original script's defaults, which the recipe may override:
    COCONUT_HABITS, max_new_tokens 64 (GSM) or 128, and without image_root images_required false.
    Contradictions are added to `problems`, or raised as RecipeError if that is None. `sources`, the files of the
    keys, is extended by the new keys.
    """
    if not values.keys() & COCONUT_KEYS:
        return values
    found = [] if problems is None else problems
    old = {key: scalar(value) for key, value in values.items() if key in COCONUT_KEYS}
    if isinstance(scalar(values.get("debug")), bool):  # otherwise `debug` is text
        old["debug"] = scalar(values["debug"])
    new = {key: value for key, value in values.items() if key not in old}
    old = {key: value for key, value in old.items() if value not in (None, "None")}
    for key in ("num_epochs", "resume"):
        if type(old.get(key, 0)) is not int:
            found.append((key, old.pop(key), "expected int"))
    if sources is not None:
        _add_sources(sources, old)
    for old_key, key, value in _coconut_settings(old):
        if key in new:
            found.append((old_key, value, f"`{key}` is set too: keep one of them"))
        new.setdefault(key, value)
    if "mode" not in new and old.keys() & {*COCONUT_MODES}:
        found.append(("coconut", False, f"set exactly one of {', '.join(COCONUT_MODES)} to true"))
    if "model_id" in old:
        _add_coconut_habits(new, old)
    if problems is None and found:
        raise RecipeError("recipe", found)
    return new
