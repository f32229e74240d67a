"""A checkpoint decides its own layout: mode, markers, number of thoughts, how they are fed back, tiles, projector.

What a recipe leaves open is what the checkpoint has. What it says otherwise is a warning in training, and an error
wherever a checkpoint is only asked, as the answers would be those of another layout than the trained one.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from transformers import ProcessorMixin
from transformers.utils import cached_file, has_file

from mmcoconut.arguments.choices import NEW_MODEL, STAGED_MODES, THINKING_MODES
from mmcoconut.arguments.conflicts import layout_problems, needs_parts
from mmcoconut.arguments.recipes import read_recipe, warn_of_idle
from mmcoconut.configuration_mmcoconut import LATER_FIELDS, MMCoconutConfig
from mmcoconut.errors import RecipeError
from mmcoconut.models import check_sources, read_config
from mmcoconut.records import RECIPE_FILE
from mmcoconut.training.curriculum import Curriculum


logger = logging.getLogger("mmcoconut")

# Fields of the model's configuration that a recipe sets when it builds a model out of backbones.
CONFIG_FIELDS = (
    "image_fusion",
    "projector_type",
    "projector_num_heads",
    "num_visual_tokens",
    "image_pooling",
    "alignment_adapter",
    "vision_feature_layer",
    "vision_last_norm",
    "vision_feature_select_strategy",
    "thought_norm",
    "thought_schedule",
    "jacobi_iterations",
    "answer_sees",
    "stop_head",
)
# Of these, what training may change.
HOW_THOUGHTS_ARE_FED_BACK = ("thought_norm", "thought_schedule", "jacobi_iterations", "answer_sees", "stop_head")
# The others, and what the number of placeholders depends on, are what the weights were trained for.
FIXED = (*(name for name in CONFIG_FIELDS if name not in HOW_THOUGHTS_ARE_FED_BACK), "image_size")
TILES = {"min_tiles": "min_patches", "max_tiles": "max_patches"}
COUNTS = ("c_thought", "max_latent_stage", "thoughts_per_turn")


@dataclass(frozen=True)
class Layout:
    """The settings of a checkpoint, by the keys of a recipe; a key is missing where its files do not say it.

    num_latents: of its prompts. counts_known: whether a recipe beside the weights says how they came about. composed:
    whether it is a model of parts, not a vision-language model's own class.
    """

    name: str
    num_latents: int
    values: dict = field(default_factory=dict)
    counts_known: bool = False
    composed: bool = True

    @property
    def thinks(self) -> bool:
        return self.values.get("mode") in THINKING_MODES


def recipe_of(name: str, revision: str | None) -> dict:
    """Read the recipe of the run that made a checkpoint, a folder or Hub id; {} without one.

    A checkpoint-n and a stages/stage-s stand inside of the run's folder.
    """
    folder = Path(name)
    if folder.is_dir():
        resolved = folder.resolve()
        folders = [resolved] + [resolved.parent] * resolved.name.startswith("checkpoint-")
        folders += [resolved.parents[1]] * (resolved.parent.name == "stages")
        files = [path / RECIPE_FILE for path in folders if (path / RECIPE_FILE).is_file()]
        return read_recipe(files[0]) if files else {}
    there = has_file(name, RECIPE_FILE, revision=revision)
    return read_recipe(cached_file(name, RECIPE_FILE, revision=revision)) if there else {}


def _mode_of(thought_mode: str, markers: str, num_latents: int, said: str | None) -> str | None:
    """Return the mode of a checkpoint, as far as it can be told: from its files, then from its recipe."""
    if thought_mode == "pause":
        return "pause"
    thinks = markers != "none" or num_latents > 0
    if said == "coconut" or (said not in (None, "pause") and not thinks):
        return said
    return "coconut" if thinks else None


def read_layout(name: str, *, revision: str | None = None) -> Layout:
    """Read the layout of a checkpoint, a folder or Hub id, from its small files.

    Raises:
        CheckpointError: no checkpoint of that name.
    """
    config, recipe = read_config(name, revision=revision), recipe_of(name, revision)
    options = {} if revision is None else {"revision": revision}
    processor = ProcessorMixin.get_processor_dict(name, **options)[0]
    markers, num_latents = processor.get("markers", "both"), processor.get("num_latents", 0)
    mode = _mode_of(config.thought_mode, markers, num_latents, recipe.get("mode"))
    # None where the VLM's own class decides it.
    values = {key: getattr(config, key, LATER_FIELDS.get(key)) for key in CONFIG_FIELDS}
    own_size = getattr(getattr(config, "vision_config", None), "image_size", None)
    values["image_size"] = getattr(config, "image_size", None) or own_size
    image_processor = processor.get("image_processor", {})
    values |= {key: image_processor.get(name) for key, name in TILES.items()}
    composed = config.model_type == MMCoconutConfig.model_type  # elsewhere the own processor decides it
    has_choice = composed and "max_patches" in image_processor
    values["use_thumbnail"] = processor.get("use_thumbnail", True) if has_choice else None
    if mode is not None:
        values["mode"] = mode
    values["markers"] = markers if mode in THINKING_MODES else recipe.get("markers")
    counts = {key: recipe[key] for key in COUNTS if recipe.get(key) is not None}
    known = len(counts) == len(COUNTS)
    if not known and mode in THINKING_MODES and num_latents:
        counts = {"c_thought": 1, "max_latent_stage": num_latents, "thoughts_per_turn": 0}
    return Layout(name, num_latents, {**values, **counts}, counts_known=known, composed=composed)


def stages_with(curriculum: Curriculum, num_latents: int) -> list[int]:
    """Return the stages of a curriculum whose prompts have this many latents."""
    return [stage for stage in range(curriculum.last_stage + 1) if curriculum.num_latents(stage) == num_latents]


def differences(said: Mapping, layout: Layout) -> Iterator[tuple]:
    """Yield (key, value in the recipe, value in the checkpoint) where they differ; None in a recipe leaves a key open.

    Markers and numbers of thoughts compare only where both think.
    """
    mode = said.get("mode") or layout.values.get("mode")
    both_think = mode in THINKING_MODES and layout.thinks
    for key in (*NEW_MODEL, "jacobi_iterations", "image_size", *TILES):
        skipped = (key == "markers" and not both_think) or (key in COUNTS and not (both_think and layout.counts_known))
        if said.get(key) is None or skipped or key not in layout.values or said[key] == layout.values[key]:
            continue
        yield key, said[key], layout.values[key]
    if "mode" not in layout.values and mode in THINKING_MODES:
        yield "mode", mode, "a mode without thoughts"


def refused(said: Mapping, layout: Layout) -> list[tuple]:
    """Return the differences as problems of a recipe that does not train, (key, value, remedy)."""
    return [
        (key, value, f"the checkpoint {layout.name} has {own!r}, and only training changes it: remove this key")
        for key, value, own in differences(said, layout)
    ]


def _fixed(said: Mapping, layout: Layout) -> list[tuple]:
    """Return the differences that training cannot make either."""
    return [
        (key, value, f"the checkpoint {layout.name} has {own!r}, and its weights are made for that: remove this key")
        for key, value, own in differences(said, layout)
        if key in FIXED or (own is None and key in (*TILES, "use_thumbnail"))
    ]


def _counts(said: dict, own: dict, layout: Layout, *, objective: str) -> dict:
    """The COUNTS that a recipe with these of its own leaves to the checkpoint; stages and turns exclude each other."""
    if said["thoughts_per_turn"]:
        return {key: NEW_MODEL[key] for key in COUNTS}
    c_thought, last = said["c_thought"], said["max_latent_stage"]
    if c_thought is None and last is None and (objective == "supervised" or own["thoughts_per_turn"]):
        return {key: own[key] for key in COUNTS}
    counts = {**{key: own[key] for key in COUNTS}, "thoughts_per_turn": 0}
    if layout.num_latents and last is None and (objective != "supervised" or not layout.counts_known):
        # The stage at which the checkpoint was saved; an objective with one stage has no other.
        counts["max_latent_stage"] = max(1, layout.num_latents // (c_thought or own["c_thought"]))
    elif layout.num_latents and last and not layout.counts_known:
        counts["c_thought"] = max(1, layout.num_latents // last)
    return counts


def _settled(said: dict, layout: Layout, *, objective: str) -> dict:
    """The recipe's values, completed by the checkpoint's and, where that has none, by those of a new model."""
    own = {**NEW_MODEL, **{key: value for key, value in layout.values.items() if value is not None}}
    own |= {"use_thumbnail": layout.values["use_thumbnail"]} | _counts(said, own, layout, objective=objective)
    settled = {key: own[key] if said[key] is None else said[key] for key in NEW_MODEL}
    schedule_is_own = settled["thought_schedule"] == layout.values["thought_schedule"]
    if said["jacobi_iterations"] is None and schedule_is_own:
        settled["jacobi_iterations"] = layout.values["jacobi_iterations"]
    return settled


def last_number(values: Mapping) -> int:
    """Return the number of latents of the last stage."""
    return values["thoughts_per_turn"] or values["c_thought"] * values["max_latent_stage"]


def settle(arguments: tuple, recipe: str) -> tuple:
    """Complete a recipe by what the checkpoint that it starts from has; without one it stays as it is.

    Args:
        arguments: of `parse_recipe`.
        recipe: its file, for errors.

    Raises:
        RecipeError: with `do_train: false` what the recipe says otherwise, with both values; in training only what the
            weights cannot follow, and the rest is a warning.
        CheckpointError: names of models that lead nowhere.
    """
    model_args, data_args, curriculum_args, run_args = arguments
    check_sources(model_args)
    if model_args.model is None:
        return arguments
    layout = read_layout(model_args.model)
    said = {**vars(model_args), **vars(curriculum_args)}
    own_class = [] if layout.composed else needs_parts({**said, **vars(data_args)})
    if run_args.compare is not None:
        said["mode"] = None  # each run has its own, and is settled by itself
    problems = [*own_class, *(_fixed(said, layout) if run_args.do_train else refused(said, layout))]
    if not problems and said["mode"] is None and run_args.compare is None and "mode" not in layout.values:
        remedy = f"the checkpoint {layout.name} has no thoughts, and nothing says how it was trained"
        problems = [("mode", None, f"{remedy}: set it to cot, no_cot or no_thoughts, or to a mode with thoughts")]
    settled = _settled(said, layout, objective=curriculum_args.objective)
    if not problems and not run_args.do_train:
        problems = _unreached(settled, layout)
    if problems:
        raise RecipeError(recipe, problems)
    if run_args.process_index == 0:
        tell(said, settled, layout, objective=curriculum_args.objective)
    settled_arguments = (_with(model_args, settled), data_args, _with(curriculum_args, settled), run_args)
    problems = layout_problems(settled_arguments)
    if problems:
        raise RecipeError(recipe, problems)
    known = {**said, "mode": settled["mode"]}
    if known["mode"] in STAGED_MODES:  # elsewhere it would count as said
        known["max_latent_stage"] = settled["max_latent_stage"]
    warn_of_idle({**vars(run_args), **known}, run_args)
    return settled_arguments


def _with(part, settled: dict):
    """One of the dataclasses with its settled fields."""
    return replace(part, **{each.name: settled[each.name] for each in fields(part) if each.name in settled})


def _unreached(settled: dict, layout: Layout) -> list[tuple]:
    """Why an evaluation would have no stage with the checkpoint's number of latents, as (key, value, remedy)."""
    curriculum = Curriculum(mode=settled["mode"], **{key: settled[key] for key in COUNTS})
    if stages_with(curriculum, layout.num_latents):
        return []
    key = "thoughts_per_turn" if settled["thoughts_per_turn"] else "c_thought"
    numbers = f"1 … {settled['max_latent_stage']} times as many latents" if key == "c_thought" else "so many latents"
    remedy = f"prompts would have {numbers}, and the checkpoint {layout.name} has {layout.num_latents}: remove "
    return [(key, settled[key], f"{remedy}{', '.join(f'`{name}`' for name in COUNTS)}")]


def tell(said: dict, settled: dict, layout: Layout, *, objective: str) -> None:
    """Log what is taken from a checkpoint, and warn of what training changes in it, with both values."""
    left_open = [f"{key} {settled[key]}" for key in ("mode", "markers", *COUNTS) if said[key] is None]
    if left_open:
        logger.info("as in the checkpoint %s: %s", layout.name, ", ".join(left_open))
    for key, value, own in differences(said, layout):
        logger.warning(
            "%s is %r in the checkpoint %s and becomes %r, as the recipe says: remove `%s` to keep the checkpoint's.",
            *(key, own, layout.name, value, key),
        )
    thinks = layout.thinks and settled["mode"] in THINKING_MODES
    if objective != "supervised" and thinks and last_number(settled) != layout.num_latents:
        logger.warning(
            "the checkpoint %s thinks %d thoughts and is trained with %d, as the recipe says: remove %s to keep the "
            "checkpoint's.",
            *(layout.name, layout.num_latents, last_number(settled), ", ".join(f"`{key}`" for key in COUNTS)),
        )
    if thinks and not layout.counts_known:
        logger.info(
            "no recipe beside the weights of %s says how its %d latents came about: c_thought × stage is assumed",
            *(layout.name, layout.num_latents),
        )
