"""Problems of a recipe as a whole, as (key, value, remedy): keys that contradict or require each other."""

import dataclasses
from collections.abc import Container
from pathlib import Path

from transformers import CONFIG_MAPPING
from transformers.utils import is_peft_available
from transformers.utils.import_utils import _is_package_available

from mmcoconut.arguments.choices import (
    CHECKPOINTING,
    DATA_PATHS,
    FOLDERS,
    IN_A_CHECKPOINT,
    IN_A_VLM,
    JOINED_IN_A_VLM,
    NOT_COMPARED,
    NOT_REWARDED,
    OF_A_COMPOSED_VLM,
    OF_A_VLM,
    OF_REWARDS,
    OF_STAGES,
    REFUSED,
    REWARDED,
    STAGED_MODES,
    THINKING_MODES,
)
from mmcoconut.arguments.fields import DEFAULTS, NAMES, CurriculumArguments, RunArguments, default_of
from mmcoconut.arguments.typed import did_you_mean, typed_value
from mmcoconut.arguments.variants import (
    compared_modes,
    compares_jacobi,
    known_objectives,
    variant_names,
    variant_problems,
)
from mmcoconut.arguments.without_effect import without_effect
from mmcoconut.configuration_mmcoconut import PREFIX_PROJECTORS
from mmcoconut.data import DATASETS, options_of
from mmcoconut.errors import folder_remedy, is_missing_folder
from mmcoconut.objectives.alignment import ALIGNMENT_TARGETS
from mmcoconut.objectives.registry import make_objective, objective_problems, pair_problems


READ_BESIDE_THE_TEXT = ("cross_attention", "encoder")  # of the values of image_fusion
NO_ALIGNMENT = (
    "a vlm has no single vector per image, and no text encoder to align it with: remove this key, or combine "
    "`vision_model` and `text_model` with a prefix projector and `image_fusion: encoder`"
)


def lora_fields() -> set[str]:
    """Return the fields of a recipe's `lora`."""
    from peft import LoraConfig  # here, because peft is an optional extra

    return {field.name for field in dataclasses.fields(LoraConfig) if field.init}


def _vlm_conflicts(values: dict):
    """Yield keys that a vision-language model defines itself, and keys that require one."""
    if values["vlm"] is None:
        for key in OF_A_VLM if values["model"] is None else ():
            if values[key] is not None:
                yield key, values[key], "only a `vlm` reads it, and there is none: remove this key"
        for key in ("composed", "check_vlm") if values["model"] is None else ():
            if values[key] != default_of(key):
                yield key, values[key], "only a `vlm` reads it, and there is none: remove this key"
        return
    if values["composed"] and values["image_options"] is not None:
        remedy = "only a vlm's own image processor reads them: remove this key, or `composed`"
        yield "image_options", values["image_options"], remedy
    for key in OF_A_COMPOSED_VLM if not values["composed"] else ():
        if values[key] is not None:
            remedy = (
                "the vlm's own processor decides it: set its `image_options`, or `composed: true` (InternVL, LLaVA)"
            )
            yield key, values[key], remedy
    if values["precompute_image_features"] and not values["composed"]:
        remedy = (
            "a vlm's own class encodes its images itself: remove this key, or set `composed: true` (InternVL, LLaVA)"
        )
        yield "precompute_image_features", True, remedy
    for key in [key for key in (*IN_A_VLM, *JOINED_IN_A_VLM) if values[key] is not None]:
        yield key, values[key], "the `vlm` has its own: remove this key"
    if None not in (values["min_tiles"], values["max_tiles"]) and values["min_tiles"] > values["max_tiles"]:
        yield "min_tiles", values["min_tiles"], f"`max_tiles` is {values['max_tiles']}: set it to no more than that"


def needs_parts(values: dict):
    """Yield keys that require a model of parts, for a checkpoint in a vision-language model's own class."""
    if values["precompute_image_features"]:
        remedy = "a vlm's own class encodes its images itself: remove this key, or convert the checkpoint first "
        yield (
            "precompute_image_features",
            True,
            remedy + "(python -m mmcoconut.convert_vlm … --to composed: InternVL, LLaVA)",
        )
    if values["align_weight"]:
        yield "align_weight", values["align_weight"], NO_ALIGNMENT


def _schedule(values: dict, modes: list[str]):
    """Yield conflicts of a schedule of thoughts."""
    schedule, iterations = values["thought_schedule"], values["jacobi_iterations"]
    has_own = compares_jacobi(values.get("compare"))
    if schedule is None:
        return
    if schedule != "jacobi":
        if iterations is not None and not has_own:
            yield "jacobi_iterations", iterations, "only another schedule reads it: set `thought_schedule: jacobi` too"
        return
    if iterations is None:
        yield "jacobi_iterations", None, "`thought_schedule: jacobi` needs it: set 1 or more, at most all thoughts"
    if has_own and "coconut" in {*variant_names(values["compare"])}:
        remedy = "`coconut` and `jacobi` would be the same runs: set sequential, or compare one of them"
        yield "thought_schedule", schedule, remedy
    if "pause" in modes:
        yield "thought_schedule", schedule, "`mode: pause` feeds no thought back: set sequential, or another mode"


def _answer_sees(values: dict):
    """Yield conflicts of an answer with restricted attention."""
    sees = values["answer_sees"]
    if sees in (None, "all"):
        return
    if values["thoughts_per_turn"]:
        remedy = "`thoughts_per_turn` puts thoughts into every turn, and only the text after a row's last one sees"
        yield "answer_sees", sees, f"{remedy} less: set `answer_sees: all`, or train on rows of one turn"
    if values["stop_head"]:
        remedy = "with `stop_head` the last thought is not known in advance: set `answer_sees: all`"
        yield "answer_sees", sees, f"{remedy}, or remove `stop_head`"


def _per_turn(values: dict):
    """Yield keys without effect if every turn has the same number of thoughts."""
    for key in OF_STAGES if values["thoughts_per_turn"] else ():
        if values[key] not in (None, default_of(key)):
            yield key, values[key], "with `thoughts_per_turn` there are no stages: remove this key"


def _layout(values: dict):
    """Yield contradictions of the layout; None, the value of a checkpoint not read yet, contradicts nothing."""
    modes = compared_modes(values.get("compare")) or [values["mode"]]
    yield from _schedule(values, modes)
    thinking = [mode for mode in modes if mode in THINKING_MODES]
    yield from _per_turn(values)
    if "markers" in modes and values["markers"] == "none":
        yield "markers", "none", "`mode: markers` needs them: set both or start, or `mode: no_thoughts`"
    yield from _answer_sees(values)
    for key in ("c_thought", "max_latent_stage") if thinking and not values["thoughts_per_turn"] else ():
        if values[key] == 0:
            yield key, 0, f"`mode: {thinking[0]}` would have no latents: set 1 or more, or `mode: no_thoughts`"


def _conflicts(values: dict):
    """Yield contradictory combinations of typed `values`."""
    given = dict.fromkeys(key for key in IN_A_CHECKPOINT if values[key] is not None).keys()
    for key in given if values["model"] is not None else ():
        yield key, values[key], f"the checkpoint `model` has its own: remove one (--{key} null)"
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
    if values["chat_template"] == "own" and values["tokenizer"] == "train" and not values.get("smoke_test"):
        yield "chat_template", "own", "a new tokenizer has none: remove this key, or name a `tokenizer`"
    if values["gguf_file"] is not None and not any(values[key] for key in ("text_model", "model", "vlm")):
        yield "gguf_file", values["gguf_file"], "it is a file of `text_model`: set that to its folder or Hub id"
    if not values.get("do_train", True) and values["model"] is None and values["tokenizer"] == "train":
        yield "model", None, "with `do_train: false` there is nothing to evaluate: name a checkpoint"
    if values["dataset_options"].get("images_required") is False and values["dataset_options"].get("image_root"):
        yield "dataset_options.images_required", False, "no image would be read from `image_root`: keep one"
    if values["lora"] is not None and values.get("push_to_hub") and values.get("hub_strategy") != "end":
        yield "hub_strategy", values.get("hub_strategy"), "a checkpoint with `lora` is not a whole model: set end"
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
    """Yield settings that leave a run without an update."""
    if not values.get("do_train", True):
        return
    if values.get("max_steps") == 0:
        yield "max_steps", 0, "nothing would be trained: set 1 or more, or remove this key to train by epochs"
    elif values.get("num_train_epochs") == 0 and values.get("max_steps", -1) < 0:
        yield "num_train_epochs", 0, "nothing would be trained: set more than 0, or `do_train: false` to evaluate only"


def _alignment(values: dict):
    """Yield conflicts of the image–text alignment, and keys that require one."""
    for target in values["alignment_target"]:
        if target not in ALIGNMENT_TARGETS:
            remedy = f"choose from {', '.join(ALIGNMENT_TARGETS)}{did_you_mean(target, ALIGNMENT_TARGETS)}"
            yield "alignment_target", target, remedy
    if values["align_weight"] == 0:
        if values["align_warmup_epochs"]:
            yield "align_warmup_epochs", values["align_warmup_epochs"], "there is no alignment: set `align_weight` too"
        return
    if values["vlm"] is not None:
        yield "align_weight", values["align_weight"], NO_ALIGNMENT
        return
    if values["model"] is None and values["projector_type"] not in PREFIX_PROJECTORS:
        remedy = f"an alignment needs one vector per image: set one of {', '.join(PREFIX_PROJECTORS)}"
        yield "projector_type", values["projector_type"], remedy
    if values["model"] is None and values["image_fusion"] != "encoder":
        yield "image_fusion", values["image_fusion"], "an alignment needs a text encoder: set `encoder`"
    lengths = values["epochs_per_stage"]
    first = lengths if isinstance(lengths, int) else lengths[0]
    epochs = values.get("num_train_epochs", RunArguments.num_train_epochs)
    key, available = ("epochs_per_stage", first) if values["mode"] in STAGED_MODES else ("num_train_epochs", epochs)
    if values["align_warmup_epochs"] >= available:
        remedy = f"it leaves none of the {available} epochs of `{key}` for the answer: raise `{key}`"
        yield "align_warmup_epochs", values["align_warmup_epochs"], remedy


def _objective(values: dict):
    """Yield conflicts of an objective, and keys that it does not read."""
    objective = values["objective"]
    if objective not in REWARDED:
        for key in OF_REWARDS:
            if values[key]:
                yield key, values[key], "there are no rewards: set `objective: grpo`, or remove this key"
    elif not _is_package_available("trl")[0]:
        yield "objective", objective, "rewards need trl: pip install 'mmcoconut[rl]'"
        return
    else:
        yield from _rewarded(values)
    if objective == "distill_stops":
        yield from _distilled(values)
    elif objective == "supervised" and values["stop_head"] and values["model"] is None:
        yield "stop_head", True, "nothing trains it here: set `objective: distill_stops` or grpo, or remove this key"
    if values["stop_head"] and (values["thought_schedule"] == "jacobi" or compares_jacobi(values.get("compare"))):
        yield "stop_head", True, "parallel thoughts cannot stop one by one: set `thought_schedule: sequential`"
    modes = compared_modes(values.get("compare")) or [values["mode"]]
    for mode in [mode for mode in modes if mode not in (None, "coconut")] if values["stop_head"] else []:
        yield "mode", mode, "`stop_head` ends thoughts that are fed back: set `mode: coconut`, or remove `stop_head`"


def _objectives(values: dict):
    """Yield conflicts of `objectives`, with each other and with other keys."""
    objectives = values["objectives"]
    if not objectives:
        return
    if values["objective"] != "supervised":
        yield "objectives", objectives, f"`objective: {values['objective']}` has no labelled answer: remove one"
        return
    problems = [*objective_problems(objectives)]
    yield from problems
    made = {} if problems else {name: make_objective(name, setting) for name, setting in objectives.items()}
    for name, remedy in pair_problems(made):
        yield f"objectives.{name}", objectives[name], remedy
    for name, objective in made.items():
        if not objective.is_used:
            continue
        if objective.gives_thoughts and values["mode"] == "pause":
            remedy = "`mode: pause` feeds nothing back, and this objective would: let latents read states"
            yield f"objectives.{name}", objectives[name], f"{remedy}, or set `mode: coconut`"
        key, setting = f"objectives.{name}", objectives[name]
        if "steps" in objective.fields and values["thoughts_per_turn"]:
            yield key, setting, "with `thoughts_per_turn` no thought replaces a written step: remove one of the two"
        fusion = values["image_fusion"]
        if objective.needs_images and fusion in READ_BESIDE_THE_TEXT:
            yield key, setting, f"`image_fusion: {fusion}` has no images in the text: set replace, or remove this"


def _distilled(values: dict):
    """Validate `objective: distill_stops`."""
    if values["stop_head"] is False:
        yield "stop_head", False, "`objective: distill_stops` trains that head: set `stop_head: true`"
    if values["model"] is None and not values.get("smoke_test"):
        yield "model", None, "`objective: distill_stops` needs a trained model: name its checkpoint"
    for key in (*NOT_REWARDED, "lora"):
        if values.get(key):
            yield key, values[key], "only the stop head is trained, at the last stage: remove this key"


def _rewarded(values: dict):
    """Yield conflicts of `rewards` and `rl`, and with other keys."""
    from mmcoconut.arguments.policy_arguments import check_value, passed_on  # here, because it imports trl
    from mmcoconut.objectives.rewards import reward_problems

    if values["rewards"] is not None:
        yield from reward_problems(values["rewards"])
    types = passed_on(values["objective"])
    for key, value in values["rl"].items():
        try:
            if key not in types:
                raise ValueError(f"not passed to trl{did_you_mean(key, types)}; valid are: {', '.join(types)}")
            check_value(key, typed_value(key, value, types[key]))
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
        yield "ce_weight", values["ce_weight"], "rewards use no cross-entropy: remove this key"
    if values.get("train_sampling_strategy") == "group_by_length":
        yield "train_sampling_strategy", "group_by_length", "trl repeats rows in its own order: remove this key"


def _comparison(values: dict):
    """Yield conflicts of `compare`, and keys that require it."""
    compare = values.get("compare")
    if compare is None:
        for key in ("seeds", "jobs"):
            if values.get(key) not in (None, 1):
                remedy = "only a comparison has several runs: set `compare` to its modes, or remove it"
                yield key, values[key], remedy
        return
    for name, remedy in variant_problems(compare, known_objectives()):
        yield "compare", name, remedy
    for key in NOT_COMPARED:
        if values.get(key):
            yield key, values[key], NOT_COMPARED[key]
    if not values.get("do_train", True):
        yield "do_train", False, "a comparison trains every mode: remove this key"


def _unknown_fields(values: dict):
    """Yield fields of configurations that their architecture does not have; data sets check their own options."""
    for part in ("vision_config", "text_config"):
        config = values[part] or {}
        cls = CONFIG_MAPPING[config["model_type"]] if config.get("model_type") in CONFIG_MAPPING else None
        if config.get("model_type") and cls is None:
            yield (
                part,
                config["model_type"],
                f"no such architecture{did_you_mean(config['model_type'], CONFIG_MAPPING)}",
            )
        if cls is not None:
            valid = {"model_type", *cls.attribute_map, *(field.name for field in dataclasses.fields(cls))}
            for key in sorted(config.keys() - valid):
                yield f"{part}.{key}", config[key], f"{cls.__name__} has no such field{did_you_mean(key, valid)}"


def _lora(values: dict):
    """Yield fields that peft.LoraConfig does not have."""
    lora = values["lora"]
    if lora is None:
        return
    if not is_peft_available():
        yield "lora", lora, "adapters need peft: pip install 'mmcoconut[lora]'"
        return
    for key in sorted(lora.keys() - lora_fields()):
        yield f"lora.{key}", lora[key], f"peft.LoraConfig has no such field{did_you_mean(key, lora_fields())}"


def _dataset_options(values: dict):
    """Yield options that the data set does not have, such as those that a `base` sets for another one."""
    name = values["dataset"]
    if name not in DATASETS:
        return
    known = options_of(name)
    for key in sorted(values["dataset_options"].keys() - known.keys()):
        remedy = "remove it, or set it to null where a `base` sets it"
        yield (
            f"dataset_options.{key}",
            values["dataset_options"][key],
            f"data set {name!r} has no such option{did_you_mean(key, known)}: {remedy}; valid are: {', '.join(known)}",
        )


def _missing(values: dict):
    """Yield paths that do not exist; Hub ids are not looked up."""
    for key in FOLDERS:
        if is_missing_folder(values.get(key)):
            yield key, values[key], f"no such folder: {folder_remedy(values[key])}"
    splits = (values["eval_split"],)
    if values.get("do_train", True):
        splits = ("train", *splits, *([values["test_split"]] if values.get("test_split") else []))
    for name in DATA_PATHS:
        option = values["dataset_options"].get(name) or {}
        paths = option if isinstance(option, dict) else dict.fromkeys(splits, option)
        split_of = {str(paths[split]).replace("{split}", split): split for split in splits[::-1] if paths.get(split)}
        for path, split in [*split_of.items()][::-1]:
            asked = split == values.get("test_split") and split not in ("train", values["eval_split"])
            why = f". It is read because test_split is {split!r}; null goes without one" if asked else ""
            remedy = f"no such file or folder: a relative path starts where you run this{why}"
            if not Path(path).exists():
                yield f"dataset_options.{name}", path, remedy


def problems_of(values: dict, wrong: Container[str]) -> list[tuple]:
    """Return the problems of typed values, without those of the keys in `wrong`, whose values cannot be read."""
    found = [*_conflicts(values), *_comparison(values), *_unknown_fields(values), *_lora(values)]
    found += [*without_effect(values, DEFAULTS), *_layout(values), *_alignment(values)]
    found += [*_objective(values)] if "objective" not in wrong else []
    found += [*_objectives(values)] if not {"objective", "objectives"} & {*wrong} else []
    found += [] if values.get("smoke_test") else [*_missing(values), *_dataset_options(values)]
    return [problem for problem in found if problem[0] not in wrong]


def layout_problems(arguments) -> list[tuple]:
    """Return the problems of the layout completed from a checkpoint, as (key, value, remedy)."""
    *parts, run = arguments
    values = {key: value for part in parts for key, value in vars(part).items()}
    values |= {key: getattr(run, key) for key in NAMES[-1]}
    return [*_layout(values), *_objective(values), *_objectives(values)]
