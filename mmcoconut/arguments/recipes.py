"""Parse the recipe of a run: a YAML file, its bases and `--key value` overrides, as four checked dataclasses."""

import dataclasses
import inspect
import logging
import os
from pathlib import Path
from typing import get_type_hints

import torch
import yaml
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from mmcoconut.arguments.choices import NEW_MODEL, REWARDED
from mmcoconut.arguments.coconut_recipes import COCONUT_KEYS, translate_coconut_keys
from mmcoconut.arguments.conflicts import problems_of
from mmcoconut.arguments.fields import (
    CLASSES,
    DEFAULTS,
    NAMES,
    TYPES,
    CurriculumArguments,
    DataArguments,
    ModelArguments,
    RunArguments,
    completed_for_a_new_model,
)
from mmcoconut.arguments.recipe_files import (
    BASE,
    MergedRecipe,
    RecipeDumper,
    assign,
    expand,
    forget_sources,
    name_sources,
    read_overrides,
    read_recipe_file,
)
from mmcoconut.arguments.typed import as_types, typed_value
from mmcoconut.arguments.variants import compared_modes
from mmcoconut.arguments.without_effect import idle_keys
from mmcoconut.errors import RecipeError
from mmcoconut.records import write_whole


logger = logging.getLogger("mmcoconut")

# Renamed in transformers 5.23, which accepts both names; earlier versions accept only the second.
RENAMED = {f"activation_{name}": f"gradient_{name}" for name in ("checkpointing", "checkpointing_kwargs")}
RENAMED = {new: old for new, old in RENAMED.items() if new not in TrainingArguments.__dataclass_fields__}
# Set by the launcher, or secret: a run's folder may be pushed.
NOT_SAVED = ("local_rank", "hub_token")
if not RENAMED:  # save them under their new name
    NOT_SAVED += ("gradient_checkpointing", "gradient_checkpointing_kwargs")
# Options of one launch, not of the run: repeated from a run's own recipe they would delete or resume it.
NOT_SAVED += ("overwrite", "resume_from_checkpoint", "compare", "seeds", "jobs")
# Errors of TrainingArguments, and of trl's, for values that they refuse or missing packages.
REFUSALS = (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError)
# Values that TrainingArguments derives for fields that were not given.
NOT_GIVEN = {"report_to": [], "include_for_metrics": [], "include_num_input_tokens_seen": "no"}
NOT_GIVEN |= {"disable_tqdm": False, "activation_checkpointing": False}
HELP = """and every field of transformers.TrainingArguments.

A recipe with `base: other.yaml` (relative to its own folder) overrides that file key by key, also inside mappings;
`key: null` removes a key of the base. --key value on the command line overrides both."""


def warn_of_idle(values: dict, run: RunArguments) -> None:
    """Log the keys without effect in this run's mode, checkpoint or objective, in one process.

    values: of the recipe, with the mode completed from a checkpoint.
    """
    modes = compared_modes(values.get("compare")) or [values["mode"]]
    for line in idle_keys(values, DEFAULTS, modes) if run.process_index == 0 else ():
        logger.warning("%s", line)


def _build_first(values: dict, problems: list[tuple]) -> tuple[list, dict]:
    """Build the dataclasses before RunArguments, and add the problems of all values, which are returned complete."""
    parts = [{key: values[key] for key in names if key in values} for names in NAMES]
    built = [cls(**part) for cls, part in zip(CLASSES[:-1], parts[:-1], strict=True)]
    complete = {**vars(built[0]), **vars(built[1]), **vars(built[2]), **parts[-1]}
    problems += problems_of(complete, {key for key, _, _ in problems})
    return [*built, parts[-1]], complete


def _build(values: dict, problems: list[tuple]) -> list:
    """Build the four dataclasses; RunArguments last, because it sets up devices, and only from valid values."""
    parts, complete = _build_first(values, problems)
    built = parts[:-1]
    if values.get("smoke_test") and not torch.cuda.is_available():
        parts[-1] |= {"bf16": False, "fp16": False}
    if parts[-1].get("bf16") and not torch.accelerator.is_available():
        parts[-1].setdefault("use_cpu", True)  # without it TrainingArguments refuses bf16 on a CPU, which supports it
    if not {key for key, _, _ in problems} & {*NAMES[-1]}:
        try:
            built.append(RunArguments(**parts[-1]))
            if complete["objective"] in REWARDED and not problems and not values.get("smoke_test"):
                from mmcoconut.arguments.policy_arguments import batch_problems  # here, because it imports trl

                _, data, curriculum, run = built
                problems += batch_problems(run, complete["rl"])
                built[-1] = run if problems else rewarded_arguments(run, data, curriculum)
            if values.get("model") is None or values.get("smoke_test"):  # else the checkpoint decides the mode
                warn_of_idle(complete, built[-1])
        except REFUSALS as error:  # becomes one of the problems
            problems.append(("TrainingArguments", type(error).__name__, str(error)))
    return built


def _run_values(run: RunArguments) -> dict:
    """Return the fields that differ from their defaults, in the form of a recipe."""
    values = {key: value for key, value in run.to_dict().items() if key in NAMES[-1] and key not in NOT_SAVED}
    values["debug"] = " ".join(values["debug"])
    if run.accelerator_config == AcceleratorConfig():
        values["accelerator_config"] = None
    defaults = {field.name: field.default for field in dataclasses.fields(RunArguments)}
    return {key: value for key, value in values.items() if value not in (defaults[key], NOT_GIVEN.get(key, ...))}


def rewarded_arguments(run: RunArguments, data: DataArguments, curriculum: CurriculumArguments) -> RunArguments:
    """Return the run's arguments with the fields that trl needs.

    Raises:
        ValueError: trl refuses them, as with batches that do not hold whole groups of answers.
    """
    from mmcoconut.arguments.policy_arguments import passed_on, policy_arguments  # here, because it imports trl

    types = passed_on(curriculum.objective)
    rewarded = policy_arguments(
        curriculum.objective,
        _run_values(run),
        rl={key: typed_value(key, value, types[key]) for key, value in curriculum.rl.items()},
        rewards=curriculum.rewards or {"the metric": 1.0},
        max_new_tokens=data.max_new_tokens,
    )
    for name in NOT_SAVED:
        setattr(rewarded, name, getattr(run, name))
    return rewarded


def _default(field) -> str:
    """Return the default in help of a field that a checkpoint decides."""
    if field.name not in NEW_MODEL:
        return ""
    return f" Default: the checkpoint's, or {NEW_MODEL[field.name]} for a new model."


def help_text(usage: str, classes=CLASSES) -> str:
    """Return the help of a command: each class's sentence and the options that it declares, each option once."""
    lines, named = [f"usage: {usage}", ""], set()
    for cls in classes:
        own = [field for field in dataclasses.fields(cls) if field.name in vars(cls).get("__annotations__", {})]
        own = [field for field in own if field.name not in named]
        named |= {field.name for field in own}
        lines += [
            inspect.cleandoc(cls.__doc__),
            *(f"  --{field.name}: {field.metadata['help']}{_default(field)}" for field in own),
            "",
        ]
    return "\n".join(lines)


def read_arguments(argv: list[str], cls, usage: str):
    """Parse `--key value ...` as the dataclass `cls`, for commands without a recipe of their own.

    Raises:
        RecipeError: all problems of the command line.
    """
    if {"-h", "--help"} & {*argv}:
        print(help_text(usage, [each for each in cls.__mro__ if dataclasses.is_dataclass(each)]))
        raise SystemExit(0)
    problems, values = [], {}
    for key, value in read_overrides(argv, problems).items():
        assign(values, key, value, problems=problems)
    values = as_types(expand(values, "", problems), get_type_hints(cls), problems)
    if problems:
        raise RecipeError("command line", problems)
    return cls(**values)


def read_values(recipe: str, words: list[str]) -> MergedRecipe:
    """Read and merge a recipe, its bases and the command line, with variables expanded and old keys translated."""
    values, sources, problems = read_recipe_file(recipe)
    overrides = read_overrides(words, problems)
    if BASE in overrides:
        problems.append((BASE, overrides.pop(BASE), "a base belongs in a recipe: remove it from the command line"))
    old = {key: overrides.pop(key) for key in overrides.keys() & {*COCONUT_KEYS, "debug"}}
    values |= old
    forget_sources(sources, old)
    if values.keys() & COCONUT_KEYS:  # before the rest of the command line, which may override its implications
        values = translate_coconut_keys(expand(values, "", problems), problems, sources)
    for key, value in overrides.items():
        assign(values, key, value, problems=problems)
    forget_sources(sources, overrides)
    values = {RENAMED.get(key, key): value for key, value in expand(values, "", problems).items()}
    return MergedRecipe(values, sources, problems)


def read_recipe(recipe: str | os.PathLike) -> dict:
    """Read the data and training-text keys of a recipe, typed, as far as they are set; other keys are ignored."""
    values, sources, problems = read_values(str(recipe), [])
    values = as_types({key: value for key, value in values.items() if key in TYPES}, TYPES, problems)
    if problems:
        raise RecipeError(str(recipe), name_sources(problems, sources, str(recipe)))
    return values


def parse_recipe(argv: list[str]) -> tuple[ModelArguments, DataArguments, CurriculumArguments, RunArguments]:
    """Parse `recipe.yaml [--key value ...]`; RecipeError lists all problems."""
    if {"-h", "--help"} & {*argv}:
        print(help_text("train_hf.py recipe.yaml [--key value ...]"))
        print(HELP)
        raise SystemExit(0)
    return tuple(_checked(argv, _build))


def check_recipe(argv: list[str]) -> None:
    """Check a recipe as `parse_recipe` does, without TrainingArguments, which would set up this process's device.

    Raises:
        RecipeError: all problems but those that TrainingArguments itself finds.
    """
    _checked(argv, _build_first)


def _checked(argv: list[str], build):
    """Return what `build(values, problems)` returns for a recipe; RecipeError lists all problems."""
    recipe, *words = argv or [""]
    values, sources, problems = read_values(recipe, words)
    values = as_types(values, TYPES, problems, others=COCONUT_KEYS)
    values["output_dir"] = values.get("output_dir") or f"outputs/{Path(recipe).stem}"
    values = completed_for_a_new_model(values)
    built = build(values, problems)
    if values.get("smoke_test"):  # it makes its own data
        problems = [problem for problem in problems if not problem[0].startswith("dataset_options.")]
    if problems:
        raise RecipeError(recipe, name_sources(problems, sources, recipe))
    return built


def recipe_text(*arguments) -> str:
    """Return the result of `parse_recipe` as a recipe that reproduces it: all our keys, and those of TrainingArguments
    that differ from their defaults, without the Hub token and the options of one launch."""
    sections = []
    for part in arguments:
        values = dataclasses.asdict(part) if not isinstance(part, RunArguments) else _run_values(part)
        sections.append(f"# {type(part).__name__}\n{yaml.dump(values, Dumper=RecipeDumper, sort_keys=False)}")
    return "\n".join(sections)


def save_recipe(path: str | os.PathLike, *arguments) -> None:
    """Write `recipe_text` completely or not at all, and create its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(path), recipe_text(*arguments))
