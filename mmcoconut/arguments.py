"""The recipe of a run: one YAML file plus `--key value` overrides become four checked dataclasses."""

import dataclasses
import difflib
import math
import os
import re
from enum import EnumMeta
from pathlib import Path
from typing import TypedDict, get_args, get_type_hints

import torch
import yaml
from huggingface_hub.dataclasses import StrictDataclassFieldValidationError, validate_typed_dict
from transformers import CONFIG_MAPPING, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_peft_available, logging

from mmcoconut.configuration_mmcoconut import CHOICES as CONFIG_CHOICES
from mmcoconut.curriculum import MODES, THINKING_MODES
from mmcoconut.data import DATASETS
from mmcoconut.lora import lora_fields
from mmcoconut.processing_mmcoconut import MARKERS
from mmcoconut.scoring import REFERENCES


logger = logging.get_logger(__name__)

CHOICES = {key: CONFIG_CHOICES[key] for key in ("image_fusion", "projector_type", "thought_norm")}
CHOICES |= {"vision_feature_select_strategy": CONFIG_CHOICES["vision_feature_select_strategy"], "markers": MARKERS}
CHOICES |= {"dataset": tuple(DATASETS), "unreadable_images": ("error", "skip"), "mode": MODES}
CHOICES |= {"metric": tuple(REFERENCES)}
AT_LEAST_0 = ("c_thought", "max_latent_stage", "start_epoch", "num_train_epochs", "dataloader_num_workers")
AT_LEAST_0 += ("learning_rate", "weight_decay", "max_grad_norm", "num_latents", "num_shown")
AT_LEAST_1 = ("epochs_per_stage", "max_train_samples", "max_eval_samples", "max_new_tokens", "tokenizer_vocab_size")
AT_LEAST_1 += ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
AT_LEAST_1 += ("max_samples", "batch_size", "seeds", "compare_jobs", "top_k", "image_size", "min_tiles", "max_tiles")
LIMITS = (
    dict.fromkeys(AT_LEAST_0, (0, math.inf))
    | dict.fromkeys(AT_LEAST_1, (1, math.inf))
    | {"uniform_prob": (0, 1), "margin": (0, 1)}
)
REFUSED = {
    "remove_unused_columns": "the Trainer would drop the images before the collator sees them: remove this key",
    "load_best_model_at_end": "accuracies of different stages do not compare; stages/ keeps the best of each",
    "fsdp": "it belongs to the machine: accelerate launch --config_file recipes/accelerate/fsdp2_8gpu.yaml",
    "dataloader_persistent_workers": "workers that persist keep stage 0 for the whole run: remove this key",
}
# What a comparison does by itself, or what its runs would do to each other.
NOT_COMPARED = {
    "resume_from_checkpoint": "a comparison goes on by itself when it is called again: remove this key",
    "push_to_hub": "the runs would overwrite each other on the Hub: remove this key, and push the run that you want",
}
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
IN_A_VLM = ("vision_model", "vision_config", "text_model", "text_config", "tokenizer")
IN_A_CHECKPOINT = ("vlm", *IN_A_VLM)
# What a vision-language model decides by its weights, and what only its processor can be told.
JOINED_IN_A_VLM = ("image_fusion", "projector_type", "vision_feature_layer", "vision_feature_select_strategy")
OF_A_VLM = ("image_size", "min_tiles", "max_tiles", "use_thumbnail")
FOLDERS = ("model", "vlm", "vision_model", "text_model", "tokenizer", "resume_from_checkpoint")
DATA_PATHS = ("file", "folder", "image_root")
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
YAML_1_2_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")

COCONUT_RENAMED = {
    "model_id": "text_model",
    "clip_id": "vision_model",
    "vision_model_id": "vision_model",
    "load_model_path": "model",
    "batch_size_training": "per_device_train_batch_size",
    "lr": "learning_rate",
    "resume": "start_epoch",
}
COCONUT_MODES = ("coconut", "cot", "no_thoughts", "no_cot")
COCONUT_OTHERS = ("num_epochs", "save_path", "name", "only_eval", "save_only_improve")
COCONUT_FILES = {"train_path": "train", "val_path": "validation"}
COCONUT_KEYS = {*COCONUT_RENAMED, *COCONUT_MODES, *COCONUT_OTHERS, *COCONUT_FILES, "image_root"}
# What the original's script does without being told.
COCONUT_HABITS = {"eval_strategy": "epoch", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
COCONUT_HABITS |= {"new_token_init": "<<"}
COCONUT_VISION = {"vision_model": "openai/clip-vit-base-patch32", "vision_model_type": "clip_vision_model"}

# Saved under their new name, set by the launcher, or secret: a run's folder may be pushed.
NOT_SAVED = ("gradient_checkpointing", "gradient_checkpointing_kwargs", "local_rank", "hub_token")
# About one launch, not about the run: repeating them from a run's own recipe would delete or re-enter it.
NOT_SAVED += ("overwrite", "resume_from_checkpoint", "compare", "seeds", "compare_jobs")
# What TrainingArguments makes of a field that was not given.
NOT_GIVEN = {"report_to": [], "include_for_metrics": [], "include_num_input_tokens_seen": "no"}
NOT_GIVEN |= {"disable_tqdm": False, "activation_checkpointing": False}


@dataclasses.dataclass
class ModelArguments:
    """What the model starts from and how its parts are joined."""

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
    image_fusion: str = HfArg(default="replace", help="How image features reach the decoder.")
    projector_type: str = HfArg(default="linear", help="What maps image features to the decoder's width.")
    vision_feature_layer: int | list[int] = HfArg(default=-1, help="Hidden layer, or layers, of the vision tower.")
    vision_feature_select_strategy: str = HfArg(default="default", help="`default` leaves out the class token.")
    image_size: int | None = HfArg(default=None, help="Side of the tiles that the vlm reads; default: its own.")
    min_tiles: int | None = HfArg(default=None, help="Least tiles of an image for the vlm; default: its own.")
    max_tiles: int | None = HfArg(default=None, help="Most tiles of an image for the vlm; default: its own.")
    use_thumbnail: bool = HfArg(default=True, help="Several tiles of an image are followed by the whole picture.")
    thought_norm: str = HfArg(default="none", help="What is done to a thought before it is fed back.")
    markers: str = HfArg(default="both", help="Which of <|start-latent|> and <|end-latent|> frame the thoughts.")
    freeze: list[str] = HfArg(default_factory=list, help="Sub-modules that are not trained, such as vision_tower.")
    lora: dict | None = HfArg(default=None, help="Train adapters: fields of peft.LoraConfig; {} for the defaults.")
    new_token_init: str | None = HfArg(default=None, help="Token that new embeddings copy; default: their mean.")
    attn_implementation: str | None = HfArg(default=None, help="Attention function, as in from_pretrained.")


@dataclasses.dataclass
class DataArguments:
    """What is learnt from and what is evaluated."""

    dataset: str = HfArg(default="arrow_mazes", help="A name in mmcoconut.data.DATASETS.")
    dataset_options: dict = HfArg(default_factory=dict, help="Passed to the data set, such as {file: ...}.")
    max_train_samples: int | None = HfArg(default=None, help="Use only so many training examples.")
    max_eval_samples: int | None = HfArg(default=None, help="Use only so many evaluation examples.")
    unreadable_images: str = HfArg(default="error", help="`skip` leaves out examples whose image cannot be read.")
    metric: str | None = HfArg(default=None, help="A folder of metrics/; default: the data set's.")
    max_new_tokens: int = HfArg(default=64, help="Longest text generated in evaluation, in tokens.")
    eval_split: str = HfArg(default="validation", help="Split that is evaluated at the end of every stage.")
    test_split: str | None = HfArg(default=None, help="Split that is evaluated once, after training.")


@dataclasses.dataclass
class CurriculumArguments:
    """The stages of Coconut and its controls."""

    mode: str = HfArg(default="coconut", help="Latent reasoning, or one of its controls.")
    c_thought: int = HfArg(default=1, help="Latent tokens for each replaced step.")
    max_latent_stage: int = HfArg(default=3, help="Last stage that replaces one more step.")
    epochs_per_stage: int | list[int] = HfArg(default=1, help="A stage's epochs; of a list the last entry repeats.")
    uniform_prob: float = HfArg(default=0.0, help="Probability that an example takes a stage at random.")
    pad_latent_to_max: bool = HfArg(default=True, help="As many latents for rows with fewer steps than the stage.")
    reset_optimizer: bool = HfArg(default=False, help="Forget the optimizer's state at each stage.")
    start_epoch: int = HfArg(default=0, help="Epochs trained elsewhere: the first epoch here counts as this one.")


@dataclasses.dataclass(repr=False)  # the inherited __repr__ hides tokens
class RunArguments(TrainingArguments):
    """transformers.TrainingArguments with the defaults that this project needs."""

    smoke_test: bool = HfArg(default=False, help="Tiny model and made-up data: does the recipe run at all?")
    ddp_find_unused_parameters: bool | None = HfArg(
        default=True, help="Leave true: a vision tower's last norm gets no gradient."
    )
    overwrite: bool = HfArg(default=False, help="Delete an earlier run's output_dir before training anew.")
    do_train: bool = HfArg(default=True, help="Train; false only evaluates.")
    remove_unused_columns: bool = HfArg(default=False, help="Always false: the collator needs the images.")
    resume_from_checkpoint: bool | str | None = HfArg(default=None, help="Folder, or true: last one in output_dir.")
    compare: str | list[str] | None = HfArg(default=None, help="Modes to train and compare: cot,no_cot,coconut ...")
    seeds: int = HfArg(default=1, help="Runs of each compared mode, with the seeds seed, seed + 1, ...")
    compare_jobs: int | None = HfArg(default=None, help="Compared runs at a time; default: what the devices allow.")


CLASSES = (ModelArguments, DataArguments, CurriculumArguments, RunArguments)
NAMES = [[field.name for field in dataclasses.fields(cls) if field.init] for cls in CLASSES]
TYPES = {name: get_type_hints(cls)[name] for cls, names in zip(CLASSES, NAMES, strict=True) for name in names}


def default_of(key: str):
    """What a recipe without this key stands for; also for keys that are younger than a saved recipe."""
    fields = {field.name: field for cls in CLASSES for field in dataclasses.fields(cls)}
    if key not in fields:
        return None
    factory = fields[key].default_factory
    return fields[key].default if factory is dataclasses.MISSING else factory()


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, a line each; `problems` holds it as (key, value found, remedy)."""

    def __init__(self, recipe: str, problems: list[tuple]):
        self.problems = list(problems)
        lines = [f"{key} = {value!r}: {' '.join(remedy.split())}" for key, value, remedy in self.problems]
        super().__init__("\n  - ".join([f"{recipe}: {len(lines)} problem(s)", *lines]))


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML that reads 1e-5 as a number (YAML 1.2) and notes the keys that are written twice."""

    def __init__(self, stream):
        super().__init__(stream)
        self.duplicates = []

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in lines:
                self.duplicates.append((key, f"line {line}", f"already set in line {lines[key]}: keep one"))
            lines[key] = line
        return super().construct_mapping(node, deep)


class RecipeDumper(yaml.SafeDumper):
    """Quotes the text that RecipeLoader would read as a number."""


for _class in (RecipeLoader, RecipeDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", YAML_1_2_FLOAT, list("-+.0123456789"))


def compared_modes(compare: str | list[str] | None) -> list[str]:
    """The modes that `compare` names, each once and in order.

    >>> compared_modes("cot, coconut,cot"), compared_modes(["cot", "no_cot"]), compared_modes(None)
    (['cot', 'coconut'], ['cot', 'no_cot'], [])
    """
    names = compare.split(",") if isinstance(compare, str) else compare or []
    return list(dict.fromkeys(name.strip() for name in names))


def _scalar(value):
    """What text means as YAML; text that is not YAML, and what is not text, stands for itself."""
    try:
        return yaml.load(value, RecipeLoader) if isinstance(value, str) else value
    except (yaml.YAMLError, ValueError):  # a ValueError is a date such as 2024-13-01
        return value


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
    if choices and value not in choices:
        raise ValueError(f"choose one of {', '.join(choices)}{_nearest(value, choices)}")
    meanings = [_scalar(value), value, [value]]
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


def _read_file(recipe: str, problems: list[tuple]) -> dict:
    if not Path(recipe).is_file():
        raise RecipeError(recipe, [("recipe", recipe, "no such file: the first argument is a YAML file")])
    try:
        loader = RecipeLoader(Path(recipe).read_text(encoding="utf-8"))
        values = loader.get_single_data() or {}
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(recipe, [("recipe", recipe, f"not YAML: {error}")]) from error
    if not isinstance(values, dict):
        raise RecipeError(recipe, [("recipe", values, "expected lines of `key: value`")])
    problems += loader.duplicates
    return {str(key): value for key, value in values.items()}


def _read_overrides(words: list[str], problems: list[tuple]) -> dict:
    """`--key value`, `--key=value`, `--key a b` (a list) and a bare `--key` (true)."""
    given, key = {}, None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            given[key] = [value] if equals else []
        elif key is None:
            problems.append(("command line", word, "stands before the first --key"))
        else:
            given[key].append(word)
    return {key: [*map(_scalar, some)] if some[1:] else some[0] if some else True for key, some in given.items()}


def _assign(values: dict, key: str, value, *, problems: list[tuple]) -> None:
    """values["a"]["b"] = value for the key a.b; what stands inside a mapping has no type, so text is read as YAML."""
    *parents, last = key.split(".")
    for parent in parents:
        values[parent] = {} if values.get(parent) is None else _scalar(values[parent])
        if not isinstance(values[parent], dict):
            problems.append((key, value, f"`{parent}` is not a mapping"))
            return
        values = values[parent]
    values[last] = _scalar(value) if parents else value


def _expand(value, key: str, problems: list[tuple]):
    """`value` with ${VAR}, ${VAR:-default} and a leading ~ replaced, also inside mappings and lists."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = {name: _expand(item, f"{key}.{name}".lstrip("."), problems) for name, item in items}
        return parts if isinstance(value, dict) else [*parts.values()]
    if not isinstance(value, str):
        return value

    def substitute(match: re.Match) -> str:
        name, default = match.groups()
        if name not in os.environ and default is None:
            problems.append((key, value, f"set the environment variable {name}, or write ${{{name}:-default}}"))
        return os.environ.get(name) or default or ""

    expanded = VARIABLE.sub(substitute, value)
    expanded = os.path.expanduser(expanded) if expanded.startswith("~/") else expanded
    return _scalar(expanded) if "." in key and expanded != value else expanded


def _typed(values: dict, types: dict, problems: list[tuple], *, others=()) -> dict:
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
    defaults = {field.name: field.default for field in dataclasses.fields(ModelArguments)}
    changed = [key for key in (*JOINED_IN_A_VLM, *OF_A_VLM) if values[key] != defaults[key]]
    if values["vlm"] is None:
        for key in {*changed} & {*OF_A_VLM}:
            yield key, values[key], "it sets up the images of a `vlm`, and there is none: remove this key"
        return
    for key in [key for key in IN_A_VLM if values[key] is not None] + [key for key in changed if key not in OF_A_VLM]:
        yield key, values[key], "the `vlm` brings its own: remove this key"


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
    modes = compared_modes(values.get("compare")) or [values["mode"]]
    thinking = [mode for mode in modes if mode in THINKING_MODES]
    for key in ("c_thought", "max_latent_stage") if thinking else ():
        if values[key] == 0:
            yield key, 0, f"`mode: {thinking[0]}` would have no latents: set 1 or more, or `mode: no_thoughts`"
    if values["dataset_options"].get("images_required") is False and values["dataset_options"].get("image_root"):
        yield "dataset_options.images_required", False, "no image would be read from `image_root`: keep one"
    if values["lora"] is not None and values.get("push_to_hub") and values.get("hub_strategy") != "end":
        yield "hub_strategy", values.get("hub_strategy"), "a checkpoint with `lora` is no whole model to push: set end"
    for key in REFUSED:
        if values.get(key):
            yield key, values[key], REFUSED[key]
    for key in CHECKPOINTING:
        if isinstance(values.get(key), dict) and values[key].get("use_reentrant"):
            yield key, values[key], "re-entrant checkpointing cannot replay the latents' cache: use_reentrant: false"


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


def _nested(values: dict):
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
        path = values.get(key)
        local = isinstance(path, str) and (path.startswith((".", "/", "~")) or Path(path).is_file())
        if local and not Path(path).is_dir():
            yield key, path, "no such folder: give an existing folder or a Hub id"
    splits = ("train", values["eval_split"]) if values.get("do_train", True) else (values["eval_split"],)
    for name in DATA_PATHS:
        option = values["dataset_options"].get(name) or {}
        paths = option if isinstance(option, dict) else dict.fromkeys(splits, option)
        for path in {str(paths[split]).replace("{split}", split): None for split in splits if paths.get(split)}:
            if not Path(path).exists():
                yield f"dataset_options.{name}", path, "no such file or folder"


def _build(values: dict, problems: list[tuple]) -> list:
    """The four dataclasses; RunArguments last, as it sets up devices, and only from values that are right."""
    parts = [{key: values[key] for key in names if key in values} for names in NAMES]
    built = [cls(**part) for cls, part in zip(CLASSES[:-1], parts[:-1], strict=True)]
    complete = {**vars(built[0]), **vars(built[1]), **vars(built[2]), **parts[-1]}
    wrong = {key for key, _, _ in problems}
    found = [*_conflicts(complete), *_comparison(complete), *_nested(complete), *_lora(complete)]
    found += [] if values.get("smoke_test") else _missing(complete)
    problems += [problem for problem in found if problem[0] not in wrong]
    if values.get("smoke_test") and not torch.cuda.is_available():
        parts[-1] |= {"bf16": False, "fp16": False}
    if not {key for key, _, _ in problems} & {*NAMES[-1]}:
        try:
            built.append(RunArguments(**parts[-1]))
        except Exception as error:  # whatever it is, it belongs in the list of problems
            problems.append(("TrainingArguments", type(error).__name__, str(error)))
    return built


def _run_values(run: RunArguments) -> dict:
    """The fields that differ from their defaults, as a recipe spells them."""
    values = {key: value for key, value in run.to_dict().items() if key not in NOT_SAVED}
    values["debug"] = " ".join(values["debug"])
    if run.accelerator_config == AcceleratorConfig():
        values["accelerator_config"] = None
    defaults = {field.name: field.default for field in dataclasses.fields(run)}
    return {key: value for key, value in values.items() if value not in (defaults[key], NOT_GIVEN.get(key, ...))}


def _coconut_settings(old: dict):
    """What the old keys say: (old key, new key, value)."""
    for key, new in COCONUT_RENAMED.items():
        if key in old and not ("load_model_path" in old and new in IN_A_CHECKPOINT):
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
    """What the original's script does without being told; the recipe's own keys come first."""
    for key, value in COCONUT_HABITS.items():
        new.setdefault(key, value)
    new.setdefault("max_new_tokens", 64 if "gsm" in str(old.get("val_path")) else 128)
    if not new.keys() & {"model", "vlm", "vision_model", "vision_config"}:
        logger.warning(f"this Coconut recipe names no vision tower: {COCONUT_VISION['vision_model']} is taken")
        new |= COCONUT_VISION
    if "gpt2" in str(new.get("text_model")):
        new.setdefault("text_model_type", "gpt2")
    if "image_root" not in old and "dataset_options" in new:
        new["dataset_options"]["images_required"] = False


def translate_coconut_keys(values: dict, problems: list[tuple] | None = None) -> dict:
    """The recipe that a YAML file of facebookresearch/coconut (args/*.yaml) stands for; any other comes back as it is.

    | old key | becomes |
    |---|---|
    | model_id; clip_id or vision_model_id | text_model; vision_model (without: openai/clip-vit-base-patch32) |
    | load_model_path | model, instead of the backbones; "None" is none |
    | coconut, cot, no_thoughts, no_cot | mode: the one that is true |
    | train_path, val_path; image_root | dataset: json_steps, dataset_options.file; .image_root |
    | num_epochs, resume | num_train_epochs = num_epochs - resume, start_epoch = resume |
    | batch_size_training, lr | per_device_train_batch_size, learning_rate |
    | save_path, name | output_dir = save_path/name, run_name = name |
    | save_only_improve | true: save_strategy no (the best of each stage is kept anyhow); false: save_strategy epoch |
    | only_eval | true: do_train false, do_eval true |
    | debug | true: max_train_samples and max_eval_samples 32 |

    All others keep their names. With model_id come the habits of the original's script, which the recipe may change:
    COCONUT_HABITS, max_new_tokens 64 (GSM) or 128, and without image_root images_required false.
    Contradictions are added to `problems`, or raised as RecipeError where that is None.
    """
    if not values.keys() & COCONUT_KEYS:
        return values
    found = [] if problems is None else problems
    old = {key: _scalar(value) for key, value in values.items() if key in COCONUT_KEYS}
    if isinstance(_scalar(values.get("debug")), bool):  # elsewhere `debug` is text
        old["debug"] = _scalar(values["debug"])
    new = {key: value for key, value in values.items() if key not in old}
    old = {key: value for key, value in old.items() if value not in (None, "None")}
    for key in ("num_epochs", "resume"):
        if type(old.get(key, 0)) is not int:
            found.append((key, old.pop(key), "expected int"))
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


def _help(usage: str, classes=CLASSES) -> str:
    lines = [f"usage: {usage}", ""]
    for cls in classes:
        own = [field for field in dataclasses.fields(cls) if field.name in vars(cls).get("__annotations__", {})]
        lines += [f"{cls.__doc__}", *(f"  --{field.name}: {field.metadata['help']}" for field in own), ""]
    return "\n".join(lines)


def read_arguments(argv: list[str], cls, usage: str):
    """`--key value ...` as the dataclass `cls`, for commands without a recipe of their own.

    Raises:
        RecipeError: everything that is wrong with the command line.
    """
    if {"-h", "--help"} & {*argv}:
        print(_help(usage, [cls]))
        raise SystemExit(0)
    problems, values = [], {}
    for key, value in _read_overrides(argv, problems).items():
        _assign(values, key, value, problems=problems)
    values = _typed(_expand(values, "", problems), get_type_hints(cls), problems)
    if problems:
        raise RecipeError("command line", problems)
    return cls(**values)


def read_recipe(recipe: str | os.PathLike) -> dict:
    """What a recipe says of the data and the training text, typed, as far as it is said; the rest is not looked at."""
    problems = []
    values = translate_coconut_keys(_expand(_read_file(str(recipe), problems), "", problems), problems)
    values = _typed({key: value for key, value in values.items() if key in TYPES}, TYPES, problems)
    if problems:
        raise RecipeError(str(recipe), problems)
    return values


def parse_recipe(argv: list[str]) -> tuple[ModelArguments, DataArguments, CurriculumArguments, RunArguments]:
    """The arguments of `recipe.yaml [--key value ...]`; RecipeError lists everything that is wrong with them."""
    recipe, *words = argv or [""]
    if {"-h", "--help"} & {*argv}:
        print(_help("train_hf.py recipe.yaml [--key value ...]"))
        print("and every field of transformers.TrainingArguments.")
        raise SystemExit(0)
    problems = []
    values = _read_file(recipe, problems)
    overrides = _read_overrides(words, problems)
    values |= {key: overrides.pop(key) for key in overrides.keys() & {*COCONUT_KEYS, "debug"}}
    if values.keys() & COCONUT_KEYS:  # before the rest of the command line, which may change what this implies
        values = translate_coconut_keys(_expand(values, "", problems), problems)
    for key, value in overrides.items():
        _assign(values, key, value, problems=problems)
    values = _typed(_expand(values, "", problems), TYPES, problems, others=COCONUT_KEYS)
    values["output_dir"] = values.get("output_dir") or f"outputs/{Path(recipe).stem}"
    arguments = _build(values, problems)
    if values.get("smoke_test"):  # it makes its own data
        problems = [problem for problem in problems if not problem[0].startswith("dataset_options.")]
    if problems:
        raise RecipeError(recipe, problems)
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
    """Writes `recipe_text`, and the folder it goes to."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(recipe_text(*arguments), encoding="utf-8")
