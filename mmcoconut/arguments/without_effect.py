"""Find the keys of a recipe that have no effect, as errors or as warnings.

A key that lacks a required key, or contradicts another one, is an error. A key without effect in the run's mode,
checkpoint or objective is a warning, because matched controls and consecutive runs share recipes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmcoconut.arguments.choices import MARKED_MODES, STAGED_MODES, THINKING_MODES
from mmcoconut.configuration_mmcoconut import PREFIX_PROJECTORS


Problem = tuple[str, Any, str]

PREFIXED = f"only a projector_type of {', '.join(PREFIX_PROJECTORS)} reads it: remove this key"
OF_PROJECTORS = {
    "projector_num_heads": (
        ("transformer", "attention_prefix"),
        "only a projector_type of transformer, attention_prefix has heads: remove this key",
    ),
    "num_visual_tokens": (PREFIX_PROJECTORS, PREFIXED),
    "image_pooling": (PREFIX_PROJECTORS, PREFIXED),
    "alignment_adapter": (PREFIX_PROJECTORS, PREFIXED),
}
OF_ALIGNMENT = ("ce_weight", "alignment_target")
OF_PUSHING = ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision", "hub_always_push")
OF_A_LAUNCH = ("overwrite", "resume_from_checkpoint")
RECOMPUTING = ("gradient_checkpointing", "activation_checkpointing")
# By key, the modes that read it.
OF_MODES = {
    "c_thought": THINKING_MODES,
    "pad_latent_to_max": THINKING_MODES,
    "thoughts_per_turn": THINKING_MODES,
    "markers": MARKED_MODES,
    "max_latent_stage": STAGED_MODES,
    "epochs_per_stage": STAGED_MODES,
    "uniform_prob": STAGED_MODES,
    "reset_optimizer": tuple(mode for mode in STAGED_MODES if mode != "icot"),  # which always resets it
    "start_epoch": STAGED_MODES,
    "thought_norm": ("coconut",),
    "thought_schedule": ("coconut",),
    "answer_sees": THINKING_MODES,
    "bptt_thoughts": ("coconut",),
    "objectives": THINKING_MODES,
    "log_gradient_cosine": THINKING_MODES,
}
OF_NEW_PARTS = ("tokenizer_vocab_size", "new_token_init")


def _of_building(values: Mapping, changed: set[str]) -> Iterator[Problem]:
    """Yield keys of parts that this recipe does not build."""
    if values["model"] is not None or values["vlm"] is not None:
        return
    if "tokenizer_vocab_size" in changed and values["tokenizer"] != "train":
        remedy = "no tokenizer is trained: set `tokenizer: train`, or remove this key"
        yield "tokenizer_vocab_size", values["tokenizer_vocab_size"], remedy
    for key, (projectors, remedy) in OF_PROJECTORS.items():
        needed = values["align_weight"] and projectors is PREFIX_PROJECTORS  # then projector_type is the problem
        if key in changed and values["projector_type"] not in projectors and not needed:
            yield key, values[key], remedy
    layers = values["vision_feature_layer"]
    if values["vision_last_norm"] and -1 not in ([layers] if isinstance(layers, int) else layers):
        remedy = f"only layer -1 is followed by that norm, and vision_feature_layer is {layers}: remove this key"
        yield "vision_last_norm", True, remedy


def _of_training(values: Mapping, changed: set[str]) -> Iterator[Problem]:
    """Yield keys that lack a required key."""
    if values["checkpointed_passes"] != "all" and not any(values.get(key) for key in RECOMPUTING):
        remedy = "nothing is recomputed: set `activation_checkpointing: true`, or remove this key"
        yield "checkpointed_passes", values["checkpointed_passes"], remedy
    if values["log_gradient_cosine"] and not values["objectives"]:
        remedy = "there are no `objectives` to compare gradients of: set them, or remove this key"
        yield "log_gradient_cosine", True, remedy
    if values["align_weight"] == 0 and values["objective"] not in ("grpo", "rloo"):  # which report it themselves
        for key in OF_ALIGNMENT:
            if key in changed:
                yield key, values[key], "there is no alignment: set `align_weight` too, or remove this key"
    if values.get("greater_is_better") is not None and values.get("metric_for_best_model") is None:
        remedy = "the best checkpoint is that of the highest accuracy: set `metric_for_best_model` too"
        yield "greater_is_better", values["greater_is_better"], remedy


def _of_the_launch(values: Mapping) -> Iterator[Problem]:
    """Yield keys about an earlier run in output_dir that is not read."""
    if values.get("overwrite") and values.get("resume_from_checkpoint"):
        yield "overwrite", True, "the earlier run is resumed, not deleted: remove this key or `resume_from_checkpoint`"
    for key in OF_A_LAUNCH if not values.get("do_train", True) else ():
        if values.get(key):
            yield key, values[key], "with `do_train: false` nothing is trained: remove this key"


def without_effect(values: Mapping, defaults: Mapping) -> Iterator[Problem]:
    """Yield the typed `values` that nothing reads because of other keys, with the remedy.

    defaults: values of keys that were not given; a value that equals its default, or is None, was not set.
    """
    changed = {key for key, default in defaults.items() if values.get(key) not in (None, default)}
    yield from _of_building(values, changed)
    yield from _of_training(values, changed)
    yield from _of_the_launch(values)


def num_lengths(values: Mapping) -> int:
    """Return the number of entries in epochs_per_stage."""
    return len(values["epochs_per_stage"]) if isinstance(values["epochs_per_stage"], list) else 1


def idle_keys(values: Mapping, defaults: Mapping, modes: Sequence[str]) -> list[str]:
    """Return a line for each reason why keys have no effect in this run, with the keys that are set.

    modes: the run's mode, or all compared modes.
    """
    changed = {key for key, default in defaults.items() if values.get(key) not in (None, default)}
    staged = not {*modes}.isdisjoint(STAGED_MODES)
    idle = {f"`mode: {', '.join(modes)}`": [key for key, read_in in OF_MODES.items() if {*modes}.isdisjoint(read_in)]}
    if values["model"] is not None:
        idle["the checkpoint `model` (it has its own)"] = [*OF_NEW_PARTS]
    if staged and values["objective"] != "supervised":
        idle[f"`objective: {values['objective']}` (it stays at the last stage)"] = ["epochs_per_stage"]
    elif staged and num_lengths(values) > values["max_latent_stage"] + 2:
        idle[f"`max_latent_stage: {values['max_latent_stage']}` (the last entries)"] = ["epochs_per_stage"]
    if not values.get("push_to_hub"):
        idle["`push_to_hub: false`"] = [*OF_PUSHING]
    set_keys = {reason: [f"{key}: {values[key]}" for key in keys if key in changed] for reason, keys in idle.items()}
    return [f"Without effect with {reason}: {'; '.join(keys)}" for reason, keys in set_keys.items() if keys]
