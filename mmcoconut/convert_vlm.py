"""Convert checkpoints of InternVL and LLaVA from the composed form to their own class and back.

    python -m mmcoconut.convert_vlm outputs/run outputs/own --to own

The composed form (`composed_from_vlm`) is an MMCoconutForConditionalGeneration of a VLM's parts, the own form
(`from_vlm`) a subclass of its class, which serving engines support. Both have the same weights, logits and thoughts.
"""

import logging
import shutil
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, InternVLForConditionalGeneration, LlavaForConditionalGeneration
from transformers.hf_argparser import HfArg
from transformers.modeling_utils import PreTrainedModel

from mmcoconut import vlm_processing_mmcoconut
from mmcoconut.arguments.recipes import read_arguments
from mmcoconut.build.models import SHARED_FIELDS, compose
from mmcoconut.build.processors import IF_ASKED
from mmcoconut.configuration_mmcoconut import THOUGHT_FIELDS, VERSION, MMCoconutConfig
from mmcoconut.errors import RecipeError, run_command
from mmcoconut.models import load_model, load_processor
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.records import RECIPE_FILE
from mmcoconut.vlm_mmcoconut import THOUGHT_MODULES, ThinkingVLM, thinking_class


logger = logging.getLogger("mmcoconut")

# By the projector of the composed form: model type, class and processor of the own form.
OWN = {
    "pixel_shuffle": ("internvl", InternVLForConditionalGeneration, "InternVLProcessor"),
    "mlp": ("llava", LlavaForConditionalGeneration, "LlavaProcessor"),
}
FORMS = ("own", "composed")


@dataclass
class ConversionArguments:
    """Options of a conversion."""

    source: str | None = HfArg(default=None, help="Folder or Hub id of a checkpoint in the other form.")
    target: str | None = HfArg(default=None, help="Output folder for the converted checkpoint.")
    to: str | None = HfArg(default=None, help="`own`: the VLM's own class; `composed`: its parts, as from backbones.")


# --- to the own class ------------------------------------------------------------------------------------------------
def _why_not_own(config: MMCoconutConfig) -> str | None:
    """Return what a composed model has that the own class does not support, or None."""
    tower, layers = config.vision_config, config.vision_feature_layer
    if config.image_fusion != "replace":
        return f"image_fusion is {config.image_fusion!r}, and a VLM's own class replaces tokens by features"
    if config.projector_type not in OWN:
        return f"projector_type is {config.projector_type!r}, and a VLM has one of {', '.join(OWN)}"
    side = tower.image_size if isinstance(tower.image_size, int) else tower.image_size[0]
    if config.image_size not in (None, side):
        return f"image_size is {config.image_size}, and its tower's is {side}"
    if config.vision_last_norm:
        return "vision_last_norm is True, and a VLM's own class takes this from its tower"
    if config.projector_type == "mlp":
        return None
    if tower.model_type != "internvl_vision" or not config.projector_bias or not isinstance(layers, int):
        return f"its tower ({tower.model_type}), projector_bias or vision_feature_layer differ from InternVL's"
    if layers == -1 and not (getattr(tower, "tie_last_hidden_states", False) or tower.use_mean_pooling):
        return "it reads its tower's last layer before the norm, and InternVL after it"
    return None


def _own_config(config: MMCoconutConfig):
    model_type, _, _ = OWN[config.projector_type]
    fields = {name: getattr(config, name) for name in (*SHARED_FIELDS, "image_seq_length", "tie_word_embeddings")}
    if model_type == "internvl":
        fields["downsample_ratio"] = config.downsample_ratio
    else:
        fields["multimodal_projector_bias"] = config.projector_bias
    own = CONFIG_MAPPING[model_type](vision_config=config.vision_config, text_config=config.text_config, **fields)
    for name in THOUGHT_FIELDS:
        setattr(own, name, getattr(config, name))
    own.mmcoconut_version, own.dtype = VERSION, config.dtype
    return own


def to_own(model: PreTrainedModel) -> ThinkingVLM:
    """Convert a composed model to the class of its vision-language model, with its weights; the input is consumed.

    Raises:
        ValueError: the VLM's class does not support the model; names the reason.
    """
    config = model.config
    reason = None if isinstance(config, MMCoconutConfig) else f"it is {config.model_type} in its own class already"
    reason = reason or _why_not_own(config)
    if reason is not None:
        raise ValueError(f"This model has no own form: {reason}. Keep it unchanged.")
    vars(model.model.vision_tower.config).pop("tie_last_hidden_states", None)  # InternVL's own class sets it itself
    config.vision_config, config.text_config = model.model.vision_tower.config, model.model.language_model.config
    with torch.device("meta"):
        own = thinking_class(OWN[config.projector_type][1])(_own_config(config))
    own.model.vision_tower, own.model.language_model = model.model.vision_tower, model.model.language_model
    own.lm_head = model.lm_head
    for name in ("multi_modal_projector", *THOUGHT_MODULES):
        if hasattr(own.model, name):
            getattr(own.model, name).load_state_dict(getattr(model.model, name).state_dict(), assign=True)
    own.generation_config = model.generation_config
    own.tie_weights()
    return own.eval()


def processor_to_own(processor: MMCoconutProcessor, config):
    """Build the processor of an own form from the composed one's parts.

    Args:
        config: of the own form.

    Raises:
        ValueError: settings that the VLM's own processor does not support.
    """
    if not processor.use_thumbnail:
        raise ValueError("This processor has no own form: use_thumbnail is False. Keep it unchanged.")
    _, _, name = next(own for own in OWN.values() if own[0] == config.model_type)
    made_class = getattr(vlm_processing_mmcoconut, name)
    fields = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    fields["chat_template"] = IF_ASKED + processor.chat_template
    if config.model_type == "internvl":
        videos = vlm_processing_mmcoconut.NotLoaded()  # the composed form has no video processor
        fields |= {"image_seq_length": processor.image_seq_length, "video_processor": videos}
    else:
        tower, strategy = config.vision_config, config.vision_feature_select_strategy
        patches = (tower.image_size // tower.patch_size) ** 2
        others = processor.image_seq_length + (strategy == "default") - patches
        fields |= {"patch_size": tower.patch_size, "num_additional_image_tokens": others}
        fields |= {"vision_feature_select_strategy": strategy, "image_token": processor.image_token}
    made = made_class(**fields)
    made.set_up(processor.num_latents, processor.markers)
    return made


# --- to the composed form --------------------------------------------------------------------------------------------
def to_composed(model: ThinkingVLM) -> PreTrainedModel:
    """Convert a model in its own class to the composed form, with its weights; the input is consumed.

    Raises:
        ValueError: the model is neither InternVL nor LLaVA.
    """
    known = [own[0] for own in OWN.values()]
    if model.config.model_type not in known:
        reason = f"it is {model.config.model_type} and not one of {', '.join(known)}"
        raise ValueError(f"This model has no composed form: {reason}. Keep it unchanged.")
    composed = compose(model, {name: getattr(model.config, name) for name in THOUGHT_FIELDS})
    for name in THOUGHT_MODULES:
        if hasattr(composed.model, name):
            getattr(composed.model, name).load_state_dict(getattr(model.model, name).state_dict(), assign=True)
    composed.generation_config = model.generation_config
    return composed


def processor_to_composed(processor, config: MMCoconutConfig) -> MMCoconutProcessor:
    """Build the processor of a composed form from the own one's parts.

    Args:
        config: of the composed form.

    Raises:
        ValueError: settings that the composed form does not support.
    """
    if processor.image_options:
        raise ValueError(f"This processor has no composed form: image_options are {processor.image_options}.")
    named = {name: getattr(processor.tokenizer, name, None) for name in ("start_image_token", "end_image_token")}
    return MMCoconutProcessor(
        processor.image_processor,
        processor.tokenizer,
        image_seq_length=config.image_seq_length,
        num_latents=processor.num_latents,
        markers=processor.markers,
        chat_template=processor.chat_template.removeprefix(IF_ASKED),
        image_token=processor.image_token,
        **named,
    )


# --- the command -----------------------------------------------------------------------------------------------------
def convert(source: str, *, to: str) -> tuple:
    """Return model and processor of a checkpoint, a folder or Hub id, in the form `own` or `composed`."""
    model, processor = load_model(source), load_processor(source)
    if to == "own":
        model = to_own(model)
        return model, processor_to_own(processor, model.config)
    model = to_composed(model)
    return model, processor_to_composed(processor, model.config)


def parse_arguments(argv: list[str]) -> ConversionArguments:
    usage = "mmcoconut convert vlm SOURCE TARGET --to own|composed"
    places = [*takewhile(lambda word: not word.startswith("-"), argv)]
    named = [word for pair in zip(("--source", "--target"), places) for word in pair]
    arguments = read_arguments([*named, *argv[min(2, len(places)) :]], ConversionArguments, usage)
    problems = [(name, None, "give it") for name, value in vars(arguments).items() if value is None]
    if arguments.to not in (None, *FORMS):
        problems.append(("to", arguments.to, f"choose {' or '.join(FORMS)}"))
    if arguments.target is not None and Path(arguments.target, "config.json").exists():
        problems.append(("target", arguments.target, "it holds a checkpoint: name another folder"))
    if problems:
        raise RecipeError("command line", problems)
    return arguments


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    for part in convert(arguments.source, to=arguments.to):
        part.save_pretrained(arguments.target)
    recipe = Path(arguments.source, RECIPE_FILE)
    if recipe.is_file():
        shutil.copy(recipe, arguments.target)
    logger.info("written to %s in the %s form", arguments.target, arguments.to)


if __name__ == "__main__":
    run_command(main)
