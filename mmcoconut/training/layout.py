"""Read the layout of a checkpoint: mode, markers, number of thoughts, feedback, tiles, projector.

The checkpoint supplies what a recipe leaves open. A different value in the recipe is a warning in training, and an
error in evaluation, because the answers would come from another layout than the trained one.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from transformers import ProcessorMixin
from transformers.utils import cached_file, has_file

from mmcoconut.arguments.choices import MARKED_MODES, NEW_MODEL, STAGED_MODES, THINKING_MODES
from mmcoconut.arguments.conflicts import layout_problems, needs_parts
from mmcoconut.arguments.recipes import read_recipe, warn_of_idle
from mmcoconut.configuration_mmcoconut import LATER_FIELDS, MMCoconutConfig
from mmcoconut.errors import RecipeError
from mmcoconut.models import check_sources, read_config
from mmcoconut.records import RECIPE_FILE
from mmcoconut.training.curriculum import Curriculum


logger = logging.getLogger("mmcoconut")

# Fields of the model's configuration that a recipe sets when it builds a model from backbones.
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
# Of these, the ones that training may change.
HOW_THOUGHTS_ARE_FED_BACK = ("thought_norm", "thought_schedule", "jacobi_iterations", "answer_sees", "stop_head")
# The others, and those that the number of placeholders depends on, are fixed by the trained weights.
FIXED = (*(name for name in CONFIG_FIELDS if name not in HOW_THOUGHTS_ARE_FED_BACK), "image_size")
TILES = {"min_tiles": "min_patches", "max_tiles": "max_patches"}
COUNTS = ("c_thought", "max_latent_stage", "thoughts_per_turn")


@dataclass(frozen=True)
class Layout:
    """Settings of a checkpoint by recipe key; a key is missing if the checkpoint's files do not define it.

    num_latents: per prompt. recipe_known: True if a recipe is saved with the weights; counts_known: True if it
    defines the number of latents. composed: True for a model of parts, False for a vision-language model's own class.
    """

    name: str
    num_latents: int
    values: dict = field(default_factory=dict)
    recipe_known: bool = False
    counts_known: bool = False
    composed: bool = True

    @property
    def thinks(self) -> bool:
        return self.values.get("mode") in THINKING_MODES


def recipe_of(name: str, revision: str | None) -> dict:
    """Read the recipe of the run that saved a checkpoint, a folder or Hub id; {} without one.

    Folders checkpoint-n and stages/stage-s use the recipe of the run's folder.
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
    """Return the mode of a checkpoint, as far as it is known: from its files, then from its recipe."""
    if thought_mode == "pause":
        return "pause"
    if said == "markers" and markers != "none" and num_latents == 0:  # else stage 0 of coconut
        return said
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
    # None if the VLM's own class decides it.
    values = {key: getattr(config, key, LATER_FIELDS.get(key)) for key in CONFIG_FIELDS}
    own_size = getattr(getattr(config, "vision_config", None), "image_size", None)
    values["image_size"] = getattr(config, "image_size", None) or own_size
    image_processor = processor.get("image_processor", {})
    values |= {key: image_processor.get(name) for key, name in TILES.items()}
    composed = config.model_type == MMCoconutConfig.model_type  # otherwise its own processor decides it
    has_choice = composed and "max_patches" in image_processor
    values["use_thumbnail"] = processor.get("use_thumbnail", True) if has_choice else None
    if mode is not None:
        values["mode"] = mode
    values["markers"] = markers if mode in MARKED_MODES else recipe.get("markers")
    counts = {key: recipe[key] for key in COUNTS if recipe.get(key) is not None}
    known = len(counts) == len(COUNTS)
    if not known and mode in THINKING_MODES and num_latents:
        counts = {"c_thought": 1, "max_latent_stage": num_latents, "thoughts_per_turn": 0}
    known = {"recipe_known": bool(recipe), "counts_known": known}
    return Layout(name, num_latents, {**values, **counts}, **known, composed=composed)


def stages_with(curriculum: Curriculum, num_latents: int) -> list[int]:
    """Return the stages of a curriculum whose prompts have this many latents."""
    return [stage for stage in range(curriculum.last_stage + 1) if curriculum.num_latents(stage) == num_latents]


def differences(said: Mapping, layout: Layout) -> Iterator[tuple]:
    """Yield (key, recipe's value, checkpoint's value) for each difference; None in a recipe is no difference.

    Markers are compared only if both have them, numbers of thoughts only if both think. Markers with nothing between
    them may be stage 0 of coconut or mode `markers`; only a recipe saved with the weights distinguishes these.
    """
    mode = said.get("mode") or layout.values.get("mode")
    both_think = mode in THINKING_MODES and layout.thinks
    both_marked = {mode, layout.values.get("mode")} <= {*MARKED_MODES}
    empty = layout.thinks and not layout.num_latents and not layout.recipe_known
    for key in (*NEW_MODEL, "jacobi_iterations", "image_size", *TILES):
        skipped = (key == "markers" and not both_marked) or (key == "mode" and empty and mode == "markers")
        skipped |= key in COUNTS and not (both_think and layout.counts_known)
        if said.get(key) is None or skipped or key not in layout.values or said[key] == layout.values[key]:
            continue
        yield key, said[key], layout.values[key]
    if "mode" not in layout.values and mode in MARKED_MODES:
        yield "mode", mode, "a mode without thoughts"


def refused(said: Mapping, layout: Layout) -> list[tuple]:
    """Return the differences as problems, (key, value, remedy), for a recipe that does not train."""
    return [
        (key, value, f"the checkpoint {layout.name} has {own!r}, and only training changes it: remove this key")
        for key, value, own in differences(said, layout)
    ]


def _fixed(said: Mapping, layout: Layout) -> list[tuple]:
    """Return the differences that training cannot change either."""
    return [
        (key, value, f"the checkpoint {layout.name} has {own!r}, and its weights need that value: remove this key")
        for key, value, own in differences(said, layout)
        if key in FIXED or (own is None and key in (*TILES, "use_thumbnail"))
    ]


def _counts(said: dict, own: dict, layout: Layout, *, objective: str) -> dict:
    """Return the COUNTS that a recipe leaves to the checkpoint; stages and turns exclude each other."""
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
    """Return the recipe's values, completed by the checkpoint's and, where that has none, by those of a new model."""
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
    """Complete a recipe with the values of the checkpoint that it starts from; without one return it unchanged.

    Args:
        arguments: the result of `parse_recipe`.
        recipe: its file, for errors.

    Raises:
        RecipeError: with `do_train: false` every different value, with both values; in training only differences that
            the weights do not allow, and the rest is a warning.
        CheckpointError: no model of that name.
    """
    model_args, data_args, curriculum_args, run_args = arguments
    check_sources(model_args)
    if model_args.model is None:
        return arguments
    layout = read_layout(model_args.model)
    said = {**vars(model_args), **vars(curriculum_args)}
    own_class = [] if layout.composed else needs_parts({**said, **vars(data_args)})
    if run_args.compare is not None:
        said["mode"] = None  # each run has its own mode, and is completed separately
    problems = [*own_class, *(_fixed(said, layout) if run_args.do_train else refused(said, layout))]
    if not problems and said["mode"] is None and run_args.compare is None and "mode" not in layout.values:
        remedy = f"the checkpoint {layout.name} has no thoughts, and its mode is not recorded: set it to "
        problems = [("mode", None, f"{remedy}cot, no_cot, no_thoughts or icot, or to a mode with thoughts")]
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
    """Return one of the dataclasses with its completed fields."""
    return replace(part, **{each.name: settled[each.name] for each in fields(part) if each.name in settled})


def _unreached(settled: dict, layout: Layout) -> list[tuple]:
    """Return (key, value, remedy) if no stage of an evaluation has the checkpoint's number of latents."""
    curriculum = Curriculum(mode=settled["mode"], **{key: settled[key] for key in COUNTS})
    if stages_with(curriculum, layout.num_latents):
        return []
    key = "thoughts_per_turn" if settled["thoughts_per_turn"] else "c_thought"
    numbers = f"1 … {settled['max_latent_stage']} times as many latents" if key == "c_thought" else "so many latents"
    remedy = f"prompts would have {numbers}, and the checkpoint {layout.name} has {layout.num_latents}: remove "
    return [(key, settled[key], f"{remedy}{', '.join(f'`{name}`' for name in COUNTS)}")]


def tell(said: dict, settled: dict, layout: Layout, *, objective: str) -> None:
    """Log the values taken from a checkpoint, and warn of those that training changes, with both values."""
    left_open = [f"{key} {settled[key]}" for key in ("mode", "markers", *COUNTS) if said[key] is None]
    if left_open:
        logger.info("taken from the checkpoint %s: %s", layout.name, ", ".join(left_open))
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
            "no recipe is saved with the weights of %s; its %d latents are assumed to be c_thought × stage",
            *(layout.name, layout.num_latents),
        )
