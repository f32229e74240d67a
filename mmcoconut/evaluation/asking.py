"""Arguments that evaluation, audit and demo share: checkpoint and rows, from the command line and a recipe."""

import logging
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers.hf_argparser import HfArg

from mmcoconut.arguments.recipes import read_arguments, read_recipe
from mmcoconut.data import drop_unreadable, load_examples
from mmcoconut.data.conversations import LONG_ROWS, fit_rows
from mmcoconut.errors import RecipeError, UsageError, folder_remedy, is_missing_folder
from mmcoconut.evaluation.answering import Answerer
from mmcoconut.passes_mmcoconut import position_limit
from mmcoconut.records import RECIPE_FILE, RESULTS_FILE, read_json
from mmcoconut.training.layout import read_layout, refused


logger = logging.getLogger("mmcoconut")

# Answers are generated, or the most likely choice is taken.
SCORE_BY = ("generation", "likelihood", "likelihood_per_token")
CHOICES = {"score_by": SCORE_BY, "long_rows": LONG_ROWS, "dtype": ("auto", "float32", "bfloat16", "float16")}
# Keys that default to the run's own recipe.
FROM_RECIPE = ("dataset", "dataset_options", "metric", "max_new_tokens", "num_beams", "unreadable_images")
FROM_RECIPE += ("max_length", "long_rows")
NEW_TOKENS = 64  # if neither command nor recipe sets it


@dataclass
class EvaluationArguments:
    """Checkpoint, data and scoring of an evaluation."""

    model: str | None = HfArg(default=None, help="Folder or Hub id of a trained checkpoint.")
    revision: str | None = HfArg(default=None, help="Branch, tag or commit of a checkpoint on the Hub.")
    recipe: str | None = HfArg(default=None, help="Recipe to take the data from; default: the one in `model`.")
    dataset: str | None = HfArg(default=None, help="Name of the data set, from mmcoconut.data.DATASETS.")
    dataset_options: dict | None = HfArg(default=None, help="Options of the data set: --dataset_options.folder …")
    split: str = HfArg(default="test", help="Split to answer.")
    max_samples: int | None = HfArg(default=None, help="Answer only this many first rows.")
    metric: str | None = HfArg(default=None, help="Name of the metric; default: the recipe's, or the data set's.")
    score_by: str = HfArg(default="generation", help="`generation`, or `likelihood`: score the most likely choice.")
    num_latents: int | None = HfArg(default=None, help="Thoughts per question; default: the checkpoint's.")
    stop_threshold: float = HfArg(
        default=0.5, help="Stop thinking when the stop probability exceeds this; 1 never stops."
    )
    max_new_tokens: int | None = HfArg(default=None, help="Maximum tokens per answer; default: the recipe's, or 64.")
    num_beams: int | None = HfArg(default=None, help="Number of beams; default: the recipe's, or 1 (greedy).")
    unreadable_images: str | None = HfArg(default=None, help="`error` or `skip`; default: the recipe's, or `error`.")
    max_length: int | None = HfArg(
        default=None, help="Maximum tokens of a row with its answer; default: the recipe's."
    )
    long_rows: str | None = HfArg(default=None, help="`error` or `cut`; default: the recipe's, or `error`.")
    batch_size: int = HfArg(default=32, help="Rows per batch in each process.")
    dtype: str = HfArg(default="auto", help="Data type of the weights; `auto`: as they were saved.")
    seed: int = HfArg(default=0, help="Seed of the bootstrap.")
    output_dir: str | None = HfArg(
        default=None, help="Output folder; default: outputs/evaluation/<model>-<dataset>-<split>."
    )
    overwrite: bool = HfArg(default=False, help="Delete an earlier evaluation in output_dir.")


def read_asked(argv: list[str], cls, command: str):
    """Parse the arguments of a command of `mmcoconut` that runs a checkpoint on rows.

    Raises:
        RecipeError: every argument that is unknown, of the wrong type or missing.
    """
    arguments = read_arguments(argv, cls, f"mmcoconut {command} MODEL [--key value ...]")
    problems = [
        (name, getattr(arguments, name), f"choose one of {', '.join(choices)}")
        for name, choices in CHOICES.items()
        if getattr(arguments, name, None) not in (None, *choices)
    ]
    if arguments.model is None:
        problems.append(("model", None, "name a checkpoint: its folder or Hub id"))
    elif is_missing_folder(arguments.model):
        problems.append(("model", arguments.model, f"no such folder: {folder_remedy(arguments.model)}"))
    if problems:
        raise RecipeError("command line", problems)
    return arguments


def check_layout(arguments) -> None:
    """Raise RecipeError if the recipe named in a command has another layout than the checkpoint."""
    said = read_recipe(arguments.recipe)
    problems = refused(said, read_layout(arguments.model, revision=arguments.revision))
    if problems:
        raise RecipeError(arguments.recipe, problems)


def complete_from_recipe(arguments) -> None:
    """Complete the arguments from the recipe named in the command, or the one saved with the weights.

    Raises:
        RecipeError: the named recipe has another layout than the checkpoint.
        CheckpointError: no checkpoint of that name.
    """
    beside = Path(arguments.model, RECIPE_FILE)
    if arguments.recipe is None and beside.is_file():
        arguments.recipe = str(beside)
    elif arguments.recipe is not None:
        check_layout(arguments)
    recipe = read_recipe(arguments.recipe) if arguments.recipe is not None else {}
    if arguments.dataset not in (None, recipe.get("dataset")):
        recipe = {}  # another data set has other options
    for name in {field.name for field in fields(arguments)} & {*FROM_RECIPE}:
        given, default = getattr(arguments, name), recipe.get(name)
        if name == "dataset_options":
            setattr(arguments, name, {**(default or {}), **(given or {})})
        elif given is None:
            setattr(arguments, name, default)
    arguments.max_new_tokens = arguments.max_new_tokens or NEW_TOKENS
    arguments.num_beams = arguments.num_beams or 1


def parse_arguments(argv: list[str], cls=EvaluationArguments, command: str = "eval"):
    """Parse the command line, completed from the recipe named there or saved with the weights.

    Raises:
        RecipeError: every argument that is unknown, of the wrong type or missing.
    """
    arguments = read_asked(argv, cls, command)
    complete_from_recipe(arguments)
    if arguments.dataset is None:
        raise RecipeError("command line", [("dataset", None, "name a data set, or a --recipe that does")])
    return arguments


def read_rows(arguments):
    """Return the rows to answer; log the rows dropped by `unreadable_images: skip`."""
    with PartialState().main_process_first():
        rows = load_examples(arguments.dataset, split=arguments.split, **arguments.dataset_options)
    count = len(rows) if arguments.max_samples is None else min(arguments.max_samples, len(rows))
    rows = rows.select(range(count))
    if arguments.unreadable_images == "skip":
        rows, skipped = drop_unreadable(rows)
        for message in skipped:
            logger.warning("left out: %s", message)
    if len(rows) == 0:
        raise UsageError(f"No row of {arguments.dataset} ({arguments.split}) is left to answer. See the log.")
    return rows


def fit_to(answerer: Answerer, rows, arguments):
    """Return the rows after `long_rows: cut`; log what was cut."""
    limits = (arguments.max_length, position_limit(answerer.model.get_decoder()))
    limit = min((limit for limit in limits if limit is not None), default=None)
    if arguments.long_rows != "cut" or limit is None:
        return rows
    rows, cut = fit_rows(rows, lambda row: answerer.prompt_length(row) + answerer.max_new_tokens, limit)
    if PartialState().is_main_process:
        logger.info("%s", cut)
    return rows


def default_folder(arguments, room: str) -> Path:
    """Return outputs/<room>/<checkpoint's path in one word>-<data set>-<split>."""
    model = arguments.model.strip("/.").replace("/", "-")
    return Path("outputs", room, f"{model}-{arguments.dataset}-{arguments.split}")


def join_processes() -> PartialState:
    """Join the processes of `accelerate launch`; on a CPU each would otherwise consider itself the only one."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def trained_with(model: str) -> dict | None:
    """Return how the checkpoint was trained, from the results.json saved with its weights; None without one."""
    file = Path(model, RESULTS_FILE)
    if not file.exists():
        return None
    results = read_json(file)
    kept = ("mode", "seed", "train_steps", "train_seconds", "command", "commit", "versions", "machine")
    return {key: results.get(key) for key in kept}
