"""The recipe of a run: a YAML file, its bases and `--key value` overrides become four checked dataclasses."""

import dataclasses
import difflib
import logging
import math
import os
from enum import EnumMeta
from pathlib import Path
from typing import TypedDict, get_args, get_type_hints

import torch
import yaml
from huggingface_hub.dataclasses import StrictDataclassFieldValidationError, validate_typed_dict
from transformers import CONFIG_MAPPING, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_peft_available
from transformers.utils.import_utils import _is_package_available

from mmcoconut.coconut_recipes import COCONUT_KEYS, translate_coconut_keys
from mmcoconut.configuration_mmcoconut import CHOICES as CONFIG_CHOICES
from mmcoconut.configuration_mmcoconut import PREFIX_PROJECTORS
from mmcoconut.conversations import LONG_ROWS
from mmcoconut.curriculum import MODES, STAGED_MODES, THINKING_MODES
from mmcoconut.data import DATASETS
from mmcoconut.lora import lora_fields
from mmcoconut.objectives import ALIGNMENT_TARGETS
from mmcoconut.passes_mmcoconut import CHECKPOINTED_PASSES
from mmcoconut.processing_mmcoconut import MARKERS
from mmcoconut.recipe_files import (
    BASE,
    MergedRecipe,
    RecipeDumper,
    RecipeError,
    assign,
    expand,
    forget_sources,
    is_missing_folder,
    name_sources,
    read_overrides,
    read_recipe_file,
    scalar,
)
from mmcoconut.records import write_whole
from mmcoconut.scoring import REFERENCES
from mmcoconut.without_effect import idle_keys, without_effect


logger = logging.getLogger("mmcoconut")

CHOICES = {key: CONFIG_CHOICES[key] for key in ("image_fusion", "projector_type", "thought_norm", "thought_schedule")}
CHOICES |= {"vision_feature_select_strategy": CONFIG_CHOICES["vision_feature_select_strategy"], "markers": MARKERS}
CHOICES |= {"dataset": tuple(DATASETS), "unreadable_images": ("error", "skip"), "mode": MODES}
CHOICES |= {"long_rows": LONG_ROWS}
REWARDED = ("grpo", "rloo")  # objectives that trl's trainers minimise
CHOICES |= {"objective": ("supervised", *REWARDED, "distill_stops")}
# What is often looked for, and why it is not there.
NOT_THERE = {("objective", "ppo"): "trl 1.16 has no PPO: set grpo, or rloo, which need no model of values"}
CHOICES |= {"checkpointed_passes": CHECKPOINTED_PASSES}
CHOICES |= {"metric": tuple(REFERENCES), "image_pooling": CONFIG_CHOICES["image_pooling"]}
# Without the library's `batch_rebalance`, which knows one length a row; and it takes a misspelt one for `random`.
CHOICES |= {"train_sampling_strategy": ("random", "sequential", "group_by_length")}
AT_LEAST_0 = ("c_thought", "max_latent_stage", "start_epoch", "num_train_epochs", "dataloader_num_workers")
AT_LEAST_0 += ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "num_latents")
AT_LEAST_0 += ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "eval_delay", "num_shown")
AT_LEAST_0 += ("align_weight", "ce_weight", "align_warmup_epochs", "bptt_thoughts", "shown_row")
AT_LEAST_0 += ("thoughts_per_turn", "thought_noise")
AT_LEAST_1 = ("epochs_per_stage", "max_train_samples", "max_eval_samples", "max_new_tokens", "tokenizer_vocab_size")
AT_LEAST_1 += ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
AT_LEAST_1 += ("max_length",)
AT_LEAST_1 += ("num_visual_tokens", "projector_num_heads", "num_beams", "jacobi_iterations")
AT_LEAST_1 += ("max_samples", "batch_size", "seeds", "compare_jobs", "top_k", "image_size", "min_tiles", "max_tiles")
FRACTIONS = ("uniform_prob", "margin", "stop_threshold", "adam_beta1", "adam_beta2", "label_smoothing_factor")
LIMITS = (
    dict.fromkeys(AT_LEAST_0, (0, math.inf))
    | dict.fromkeys(AT_LEAST_1, (1, math.inf))
    | dict.fromkeys(FRACTIONS, (0, 1))
    | dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1))  # what numpy takes
    | {"max_steps": (-1, math.inf)}
)
REFUSED = {
    "remove_unused_columns": "the Trainer would drop the images before the collator sees them: remove this key",
    "load_best_model_at_end": "accuracies of different stages do not compare; stages/ keeps the best of each",
    "fsdp": "it belongs to the machine: accelerate launch --config_file recipes/accelerate/fsdp2_8gpu.yaml",
    "prediction_loss_only": "evaluation always generates answers: remove this key",
    "batch_eval_metrics": "metrics need the whole split: remove this key",
    "do_predict": "a split is evaluated after training by `test_split`: set that, and remove this key",
    "length_column_name": "rows have no such column, their lengths change with the stage: remove this key",
    "dataloader_persistent_workers": "workers that persist keep stage 0 for the whole run: remove this key",
}
# What a comparison does by itself, or what its runs would do to each other.
NOT_COMPARED = {
    "resume_from_checkpoint": "a comparison goes on by itself when it is called again: remove this key",
    "push_to_hub": "the runs would overwrite each other on the Hub: remove this key, and push the run that you want",
    "profile": "compared runs share a machine, which changes the shares: remove this key, and profile a run alone",
}
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
# What belongs to rewards, and what means something else or nothing with them.
OF_REWARDS = ("rewards", "rl", "thought_noise")
NOT_REWARDED = {
    "profile": "parts of an update are measured in supervised training only: remove this key",
    "start_epoch": "the stage is the last one, whatever the epoch: remove this key",
    "align_weight": "nothing is aligned while answers are rewarded: set it to 0",
    "uniform_prob": "the stage is the last one in all rows: remove this key",
    "label_smoothing_factor": "nothing is learnt from labels here: remove this key",
    "reset_optimizer": "there is one stage: remove this key",
}
OF_STAGES = ("c_thought", "max_latent_stage", "epochs_per_stage", "uniform_prob", "pad_latent_to_max", "start_epoch")
OF_STAGES += ("reset_optimizer",)
IN_A_VLM = ("vision_model", "vision_config", "text_model", "text_config", "tokenizer")
IN_A_CHECKPOINT = ("vlm", *IN_A_VLM)
# What a vision-language model decides by its weights, and what only its processor can be told.
JOINED_IN_A_VLM = ("image_fusion", "projector_type", "vision_feature_layer", "vision_last_norm")
JOINED_IN_A_VLM += ("vision_feature_select_strategy", "projector_num_heads", "num_visual_tokens", "image_pooling")
JOINED_IN_A_VLM += ("alignment_adapter",)
OF_A_VLM = ("image_size", "min_tiles", "max_tiles", "use_thumbnail")
# What a recipe that does not say is taken from the checkpoint that it starts from, and what a new model has there.
NEW_MODEL = {
    "image_fusion": "replace",
    "projector_type": "linear",
    "projector_num_heads": 8,
    "num_visual_tokens": 8,
    "image_pooling": "mean",
    "alignment_adapter": True,
    "vision_feature_layer": -1,
    "vision_last_norm": False,
    "vision_feature_select_strategy": "default",
    "use_thumbnail": True,
    "thought_norm": "none",
    "thought_schedule": "sequential",
    "stop_head": False,
    "markers": "both",
    "mode": "coconut",
    "c_thought": 1,
    "max_latent_stage": 3,
    "thoughts_per_turn": 0,
}
FOLDERS = ("model", "vlm", "vision_model", "text_model", "tokenizer", "resume_from_checkpoint")
DATA_PATHS = ("file", "folder", "image_root")

# Renamed with transformers 5.23, which knows both names; before it there is the second only.
RENAMED = {f"activation_{name}": f"gradient_{name}" for name in ("checkpointing", "checkpointing_kwargs")}
RENAMED = {new: old for new, old in RENAMED.items() if new not in TrainingArguments.__dataclass_fields__}
# Set by the launcher, or secret: a run's folder may be pushed.
NOT_SAVED = ("local_rank", "hub_token")
if not RENAMED:  # saved under their new name
    NOT_SAVED += ("gradient_checkpointing", "gradient_checkpointing_kwargs")
# About one launch, not about the run: repeating them from a run's own recipe would delete or re-enter it.
NOT_SAVED += ("overwrite", "resume_from_checkpoint", "compare", "seeds", "compare_jobs", "profile")
# What TrainingArguments, and trl's, raise for values that they refuse or packages that are not there.
REFUSALS = (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError)
# What TrainingArguments makes of a field that was not given.
NOT_GIVEN = {"report_to": [], "include_for_metrics": [], "include_num_input_tokens_seen": "no"}
NOT_GIVEN |= {"disable_tqdm": False, "activation_checkpointing": False}
HELP = """and every field of transformers.TrainingArguments.

A recipe that says `base: other.yaml` (a path from its own folder) holds only what differs from that file: its keys win
one by one, also inside mappings, and `key: null` removes what the base sets. The command line comes last."""


@dataclasses.dataclass
class ModelArguments:
    """What the model starts from and how its parts are joined.

    Of the fields in NEW_MODEL, here and in CurriculumArguments, None is what the checkpoint `model` has.
    """

    model: str | None = HfArg(default=None, help="Folder or Hub id of an mmcoconut checkpoint to start from.")
    vlm: str | None = HfArg(default=None, help="Folder or Hub id of a pretrained InternVL or LLaVA to start from.")
    vision_model: str | None = HfArg(default=None, help="Folder or Hub id of the pretrained vision tower.")
    text_model: str | None = HfArg(default=None, help="Folder or Hub id of the pretrained language model.")
    vision_config: dict | None = HfArg(default=None, help="Vision tower from scratch: {model_type: ..., ...}.")
    text_config: dict | None = HfArg(default=None, help="Language model from scratch: {model_type: gpt2, ...}.")
    vlm_model_type: str | None = HfArg(default=None, help="Architecture of vlm, for a smoke test.")
    vision_model_type: str | None = HfArg(default=None, help="Architecture of vision_model, for a smoke test.")
    text_model_type: str | None = HfArg(default=None, help="Architecture of text_model, for a smoke test.")
    tokenizer: str | None = HfArg(default=None, help="Folder, Hub id or `train`; default: text_model's.")
    tokenizer_vocab_size: int = HfArg(default=1000, help="Entries of a tokenizer trained on the training texts.")
    image_fusion: str | None = HfArg(default=None, help="How image features reach the decoder.")
    projector_type: str | None = HfArg(default=None, help="What maps image features to the decoder's width.")
    projector_num_heads: int | None = HfArg(
        default=None, help="Heads of the `transformer` and `attention_prefix` projectors."
    )
    num_visual_tokens: int | None = HfArg(default=None, help="Visual tokens an image of a `_prefix` projector.")
    image_pooling: str | None = HfArg(default=None, help="How a `_prefix` projector makes one vector of an image.")
    alignment_adapter: bool | None = HfArg(default=None, help="That vector goes through a linear layer.")
    vision_feature_layer: int | list[int] | None = HfArg(
        default=None, help="Hidden layer, or layers, of the vision tower."
    )
    vision_last_norm: bool | None = HfArg(default=None, help="Layer -1 is read behind the tower's last norm.")
    vision_feature_select_strategy: str | None = HfArg(default=None, help="`default` leaves out the class token.")
    image_size: int | None = HfArg(default=None, help="Side of the tiles that the vlm reads; default: its own.")
    min_tiles: int | None = HfArg(default=None, help="Least tiles of an image for the vlm; default: its own.")
    max_tiles: int | None = HfArg(default=None, help="Most tiles of an image for the vlm; default: its own.")
    use_thumbnail: bool | None = HfArg(
        default=None, help="Several tiles of an image are followed by the whole picture."
    )
    thought_norm: str | None = HfArg(default=None, help="What is done to a thought before it is fed back.")
    thought_schedule: str | None = HfArg(default=None, help="`jacobi` updates all thoughts together.")
    jacobi_iterations: int | None = HfArg(default=None, help="How often `jacobi` updates them.")
    stop_head: bool | None = HfArg(default=None, help="A head that ends thinking early, row by row; see objective.")
    bptt_thoughts: int | None = HfArg(default=None, help="Thoughts, from the last, that gradients link; default: all.")
    markers: str | None = HfArg(default=None, help="Which of <|start-latent|> and <|end-latent|> frame the thoughts.")
    freeze: list[str] = HfArg(default_factory=list, help="Sub-modules that are not trained, such as vision_tower.")
    lora: dict | None = HfArg(default=None, help="Train adapters: fields of peft.LoraConfig; {} for the defaults.")
    new_token_init: str | None = HfArg(default=None, help="Token that new embeddings copy; default: their mean.")
    attn_implementation: str | None = HfArg(default=None, help="Attention function; default: sdpa or latent.")
    checkpointed_passes: str = HfArg(default="all", help="What gradient_checkpointing recomputes: `all` or `first`.")
    defer_weight_gradients: bool | None = HfArg(
        default=None, help="Form them once for all passes; default: if wide, on a CPU."
    )


@dataclasses.dataclass
class DataArguments:
    """What is learnt from and what is evaluated."""

    dataset: str = HfArg(default="arrow_mazes", help="A name in mmcoconut.data.DATASETS.")
    dataset_options: dict = HfArg(default_factory=dict, help="Passed to the data set, such as {file: ...}.")
    max_train_samples: int | None = HfArg(default=None, help="Use only so many training examples.")
    max_eval_samples: int | None = HfArg(default=None, help="Use only so many evaluation examples.")
    unreadable_images: str = HfArg(default="error", help="`skip` leaves out examples whose image cannot be read.")
    metric: str | None = HfArg(default=None, help="A folder of metrics/; default: the data set's.")
    precompute_image_features: bool = HfArg(default=False, help="Run the frozen vision tower once a picture, on disk.")
    image_features_cache: str | None = HfArg(default=None, help="Folder for that; default: beside datasets' cache.")
    max_length: int | None = HfArg(default=None, help="Most tokens of a row, images and thoughts included.")
    long_rows: str = HfArg(default="error", help="`cut` leaves out the last turns of longer conversations.")
    max_new_tokens: int = HfArg(default=64, help="Longest text generated in evaluation, in tokens.")
    num_beams: int = HfArg(default=1, help="Beams of the search that evaluation generates by; 1 is greedy.")
    eval_split: str = HfArg(default="validation", help="Split that is evaluated at the end of every stage.")
    test_split: str | None = HfArg(default=None, help="Split that is evaluated once, after training.")


@dataclasses.dataclass
class CurriculumArguments:
    """The stages of Coconut, its controls, and what is minimised."""

    objective: str = HfArg(default="supervised", help="`grpo`, `rloo`: rewards; `distill_stops`: when to stop.")
    rewards: dict | None = HfArg(default=None, help="What answers are worth, {name: weight}; default: the metric.")
    rl: dict = HfArg(default_factory=dict, help="Fields of trl's GRPOConfig or RLOOConfig, {num_generations: 16}.")
    thought_noise: float = HfArg(default=0.0, help="Noise on sampled thoughts, in units of their root mean square.")
    mode: str | None = HfArg(default=None, help="Latent reasoning, or one of its controls.")
    c_thought: int | None = HfArg(default=None, help="Latent tokens for each replaced step.")
    max_latent_stage: int | None = HfArg(default=None, help="Last stage that replaces one more step.")
    epochs_per_stage: int | list[int] = HfArg(default=1, help="A stage's epochs; of a list the last entry repeats.")
    uniform_prob: float = HfArg(default=0.0, help="Probability that an example takes a stage at random.")
    pad_latent_to_max: bool = HfArg(default=True, help="As many latents for rows with fewer steps than the stage.")
    thoughts_per_turn: int | None = HfArg(
        default=None, help="Latent tokens before each answer of a conversation; no stages."
    )
    reset_optimizer: bool = HfArg(default=False, help="Forget the optimizer's state at each stage.")
    start_epoch: int = HfArg(default=0, help="Epochs trained elsewhere: the first epoch here counts as this one.")
    align_weight: float = HfArg(default=0.0, help="Of the alignment of images with texts in the loss; 0: none.")
    ce_weight: float = HfArg(default=1.0, help="Of the answer's cross-entropy, where there is an alignment.")
    align_warmup_epochs: int = HfArg(default=0, help="First epochs, of alignment alone.")
    alignment_target: list[str] = HfArg(
        default_factory=lambda: ["question", "answer"], help="What images are aligned with, by priority."
    )


@dataclasses.dataclass(repr=False)  # the inherited __repr__ hides tokens
class RunArguments(TrainingArguments):
    """transformers.TrainingArguments with the defaults that this project needs."""

    smoke_test: bool = HfArg(default=False, help="Tiny model and made-up data: does the recipe run at all?")
    ddp_find_unused_parameters: bool | None = HfArg(
        default=True, help="Leave true: a vision tower's last norm gets no gradient."
    )
    profile: bool = HfArg(default=False, help="Report the share of each part of an update in its time.")
    learning_rates: dict[str, float] | None = HfArg(
        default=None, help="Of parts of the model: {vision_tower: 3.0e-4}; the others have learning_rate."
    )
    overwrite: bool = HfArg(default=False, help="Delete the run in output_dir when the new one begins to train.")
    do_train: bool = HfArg(default=True, help="Train; false only evaluates.")
    license: str | None = HfArg(default=None, help="Of the weights, in the model card: an id such as mit.")
    remove_unused_columns: bool = HfArg(default=False, help="Always false: the collator needs the images.")
    resume_from_checkpoint: bool | str | None = HfArg(default=None, help="Folder, or true: the newest whole one.")
    compare: str | list[str] | None = HfArg(default=None, help="Modes to train and compare: cot,no_cot,coconut ...")
    seeds: int = HfArg(default=1, help="Runs of each compared mode, with the seeds seed, seed + 1, ...")
    compare_jobs: int | None = HfArg(default=None, help="Compared runs at a time; default: what the devices allow.")


CLASSES = (ModelArguments, DataArguments, CurriculumArguments, RunArguments)
NAMES = [[field.name for field in dataclasses.fields(cls) if field.init] for cls in CLASSES]
TYPES = {name: get_type_hints(cls)[name] for cls, names in zip(CLASSES, NAMES, strict=True) for name in names}


def default_of(key: str):
    """What a recipe without this key stands for; also for keys that are younger than a saved recipe."""
    fields = {field.name: field for cls in CLASSES for field in dataclasses.fields(cls)}
    if key in NEW_MODEL:
        return NEW_MODEL[key]
    if key not in fields:
        return None
    factory = fields[key].default_factory
    return fields[key].default if factory is dataclasses.MISSING else factory()


DEFAULTS = {name: default_of(name) for names in NAMES for name in names}


def completed_for_a_new_model(values: dict) -> dict:
    """Return the values with NEW_MODEL's where they say nothing; those that a checkpoint or a `vlm` decides stay open.

    A smoke test makes a new model in any case.
    """
    starts = values.get("model") is not None
    if starts and not values.get("smoke_test"):
        return values
    of_a_vlm = values.get("vlm") is not None or (starts and values.get("vlm_model_type") is not None)
    left_open = JOINED_IN_A_VLM if of_a_vlm else ("use_thumbnail",)
    said = {key: value for key, value in values.items() if value is not None or key not in NEW_MODEL}
    return {key: value for key, value in NEW_MODEL.items() if key not in left_open} | said


def compared_modes(compare: str | list[str] | None) -> list[str]:
    """The modes that `compare` names, each once and in order.

    >>> compared_modes("cot, coconut,cot"), compared_modes(["cot", "no_cot"]), compared_modes(None)
    (['cot', 'coconut'], ['cot', 'no_cot'], [])
    """
    names = compare.split(",") if isinstance(compare, str) else compare or []
    return list(dict.fromkeys(name.strip() for name in names))


def _nearest(word, words) -> str:
    close = difflib.get_close_matches(str(word), list(words), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _choices(key: str, kind) -> tuple:
    enums = [part for part in get_args(kind) if isinstance(part, EnumMeta)]
    return CHOICES.get(key) or tuple(member.value for enum in enums for member in enum)


def _read(key: str, value, kind):
    """`value` as the type `kind` of the field `key`, within its choices and limits; ValueError with the remedy.

    Words on the command line and in variables have no type: the first meaning that fits the field is taken.
    """
    choices, (low, high) = _choices(key, kind), LIMITS.get(key, (-math.inf, math.inf))
    if value is None and type(None) in get_args(kind):
        return None
    field = TypedDict("Given", {key: kind}, total=False)
    if value is False and "no" in choices:  # YAML 1.1 takes a bare `no` for false
        value = "no"
    if isinstance(value, str) and (key, value) in NOT_THERE:
        raise ValueError(NOT_THERE[key, value])
    if choices and value not in choices:
        raise ValueError(f"choose one of {', '.join(choices)}{_nearest(value, choices)}")
    meanings = [scalar(value), value, [value]]
    if type(meanings[0]) in (int, float):
        meanings += [float(meanings[0])] + [int(meanings[0])] * float(meanings[0]).is_integer()
    for meaning in meanings:
        try:
            validate_typed_dict(field, {key: meaning})
            break
        except StrictDataclassFieldValidationError:
            continue
    else:
        raise ValueError(f"expected {kind.__name__ if isinstance(kind, type) else kind}")
    numbers = meaning if isinstance(meaning, list) else [meaning]
    if key in LIMITS and meaning is not None and not (numbers and all(low <= number <= high for number in numbers)):
        raise ValueError(f"must lie between {low} and {high}")
    return meaning


def as_types(values: dict, types: dict, problems: list[tuple], *, others=()) -> dict:
    """The values as the types of their fields; `others` are names that an unknown key may have been meant for."""
    typed = {}
    for key, value in values.items():
        try:
            if key not in types:
                raise ValueError(f"no such key{_nearest(key, {*types, *others})}")
            typed[key] = _read(key, value, types[key])
        except ValueError as error:
            problems.append((key, value, str(error)))
    return typed


def _vlm_conflicts(values: dict):
    """What a vision-language model brings itself, and what means nothing without one."""
    if values["vlm"] is None:
        for key in OF_A_VLM if values["model"] is None else ():
            if values[key] is not None:
                yield key, values[key], "it sets up the images of a `vlm`, and there is none: remove this key"
        return
    for key in [key for key in (*IN_A_VLM, *JOINED_IN_A_VLM) if values[key] is not None]:
        yield key, values[key], "the `vlm` brings its own: remove this key"
    if None not in (values["min_tiles"], values["max_tiles"]) and values["min_tiles"] > values["max_tiles"]:
        yield "min_tiles", values["min_tiles"], f"`max_tiles` is {values['max_tiles']}: set it to no more than that"


def _schedule(values: dict, modes: list[str]):
    """What a schedule of thoughts needs, and where there is none."""
    schedule, iterations = values["thought_schedule"], values["jacobi_iterations"]
    if schedule is None:
        return
    if schedule != "jacobi":
        if iterations is not None:
            yield "jacobi_iterations", iterations, "it belongs to another schedule: set `thought_schedule: jacobi` too"
        return
    if iterations is None:
        yield "jacobi_iterations", None, "`thought_schedule: jacobi` needs it: set 1 or more, at most all thoughts"
    if "pause" in modes:
        yield "thought_schedule", schedule, "`mode: pause` feeds no thought back: set sequential, or another mode"


def _per_turn(values: dict):
    """What means nothing where every turn has as many thoughts."""
    for key in OF_STAGES if values["thoughts_per_turn"] else ():
        if values[key] not in (None, default_of(key)):
            yield key, values[key], "with `thoughts_per_turn` there are no stages: remove this key"


def _layout(values: dict):
    """Contradictions of the layout; None is what a checkpoint has that is not read yet, and contradicts nothing."""
    modes = compared_modes(values.get("compare")) or [values["mode"]]
    yield from _schedule(values, modes)
    thinking = [mode for mode in modes if mode in THINKING_MODES]
    yield from _per_turn(values)
    for key in ("c_thought", "max_latent_stage") if thinking and not values["thoughts_per_turn"] else ():
        if values[key] == 0:
            yield key, 0, f"`mode: {thinking[0]}` would have no latents: set 1 or more, or `mode: no_thoughts`"


def _conflicts(values: dict):
    """The combinations of typed `values` that cannot be meant."""
    given = dict.fromkeys(key for key in IN_A_CHECKPOINT if values[key] is not None).keys()
    for key in given if values["model"] is not None else ():
        yield key, values[key], f"the checkpoint `model` brings its own: remove one (--{key} null)"
    yield from _vlm_conflicts(values)
    for part in ("vision", "text"):
        model, config = f"{part}_model", f"{part}_config"
        if {model, config} <= given:
            yield model, values[model], f"`{config}` is set too: keep one"
        if values["model"] is None and values["vlm"] is None and not {model, config} & given:
            yield model, None, f"set `{model}` or `{config}`, or `model` to start from a checkpoint, or `vlm`"
        if config in given and "model_type" not in values[config]:
            yield config, values[config], "name the architecture: add `model_type`"
    if "text_config" in given and not {"text_model", "tokenizer"} & given:
        yield "tokenizer", None, "a `text_config` has none: set `tokenizer: train`, a folder or a Hub id"
    if "text_model" in given and values["tokenizer"] == "train":
        yield "tokenizer", "train", "the embeddings of `text_model` belong to its own tokenizer: remove this key"
    if not values.get("do_train", True) and values["model"] is None and values["tokenizer"] == "train":
        yield "model", None, "with `do_train: false` there is nothing to evaluate: name a checkpoint"
    if values["dataset_options"].get("images_required") is False and values["dataset_options"].get("image_root"):
        yield "dataset_options.images_required", False, "no image would be read from `image_root`: keep one"
    if values["lora"] is not None and values.get("push_to_hub") and values.get("hub_strategy") != "end":
        yield "hub_strategy", values.get("hub_strategy"), "a checkpoint with `lora` is no whole model to push: set end"
    if values.get("hub_strategy") == "all_checkpoints":
        yield "hub_strategy", "all_checkpoints", "each save is a revision already: set every_save or checkpoint"
    frozen = {name.rpartition(".")[2] for name in values["freeze"]}
    if values["precompute_image_features"] and "vision_tower" not in frozen:
        yield "precompute_image_features", True, "the vision tower is trained: add `vision_tower` to `freeze`"
    if values["image_features_cache"] is not None and not values["precompute_image_features"]:
        yield "image_features_cache", values["image_features_cache"], "set `precompute_image_features: true` too"
    for part, rate in (values.get("learning_rates") or {}).items():
        if rate < 0:
            yield f"learning_rates.{part}", rate, "must be at least 0"
    if values.get("profile") and not values.get("do_train", True):
        yield "profile", True, "with `do_train: false` there is no update to profile: remove this key"
    if not values.get("eval_do_concat_batches", True):
        yield "eval_do_concat_batches", False, "metrics need the whole split: remove this key"
    yield from _updates(values)
    for key in REFUSED:
        if values.get(key):
            yield key, values[key], REFUSED[key]
    for key in CHECKPOINTING:
        if isinstance(values.get(key), dict) and values[key].get("use_reentrant"):
            yield key, values[key], "re-entrant checkpointing cannot replay the latents' cache: use_reentrant: false"


def _updates(values: dict):
    """Yield the settings that leave a run without an update."""
    if not values.get("do_train", True):
        return
    if values.get("max_steps") == 0:
        yield "max_steps", 0, "nothing would be trained: set 1 or more, or remove this key to train by epochs"
    elif values.get("num_train_epochs") == 0 and values.get("max_steps", -1) < 0:
        yield "num_train_epochs", 0, "nothing would be trained: set more than 0, or `do_train: false` to evaluate only"


def _alignment(values: dict):
    """What an alignment of images with texts needs, and what means nothing without one."""
    for target in values["alignment_target"]:
        if target not in ALIGNMENT_TARGETS:
            remedy = f"choose from {', '.join(ALIGNMENT_TARGETS)}{_nearest(target, ALIGNMENT_TARGETS)}"
            yield "alignment_target", target, remedy
    if values["align_weight"] == 0:
        if values["align_warmup_epochs"]:
            yield "align_warmup_epochs", values["align_warmup_epochs"], "there is no alignment: set `align_weight` too"
        return
    if values["model"] is None and values["projector_type"] not in PREFIX_PROJECTORS:
        remedy = f"an alignment needs one vector an image: set one of {', '.join(PREFIX_PROJECTORS)}"
        yield "projector_type", values["projector_type"], remedy
    if values["model"] is None and values["image_fusion"] != "encoder":
        yield "image_fusion", values["image_fusion"], "an alignment needs a text encoder: set `encoder`"
    lengths = values["epochs_per_stage"]
    first = lengths if isinstance(lengths, int) else lengths[0]
    epochs = values.get("num_train_epochs", RunArguments.num_train_epochs)
    key, available = ("epochs_per_stage", first) if values["mode"] in STAGED_MODES else ("num_train_epochs", epochs)
    if values["align_warmup_epochs"] >= available:
        remedy = f"it leaves none of the {available} epochs of `{key}` for the answer: set that to more"
        yield "align_warmup_epochs", values["align_warmup_epochs"], remedy


def _objective(values: dict):
    """What an objective needs, and what means nothing with it."""
    objective = values["objective"]
    if objective not in REWARDED:
        for key in OF_REWARDS:
            if values[key]:
                yield key, values[key], "nothing is sampled and rewarded: set `objective: grpo`, or remove this key"
    elif not _is_package_available("trl")[0]:
        yield "objective", objective, "rewards need trl: pip install 'mmcoconut[rl]'"
        return
    else:
        yield from _rewarded(values)
    if objective == "distill_stops":
        yield from _distilled(values)
    elif objective == "supervised" and values["stop_head"] and values["model"] is None:
        yield "stop_head", True, "nothing trains it here: set `objective: distill_stops` or grpo, or remove this key"
    if values["stop_head"] and values["thought_schedule"] == "jacobi":
        yield "stop_head", True, "parallel thoughts do not follow each other: set `thought_schedule: sequential`"
    modes = compared_modes(values.get("compare")) or [values["mode"]]
    for mode in [mode for mode in modes if mode not in (None, "coconut")] if values["stop_head"] else []:
        yield "mode", mode, "`stop_head` ends thoughts that are fed back: set `mode: coconut`, or remove `stop_head`"


def _distilled(values: dict):
    """What is wrong with, or means nothing beside, a stop head that learns from a model which answers already."""
    if values["stop_head"] is False:
        yield "stop_head", False, "`objective: distill_stops` trains that head: set `stop_head: true`"
    if values["model"] is None and not values.get("smoke_test"):
        yield "model", None, "`objective: distill_stops` needs a model that answers already: name its checkpoint"
    for key in (*NOT_REWARDED, "lora"):
        if values.get(key):
            yield key, values[key], "only the stop head learns, and at the last stage: remove this key"


def _rewarded(values: dict):
    """What is wrong with `rewards` and `rl`, and with what stands beside them."""
    from mmcoconut.policy_arguments import check_value, passed_on  # here, because it imports trl
    from mmcoconut.rewards import reward_problems

    if values["rewards"] is not None:
        yield from reward_problems(values["rewards"])
    types = passed_on(values["objective"])
    for key, value in values["rl"].items():
        try:
            if key not in types:
                raise ValueError(f"not passed on to trl{_nearest(key, types)}; passed on are {', '.join(types)}")
            check_value(key, _read(key, value, types[key]))
        except ValueError as error:
            yield f"rl.{key}", value, str(error)
    if "thoughts" in (values["rewards"] or {}) and values["stop_head"] is False:
        yield "rewards.thoughts", values["rewards"]["thoughts"], "all rows think all thoughts: set `stop_head: true`"
    if values["thought_noise"] and values["mode"] not in (None, "coconut"):
        yield "thought_noise", values["thought_noise"], f"`mode: {values['mode']}` feeds no thought back: set it to 0"
    for key, remedy in NOT_REWARDED.items():
        if values.get(key):
            yield key, values[key], remedy
    if values["ce_weight"] != CurriculumArguments.ce_weight:
        yield "ce_weight", values["ce_weight"], "answers are rewarded, and have no cross-entropy: remove this key"
    if values.get("train_sampling_strategy") == "group_by_length":
        yield "train_sampling_strategy", "group_by_length", "trl repeats rows in its own order: remove this key"


def _comparison(values: dict):
    """What is wrong with `compare`, and what does not go with it or without it."""
    compare = values.get("compare")
    if compare is None:
        for key in ("seeds", "compare_jobs"):
            if values.get(key) not in (None, 1):
                yield key, values[key], "only a comparison has several runs: set `compare` to its modes, or remove it"
        return
    for mode in compared_modes(compare) or [""]:
        if mode not in MODES:
            yield "compare", mode, f"choose from {', '.join(MODES)}{_nearest(mode, MODES)}"
    for key in NOT_COMPARED:
        if values.get(key):
            yield key, values[key], NOT_COMPARED[key]
    if not values.get("do_train", True):
        yield "do_train", False, "a comparison trains every mode: remove this key"


def unknown_fields(values: dict):
    """Fields of the configurations that their architecture does not have; data sets check their own options."""
    for part in ("vision_config", "text_config"):
        config = values[part] or {}
        cls = CONFIG_MAPPING[config["model_type"]] if config.get("model_type") in CONFIG_MAPPING else None
        if config.get("model_type") and cls is None:
            yield part, config["model_type"], f"no such architecture{_nearest(config['model_type'], CONFIG_MAPPING)}"
        if cls is not None:
            valid = {"model_type", *cls.attribute_map, *(field.name for field in dataclasses.fields(cls))}
            for key in sorted(config.keys() - valid):
                yield f"{part}.{key}", config[key], f"{cls.__name__} has no such field{_nearest(key, valid)}"


def _lora(values: dict):
    """Fields that peft.LoraConfig does not have."""
    lora = values["lora"]
    if lora is None:
        return
    if not is_peft_available():
        yield "lora", lora, "adapters need peft: pip install 'mmcoconut[lora]'"
        return
    for key in sorted(lora.keys() - lora_fields()):
        yield f"lora.{key}", lora[key], f"peft.LoraConfig has no such field{_nearest(key, lora_fields())}"


def _missing(values: dict):
    """The paths that lead nowhere; a Hub id is not looked up."""
    for key in FOLDERS:
        if is_missing_folder(values.get(key)):
            yield key, values[key], "no such folder: give an existing folder or a Hub id"
    splits = ("train", values["eval_split"]) if values.get("do_train", True) else (values["eval_split"],)
    for name in DATA_PATHS:
        option = values["dataset_options"].get(name) or {}
        paths = option if isinstance(option, dict) else dict.fromkeys(splits, option)
        for path in {str(paths[split]).replace("{split}", split): None for split in splits if paths.get(split)}:
            if not Path(path).exists():
                yield f"dataset_options.{name}", path, "no such file or folder"


def warn_of_idle(values: dict, run: RunArguments) -> None:
    """Log the keys that this run's mode, checkpoint or objective leaves without effect, in one process.

    values: what the recipe says, with the mode that a checkpoint settled.
    """
    modes = compared_modes(values.get("compare")) or [values["mode"]]
    for line in idle_keys(values, DEFAULTS, modes) if run.process_index == 0 else ():
        logger.warning("%s", line)


def _build(values: dict, problems: list[tuple]) -> list:
    """The four dataclasses; RunArguments last, as it sets up devices, and only from values that are right."""
    parts = [{key: values[key] for key in names if key in values} for names in NAMES]
    built = [cls(**part) for cls, part in zip(CLASSES[:-1], parts[:-1], strict=True)]
    complete = {**vars(built[0]), **vars(built[1]), **vars(built[2]), **parts[-1]}
    wrong = {key for key, _, _ in problems}
    found = [*_conflicts(complete), *_comparison(complete), *unknown_fields(complete), *_lora(complete)]
    found += [*without_effect(complete, DEFAULTS), *_layout(complete), *_alignment(complete)]
    found += [*_objective(complete)] if "objective" not in wrong else []
    found += [] if values.get("smoke_test") else _missing(complete)
    problems += [problem for problem in found if problem[0] not in wrong]
    if values.get("smoke_test") and not torch.cuda.is_available():
        parts[-1] |= {"bf16": False, "fp16": False}
    if not {key for key, _, _ in problems} & {*NAMES[-1]}:
        try:
            built.append(RunArguments(**parts[-1]))
            if complete["objective"] in REWARDED and not problems and not values.get("smoke_test"):
                from mmcoconut.policy_arguments import batch_problems  # here, because it imports trl

                _, data, curriculum, run = built
                problems += batch_problems(run, complete["rl"])
                built[-1] = run if problems else rewarded_arguments(run, data, curriculum)
            if values.get("model") is None or values.get("smoke_test"):  # else the checkpoint settles the mode first
                warn_of_idle(complete, built[-1])
        except REFUSALS as error:  # it belongs in the list of problems
            problems.append(("TrainingArguments", type(error).__name__, str(error)))
    return built


def layout_problems(arguments) -> list[tuple]:
    """Return the problems of the layout that a checkpoint has settled, as (key, value, remedy)."""
    *parts, run = arguments
    values = {key: value for part in parts for key, value in vars(part).items()}
    values |= {key: getattr(run, key) for key in NAMES[-1]}
    return [*_layout(values), *_objective(values)]


def _run_values(run: RunArguments) -> dict:
    """The fields that differ from their defaults, as a recipe spells them."""
    values = {key: value for key, value in run.to_dict().items() if key in NAMES[-1] and key not in NOT_SAVED}
    values["debug"] = " ".join(values["debug"])
    if run.accelerator_config == AcceleratorConfig():
        values["accelerator_config"] = None
    defaults = {field.name: field.default for field in dataclasses.fields(RunArguments)}
    return {key: value for key, value in values.items() if value not in (defaults[key], NOT_GIVEN.get(key, ...))}


def rewarded_arguments(run: RunArguments, data: DataArguments, curriculum: CurriculumArguments) -> RunArguments:
    """The run's arguments with what trl needs beside them.

    Raises:
        ValueError: what trl refuses, such as batches that do not hold whole groups of answers.
    """
    from mmcoconut.policy_arguments import passed_on, policy_arguments  # here, because it imports trl

    types = passed_on(curriculum.objective)
    rewarded = policy_arguments(
        curriculum.objective,
        _run_values(run),
        rl={key: _read(key, value, types[key]) for key, value in curriculum.rl.items()},
        rewards=curriculum.rewards or {"the metric": 1.0},
        max_new_tokens=data.max_new_tokens,
    )
    for name in NOT_SAVED:
        setattr(rewarded, name, getattr(run, name))
    return rewarded


def _default(field) -> str:
    """Return what help adds for a field that a checkpoint decides."""
    return f" Default: the checkpoint's; of a new model {NEW_MODEL[field.name]}." if field.name in NEW_MODEL else ""


def help_text(usage: str, classes=CLASSES) -> str:
    lines = [f"usage: {usage}", ""]
    for cls in classes:
        own = [field for field in dataclasses.fields(cls) if field.name in vars(cls).get("__annotations__", {})]
        lines += [
            f"{cls.__doc__}",
            *(f"  --{field.name}: {field.metadata['help']}{_default(field)}" for field in own),
            "",
        ]
    return "\n".join(lines)


def read_arguments(argv: list[str], cls, usage: str):
    """`--key value ...` as the dataclass `cls`, for commands without a recipe of their own.

    Raises:
        RecipeError: everything that is wrong with the command line.
    """
    if {"-h", "--help"} & {*argv}:
        print(help_text(usage, [cls]))
        raise SystemExit(0)
    problems, values = [], {}
    for key, value in read_overrides(argv, problems).items():
        assign(values, key, value, problems=problems)
    values = as_types(expand(values, "", problems), get_type_hints(cls), problems)
    if problems:
        raise RecipeError("command line", problems)
    return cls(**values)


def read_values(recipe: str, words: list[str]) -> MergedRecipe:
    """What a recipe, its bases and the command line say together, variables expanded and old keys translated."""
    values, sources, problems = read_recipe_file(recipe)
    overrides = read_overrides(words, problems)
    if BASE in overrides:
        problems.append((BASE, overrides.pop(BASE), "a base stands in a recipe, not on the command line"))
    old = {key: overrides.pop(key) for key in overrides.keys() & {*COCONUT_KEYS, "debug"}}
    values |= old
    forget_sources(sources, old)
    if values.keys() & COCONUT_KEYS:  # before the rest of the command line, which may change what this implies
        values = translate_coconut_keys(expand(values, "", problems), problems, sources)
    for key, value in overrides.items():
        assign(values, key, value, problems=problems)
    forget_sources(sources, overrides)
    values = {RENAMED.get(key, key): value for key, value in expand(values, "", problems).items()}
    return MergedRecipe(values, sources, problems)


def read_recipe(recipe: str | os.PathLike) -> dict:
    """What a recipe says of the data and the training text, typed, as far as it is said; the rest is not looked at."""
    values, sources, problems = read_values(str(recipe), [])
    values = as_types({key: value for key, value in values.items() if key in TYPES}, TYPES, problems)
    if problems:
        raise RecipeError(str(recipe), name_sources(problems, sources, str(recipe)))
    return values


def parse_recipe(argv: list[str]) -> tuple[ModelArguments, DataArguments, CurriculumArguments, RunArguments]:
    """The arguments of `recipe.yaml [--key value ...]`; RecipeError lists everything that is wrong with them."""
    recipe, *words = argv or [""]
    if {"-h", "--help"} & {*argv}:
        print(help_text("train_hf.py recipe.yaml [--key value ...]"))
        print(HELP)
        raise SystemExit(0)
    values, sources, problems = read_values(recipe, words)
    values = as_types(values, TYPES, problems, others=COCONUT_KEYS)
    values["output_dir"] = values.get("output_dir") or f"outputs/{Path(recipe).stem}"
    values = completed_for_a_new_model(values)
    arguments = _build(values, problems)
    if values.get("smoke_test"):  # it makes its own data
        problems = [problem for problem in problems if not problem[0].startswith("dataset_options.")]
    if problems:
        raise RecipeError(recipe, name_sources(problems, sources, recipe))
    return tuple(arguments)


def recipe_text(*arguments) -> str:
    """What `parse_recipe` returned as a recipe that gives the same again: all of ours, and of TrainingArguments what
    differs from its defaults, without the Hub token and what belongs to one launch."""
    sections = []
    for part in arguments:
        values = dataclasses.asdict(part) if not isinstance(part, RunArguments) else _run_values(part)
        sections.append(f"# {type(part).__name__}\n{yaml.dump(values, Dumper=RecipeDumper, sort_keys=False)}")
    return "\n".join(sections)


def save_recipe(path: str | os.PathLike, *arguments) -> None:
    """Write `recipe_text` whole or not at all, and make the folder it goes to."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(path), recipe_text(*arguments))
