"""A tiny vision-language model of any architecture with its processor, for smoke tests and tests; no downloads."""

import re
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from mmcoconut.build.tiny_processors import image_token_id_of, tiny_vlm_processor
from mmcoconut.build.tiny_vlms import PATCH, SIDE, tiny_vlm_config
from mmcoconut.build.tokens import SPARE_TOKENS


# Image processors that enlarge small images, and cut them into tiles of a side.
CUT_INTO_TILES = ("idefics3", "smolvlm")
TILES = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
# What a processor must know of its model's tower, where its small values do not say it.
PROCESSOR_FIELDS = {"llava_onevision": {"num_image_tokens": (SIDE // PATCH) ** 2}}
PROCESSOR_FIELDS["llava_onevision"]["vision_feature_select_strategy"] = "full"
SPREAD = 0.1  # added to all weights, as new ones are too small for their errors to show


def token_ids_of(model_type: str, processor: ProcessorMixin) -> dict[str, int]:
    """Return the token ids that a model type's configuration has fields for, as the processor's tokenizer has them."""
    tokenizer, ids = processor.tokenizer, {}
    for field in CONFIG_MAPPING[model_type]().to_dict():
        found = re.fullmatch(r"(\w+)_token_(id|index)", field)
        if found is None:
            continue
        name = found[1]
        spelled = (getattr(source, f"{name}_token", None) for source in (processor, tokenizer))
        tokens = [str(token) for token in (*spelled, f"<|{name}|>", f"<{name}>") if token]
        known = [token for token in tokens if token in tokenizer.get_vocab()]
        if known:
            ids[field] = tokenizer.get_vocab()[known[0]]
        if name == "image":
            ids[field] = image_token_id_of(processor)
    return ids


def tiny_vlm(model_type: str, *, seed: int = 0, **fields) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a tiny vision-language model with random weights, and its processor.

    fields: of its configuration.

    Raises:
        NoTinyProcessorError: of an architecture whose processor cannot be made here.
    """
    image_fields = TILES if model_type in CUT_INTO_TILES else None
    processor = tiny_vlm_processor(model_type, image_fields=image_fields, **PROCESSOR_FIELDS.get(model_type, {}))
    spare = list(SPARE_TOKENS.get(model_type, ()))
    processor.tokenizer.add_special_tokens({"extra_special_tokens": spare}, replace_extra_special_tokens=False)
    ids = token_ids_of(model_type, processor)
    grids = getattr(processor.image_processor, "image_grid_pinpoints", None)  # which both sides must know
    if grids is not None:
        fields = {"image_grid_pinpoints": grids, **fields}
    config = tiny_vlm_config(model_type, len(processor.tokenizer), **ids, **fields)
    return tiny_weights(config, seed=seed), processor


@torch.no_grad()
def tiny_weights(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """Return the vision-language model of a configuration with random weights."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        parameter += SPREAD * torch.randn_like(parameter)
    return model


def write_tiny_vlm(folder: Path, model_type: str) -> None:
    """Write a vision-language model of random weights with its processor into a folder, as `from_vlm` reads them."""
    for part in tiny_vlm(model_type):
        part.save_pretrained(folder)
